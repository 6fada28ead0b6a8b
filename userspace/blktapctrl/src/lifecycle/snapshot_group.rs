// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshots of several disks at one instant: no disk is served from its new image while another one is served from its
//! old one. So what one of them has, and was made durable before something that another has, is not missing: a database
//! with its log on another disk comes back from the old images as from a loss of power.
//!
//! Until that instant the failure of one is that of all, and all are served as before. After it each disk is
//! independent: a new image that cannot be served leaves that disk with its old one, and the others with their new
//! ones, and the failure names them. So it is with a supervisor that ends: the next one finishes or undoes each disk as
//! its record says.

use super::{of_a_process, Lifecycle};
use crate::disk::Disk;
use control::supervisor::Snapshot;
use control::{Code, Failure, Target};
use futures::future::join_all;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::{MutexGuard, Notify};

/// Disks of one instant at most.
const MOST: usize = 256;
/// How long disks wait, as long as they are served, until all have their new images.
const READY: Duration = Duration::from_secs(180);
/// How long disks wait for the one that comes last: its guest is not the only one that would have to.
const LIMIT: Duration = Duration::from_secs(20);

/// The instant, and the moment before it in which all are ready for that.
pub(super) struct SnapshotBarrier {
    /// Disks that are not ready.
    unready: RefCell<BTreeSet<u32>>,
    /// Disks that are still served.
    served: RefCell<BTreeSet<u32>>,
    /// Why it does not come.
    failed: RefCell<Option<Failure>>,
    changed: Notify,
}

impl SnapshotBarrier {
    fn new(disks: impl Iterator<Item = u32>) -> Self {
        let all: BTreeSet<u32> = disks.collect();
        Self {
            unready: RefCell::new(all.clone()),
            served: RefCell::new(all),
            failed: RefCell::new(None),
            changed: Notify::new(),
        }
    }

    /// One has its new image, and is served: waits until all have. Refusals come before a guest has to wait.
    ///
    /// # Errors
    /// Another one cannot have one, or takes too long.
    pub(super) async fn ready(&self, minor: u32) -> Result<(), Failure> {
        self.wait(&self.unready, minor, READY, "is not ready").await
    }

    /// One is served no more: waits until none is.
    ///
    /// # Errors
    /// Another one cannot be, or takes too long.
    pub(super) async fn arrive<'a>(&self, disk: &'a Disk) -> Result<BarrierWait<'a>, Failure> {
        let waits = BarrierWait::of(disk);
        let what = "has not released its image";
        self.wait(&self.served, disk.minor, LIMIT, what).await?;
        Ok(waits)
    }

    async fn wait(
        &self,
        absent: &RefCell<BTreeSet<u32>>,
        minor: u32,
        limit: Duration,
        what: &str,
    ) -> Result<(), Failure> {
        if self.failed.borrow().is_none() {
            absent.borrow_mut().remove(&minor);
        }
        self.changed.notify_waiters();
        let all = tokio::time::timeout(limit, self.decided(absent));
        all.await.unwrap_or_else(|_| {
            let who = absent.borrow().first().copied().unwrap_or_default();
            let late = Failure::new(
                Code::Timeout,
                format!("disk {who} {what} after {} s", limit.as_secs()),
            );
            self.fail(&late);
            Err(late)
        })
    }

    async fn decided(&self, absent: &RefCell<BTreeSet<u32>>) -> Result<(), Failure> {
        loop {
            let changed = self.changed.notified();
            if let Some(failure) = &*self.failed.borrow() {
                return Err(failure.clone());
            }
            if absent.borrow().is_empty() {
                return Ok(());
            }
            changed.await;
        }
    }

    /// Records why a disk does not come, while the group waits for one.
    pub(super) fn fail(&self, why: &Failure) {
        if !self.served.borrow().is_empty() {
            self.failed.borrow_mut().get_or_insert_with(|| why.clone());
            self.changed.notify_waiters();
        }
    }
}

/// As long as this is there a disk waits for others, or is not served again after that, and its process is not to be
/// blamed for it.
pub(super) struct BarrierWait<'a>(&'a Disk);

impl<'a> BarrierWait<'a> {
    fn of(disk: &'a Disk) -> Self {
        disk.waits_for_others.set(true);
        Self(disk)
    }
}

impl Drop for BarrierWait<'_> {
    fn drop(&mut self) {
        self.0.waits_for_others.set(false);
        let (answered, _) = self.0.progress.get();
        self.0.progress.set((answered, Instant::now()));
    }
}

