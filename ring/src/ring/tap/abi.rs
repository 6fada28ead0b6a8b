// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The ABI between the kernel and the process that serves a disk, version 1.
//!
//! # Compatibility
//!
//! Kernel module and process are installed together, but a new process serves under the running module until the
//! machine is rebooted. So each side works with the previous version of the other:
//!
//! - Numbers, sizes and meanings that are defined here never change. Additions get a new number, or a feature
//!   ([`Info::features`]) that a process uses only if the kernel has it.
//! - The kernel delivers nothing new to a process that did not claim it ([`Claims`]). A process without a claim
//!   predates claims, and gets what existed then (`ring::tap::checked::Claimed::BEFORE`).
//! - [`Claims`] carries its size. Fields that the caller's structure lacks are zero; bytes beyond the kernel's
//!   structure must be zero (else `E2BIG`). It grows at its end, and 0 always means what it meant before.
//! - Structures of other ioctls do not grow, because their size is part of the number. Their reserved fields may get a
//!   meaning that 0 does not have.
//! - A number of [`kept`] is reserved for a use that is designed and not built. The kernel refuses it with
//!   `EOPNOTSUPP`, other unknown numbers with `ENOTTY` (ioctls) or `EINVAL`.
//! - A new version number is for changes that these rules do not allow; each side refuses a version that it does not
//!   know.
//!
//! # The calls
//!
//! There is one control node, `/dev/xentap/control`, and one node for each disk, `/dev/xentap/MINOR`. All numbers are
//! in the byte order of the host. Every structure that crosses the boundary has fields that are reserved and must be
//! zero. The kernel never ignores a value that it does not understand: it refuses it with `EINVAL`, or with
//! `EOPNOTSUPP` or `E2BIG` if a later version may define it. Sectors are 512 bytes everywhere, whatever the block size
//! is.
//!
//! A node can be open once at a time: a second `open` fails with `EBUSY`. A process that was killed while a `uring_cmd`
//! waited has it open for a moment after its death, because io_uring closes its files later; the process that replaces
//! it must retry. While the I/O of the last opener is not known to be over (see [`FENCE_LOCAL`], [`FENCE_SESSION`] and
//! [`FENCE_NONE`]), `open` waits, or fails with `EBUSY` if it is non-blocking.
//!
//! The process that opens it may query it ([`Info`]), describe the disk ([`ioctl::SET_PARAMS`]), say what it can do
//! ([`ioctl::CLAIM`]), and start it. From then on requests are *delivered*: the kernel writes a [`Desc`] and its
//! [`TapSegment`]s at the request's tag into the descriptor area, which the process can only read, and hands out the
//! tag. Data is in the arena. The process *commits* the request with a [`Completion`] that names the tag and the
//! generation of its delivery.
//!
//! There are three ways to do that, which may be mixed: `poll` and `read` (which yields tags as
//! `u16`, and sleeps unless the node is non-blocking) with [`ioctl::EXCHANGE`]; that ioctl alone;
//! or the `uring_cmd` of the same number.

mod map;

use zerocopy_derive as zd;

pub use map::*;

/// Version of this ABI; a process that needs another one is refused.
pub const VERSION: u32 = 1;
/// Maximum number of tags of one disk.
pub const MAX_TAGS: u32 = 4096;
/// A tag that names no request.
pub const NO_TAG: u16 = u16::MAX;
/// Maximum number of `uring_cmd`s that wait on one node.
pub const MAX_COMMANDS: u32 = 64;
/// Maximum number of segments of one request.
pub const MAX_SEGMENTS: u16 = 512;
/// Offset at which the descriptor area is mapped (read only, shared).
pub const MMAP_DESCRIPTORS: u64 = 0;
/// Offset at which the arena is mapped (shared).
pub const MMAP_ARENA: u64 = 1 << 32;

/// Read into the arena.
pub const OP_READ: u8 = 0;
/// Write from the arena.
pub const OP_WRITE: u8 = 1;
/// Make every write durable that was committed before this request.
pub const OP_FLUSH: u8 = 2;
/// Forget the content of a range; it may read as anything afterwards.
pub const OP_DISCARD: u8 = 3;
/// Make a range read as zeroes.
pub const OP_WRITE_ZEROES: u8 = 5;
/// Make the content of a range unrecoverable.
pub const OP_SECURE_DISCARD: u8 = 6;

