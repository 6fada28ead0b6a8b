// SPDX-License-Identifier: MIT OR Apache-2.0
//! A supervisor with the disks of guest 3, which are files: a mirror is copied through the real export, and events are
//! sent when the guest is suspended.

use crate::rows::{disk_of, served};
use control::stats::{Mirror, Mirroring};
use control::supervisor::{Event, Mode, Reply, Request, Row, What};
use control::wire::Envelope;
use control::{Channel, Failure, Target};
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes of a disk.
pub(crate) const SIZE: u64 = 3 << 20;

/// A disk of the guest.
pub(crate) struct FakeDisk {
    /// Image of its configuration.
    pub(crate) own: PathBuf,
    pub(crate) target: Target,
    pub(crate) mode: Mode,
    mirror: Mirroring,
    device: u32,
}

/// Disks, and what happened to them.
#[derive(Default)]
pub(crate) struct HostState {
    pub(crate) disks: Vec<FakeDisk>,
    /// Mirrors that were begun.
    pub(crate) mirrors: usize,
    /// The next mirrors fail.
    pub(crate) mirror_fails: bool,
    /// Process that is killed when it has asked for a mirror, with the number of the mirror.
    pub(crate) killed_at: Option<usize>,
    pub(crate) program: Option<u32>,
    /// Exists when the guest is suspended.
    pub(crate) suspended: PathBuf,
    /// The supervisor ends when it has been subscribed to, and the next one sends the events.
    pub(crate) restarts: bool,
    /// Subscriptions that were answered.
    pub(crate) subscriptions: usize,
}

impl HostState {
    pub(crate) fn add(&mut self, own: PathBuf, device: u32) {
        let target = format!("aio:{}", own.display());
        self.disks.push(FakeDisk {
            target: target.parse().expect("a target"),
            mode: Mode::Write,
            mirror: Mirroring::Ended,
            device,
            own,
        });
    }

    fn rows(&self) -> Vec<Row> {
        (0..).zip(&self.disks).map(row).collect()
    }

    fn answer(&mut self, request: Request) -> Result<Reply, Failure> {
        match request {
            Request::List(_) => Ok(Reply::Disks { disks: self.rows() }),
            Request::Mirror { which, to } => {
                let minor = usize::try_from(which.minor.expect("a node")).expect("small");
                assert_eq!(which.vbd, row((0, &self.disks[minor])).vbd);
                if let Some(to) = to {
                    self.begin_mirror(minor, &to.target);
                }
                Ok(Reply::Mirror(Mirror {
                    state: self.disks[minor].mirror.clone(),
                    offset: 0,
                    copied: 0,
                    to: None,
                }))
            }
            other => panic!("no move asks for {other:?}"),
        }
    }

    /// Copies a disk, and has it switch to the copy.
    fn begin_mirror(&mut self, minor: usize, target: &Target) {
        self.mirrors += 1;
        let disk = &mut self.disks[minor];
        if self.mirror_fails {
            disk.mirror = Mirroring::Failed {
                why: "the target does not answer".into(),
            };
            return;
        }
        let copied = Command::new("qemu-img")
            .args(["convert", "-n", "-f", "raw", "-O", "raw"])
            .args([&disk.own.display().to_string(), &target.to_string()])
            .status();
        assert!(copied.expect("qemu-img").success());
        disk.target = target.clone();
        disk.mirror = Mirroring::Complete;
        if self.killed_at == Some(self.mirrors) {
            let pid = self.program.expect("a program").to_string();
            let killed = Command::new("kill").args(["-9", &pid]).status();
            assert!(killed.expect("kill").success());
        }
    }
}

fn row((minor, disk): (u32, &FakeDisk)) -> Row {
    let vbd = format!("backend/vbd/3/{}", disk.device);
    Row {
        mode: Some(disk.mode),
        disk: Some(disk_of(SIZE)),
        ..served(minor, &vbd, disk.target.clone())
    }
}

/// Answers requests until the test ends.
pub(crate) fn serve(socket: &Path, state: Arc<Mutex<HostState>>) {
    let listener = UnixListener::bind(socket).expect("a socket");
    thread::spawn(move || {
        for connection in listener.incoming() {
            let (state, channel) = (state.clone(), Channel::new(connection.expect("one")));
            thread::spawn(move || talk(channel, &state));
        }
    });
}

fn talk(mut channel: Channel, state: &Mutex<HostState>) {
    while let Ok(Some((question, _))) = channel.receive::<Request>() {
        if matches!(question.body, Request::Subscribe { .. }) {
            let is_first = {
                let mut state = state.lock().expect("the state");
                state.subscriptions += 1;
                state.restarts && state.subscriptions == 1
            };
            let told = channel.answer(question.id, Ok(Reply::Done));
            told.expect("a listener");
            if !is_first {
                tell_suspension(&mut channel, state);
            }
            return;
        }
        let answer = state.lock().expect("the state").answer(question.body);
        if channel.answer(question.id, answer).is_err() {
            return;
        }
    }
}

/// Sends an old event of each disk, and one when the guest is suspended.
fn tell_suspension(channel: &mut Channel, state: &Mutex<HostState>) {
    let now = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        u64::try_from(since.expect("after 1970").as_millis()).expect("small")
    };
    let (suspended, rows) = {
        let state = state.lock().expect("the state");
        (state.suspended.clone(), state.rows())
    };
    let mut tell = |at_ms: u64| {
        rows.iter().all(|row| {
            let event = Event {
                number: 1,
                series: 1,
                at_ms,
                minor: row.minor,
                guest: Some(3),
                guest_name: None,
                vdev: None,
                what: What::Inactive,
            };
            channel.send(&Envelope::new(0, 0, event), &[]).is_ok()
        })
    };
    let mut goes_on = tell(now() - 60_000);
    while goes_on && !suspended.exists() {
        thread::sleep(Duration::from_millis(20));
        goes_on = suspended.parent().is_some_and(Path::exists);
    }
    tell(now());
    // A supervisor does not end by itself.
    let _ = channel.receive::<Request>();
}

/// Whether a disk of this test is served from an export.
pub(crate) fn is_export(disk: &FakeDisk) -> bool {
    disk.target.export().is_some()
}

/// Reads a file.
pub(crate) fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
