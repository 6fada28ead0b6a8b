// SPDX-License-Identifier: MIT OR Apache-2.0
//! An active image: what all its requests share, and how they find a cluster.

use super::alloc::Allocator;
use super::bitmap_upkeep::BitmapNotes;
use super::compressed::UnpackedClusters;
use super::content::ClusterFile;
use super::entry::{ClusterLocation, EntryError, L2Entry, SubclusterSource, COPIED};
use super::geometry::{Geometry, MAX_OFFSET};
use super::header::{Compression, LuksPlace, Qcow2Header};
use super::in_flight::InFlightRequests;
use super::pack::PackedEnd;
use super::preallocation::Rows;
use super::slices::{Slice, Slices};
use crate::barrier::Barrier;
use crate::base::{self, Base};
use crate::locks::RangeLocks;
use crate::metadata::Metadata;
use crate::Storage;
use diskio::{Errno, Gate};
use drivers::Disk;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// A table of 8-byte entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryTable {
    pub(crate) at: u64,
    pub(crate) entries: u64,
}

/// State that all requests of an image share.
pub(crate) struct Qcow2Image<S> {
    /// Names it in messages.
    pub(crate) name: String,
    pub(crate) geometry: Geometry,
    pub(crate) compression: Compression,
    pub(crate) size: Cell<u64>,
    /// Bytes of a logical sector, if the header stores them.
    pub(crate) sector: Option<u32>,
    pub(crate) writable: bool,
    /// True if freed space is given back to the storage.
    pub(crate) discard: bool,
    /// The metadata.
    pub(crate) file: S,
    /// The clusters: in the same file, or another one.
    pub(crate) data: ClusterFile<S>,
    /// Place of the keys, if the image is encrypted.
    pub(crate) crypt: Option<LuksPlace>,
    pub(crate) below: RefCell<Option<Rc<Base>>>,
    pub(crate) l1: Cell<EntryTable>,
    pub(crate) reftable: Cell<EntryTable>,
    /// Autoclear features that the header claims.
    pub(crate) autoclear: Cell<u64>,
    /// The header claims none that a write would make wrong.
    pub(crate) has_begun: Cell<bool>,
    /// Place of the directory of bitmaps: its offset and its bytes.
    pub(crate) bitmaps: Option<(u64, u64)>,
    pub(crate) notes: BitmapNotes,
    /// Compressed clusters of a new image.
    pub(crate) packed: PackedEnd,
    pub(crate) slices: Slices<Metadata<S>>,
    pub(crate) barrier: Barrier<S>,
    pub(crate) allocator: Allocator,
    pub(crate) users: InFlightRequests,
    /// Clusters of the disk that are being moved.
    pub(crate) clusters: RangeLocks,
    /// Entries of the L1 table that are being changed.
    pub(crate) tables: RangeLocks,
    /// Number of times that clusters lost their content: no other change can restore an earlier state.
    pub(crate) zeroed: Cell<u64>,
    /// Sequential writers.
    pub(crate) rows: RefCell<Rows>,
    /// The first write has one thing to do.
    pub(crate) beginning: Gate,
    pub(crate) unpacked: UnpackedClusters,
    /// Bytes that the file was seen to have.
    pub(crate) end: Cell<u64>,
    /// Damage that was reported: the first few times.
    pub(crate) reported: Cell<u32>,
}

/// Location of an entry of the disk: its slices must be settled before an answer relies on it.
pub(crate) struct Found {
    pub(crate) l1: Rc<Slice>,
    /// The slice of the L2 table, and where the entry of the first cluster is in it.
    pub(crate) l2: Option<(Rc<Slice>, usize)>,
}

impl Found {
    /// The image has the same entries as the memory.
    pub(crate) fn is_settled(&self) -> bool {
        let mut l2 = self.l2.iter();
        self.l1.is_settled() && l2.all(|(slice, _)| slice.is_settled())
    }
}

/// Reason why a cluster's content is unknown.
pub(super) enum Wrong {
    /// Its entry cannot be.
    Entry { word: u64, why: EntryError },
    /// A table is missing where one was expected.
    Nowhere,
}

