// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checks whether refcounts are right and tables lie apart, and repairs refcounts.
//!
//! A repair first checks the whole image without a write. Its writes go only to places without another use, and only if
//! the disk and its snapshots certainly stay as they are. Refcounts that overlap another structure are rebuilt in
//! another place (`rebuild.rs`).

use super::census::{Census, Holder, Window};
use super::header::{Qcow2Header, AT_INCOMPATIBLE, DIRTY};
use super::image::{EntryTable, Qcow2Image};
use super::refcounts::{get, set, MAX_TABLE};
use super::snapshot;
use crate::field::{be32, be64, refused};
use crate::{storage, Storage};
use control::Failure;
use diskio::Errno;
use std::ops::Range;

/// Faults of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Clusters with a refcount that is too large: space that is lost, and does no harm.
    pub leaks: u64,
    /// Clusters with a refcount that is too small: the allocator may give them to a second user.
    pub unsafe_clusters: u64,
    /// Entries that cannot be, or lead behind the end of the file.
    pub damaged: u64,
    /// L1 and L2 entries with bits that have no meaning. The clusters that they lead to can be read.
    pub reserved: u64,
    /// Clusters with a table that overlaps another structure: a write to one of them changes the other.
    pub overlaps: u64,
    /// Refcount table entries that are impossible, and clusters with refcounts that overlap another structure.
    pub refcounts: u64,
    /// Entries that say that their cluster has no other user, and it has one: a write through one of them would
    /// change the other.
    pub shared: u64,
    /// Entries that do not say that their cluster has no other user. This does no harm.
    pub unmarked: u64,
}

/// Users of clusters beside the disk; they are collected once.
pub(crate) struct Others {
    /// Ranges of bytes.
    pub(super) ranges: Vec<Range<u64>>,
    /// The L1 tables of snapshots.
    pub(super) tables: Vec<EntryTable>,
}

/// Result of a check of the whole image.
pub(super) struct CheckReport {
    pub(super) findings: Findings,
    /// The refcounts cannot be made right where they are.
    rebuild: bool,
    /// More users of a cluster than a refcount can say.
    too_many: Option<u64>,
    /// For each refcount block whether it is for a cluster that is used.
    pub(super) blocks: Vec<bool>,
    /// The longest row of clusters that nothing uses, and the last one.
    pub(super) free: Range<u64>,
    row: Range<u64>,
}

impl CheckReport {
    /// Nothing uses a cluster.
    fn add_free(&mut self, number: u64) {
        match self.row.end == number {
            true => self.row.end += 1,
            false => self.row = number..number + 1,
        }
        if self.row.end - self.row.start > self.free.end - self.free.start {
            self.free = self.row.clone();
        }
    }
}

/// Collects the users of clusters beside the current content of the disk.
pub(crate) async fn others<S: Storage>(file: &S, header: &Qcow2Header) -> Result<Others, Failure> {
    let cluster = header.geometry.cluster();
    // Their names are not kept.
    let mut tables = Vec::new();
    let bytes = snapshot::walk(file, header, |one| tables.push(one.l1)).await?;
    check_tables(&tables)?;
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

/// Each snapshot has an L1 table of its own, so all of them together must not be larger than the file.
fn check_tables(tables: &[EntryTable]) -> Result<(), Failure> {
    let mut places: Vec<_> = tables
        .iter()
        .filter(|table| table.entries > 0)
        .map(|table| (table.at, table.at + table.entries * 8))
        .collect();
    places.sort_unstable();
    match places.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => Err(refused(format!(
            "the L1 tables of two snapshots overlap at byte {}: the image is damaged, restore it from a backup",
            pair[1].0
        ))),
        None => Ok(()),
    }
}

