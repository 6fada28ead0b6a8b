// SPDX-License-Identifier: MIT OR Apache-2.0
//! Common parts of jobs on a whole disk: when they are looked at, and how a process makes way for another one, so that
//! its files can leave the record.

use super::Lifecycle;
use crate::disk::Disk;
use crate::record::{DesiredState, Record};
use control::{Code, Failure};
use std::rc::Rc;
use std::time::Duration;

/// Time between two looks at a job.
pub(super) const STEP: Duration = Duration::from_secs(1);
/// Time until something is tried again for which a guest has to wait.
pub(super) const AGAIN: Duration = Duration::from_secs(30);
/// How long a process may take to close its images before it is killed.
const PAUSE: Duration = Duration::from_secs(30);

/// The disk is served, and nothing has begun with it.
pub(super) fn is_just_served(disk: &Disk) -> bool {
    let record = disk.record.borrow();
    record.want == DesiredState::Served && record.inactive.is_none() && record.doing.is_none()
}

/// Whether the failure shows nothing about the images: the process has ended, was paused, or is slow.
pub(super) fn says_nothing(failure: &Failure) -> bool {
    matches!(failure.code, Code::Gone | Code::State | Code::Timeout)
}

impl Lifecycle {
    /// A new process serves the disk, which was given nothing that leaves the record by this change. The caller has
    /// the turn.
    ///
    /// # Errors
    /// The record is as it was; the disk is served, or will be.
    pub(super) async fn renew(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), Failure> {
        let changed = match self.let_process_go(disk, PAUSE).await {
            Ok(()) => self.registry.change(disk, change),
            Err(failure) => Err(failure),
        };
        // Whether the record was changed or not.
        if disk.record.borrow().want == DesiredState::Served {
            let served = self.serve_again(disk).await;
            self.or_revive(disk, served).await;
        }
        changed
    }

    /// The process of a disk ends, and what it had is over and durable. One that does not close its image within the
    /// limit is killed.
    ///
    /// # Errors
    /// This process still owes the guest an error, and stays.
    pub(super) async fn let_process_go(&self, disk: &Disk, limit: Duration) -> Result<(), Failure> {
        // If the record cannot be changed afterwards, the supervisor would replace the process again and again.
        self.registry.change(disk, |_| ())?;
        owes_nothing(disk).await?;
        match self.close_image(disk, limit).await {
            Ok(Some(lost)) => return Err(lost),
            Ok(None) => {
                owes_nothing(disk).await?;
                self.end_paused(disk).await?;
            }
            // Storage hangs. It is killed, and what it had is executed again when that is over.
            Err(failure) if failure.code == Code::Timeout => self.end_process(disk).await?,
            Err(failure) => return Err(failure),
        }
        self.take_from_kernel(disk, limit).await
    }
}

/// Checks that the process owes the guest no error, because the guest gets it from this process alone.
pub(super) async fn owes_nothing(disk: &Disk) -> Result<(), Failure> {
    let Ok(process) = disk.serving() else {
        return Ok(());
    };
    match process.status().await?.owes {
        false => Ok(()),
        true => Err(Failure::new(
            Code::State,
            "a write could not be made durable, and the guest has not got that error yet: its process \
             stays until it has",
        )),
    }
}
