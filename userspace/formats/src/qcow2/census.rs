// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counts how often each cluster of an image is used, and by what.
//!
//! A part of the file is counted at a time, so that memory is bounded whatever its size. An L2 table that many
//! snapshots share is read once, and its entries count once for each of them.

use super::check::Others;
use super::entry::{ClusterLocation, L2Entry, COPIED, L1_RESERVED, L2_RESERVED};
use super::geometry::MAX_OFFSET;
use super::image::{EntryTable, Qcow2Image};
use crate::field::be64;
use crate::{storage, Storage};
use diskio::Errno;
use std::collections::BTreeMap;
use std::ops::Range;

/// Clusters that are counted at once.
pub(super) const WINDOW: u64 = 2 << 20;
/// L2 tables whose number of users is kept at once.
const TABLES: usize = 256 << 10;
/// Bytes of a table that are read at once.
const READ: u64 = 64 << 10;

/// Use of a cluster. Each is a bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Use {
    /// Content of the disk or of a snapshot.
    Data = 1,
    /// An L2 table.
    L2 = 2,
    /// The header, an L1 table, or another structure that has one user.
    Table = 4,
    /// The refcount table or a refcount block.
    Refcounts = 8,
}

/// More than one refcount structure uses the cluster.
const REFCOUNTS_AGAIN: u8 = 16;

/// Entries that are wrong in themselves.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OddEntries {
    /// L1 and L2 entries that cannot be, and structures behind the end of the file.
    pub(super) damaged: u64,
    /// L1 and L2 entries with bits that have no meaning.
    pub(super) reserved: u64,
    /// Refcount table entries that cannot be, and refcount structures behind the end of the file.
    pub(super) refcounts: u64,
}

/// Uses of the clusters of a window.
pub(super) struct Window {
    pub(super) clusters: Range<u64>,
    /// Users of each cluster, without refcount structures.
    uses: Vec<u32>,
    kinds: Vec<u8>,
    /// Clusters of the file.
    end: u64,
    pub(super) odd: OddEntries,
}

impl Window {
    fn new(clusters: Range<u64>, end: u64) -> Self {
        // CAST: at most a window.
        let count = (clusters.end - clusters.start) as usize;
        Self {
            uses: vec![0; count],
            kinds: vec![0; count],
            clusters,
            end,
            odd: OddEntries::default(),
        }
    }

    /// Adds `count` users of the clusters with some bytes. Says whether all are inside the file.
    fn add(&mut self, cluster: u64, bytes: Range<u64>, what: Use, count: u32) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let clusters = bytes.start / cluster..(bytes.end - 1) / cluster + 1;
        let from = clusters.start.max(self.clusters.start);
        let to = clusters.end.min(self.clusters.end);
        for number in from..to {
            // CAST: less than a window.
            let at = (number - self.clusters.start) as usize;
            let kind = &mut self.kinds[at];
            match what {
                Use::Refcounts if *kind & Use::Refcounts as u8 != 0 => *kind |= REFCOUNTS_AGAIN,
                Use::Refcounts => {}
                _ => self.uses[at] = self.uses[at].saturating_add(count),
            }
            *kind |= what as u8;
        }
        clusters.end <= self.end
    }

    fn index(&self, number: u64) -> usize {
        // CAST: less than a window.
        (number - self.clusters.start) as usize
    }

    /// The refcount that a cluster of the window should have.
    pub(super) fn wanted(&self, number: u64) -> u64 {
        let at = self.index(number);
        let refcounts = self.kinds[at] & Use::Refcounts as u8 != 0;
        u64::from(self.uses[at]) + u64::from(refcounts)
    }

    /// A structure with one user lies in what something else uses, so that a write through one of them would
    /// change the other.
    pub(super) fn overlaps(&self, number: u64) -> bool {
        let at = self.index(number);
        let is = |what: Use| self.kinds[at] & what as u8 != 0;
        is(Use::Table) && self.uses[at] > 1 || is(Use::L2) && is(Use::Data)
    }

    /// A refcount structure lies in what something else uses.
    pub(super) fn refcounts_overlap(&self, number: u64) -> bool {
        let at = self.index(number);
        let kind = self.kinds[at];
        kind & Use::Refcounts as u8 != 0 && (self.uses[at] > 0 || kind & REFCOUNTS_AGAIN != 0)
    }
}

