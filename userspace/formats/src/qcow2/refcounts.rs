// SPDX-License-Identifier: MIT OR Apache-2.0
//! Refcounts of an image: the number of users of each cluster.

use super::geometry::MAX_OFFSET;
use super::header::AT_REFTABLE;
use super::image::{EntryTable, Qcow2Image};
use super::slices::Slice;
use crate::Storage;
use diskio::Errno;
use std::rc::Rc;

/// Bytes of a refcount table at most: QEMU refuses a larger one.
pub(super) const MAX_TABLE: u64 = 8 << 20;

/// The refcount with a number among those that are packed in `bytes`.
pub(crate) fn get(bytes: &[u8], number: usize, order: u32) -> u64 {
    match order {
        0..=2 => {
            let bits = 1_usize << order;
            let (at, shift) = (number * bits / 8, number * bits % 8);
            u64::from(bytes[at] >> shift) & ((1 << bits) - 1)
        }
        _ => {
            let width = 1_usize << (order - 3);
            let bytes = &bytes[number * width..][..width];
            bytes
                .iter()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        }
    }
}

/// Changes it. `value` must not be too large.
pub(crate) fn set(bytes: &mut [u8], number: usize, order: u32, value: u64) {
    match order {
        0..=2 => {
            let bits = 1_usize << order;
            let (at, shift) = (number * bits / 8, number * bits % 8);
            let mask = ((1_u8 << bits) - 1) << shift;
            // CAST: it has at most four bits.
            bytes[at] = (bytes[at] & !mask) | ((value as u8) << shift & mask);
        }
        _ => {
            let width = 1_usize << (order - 3);
            let value = value.to_be_bytes();
            bytes[number * width..][..width].copy_from_slice(&value[8 - width..]);
        }
    }
}

/// Refcounts of clusters in a row that are in one slice.
pub(crate) struct SliceRefcounts {
    pub(crate) slice: Rc<Slice>,
    /// The number of the first one in the slice.
    pub(crate) first: usize,
    /// Number of refcounts from there on.
    pub(crate) count: u64,
}

impl SliceRefcounts {
    /// Returns how many of the first `most` refcounts are one, up to the first that is not.
    fn alone(&self, most: u64, order: u32) -> u64 {
        self.slice.look(|bytes| {
            // CAST: less than a slice.
            let is_one = |next: &u64| get(bytes, self.first + *next as usize, order) == 1;
            (0..most).take_while(is_one).count() as u64
        })
    }
}

impl<S: Storage> Qcow2Image<S> {
    /// Returns the place of the refcount block for a cluster; `None` if there is none.
    async fn block(&self, cluster: u64) -> Result<Option<u64>, Errno> {
        let number = cluster / self.geometry.block_entries();
        if number >= self.reftable.get().entries {
            return Ok(None);
        }
        let (slice, at) = self.slot(self.reftable.get(), number).await?;
        self.table_at(slice.number(at), "refcount block")
    }

    /// Returns the refcounts from that of a cluster on; `None` if no block has them.
    pub(crate) async fn counts(&self, cluster: u64) -> Result<Option<SliceRefcounts>, Errno> {
        match self.block(cluster).await? {
            Some(block) => Ok(Some(self.counts_in(block, cluster).await?)),
            None => Ok(None),
        }
    }

    /// Returns the refcounts of a cluster for a check: an invalid refcount block counts as none.
    pub(crate) async fn counts_if_any(
        &self,
        cluster: u64,
    ) -> Result<Option<SliceRefcounts>, Errno> {
        let number = cluster / self.geometry.block_entries();
        if number >= self.reftable.get().entries {
            return Ok(None);
        }
        let (slice, at) = self.slot(self.reftable.get(), number).await?;
        match self.place_of_table(slice.number(at)) {
            Ok(Some(block)) if block < self.file.size()? => {
                Ok(Some(self.counts_in(block, cluster).await?))
            }
            _ => Ok(None),
        }
    }

    /// Returns the refcounts of a cluster for a caller that is about to change them or to allocate: the refcount block
    /// must have one user by the refcounts themselves. A block that lies where something else is would be read as
    /// refcounts, and overwritten.
    pub(crate) async fn counts_to_change(
        &self,
        cluster: u64,
    ) -> Result<Option<SliceRefcounts>, Errno> {
        let Some(block) = self.block(cluster).await? else {
            return Ok(None);
        };
        self.check_no_table(block, self.geometry.cluster())?;
        match self.is_alone(block / self.geometry.cluster()).await? {
            true => Ok(Some(self.counts_in(block, cluster).await?)),
            false => Err(self.damaged(format_args!(
                "the refcounts at {block:#x} are where something else is"
            ))),
        }
    }