/// Bytes of the disk that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByteRun {
    Below,
    Zero,
    /// In a row from `at` on.
    Data {
        at: u64,
        owned: bool,
    },
    /// A part of one cluster, from `skip` on.
    Packed {
        at: u64,
        len: u64,
        skip: u64,
    },
}

impl<S: Storage> Qcow2Image<S> {
    /// Returns the bytes of a logical sector: those of the header, or else of the backing image.
    pub(crate) fn sector(&self) -> u32 {
        let inherited = || base::sector(self.below().as_deref(), self.size.get());
        self.sector.unwrap_or_else(inherited)
    }

    /// Damage that was met: says what and where, not more often than a few times.
    pub(crate) fn damaged(&self, what: impl std::fmt::Display) -> Errno {
        let count = self.reported.get();
        self.reported.set(count.saturating_add(1));
        if count < 10 {
            diskio::say!(
                "{}: the image is damaged: {what}; check it with qemu-img check",
                self.name
            );
        }
        Errno::IO
    }

    /// The slice with an entry of a table, and its place there.
    pub(crate) async fn slot(
        &self,
        table: EntryTable,
        number: u64,
    ) -> Result<(Rc<Slice>, usize), Errno> {
        if number >= table.entries {
            return Err(self.damaged(format_args!(
                "entry {number} of the table at {} is behind its end",
                table.at
            )));
        }
        self.slices.at(table.at + number * 8).await
    }

    /// The slice with an entry of a table, and its place there, if the table has that entry and it is in memory.
    pub(super) fn known_slot(&self, table: EntryTable, number: u64) -> Option<(Rc<Slice>, usize)> {
        let is_inside = number < table.entries;
        is_inside.then(|| self.slices.known_at(table.at + number * 8))?
    }

    /// Returns the offset of a table's cluster in an entry of another table; `None` if it is 0.
    pub(crate) fn table_at(&self, entry: u64, what: &str) -> Result<Option<u64>, Errno> {
        self.place_of_table(entry).map_err(|at| {
            self.damaged(format_args!(
                "the {what} at {at:#x} is no whole number of clusters away"
            ))
        })
    }

    /// Returns the place of the table that an entry leads to, or as an error the place if it is no multiple of the
    /// cluster's size.
    pub(crate) fn place_of_table(&self, entry: u64) -> Result<Option<u64>, u64> {
        let at = entry & (MAX_OFFSET - 512);
        match at % self.geometry.cluster() {
            0 => Ok((at != 0).then_some(at)),
            _ => Err(at),
        }
    }

    /// Finds the entry of the cluster with byte `guest` of the disk.
    pub(crate) async fn find(&self, guest: u64) -> Result<Found, Errno> {
        let span = self.geometry.span();
        let (l1, at) = self.slot(self.l1.get(), guest / span).await?;
        let Some(table) = self.table_at(l1.number(at), "L2 table")? else {
            return Ok(Found { l1, l2: None });
        };
        let l2 = self.slices.at(self.entry_at(table, guest)).await?;
        Ok(Found { l1, l2: Some(l2) })
    }

    /// Finds the entry of the cluster with byte `guest` of the disk as [`find`](Self::find) does, but only if all of it
    /// is in memory and valid.
    pub(super) fn known(&self, guest: u64) -> Option<Found> {
        let (l1, at) = self.known_slot(self.l1.get(), guest / self.geometry.span())?;
        let l2 = match self.place_of_table(l1.number(at)).ok()? {
            Some(table) => Some(self.slices.known_at(self.entry_at(table, guest))?),
            None => None,
        };
        Some(Found { l1, l2 })
    }

    /// Returns the offset of the entry of the cluster with byte `guest` of the disk, for an L2 table at `table`.
    fn entry_at(&self, table: u64, guest: u64) -> u64 {
        let cluster = guest % self.geometry.span() / self.geometry.cluster();
        table + cluster * self.geometry.entry()
    }