/// The write must be durable when it is committed.
pub const DESC_FUA: u8 = 1;
/// Every write committed before must be durable before this one is executed.
pub const DESC_PREFLUSH: u8 = 2;
/// An earlier process may have executed the request already, in whole or in part.
pub const DESC_REPLAY: u8 = 4;

/// A request as the process sees it, at `tag * 64` in the descriptor area.
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
pub struct Desc {
    /// `OP_*`.
    pub op: u8,
    /// `DESC_*`.
    pub flags: u8,
    /// Entries of the request in the segment table; 0 without data.
    pub segments: u16,
    /// Changes with each delivery; the completion repeats it.
    pub generation: u32,
    /// First 512-byte sector; 0 for a flush.
    pub sector: u64,
    /// Number of 512-byte sectors; 0 for a flush.
    pub sectors: u64,
    /// Arrival order of the request on this disk, over all queues; a replay keeps it.
    pub sequence: u64,
    /// Time at which the request arrived: nanoseconds of `CLOCK_MONOTONIC`.
    pub arrived_ns: u64,
    /// The tag once more.
    pub tag: u16,
    /// The frontend's queue.
    pub queue: u16,
    /// Number of deliveries of the request, including this one.
    pub deliveries: u32,
    /// Zero.
    pub reserved: [u32; 4],
}

/// A piece of the arena that holds data of a request; pieces are in the order of the disk.
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
pub struct TapSegment {
    /// Byte offset in the arena, a multiple of 512.
    pub offset: u32,
    /// Bytes, a multiple of 512 and not 0.
    pub len: u32,
}

/// The process did not execute the request; the kernel delivers it again.
pub const COMPLETION_RETURNED: u16 = 1;

/// The process's answer to a delivered request.
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
pub struct Completion {
    /// The request's tag.
    pub tag: u16,
    /// `COMPLETION_*`.
    pub flags: u16,
    /// The generation in the descriptor that was delivered.
    pub generation: u32,
    /// 0, or a negative `errno`: the guest gets `-EOPNOTSUPP` as "not supported", any other as an error.
    pub result: i32,
    /// Zero.
    pub reserved: u32,
}

/// Static properties and current state of a node ([`ioctl::INFO`], [`ioctl::QUERY`]).
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
pub struct Info {
    /// [`VERSION`].
    pub version: u32,
    /// Number of the node.
    pub minor: u32,
    /// `FEATURE_*`.
    pub features: u64,
    /// Number of times that the node was opened; the kernel takes a completion from the newest opener only.
    pub epoch: u64,
    /// Tags are below this.
    pub tags: u32,
    /// Maximum number of segments of a request: the stride of the segment table.
    pub max_segments: u32,
    /// Bytes of the descriptor area, whole pages.
    pub descriptors_len: u64,
    /// Byte offset of the segment table in the descriptor area; that of `tag` begins at
    /// `segments_offset + tag * max_segments * 8`.
    pub segments_offset: u64,
    /// Bytes of the arena, whole pages.
    pub arena_len: u64,
    /// `STATE_*`.
    pub state: u32,
    /// Process that opened the node, or that started it if another one did, as its own namespace numbers it; 0 if none.
    pub pid: u32,
    /// Requests that wait to be delivered.
    pub waiting: u32,
    /// Requests that are delivered and not committed.
    pub delivered: u32,
    /// Requests committed since the disk was made.
    pub committed: u64,
    /// Requests that a process had when it died and that the kernel delivered again. Requests that it returned do not
    /// count, because it had not begun them.
    pub replayed: u64,
    /// Completions that named no delivered request.
    pub refused: u64,
    /// Nanoseconds since the oldest delivered request was delivered; 0 if there is none.
    pub oldest_ns: u64,
    /// Domain of the frontend, or `u32::MAX`.
    pub domain: u32,
    /// Virtual device of the frontend, or `u32::MAX`.
    pub device: u32,
    /// Size that was described, in 512-byte sectors; 0 if none was.
    pub sectors: u64,
    /// First sector of the last request that failed because processes died of it.
    pub poison_sector: u64,
    /// Its sectors.
    pub poison_sectors: u64,
    /// Its `OP_*`.
    pub poison_op: u32,
    /// Requests that failed because processes died of them ([`CreateCommand::max_deaths`]).
    pub poisoned: u32,
    /// Requests that the process gets one at a time, because earlier ones died with them.
    pub isolated: u32,
    /// Memory of the kernel that the disk holds, in KiB.
    pub memory_kib: u32,
    /// Operations that the last start was refused for: guests may ask for them, and the process did
    /// not claim them. One bit for each `OP_*`; 0 after a start that was not refused for that.
    pub lacking: u64,
    /// Requests that the kernel has executed without the process, see [`MapOp`].
    pub direct: u64,
    /// One bit for each backing of the disk.
    pub backings: u32,
    /// Requests that the kernel is executing now.
    pub executing: u32,
    /// Failed flushes among those that the kernel executed: writes before them may be lost. 0 if the kernel does not
    /// count them.
    pub failed_flushes: u32,
    /// Zero.
    pub reserved: u32,
}