impl Lifecycle {
    /// Switches disks to new images at one instant.
    ///
    /// # Errors
    /// They are served as before; or some are not, which the message says.
    pub async fn snapshots(
        self: &Rc<Self>,
        mut wanted: Vec<(Rc<Disk>, Target)>,
    ) -> Result<Vec<Snapshot>, Failure> {
        check(&wanted)?;
        // In one order, so that two of these do not wait for each other.
        wanted.sort_by_key(|(disk, _)| disk.minor);
        // Each in its own turn, and all to the end: a disk that hangs does not hold the others up.
        let finished = join_all(wanted.iter().map(|(disk, _)| self.finish_alone(disk))).await;
        finished.into_iter().collect::<Result<(), Failure>>()?;
        let turns = turns(&wanted).await?;
        if let Some((disk, _)) = wanted.iter().find(|(disk, _)| disk.doing().is_some()) {
            return Err(Failure::new(
                Code::Busy,
                format!(
                    "something else has begun with disk {}: ask again",
                    disk.minor
                ),
            ));
        }
        let before = wanted
            .iter()
            .map(|(disk, target)| self.taken_before(disk, target));
        let before: Vec<Snapshot> = join_all(before).await.into_iter().flatten().collect();
        if before.len() == wanted.len() {
            return Ok(before);
        }
        if !before.is_empty() {
            // A supervisor ended between two of them, or an administrator has asked for one alone.
            let rest = "the others are served as before: name new images for all";
            return Err(of_no_instant(&before, Code::State, rest));
        }
        let together = SnapshotBarrier::new(wanted.iter().map(|(disk, _)| disk.minor));
        let each = wanted.iter().zip(turns).map(|((disk, target), turn)| {
            let together = &together;
            async move {
                // Later verbs of this disk do not wait for another disk that hangs.
                let _turn = turn;
                let taken = self.take_snapshot(disk, target.clone(), Some(together));
                taken.await.inspect_err(|failure| together.fail(failure))
            }
        });
        let results = join_all(each).await;
        let failed = together.failed.borrow().clone();
        let said = match failed {
            Some(failure) => Err(failure),
            None => all_or_said(results),
        };
        said.map_err(of_a_process)
    }
}

impl Lifecycle {
    async fn finish_alone(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let _turn = disk.turn().await?;
        self.finish_before(disk).await
    }
}

/// The turns of all. No other verb can use any of them until the last turn is there, so the wait is short.
async fn turns(wanted: &[(Rc<Disk>, Target)]) -> Result<Vec<MutexGuard<'_, ()>>, Failure> {
    let all = async {
        let mut turns = Vec::new();
        for (disk, _) in wanted {
            turns.push(disk.turn().await?);
        }
        Ok(turns)
    };
    match tokio::time::timeout(LIMIT, all).await {
        Ok(turns) => turns,
        Err(_) => Err(Failure::new(
            Code::Busy,
            "something else is being done to one of the disks: see `tap-ctl list`, and ask again",
        )),
    }
}

/// Returns the snapshots; if one failed, an error that also names those that were taken.
fn all_or_said(results: Vec<Result<Snapshot, Failure>>) -> Result<Vec<Snapshot>, Failure> {
    let (taken, failed): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    let taken: Vec<Snapshot> = taken.into_iter().flatten().collect();
    let Some(Err(failure)) = failed.into_iter().next() else {
        return Ok(taken);
    };
    if taken.is_empty() {
        return Err(failure);
    }
    Err(of_no_instant(&taken, failure.code, &failure.message))
}

/// Only these were taken.
fn of_no_instant(taken: &[Snapshot], code: Code, rest: &str) -> Failure {
    let on: Vec<String> = taken.iter().map(|taken| taken.minor.to_string()).collect();
    Failure::new(
        code,
        format!(
            "not all disks switched to new images, so the old ones are of no instant; those that did, and whose \
             configuration must name the new one: {}; {rest}",
            on.join(", "),
        ),
    )
}

fn check(wanted: &[(Rc<Disk>, Target)]) -> Result<(), Failure> {
    if wanted.is_empty() || wanted.len() > MOST {
        return Err(Failure::invalid(format!(
            "{} disks cannot switch to new images at one instant: 1 to {MOST}",
            wanted.len()
        )));
    }
    let disks: BTreeSet<u32> = wanted.iter().map(|(disk, _)| disk.minor).collect();
    let images: BTreeSet<String> = wanted
        .iter()
        .map(|(_, target)| target.to_string())
        .collect();
    if disks.len() != wanted.len() || images.len() != wanted.len() {
        return Err(Failure::invalid(
            "a disk or a new image is named twice: name each once",
        ));
    }
    Ok(())
}