    /// Returns the backing disk if it has all of a range, and that is known. Damage is reported by the read, which
    /// comes next.
    pub(crate) fn passed(&self, guest: u64, len: u64) -> Option<Disk> {
        let found = self.known(guest)?;
        let (run, there) = self.run_at(&found, guest, len).ok()?;
        match (run, &*self.below.borrow()) {
            (ByteRun::Below, Some(below)) if there == len => below.all_of(guest, len),
            _ => None,
        }
    }

    /// Returns the entry `number` clusters behind the one that was looked for; `None` at the end of the slice.
    pub(crate) fn entry(&self, found: &Found, number: u64) -> Result<Option<L2Entry>, Errno> {
        let entry = self.decoded(found, number);
        entry.map_err(|wrong| self.impossible(wrong))
    }

    /// Returns the entry `number` clusters behind the one that was looked for, without a message if it is invalid;
    /// `None` at the end of the slice.
    fn decoded(&self, found: &Found, number: u64) -> Result<Option<L2Entry>, Wrong> {
        let Some((slice, at)) = &found.l2 else {
            return Ok(Some(L2Entry::NONE));
        };
        let step = self.geometry.entry();
        // CAST: numbers of entries in a slice are small, and larger ones are behind its end.
        let at = at.saturating_add(number.saturating_mul(step) as usize);
        if at >= slice.len() {
            return Ok(None);
        }
        let bitmap = match self.geometry.extended {
            true => slice.number(at + 8),
            false => 0,
        };
        let word = slice.number(at);
        let entry = L2Entry::decode(word, bitmap, &self.geometry);
        entry.map(Some).map_err(|why| Wrong::Entry { word, why })
    }

    fn impossible(&self, wrong: Wrong) -> Errno {
        match wrong {
            Wrong::Entry { word, why } => {
                self.damaged(format_args!("an L2 entry {word:#x} cannot be: {why}"))
            }
            Wrong::Nowhere => Errno::IO,
        }
    }

    /// Changes the entry a number of clusters behind the one that was looked for, in memory.
    pub(crate) fn set_entry(&self, found: &Found, number: u64, entry: &L2Entry) {
        let Some((slice, at)) = &found.l2 else { return };
        // CAST: it is inside the slice: `entry` has found it there.
        let at = at + (number * self.geometry.entry()) as usize;
        let (word, bitmap) = entry.encode(&self.geometry);
        slice.set_number(at, word);
        if self.geometry.extended {
            slice.set_number(at + 8, bitmap);
        }
    }

    /// Writes the table entries that an answer relies on to the image.
    pub(crate) async fn settle(&self, found: &Found) -> Result<(), Errno> {
        if !found.l1.is_settled() {
            self.slices.settle(&found.l1).await?;
        }
        match &found.l2 {
            Some((slice, _)) if !slice.is_settled() => self.slices.settle(slice).await,
            _ => Ok(()),
        }
    }

    /// Returns the kind of content at byte `guest` of the disk, and its length in bytes, `len` at most.
    pub(crate) async fn map(&self, guest: u64, len: u64) -> Result<(ByteRun, u64, Found), Errno> {
        let found = self.find(guest).await?;
        let there = self.run_at(&found, guest, len);
        let (run, len) = there.map_err(|wrong| self.impossible(wrong))?;
        Ok((run, len, found))
    }

    /// Returns the run at byte `guest` as [`map`](Self::map) does, from entries that were found already, without a
    /// message if they are invalid.
    pub(super) fn run_at(
        &self,
        found: &Found,
        guest: u64,
        len: u64,
    ) -> Result<(ByteRun, u64), Wrong> {
        let geometry = &self.geometry;
        if found.l2.is_none() {
            let rest = geometry.span() - guest % geometry.span();
            return Ok((ByteRun::Below, len.min(rest)));
        }
        let skip = guest % geometry.cluster();
        let (run, mut count) = match self.decoded(found, 0)? {
            Some(entry) => self.runs(&entry, skip),
            None => return Err(Wrong::Nowhere),
        };
        let mut cluster = 1;
        // The run continues while whole clusters are alike.
        while count < len && (skip + count) == cluster * geometry.cluster() {
            // An invalid entry is an error only for reads of its own cluster.
            let Ok(Some(entry)) = self.decoded(found, cluster) else {
                break;
            };
            let (next, more) = self.runs(&entry, 0);
            if !follows(run, count, next) {
                break;
            }
            count += more;
            cluster += 1;
        }
        Ok((run, count.min(len)))
    }

