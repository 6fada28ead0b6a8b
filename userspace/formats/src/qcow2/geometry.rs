// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sizes in an image, and the entries of a byte of the disk.

/// Smallest and largest clusters, as powers of two.
pub(crate) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Smallest clusters with extended entries.
pub(crate) const EXTENDED_BITS: u32 = 14;
/// Offsets have 56 bits.
pub(crate) const MAX_OFFSET: u64 = 1 << 56;
/// Subclusters of a cluster with an extended entry.
const SUBCLUSTERS: u32 = 32;

/// The sizes of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) cluster_bits: u32,
    /// True if L2 entries have 16 bytes and the state of each of 32 subclusters.
    pub(crate) extended: bool,
    /// A refcount has `1 << refcount_order` bits.
    pub(crate) refcount_order: u32,
    /// Clusters can be marked as zero: not in version 2.
    pub(crate) has_zero: bool,
    /// Data is in a file of its own.
    pub(crate) external: bool,
}

impl Geometry {
    /// Bytes of a cluster.
    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub(crate) fn entry(&self) -> u64 {
        if self.extended {
            16
        } else {
            8
        }
    }

    /// Entries of an L2 table.
    pub(crate) fn entries(&self) -> u64 {
        self.cluster() / self.entry()
    }

    /// Bytes of the disk that an L2 table is for.
    pub(crate) fn span(&self) -> u64 {
        // At most 2^21 * 2^18.
        self.cluster() * self.entries()
    }

    /// Subclusters of a cluster: one if entries are not extended.
    pub(crate) fn parts(&self) -> u32 {
        if self.extended {
            SUBCLUSTERS
        } else {
            1
        }
    }

    /// Bytes of a subcluster.
    pub(crate) fn part(&self) -> u64 {
        self.cluster() / u64::from(self.parts())
    }

    /// A bit for each subcluster.
    pub(crate) fn all_parts(&self) -> u32 {
        if self.extended {
            u32::MAX
        } else {
            1
        }
    }

    /// Bits of the subclusters from `first` to before `end`.
    pub(crate) fn some_parts(&self, first: u32, end: u32) -> u32 {
        let below = |bit: u32| match bit {
            32.. => u32::MAX,
            _ => (1 << bit) - 1,
        };
        below(end) & !below(first)
    }

    /// Refcounts of a refcount block.
    pub(crate) fn block_entries(&self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// The largest refcount.
    pub(crate) fn max_refcount(&self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1_u32 << order)) - 1,
        }
    }

    /// Bytes of a slice of metadata.
    pub(crate) fn slice(&self) -> usize {
        // CAST: at most 2 MiB.
        super::slices::SLICE.min(self.cluster() as usize)
    }

    /// Entries that an L1 table of a disk must have.
    pub(crate) fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(self.span())
    }
}

#[cfg(test)]
mod tests {
    use super::Geometry;

    #[test]
    fn sizes_follow_from_the_header() {
        let geometry = Geometry {
            cluster_bits: 16,
            extended: false,
            refcount_order: 4,
            has_zero: true,
            external: false,
        };
        assert_eq!(geometry.span(), 512 << 20);
        assert_eq!(geometry.block_entries(), 32768);
        assert_eq!(geometry.max_refcount(), 65535);
        assert_eq!(geometry.some_parts(0, 1), 1);
        let extended = Geometry {
            extended: true,
            refcount_order: 6,
            ..geometry
        };
        assert_eq!(extended.span(), 256 << 20);
        assert_eq!(extended.part(), 2048);
        assert_eq!(extended.some_parts(30, 32), 3 << 30);
        assert_eq!(extended.some_parts(0, 32), u32::MAX);
        assert_eq!(extended.max_refcount(), u64::MAX);
    }
}
