// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What a process says of mappings: extents that reads and in-place writes may use without it.
//!
//! Whoever administers the host gives a disk *backings* ([`ioctl::BACKING_ADD`](super::ioctl::BACKING_ADD)):
//! block devices that the kernel may use for it. The process that serves the disk says which ranges of the
//! disk are where in them ([`ioctl::MAP`](super::ioctl::MAP)). From then on the kernel executes what lies in
//! such ranges by itself, also while no process is there, until the process takes that back or the next one
//! starts the disk. What cannot be executed so (it is not mapped, not whole blocks, a discard, a write that
//! must be durable at once) is delivered as ever, and so is a read or write that the kernel began and that
//! failed, marked as [`DESC_REPLAY`](super::DESC_REPLAY).
//!
//! The rules for the process: set only what is in the image already, so that its own death does not undo
//! it; recall a range before that stops being true, and wait for the call.

use super::Buffer;
use zerocopy_derive as zd;

/// Files and block devices behind one disk at most; their numbers are below this.
pub const MAX_BACKINGS: u16 = 16;

/// The range is where the operation says, until it is recalled.
pub const MAP_SET: u8 = 1;
/// What was said of the range is not true any longer. The call returns when no I/O of the kernel uses it.
pub const MAP_RECALL: u8 = 2;
/// Kept for later: says which extents were written.
pub const MAP_COLLECT: u8 = 3;
/// A flush of the disk is a flush of its backing, of which there is one: the kernel executes it until
/// everything is recalled. All that the process answered is in the backing, or in its cache.
pub const MAP_FLUSH: u8 = 4;

/// It may be read. Each extent has this.
pub const MAP_READ: u8 = 1;
/// Also written where it is: that changes nothing of the image but the data.
pub const MAP_WRITE: u8 = 2;
/// It reads as zeroes and is nowhere: [`MapOp::backing`] is [`MAP_NO_BACKING`]. Not with [`MAP_WRITE`].
pub const MAP_ZERO: u8 = 4;
/// Kept for later: note when it is written.
pub const MAP_TRACK: u8 = 8;

/// Names no backing.
pub const MAP_NO_BACKING: u16 = u16::MAX;

/// A change of the mappings of a disk. What its operation does not use is zero.
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
    /// For [`MAP_SET`]: [`MAP_READ`] and what else it may be.
    pub flags: u8,
    /// For [`MAP_SET`]: the number of the backing, below [`MAX_BACKINGS`].
    pub backing: u16,
    /// For [`MAP_SET`]: the newest generation of the mappings that the process knew when it began to
    /// look where the range is. It is ignored if the range may be elsewhere since then.
    pub generation: u32,
    /// First sector of 512 bytes.
    pub sector: u64,
    /// Number of sectors, not 0 but for [`MAP_FLUSH`]. To recall everything: 0 and `u64::MAX`.
    pub sectors: u64,
    /// For [`MAP_SET`]: where it begins in the backing, in bytes; a multiple of 512. It has the same
    /// remainder as the range on the disk, for the alignment that the backing demands.
    pub offset: u64,
    /// Zero.
    pub reserved: [u64; 2],
}

const _: () = assert!(size_of::<MapOp>() == 48);

/// Changes of mappings at most in one call.
pub const MAX_MAP_OPS: u32 = 256;

/// Changes the mappings of a disk, and says how they are: the argument of
/// [`ioctl::MAP`](super::ioctl::MAP).
///
/// The operations are executed in order. One that is malformed ends the call with an error; those before it
/// are done. A [`MAP_SET`] that cannot be taken (the range has changed since, there is no such backing, it is
/// outside of it) is counted and otherwise ignored: what is not mapped is delivered.
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
    /// Out: one bit for each backing that the disk has.
    pub backings: u32,
    /// Out: [`MAP_SET`]s that were not taken, since the disk has backings.
    pub refused: u64,
    /// Zero.
    pub reserved: [u64; 2],
}

/// The process got a request because nothing was known of its beginning: an index of [`Mapped::missed`].
pub const MISS_UNMAPPED: u8 = 0;
/// Because nothing was known of a later part.
pub const MISS_PARTIAL: u8 = 1;
/// Because a part of what it writes may only be read.
pub const MISS_READ_ONLY: u8 = 2;
/// Because a part is not whole blocks of its backing.
pub const MISS_UNALIGNED: u8 = 3;
/// Because it is in too many pieces.
pub const MISS_PIECES: u8 = 4;
/// Because it is in several backings.
pub const MISS_BACKINGS: u8 = 5;
/// Because only a process executes what it asks for, or executes it again.
pub const MISS_NEVER: u8 = 6;
/// Because it came by a queue that was connected before the disk had a backing.
pub const MISS_QUEUE: u8 = 7;
/// Reasons that there is room for.
pub const MISSES: u32 = 8;

/// How the mappings of a disk serve it: the argument of [`ioctl::MAPPED`](super::ioctl::MAPPED). All is counted since
/// the disk was made.
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
    /// Zero.
    pub reserved: [u64; 4],
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