/// Bytes that bitmaps take.
async fn bitmaps<S: Storage>(
    file: &S,
    header: &Qcow2Header,
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

impl<S: Storage> Qcow2Image<S> {
    /// Compares all refcounts with the users of the clusters. The image must not be in use.
    pub(crate) async fn check(&self, others: &Others) -> Result<Findings, Errno> {
        Ok(self.report(others).await?.findings)
    }

    async fn report(&self, others: &Others) -> Result<CheckReport, Errno> {
        if self.writable {
            self.slices.settle_all().await?;
        }
        let mut census = Census::new(self, others, Holder::Image)?;
        let most = MAX_TABLE / 8;
        let blocks = census.end.div_ceil(self.geometry.block_entries());
        let mut report = CheckReport {
            findings: Findings::default(),
            rebuild: false,
            too_many: None,
            // CAST: bounded.
            blocks: vec![false; blocks.min(most + 1) as usize],
            free: 0..0,
            row: 0..0,
        };
        for clusters in census.windows() {
            let window = census.count(clusters).await?;
            self.look(&window, &mut report).await?;
            let (shared, unmarked) = census.flags(&window, false).await?;
            report.findings.shared += shared;
            report.findings.unmarked += unmarked;
        }
        report.rebuild |= report.findings.refcounts > 0;
        Ok(report)
    }

    /// Adds the faults of the clusters of a window to `report`.
    async fn look(&self, window: &Window, report: &mut CheckReport) -> Result<(), Errno> {
        report.findings.damaged += window.odd.damaged;
        report.findings.reserved += window.odd.reserved;
        report.findings.refcounts += window.odd.refcounts;
        for number in window.clusters.clone() {
            report.findings.overlaps += u64::from(window.overlaps(number));
            report.findings.refcounts += u64::from(window.refcounts_overlap(number));
            let wanted = window.wanted(number);
            if wanted == 0 {
                report.add_free(number);
                continue;
            }
            // CAST: it is one of the file's.
            let block = (number / self.geometry.block_entries()) as usize;
            if let Some(block) = report.blocks.get_mut(block) {
                *block = true;
            }
            if wanted > self.geometry.max_refcount() {
                report.too_many = Some(number);
            }
        }
        self.compare(window, report).await
    }

    /// Compares the refcounts of a window's clusters with their users.
    async fn compare(&self, window: &Window, report: &mut CheckReport) -> Result<(), Errno> {
        let order = self.geometry.refcount_order;
        let mut at = window.clusters.start;
        while at < window.clusters.end {
            let entries = self.geometry.block_entries();
            let Some(counts) = self.counts_if_any(at).await? else {
                let to = ((at / entries + 1) * entries).min(window.clusters.end);
                let used = (at..to).filter(|number| window.wanted(*number) > 0).count() as u64;
                report.rebuild |= used > 0;
                report.findings.unsafe_clusters += used;
                at = to;
                continue;
            };
            let some = counts.count.min(window.clusters.end - at);
            counts.slice.look(|bytes| {
                for number in 0..some {
                    // CAST: less than a slice.
                    let said = get(bytes, counts.first + number as usize, order);
                    let wanted = window.wanted(at + number);
                    report.findings.leaks += u64::from(said > wanted);
                    report.findings.unsafe_clusters += u64::from(said < wanted);
                }
            });
            at += some;
        }
        Ok(())
    }

    /// Corrects refcounts and the flags of entries, and reports the faults.
    ///
    /// # Errors
    /// The repair might change the content of the image. It has changed nothing.
    pub(crate) async fn repair(&self, others: &Others) -> Result<Findings, Failure> {
        let failed = |error: Errno| Failure::system("cannot repair the refcounts", &error.into());
        let report = self.report(others).await.map_err(failed)?;
        self.may_repair(&report)?;
        let findings = report.findings;
        match report.rebuild {
            true => self.rebuild(others, &report).await?,
            false if findings.leaks + findings.unsafe_clusters > 0 => {
                self.correct(others).await.map_err(failed)?;
            }
            false => {}
        }
        // A cluster that held a refcount structure loses a user when that moves.
        if report.rebuild || findings.shared + findings.unmarked > 0 {
            self.mark(others).await.map_err(failed)?;
        }
        self.clean().await.map_err(failed)?;
        Ok(findings)
    }

    fn may_repair(&self, report: &CheckReport) -> Result<(), Failure> {
        let findings = &report.findings;
        let why = match report.too_many {
            Some(cluster) => format!("cluster {cluster} has more users than a refcount can say"),
            None if findings.damaged > 0 => format!(
                "{} entries of tables cannot be, so that what they led to is not known",
                findings.damaged
            ),
            None if findings.overlaps > 0 => format!(
                "{} clusters with tables are used by something else, too",
                findings.overlaps
            ),
            None if findings.reserved > 0 => format!(
                "{} entries of tables have bits that have no meaning",
                findings.reserved
            ),
            None => return Ok(()),
        };
        Err(refused(format!(
            "the refcounts were not repaired and nothing was changed, because the content might be lost: {why}. Copy \
             what can be read into a new image: `tapimg convert --damaged IMAGE NEW`"
        )))
    }

    /// Makes refcounts right where they are.
    async fn correct(&self, others: &Others) -> Result<(), Errno> {
        let order = self.geometry.refcount_order;
        let mut census = Census::new(self, others, Holder::Image)?;
        for clusters in census.windows() {
            let window = census.count(clusters).await?;
            let mut at = window.clusters.start;
            while at < window.clusters.end {
                let Some(counts) = self.counts_if_any(at).await? else {
                    // Nothing is used there.
                    let entries = self.geometry.block_entries();
                    at = (at / entries + 1) * entries;
                    continue;
                };
                let some = counts.count.min(window.clusters.end - at);
                // CAST: less than a slice.
                let place = |number: u64| counts.first + number as usize;
                let is_wrong = counts.slice.look(|bytes| {
                    (0..some).any(|number| {
                        get(bytes, place(number), order) != window.wanted(at + number)
                    })
                });
                if is_wrong {
                    counts.slice.change(|bytes| {
                        for number in 0..some {
                            set(bytes, place(number), order, window.wanted(at + number));
                        }
                    });
                    self.slices.settle(&counts.slice).await?;
                }
                at += some;
            }
        }
        self.flush().await
    }

    /// Corrects the flags of entries. The refcounts are right and durable before, so that after a death writes may
    /// trust the entries that are marked.
    async fn mark(&self, others: &Others) -> Result<(), Errno> {
        let mut census = Census::new(self, others, Holder::Image)?;
        for clusters in census.windows() {
            let window = census.count(clusters).await?;
            census.flags(&window, true).await?;
        }
        self.flush().await
    }

    /// The header does not say any more that the image was not closed.
    async fn clean(&self) -> Result<(), Errno> {
        // Version 2 has something else there.
        if !self.geometry.has_zero {
            return Ok(());
        }
        let (header, _) = self.slices.at(0).await?;
        let features = header.number(AT_INCOMPATIBLE);
        match features & DIRTY {
            0 => Ok(()),
            _ => {
                let clean = (features & !DIRTY).to_be_bytes();
                self.change_header(AT_INCOMPATIBLE, &clean).await
            }
        }
    }
}
