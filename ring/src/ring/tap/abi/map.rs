// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What a process says of mappings: extents that reads and in-place writes may use without it.
//!
//! No call takes it yet ([`kept::FEATURE_MAPS`](super::kept::FEATURE_MAPS)).

use zerocopy_derive as zd;

/// Files and block devices behind one disk at most; their numbers are below this.
pub const MAX_BACKINGS: u16 = 16;

/// The range is where the operation says, until it is recalled.
pub const MAP_SET: u8 = 1;
/// What was said of the range is not true any longer: say when no I/O uses it any more.
pub const MAP_RECALL: u8 = 2;
/// Kept for later: says which extents were written.
pub const MAP_COLLECT: u8 = 3;

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
    /// [`MAP_SET`] or [`MAP_RECALL`].
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
    /// Number of sectors, not 0. To recall everything: 0 and `u64::MAX`.
    pub sectors: u64,
    /// For [`MAP_SET`]: where it begins in the backing, in bytes; a multiple of 512. It has the same
    /// remainder as the range on the disk, for the alignment that the backing demands.
    pub offset: u64,
    /// For [`MAP_RECALL`]: comes back when it is over.
    pub cookie: u64,
    /// Zero.
    pub reserved: [u32; 2],
}

const _: () = assert!(size_of::<MapOp>() == 48);
