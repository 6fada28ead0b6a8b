// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Checked arguments of the ioctls that the process and the supervisor call.
//!
//! Each argument is copied from user space once, checked here as a value, and only the checked
//! type is used.

use crate::ring::numbers::DiskTag;
use crate::ring::response::ResponseStatus;
use crate::ring::tap::abi;
use crate::ring::tap::extent::{BackingNumber, DataExtent, ExtentAccess, Sectors, Source};

/// Largest negative `errno` that a completion may carry.
const MAX_ERRNO: i32 = 4095;
/// `EOPNOTSUPP`.
const EOPNOTSUPP: i32 = 95;
/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Largest arena, in KiB.
pub const MAX_ARENA_KIB: u32 = 64 << 10;
/// Nodes have numbers below this.
pub const MAX_MINORS: u32 = 1 << 20;
/// Maximum number of bytes of all records of one `SET_PARAMS`.
pub const MAX_PARAMS_LEN: u32 = 4096;

/// Fault of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The caller knows another version of the ABI.
    Version,
    /// A field that must be zero is not.
    Reserved,
    /// A flag is not known.
    Flags,
    /// A number is out of its range.
    Range,
    /// An array is too long, or wraps around the end of memory.
    Buffer,
    /// An operation or a feature is unknown, or reserved for later.
    Unknown,
    /// A structure is larger than any version may be, or has bytes beyond this version's size that are not zero.
    Larger,
}

fn zero<const N: usize, T: Copy + Default + PartialEq>(fields: [T; N]) -> Result<(), Malformed> {
    if fields.iter().all(|field| *field == T::default()) {
        Ok(())
    } else {
        Err(Malformed::Reserved)
    }
}

/// Fate of a delivered request, as the process reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestOutcome {
    /// The process executed the request, with this result for the guest.
    Finished(ResponseStatus),
    /// The process did not execute the request; the kernel delivers it again.
    Returned,
}

/// A checked completion: well-formed, but it may name anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The request.
    pub tag: DiskTag,
    /// Its delivery.
    pub generation: u32,
    /// The result.
    pub outcome: RequestOutcome,
}

impl abi::Completion {
    /// Checks the completion.
    pub fn check(&self) -> Result<Commit, Malformed> {
        zero([self.reserved])?;
        let outcome = match (self.flags, self.result) {
            (0, 0) => RequestOutcome::Finished(ResponseStatus::Okay),
            (0, result) => RequestOutcome::Finished(failure(result)?),
            (abi::COMPLETION_RETURNED, 0) => RequestOutcome::Returned,
            (abi::COMPLETION_RETURNED, _) => return Err(Malformed::Range),
            (abi::kept::COMPLETION_RETRY_LATER, _) => return Err(Malformed::Unknown),
            _ => return Err(Malformed::Flags),
        };
        Ok(Commit {
            tag: DiskTag::new(self.tag),
            generation: self.generation,
            outcome,
        })
    }
}

fn failure(result: i32) -> Result<ResponseStatus, Malformed> {
    match result.checked_neg() {
        Some(EOPNOTSUPP) => Ok(ResponseStatus::NotSupported),
        Some(1..=MAX_ERRNO) => Ok(ResponseStatus::Error),
        _ => Err(Malformed::Range),
    }
}

/// A disk to create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// The requested number of the node; `None` if any will do.
    pub minor: Option<u32>,
    /// The requested size of the arena in KiB: whole MiB, not 0.
    pub arena_kib: Option<u32>,
    /// Seconds without a process after which requests fail, if ever.
    pub fail_after_s: Option<u32>,
    /// Deaths at one request after which it fails; 0 for never.
    pub max_deaths: u8,
}

impl abi::CreateCommand {
    /// Checks the request for a disk.
    pub fn check(&self) -> Result<NewDisk, Malformed> {
        if self.version != abi::VERSION {
            return Err(Malformed::Version);
        }
        zero(self.reserved)?;
        zero([self.reserved0])?;
        let max_deaths = u8::try_from(self.max_deaths).map_err(|_| Malformed::Range)?;
        let minor = (self.minor != u32::MAX).then_some(self.minor);
        let whole = self.arena_kib % 1024 == 0 && self.arena_kib <= MAX_ARENA_KIB;
        if !whole || minor.is_some_and(|minor| minor >= MAX_MINORS) {
            return Err(Malformed::Range);
        }
        Ok(NewDisk {
            minor,
            arena_kib: (self.arena_kib != 0).then_some(self.arena_kib),
            fail_after_s: (self.fail_after_s != 0).then_some(self.fail_after_s),
            max_deaths,
        })
    }
}

impl abi::Destroy {
    /// Checks the request and returns the node's number.
    pub fn check(&self) -> Result<u32, Malformed> {
        zero([self.flags])?;
        Ok(self.minor)
    }
}

