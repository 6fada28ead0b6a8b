// SPDX-License-Identifier: MIT OR Apache-2.0
//! Larger disks.

use super::header::{AT_L1_ENTRIES, AT_SIZE};
use super::image::{EntryTable, Qcow2Image};
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
        let sector = self.sector();
        if size % u64::from(sector) != 0 {
            return Err(refused(format!(
                "{}: {size} bytes are no whole number of its sectors of {sector}: give a multiple of them",
                self.name
            )));
        }
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
        self.hide_below(old, size).await.map_err(failed)?;
        self.set_size(size).await.map_err(failed)
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

    /// Allocates `count` contiguous clusters: prepared clusters in other places are put aside.
    async fn take_row(&self, count: u64) -> Result<u64, Errno> {
        /// Attempts: each is behind the last one, and the end of the file is one row.
        const ATTEMPTS: usize = 1024;
        let mut aside = Vec::new();
        let mut found = Err(Errno::NOSPC);
        for _ in 0..ATTEMPTS {
            let row = self.take_run(count).await?;
            if row.count == count {
                found = Ok(row.first);
                break;
            }
            aside.push(row);
        }
        for row in aside {
            self.release(row.first, row.count);
        }
        found
    }

    async fn set_size(&self, size: u64) -> Result<(), Errno> {
        self.change_header(AT_SIZE, &size.to_be_bytes()).await?;
        self.size.set(size);
        Ok(())
    }
}