/// An L2 table.
#[derive(Clone, Copy, Debug)]
struct SeenTable {
    /// Entries of L1 tables that lead to it.
    uses: u32,
    /// True if one of these entries belongs to the current disk.
    is_active: bool,
    /// Offsets between which its clusters are, once it has been read.
    reach: (u64, u64),
}

/// L2 tables by their offsets: all from `from` on, or the first ones.
pub(super) struct L2Tables {
    known: BTreeMap<u64, SeenTable>,
    from: u64,
    /// The first one that is missing.
    next: Option<u64>,
}

impl L2Tables {
    fn add(&mut self, at: u64, is_active: bool) {
        if at < self.from || self.next.is_some_and(|next| at >= next) {
            return;
        }
        let seen = self.known.entry(at).or_insert(SeenTable {
            uses: 0,
            is_active: false,
            reach: (0, u64::MAX),
        });
        seen.uses = seen.uses.saturating_add(1);
        seen.is_active |= is_active;
        if self.known.len() > TABLES {
            self.next = self.known.pop_last().map(|(at, _)| at);
        }
    }
}

/// Location of the refcounts.
pub(super) enum Holder {
    /// The refcount table of the image and its blocks.
    Image,
    /// The new refcounts that are being made, in these clusters.
    New(Range<u64>),
}

/// Counts a window after the other.
pub(super) struct Census<'c, S: Storage> {
    image: &'c Qcow2Image<S>,
    others: &'c Others,
    holder: Holder,
    /// Clusters of the file.
    pub(super) end: u64,
    /// L2 tables, as long as all of them fit.
    tables: Option<L2Tables>,
}

impl<'c, S: Storage> Census<'c, S> {
    pub(super) fn new(
        image: &'c Qcow2Image<S>,
        others: &'c Others,
        holder: Holder,
    ) -> Result<Self, Errno> {
        let end = image.file.size()?.div_ceil(image.geometry.cluster());
        let end = match &holder {
            Holder::Image => end,
            Holder::New(clusters) => end.max(clusters.end),
        };
        Ok(Self {
            image,
            others,
            holder,
            end,
            tables: None,
        })
    }

    /// The windows of the file.
    pub(super) fn windows(&self) -> Vec<Range<u64>> {
        let end = self.end;
        let starts = (0..end.div_ceil(WINDOW)).map(|number| number * WINDOW);
        starts.map(|from| from..end.min(from + WINDOW)).collect()
    }

    /// Counts the users of clusters. Odd entries are counted in the first window only.
    pub(super) async fn count(&mut self, clusters: Range<u64>) -> Result<Window, Errno> {
        let cluster = self.image.geometry.cluster();
        let mut window = Window::new(clusters, self.end);
        let is_first = window.clusters.start == 0;
        for range in &self.others.ranges {
            let inside = window.add(cluster, range.clone(), Use::Table, 1);
            window.odd.damaged += u64::from(is_first && !inside);
        }
        for table in self.l1_tables() {
            let bytes = table.at..table.at + table.entries * 8;
            let inside = window.add(cluster, bytes, Use::Table, 1);
            window.odd.damaged += u64::from(is_first && !inside);
        }
        self.count_refcounts(&mut window).await?;
        let mut tables = match self.tables.take() {
            Some(tables) => tables,
            None => self.collect(0, is_first.then_some(&mut window.odd)).await?,
        };
        loop {
            self.count_tables(&mut tables, &mut window).await?;
            match tables.next {
                Some(next) => {
                    tables = self.collect(next, None).await?;
                }
                None if tables.from == 0 => {
                    self.tables = Some(tables);
                    break;
                }
                None => break,
            }
        }
        Ok(window)
    }