    /// A cluster has one user, by its refcount.
    async fn is_alone(&self, cluster: u64) -> Result<bool, Errno> {
        let order = self.geometry.refcount_order;
        let counts = self.counts(cluster).await?;
        Ok(counts
            .is_some_and(|counts| counts.slice.look(|bytes| get(bytes, counts.first, order)) == 1))
    }

    /// Bytes from `at` on, `len` at most, that are in clusters with one user each, by their refcounts.
    pub(crate) async fn alone(&self, at: u64, len: u64) -> Result<u64, Errno> {
        let (cluster, order) = (self.geometry.cluster(), self.geometry.refcount_order);
        let (mut number, end) = (at / cluster, (at + len).div_ceil(cluster));
        while number < end {
            let Some(counts) = self.counts(number).await? else {
                break;
            };
            let some = counts.count.min(end - number);
            let alone = counts.alone(some, order);
            number += alone;
            if alone < some {
                break;
            }
        }
        Ok((number * cluster).saturating_sub(at).min(len))
    }

    /// Reports whether bytes are in clusters with one user each, by refcounts in memory; false if not all are in one slice
    /// there.
    pub(super) fn is_known_alone(&self, at: u64, len: u64) -> bool {
        let cluster = self.geometry.cluster();
        let first = at / cluster;
        let wanted = (at + len).div_ceil(cluster) - first;
        let counts = self.known_counts(first);
        counts.is_some_and(|counts| {
            wanted <= counts.count && counts.alone(wanted, self.geometry.refcount_order) == wanted
        })
    }

    /// Returns the refcounts from that of a cluster on, if they are in memory and valid.
    fn known_counts(&self, cluster: u64) -> Option<SliceRefcounts> {
        let number = cluster / self.geometry.block_entries();
        let (slice, at) = self.known_slot(self.reftable.get(), number)?;
        let block = self.place_of_table(slice.number(at)).ok()??;
        let (at, number) = self.place_of_counts(block, cluster);
        let (slice, _) = self.slices.known_at(at)?;
        Some(self.counts_from(slice, number))
    }

    async fn counts_in(&self, block: u64, cluster: u64) -> Result<SliceRefcounts, Errno> {
        let (at, number) = self.place_of_counts(block, cluster);
        let (slice, _) = self.slices.at(at).await?;
        Ok(self.counts_from(slice, number))
    }

    /// Number of refcounts in a slice.
    fn counts_per_slice(&self) -> u64 {
        (self.slices.slice_len() * 8) >> self.geometry.refcount_order
    }

    /// Returns the offset of the slice with the refcount of a cluster, and which one of the slice it is.
    fn place_of_counts(&self, block: u64, cluster: u64) -> (u64, u64) {
        let (number, in_slice) = (
            cluster % self.geometry.block_entries(),
            self.counts_per_slice(),
        );
        let slice = block + number / in_slice * self.slices.slice_len();
        (slice, number % in_slice)
    }

    fn counts_from(&self, slice: Rc<Slice>, first: u64) -> SliceRefcounts {
        SliceRefcounts {
            slice,
            // CAST: less than there are in a slice.
            first: first as usize,
            count: self.counts_per_slice() - first,
        }
    }

    /// Makes a refcount block for a cluster whose neighbours are all free; the block counts itself. The cluster must be
    /// free, and the caller must exclude other changes of refcounts.
    pub(crate) async fn make_block(&self, cluster: u64) -> Result<(), Errno> {
        let entries = self.geometry.block_entries();
        let number = cluster / entries;
        if number >= self.reftable.get().entries {
            return self.make_reftable(number).await;
        }
        let at = number * entries * self.geometry.cluster();
        if number == 0 || at >= MAX_OFFSET {
            return Err(self.damaged("no refcounts are there for the header"));
        }
        self.check_no_table(at, self.geometry.cluster())?;
        self.prepare_range(at, self.geometry.cluster()).await?;
        self.fill_block(at, 1).await?;
        // If the entry were durable before the block, clusters in use would be free.
        self.flush().await?;
        let (slice, slot) = self.slot(self.reftable.get(), number).await?;
        slice.set_number(slot, at);
        // All users of the block rely on this entry.
        self.slices.settle_first(&slice).await
    }

