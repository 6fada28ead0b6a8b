// SPDX-License-Identifier: GPL-2.0-only

//! Interface between the driver and a disk, whether the kernel or a process serves it.
//!
//! A device sees its disk as a [`BackingDisk`]: one indirect call here and there, at connect and from
//! the work. A connection sees it as [`QueueBackends`] of a type that is known, so that there is no
//! indirect call in the I/O path.

use crate::connect_error::ConnectError;
use crate::engine::Backend;
use crate::events::DeviceEvents;
use crate::linux::memory::data::DataPages;
use crate::linux::task::wake_event::WakeEvent;
use crate::memory::Reservation;
use kernel::prelude::*;
use kernel::sync::Arc;

pub(crate) use crate::linux::block::bdev::BlockLimits;

/// State of a disk that a process serves, as administrators see it in the key `tap-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TapStatus {
    /// A process serves it.
    Live,
    /// No process does; requests wait for the next one.
    Recovering,
    /// The last one is gone, and its I/O may not be over.
    Fencing,
}

impl TapStatus {
    /// The value of the key.
    pub(crate) fn text(self) -> &'static CStr {
        match self {
            Self::Live => c"live",
            Self::Recovering => c"recovering",
            Self::Fencing => c"fencing",
        }
    }
}

/// Owner of a disk that a process serves. It is attached to one device at a time, until the last reference to its
/// [`BackingDisk`] is dropped.
pub(crate) struct Attachment {
    /// The device, which reconciles after [`BackingDisk::is_ready`], [`BackingDisk::status`] or
    /// [`BackingDisk::sectors`] have changed.
    pub(crate) events: Arc<dyn DeviceEvents>,
    /// The guest's domain.
    pub(crate) domain: u16,
    /// Number of the guest's virtual device.
    pub(crate) device: u32,
    /// True if the guest may write.
    pub(crate) writable: bool,
}

/// Reason why a disk that a process serves cannot be attached.
pub(crate) enum Unavailable {
    /// No disk has this number.
    Missing,
    /// Another device has it. The one that was refused last hears
    /// [`DeviceEvents::disk_available`] when it is free.
    Attached {
        /// The other guest's domain.
        domain: u16,
        /// Number of its virtual device.
        device: u32,
    },
    /// Another error, such as a want of memory.
    Failed(Error),
}

/// An open disk. Dropping the last reference gives it back.
pub(crate) trait BackingDisk: Send + Sync + 'static {
    /// Returns the disk's current limits.
    fn limits(&self) -> BlockLimits;

    /// Returns its current size in sectors of 512 bytes. Each pass of each queue calls it.
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

    /// Returns how a process serves it, or `None` if the kernel does.
    fn status(&self) -> Option<TapStatus> {
        None
    }

    /// Called before each connect, before the rings are looked at. May sleep.
    fn prepare(&self) -> Result<(), ConnectError>;
}

/// Requirements of a queue for its part of the disk.
pub(crate) struct QueueNeeds<'a> {
    /// Domain of the guest, whose memory the disk uses.
    pub(crate) domain: u16,
    /// Number of the queue, from 0.
    pub(crate) index: u32,
    /// Number of queues of the connection.
    pub(crate) queues: u32,
    /// Segments of the largest request that its guest may send.
    pub(crate) segments: u16,
    /// Slots of its ring: requests in flight at most.
    pub(crate) depth: u16,
    /// The guest keeps its pages granted, and knows that they stay mapped.
    pub(crate) keeps_grants: bool,
    /// Memory of the guest that is reserved for the disk.
    pub(crate) reservation: Option<&'a Reservation>,
    /// Event for which the queue's thread sleeps; a completion sets it.
    pub(crate) wake_event: &'a Arc<WakeEvent>,
}

/// A queue's part of the disk.
pub(crate) struct QueuePart<B> {
    /// Carries out its I/O.
    pub(crate) backend: B,
    /// Pages for its data.
    pub(crate) pages: Arc<DataPages>,
    /// Number of these pages whose memory stays for ever. If only a part of the pages has such memory, that part is at
    /// least what the engine needs, and other pages get and lose memory.
    pub(crate) own_pages: u16,
    /// Entries of the segment table beyond those of the pages.
    pub(crate) rest: u16,
    /// Memory that it takes always, in KiB.
    pub(crate) memory_kib: u64,
    /// Requests in flight at most, and so the number of tags: from 1 to the [depth](QueueNeeds::depth) that the queue
    /// needs.
    pub(crate) depth: u16,
}

/// A disk as the queues of a connection see it.
pub(crate) trait QueueBackends: BackingDisk + Sized {
    /// Carries out the I/O of one queue.
    type Backend: Backend + Send + 'static;

    /// Segments of the largest request that each of `queues` queues can hold.
    fn max_segments(&self, queues: u32) -> u16;

    /// Reserves a queue's part. May sleep.
    fn queue(
        self: &Arc<Self>,
        needs: &QueueNeeds<'_>,
    ) -> Result<QueuePart<Self::Backend>, ConnectError>;

    /// Returns what a draining queue does about the I/O in flight; the queue calls it again after each wake-up. The
    /// variant never changes during the life of a disk.
    fn drain(&self) -> Drain;
}

/// Treatment of I/O in flight when a queue drains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// The queue waits for it, however long that takes, because it uses the queue's pages.
    MustFinish,
    /// Dropping the backend lets go of it: its pages belong to the disk, and none of them is a mapped
    /// page of the guest.
    Detachable {
        /// Nanoseconds that the queue waits for it, from the begin of the drain.
        timeout_ns: u64,
    },
}