    fn l1_tables(&self) -> impl Iterator<Item = EntryTable> + 'c {
        let others = self.others;
        std::iter::once(self.image.l1.get()).chain(others.tables.iter().copied())
    }

    async fn count_refcounts(&self, window: &mut Window) -> Result<(), Errno> {
        let cluster = self.image.geometry.cluster();
        let is_first = window.clusters.start == 0;
        if let Holder::New(clusters) = &self.holder {
            let bytes = clusters.start * cluster..clusters.end * cluster;
            window.add(cluster, bytes, Use::Refcounts, 1);
            return Ok(());
        }
        let table = self.image.reftable.get();
        let bytes = table.at..table.at + table.entries * 8;
        let inside = window.add(cluster, bytes, Use::Refcounts, 1);
        window.odd.refcounts += u64::from(is_first && !inside);
        let end = window.end;
        self.image
            .each_entry(table, end, |_, word| {
                if word == 0 {
                    return;
                }
                let at = word & (MAX_OFFSET - 512);
                let is_right = at == word && at % cluster == 0;
                let inside = is_right && window.add(cluster, at..at + cluster, Use::Refcounts, 1);
                window.odd.refcounts += u64::from(is_first && !inside);
            })
            .await
    }

    /// The L2 tables to which all L1 tables lead, from an offset on.
    async fn collect(
        &self,
        from: u64,
        mut odd: Option<&mut OddEntries>,
    ) -> Result<L2Tables, Errno> {
        let cluster = self.image.geometry.cluster();
        let mut tables = L2Tables {
            known: BTreeMap::new(),
            from,
            next: None,
        };
        for (number, l1) in self.l1_tables().enumerate() {
            let each = |_, word: u64| {
                let at = word & (MAX_OFFSET - 512);
                let is_right = at % cluster == 0 && at / cluster < self.end;
                if let Some(odd) = &mut odd {
                    odd.damaged += u64::from(!is_right);
                    odd.reserved += u64::from(word & L1_RESERVED != 0);
                }
                if at != 0 && is_right {
                    tables.add(at, number == 0);
                }
            };
            self.image.each_entry(l1, self.end, each).await?;
        }
        Ok(tables)
    }

    async fn count_tables(&self, tables: &mut L2Tables, window: &mut Window) -> Result<(), Errno> {
        let image = self.image;
        let cluster = image.geometry.cluster();
        let is_first = window.clusters.start == 0;
        let bytes = window.clusters.start * cluster..window.clusters.end * cluster;
        for (at, seen) in &mut tables.known {
            window.add(cluster, *at..*at + cluster, Use::L2, seen.uses);
            if !(is_first || seen.reach.0 < bytes.end && bytes.start < seen.reach.1) {
                continue;
            }
            let mut reach = (u64::MAX, 0);
            image
                .each_l2(*at, |_, word, entry| {
                    let wanted = match entry.map(|entry| entry.place) {
                        Ok(ClusterLocation::Host { at, .. }) if !image.geometry.external => {
                            at..at + cluster
                        }
                        // The last sector need not be there.
                        Ok(ClusterLocation::Compressed { at, len }) => at..at + len,
                        Ok(_) => 0..0,
                        Err(_) => {
                            window.odd.damaged += u64::from(is_first);
                            return;
                        }
                    };
                    if is_first && word & L2_RESERVED != 0 && word >> 62 & 1 == 0 {
                        window.odd.reserved += 1;
                    }
                    if !wanted.is_empty() {
                        reach = (reach.0.min(wanted.start), reach.1.max(wanted.end));
                        let inside = window.add(cluster, wanted, Use::Data, seen.uses);
                        window.odd.damaged += u64::from(is_first && !inside);
                    }
                })
                .await?;
            seen.reach = reach;
        }
        Ok(())
    }

    /// Compares `COPIED` of what leads to the clusters of a window with their users: says how many entries have it
    /// and should not, and the other way round. With `repair` they become right.
    pub(super) async fn flags(
        &mut self,
        window: &Window,
        repair: bool,
    ) -> Result<(u64, u64), Errno> {
        let mut wrong = (0, 0);
        let tables = match self.tables.take() {
            Some(tables) => tables,
            None => self.collect(0, None).await?,
        };
        self.l1_flags(window, repair, &mut wrong).await?;
        let mut part = tables;
        loop {
            self.l2_flags(&part, window, repair, &mut wrong).await?;
            match part.next {
                Some(next) => part = self.collect(next, None).await?,
                None if part.from == 0 => {
                    self.tables = Some(part);
                    break;
                }
                None => break,
            }
        }
        Ok(wrong)
    }

    async fn l1_flags(
        &self,
        window: &Window,
        repair: bool,
        wrong: &mut (u64, u64),
    ) -> Result<(), Errno> {
        let cluster = self.image.geometry.cluster();
        let l1 = self.image.l1.get();
        let mut places = Vec::new();
        let each = |number: u64, word: u64| {
            let at = word & (MAX_OFFSET - 512);
            let is_here = at != 0 && at % cluster == 0 && window.clusters.contains(&(at / cluster));
            if is_here {
                let right = with_flag(word, window.wanted(at / cluster) == 1);
                note(l1.at + number * 8, word, right, &mut places, wrong);
            }
        };
        self.image.each_entry(l1, self.end, each).await?;
        self.write(&places, repair).await
    }

    async fn l2_flags(
        &self,
        tables: &L2Tables,
        window: &Window,
        repair: bool,
        wrong: &mut (u64, u64),
    ) -> Result<(), Errno> {
        let image = self.image;
        let (cluster, external) = (image.geometry.cluster(), image.geometry.external);
        let bytes = window.clusters.start * cluster..window.clusters.end * cluster;
        let is_first = window.clusters.start == 0;
        for (table, seen) in &tables.known {
            let is_near = match external {
                true => is_first,
                false => seen.reach.0 < bytes.end && bytes.start < seen.reach.1,
            };
            if !seen.is_active || !is_near {
                continue;
            }
            let mut places = Vec::new();
            image
                .each_l2(*table, |offset, word, entry| {
                    let Ok(ClusterLocation::Host { at, .. }) = entry.map(|entry| entry.place)
                    else {
                        return;
                    };
                    if !external && !window.clusters.contains(&(at / cluster)) {
                        return;
                    }
                    let alone = external || window.wanted(at / cluster) == 1;
                    note(offset, word, with_flag(word, alone), &mut places, wrong);
                })
                .await?;
            self.write(&places, repair).await?;
        }
        Ok(())
    }

    /// Writes words of tables.
    async fn write(&self, places: &[(u64, u64)], repair: bool) -> Result<(), Errno> {
        let slices = &self.image.slices;
        for (number, (at, word)) in places.iter().enumerate().filter(|_| repair) {
            let (slice, place) = slices.at(*at).await?;
            slice.set_number(place, *word);
            let next = places
                .get(number + 1)
                .map(|(at, _)| at - at % slices.slice_len());
            if next != Some(at - at % slices.slice_len()) {
                slices.settle(&slice).await?;
            }
        }
        Ok(())
    }
}

