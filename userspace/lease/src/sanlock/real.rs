// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests with sanlock itself, with daemons of two hosts on a lockspace in a file. They have no watchdog, so this
//! machine is safe from them, and run as whoever tests.

use super::daemon::Daemon;
use super::state::Phase;
use super::Sanlock;
use crate::{now, Lease, LeaseClaim, LeaseView};
use control::{Code, SanlockResource};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Where `cargo xtask test --lane nightly --only sanlock` unpacks it, because its package would run it on this machine.
const UNPACKED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/host-tools/usr");
const INSTALLED: &str = "/usr";
/// Seconds.
const TIMEOUT: u64 = 2;
/// Bytes of a resource.
const SIZE: u64 = 1 << 20;
/// How long anything may take but what a dead host takes.
const LIMIT: Duration = Duration::from_secs(90);

/// A lockspace and a few resources.
struct LockspaceHarness {
    dir: tempfile::TempDir,
}

/// A host: a daemon, which ends with this.
struct DaemonHost {
    folder: PathBuf,
    child: Child,
}

impl LockspaceHarness {
    fn new() -> LockspaceHarness {
        // Of a file system with direct I/O.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for (name, size) in [("space", SIZE), ("leases", 2 * SIZE)] {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_len(size).unwrap();
        }
        let bed = LockspaceHarness { dir };
        let (space, resource) = (bed.space(0), bed.resource("a").to_string());
        let mut init = sanlock(bed.dir.path());
        // A host that joins waits as long as the previous one could take by the timeout that is stored there.
        let timeout = TIMEOUT.to_string();
        run(init.args(["direct", "init", "-s", &space, "-o", &timeout]));
        let mut init = sanlock(bed.dir.path());
        run(init.args(["direct", "init", "-r", &resource]));
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn space(&self, host_id: u64) -> String {
        format!("vms:{host_id}:{}:0", self.path("space").display())
    }

    fn resource(&self, name: &str) -> SanlockResource {
        SanlockResource {
            lockspace: "vms".into(),
            name: name.into(),
            path: self.path("leases"),
            offset: 0,
        }
    }

    /// Hosts that have joined, under the numbers from 1.
    fn hosts<const N: usize>(&self, names: [&str; N]) -> [DaemonHost; N] {
        let hosts = names.map(|name| DaemonHost::start(&self.path(name), name));
        let joining = (1..).zip(&hosts).map(|(number, host)| {
            let mut join = sanlock(&host.folder);
            let (space, timeout) = (self.space(number), TIMEOUT.to_string());
            join.args(["client", "add_lockspace", "-s", &space, "-o", &timeout]);
            join.stdout(Stdio::null()).spawn().unwrap()
        });
        let joining: Vec<_> = joining.collect();
        for (mut join, host) in joining.into_iter().zip(&hosts) {
            assert!(join.wait().unwrap().success(), "{}", host.log());
        }
        hosts
    }

    fn lease(&self, host: &DaemonHost) -> Sanlock {
        let claim = LeaseClaim::new("a disk").unwrap();
        let (resource, daemon) = (self.resource("a"), host.daemon());
        let mut lease = Sanlock::new(&resource, Path::new("/srv/a.img"), claim, daemon);
        lease.needs_watchdog = false;
        lease
    }
}

impl DaemonHost {
    fn start(folder: &Path, name: &str) -> DaemonHost {
        fs::create_dir(folder).unwrap();
        let [user, group] = ["-un", "-gn"].map(|which| run(Command::new("id").arg(which)));
        let log = File::create(folder.join("log")).unwrap();
        let mut daemon = sanlock(folder);
        daemon.args(["daemon", "-D", "-w", "0", "-h", "0", "-l", "0"]);
        daemon.args(["-e", name, "-U", user.trim(), "-G", group.trim()]);
        daemon.stdout(Stdio::null()).stderr(log);
        let child = daemon.spawn().unwrap();
        let host = DaemonHost {
            folder: folder.into(),
            child,
        };
        host.until("its daemon", || host.daemon().state().is_ok());
        host
    }

    fn daemon(&self) -> Daemon {
        Daemon {
            socket: self.folder.join("sanlock.sock"),
        }
    }

    fn phase(&self) -> Option<Phase> {
        let state = self.daemon().state().unwrap();
        state.space("vms").map(|space| space.phase)
    }

    fn log(&self) -> String {
        let mut text = String::new();
        let mut log = File::open(self.folder.join("log")).unwrap();
        log.read_to_string(&mut text).unwrap();
        text
    }

