// SPDX-License-Identifier: GPL-2.0-only

//! What a device does that may wait for its storage, for ever if that hangs: opening the disk,
//! writing back dom0's page cache of it, closing it.
//!
//! A work item of its own does that, one thing at a time and without the lock of the device's life,
//! on a queue that is there for nothing else: so a disk that hangs stops nothing but itself.

use crate::connect_error::ConnectError;
use crate::connection::Connect;
use crate::disk::{Bad, Disk, Name, Opener};
use kernel::sync::Arc;

/// What is to be done.
pub(crate) enum Job {
    /// Open the disk of this name.
    Open(Opener, Name),
    /// Get the disk ready for a connect.
    Prepare(Arc<dyn Connect>),
    /// Close the disk.
    Close(Disk),
}

/// What came of it.
pub(crate) enum Outcome {
    /// The disk was opened, or not.
    Opened(Result<Disk, Bad>),
    /// It is ready for a connect, or not.
    Prepared(Result<(), ConnectError>),
    /// It is closed.
    Closed,
}

impl Job {
    /// Does it. May sleep for ever.
    pub(crate) fn run(self) -> Outcome {
        match self {
            Self::Open(opener, name) => Outcome::Opened(Disk::open(&opener, name)),
            Self::Prepare(disk) => Outcome::Prepared(disk.prepare()),
            Self::Close(disk) => {
                drop(disk);
                Outcome::Closed
            }
        }
    }
}

/// The one job that a device may have.
pub(crate) enum Errand {
    /// There is none.
    None,
    /// It was given, and will be taken.
    Given(Job),
    /// It was taken.
    Running,
    /// It is done.
    Done(Outcome),
}

impl Errand {
    /// True until it is done.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self, Self::Given(_) | Self::Running)
    }

    /// Takes the job that was given.
    pub(crate) fn take_job(&mut self) -> Option<Job> {
        match core::mem::replace(self, Self::Running) {
            Self::Given(job) => Some(job),
            other => {
                *self = other;
                None
            }
        }
    }

    /// Takes what came of it.
    pub(crate) fn take_outcome(&mut self) -> Option<Outcome> {
        match core::mem::replace(self, Self::None) {
            Self::Done(outcome) => Some(outcome),
            other => {
                *self = other;
                None
            }
        }
    }
}