/// `uring_cmd` is understood.
pub const FEATURE_URING_CMD: u64 = 1;
/// [`ioctl::CLAIM`] is understood.
pub const FEATURE_CLAIM: u64 = 1 << 2;

/// Up to [`MAX_COMMANDS`] `uring_cmd`s of a node may wait. The kernel reports this feature; a process need not claim
/// it, because a process that uses commands claims [`FEATURE_URING_CMD`].
pub const FEATURE_COMMANDS: u64 = 1 << 3;

/// [`ioctl::MAP`] and the backings are understood.
pub const FEATURE_MAPS: u64 = 1 << 1;

/// A process that is being served may claim a later fence than before, see [`Claims`]. The kernel reports this feature;
/// a process need not claim it.
pub const FEATURE_WIDEN: u64 = 1 << 6;

/// All features of this kernel.
pub const FEATURES: u64 =
    FEATURE_URING_CMD | FEATURE_CLAIM | FEATURE_COMMANDS | FEATURE_MAPS | FEATURE_WIDEN;

/// All operations of this kernel, one bit for each.
pub const OPERATIONS: u64 = 1 << OP_READ
    | 1 << OP_WRITE
    | 1 << OP_FLUSH
    | 1 << OP_DISCARD
    | 1 << OP_WRITE_ZEROES
    | 1 << OP_SECURE_DISCARD;

/// All I/O of the process is over when no page of the arena is in use any more: the machine's own kernel executes it,
/// and holds the pages until it can touch neither them nor the storage behind them any more.
pub const FENCE_LOCAL: u32 = 1;
/// A remote server executes I/O of the process, and may do so for [`Claims::settle_ms`] after the process is gone and
/// no page of the arena is in use any more.
pub const FENCE_SESSION: u32 = 2;
/// The end of the process's I/O cannot be known. So modifying requests that it had are not replayed: they fail. The
/// storage may still execute them later than requests that follow.
pub const FENCE_NONE: u32 = 3;

/// The longest [`Claims::settle_ms`].
pub const MAX_SETTLE_MS: u32 = 600_000;

/// Bytes of [`Claims`] when the structure was made: none is smaller.
pub const CLAIMS_FIRST_SIZE: u32 = 32;
/// Bytes that [`Claims`] of a later process may have.
pub const CLAIMS_MAX_SIZE: u32 = 4096;

/// Capabilities of a process: the argument of [`ioctl::CLAIM`].
///
/// The start is refused (`EOPNOTSUPP`) if guests may ask for an operation that was not claimed; [`Info::lacking`] lists
/// those operations. Guests may ask for the operations that the first process described. So a process that cannot serve
/// a disk gets the error, and no guest does. To claim an operation means that the process understands it: it may still
/// answer `-EOPNOTSUPP` if its image cannot do it.
///
/// A process that serves and has no request in hand may claim again: it gets no more requests until it starts once
/// more. If all of its I/O is over, including I/O for others such as NBD clients, a claim of [`FENCE_LOCAL`] lets it
/// end without the wait of [`FENCE_SESSION`]. No other claim withdraws an earlier one: the longest time counts. A claim
/// counts from when it is made, whether the disk is started or not, so a process must claim before its first I/O to
/// remote storage.
///
/// With [`FEATURE_WIDEN`], a process that is being served may repeat its claim with a later fence (a longer time, or
/// [`FENCE_NONE`]), whatever requests it has in hand. The kernel keeps serving it, and it need not start again. So a
/// mirror to a server can begin while the guest works.
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
pub struct Claims {
    /// Bytes of this structure as the caller knows it: at least [`CLAIMS_FIRST_SIZE`], at most
    /// [`CLAIMS_MAX_SIZE`].
    pub size: u32,
    /// `FENCE_*`: when the I/O of this process is over after its end. The kernel delivers nothing to the next process
    /// before that. A process must claim one of them; 0 is invalid.
    pub fence: u32,
    /// One bit for each `OP_*` that the process understands, with all flags of [`Desc`] that have no feature of their
    /// own. An unknown operation is refused (`EOPNOTSUPP`).
    pub operations: u64,
    /// `FEATURE_*` that the process uses. A feature that the kernel lacks is refused (`EOPNOTSUPP`), and so is the use
    /// of an unclaimed one ([`FEATURE_CLAIM`] and [`FEATURE_COMMANDS`] need no claim).
    pub features: u64,
    /// With [`FENCE_SESSION`], milliseconds from 1 to [`MAX_SETTLE_MS`]; otherwise 0.
    pub settle_ms: u32,
    /// Zero.
    pub reserved: u32,
}

