// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether refcounts are what they should be, and their repair.
//!
//! All that leads to a cluster is walked for a part of the image at a time, so that memory is bounded
//! whatever its size.

use super::alloc::Clusters;
use super::entry::Place;
use super::header::{Header, AT_INCOMPATIBLE, DIRTY};
use super::image::{Found, Image, Table};
use super::refcounts::{get, set};
use super::snapshot;
use crate::field::{be32, be64, refused};
use crate::{storage, Storage};
use control::Failure;
use diskio::Errno;
use std::ops::Range;

/// Clusters that are counted at once.
const WINDOW: u64 = 4 << 20;

/// L2 tables that are looked at for a window, at most: so many for each cluster of the file, and so many
/// bytes of them in any case. Snapshots share tables, so there may be more uses than tables.
const LOOKS: u64 = 16;
const LOOKS_AT: u64 = 1 << 30;

/// What is wrong with an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Clusters with a refcount that is too large: space that is lost, and does no harm.
    pub leaks: u64,
    /// Clusters with a refcount that is too small: they may be given to somebody else.
    pub unsafe_clusters: u64,
    /// Entries that cannot be, or lead behind the end of the file.
    pub damaged: u64,
}

/// What else uses clusters than the disk: found once.
pub(crate) struct Others {
    /// Ranges of bytes.
    ranges: Vec<Range<u64>>,
    /// The L1 tables of snapshots.
    tables: Vec<Table>,
}

/// Uses of the clusters of a window.
struct Window {
    clusters: Range<u64>,
    uses: Vec<u32>,
    /// Clusters of the file.
    end: u64,
    damaged: u64,
    /// L2 tables that may still be looked at, for the disk and all snapshots together.
    budget: u64,
}

impl Window {
    /// Somebody uses the clusters with some bytes.
    fn add(&mut self, cluster: u64, bytes: Range<u64>) {
        if bytes.is_empty() {
            return;
        }
        let clusters = bytes.start / cluster..(bytes.end - 1) / cluster + 1;
        if clusters.end > self.end {
            self.damaged += 1;
        }
        let from = clusters.start.max(self.clusters.start);
        let to = clusters.end.min(self.clusters.end);
        for number in from..to {
            // CAST: less than a window.
            let uses = &mut self.uses[(number - self.clusters.start) as usize];
            *uses = uses.saturating_add(1);
        }
    }

    /// The uses of some of its clusters.
    fn part(&self, clusters: Range<u64>) -> &[u32] {
        let start = self.clusters.start;
        // CAST: less than a window.
        &self.uses[(clusters.start - start) as usize..(clusters.end - start) as usize]
    }
}

/// What uses clusters beside the disk as it is now.
pub(crate) async fn others<S: Storage>(file: &S, header: &Header) -> Result<Others, Failure> {
    let cluster = header.geometry.cluster();
    // Their names are not kept.
    let mut tables = Vec::new();
    let bytes = snapshot::walk(file, header, |one| tables.push(one.l1)).await?;
    check_tables(file, &tables)?;
    let mut ranges = Vec::new();
    // The header's.
    ranges.push(0..cluster);
    ranges.extend(header.crypt.map(|crypt| crypt.at..crypt.at + crypt.len));
    if header.snapshots > 0 {
        ranges.push(header.snapshots_at..header.snapshots_at + bytes);
    }
    bitmaps(file, header, &mut ranges)
        .await
        .map_err(|error| Failure::system("cannot read the directory of bitmaps", &error.into()))?;
    Ok(Others { ranges, tables })
}

/// Each snapshot has an L1 table of its own, so all of them fit into the file. Those that are said to be in
/// one place would be looked at for ever.
fn check_tables<S: Storage>(file: &S, tables: &[Table]) -> Result<(), Failure> {
    let size = file
        .size()
        .map_err(|error| Failure::system("cannot see the size of the image", &error.into()))?;
    // At most a number of 16 bits of tables with a number of 32 bits of entries.
    let bytes: u64 = tables.iter().map(|table| table.entries * 8).sum();
    match bytes > size.saturating_mul(2) {
        true => Err(refused(format!(
            "the L1 tables of snapshots have {bytes} bytes, and the image only {size}: it is damaged"
        ))),
        false => Ok(()),
    }
}

