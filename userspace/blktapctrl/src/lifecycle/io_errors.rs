// SPDX-License-Identifier: MIT OR Apache-2.0
//! Listens to what goes wrong on the images of disks, tells about it, and pauses those that stopped.

use super::Lifecycle;
use crate::disk::{Disk, DiskFate};
use crate::log::tell;
use crate::process::Process;
use crate::record::DesiredState;
use crate::registry::Registry;
use crate::rpc_client::{unexpected, RpcClient, EVER};
use control::supervisor::{Kernel, What};
use control::tapdisk::{Call, IoErrorReport, Reply, Request, Trouble};
use control::{Code, Failure, LeaseKind};
use std::convert::Infallible;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Time between two events of a disk at first; it doubles while more goes wrong.
const FIRST: Duration = Duration::from_secs(1);
/// The most that it becomes.
const MOST: Duration = Duration::from_secs(60);
/// Time between two looks at a process that has much to tell, and between two attempts to pause it.
const STEP: Duration = Duration::from_secs(1);
/// Time until the next question to a process that answered without news.
const NOTHING: Duration = Duration::from_millis(100);
/// How long a process may take to pause its disk.
const PAUSE: Duration = Duration::from_secs(120);

/// Time at which the next event may be reported.
pub(super) struct EventRate {
    due: Instant,
    pause: Duration,
}

impl EventRate {
    /// From now on.
    pub(super) fn new() -> EventRate {
        EventRate {
            due: Instant::now(),
            pause: FIRST,
        }
    }

    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= self.due
    }

    pub(super) fn told(&mut self) {
        let now = Instant::now();
        // It has been quiet.
        if now > self.due + self.pause {
            self.pause = FIRST;
        }
        self.due = now + self.pause;
        self.pause = (self.pause * 2).min(MOST);
    }
}

/// Listens to a process until it ends.
pub(super) async fn watch(lifecycle: Rc<Lifecycle>, process: Rc<Process>) {
    // An earlier supervisor has reported the past of a process that it started.
    let mut known = process.is_child().then_some(0);
    let listen = async || listen(&lifecycle, &process, &mut known).await;
    until_end(&lifecycle, &process, "tell what goes wrong", listen).await;
}

/// Listens to a process again and again: a moment in which it does not answer, or has no room for a connection, must
/// not be the end of it. A process that does not know the question gets no more.
pub(super) async fn until_end(
    lifecycle: &Lifecycle,
    process: &Process,
    what: &str,
    mut listen: impl AsyncFnMut() -> Result<Infallible, Failure>,
) {
    let mut rate = EventRate::new();
    while !process.has_ended() {
        let Err(failure) = listen().await;
        if process.has_died(&failure).await {
            return;
        }
        let is_deaf = matches!(failure.code, Code::Invalid | Code::Unsupported);
        if is_deaf || rate.is_due() {
            rate.told();
            let pid = process.pid();
            let about = lifecycle.registry.about(process).failed(&failure);
            tell!(warn, about, "tapdisk {pid} does not {what}: {failure}");
        }
        if is_deaf {
            return;
        }
        tokio::time::sleep(STEP).await;
    }
}

async fn listen(
    lifecycle: &Rc<Lifecycle>,
    process: &Process,
    known: &mut Option<u64>,
) -> Result<Infallible, Failure> {
    let registry = &lifecycle.registry;
    let mut link = process.another_link().await?;
    let mut rate = EventRate::new();
    loop {
        let mut told = ask(&mut link, *known).await?;
        while !(rate.is_due() || told.is_stopped && is_served(registry, process)) {
            tokio::time::sleep(STEP).await;
            told = ask(&mut link, None).await?;
        }
        let new = told.count - known.unwrap_or(told.count).min(told.count);
        *known = Some(told.count);
        let disk = registry.of_process(process);
        if new == 0 || disk.is_none() {
            // It has nothing to report, or has no disk: the next question to a process that answers at once comes
            // later.
            tokio::time::sleep(NOTHING).await;
        }
        let Some(disk) = disk else {
            continue;
        };
        if new > 0 || (told.is_stopped && is_served(registry, process)) {
            tell(registry, &disk, &told, new.saturating_sub(1));
            rate.told();
        }
        if told.is_stopped {
            pause(lifecycle, &disk, process).await;
        }
    }
}

