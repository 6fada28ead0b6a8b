// SPDX-License-Identifier: MIT OR Apache-2.0
//! Groups of disks that share limits. The record of a group lasts until the group is removed, or the host boots again;
//! the records of disks name their groups.

mod divide;
#[cfg(test)]
mod jitter;
pub mod ledger;

use crate::folder::{self, Folder};
use crate::log::{tell, LogContext};
use control::supervisor::{self, GroupChanges};
use control::{Code, Failure, GroupName, Limits, RateShare, ShareUsage};
use ledger::{Ledger, SETTLED};
use rustix::time::{clock_gettime, ClockId};
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::watch;

/// Bytes in a second that a disk must have if all of its group ask for as much as there is: the largest request must
/// not take so long that its process seems to hang.
const LEAST_BYTES: u64 = 128 << 10;
/// Smallest limit in requests per second of a disk.
const LEAST_REQUESTS: u64 = 1;

/// A file with a group.
#[derive(Debug, Serialize, Deserialize)]
struct GroupFile {
    name: GroupName,
    limits: Limits,
}

/// A group.
#[derive(Debug)]
pub struct QuotaGroup {
    ledger: RefCell<Ledger>,
    /// Grows when all its disks are to be looked at.
    wakes: watch::Sender<u64>,
}

impl QuotaGroup {
    fn new(limits: Limits) -> Rc<QuotaGroup> {
        Rc::new(QuotaGroup {
            ledger: RefCell::new(Ledger::new(limits)),
            wakes: watch::Sender::new(0),
        })
    }

    /// Its disks are to be looked at.
    pub fn wake(&self) {
        self.wakes
            .send_modify(|wakes| *wakes = wakes.wrapping_add(1));
    }

    /// Learns when that is so.
    #[must_use]
    pub fn wakes(&self) -> watch::Receiver<u64> {
        self.wakes.subscribe()
    }

    /// Sets the disks that the group has, with their own limits.
    pub fn keep(&self, disks: &[(u32, Limits)]) {
        if self.ledger.borrow_mut().keep(disks) {
            self.wake();
        }
    }

    /// Returns the next share of a process, and its number.
    #[must_use]
    pub fn share(&self, minor: u32, pid: u32) -> (u64, RateShare) {
        self.ledger.borrow_mut().share(minor, pid, now())
    }

    /// Records the answer of a process, with its disk's use of the limits.
    pub fn answered(&self, minor: u32, pid: u32, number: u64, used: ShareUsage) {
        let mut ledger = self.ledger.borrow_mut();
        ledger.answered(minor, pid, number, used, now());
    }

    /// Records that a disk was not in the group.
    pub fn refused(&self, minor: u32, number: u64) {
        self.ledger.borrow_mut().refused(minor, number);
    }

    /// Records a request of a disk that had no task waiting for that.
    pub fn is_busy(&self, minor: u32) {
        self.ledger.borrow_mut().is_busy(minor, now());
        self.wake();
    }

    /// Returns the time until the next look at a disk; nothing if that is at the next request of the group.
    #[must_use]
    pub fn pause(&self, minor: u32) -> Option<Duration> {
        let (ledger, now) = (self.ledger.borrow(), now());
        (!ledger.is_quiet(now)).then(|| ledger.pause(minor, now))
    }
}

/// The groups of this host.
#[derive(Debug)]
pub struct Quota {
    folder: Folder,
    groups: RefCell<BTreeMap<GroupName, Rc<QuotaGroup>>>,
    /// Grows when disks come into groups, or leave them.
    changes: watch::Sender<u64>,
    started: Duration,
    /// No share is sent before this time, because processes may have more from an earlier supervisor.
    begins: Cell<Duration>,
}

/// Time of `CLOCK_MONOTONIC`.
fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
    Duration::new(now.tv_sec.unsigned_abs(), nanos)
}

impl Quota {
    /// Reads the recorded groups.
    #[must_use]
    pub fn open(folder: &Folder) -> Quota {
        let groups = match folder::files(&folder.groups(), "json") {
            Ok(files) => files.iter().filter_map(|path| read(path)).collect(),
            Err(error) => {
                let place = folder.groups();
                tell!(
                    error,
                    LogContext::default().because(&error),
                    "cannot read the groups in {}: {error}",
                    place.display()
                );
                BTreeMap::new()
            }
        };
        Quota {
            folder: folder.clone(),
            groups: RefCell::new(groups),
            changes: watch::Sender::new(0),
            started: now(),
            begins: Cell::new(Duration::ZERO),
        }
    }