/// No process has the node open, and there is none to wait for.
pub const STATE_IDLE: u32 = 0;
/// A process has it open and has not started it.
pub const STATE_OPEN: u32 = 1;
/// Requests are delivered.
pub const STATE_LIVE: u32 = 2;
/// The process is gone; its I/O may still be running.
pub const STATE_FENCING: u32 = 3;
/// The process has ended and its I/O is over; its unanswered requests wait for the next process.
pub const STATE_RECOVERING: u32 = 4;

/// Makes a disk.
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
pub struct CreateCommand {
    /// [`VERSION`] as the caller knows it.
    pub version: u32,
    /// In: the number of the node to create, or `u32::MAX` for any. Out: the number of the node.
    pub minor: u32,
    /// Size of the arena in KiB; 0 for the default. Whole MiB, at most 64.
    pub arena_kib: u32,
    /// Seconds after which requests fail while no process serves them; 0 holds them for ever.
    pub fail_after_s: u32,
    /// Deaths of processes at one request after which this request fails alone; 0 retries it for ever. At most 255; 1
    /// counts as 2.
    pub max_deaths: u32,
    /// Zero.
    pub reserved0: u32,
    /// Zero.
    pub reserved: [u64; 3],
}

/// Removes a disk: `EBUSY` while its node is open, a frontend is connected, or I/O of its last process is not known to
/// be over. So after the removal no process writes to its image any more.
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
pub struct Destroy {
    /// The node.
    pub minor: u32,
    /// Zero.
    pub flags: u32,
}

/// Points to an array in the caller's memory.
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
pub struct Buffer {
    /// Address.
    pub addr: u64,
    /// Bytes ([`ioctl::SET_PARAMS`]) or entries.
    pub len: u32,
    /// Zero.
    pub reserved: u32,
}

/// Commits, then fetches, in one call: the argument of [`ioctl::EXCHANGE`] and of the
/// `uring_cmd` with the same number.
///
/// The ioctl returns the number of tags fetched at once, 0 if there is none. The `uring_cmd` commits when it is issued
/// and completes when there is at least one tag (or at once if `tags.len` is 0); its result is the number of tags. A
/// node has [`MAX_COMMANDS`] such commands waiting at most (one without [`FEATURE_COMMANDS`]); a further one completes
/// with `EBUSY`, after its commits were taken. Requests wake one of them, and the tags that it leaves wake the next, so
/// each of several threads with rings of their own gets its share. The order is not defined.
///
/// The 16 bytes of command in the submission queue entry are a [`Buffer`] with the address of one
/// `Exchange` (`len` is 1). It and its arrays must stay where they are until the command
/// completes. Before the start both forms fail with `EINVAL`.
///
/// Completions that name no delivered request are counted ([`Info::refused`]) and otherwise
/// ignored: the rest of the batch is taken.
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
pub struct Exchange {
    /// Array of [`Completion`], at most [`MAX_TAGS`].
    pub commits: Buffer,
    /// Array of `u16` that takes the tags.
    pub tags: Buffer,
}

/// Head of a record in the argument of [`ioctl::SET_PARAMS`]; `len` more bytes follow, a multiple of
/// 8. An unknown kind or another length than the kind's is refused.
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
pub struct ParamHead {
    /// `PARAM_*`.
    pub kind: u32,
    /// Bytes that follow.
    pub len: u32,
}

