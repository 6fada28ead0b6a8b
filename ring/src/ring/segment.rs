// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A checked segment: a run of sectors inside one granted page.

use crate::ring::abi::{RawSegment, SECTORS_PER_PAGE, SECTOR_SIZE};

/// A run of sectors inside one granted page.
///
/// # Invariants
///
/// `first <= last < 8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantSegment {
    gref: u32,
    first: u8,
    last: u8,
}

impl GrantSegment {
    /// Checks a raw segment.
    ///
    /// Returns `None` if its sectors do not lie inside one page in ascending order.
    #[inline]
    pub fn check(raw: &RawSegment) -> Option<Self> {
        let (first, last) = (raw.first_sect, raw.last_sect);
        if first > last || last >= SECTORS_PER_PAGE {
            return None;
        }
        // INVARIANT: checked above.
        Some(Self {
            gref: raw.gref.get(),
            first,
            last,
        })
    }

    /// Grant reference of the page, as the guest gave it: not yet known to be valid.
    #[inline]
    pub fn gref(&self) -> u32 {
        self.gref
    }

    /// Number of sectors, 1 to 8.
    #[inline]
    pub fn sectors(&self) -> u32 {
        // By the invariant neither operation wraps; wrapping forms keep panics out of the kernel.
        u32::from(self.last.wrapping_sub(self.first)).wrapping_add(1)
    }

    /// Byte offset in the page, 0 to 3584.
    #[inline]
    pub fn offset(&self) -> u32 {
        u32::from(self.first).wrapping_mul(SECTOR_SIZE)
    }

    /// Length in bytes, 512 to 4096; `offset() + len() <= 4096`.
    #[inline]
    pub fn len(&self) -> u32 {
        self.sectors().wrapping_mul(SECTOR_SIZE)
    }

    /// Never true: a segment has at least one sector.
    #[inline]
    pub fn is_empty(&self) -> bool {
        false
    }
}