    /// Returns the content of a cluster from byte `skip` on, and its length in bytes.
    pub(crate) fn runs(&self, entry: &L2Entry, skip: u64) -> (ByteRun, u64) {
        let geometry = &self.geometry;
        if let ClusterLocation::Compressed { at, len } = entry.place {
            return (ByteRun::Packed { at, len, skip }, geometry.cluster() - skip);
        }
        // CAST: a cluster has at most 32 parts.
        let first = (skip / geometry.part()) as u32;
        let kind = entry.part(first);
        let mut end = first + 1;
        while end < geometry.parts() && entry.part(end) == kind {
            end += 1;
        }
        let count = u64::from(end) * geometry.part() - skip;
        let run = match (kind, entry.place) {
            (SubclusterSource::Data, ClusterLocation::Host { at, owned }) => ByteRun::Data {
                at: at + skip,
                owned,
            },
            (SubclusterSource::Zero, _) => ByteRun::Zero,
            _ => ByteRun::Below,
        };
        (run, count)
    }

    /// Returns how many of the `len` bytes of the disk from `guest` on are in the file, where they begin at `at`. An
    /// image that was cut off does not have all of them, and missing bytes are not zeroes. Another host may be making
    /// the file longer.
    pub(crate) fn inside(&self, guest: u64, at: u64, len: u64) -> Result<u64, Errno> {
        let wanted = len.min(self.size.get().saturating_sub(guest));
        let end = at.saturating_add(wanted);
        if self.geometry.external || end <= self.end.get() {
            return Ok(len);
        }
        self.end.set(self.file.size()?);
        Ok(match end <= self.end.get() {
            true => len,
            false => self.end.get().saturating_sub(at),
        })
    }

    /// Reports that data lie behind the end of the file, and returns the error.
    pub(crate) fn cut_off(&self, guest: u64) -> Errno {
        self.damaged(format_args!(
            "the data of byte {guest} of the disk are behind the end of the file, which was cut off"
        ))
    }

    /// The image below, as long as there is one.
    pub(crate) fn below(&self) -> Option<Rc<Base>> {
        self.below.borrow().clone()
    }

    /// Returns true if an unallocated byte reads as zero, because there is no backing image.
    pub(crate) fn is_bare(&self, guest: u64) -> bool {
        let below = self.below.borrow();
        below.as_ref().is_none_or(|below| guest >= below.size())
    }

    /// Clusters that were prepared are zeroes of the disk.
    pub(crate) fn prepares_zeroes(&self) -> bool {
        !self.geometry.external && self.data.is_plain()
    }

    /// A run from a byte on reads as zeroes.
    pub(crate) fn is_zero(&self, run: ByteRun, guest: u64) -> bool {
        match run {
            ByteRun::Zero => true,
            ByteRun::Below => self.is_bare(guest),
            ByteRun::Data { .. } | ByteRun::Packed { .. } => false,
        }
    }

    /// Checks that data may be stored at a place: no L2 entry of a sound image leads into its essential tables.
    pub(crate) fn check_place(&self, at: u64, len: u64) -> Result<(), Errno> {
        match self.geometry.external {
            true => Ok(()),
            false => self.check_no_table(at, len),
        }
    }

    /// Checks that clusters of the image itself, whatever they hold, overlap none of its essential tables.
    pub(crate) fn check_no_table(&self, at: u64, len: u64) -> Result<(), Errno> {
        let end = at.checked_add(len).filter(|end| *end <= MAX_OFFSET);
        let end =
            end.ok_or_else(|| self.damaged(format_args!("a cluster at {at:#x} is out of reach")))?;
        match self.meets_table(at, end) {
            true => Err(self.damaged(format_args!("a cluster at {at:#x} is where a table is"))),
            false => Ok(()),
        }
    }