/// Its disk is not paused yet.
fn is_served(registry: &Registry, process: &Process) -> bool {
    registry
        .of_process(process)
        .is_some_and(|disk| disk.record.borrow().want != DesiredState::Paused)
}

async fn ask(link: &mut RpcClient, after: Option<u64>) -> Result<IoErrorReport, Failure> {
    match link.ask(&Request::Troubles { after }, &[], EVER).await? {
        Reply::Troubles(troubles) => Ok(troubles),
        reply => Err(unexpected(&reply)),
    }
}

fn tell(registry: &Registry, disk: &Disk, told: &IoErrorReport, more: u64) {
    if let Some(trouble) = told.last.clone() {
        add(registry, disk, trouble, more, told.is_stopped);
    }
}

/// Reports flushes that failed in the kernel, which only counts them. The guest has got the
/// errors.
pub(crate) fn tell_of_kernel(registry: &Registry, disk: &Disk, status: &Kernel) {
    let told = disk.record.borrow().failed_flushes;
    let new = status.failed_flushes.wrapping_sub(told);
    if new == 0 {
        return;
    }
    disk.record.borrow_mut().failed_flushes = status.failed_flushes;
    registry.note(disk);
    let trouble = Trouble {
        what: Call::Flush,
        offset: 0,
        len: 0,
        errno: rustix::io::Errno::IO.raw_os_error(),
    };
    add(registry, disk, trouble, u64::from(new) - 1, false);
}

fn add(registry: &Registry, disk: &Disk, trouble: Trouble, more: u64, stopped: bool) {
    let target = disk
        .record
        .borrow()
        .open
        .as_ref()
        .map(|open| open.target.clone());
    let is_reserved = matches!(&target, Some(target) if *target.lease() == LeaseKind::Reservation);
    let error = match trouble.errno == rustix::io::Errno::BADE.raw_os_error() && is_reserved {
        true => {
            "the storage refuses it, because the reservation is lost: see `tap-ctl lease show TARGET`".into()
        }
        false => std::io::Error::from_raw_os_error(trouble.errno).to_string(),
    };
    if stopped {
        disk.record.borrow_mut().stopped = Some(error.clone());
        registry.note(disk);
    }
    let what = What::Trouble {
        trouble,
        target,
        error,
        more,
        stopped,
    };
    registry.events.add(Some(disk.minor), what);
}

/// Pauses a disk that must not resume before an administrator has looked at it, without waiting for that.
pub(super) fn pause_for_good(lifecycle: &Rc<Lifecycle>, disk: &Rc<Disk>) {
    let (lifecycle, disk) = (lifecycle.clone(), disk.clone());
    tokio::task::spawn_local(async move {
        while disk.fate() == DiskFate::Stays && disk.record.borrow().want == DesiredState::Served {
            match lifecycle.pause(&disk, PAUSE).await {
                Ok(()) => return,
                Err(failure) => tracing::warn!("disk {} is not paused: {failure}", disk.minor),
            }
            tokio::time::sleep(STEP).await;
        }
    });
}

/// Makes a disk that serves nothing any more one that is paused, so that it can be unpaused.
async fn pause(lifecycle: &Rc<Lifecycle>, disk: &Rc<Disk>, process: &Process) {
    while !process.has_ended() && disk.record.borrow().want != DesiredState::Paused {
        match lifecycle.pause(disk, PAUSE).await {
            Ok(_) => return,
            Err(failure) => tell!(
                warn,
                disk.about().failed(&failure),
                "disk {} is not paused: {failure}",
                disk.minor
            ),
        }
        tokio::time::sleep(STEP).await;
    }
}
