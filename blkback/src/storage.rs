// SPDX-License-Identifier: GPL-2.0-only

//! Work of a device that may wait for its storage, without limit if the storage hangs: opening the disk, writing back
//! dom0's page cache of it, closing it.
//!
//! A separate work item does it, one job at a time and without the lock of the device's life, on a workqueue for this
//! purpose alone. So a disk that hangs stops nothing but itself.

use crate::connect_error::ConnectError;
use crate::connection::Connect;
use crate::disk::{AttachedDisk, DiskOpener, Name, NameError};
use kernel::sync::Arc;

/// Work for the storage.
pub(crate) enum StorageJob {
    /// Open the disk of this name.
    Open(DiskOpener, Name),
    /// Get the disk ready for a connect.
    Prepare(Arc<dyn Connect>),
    /// Close the disk.
    Close(AttachedDisk),
}

/// Result of a job.
pub(crate) enum JobOutcome {
    /// Result of opening the disk.
    Opened(Result<AttachedDisk, NameError>),
    /// Result of getting the disk ready for a connect.
    Prepared(Result<(), ConnectError>),
    /// The disk is closed.
    Closed,
}

impl StorageJob {
    /// Runs the job. May sleep without limit.
    pub(crate) fn run(self) -> JobOutcome {
        match self {
            Self::Open(opener, name) => JobOutcome::Opened(AttachedDisk::open(&opener, name)),
            Self::Prepare(disk) => JobOutcome::Prepared(disk.prepare()),
            Self::Close(disk) => {
                drop(disk);
                JobOutcome::Closed
            }
        }
    }
}

/// The one job that a device may have.
pub(crate) enum Errand {
    /// No job.
    None,
    /// A job that was given and not taken.
    Given(StorageJob),
    /// A job that was taken and is running.
    Running,
    /// A job that is done.
    Done(JobOutcome),
}

impl Errand {
    /// Returns true until the job is done.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self, Self::Given(_) | Self::Running)
    }

    /// Takes the job that was given.
    pub(crate) fn take_job(&mut self) -> Option<StorageJob> {
        match core::mem::replace(self, Self::Running) {
            Self::Given(job) => Some(job),
            other => {
                *self = other;
                None
            }
        }
    }

    /// Takes the result of the job.
    pub(crate) fn take_outcome(&mut self) -> Option<JobOutcome> {
        match core::mem::replace(self, Self::None) {
            Self::Done(outcome) => Some(outcome),
            other => {
                *self = other;
                None
            }
        }
    }
}
