// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sends the processes of disks in a group their shares at intervals, each by a task of its own, so that one that does
//! not answer delays no other. Processes get no messages while no guest of the group has requests.

use super::io_errors::until_end;
use super::Lifecycle;
use crate::disk::Disk;
use crate::log::tell;
use crate::process::{Process, SOON};
use crate::quota::QuotaGroup;
use crate::rpc_client::{unexpected, RpcClient, EVER};
use control::supervisor::{self, GroupChanges};
use control::tapdisk::{Reply, Request};
use control::{Code, Failure, GroupName, GroupRate, Limits, RateShare, ShareUsage};
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

/// Time between two looks whether a process is in its group by now.
const NOT_YET: Duration = Duration::from_millis(250);

/// Tells a process its share until it ends.
pub(super) async fn watch(lifecycle: Rc<Lifecycle>, process: Rc<Process>) {
    let follow = async || follow(&lifecycle, &process).await;
    tokio::select! {
        () = until_end(&lifecycle, &process, "hear of its group", follow) => {}
        // A disk in no group has no question to answer.
        _ = process.ended() => {}
    }
    lifecycle.quota.gone(process.pid());
}

async fn follow(lifecycle: &Lifecycle, process: &Process) -> Result<Infallible, Failure> {
    let mut changes = lifecycle.quota.changes();
    let mut link: Option<RpcClient> = None;
    loop {
        changes.borrow_and_update();
        let Some((disk, group)) = lifecycle.group_of(process) else {
            // The sender is the lifecycle's.
            let _ = changes.changed().await;
            continue;
        };
        lifecycle.quota.begun().await;
        let mut wakes = group.wakes();
        let connected = match link.take() {
            Some(link) => link,
            None => process.another_link().await?,
        };
        let link = link.insert(connected);
        let Some(used) = tell_share(link, &group, disk.minor, process.pid()).await? else {
            tokio::time::sleep(NOT_YET).await;
            continue;
        };
        let pause = async {
            match group.pause(disk.minor) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => {
                    until_busy(process, used.came).await?;
                    group.is_busy(disk.minor);
                }
            }
            Ok(())
        };
        tokio::select! {
            paused = pause => paused?,
            _ = wakes.changed() => {}
            _ = changes.changed() => {}
        }
    }
}

/// Tells a process its share, and what it has done; nothing if it is not in the group yet, or not any more.
async fn tell_share(
    link: &mut RpcClient,
    group: &QuotaGroup,
    minor: u32,
    pid: u32,
) -> Result<Option<ShareUsage>, Failure> {
    let (number, share) = group.share(minor, pid);
    match link.ask(&Request::Share(share), &[], EVER).await {
        Ok(Reply::Used(used)) => {
            group.answered(minor, pid, number, used);
            Ok(Some(used))
        }
        Ok(reply) => Err(unexpected(&reply)),
        Err(failure) if failure.code == Code::State => {
            group.refused(minor, number);
            Ok(None)
        }
        Err(failure) => Err(failure),
    }
}

/// Waits until the disk has a request.
async fn until_busy(process: &Process, came: u64) -> Result<(), Failure> {
    // A link of its own: it ends with this question if the caller drops it.
    let mut link = process.another_link().await?;
    match link.ask(&Request::Busy { came }, &[], EVER).await? {
        Reply::Done => Ok(()),
        reply => Err(unexpected(&reply)),
    }
}

impl Lifecycle {
    /// The disks of a group, with limits of their own.
    fn members(&self, name: &GroupName) -> Vec<(u32, Limits)> {
        let disks = self.registry.all();
        let its = disks.iter().filter_map(|disk| {
            let record = disk.record.borrow();
            let is_its = record.policy.group.as_ref() == Some(name);
            is_its.then_some((disk.minor, record.policy.limits))
        });
        its.collect()
    }

    /// The group of a disk, if the disk is in a group that exists.
    fn group(&self, disk: &Disk) -> Option<Rc<QuotaGroup>> {
        let name = disk.record.borrow().policy.group.clone()?;
        let group = self.quota.get(&name).ok()?;
        group.keep(&self.members(&name));
        Some(group)
    }

