// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Ranges of a disk, and extents: where the data of a range is.
//!
//! All numbers are sectors of 512 bytes, on the disk and in its backings, whatever the block size. So no conversion
//! between bytes and sectors can overflow.

use crate::ring::tap::abi;

/// A range of sectors of a disk: at least one.
///
/// # Invariants
///
/// `start < end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sectors {
    start: u64,
    end: u64,
}

impl Sectors {
    /// The largest range.
    pub const ALL: Self = Self {
        start: 0,
        end: u64::MAX,
    };

    /// Returns `count` sectors from `first` on; `None` if `count` is 0 or the end overflows.
    pub fn new(first: u64, count: u64) -> Option<Self> {
        Self::between(first, first.checked_add(count)?)
    }

    /// Returns the range from `start` up to but not including `end`; `None` if it is empty.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        // INVARIANT: checked here.
        (start < end).then_some(Self { start, end })
    }

    /// Returns the first sector.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Returns the sector behind the last.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Returns the number of sectors.
    pub fn count(&self) -> u64 {
        self.end.wrapping_sub(self.start)
    }

    /// Returns the sectors that are in both ranges.
    pub fn common(&self, other: &Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end.min(other.end))
    }

    /// Returns true if this range contains all of the other.
    pub fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

/// Names a file or block device behind a disk: a number below [`abi::MAX_BACKINGS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingNumber(u8);

impl BackingNumber {
    /// Returns the name of a backing; `None` if `number` is out of range.
    pub fn new(number: u16) -> Option<Self> {
        let small = u8::try_from(number).ok()?;
        (number < abi::MAX_BACKINGS).then_some(Self(small))
    }

    /// Its place in a table.
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// Storage that holds the data of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file or block device.
    Backing(BackingNumber),
    /// Nothing: all of it reads as zeroes.
    Zeroes,
}

impl Source {
    /// The file or block device; `None` for zeroes.
    pub fn backing(self) -> Option<BackingNumber> {
        match self {
            Source::Backing(number) => Some(number),
            Source::Zeroes => None,
        }
    }
}

/// Access to an extent that needs no process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentAccess {
    /// Read it.
    Read,
    /// Also write it where it is, which changes nothing but the data.
    ReadWrite,
}

/// Where the data of a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataExtent {
    /// The range of the disk.
    pub range: Sectors,
    /// The first sector in the source; 0 and without a meaning for zeroes.
    pub place: u64,
    /// Storage that holds the data.
    pub source: Source,
    /// Permitted access.
    pub access: ExtentAccess,
}

impl DataExtent {
    /// Placeholder of an unused entry.
    pub const NOTHING: Self = Self {
        range: Sectors::ALL,
        place: 0,
        source: Source::Zeroes,
        access: ExtentAccess::Read,
    };

    /// Returns the part of the extent that is in a range, with the place of that part.
    pub fn part(&self, range: &Sectors) -> Option<Self> {
        let range = self.range.common(range)?;
        let skipped = range.start.wrapping_sub(self.range.start);
        let place = match self.source {
            Source::Backing(_) => self.place.wrapping_add(skipped),
            Source::Zeroes => 0,
        };
        Some(Self {
            range,
            place,
            ..*self
        })
    }

    /// Returns true if each sector that both extents have is at one place in the source. For extents that only touch,
    /// true if they also touch in the source.
    pub fn same_place(&self, other: &Self) -> bool {
        let shift = |extent: &Self| extent.place.wrapping_sub(extent.range.start);
        let zeroes = self.source == Source::Zeroes;
        self.source == other.source && (zeroes || shift(self) == shift(other))
    }

    /// Joins both to one extent, if they touch or overlap in the disk and in the source, with equal access.
    pub fn joined(&self, other: &Self) -> Option<Self> {
        let touch = self.range.start <= other.range.end && other.range.start <= self.range.end;
        let alike = self.access == other.access && self.same_place(other);
        let first = if self.range.start <= other.range.start {
            self
        } else {
            other
        };
        let end = self.range.end.max(other.range.end);
        let range = Sectors::between(first.range.start, end)?;
        (touch && alike).then_some(Self { range, ..*first })
    }
}

/// An extent in a backing, as a queue uses it that needs no process for it (`shadow::express`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpressExtent {
    range: Sectors,
    /// First sector in the backing.
    place: u64,
    backing: BackingNumber,
    access: ExtentAccess,
    /// Sectors of a block of the backing: a power of two.
    block: u32,
}

impl ExpressExtent {
    /// Returns an extent whose backing has blocks of `block` sectors; `None` if it is zeroes or there is no such block.
    pub(super) fn new(extent: &DataExtent, block: u32) -> Option<Self> {
        let backing = extent.source.backing()?;
        block.is_power_of_two().then_some(Self {
            range: extent.range,
            place: extent.place,
            backing,
            access: extent.access,
            block,
        })
    }

    /// Returns the backing.
    pub fn backing(&self) -> BackingNumber {
        self.backing
    }

    /// Returns the first sector of 512 bytes in the backing of `sectors` sectors of the disk; `None` if the extent does not
    /// have all of them, in whole blocks, with this access.
    #[inline]
    pub fn place_of(&self, sector: u64, sectors: u64, access: ExtentAccess) -> Option<u64> {
        let end = sector.checked_add(sectors)?;
        let is_in = self.range.start() <= sector && sector < end && end <= self.range.end();
        let may = access == ExtentAccess::Read || self.access == ExtentAccess::ReadWrite;
        let part_of_block = (sector | end) & u64::from(self.block.wrapping_sub(1));
        let skipped = sector.wrapping_sub(self.range.start());
        (is_in && may && part_of_block == 0).then_some(self.place.wrapping_add(skipped))
    }
}
