// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Ranges of a disk, and extents: where the data of a range is.
//!
//! All is counted in sectors of 512 bytes, on the disk and in what is behind it, whatever the blocks
//! are. So no conversion between bytes and sectors can overflow.

use crate::ring::tap::abi;

/// Sectors of a disk: at least one.
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
    /// All that there can be.
    pub const ALL: Self = Self {
        start: 0,
        end: u64::MAX,
    };

    /// So many from this one on; `None` if that is none, or more than there can be.
    pub fn new(first: u64, count: u64) -> Option<Self> {
        Self::between(first, first.checked_add(count)?)
    }

    /// Those from `start` on that are before `end`; `None` if there is none.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        // INVARIANT: checked here.
        (start < end).then_some(Self { start, end })
    }

    /// The first one.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The one behind the last.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.end.wrapping_sub(self.start)
    }

    /// Those that are in both.
    pub fn common(&self, other: &Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end.min(other.end))
    }

    /// True if all of the other are among them.
    pub fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

/// Names a file or block device behind a disk: a number below [`abi::MAX_BACKINGS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingNumber(u8);

impl BackingNumber {
    /// `None` if there is none of this number.
    pub fn new(number: u16) -> Option<Self> {
        let small = u8::try_from(number).ok()?;
        (number < abi::MAX_BACKINGS).then_some(Self(small))
    }

    /// Its place in a table.
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// What holds the data of an extent.
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

/// What may be done with an extent without asking the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Also write it where it is, which changes nothing but the data.
    ReadWrite,
}

/// Where the data of a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The range of the disk.
    pub range: Sectors,
    /// The first sector in the source; 0 and without a meaning for zeroes.
    pub place: u64,
    /// What holds it.
    pub source: Source,
    /// What may be done.
    pub access: Access,
}

impl Extent {
    /// Takes the place of one that is not known yet.
    pub const NOTHING: Self = Self {
        range: Sectors::ALL,
        place: 0,
        source: Source::Zeroes,
        access: Access::Read,
    };

    /// The part of it that is in a range, with the place of that part.
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

    /// True if each sector that both have is at the same place. Of ranges that only touch it says
    /// that they do so in the source, too.
    pub fn same_place(&self, other: &Self) -> bool {
        let shift = |extent: &Self| extent.place.wrapping_sub(extent.range.start);
        let zeroes = self.source == Source::Zeroes;
        self.source == other.source && (zeroes || shift(self) == shift(other))
    }

    /// Both as one extent, if that says the same.
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
