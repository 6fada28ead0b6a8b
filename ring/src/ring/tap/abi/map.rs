// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Mappings: extents that the kernel may read, and write in place, without the process.
//!
//! The administrator (in practice the supervisor) gives a disk *backings*
//! ([`ioctl::BACKING_ADD`](super::ioctl::BACKING_ADD)): block devices that the kernel may use for it. The process that
//! serves the disk maps ranges of the disk to places in them ([`ioctl::MAP`](super::ioctl::MAP)). From then on the
//! kernel executes requests in such ranges without the process, also while no process is running, until the process
//! recalls the mapping or the next process starts the disk. Other requests (not mapped, not whole blocks, a discard, a
//! write that must be durable at once) are delivered to the process, and so is a read or write that the kernel began
//! and that failed, marked as [`DESC_REPLAY`](super::DESC_REPLAY).
//!
//! Rules for the process: set only extents that the image has durably allocated, so that the death of the process does
//! not undo them; recall a range before its mapping stops being true, and wait for the call.

use super::Buffer;
use zerocopy_derive as zd;

/// Maximum number of files and block devices behind one disk; their numbers are below this.
pub const MAX_BACKINGS: u16 = 16;

/// Maps the range to the place that the operation names, until it is recalled.
pub const MAP_SET: u8 = 1;
/// Withdraws the mapping of a range. The call returns when no I/O of the kernel uses it.
pub const MAP_RECALL: u8 = 2;
/// Reserved: reports written extents.
pub const MAP_COLLECT: u8 = 3;
/// A flush of the disk is a flush of its only backing: the kernel executes it until everything is recalled. All writes
/// that the process answered are in the backing, or in its cache.
pub const MAP_FLUSH: u8 = 4;

/// The kernel may read the extent. Each extent has this.
pub const MAP_READ: u8 = 1;
/// The kernel may also write the extent in place, because that changes nothing of the image but the data.
pub const MAP_WRITE: u8 = 2;
/// The extent reads as zeroes and has no place: [`MapOp::backing`] is [`MAP_NO_BACKING`]. Not with [`MAP_WRITE`].
pub const MAP_ZERO: u8 = 4;
/// Reserved: record writes to the extent.
pub const MAP_TRACK: u8 = 8;

/// Names no backing.
pub const MAP_NO_BACKING: u16 = u16::MAX;

/// A change of the mappings of a disk. Fields that its operation does not use are zero.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    zd::FromBytes,
    zd::IntoBytes,
    zd::KnownLayout,
    zd::Immutable,
)]
#[repr(C)]
pub struct MapOp {
    /// [`MAP_SET`], [`MAP_RECALL`] or [`MAP_FLUSH`].
    pub op: u8,
    /// For [`MAP_SET`]: [`MAP_READ`] and other flags.
    pub flags: u8,
    /// For [`MAP_SET`]: the number of the backing, below [`MAX_BACKINGS`].
    pub backing: u16,
    /// For [`MAP_SET`]: the newest generation of the mappings that the process knew when it began to look up the range.
    /// The kernel ignores the operation if the range may have moved since then.
    pub generation: u32,
    /// First sector of 512 bytes.
    pub sector: u64,
    /// Number of sectors, not 0 except for [`MAP_FLUSH`]. To recall everything: sector 0 and `u64::MAX` sectors.
    pub sectors: u64,
    /// For [`MAP_SET`]: where the range begins in the backing, in bytes; a multiple of 512. The remainder is that of
    /// the range on the disk, for the alignment that the backing demands.
    pub offset: u64,
    /// Zero.
    pub reserved: [u64; 2],
}

const _: () = assert!(size_of::<MapOp>() == 48);

/// Maximum number of changes in one call.
pub const MAX_MAP_OPS: u32 = 256;