    fn until(&self, what: &str, mut is: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is() {
            assert!(start.elapsed() < LIMIT, "no {what}: {}", self.log());
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// As when the host loses its power.
    fn die(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for DaemonHost {
    fn drop(&mut self) {
        // It may have ended, as a test wanted it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// sanlock, where it does without rights that only root has.
fn sanlock(folder: &Path) -> Command {
    let program = |place: &&str| Path::new(place).join("sbin/sanlock").exists();
    let place = [UNPACKED, INSTALLED].into_iter().find(program);
    let place = place.expect(
        "there is no sanlock, whose daemon this test runs: cargo xtask test --lane nightly --only sanlock unpacks it in target/host-tools",
    );
    let mut command = Command::new(Path::new(place).join("sbin/sanlock"));
    if place == UNPACKED {
        let libraries = Path::new(place).join("lib/x86_64-linux-gnu");
        command.env("LD_LIBRARY_PATH", libraries);
    }
    command
        .env("SANLOCK_RUN_DIR", folder)
        .env("SANLOCK_PRIVILEGED", "0");
    command
}

fn run(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {out:?}");
    String::from_utf8(out.stdout).unwrap()
}

#[test]
#[ignore = "it keeps the daemon's times: cargo xtask test --lane nightly --only sanlock"]
fn sanlock_gives_it_to_one_host_and_to_no_other_until_its_io_is_over() {
    let bed = LockspaceHarness::new();
    let [alpha, beta] = bed.hosts(["alpha", "beta"]);
    let (mut a, mut b) = (bed.lease(&alpha), bed.lease(&beta));
    assert!(matches!(
        a.inspect().unwrap(),
        LeaseView::Free { generation: 0, .. }
    ));
    let grant = a.take(Duration::ZERO).unwrap();
    let most = Duration::from_secs(6 * TIMEOUT);
    assert!(!grant.term.is_over() && grant.term.until() <= now() + most);
    // The process that took it has ended, with I/O under way.
    drop(a);
    let refused = b.take(Duration::ZERO).unwrap_err();
    assert_eq!(refused.code, Code::Busy, "{refused}: {}", beta.log());
    for word in ["host alpha (host 1 of the lockspace vms", "since 2"] {
        assert!(refused.message.contains(word), "{refused}");
    }
    let mut next = bed.lease(&alpha);
    assert_eq!(
        next.resume(grant.generation).unwrap().generation,
        grant.generation
    );
    next.keep().unwrap();
    next.give_up().unwrap();
    assert!(
        matches!(next.inspect().unwrap(), LeaseView::Free { generation, .. } if generation == grant.generation)
    );
    let taken = b.take(Duration::ZERO).unwrap();
    assert!(taken.generation > grant.generation);
    assert_eq!(next.resume(0).unwrap_err().code, Code::Gone);

    // A resource with a wrong name or place.
    let mut other = bed.lease(&alpha);
    other.resource.name = "b".into();
    assert_eq!(other.take(Duration::ZERO).unwrap_err().code, Code::Image);
    other.resource.offset = SIZE;
    let none = other.take(Duration::ZERO).unwrap_err();
    assert!(
        none.message.contains("sanlock direct init -r vms:b:/"),
        "{none}"
    );
    other.resource.path = bed.path("nothing");
    assert_eq!(other.take(Duration::ZERO).unwrap_err().code, Code::NotFound);
    other.resource.lockspace = "others".into();
    let none = other.take(Duration::ZERO).unwrap_err();
    assert!(none.message.contains("not joined"), "{none}");

    // The storage of the lockspace fails.
    File::options()
        .write(true)
        .open(bed.path("space"))
        .unwrap()
        .set_len(0)
        .unwrap();
    let mut lost = None;
    beta.until("loss", || {
        lost = b.keep().err();
        lost.is_some()
    });
    let lost = lost.unwrap();
    assert_eq!(lost.code, Code::Gone, "{lost}");
    assert!(taken.term.is_over());
    // A host without a lease leaves the lockspace; one whose I/O may be under way does not, until it is over.
    alpha.until("end of its lockspace", || alpha.phase().is_none());
    beta.until("wait for the end of its I/O", || {
        beta.log().contains("used by orphan")
    });
    assert_eq!(beta.phase(), Some(Phase::Ending));
    bed.lease(&beta).settle().unwrap();
    beta.until("end of its lockspace", || beta.phase().is_none());
}

#[test]
#[ignore = "it keeps the daemon's times: cargo xtask test --lane nightly --only sanlock"]
fn sanlock_gives_it_to_another_host_when_the_watchdog_has_reset_the_first() {
    let bed = LockspaceHarness::new();
    let [alpha, beta] = bed.hosts(["alpha", "beta"]);
    let first = bed.lease(&alpha).take(Duration::ZERO).unwrap();
    let died = Instant::now();
    alpha.die();
    let mut b = bed.lease(&beta);
    let refused = b.take(Duration::ZERO).unwrap_err();
    assert!(refused.message.contains("host alpha"), "{refused}");
    let fires = Duration::from_secs(8 * TIMEOUT + 60);
    let taken = b.take(fires + LIMIT).unwrap();
    assert!(died.elapsed() > fires - Duration::from_secs(2 * TIMEOUT));
    assert!(taken.generation > first.generation);
}