/// [`Geometry`] follows; required.
pub const PARAM_GEOMETRY: u32 = 1;
/// [`DiscardLimits`] follows.
pub const PARAM_DISCARD: u32 = 2;

/// Guests may only read.
pub const GEOMETRY_READ_ONLY: u32 = 1;
/// The disk has a volatile cache: flushes are delivered.
pub const GEOMETRY_WRITE_CACHE: u32 = 2;
/// The disk may become smaller; without this flag that is refused (`ERANGE`), because the guest loses its data behind
/// the new end. The flag describes nothing of the disk itself.
pub const GEOMETRY_MAY_SHRINK: u32 = 4;

/// Geometry of a disk.
///
/// Guests see the description of the first process for as long as the disk exists; a later description changes the size
/// and nothing else. The kernel refuses a description that guests could not use as before: with larger logical blocks
/// or a size that is not whole ones, with a changed read-only flag, or with a volatile cache where there was none.
/// Other differences are accepted and have no effect.
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
pub struct Geometry {
    /// Size in 512-byte sectors, a multiple of the logical block size, not 0.
    pub sectors: u64,
    /// Bytes of a logical block: a power of two from 512 to 4096.
    pub logical_block: u32,
    /// Bytes of a physical block: a power of two, not below the logical one.
    pub physical_block: u32,
    /// `GEOMETRY_*`.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

/// Limits of discards. Without this record the disk has no discard.
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
pub struct DiscardLimits {
    /// Bytes, a multiple of the logical block size, not 0.
    pub granularity: u32,
    /// Bytes of the first aligned unit, below the granularity.
    pub alignment: u32,
    /// 1 if [`OP_SECURE_DISCARD`] is understood.
    pub secure: u32,
    /// Zero.
    pub reserved: u32,
}

// A process that was compiled elsewhere finds each field at its place.
const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(Desc, segments) == 2 && offset_of!(Desc, generation) == 4);
    assert!(offset_of!(Desc, sector) == 8 && offset_of!(Desc, sectors) == 16);
    assert!(offset_of!(Desc, sequence) == 24 && offset_of!(Desc, arrived_ns) == 32);
    assert!(offset_of!(Desc, tag) == 40 && offset_of!(Desc, queue) == 42);
    assert!(offset_of!(Desc, deliveries) == 44 && offset_of!(Desc, reserved) == 48);
    assert!(offset_of!(TapSegment, offset) == 0 && offset_of!(TapSegment, len) == 4);
    assert!(offset_of!(Completion, tag) == 0 && offset_of!(Completion, flags) == 2);
    assert!(offset_of!(Completion, generation) == 4 && offset_of!(Completion, result) == 8);
    assert!(offset_of!(Exchange, commits) == 0 && offset_of!(Exchange, tags) == 16);
};

const _: () = {
    assert!(size_of::<Desc>() == 64);
    assert!(size_of::<TapSegment>() == 8);
    assert!(size_of::<Completion>() == 16);
    assert!(size_of::<Info>() == 184);
    assert!(size_of::<Claims>() == 32);
    assert!(size_of::<CreateCommand>() == 48);
    assert!(size_of::<Destroy>() == 8);
    assert!(size_of::<Buffer>() == 16);
    assert!(size_of::<Exchange>() == 32);
    assert!(size_of::<ParamHead>() == 8);
    assert!(size_of::<Geometry>() == 24);
    assert!(size_of::<DiscardLimits>() == 16);
};

/// Numbers that nothing uses yet and nothing else may use.
pub mod kept {
    /// Operation: asks the process which extents serve a range.
    pub const OP_MAP_MISS: u8 = 32;
    /// Operation: extents are not used any more.
    pub const OP_RECALLED: u8 = 33;
    /// Operation: asks the process to finish its requests.
    pub const OP_QUIESCE: u8 = 34;
    /// Operation: the kernel has executed something in a mapped range.
    pub const OP_IO_DONE: u8 = 35;
    /// Completion: the process did not execute the request; the kernel is to deliver it again after a pause.
    pub const COMPLETION_RETRY_LATER: u16 = 2;
    /// Feature: a disk passes from one living process to another.
    pub const FEATURE_HANDOFF: u64 = 1 << 4;
    /// Feature: [`COMPLETION_RETRY_LATER`].
    pub const FEATURE_RETRY_LATER: u64 = 1 << 5;
    /// Record of a description: how mapped ranges are flushed.
    pub const PARAM_MAPPING: u32 = 3;
    /// Number of the ioctl of a disk node that hands the disk off.
    pub const HANDOFF: u32 = 0x17;
    /// Number of the ioctl that declares the previous process's I/O over, whatever it claimed.
    pub const SESSION_OVER: u32 = 0x18;
}

