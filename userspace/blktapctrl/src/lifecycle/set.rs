// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changes the error policy and the rate limits of a disk while it is served.

use super::Lifecycle;
use crate::disk::Disk;
use crate::process::SOON;
use crate::rpc_client::unexpected;
use control::supervisor::{Changes, Policy, Which};
use control::tapdisk::{Reply, Request, Rules};
use control::Failure;

impl Lifecycle {
    /// Changes the policy of a disk: that of its next process, and of the one that serves it.
    ///
    /// # Errors
    /// It makes no sense, or cannot be recorded, and nothing has changed; or the process does not apply it, as its
    /// message explains.
    pub async fn set(&self, which: &Which, changes: &Changes) -> Result<Policy, Failure> {
        let disk = self.registry.find(which)?;
        let _turn = disk.turn().await?;
        let policy = disk.record.borrow().policy.with(changes);
        policy.limits.check()?;
        self.check_new_group(&disk, &policy).await?;
        self.registry
            .change(&disk, |record| record.policy = policy.clone())?;
        let told = disk.unless_doomed(self.tell(&disk, &policy)).await;
        self.quota.changed();
        told.map_err(|failure| {
            let message = format!(
                "the record has it, and the next process does it; the one that serves the disk now does not: {}",
                failure.message
            );
            Failure::new(failure.code, message)
        })?;
        Ok(policy)
    }

    /// A group that a disk is to come into is there, and its process understands that.
    async fn check_new_group(&self, disk: &Disk, policy: &Policy) -> Result<(), Failure> {
        let before = disk.record.borrow().policy.group.clone();
        let Some(name) = policy
            .group
            .as_ref()
            .filter(|name| before.as_ref() != Some(*name))
        else {
            return Ok(());
        };
        self.check_group(name)?;
        let process = disk.process.borrow().clone();
        match process {
            Some(process) => self.check_shares(disk, &process).await,
            None => Ok(()),
        }
    }

    /// Tells the process that serves a disk. A process that serves none yet gets the policy when it does.
    async fn tell(&self, disk: &Disk, policy: &Policy) -> Result<(), Failure> {
        let process = disk.process.borrow().clone();
        let Some(process) = process else {
            return Ok(());
        };
        let rules = Rules {
            on_no_space: policy.on_no_space,
            on_error: policy.on_error,
            limits: policy.limits,
            share: self.share(disk, &process),
        };
        match process.ask(&Request::Set(rules), &[], SOON).await {
            Ok(Reply::Done) => Ok(()),
            Ok(reply) => Err(unexpected(&reply)),
            Err(failure) => Err(failure),
        }
    }
}
