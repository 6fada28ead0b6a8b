// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rebuilds the refcounts of an image in unused space, and then lets the header name them.

use super::census::{Census, Holder, Window};
use super::check::{CheckReport, Others};
use super::geometry::MAX_OFFSET;
use super::image::{EntryTable, Qcow2Image};
use super::refcounts::{set, MAX_TABLE};
use crate::field::refused;
use crate::Storage;
use control::Failure;
use diskio::Errno;
use std::collections::BTreeSet;
use std::ops::Range;

/// Place of the new refcounts.
struct RefcountPlace {
    /// The table's clusters, and the blocks' behind them.
    clusters: Range<u64>,
    /// Clusters of the table.
    table: u64,
    /// The new blocks, in the order of their places.
    blocks: BTreeSet<u64>,
}

impl<S: Storage> Qcow2Image<S> {
    /// Rebuilds all refcounts. The current structures of the image do not change before the new ones are durable.
    pub(super) async fn rebuild(
        &self,
        others: &Others,
        report: &CheckReport,
    ) -> Result<(), Failure> {
        let place = self.place_for_refcounts(report)?;
        let failed =
            |error: Errno| Failure::system("cannot make the refcounts anew", &error.into());
        let size = self.file.size().map_err(failed)?;
        let made = self.make_refcounts(others, &place).await;
        if made.is_err() && !self.file.is_fixed() {
            // The end of the file is cut off again. If that fails too, it is space that is lost.
            let _ = self.file.set_size(size).await;
        }
        let table = made.map_err(failed)?;
        self.switch_reftable(table).await.map_err(failed)?;
        self.reftable.set(table);
        Ok(())
    }

    /// Behind the end of a file, or where nothing is on a device.
    fn place_for_refcounts(&self, report: &CheckReport) -> Result<RefcountPlace, Failure> {
        let failed =
            |error: Errno| Failure::system("cannot see the size of the image", &error.into());
        let (cluster, entries) = (self.geometry.cluster(), self.geometry.block_entries());
        let size = self.file.size().map_err(failed)?;
        let room = match self.file.is_fixed() {
            true => report.free.clone(),
            false => size.div_ceil(cluster)..MAX_OFFSET / cluster,
        };
        let used = report.blocks.iter().enumerate().filter(|(_, used)| **used);
        let mut blocks: BTreeSet<u64> = used.map(|(number, _)| number as u64).collect();
        loop {
            let last = blocks.last().copied().unwrap_or(0);
            let table = ((last + 1) * 8).div_ceil(cluster);
            if table * cluster > MAX_TABLE {
                return Err(refused(
                    "the refcounts were not repaired and nothing was changed: the image is too large for its clusters",
                ));
            }
            let clusters = room.start..room.start + table + blocks.len() as u64;
            if clusters.end > room.end {
                return Err(refused(format!(
                    "the refcounts were not repaired and nothing was changed: {} clusters in a row are needed for new \
                     ones, and the device has only {} that nothing uses",
                    clusters.end - clusters.start,
                    room.end - room.start
                )));
            }
            // The blocks count themselves, too.
            let before = blocks.len();
            blocks.extend(clusters.start / entries..=(clusters.end - 1) / entries);
            if blocks.len() == before {
                return Ok(RefcountPlace {
                    clusters,
                    table,
                    blocks,
                });
            }
        }
    }

    async fn make_refcounts(
        &self,
        others: &Others,
        place: &RefcountPlace,
    ) -> Result<EntryTable, Errno> {
        let cluster = self.geometry.cluster();
        let range = place.clusters.start * cluster..place.clusters.end * cluster;
        self.prepare_range(range.start, range.end - range.start)
            .await?;
        let mut census = Census::new(self, others, Holder::New(place.clusters.clone()))?;
        for clusters in census.windows() {
            let window = census.count(clusters).await?;
            self.write_blocks(place, &window).await?;
        }
        let table = EntryTable {
            at: range.start,
            entries: place.table * cluster / 8,
        };
        for (number, block) in place.blocks.iter().enumerate() {
            let (slice, at) = self.slot(table, *block).await?;
            let offset = range.start + (place.table + number as u64) * cluster;
            slice.set_number(at, offset);
            self.slices.settle(&slice).await?;
        }
        self.flush().await?;
        Ok(table)
    }

    /// Writes the refcounts of a window's clusters into the new blocks.
    async fn write_blocks(&self, place: &RefcountPlace, window: &Window) -> Result<(), Errno> {
        let (cluster, entries) = (self.geometry.cluster(), self.geometry.block_entries());
        let order = self.geometry.refcount_order;
        let in_slice = (self.slices.slice_len() * 8) >> order;
        for (number, block) in place.blocks.iter().enumerate() {
            let offset = (place.clusters.start + place.table + number as u64) * cluster;
            let to = ((block + 1) * entries).min(window.clusters.end);
            let mut at = (block * entries).max(window.clusters.start);
            while at < to {
                let within = at % entries;
                let some = (in_slice - within % in_slice).min(to - at);
                let slice_at = offset + within / in_slice * self.slices.slice_len();
                let (slice, _) = self.slices.at(slice_at).await?;
                slice.change(|bytes| {
                    for next in 0..some {
                        // CAST: less than a slice.
                        let place = (within % in_slice + next) as usize;
                        set(bytes, place, order, window.wanted(at + next));
                    }
                });
                self.slices.settle(&slice).await?;
                at += some;
            }
        }
        Ok(())
    }
}