/// The numbers of the ioctls, in the encoding of `_IOC`.
pub mod ioctl {
    use super::*;

    const NONE: u32 = 0;
    const WRITE: u32 = 1;
    const READ: u32 = 2;

    const fn number<T>(direction: u32, nr: u32) -> u32 {
        // CAST: the structures are small.
        (direction << 30) | ((size_of::<T>() as u32) << 16) | ((b'x' as u32) << 8) | nr
    }

    /// Returns true for an ioctl of this driver whose number is reserved, of any size; also for an [`EXCHANGE`] with a
    /// third array, of mapped ranges.
    pub const fn is_kept(number: u32) -> bool {
        let (kind, nr, size) = (number >> 8 & 0xff, number & 0xff, number >> 16 & 0x3fff);
        let kept = matches!(nr, kept::HANDOFF | kept::SESSION_OVER);
        kind == b'x' as u32 && (kept || nr == EXCHANGE & 0xff && size == 48)
    }

    /// Control node: [`CreateCommand`]. Needs `CAP_SYS_ADMIN`, as all ioctls of the control node but
    /// [`QUERY`] and [`MAPPED`].
    pub const CREATE: u32 = number::<CreateCommand>(READ | WRITE, 0x00);
    /// Control node: [`Destroy`].
    pub const DESTROY: u32 = number::<Destroy>(WRITE, 0x01);
    /// Control node: fills an [`Info`] whose `minor` names the node; `ENOENT` if there is none.
    /// The lowest node that is not below `minor` is described, so that all can be listed.
    pub const QUERY: u32 = number::<Info>(READ | WRITE, 0x02);
    /// Control node: [`BackingAdd`]. `EEXIST` if the disk has another backing of this number, `EOPNOTSUPP` if it is
    /// neither a block device nor a file on one that allows direct I/O. The kernel keeps the open file description, and
    /// with it its locks. Adding the same backing again does nothing.
    pub const BACKING_ADD: u32 = number::<BackingAdd>(WRITE, 0x03);
    /// Control node: [`BackingRemove`]. `EBUSY` while I/O uses it, or may begin for a moment, so try again.
    pub const BACKING_REMOVE: u32 = number::<BackingRemove>(WRITE, 0x04);

    /// Control node: fills a [`Mapped`] of the node that its `minor` names; `ENOENT` if there is none.
    pub const MAPPED: u32 = number::<Mapped>(READ | WRITE, 0x05);

    /// Disk node: fills an [`Info`].
    pub const INFO: u32 = number::<Info>(READ, 0x10);
    /// Disk node: a [`Buffer`] of records, each a [`ParamHead`] and its content. Before the start
    /// this describes the disk; afterwards it resizes it.
    pub const SET_PARAMS: u32 = number::<Buffer>(WRITE, 0x11);
    /// Disk node: the requests that the last process had are not to blame for its end, for example because the
    /// administrator killed it (see [`CreateCommand::max_deaths`]). Before the start.
    pub const EXCUSE: u32 = number::<()>(NONE, 0x14);
    /// Disk node: [`Claims`]; its number does not contain the size. Allowed before the start, or after it with no
    /// request in hand, which revokes the start; `EINVAL` otherwise. The last claim counts, except for the time of
    /// [`FENCE_SESSION`].
    pub const CLAIM: u32 = number::<()>(WRITE, 0x15);
    /// Disk node: starts the delivery of requests, those of an earlier process first. `EOPNOTSUPP` if the process lacks
    /// an operation that guests may ask for, `EINVAL` if the disk is not described or started already. It can be
    /// repeated after a start that was refused, and after a further [`CLAIM`]; deaths of the process before
    /// ([`CreateCommand::max_deaths`]) count at the first one.
    pub const START: u32 = number::<()>(NONE, 0x12);
    /// Disk node: [`Exchange`].
    pub const EXCHANGE: u32 = number::<Exchange>(READ | WRITE, 0x13);
    /// Disk node: [`Maps`]. After the start, by a process that claimed [`FEATURE_MAPS`].
    pub const MAP: u32 = number::<Maps>(READ | WRITE, 0x16);
}
