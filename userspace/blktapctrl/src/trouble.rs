// SPDX-License-Identifier: MIT OR Apache-2.0
//! Listens to what goes wrong on the images of disks, tells about it, and pauses those that stopped.

use crate::disk::Disk;
use crate::host::{unexpected, Host};
use crate::link::Link;
use crate::process::Process;
use crate::record::Want;
use control::supervisor::{self, What, Which};
use control::tapdisk::{Reply, Request, Troubles};
use control::{Code, Failure};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Time between two events of a disk at first; it doubles while more goes wrong.
const FIRST: Duration = Duration::from_secs(1);
/// The most that it becomes.
const MOST: Duration = Duration::from_secs(60);
/// Time between two looks at a process that has much to tell, and between two attempts to pause it.
const STEP: Duration = Duration::from_secs(1);
/// An answer comes when something goes wrong.
const EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// When the next event may be told.
struct Rate {
    due: Instant,
    pause: Duration,
}

impl Rate {
    fn told(&mut self) {
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
pub async fn watch(host: Rc<Host>, process: Rc<Process>) {
    match listen(&host, &process).await {
        Err(failure) if failure.code != Code::Gone && !process.has_ended() => tracing::warn!(
            "tapdisk {} does not tell what goes wrong: {failure}",
            process.pid()
        ),
        _ => {}
    }
}

async fn listen(host: &Rc<Host>, process: &Rc<Process>) -> Result<(), Failure> {
    let mut link = process.another_link().await?;
    // Of one that an earlier supervisor has started, the past was told.
    let mut known = process.is_child().then_some(0);
    let mut rate = Rate {
        due: Instant::now(),
        pause: FIRST,
    };
    loop {
        let mut told = ask(&mut link, known).await?;
        while Instant::now() < rate.due && !(told.is_stopped && is_served(host, process)) {
            tokio::time::sleep(STEP).await;
            told = ask(&mut link, None).await?;
        }
        let new = told.count - known.unwrap_or(told.count).min(told.count);
        known = Some(told.count);
        let Some(disk) = disk_of(host, process) else {
            continue;
        };
        if new > 0 || (told.is_stopped && is_served(host, process)) {
            tell(host, &disk, &told, new.saturating_sub(1));
            rate.told();
        }
        if told.is_stopped {
            pause(host, &disk, process).await;
        }
    }
}

fn disk_of(host: &Host, process: &Rc<Process>) -> Option<Rc<Disk>> {
    host.all()
        .into_iter()
        .find(|disk| matches!(&*disk.process.borrow(), Some(its) if Rc::ptr_eq(its, process)))
}

/// Its disk is not paused yet.
fn is_served(host: &Host, process: &Rc<Process>) -> bool {
    disk_of(host, process).is_some_and(|disk| disk.record.borrow().want != Want::Paused)
}

async fn ask(link: &mut Link, after: Option<u64>) -> Result<Troubles, Failure> {
    match link.ask(&Request::Troubles { after }, &[], EVER).await? {
        Reply::Troubles(troubles) => Ok(troubles),
        reply => Err(unexpected(&reply)),
    }
}

fn tell(host: &Host, disk: &Disk, told: &Troubles, more: u64) {
    let Some(trouble) = told.last.clone() else {
        return;
    };
    let target = disk
        .record
        .borrow()
        .open
        .as_ref()
        .map(|open| open.target.clone());
    let error = std::io::Error::from_raw_os_error(trouble.errno).to_string();
    let what = What::Trouble {
        trouble,
        target,
        error,
        more,
        stopped: told.is_stopped,
    };
    host.events.add(Some(disk.minor), what);
}

/// Makes a disk that serves nothing any more one that is paused, so that it can be unpaused.
async fn pause(host: &Rc<Host>, disk: &Disk, process: &Process) {
    while !process.has_ended() && disk.record.borrow().want != Want::Paused {
        let which = Which {
            minor: Some(disk.minor),
            ..Which::default()
        };
        let question = supervisor::Request::Pause {
            which,
            timeout_s: 0,
        };
        match host.answer(question).await {
            Ok(_) => return,
            Err(failure) => tracing::warn!("disk {} is not paused: {failure}", disk.minor),
        }
        tokio::time::sleep(STEP).await;
    }
}