/// Bytes that bitmaps take.
async fn bitmaps<S: Storage>(
    file: &S,
    header: &Header,
    ranges: &mut Vec<Range<u64>>,
) -> Result<(), Errno> {
    /// Bytes of a directory, and entries of a bitmap's table, at most: QEMU's limits.
    const DIRECTORY: u64 = 64 << 10;
    const ENTRIES: u64 = 8 << 20;
    const BITMAPS: u32 = 65535;
    let Some((at, len)) = header.bitmaps else {
        return Ok(());
    };
    let cluster = header.geometry.cluster();
    let room = super::geometry::MAX_OFFSET;
    if len == 0 || len > DIRECTORY * 1024 || at % cluster != 0 || at > room {
        return Err(Errno::INVAL);
    }
    ranges.push(at..at + len);
    let (mut place, mut count, mut all) = (0, 0, 0);
    while place + 24 <= len {
        let record = storage::bytes(file, at + place, 24).await?;
        let (table, entries) = (be64(&record, 0), u64::from(be32(&record, 8)));
        let name = u64::from(be32(&record, 16) & 0xffff);
        let extra = u64::from(be32(&record, 20));
        (count, all) = (count + 1, all + entries);
        // All of them together take no longer than a few of the largest.
        let is_much = count > BITMAPS || entries > ENTRIES || all > 4 * ENTRIES;
        if is_much || table % cluster != 0 || table > room {
            return Err(Errno::INVAL);
        }
        ranges.push(table..table + entries * 8);
        clusters_of_bitmap(file, table, entries, cluster, ranges).await?;
        place += (24 + name + extra).next_multiple_of(8);
    }
    Ok(())
}

async fn clusters_of_bitmap<S: Storage>(
    file: &S,
    table: u64,
    entries: u64,
    cluster: u64,
    ranges: &mut Vec<Range<u64>>,
) -> Result<(), Errno> {
    /// Entries that are read at once, and ranges that are kept.
    const SOME: u64 = 8192;
    const RANGES: usize = 1 << 20;
    let mut done = 0;
    while done < entries {
        let some = (entries - done).min(SOME);
        // CAST: bounded.
        let words = storage::bytes(file, table + done * 8, some as usize * 8).await?;
        for word in words.chunks_exact(8) {
            let at = be64(word, 0) & 0x00ff_ffff_ffff_fe00;
            if at != 0 {
                ranges.push(at..at + cluster);
            }
        }
        if ranges.len() > RANGES {
            return Err(Errno::TOOBIG);
        }
        done += some;
    }
    Ok(())
}

impl<S: Storage> Image<S> {
    /// Compares all refcounts with what is used; with `repair` they become right. Nobody else may use the
    /// image meanwhile.
    pub(crate) async fn check(&self, others: &Others, repair: bool) -> Result<Findings, Errno> {
        if repair && !self.file.is_fixed() {
            self.cover().await?;
        }
        let mut findings = Findings::default();
        let end = self.file.size()?.div_ceil(self.geometry.cluster());
        let mut from = 0;
        while from < end {
            let clusters = from..end.min(from + WINDOW);
            let mut window = self.count(others, clusters.clone(), end).await?;
            if repair && self.file.is_fixed() {
                self.cover_inside(&mut window).await?;
            }
            findings.damaged = window.damaged;
            self.compare(&window, repair, &mut findings).await?;
            from = clusters.end;
        }
        Ok(findings)
    }

    /// The refcounts of an image become right that was not closed, and it says so.
    pub(crate) async fn repair(&self, others: &Others) -> Result<Findings, Errno> {
        let findings = self.check(others, true).await?;
        self.flush().await?;
        let (header, _) = self.slices.at(0).await?;
        let clean = header.number(AT_INCOMPATIBLE) & !DIRTY;
        self.change_header(AT_INCOMPATIBLE, &clean.to_be_bytes())
            .await?;
        Ok(findings)
    }

    /// Makes refcount blocks for all clusters of the file that have none: behind its end, because what is
    /// free is not known.
    async fn cover(&self) -> Result<(), Errno> {
        let cluster = self.geometry.cluster();
        for number in 0..self.reftable.get().entries {
            if number * self.geometry.block_entries() >= self.file.size()?.div_ceil(cluster) {
                break;
            }
            let (slice, at) = self.slot(self.reftable.get(), number).await?;
            if self.table_at(slice.number(at), "refcount block")?.is_none() {
                let block = self.file.size()?.next_multiple_of(cluster);
                self.prepare_range(block, cluster).await?;
                self.flush().await?;
                slice.set_number(at, block);
                self.slices.settle_first(&slice).await?;
            }
        }
        Ok(())
    }

    /// The same on a device, which has no room behind its end: what is used and has no block gets one. What is
    /// not used needs none: it is free without one.
    async fn cover_inside(&self, window: &mut Window) -> Result<(), Errno> {
        let entries = self.geometry.block_entries();
        let mut at = window.clusters.start;
        while at < window.clusters.end {
            let to = ((at / entries + 1) * entries).min(window.clusters.end);
            let is_used = window.part(at..to).iter().any(|uses| *uses > 0);
            if is_used && self.counts(at).await?.is_none() {
                self.cover_part(window, at..to).await?;
            }
            at = to;
        }
        Ok(())
    }

    /// Makes a refcount block for clusters of a window, in one of them that nothing uses.
    async fn cover_part(&self, window: &mut Window, clusters: Range<u64>) -> Result<(), Errno> {
        let cluster = self.geometry.cluster();
        let number = clusters.start / self.geometry.block_entries();
        let (slice, at) = self.slot(self.reftable.get(), number).await?;
        let mut uses = window.part(clusters.clone()).iter();
        let free = uses.position(|uses| *uses == 0).ok_or(Errno::NOSPC)?;
        // CAST: less than a window.
        let block = (clusters.start + free as u64) * cluster;
        self.prepare_range(block, cluster).await?;
        self.flush().await?;
        slice.set_number(at, block);
        self.slices.settle_first(&slice).await?;
        window.add(cluster, block..block + cluster);
        Ok(())
    }

