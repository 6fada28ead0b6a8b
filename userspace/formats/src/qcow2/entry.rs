// SPDX-License-Identifier: MIT OR Apache-2.0
//! Entries of L1 and L2 tables.

use super::geometry::{Geometry, MAX_OFFSET};

/// Bit of an entry whose cluster has a refcount of one: writes may overwrite it in place.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = MAX_OFFSET - 512;
/// Bits of L1 entries, and of L2 entries of clusters that are not compressed, without a meaning.
pub(crate) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
pub(crate) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// Location of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClusterLocation {
    /// Nowhere.
    Nowhere,
    /// In a cluster of the image, or of the data file.
    Host {
        /// Its offset.
        at: u64,
        /// No snapshot has it, too.
        owned: bool,
    },
    /// Compressed in a range of the image.
    Compressed {
        /// Its offset, at any byte.
        at: u64,
        /// Its bytes at most.
        len: u64,
    },
}

/// Source of a subcluster's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SubclusterSource {
    /// The backing image.
    Below,
    /// Zeroes.
    Zero,
    /// The cluster's own place.
    Data,
}

/// An L2 entry: a bit of `alloc` or `zero` for each subcluster, never of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct L2Entry {
    pub(crate) place: ClusterLocation,
    pub(crate) alloc: u32,
    pub(crate) zero: u32,
}

/// Reason why an entry is impossible.
pub(crate) type EntryError = &'static str;

impl L2Entry {
    /// Entry of a cluster that no guest has written.
    pub(crate) const NONE: Self = Self {
        place: ClusterLocation::Nowhere,
        alloc: 0,
        zero: 0,
    };

    /// An entry as it is in the table.
    pub(crate) fn decode(word: u64, bitmap: u64, geometry: &Geometry) -> Result<Self, EntryError> {
        if word & COMPRESSED != 0 {
            return Self::compressed(word, bitmap, geometry);
        }
        let (at, owned) = (word & OFFSET, word & COPIED != 0);
        if at % geometry.cluster() != 0 {
            return Err("the offset is no whole number of clusters");
        }
        // In a data file a cluster may be at its beginning.
        let place = match at != 0 || geometry.external && owned {
            true => ClusterLocation::Host { at, owned },
            false => ClusterLocation::Nowhere,
        };
        // CAST: each half of the bitmap.
        let (alloc, zero) = match (geometry.extended, word & ZERO != 0) {
            (true, _) => (bitmap as u32, (bitmap >> 32) as u32),
            (false, true) if !geometry.has_zero => return Err("version 2 has no zero clusters"),
            (false, true) => (0, 1),
            (false, false) => (u32::from(place != ClusterLocation::Nowhere), 0),
        };
        if alloc & zero != 0 {
            return Err("a subcluster is both data and zeroes");
        }
        if alloc != 0 && place == ClusterLocation::Nowhere {
            return Err("a subcluster is data without a cluster");
        }
        Ok(Self { place, alloc, zero })
    }

    fn compressed(word: u64, bitmap: u64, geometry: &Geometry) -> Result<Self, EntryError> {
        if bitmap != 0 {
            return Err("a compressed cluster has subclusters");
        }
        if word & COPIED != 0 || geometry.external {
            return Err("a compressed cluster is where none may be");
        }
        let bits = 62 - (geometry.cluster_bits - 8);
        let at = word & ((1 << bits) - 1);
        let sectors = ((word & (COMPRESSED - 1)) >> bits) + 1;
        if at >= MAX_OFFSET {
            return Err("a compressed cluster is out of reach");
        }
        let place = ClusterLocation::Compressed {
            at,
            len: sectors * 512 - at % 512,
        };
        let alloc = geometry.all_parts();
        Ok(Self {
            place,
            alloc,
            zero: 0,
        })
    }

    /// The words of a table for it.
    pub(crate) fn encode(&self, geometry: &Geometry) -> (u64, u64) {
        let word = match self.place {
            ClusterLocation::Host { at, owned } => at | if owned { COPIED } else { 0 },
            ClusterLocation::Nowhere => 0,
            ClusterLocation::Compressed { at, len } => {
                let bits = 62 - (geometry.cluster_bits - 8);
                let sectors = (at % 512 + len).div_ceil(512);
                return (COMPRESSED | sectors.saturating_sub(1) << bits | at, 0);
            }
        };
        match geometry.extended {
            true => (word, u64::from(self.zero) << 32 | u64::from(self.alloc)),
            false => (word | u64::from(self.zero), 0),
        }
    }

    /// Returns the source of a subcluster's content.
    pub(crate) fn part(&self, number: u32) -> SubclusterSource {
        let bit = 1 << number;
        match (self.alloc & bit != 0, self.zero & bit != 0) {
            (true, _) => SubclusterSource::Data,
            (_, true) => SubclusterSource::Zero,
            _ => SubclusterSource::Below,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ClusterLocation, L2Entry, COMPRESSED, COPIED};
    use crate::qcow2::geometry::Geometry;

    const PLAIN: Geometry = Geometry {
        cluster_bits: 16,
        extended: false,
        refcount_order: 4,
        has_zero: true,
        external: false,
    };

    #[test]
    fn entries_come_back_as_they_were() {
        let extended = Geometry {
            extended: true,
            ..PLAIN
        };
        for (word, bitmap, geometry) in [
            (0, 0, PLAIN),
            (0x50000 | COPIED, 0, PLAIN),
            (0x50000, 0, PLAIN),
            (0x50001, 0, PLAIN),
            (1, 0, PLAIN),
            (0x50000, 0x0000_0100_0000_0001, extended),
            (0, 0xffff_ffff_0000_0000, extended),
            (COMPRESSED | 3 << 54 | 0x12345, 0, PLAIN),
            (COMPRESSED | 200 << 54 | 0x12200, 0, extended),
        ] {
            let entry = L2Entry::decode(word, bitmap, &geometry).unwrap();
            assert_eq!(entry.encode(&geometry), (word, bitmap), "{entry:?}");
        }
    }

    #[test]
    fn compressed_entry_says_where_and_how_much() {
        // Offset 0x12345 and three more sectors: 8 bits of size with clusters of 64 KiB.
        let entry = L2Entry::decode(COMPRESSED | 3 << 54 | 0x12345, 0, &PLAIN).unwrap();
        let len = 4 * 512 - 0x145;
        assert_eq!(
            entry.place,
            ClusterLocation::Compressed { at: 0x12345, len }
        );
    }

    #[test]
    fn impossible_entries_are_refused() {
        let extended = Geometry {
            extended: true,
            ..PLAIN
        };
        let old = Geometry {
            has_zero: false,
            ..PLAIN
        };
        for (word, bitmap, geometry) in [
            (0x50200, 0, PLAIN),
            (COMPRESSED | COPIED | 512, 0, PLAIN),
            (1, 0, old),
            (0, 1, extended),
            (0x50000, 1 << 32 | 1, extended),
            (COMPRESSED | 512, 1, extended),
        ] {
            assert!(
                L2Entry::decode(word, bitmap, &geometry).is_err(),
                "{word:#x}"
            );
        }
    }
}
