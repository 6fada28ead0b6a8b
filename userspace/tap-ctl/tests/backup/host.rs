// SPDX-License-Identifier: MIT OR Apache-2.0
//! A supervisor with the disks of guest 3: real files, of which each request of a backup does what blktapctrl would do.
//! It ends the program that asks, or its own connection, at any request.

use crate::rows::{disk_of, served};
use control::stats::{Mirror, Mirroring};
use control::supervisor::{Mode, Reply, Request, Row, Snapshot, Which};
use control::{Changed, Channel, Code, Extent, Failure, Mark, MarkName, Target};
use rustix::process::{kill_process, Pid, Signal};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bytes of a disk, and of a unit of its dirty bitmaps.
pub(crate) const SIZE: u64 = 1 << 20;
const UNIT: u64 = 64 << 10;

/// Action at a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The program is killed before the request is executed.
    KillBefore,
    /// The program is killed after that, before the answer.
    KillAfter,
    /// The supervisor ends before the request is executed.
    EndBefore,
    /// The supervisor ends after that, before the answer.
    EndAfter,
}

/// A disk.
#[derive(Debug)]
pub(crate) struct FakeDisk {
    pub(crate) minor: u32,
    pub(crate) vbd: String,
    /// The image of the configuration.
    pub(crate) own: PathBuf,
    /// The image that has the writes since the last snapshot.
    pub(crate) overlay: Option<PathBuf>,
    /// Content that the guest sees.
    pub(crate) content: Vec<u8>,
    pub(crate) marks: Vec<(Mark, BTreeSet<u64>)>,
    mirror: Mirroring,
    /// Target and mode that lists show in place of its own.
    pub(crate) shown: Option<(Target, Mode)>,
}

/// Function that gets the process that was started.
pub(crate) type StartHook = Box<dyn Fn(u32) + Send>;

/// Disks of the host, and faults to come.
#[derive(Default)]
pub(crate) struct HostState {
    pub(crate) disks: Vec<FakeDisk>,
    /// Content of each disk at each snapshot, by the new image.
    pub(crate) frozen: BTreeMap<PathBuf, Vec<u8>>,
    /// Requests since the last [`HostState::begin`].
    pub(crate) requests: usize,
    fault: Option<(usize, Fault)>,
    /// Bytes in a second of each merge that was requested.
    pub(crate) merge_rates: Vec<u64>,
    /// Merges that fail before one succeeds.
    pub(crate) failing_merges: u32,
    program: Option<u32>,
    /// Called with each program that was started.
    pub(crate) on_start: Option<StartHook>,
    /// Exists while the guest's file systems are frozen.
    pub(crate) frozen_file: PathBuf,
    /// Whether they were frozen at each request for a snapshot.
    pub(crate) frozen_at_snapshot: Vec<bool>,
    /// Time that a snapshot takes.
    pub(crate) slow_snapshot: Option<Duration>,
    /// The fault of this program's run has happened.
    has_failed: bool,
    next_mark: u64,
    chance: u64,
}

impl FakeDisk {
    fn write(&mut self, offset: u64, byte: u8) {
        let range =
            usize::try_from(offset).expect("small")..usize::try_from(offset + 512).expect("small");
        self.content[range].fill(byte);
        if self.overlay.is_none() {
            fs::write(&self.own, &self.content).expect("write");
        }
        for (_, bits) in &mut self.marks {
            bits.insert(offset / UNIT);
        }
    }

    fn target(&self) -> Target {
        let text = match &self.overlay {
            Some(path) => format!("qcow2:{}", path.display()),
            None => format!("direct=no,aio:{}", self.own.display()),
        };
        text.parse().expect("a target")
    }

    fn row(&self) -> Row {
        let own = || (self.target(), Mode::Write);
        let (target, mode) = self.shown.clone().unwrap_or_else(own);
        Row {
            mode: Some(mode),
            disk: Some(disk_of(SIZE)),
            ..served(self.minor, &self.vbd, target)
        }
    }