    /// The first `count` refcounts of a fresh block become one.
    pub(super) async fn fill_block(&self, at: u64, count: u64) -> Result<(), Errno> {
        let order = self.geometry.refcount_order;
        let in_slice = (self.slices.slice_len() * 8) >> order;
        let mut done = 0;
        while done < count {
            let (slice, _) = self
                .slices
                .at(at + done / in_slice * self.slices.slice_len())
                .await?;
            let some = in_slice.min(count - done);
            // CAST: at most what is in a slice.
            slice
                .change(|bytes| (0..some as usize).for_each(|number| set(bytes, number, order, 1)));
            self.slices.settle(&slice).await?;
            done += some;
        }
        Ok(())
    }

    /// Makes a larger refcount table behind everything that the old one is for, with blocks that count
    /// themselves and it.
    pub(super) async fn make_reftable(&self, wanted: u64) -> Result<(), Errno> {
        let (cluster, entries) = (self.geometry.cluster(), self.geometry.block_entries());
        let old = self.reftable.get();
        let per_cluster = cluster / 8;
        let start = old.entries * entries;
        let mut clusters = (old.entries * 2).max(wanted + 1).div_ceil(per_cluster);
        let mut blocks = 1;
        while blocks * entries < blocks + clusters {
            blocks += 1;
            clusters = clusters.max((old.entries + blocks).div_ceil(per_cluster));
        }
        let end = (start + blocks + clusters) * cluster;
        if clusters * cluster > MAX_TABLE || end > MAX_OFFSET {
            return Err(Errno::FBIG);
        }
        // The image may lead there after a failed attempt, until this write.
        self.slices.pay().await?;
        self.flush().await?;
        self.prepare_range(start * cluster, end - start * cluster)
            .await?;
        let new = EntryTable {
            at: (start + blocks) * cluster,
            entries: clusters * per_cluster,
        };
        for number in 0..blocks {
            let count = (blocks + clusters)
                .saturating_sub(number * entries)
                .min(entries);
            self.fill_block((start + number) * cluster, count).await?;
        }
        self.copy_reftable(old, new, start, blocks).await?;
        self.flush().await?;
        self.switch_reftable(new).await?;
        self.reftable.set(new);
        self.release(old.at / cluster, old.entries / per_cluster);
        Ok(())
    }

    async fn copy_reftable(
        &self,
        old: EntryTable,
        new: EntryTable,
        start: u64,
        blocks: u64,
    ) -> Result<(), Errno> {
        for number in 0..old.entries + blocks {
            let entry = match number.checked_sub(old.entries) {
                Some(block) => (start + block) * self.geometry.cluster(),
                None => {
                    let (slice, at) = self.slot(old, number).await?;
                    slice.number(at)
                }
            };
            let (slice, at) = self.slot(new, number).await?;
            slice.set_number(at, entry);
            // The last one of a slice, or of all.
            if at + 8 == slice.len() || number + 1 == old.entries + blocks {
                self.slices.settle(&slice).await?;
            }
        }
        Ok(())
    }

    /// The header names another refcount table, at once.
    pub(super) async fn switch_reftable(&self, new: EntryTable) -> Result<(), Errno> {
        // CAST: the table has at most 8 MiB.
        let clusters = (new.entries * 8 / self.geometry.cluster()) as u32;
        let mut place = new.at.to_be_bytes().to_vec();
        place.extend(clusters.to_be_bytes());
        self.change_header(AT_REFTABLE, &place).await
    }
}

#[cfg(test)]
mod tests {
    use super::{get, set};

    #[test]
    fn refcounts_of_all_widths_stay_apart() {
        for order in 0..=6 {
            let mut bytes = [0; 64];
            let count = (64 * 8) >> order;
            let most = if order == 6 {
                u64::MAX
            } else {
                (1 << (1 << order)) - 1
            };
            let value = |number: u64| ((number * 7 + 1) % most.max(2)) & most;
            for number in 0..count {
                set(&mut bytes, number, order, most);
                set(&mut bytes, number, order, value(number as u64));
            }
            for number in 0..count {
                assert_eq!(
                    get(&bytes, number, order),
                    value(number as u64),
                    "{order} {number}"
                );
            }
        }
        let mut bytes = [0; 2];
        set(&mut bytes, 1, 1, 3);
        assert_eq!(bytes, [0b1100, 0], "the lowest bits come first");
        set(&mut bytes, 0, 4, 0x102);
        assert_eq!(bytes, [1, 2], "the highest byte comes first");
    }
}
