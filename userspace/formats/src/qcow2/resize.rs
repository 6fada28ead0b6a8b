// SPDX-License-Identifier: MIT OR Apache-2.0
//! Larger and smaller disks.

use super::entry::L2Entry;
use super::header::{AT_L1_ENTRIES, AT_SIZE};
use super::image::{EntryTable, Found, Qcow2Image};
use crate::field::refused;
use crate::Storage;
use control::Failure;
use diskio::Errno;

/// Bytes of an L1 table at most, as QEMU has it.
const MAX_L1: u64 = 32 << 20;

impl<S: Storage> Qcow2Image<S> {
    /// The disk has `size` bytes from now on, no fewer than before. It is durable when this returns.
    pub(crate) async fn grow(&self, size: u64) -> Result<(), Failure> {
        let old = self.size.get();
        if size % 512 != 0 || size < old || size >= super::geometry::MAX_OFFSET {
            return Err(refused(format!(
                "{}: a disk of {old} bytes cannot be made one of {size}: give whole sectors, and no fewer than there are",
                self.name
            )));
        }
        self.check_sectors(size)?;
        let entries = self.geometry.l1_entries(size);
        if entries * 8 > MAX_L1 {
            return Err(refused(format!(
                "{}: {size} bytes need larger clusters than the image has",
                self.name
            )));
        }
        let failed = |error: Errno| {
            Failure::system(
                format!("{}: cannot make the disk larger", self.name),
                &error.into(),
            )
        };
        self.begin_writing().await.map_err(failed)?;
        if entries > self.l1.get().entries {
            self.grow_l1(entries).await.map_err(failed)?;
        }
        self.clear_behind(old, size).await.map_err(failed)?;
        let are_void = self.suspend_notes(size).await.map_err(failed)?;
        self.set_size(size).await.map_err(failed)?;
        if are_void {
            self.resume_notes().await;
        }
        Ok(())
    }

    /// The disk has `size` bytes from now on, at least one sector, and what was behind them is lost. It is durable when
    /// this returns. The image must have no snapshots inside.
    pub(crate) async fn shrink(&self, size: u64) -> Result<(), Failure> {
        let old = self.size.get();
        if size % 512 != 0 || size == 0 || size > old {
            return Err(refused(format!(
                "{}: a disk of {old} bytes cannot be cut off at {size}: give whole sectors, and no more than there are",
                self.name
            )));
        }
        self.check_sectors(size)?;
        let failed = |error: Errno| {
            Failure::system(
                format!("{}: cannot make the disk smaller", self.name),
                &error.into(),
            )
        };
        self.begin_writing().await.map_err(failed)?;
        // First of all, so that a death leaves the old disk or the new one, perhaps with clusters behind its end.
        let are_void = self.suspend_notes(size).await.map_err(failed)?;
        self.set_size(size).await.map_err(failed)?;
        if are_void {
            self.resume_notes().await;
        }
        // A program that makes it larger again may show the rest of the last cluster.
        let cluster = self.geometry.cluster();
        let end = size.next_multiple_of(cluster);
        if end > size {
            self.zero(size, end - size, false).await.map_err(failed)?;
        }
        self.drop_behind(end).await.map_err(failed)?;
        self.flush().await.map_err(failed)?;
        self.free().await;
        Ok(())
    }

    /// Refuses a size in bytes that is no whole number of the disk's logical sectors.
    fn check_sectors(&self, size: u64) -> Result<(), Failure> {
        let sector = self.sector();
        match size % u64::from(sector) {
            0 => Ok(()),
            _ => Err(refused(format!(
                "{}: {size} bytes are no whole number of its sectors of {sector}: give a multiple of them",
                self.name
            ))),
        }
    }

    /// Frees all clusters from byte `end` of the disk on, and their tables.
    async fn drop_behind(&self, end: u64) -> Result<(), Errno> {
        let (span, cluster, l1) = (self.geometry.span(), self.geometry.cluster(), self.l1.get());
        let mut at = end;
        while at / span < l1.entries {
            let (slice, slot) = self.slot(l1, at / span).await?;
            if self.table_at(slice.number(slot), "L2 table")?.is_none() {
                at = (at / span + 1) * span;
                continue;
            }
            let found = self.find_owned(at).await?;
            let (count, old) = self.drop_entries(&found)?;
            self.settle(&found).await?;
            old.iter().for_each(|old| self.release_place(old));
            self.bound_released().await?;
            at += count * cluster;
        }
        // No byte of the disk leads to them any more.
        for number in end.div_ceil(span)..l1.entries {
            let (slice, slot) = self.slot(l1, number).await?;
            if let Some(table) = self.table_at(slice.number(slot), "L2 table")? {
                slice.set_number(slot, 0);
                self.slices.settle(&slice).await?;
                self.release(table / cluster, 1);
                self.bound_released().await?;
            }
        }
        Ok(())
    }

    /// Clears the entries from the one that was found to the end of its slice. Returns their number, and those that led
    /// somewhere.
    fn drop_entries(&self, found: &Found) -> Result<(u64, Vec<L2Entry>), Errno> {
        let (mut count, mut old) = (0, Vec::new());
        while let Some(entry) = self.entry(found, count)? {
            if entry != L2Entry::NONE {
                self.set_entry(found, count, &L2Entry::NONE);
                old.push(entry);
            }
            count += 1;
        }
        Ok((count, old))
    }

    /// Makes the bytes from `old`, the end of the disk, to `size` read as zeroes: the backing image may have something
    /// there, and clusters of an earlier, larger disk.
    async fn clear_behind(&self, old: u64, size: u64) -> Result<(), Errno> {
        let mut at = old;
        while at < size {
            let some = (size - at).min(super::ZEROES);
            self.zero(at, some, false).await?;
            at += some;
        }
        Ok(())
    }

    /// Makes the content of the backing image that was behind the end of the disk read as zeroes.
    pub(super) async fn hide_below(&self, old: u64, size: u64) -> Result<(), Errno> {
        let end = self.below().map_or(0, |below| below.size().min(size));
        let mut at = old;
        while at < end {
            let some = (end - at).min(super::ZEROES);
            self.zero(at, some, false).await?;
            at += some;
        }
        Ok(())
    }

    /// Moves the L1 table to where there is room for a larger one.
    async fn grow_l1(&self, entries: u64) -> Result<(), Errno> {
        let cluster = self.geometry.cluster();
        let old = self.l1.get();
        let wanted = (entries * 8).div_ceil(cluster);
        let at = self.take_row(wanted).await? * cluster;
        // No entry may change while they are being copied.
        let _held = self.tables.lock(0..u64::MAX).await;
        let new = EntryTable { at, entries };
        for number in 0..old.entries {
            let (from, place) = self.slot(old, number).await?;
            let entry = from.number(place);
            let (to, place) = self.slot(new, number).await?;
            to.set_number(place, entry);
            if place + 8 == to.len() || number + 1 == old.entries {
                self.slices.settle(&to).await?;
            }
        }
        self.flush().await?;
        // CAST: at most 4 Mi.
        let mut place = (entries as u32).to_be_bytes().to_vec();
        place.extend(at.to_be_bytes());
        self.change_header(AT_L1_ENTRIES, &place).await?;
        self.l1.set(new);
        self.release(old.at / cluster, (old.entries * 8).div_ceil(cluster));
        Ok(())
    }

    async fn set_size(&self, size: u64) -> Result<(), Errno> {
        self.change_header(AT_SIZE, &size.to_be_bytes()).await?;
        self.size.set(size);
        Ok(())
    }
}