/// Changes the mappings of a disk, and reports their state: the argument of [`ioctl::MAP`](super::ioctl::MAP).
///
/// The kernel executes the operations in order. A malformed one ends the call with an error; those before it are done.
/// A [`MAP_SET`] that the kernel cannot take (the range has changed since, the disk has no such backing, or the range
/// is outside of it) is counted and otherwise ignored, because requests to unmapped ranges are delivered.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    zd::FromBytes,
    zd::IntoBytes,
    zd::KnownLayout,
    zd::Immutable,
)]
#[repr(C)]
pub struct Maps {
    /// Array of [`MapOp`], at most [`MAX_MAP_OPS`].
    pub ops: Buffer,
    /// Out: the generation of the mappings now.
    pub generation: u32,
    /// Out: one bit for each backing of the disk.
    pub backings: u32,
    /// Out: [`MAP_SET`]s that the kernel did not take, since the disk has backings.
    pub refused: u64,
    /// Zero.
    pub reserved: [u64; 2],
}

/// The process got a request because its first sector was not mapped: an index of [`Mapped::missed`].
pub const MISS_UNMAPPED: u8 = 0;
/// Because a later part was not mapped.
pub const MISS_PARTIAL: u8 = 1;
/// Because a part of its range may only be read, and it is a write.
pub const MISS_READ_ONLY: u8 = 2;
/// Because a part is not whole blocks of its backing.
pub const MISS_UNALIGNED: u8 = 3;
/// Because its range has too many pieces.
pub const MISS_PIECES: u8 = 4;
/// Because its range is in several backings.
pub const MISS_BACKINGS: u8 = 5;
/// Because only a process executes that operation, or replays a request.
pub const MISS_NEVER: u8 = 6;
/// Because it came by a queue that was connected before the disk had a backing.
pub const MISS_QUEUE: u8 = 7;
/// Number of reasons that the structure has room for.
pub const MISSES: u32 = 8;

/// Statistics of a disk's mappings: the argument of [`ioctl::MAPPED`](super::ioctl::MAPPED). All counts are since the
/// disk was made.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    zd::FromBytes,
    zd::IntoBytes,
    zd::KnownLayout,
    zd::Immutable,
)]
#[repr(C)]
pub struct Mapped {
    /// Number of the node.
    pub minor: u32,
    /// Out: extents that there is room for now; 0 if the disk never had a backing.
    pub room: u32,
    /// Out: requests that a process got, by `MISS_*`.
    pub missed: [u64; MISSES as usize],
    /// Out: extents that were forgotten because others needed their place.
    pub evicted: u64,
    /// Out: [`MAP_SET`]s that were not taken.
    pub refused: u64,
    /// Out: [`MAP_RECALL`]s.
    pub recalled: u64,
    /// Out: requests of the connected frontend that its queues executed without the lock of the disk.
    pub express: u64,
    /// Zero.
    pub reserved: [u64; 3],
}

/// The kernel may write it.
pub const BACKING_WRITE: u32 = 1;

/// Gives a disk a block device: the argument of [`ioctl::BACKING_ADD`](super::ioctl::BACKING_ADD).
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    zd::FromBytes,
    zd::IntoBytes,
    zd::KnownLayout,
    zd::Immutable,
)]
#[repr(C)]
pub struct BackingAdd {
    /// Number of the node.
    pub minor: u32,
    /// Number of the backing, below [`MAX_BACKINGS`].
    pub number: u32,
    /// A descriptor of the device, which is not used afterwards: open for reading, and for writing with
    /// [`BACKING_WRITE`].
    pub fd: i32,
    /// `BACKING_*`.
    pub flags: u32,
    /// Zero.
    pub reserved: [u64; 2],
}

/// Takes it away: the argument of [`ioctl::BACKING_REMOVE`](super::ioctl::BACKING_REMOVE).
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    zd::FromBytes,
    zd::IntoBytes,
    zd::KnownLayout,
    zd::Immutable,
)]
#[repr(C)]
pub struct BackingRemove {
    /// Number of the node.
    pub minor: u32,
    /// Number of the backing.
    pub number: u32,
    /// Zero.
    pub reserved: u64,
}

const _: () = {
    assert!(size_of::<Maps>() == 48);
    assert!(size_of::<BackingAdd>() == 32);
    assert!(size_of::<BackingRemove>() == 16);
    assert!(size_of::<Mapped>() == 128);
};
