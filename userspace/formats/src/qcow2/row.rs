// SPDX-License-Identifier: MIT OR Apache-2.0
//! Contiguous clusters for tables that grow: the L1 table, and tables of bitmaps.
//!
//! A refcount block is the first of the clusters that it counts, so it ends each row that the allocator finds. A longer
//! row, as the L1 table of a large disk with small clusters needs, gets its place behind all clusters that have a
//! refcount, with the blocks for it in front.

use super::image::Qcow2Image;
use crate::Storage;
use diskio::Errno;

impl<S: Storage> Qcow2Image<S> {
    /// Allocates `count` contiguous clusters, which read as zeroes and have a refcount, both durably. Returns the number
    /// of the first one.
    pub(super) async fn take_row(&self, count: u64) -> Result<u64, Errno> {
        match count <= self.geometry.block_entries() / 2 {
            true => self.find_row(count).await,
            false => self.append_row(count).await,
        }
    }

    /// Finds a row among the clusters that one refcount block counts: prepared clusters in other places are put aside.
    async fn find_row(&self, count: u64) -> Result<u64, Errno> {
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

    /// Appends a row behind everything, with refcount blocks that count themselves and it.
    async fn append_row(&self, count: u64) -> Result<u64, Errno> {
        let _pass = self.allocator.gate.alone().await;
        let (cluster, entries) = (self.geometry.cluster(), self.geometry.block_entries());
        let blocks = count.div_ceil(entries - 1);
        let number = loop {
            let number = self.first_free_block().await?;
            if number + blocks <= self.reftable.get().entries {
                break number;
            }
            self.make_reftable(number + blocks - 1).await?;
        };
        let first = number * entries;
        if first + blocks + count > self.limit()? {
            return Err(Errno::NOSPC);
        }
        let (at, len) = (first * cluster, (blocks + count) * cluster);
        self.check_no_table(at, len)?;
        self.prepare_range(at, len).await?;
        for block in 0..blocks {
            let counted = (blocks + count).saturating_sub(block * entries);
            self.fill_block(at + block * cluster, counted.min(entries))
                .await?;
        }
        self.flush().await?;
        self.name_blocks(number, blocks).await?;
        let prepared = &self.allocator.prepared;
        prepared.set(prepared.get() + count);
        Ok(first + blocks)
    }

    /// Returns the number of the first refcount block from which on there is none, and nothing is in a file.
    async fn first_free_block(&self) -> Result<u64, Errno> {
        let (table, span) = (
            self.reftable.get(),
            self.geometry.block_entries() * self.geometry.cluster(),
        );
        // Clusters without a refcount are not in use, but a damaged image may have content there.
        let end = match self.file.is_fixed() {
            true => 0,
            false => self.file.size()?.div_ceil(span),
        };
        let mut number = table.entries;
        while number > end {
            let (slice, at) = self.slot(table, number - 1).await?;
            if slice.number(at) != 0 {
                break;
            }
            number -= 1;
        }
        Ok(number.max(end))
    }

    /// The refcount table leads to `blocks` blocks, which lie in a row from the first cluster of the block `number` on. A
    /// block becomes known after the one that counts it, durably, so that a death never leaves one without a refcount.
    async fn name_blocks(&self, number: u64, blocks: u64) -> Result<(), Errno> {
        let (cluster, entries) = (self.geometry.cluster(), self.geometry.block_entries());
        let (table, at) = (self.reftable.get(), number * entries * cluster);
        let mut done = 0;
        while done < blocks {
            // The known ones count all of these.
            let end = (done * entries).clamp(1, blocks);
            for block in done..end {
                let (slice, slot) = self.slot(table, number + block).await?;
                slice.set_number(slot, at + block * cluster);
                // The last one of a slice, or of all.
                if slot + 8 == slice.len() || block + 1 == end {
                    self.slices.settle_first(&slice).await?;
                }
            }
            self.flush().await?;
            done = end;
        }
        Ok(())
    }
}