    /// Reports whether bytes of the image itself overlap one of its essential tables.
    pub(super) fn meets_table(&self, at: u64, end: u64) -> bool {
        let (l1, refs) = (self.l1.get(), self.reftable.get());
        let keys = self
            .crypt
            .map_or((0, 0), |crypt| (crypt.at, crypt.at + crypt.len));
        let tables = [
            (0, self.geometry.cluster()),
            (l1.at, l1.at + l1.entries * 8),
            (refs.at, refs.at + refs.entries * 8),
            keys,
        ];
        tables.iter().any(|(from, to)| at < *to && *from < end)
    }

    /// Returns the L2 entry of a byte, in a table that only this image uses; makes the table if necessary.
    pub(crate) async fn find_owned(&self, guest: u64) -> Result<Found, Errno> {
        let span = self.geometry.span();
        let number = guest / span;
        let (l1, at) = self.slot(self.l1.get(), number).await?;
        if !self.owns_table(l1.number(at)).await? {
            let _held = self.tables.alone(number).await;
            // The table may be somewhere else by now.
            let (l1, at) = self.slot(self.l1.get(), number).await?;
            let entry = l1.number(at);
            if !self.owns_table(entry).await? {
                self.make_table(&l1, at, entry).await?;
            }
        }
        let found = self.find(guest).await?;
        match found.l2 {
            Some(_) => Ok(found),
            None => Err(self.damaged(format_args!("L1 entry {number} lost its table"))),
        }
    }

    /// Returns true if an L1 entry leads to a table that has no other user, by the entry and by the refcount. An entry
    /// may claim that for a place that is free, where a write would be lost.
    async fn owns_table(&self, entry: u64) -> Result<bool, Errno> {
        match self.table_at(entry, "L2 table")? {
            Some(table) if entry & COPIED != 0 => Ok(self.alone(table, 1).await? > 0),
            _ => Ok(false),
        }
    }

    async fn make_table(&self, l1: &Rc<Slice>, slot: usize, entry: u64) -> Result<(), Errno> {
        let old = self.table_at(entry, "L2 table")?;
        let cluster = self.geometry.cluster();
        // Its clusters are zero and counted, and both is durable.
        let new = self.take(1).await?.first * cluster;
        if let Some(old) = old {
            self.copy_table(old, new).await?;
            // If the entry were durable before the table, it would hide the content of the clusters.
            self.flush().await?;
        }
        l1.set_number(slot, new | COPIED);
        self.slices.settle(l1).await?;
        if let Some(old) = old {
            self.release(old / cluster, 1);
        }
        Ok(())
    }

    /// Copies a table that a snapshot has, too. So it has all its clusters.
    async fn copy_table(&self, old: u64, new: u64) -> Result<(), Errno> {
        let mut at = 0;
        while at < self.geometry.cluster() {
            let (from, _) = self.slices.at(old + at).await?;
            let (to, _) = self.slices.at(new + at).await?;
            let step = self.geometry.entry() as usize;
            for place in (0..from.len()).step_by(step) {
                to.set_number(place, from.number(place) & !COPIED);
                if self.geometry.extended {
                    to.set_number(place + 8, from.number(place + 8));
                }
            }
            self.slices.settle(&to).await?;
            at += self.slices.slice_len();
        }
        Ok(())
    }
}

/// Returns true if `next` continues a run that is `count` bytes long.
fn follows(run: ByteRun, count: u64, next: ByteRun) -> bool {
    match (run, next) {
        (ByteRun::Below, ByteRun::Below) | (ByteRun::Zero, ByteRun::Zero) => true,
        (
            ByteRun::Data { at, owned },
            ByteRun::Data {
                at: then,
                owned: too,
            },
        ) => then == at + count && owned == too,
        _ => false,
    }
}

impl Qcow2Image<()> {
    /// Returns the places of the L1 and refcount tables from a header.
    pub(crate) fn tables_of(header: &Qcow2Header) -> (EntryTable, EntryTable) {
        let l1 = EntryTable {
            at: header.l1,
            entries: header.l1_entries,
        };
        let reftable = EntryTable {
            at: header.reftable,
            entries: header.reftable_clusters * header.geometry.cluster() / 8,
        };
        (l1, reftable)
    }
}