    fn snapshot(&mut self, path: &Path) -> Snapshot {
        if self.overlay.is_none() {
            let (own, new) = (self.own.display(), path.display());
            crate::tapimg(&format!("create qcow2:{new} --parent aio:{own}"));
            mode(&self.own, 0o400);
            self.overlay = Some(path.to_owned());
        }
        Snapshot {
            minor: self.minor,
            target: self.target(),
            parent: self.own.clone(),
            marked: true,
            pause_us: None,
        }
    }

    fn merge(&mut self) {
        let Some(overlay) = self.overlay.take() else {
            return;
        };
        mode(&self.own, 0o600);
        fs::write(&self.own, &self.content).expect("write");
        mode(&overlay, 0o400);
        self.mirror = Mirroring::Complete;
    }
}

pub(crate) fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

impl HostState {
    pub(crate) fn add(&mut self, own: PathBuf, device: u32) {
        fs::write(&own, vec![0; usize::try_from(SIZE).expect("small")]).expect("write");
        mode(&own, 0o600);
        let minor = u32::try_from(self.disks.len()).expect("few");
        self.disks.push(FakeDisk {
            minor,
            vbd: format!("backend/vbd/3/{device}"),
            own,
            overlay: None,
            content: vec![0; usize::try_from(SIZE).expect("small")],
            marks: Vec::new(),
            mirror: Mirroring::Ended,
            shown: None,
        });
        (0..20).for_each(|_| self.load());
    }

    /// Counts requests from now on, and does this at one of them.
    pub(crate) fn begin(&mut self, fault: Option<(usize, Fault)>) {
        (self.requests, self.fault) = (0, fault);
        self.has_failed &= fault.is_none();
    }

    pub(crate) fn run_by(&mut self, program: u32) {
        self.program = Some(program);
        if let Some(hook) = &self.on_start {
            hook(program);
        }
    }

    /// Whether the last fault has happened.
    pub(crate) fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// The guest writes somewhere on each disk.
    pub(crate) fn load(&mut self) {
        if self.frozen_file.exists() {
            return;
        }
        for disk in &mut self.disks {
            for _ in 0..3 {
                self.chance = self
                    .chance
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                let sector = (self.chance >> 33) % (SIZE / 512);
                disk.write(sector * 512, (self.chance >> 20) as u8 | 1);
            }
        }
    }

    fn disk(&mut self, which: &Which) -> Result<&mut FakeDisk, Failure> {
        let fits = |disk: &&mut FakeDisk| {
            which.minor.is_none_or(|minor| minor == disk.minor)
                && which.vbd.as_ref().is_none_or(|vbd| *vbd == disk.vbd)
        };
        let mut disks = self.disks.iter_mut();
        disks
            .find(fits)
            .ok_or_else(|| Failure::new(Code::NotFound, "there is no such disk"))
    }

    fn mark(&mut self, which: &Which, name: MarkName) -> Result<Reply, Failure> {
        self.next_mark += 1;
        let mark = Mark {
            name,
            number: self.next_mark,
            at_ms: 0,
            unit: UNIT,
        };
        let disk = self.disk(which)?;
        disk.marks.push((mark, BTreeSet::new()));
        Ok(marks(disk))
    }

    fn changed(&mut self, which: &Which, since: &MarkName, from: u64) -> Result<Reply, Failure> {
        let disk = self.disk(which)?;
        let found = disk.marks.iter().find(|(mark, _)| mark.name == *since);
        let (mark, bits) = found.ok_or_else(|| Failure::new(Code::NotFound, "no such mark"))?;
        // Eight at a time, as if there were too many for one answer.
        let mut units = bits.iter().map(|unit| unit * UNIT).filter(|at| *at >= from);
        let extents: Vec<Extent> = units
            .by_ref()
            .take(8)
            .map(|offset| Extent {
                offset,
                length: UNIT,
            })
            .collect();
        Ok(Reply::Changed(Changed {
            mark: mark.number,
            size: SIZE,
            extents,
            next: units.next(),
        }))
    }