fn with_flag(word: u64, alone: bool) -> u64 {
    match alone {
        true => word | COPIED,
        false => word & !COPIED,
    }
}

/// Remembers an entry that should be another one.
fn note(at: u64, word: u64, right: u64, places: &mut Vec<(u64, u64)>, wrong: &mut (u64, u64)) {
    if word != right {
        places.push((at, right));
        match word & COPIED != 0 {
            true => wrong.0 += 1,
            false => wrong.1 += 1,
        }
    }
}

impl<S: Storage> Qcow2Image<S> {
    /// Looks at the entries of a table that are in the file, which has `end` clusters.
    async fn each_entry(
        &self,
        table: EntryTable,
        end: u64,
        mut look: impl FnMut(u64, u64),
    ) -> Result<(), Errno> {
        let end = (table.at + table.entries * 8).min(end * self.geometry.cluster());
        let mut at = table.at;
        while at < end {
            let some = (end - at).min(READ);
            // CAST: bounded.
            let words = storage::bytes(&self.file, at, some as usize).await?;
            let first = (at - table.at) / 8;
            for (number, word) in words.chunks_exact(8).enumerate() {
                look(first + number as u64, be64(word, 0));
            }
            at += some;
        }
        Ok(())
    }

    /// Calls `look` for each non-empty entry of an L2 table, with its number, its word and its meaning.
    async fn each_l2(
        &self,
        table: u64,
        mut look: impl FnMut(u64, u64, Result<L2Entry, super::entry::EntryError>),
    ) -> Result<(), Errno> {
        // CAST: at most 2 MiB, and 16.
        let (cluster, step) = (
            self.geometry.cluster() as usize,
            self.geometry.entry() as usize,
        );
        let words = storage::bytes(&self.file, table, cluster).await?;
        for (number, bytes) in words.chunks_exact(step).enumerate() {
            let (word, bitmap) = match step {
                16 => (be64(bytes, 0), be64(bytes, 8)),
                _ => (be64(bytes, 0), 0),
            };
            if word != 0 || bitmap != 0 {
                let at = table + (number * step) as u64;
                look(at, word, L2Entry::decode(word, bitmap, &self.geometry));
            }
        }
        Ok(())
    }
}