    /// A group.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, name: &GroupName) -> Result<Rc<QuotaGroup>, Failure> {
        self.groups.borrow().get(name).cloned().ok_or_else(|| {
            let why =
                format!("there is no group {name}: make it: `tap-ctl group set {name} --bps 100M`");
            Failure::new(Code::NotFound, why)
        })
    }

    /// Disks have come into groups, or left them.
    pub fn changed(&self) {
        self.changes
            .send_modify(|changes| *changes = changes.wrapping_add(1));
    }

    /// Learns when that is so.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Registers a process that got its share from an earlier supervisor.
    pub fn adopt(&self, name: &GroupName, minor: u32, pid: u32) {
        let begins = self.started + SETTLED;
        self.begins.set(begins);
        if let Ok(group) = self.get(name) {
            group.ledger.borrow_mut().adopt(minor, pid, begins);
        }
    }

    /// Waits until shares may be sent.
    pub async fn begun(&self) {
        let left = self.begins.get().saturating_sub(now());
        tokio::time::sleep(left).await;
    }

    /// A process has ended.
    pub fn gone(&self, pid: u32) {
        for group in self.groups.borrow().values() {
            group.ledger.borrow_mut().gone(pid);
        }
    }

    /// Makes a group, or changes one that has so many disks.
    ///
    /// # Errors
    /// The group makes no sense, or cannot be recorded: nothing has changed.
    pub fn set(
        &self,
        name: &GroupName,
        changes: &GroupChanges,
        disks: usize,
    ) -> Result<(), Failure> {
        let known = self.groups.borrow().get(name).cloned();
        let before = known.as_ref().map(|group| group.ledger.borrow().limits());
        let limits = changes.of(before.unwrap_or_default());
        limits.check()?;
        if !limits.any() {
            return Err(Failure::invalid(format!(
                "the group {name} would limit nothing: give it --bps or --iops, or take it away: `tap-ctl group \
                 remove {name}`"
            )));
        }
        fits(name, limits, disks)?;
        let path = self.folder.group(name);
        write(&path, name, limits).map_err(|error| {
            let what = format!("cannot write down the group {name} in {}", path.display());
            Failure::system(what, &error)
        })?;
        match known {
            Some(group) => {
                group.ledger.borrow_mut().set_limits(limits);
                group.wake();
            }
            None => {
                let mut groups = self.groups.borrow_mut();
                groups.insert(name.clone(), QuotaGroup::new(limits));
                // Disks may have been in it before it was there.
                self.changed();
            }
        }
        Ok(())
    }

    /// One more disk can be in a group that has so many.
    ///
    /// # Errors
    /// There is no such group, or too little would be left for each of its disks.
    pub fn has_room(&self, name: &GroupName, disks: usize) -> Result<(), Failure> {
        let limits = self.get(name)?.ledger.borrow().limits();
        fits(name, limits, disks + 1)
    }

    /// Takes a group without disks away.
    ///
    /// # Errors
    /// There is none, or the system refuses to.
    pub fn remove(&self, name: &GroupName) -> Result<(), Failure> {
        self.get(name)?;
        let path = self.folder.group(name);
        folder::remove(&path).map_err(|error| {
            let what = format!("cannot remove {}", path.display());
            Failure::system(what, &error)
        })?;
        self.groups.borrow_mut().remove(name);
        Ok(())
    }

    /// The names of all groups.
    #[must_use]
    pub fn names(&self) -> Vec<GroupName> {
        self.groups.borrow().keys().cloned().collect()
    }

    /// Returns the state of a group, for answers.
    ///
    /// # Errors
    /// There is none.
    pub fn tell(&self, name: &GroupName) -> Result<supervisor::Group, Failure> {
        let group = self.get(name)?;
        let told = group.ledger.borrow().tell(name, now());
        Ok(told)
    }
}

/// Each of so many disks has enough to work with.
fn fits(name: &GroupName, limits: Limits, disks: usize) -> Result<(), Failure> {
    let disks = disks.max(1) as u64;
    let too_little = |what: &str, least: u64, option: &str| {
        Failure::invalid(format!(
            "{disks} disks are too many for the group {name}, in which each would have less than {least} {what} in a \
             second: give it more: `tap-ctl group set {name} {option} {}`",
            least * disks
        ))
    };
    if limits.bytes != 0 && limits.bytes / disks < LEAST_BYTES {
        return Err(too_little("bytes", LEAST_BYTES, "--bps"));
    }
    if limits.requests != 0 && u64::from(limits.requests) / disks < LEAST_REQUESTS {
        return Err(too_little("requests", LEAST_REQUESTS, "--iops"));
    }
    Ok(())
}

fn write(path: &Path, name: &GroupName, limits: Limits) -> io::Result<()> {
    let name = name.clone();
    let mut text = serde_json::to_vec_pretty(&GroupFile { name, limits })?;
    text.push(b'\n');
    folder::replace(path, &text)
}

/// Reads the record of a group. One that is not understood is logged, and left where it is.
fn read(path: &Path) -> Option<(GroupName, Rc<QuotaGroup>)> {
    let understood = fs::read(path).and_then(|text| {
        let written: GroupFile = serde_json::from_slice(&text)?;
        Ok(written)
    });
    match understood {
        Ok(written) => Some((written.name, QuotaGroup::new(written.limits))),
        Err(error) => {
            tell!(
                error,
                LogContext::default().because(&error),
                "the group in {} is not there, because that cannot be understood: make it again: `tap-ctl group set NAME --bps 100M`: {error}",
                path.display()
            );
            None
        }
    }
}