    async fn count(
        &self,
        others: &Others,
        clusters: Range<u64>,
        end: u64,
    ) -> Result<Window, Errno> {
        let cluster = self.geometry.cluster();
        let mut window = Window {
            // CAST: at most a window.
            uses: vec![0; (clusters.end - clusters.start) as usize],
            clusters,
            end,
            damaged: 0,
            budget: end.saturating_mul(LOOKS).saturating_add(LOOKS_AT / cluster),
        };
        for range in &others.ranges {
            window.add(cluster, range.clone());
        }
        let reftable = self.reftable.get();
        window.add(cluster, reftable.at..reftable.at + reftable.entries * 8);
        for number in 0..reftable.entries {
            let (slice, at) = self.slot(reftable, number).await?;
            match self.table_at(slice.number(at), "refcount block") {
                Ok(Some(block)) => window.add(cluster, block..block + cluster),
                Ok(None) => {}
                Err(_) => window.damaged += 1,
            }
        }
        for table in std::iter::once(&self.l1.get()).chain(&others.tables) {
            self.count_table(*table, &mut window).await?;
        }
        Ok(window)
    }

    async fn count_table(&self, l1: Table, window: &mut Window) -> Result<(), Errno> {
        let cluster = self.geometry.cluster();
        window.add(cluster, l1.at..l1.at + l1.entries * 8);
        for number in 0..l1.entries {
            let (slice, at) = self.slot(l1, number).await?;
            let Ok(table) = self.table_at(slice.number(at), "L2 table") else {
                window.damaged += 1;
                continue;
            };
            let Some(table) = table else { continue };
            window.add(cluster, table..table + cluster);
            if table / cluster >= window.end {
                continue;
            }
            // Tables that are used again and again would be looked at for ever.
            let left = window.budget.checked_sub(1);
            window.budget = left.ok_or_else(|| self.damaged("its L2 tables are used too often"))?;
            let mut place = table;
            while place < table + cluster {
                let (l2, _) = self.slices.at(place).await?;
                let found = Found {
                    l1: slice.clone(),
                    l2: Some((l2, 0)),
                };
                self.count_slice(&found, window);
                place += self.slices.slice_len();
            }
        }
        Ok(())
    }

    fn count_slice(&self, found: &Found, window: &mut Window) {
        let cluster = self.geometry.cluster();
        for number in 0..self.slices.slice_len() / self.geometry.entry() {
            match self.entry(found, number) {
                Ok(Some(entry)) => match entry.place {
                    Place::Host { at, .. } if !self.geometry.external => {
                        window.add(cluster, at..at + cluster)
                    }
                    // The last sector need not be there.
                    Place::Compressed { at, len } => window.add(cluster, at..at + len),
                    _ => {}
                },
                Ok(None) => return,
                Err(_) => window.damaged += 1,
            }
        }
    }

    async fn compare(
        &self,
        window: &Window,
        repair: bool,
        findings: &mut Findings,
    ) -> Result<(), Errno> {
        let order = self.geometry.refcount_order;
        let mut at = window.clusters.start;
        while at < window.clusters.end {
            let entries = self.geometry.block_entries();
            let Some(counts) = self.counts(at).await? else {
                let to = ((at / entries + 1) * entries).min(window.clusters.end);
                let used = window.part(at..to).iter().filter(|uses| **uses > 0).count();
                if repair && used > 0 {
                    return Err(self.damaged(format_args!(
                        "the refcount table is too short for cluster {at} and those behind it"
                    )));
                }
                findings.unsafe_clusters += used as u64;
                at = to;
                continue;
            };
            let some = counts.count.min(window.clusters.end - at);
            let mut wrong = false;
            for number in 0..some {
                // CAST: less than a slice, and than a window.
                let place = counts.first + number as usize;
                let uses = u64::from(window.uses[(at + number - window.clusters.start) as usize]);
                let said = counts.slice.look(|bytes| get(bytes, place, order));
                if said == uses {
                    continue;
                }
                match said > uses {
                    true => findings.leaks += 1,
                    false => findings.unsafe_clusters += 1,
                }
                if repair {
                    if uses > self.geometry.max_refcount() {
                        let what = Clusters {
                            first: at + number,
                            count: uses,
                        };
                        return Err(self.damaged(format_args!(
                            "more use a cluster than can be counted: {what:?}"
                        )));
                    }
                    counts.slice.change(|bytes| set(bytes, place, order, uses));
                    wrong = true;
                }
            }
            if wrong {
                self.slices.settle(&counts.slice).await?;
            }
            at += some;
        }
        Ok(())
    }
}