/// Capabilities of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// One bit for each `OP_*`, all of them known.
    pub operations: u64,
    /// `FEATURE_*`, all of them known.
    pub features: u64,
    /// When its I/O is over after its end.
    pub fence: Fence,
}

/// When the I/O of a process is over after its end; a later end compares as greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fence {
    /// When it holds no page of the arena.
    Local,
    /// Then, but not before this time has passed.
    Session {
        /// Milliseconds, from 1 to [`abi::MAX_SETTLE_MS`].
        settle_ms: u32,
    },
    /// The time is unknown.
    None,
}

impl Claimed {
    /// Capabilities of a process that claims none, because it predates claims.
    pub const BEFORE: Self = Self {
        operations: 1 << abi::OP_READ
            | 1 << abi::OP_WRITE
            | 1 << abi::OP_FLUSH
            | 1 << abi::OP_DISCARD
            | 1 << abi::OP_WRITE_ZEROES
            | 1 << abi::OP_SECURE_DISCARD,
        features: abi::FEATURE_URING_CMD,
        fence: Fence::Local,
    };

    /// Returns true if this is `before` except for a later fence.
    #[must_use]
    pub fn widens(&self, before: &Self) -> bool {
        let is_alike = (self.operations, self.features) == (before.operations, before.features);
        is_alike && self.fence > before.fence
    }
}

/// How much of a structure that carries its size the caller reads, and how many bytes behind that must be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Bytes that both sides know.
    pub known: usize,
    /// Bytes behind them, which must be zero.
    pub beyond: usize,
}

impl abi::Claims {
    /// Checks the size that the caller's structure says it has.
    pub fn check_size(size: u32) -> Result<Lengths, Malformed> {
        let ours = size_of::<Self>();
        match size {
            ..abi::CLAIMS_FIRST_SIZE => Err(Malformed::Range),
            abi::CLAIMS_FIRST_SIZE..=abi::CLAIMS_MAX_SIZE => {
                // CAST: it is small.
                let theirs = size as usize;
                Ok(Lengths {
                    known: theirs.min(ours),
                    beyond: theirs.saturating_sub(ours),
                })
            }
            _ => Err(Malformed::Larger),
        }
    }

    /// Checks the claims of a process. The caller fills fields that the process's structure lacks with zeroes.
    pub fn check(&self) -> Result<Claimed, Malformed> {
        zero([self.reserved])?;
        let unknown = self.operations & !abi::OPERATIONS | self.features & !abi::FEATURES;
        if unknown != 0 {
            return Err(Malformed::Unknown);
        }
        let fence = match (self.fence, self.settle_ms) {
            (abi::FENCE_LOCAL, 0) => Fence::Local,
            (abi::FENCE_SESSION, settle_ms @ 1..=abi::MAX_SETTLE_MS) => {
                Fence::Session { settle_ms }
            }
            (abi::FENCE_NONE, 0) => Fence::None,
            (4.., _) => return Err(Malformed::Unknown),
            _ => return Err(Malformed::Range),
        };
        Ok(Claimed {
            operations: self.operations,
            features: self.features,
            fence,
        })
    }
}

/// An array in the caller's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserArray {
    /// Address; means nothing if the array is empty. It is not checked here: functions that copy from and to user space
    /// reject a wrong one.
    pub addr: u64,
    /// Entries.
    pub len: u32,
}

impl UserArray {
    /// Bytes of the array, whose entries have `size` bytes.
    pub fn bytes(&self, size: u32) -> u64 {
        // Two numbers of 32 bits.
        u64::from(self.len).wrapping_mul(u64::from(size))
    }
}

impl abi::Buffer {
    /// Checks an array of at most `max` entries of `size` bytes.
    pub fn check(&self, max: u32, size: u32) -> Result<UserArray, Malformed> {
        zero([self.reserved])?;
        let array = UserArray {
            addr: self.addr,
            len: self.len,
        };
        let end = self.addr.checked_add(array.bytes(size));
        if self.len > max || (self.len > 0 && end.is_none()) {
            return Err(Malformed::Buffer);
        }
        Ok(array)
    }

    /// Checks the argument of `SET_PARAMS`: an array of bytes.
    pub fn check_params(&self) -> Result<UserArray, Malformed> {
        self.check(MAX_PARAMS_LEN, 1)
    }
}

/// The two arrays of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrays {
    /// Completions to take, 16 bytes each.
    pub commits: UserArray,
    /// Room for tags, 2 bytes each.
    pub tags: UserArray,
}

impl abi::Exchange {
    /// Checks the argument of an exchange.
    pub fn check(&self) -> Result<Arrays, Malformed> {
        // CAST: both sizes are small.
        let commit = size_of::<abi::Completion>() as u32;
        let tag = size_of::<u16>() as u32;
        Ok(Arrays {
            commits: self.commits.check(abi::MAX_TAGS, commit)?,
            tags: self.tags.check(abi::MAX_TAGS, tag)?,
        })
    }
}