    fn snapshots(&mut self, disks: &[(Which, Target)]) -> Result<Vec<Snapshot>, Failure> {
        let mut taken = Vec::new();
        self.frozen_at_snapshot.push(self.frozen_file.exists());
        if let Some(time) = self.slow_snapshot {
            std::thread::sleep(time);
        }
        for (which, target) in disks {
            let path = target.path().expect("a path").to_owned();
            let disk = self.disk(which)?;
            taken.push(disk.snapshot(&path));
            let content = disk.content.clone();
            self.frozen.entry(path).or_insert(content);
        }
        Ok(taken)
    }

    fn answer(&mut self, request: Request) -> Result<Reply, Failure> {
        self.load();
        Ok(match request {
            Request::List(_) => Reply::Disks {
                disks: self.disks.iter().map(FakeDisk::row).collect(),
            },
            Request::Marks(which) => marks(self.disk(&which)?),
            Request::Mark { which, name } => self.mark(&which, name)?,
            Request::Unmark { which, name } => {
                let disk = self.disk(&which)?;
                disk.marks.retain(|(mark, _)| mark.name != name);
                marks(disk)
            }
            Request::Changed { which, since, from } => self.changed(&which, &since, from)?,
            Request::Snapshot { which, target } => {
                let mut taken = self.snapshots(&[(which, target)])?;
                Reply::Snapshot(taken.remove(0))
            }
            Request::Snapshots { disks } => Reply::Snapshots {
                taken: self.snapshots(&disks)?,
            },
            Request::Commit { which, to } => {
                self.merge_rates.push(to.rate);
                let fails = self.failing_merges > 0;
                self.failing_merges = self.failing_merges.saturating_sub(1);
                let disk = self.disk(&which)?;
                assert_eq!(
                    to.target.to_string(),
                    format!("direct=no,aio:{}", disk.own.display())
                );
                disk.mirror = match fails {
                    true => Mirroring::Failed {
                        why: "the process has died".into(),
                    },
                    false => Mirroring::Copying,
                };
                mirror(disk)
            }
            Request::Mirror { which, to: None } => {
                let disk = self.disk(&which)?;
                if disk.mirror == Mirroring::Copying {
                    disk.merge();
                }
                mirror(disk)
            }
            other => panic!("a backup does not ask for {other:?}"),
        })
    }

    fn kill(&self) {
        let pid = self.program.expect("a program");
        let pid = Pid::from_raw(pid.try_into().expect("a pid")).expect("a pid");
        kill_process(pid, Signal::KILL).expect("killed");
    }
}

fn marks(disk: &FakeDisk) -> Reply {
    Reply::Marks {
        marks: disk.marks.iter().map(|(mark, _)| mark.clone()).collect(),
    }
}

fn mirror(disk: &FakeDisk) -> Reply {
    Reply::Mirror(Mirror {
        state: disk.mirror.clone(),
        offset: 0,
        copied: 0,
        to: None,
    })
}

/// Answers requests until the test ends.
pub(crate) fn serve(socket: &Path, state: Arc<Mutex<HostState>>) {
    let listener = UnixListener::bind(socket).expect("a socket");
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut channel = Channel::new(connection.expect("a connection"));
            // The program may be killed within a message.
            while let Ok(Some((question, _))) = channel.receive::<Request>() {
                let mut state = state.lock().expect("the state");
                state.requests += 1;
                let now = state.requests;
                let fault = state
                    .fault
                    .filter(|(at, _)| *at == now)
                    .map(|(_, what)| what);
                state.has_failed |= fault.is_some();
                match fault {
                    Some(Fault::KillBefore) => {
                        state.kill();
                        break;
                    }
                    Some(Fault::EndBefore) => break,
                    _ => {}
                }
                let answer = state.answer(question.body);
                match fault {
                    Some(Fault::KillAfter) => {
                        state.kill();
                        break;
                    }
                    Some(Fault::EndAfter) => break,
                    _ => {}
                }
                drop(state);
                if channel.answer(question.id, answer).is_err() {
                    break;
                }
            }
        }
    });
}
