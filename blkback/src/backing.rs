// SPDX-License-Identifier: GPL-2.0-only

//! What the driver needs of a disk, whoever serves it.
//!
//! A device sees its disk as a [`BackingDisk`]: one indirect call here and there, at connect and from
//! the work. A connection sees it as [`QueueBackends`] of a type that is known, so that there is no
//! indirect call in the I/O path.

use crate::connect_error::ConnectError;
use crate::engine::Backend;
use crate::events::DeviceEvents;
use crate::linux::memory::data::DataPages;
use crate::linux::task::wake_event::WakeEvent;
use kernel::prelude::*;
use kernel::sync::Arc;

pub(crate) use crate::linux::block::bdev::Limits;

/// How a process serves a disk, as administrators see it in the key `tap-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// A process serves it.
    Live,
    /// None does; requests wait for the next one.
    Recovering,
    /// The last one is gone, and its I/O may not be over.
    Fencing,
}

impl Status {
    /// The value of the key.
    pub(crate) fn text(self) -> &'static CStr {
        match self {
            Self::Live => c"live",
            Self::Recovering => c"recovering",
            Self::Fencing => c"fencing",
        }
    }
}

/// Whose a disk is that a process serves. It is attached to one device at a time, until the last
/// reference to its [`BackingDisk`] is dropped.
pub(crate) struct Attachment {
    /// The device: told to reconcile after [`BackingDisk::is_ready`], [`BackingDisk::status`] or
    /// [`BackingDisk::sectors`] have changed.
    pub(crate) events: Arc<dyn DeviceEvents>,
    /// The guest's domain.
    pub(crate) domain: u16,
    /// Number of the guest's virtual device.
    pub(crate) device: u32,
    /// True if the guest may write.
    pub(crate) writable: bool,
}

/// Why a disk that a process serves cannot be attached.
pub(crate) enum Unavailable {
    /// There is none with this number.
    Missing,
    /// Another device has it. The one that was refused last hears
    /// [`DeviceEvents::disk_available`] when it is free.
    Attached {
        /// The other guest's domain.
        domain: u16,
        /// Number of its virtual device.
        device: u32,
    },
    /// Something else, such as a want of memory.
    Failed(Error),
}

/// An open disk. Dropping the last reference gives it back.
pub(crate) trait BackingDisk: Send + Sync + 'static {
    /// What the disk allows now.
    fn limits(&self) -> Limits;

    /// Its size in sectors of 512 bytes now. Called by each pass of each queue.
    fn sectors(&self) -> u64;

    /// True if it was opened for writing.
    fn is_writable(&self) -> bool;

    /// The number of its device node as `dev_t`, for sysfs.
    fn number(&self) -> u32;

    /// True if a frontend can be connected now: the disk is described, and nothing of an earlier
    /// connection is left.
    fn is_ready(&self) -> bool {
        true
    }

    /// Guests may keep their pages granted: data goes from these to the disk without a copy.
    fn keeps_grants(&self) -> bool {
        false
    }

    /// Segments of an indirect request that it offers to a frontend: no host offers fewer for this disk.
    fn offered_segments(&self) -> u16;

    /// How it is served, if that can change.
    fn status(&self) -> Option<Status> {
        None
    }

    /// Called before each connect, before the rings are looked at. May sleep.
    fn prepare(&self) -> Result<(), ConnectError>;
}

/// What a queue asks of the disk.
pub(crate) struct Needs<'a> {
    /// The guest's domain, whose memory it is.
    pub(crate) domain: u16,
    /// Which queue it is.
    pub(crate) index: u32,
    /// Of how many.
    pub(crate) queues: u32,
    /// Segments of the largest request that its guest may send.
    pub(crate) segments: u16,
    /// Slots of its ring: requests in flight at most.
    pub(crate) depth: u16,
    /// The guest keeps its pages granted, and knows that they stay mapped.
    pub(crate) keeps_grants: bool,
    /// Where its thread sleeps; a completion wakes it.
    pub(crate) wake_event: &'a Arc<WakeEvent>,
}

/// A queue's part of the disk.
pub(crate) struct Part<B> {
    /// Carries out its I/O.
    pub(crate) backend: B,
    /// Where its data goes.
    pub(crate) pages: Arc<DataPages>,
    /// How many of them have memory for ever. If that is not all that can have some, it is at
    /// least what the engine needs, and others come and go.
    pub(crate) own_pages: u16,
    /// Entries of the segment table beyond those of the pages.
    pub(crate) rest: u16,
    /// Memory that it takes always, in KiB.
    pub(crate) memory_kib: u64,
    /// Requests in flight at most, and so the number of tags: from 1 to what was asked for.
    pub(crate) depth: u16,
}

/// A disk as the queues of a connection see it.
pub(crate) trait QueueBackends: BackingDisk + Sized {
    /// Carries out the I/O of one queue.
    type Backend: Backend + Send + 'static;

    /// Segments of the largest request that each of so many queues can hold.
    fn max_segments(&self, queues: u32) -> u16;

    /// Reserves a queue's part. May sleep.
    fn queue(self: &Arc<Self>, needs: &Needs<'_>) -> Result<Part<Self::Backend>, ConnectError>;

    /// What a queue that is told to drain does about the I/O that is in flight; asked again after each
    /// wake-up. Whether a disk is of the one or of the other kind does not change.
    fn drain(&self) -> Drain;
}

/// What becomes of I/O that is in flight when a queue is told to drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// It is waited for, however long that takes, because it uses the queue's pages.
    MustFinish,
    /// Dropping the backend lets go of it: its pages belong to the disk, and none of them is a mapped
    /// page of the guest.
    Detachable {
        /// Nanoseconds that the queue waits for it, from when it was told.
        timeout_ns: u64,
    },
}