/// A checked change of mappings: well-formed, but the backing or range that it names may not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapChange {
    /// Maps an extent.
    Set {
        /// The extent.
        extent: DataExtent,
        /// Generation of the mappings that the process knew when it looked up the range.
        generation: u32,
    },
    /// Withdraws the mapping of a range.
    Recall {
        /// The range.
        range: Sectors,
    },
    /// Flushes of the disk are flushes of its only backing.
    Flush,
}

impl abi::MapOp {
    /// Checks the change.
    pub fn check(&self) -> Result<MapChange, Malformed> {
        zero(self.reserved)?;
        let range = || Sectors::new(self.sector, self.sectors).ok_or(Malformed::Range);
        match self.op {
            abi::MAP_SET => self.check_set(range()?),
            abi::MAP_RECALL => {
                self.says_nothing_else()?;
                Ok(MapChange::Recall { range: range()? })
            }
            abi::MAP_FLUSH => {
                self.says_nothing_else()?;
                zero([self.sector, self.sectors])?;
                Ok(MapChange::Flush)
            }
            _ => Err(Malformed::Unknown),
        }
    }

    /// Checks that the fields that only a `MAP_SET` uses are zero.
    fn says_nothing_else(&self) -> Result<(), Malformed> {
        zero([self.flags])?;
        zero([self.backing])?;
        zero([self.generation])?;
        zero([self.offset])
    }

    fn check_set(&self, range: Sectors) -> Result<MapChange, Malformed> {
        const READ_WRITE: u8 = abi::MAP_READ | abi::MAP_WRITE;
        const ZEROES: u8 = abi::MAP_READ | abi::MAP_ZERO;
        let (source, access) = match self.flags {
            abi::MAP_READ => (self.check_backing()?, ExtentAccess::Read),
            READ_WRITE => (self.check_backing()?, ExtentAccess::ReadWrite),
            ZEROES if self.backing == abi::MAP_NO_BACKING && self.offset == 0 => {
                (Source::Zeroes, ExtentAccess::Read)
            }
            ZEROES => return Err(Malformed::Range),
            flags if flags & abi::MAP_TRACK != 0 => return Err(Malformed::Unknown),
            _ => return Err(Malformed::Flags),
        };
        let place = self.offset / SECTOR;
        // So its end in the source is a number, too.
        let fits = place.checked_add(range.count()).is_some();
        if !fits || self.offset % SECTOR != 0 {
            return Err(Malformed::Range);
        }
        Ok(MapChange::Set {
            extent: DataExtent {
                range,
                place,
                source,
                access,
            },
            generation: self.generation,
        })
    }

    fn check_backing(&self) -> Result<Source, Malformed> {
        let number = BackingNumber::new(self.backing).ok_or(Malformed::Range)?;
        Ok(Source::Backing(number))
    }
}

/// A backing to add to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewBacking {
    /// Number of the node.
    pub minor: u32,
    /// Number of the backing.
    pub number: BackingNumber,
    /// A descriptor of the caller; it may be none.
    pub fd: i32,
    /// The kernel may write it.
    pub writable: bool,
}

impl abi::BackingAdd {
    /// Checks a backing to add.
    pub fn check(&self) -> Result<NewBacking, Malformed> {
        zero(self.reserved)?;
        if self.flags & !abi::BACKING_WRITE != 0 {
            return Err(Malformed::Flags);
        }
        Ok(NewBacking {
            minor: self.minor,
            number: backing_number(self.number)?,
            fd: self.fd,
            writable: self.flags & abi::BACKING_WRITE != 0,
        })
    }
}

impl abi::BackingRemove {
    /// Checks a backing to remove, and returns the numbers of the node and of the backing.
    pub fn check(&self) -> Result<(u32, BackingNumber), Malformed> {
        zero([self.reserved])?;
        Ok((self.minor, backing_number(self.number)?))
    }
}

impl abi::Mapped {
    /// Checks a query, and returns the number of the node.
    pub fn check(&self) -> Result<u32, Malformed> {
        zero(self.reserved)?;
        Ok(self.minor)
    }
}

fn backing_number(number: u32) -> Result<BackingNumber, Malformed> {
    let small = u16::try_from(number).ok();
    small.and_then(BackingNumber::new).ok_or(Malformed::Range)
}

impl abi::Maps {
    /// Checks the argument of `MAP`, and returns its operations.
    pub fn check(&self) -> Result<UserArray, Malformed> {
        zero(self.reserved)?;
        // CAST: it is small.
        self.ops
            .check(abi::MAX_MAP_OPS, size_of::<abi::MapOp>() as u32)
    }
}