    fn group_of(&self, process: &Process) -> Option<(Rc<Disk>, Rc<QuotaGroup>)> {
        let disk = self.registry.of_process(process)?;
        let group = self.group(&disk)?;
        Some((disk, group))
    }

    /// Returns the share of the group for a process, if its disk is in a group. If the group is not there, although it
    /// is on record, that is as little as a guest can work with.
    pub(super) fn share(&self, disk: &Disk, process: &Process) -> Option<RateShare> {
        let name = disk.record.borrow().policy.group.clone()?;
        if let Some(group) = self.group(disk) {
            // The process was started before it had a disk.
            self.quota.changed();
            return Some(group.share(disk.minor, process.pid()).1);
        }
        tell!(
            error,
            disk.about(),
            "disk {}: its group {name} is not there, so it does next to nothing: make it: `tap-ctl group set {name} --bps 100M`",
            disk.minor
        );
        let least = GroupRate {
            bytes: Some(Limits::LEAST_BYTES),
            milli_requests: None,
        };
        Some(RateShare {
            pace: least,
            until: Duration::ZERO,
            after: least,
            from: Duration::ZERO,
            burst_s: 1,
        })
    }

    /// An earlier supervisor has told the process of a disk its share.
    pub fn adopt_share(&self, disk: &Disk, process: &Process) {
        let name = disk.record.borrow().policy.group.clone();
        if let Some(name) = name {
            if self.group(disk).is_some() {
                self.quota.adopt(&name, disk.minor, process.pid());
            }
        }
    }

    /// A disk that is not in this group can be.
    ///
    /// # Errors
    /// It is not there, or has as many disks as it can have.
    pub(super) fn check_group(&self, name: &GroupName) -> Result<(), Failure> {
        self.quota.has_room(name, self.members(name).len())
    }

    /// Checks that a process understands shares of a group.
    ///
    /// # Errors
    /// It is older, or does not answer.
    pub(super) async fn check_shares(&self, disk: &Disk, process: &Process) -> Result<(), Failure> {
        match process.introduce(SOON).await?.shares {
            true => Ok(()),
            false => Err(Failure::unsupported(format!(
                "tapdisk {} of disk {} is older than groups, and would do as much as it likes: give the disk another \
                 one: `tap-ctl handoff {}`",
                process.pid(),
                disk.minor,
                disk.minor
            ))),
        }
    }

    /// Makes a group, or changes it.
    ///
    /// # Errors
    /// It makes no sense, or cannot be recorded: nothing has changed.
    pub fn set_group(
        &self,
        name: &GroupName,
        changes: &GroupChanges,
    ) -> Result<supervisor::Group, Failure> {
        self.quota.set(name, changes, self.members(name).len())?;
        self.tell_group(name)
    }

    /// Takes a group away that has no disks.
    ///
    /// # Errors
    /// There is none, or it has disks.
    pub fn remove_group(&self, name: &GroupName) -> Result<(), Failure> {
        self.quota.get(name)?;
        let members = self.members(name);
        if members.is_empty() {
            return self.quota.remove(name);
        }
        let ways_out = members
            .iter()
            .map(|(minor, _)| format!("`tap-ctl set -m {minor} --group none`"));
        let ways_out: Vec<String> = ways_out.collect();
        Err(Failure::new(
            Code::Busy,
            format!(
                "the group {name} has disks: take each out first: {}",
                ways_out.join(", ")
            ),
        ))
    }

    /// Returns the state of a group.
    ///
    /// # Errors
    /// There is none.
    pub fn tell_group(&self, name: &GroupName) -> Result<supervisor::Group, Failure> {
        let group = self.quota.get(name)?;
        group.keep(&self.members(name));
        self.quota.tell(name)
    }

    /// Returns the states of all groups.
    ///
    /// # Errors
    /// None: a group that is removed during the call is left out.
    pub fn tell_groups(&self) -> Vec<supervisor::Group> {
        let names = self.quota.names();
        let told = names.iter().filter_map(|name| self.tell_group(name).ok());
        told.collect()
    }
}
