// SPDX-License-Identifier: MIT OR Apache-2.0
//! Keeps the dirty bitmaps of QEMU right while the disk changes.
//!
//! As QEMU does: before the first write, each bitmap that records writes is marked as in use, which makes it void if
//! this process dies. Each write then sets its bits in memory, and the image gets them at the end, or when there are
//! many. The last step removes the mark. A bitmap that cannot be kept is void before the first write that it would
//! not have: the header does not claim any more that the bitmaps are right.

use super::bitmap::{self, BitmapRecord, AT_ENTRIES, AT_FLAGS, AT_TABLE, IN_USE, MAX_ENTRIES};
use super::header::{AT_AUTOCLEAR, BITMAPS, RAW_EXTERNAL};
use super::image::{EntryTable, Qcow2Image};
use crate::field::refused;
use crate::Storage;
use control::Failure;
use diskio::{Errno, Gate};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

/// Slices with bits that the image does not have yet, at most.
const UNSTORED: u32 = 1024;

/// Bitmaps of an image that changes.
#[derive(Debug, Default)]
pub(crate) struct BitmapNotes {
    /// All bitmaps of the image, if they are kept right.
    pub(super) kept: RefCell<Rc<Vec<BitmapRecord>>>,
    /// Slices that got bits since all were stored.
    unstored: Cell<u32>,
    /// A table gets a cluster.
    gate: Gate,
}

impl BitmapNotes {
    /// Returns true if writes have to set bits.
    pub(crate) fn is_recording(&self) -> bool {
        self.kept.borrow().iter().any(is_noted)
    }
}

/// Bits are set in it by this process.
fn is_noted(record: &BitmapRecord) -> bool {
    record.is_recording() && record.is_consistent()
}

impl<S: Storage> Qcow2Image<S> {
    /// Prepares for the first write, and returns the autoclear features that stay true. `claimed` are those of the
    /// header.
    pub(super) async fn begin_notes(&self, claimed: u64) -> u64 {
        let raw = claimed & RAW_EXTERNAL;
        let (BITMAPS, Some(place)) = (claimed & BITMAPS, self.bitmaps) else {
            return raw;
        };
        match self.mark_all(place).await {
            Ok(all) => {
                self.notes.kept.replace(Rc::new(all));
                raw | BITMAPS
            }
            Err(failure) => {
                self.say_void(&failure);
                raw
            }
        }
    }

    async fn mark_all(&self, place: (u64, u64)) -> Result<Vec<BitmapRecord>, Failure> {
        let all = bitmap::records(&self.file, place, &self.geometry).await?;
        let failed = |error: Errno| Failure::system("cannot mark them", &error.into());
        for record in &all {
            let is_long_enough =
                record.entries_for(self.size.get(), &self.geometry) <= record.table.entries;
            if record.is_consistent() && !is_long_enough {
                return Err(refused("one of them is shorter than the disk"));
            }
            self.own_place(record.at, 1).await.map_err(failed)?;
        }
        for record in all.iter().filter(|record| is_noted(record)) {
            self.set_flags(record, record.flags | IN_USE)
                .await
                .map_err(failed)?;
        }
        self.flush().await.map_err(failed)?;
        Ok(all)
    }

    /// Refuses a place in the file that something else uses.
    async fn own_place(&self, at: u64, len: u64) -> Result<(), Errno> {
        self.check_no_table(at, len)?;
        match self.alone(at, len).await? == len {
            true => Ok(()),
            false => Err(self.damaged(format_args!(
                "something else than a bitmap uses the cluster at {at:#x}, too"
            ))),
        }
    }

    async fn set_flags(&self, record: &BitmapRecord, flags: u32) -> Result<(), Errno> {
        let (slice, at) = self.slices.at(record.at + AT_FLAGS).await?;
        slice.put(at, &flags.to_be_bytes());
        self.slices.settle(&slice).await
    }

    /// Notes that a range of the disk is about to change.
    pub(super) async fn note(&self, guest: u64, len: u64) -> Result<(), Errno> {
        let kept = self.notes.kept.borrow().clone();
        let end = guest.saturating_add(len).min(self.size.get());
        if guest >= end {
            return Ok(());
        }
        for record in kept.iter().filter(|record| is_noted(record)) {
            if let Err(error) = self.note_in(record, guest..end).await {
                let failure = Failure::system("cannot set a bit", &error.into());
                return self.give_up_notes(&failure).await;
            }
        }
        if self.notes.unstored.get() > UNSTORED {
            self.notes.unstored.set(0);
            self.slices.settle_all().await?;
        }
        Ok(())
    }

    async fn note_in(&self, record: &BitmapRecord, range: Range<u64>) -> Result<(), Errno> {
        let per_cluster = self.geometry.cluster() * 8;
        let (mut bit, last) = (range.start >> record.shift, (range.end - 1) >> record.shift);
        while bit <= last {
            let entry = bit / per_cluster;
            let Some(place) = self.bits_at(record.table, entry).await? else {
                // All of them are set.
                bit = (entry + 1) * per_cluster;
                continue;
            };
            let inside = bit % per_cluster;
            let (slice, at) = self.slices.at(place + inside / 8).await?;
            // CAST: less than a slice, and at most seven.
            let first = at * 8 + (inside % 8) as usize;
            let all = (slice.len() * 8 - first).min((last - bit + 1) as usize);
            let bits = first..first + all;
            if !slice.look(|bytes| has_all(bytes, bits.clone())) {
                self.own_place(place, self.geometry.cluster()).await?;
                let count = &self.notes.unstored;
                count.set(count.get() + u32::from(slice.is_settled()));
                slice.change(|bytes| bits.for_each(|bit| bytes[bit / 8] |= 1 << (bit % 8)));
            }
            bit += all as u64;
        }
        Ok(())
    }

    /// Returns the place of the cluster with the bits of an entry of a bitmap's table, which is made if there is none;
    /// `None` if all of its bits are set.
    async fn bits_at(&self, table: EntryTable, number: u64) -> Result<Option<u64>, Errno> {
        let what = "cluster of a bitmap";
        let (slice, at) = self.slot(table, number).await?;
        if let Some(place) = self.table_at(slice.number(at), what)? {
            return Ok(Some(place));
        }
        let _alone = self.notes.gate.alone().await;
        let word = slice.number(at);
        if let Some(place) = self.table_at(word, what)? {
            return Ok(Some(place));
        }
        if word & 1 != 0 {
            return Ok(None);
        }
        self.own_place(table.at + number * 8, 8).await?;
        let place = self.take(1).await?.first * self.geometry.cluster();
        slice.set_number(at, place);
        self.slices.settle(&slice).await?;
        Ok(Some(place))
    }

    /// The bitmaps are void from now on, and the image says so before the next write.
    async fn give_up_notes(&self, why: &Failure) -> Result<(), Errno> {
        let _alone = self.beginning.alone().await;
        if self.notes.kept.borrow().is_empty() {
            return Ok(());
        }
        self.set_autoclear(self.autoclear.get() & !BITMAPS).await?;
        self.notes.kept.replace(Rc::default());
        self.say_void(why);
        Ok(())
    }

    fn say_void(&self, why: &Failure) {
        diskio::say!(
            "{}: its dirty bitmaps are void, because they cannot be kept ({why}): the next backup has to be a full one",
            self.name
        );
    }

    /// The header claims these autoclear features from now on, durably.
    pub(super) async fn set_autoclear(&self, features: u64) -> Result<(), Errno> {
        self.change_header(AT_AUTOCLEAR, &features.to_be_bytes())
            .await?;
        self.autoclear.set(features);
        Ok(())
    }

    /// Stores the bitmaps when the image is closed: the image has all bits before it claims that.
    pub(super) async fn end_notes(&self) -> Result<(), Errno> {
        let kept = self.notes.kept.take();
        // After a flush that failed, bits may be lost, and the bitmaps stay marked.
        if !kept.iter().any(is_noted) || self.barrier.lost() > 0 {
            return Ok(());
        }
        self.slices.settle_all().await?;
        self.flush().await?;
        for record in kept.iter().filter(|record| is_noted(record)) {
            self.set_flags(record, record.flags).await?;
        }
        self.flush().await
    }

    /// Before the size of the disk changes to `size`: bitmaps whose tables will have to change are void for that time.
    pub(super) async fn suspend_notes(&self, size: u64) -> Result<bool, Errno> {
        let does_change = self.notes.kept.borrow().iter().any(|record| {
            record.is_consistent()
                && record.entries_for(size, &self.geometry) != record.table.entries
        });
        if does_change {
            self.set_autoclear(self.autoclear.get() & !BITMAPS).await?;
        }
        Ok(does_change)
    }

    /// After that: the tables have the length that the size of the disk demands. If that fails, the bitmaps stay void.
    pub(super) async fn resume_notes(&self) {
        if let Err(error) = self.fit_all().await {
            self.notes.kept.replace(Rc::default());
            self.say_void(&Failure::system("cannot change their size", &error.into()));
        }
    }

    async fn fit_all(&self) -> Result<(), Errno> {
        let mut all = self.notes.kept.borrow().to_vec();
        for record in all.iter_mut().filter(|record| record.is_consistent()) {
            let entries = record.entries_for(self.size.get(), &self.geometry);
            if entries > MAX_ENTRIES {
                return Err(Errno::FBIG);
            }
            if entries != record.table.entries {
                record.table = self.fit(record, entries).await?;
            }
        }
        self.flush().await?;
        self.notes.kept.replace(Rc::new(all));
        self.set_autoclear(self.autoclear.get() | BITMAPS).await
    }

    /// Gives a bitmap a table of `entries`, and returns it.
    async fn fit(&self, record: &BitmapRecord, entries: u64) -> Result<EntryTable, Errno> {
        let (old, cluster) = (record.table, self.geometry.cluster());
        let clusters = |entries: u64| (entries * 8).div_ceil(cluster);
        self.own_place(old.at, clusters(old.entries) * cluster)
            .await?;
        // Bits behind the end of the disk.
        for number in entries..old.entries {
            let (slice, at) = self.slot(old, number).await?;
            if let Some(place) = self.table_at(slice.number(at), "cluster of a bitmap")? {
                self.release(place / cluster, 1);
            }
            slice.set_number(at, 0);
            self.slices.settle(&slice).await?;
        }
        let mut new = EntryTable {
            at: old.at,
            entries,
        };
        if clusters(entries) > clusters(old.entries) {
            new.at = self.take_row(clusters(entries)).await? * cluster;
            for number in 0..old.entries {
                let (from, place) = self.slot(old, number).await?;
                let entry = from.number(place);
                let (to, place) = self.slot(new, number).await?;
                to.set_number(place, entry);
                self.slices.settle(&to).await?;
            }
            self.release(old.at / cluster, clusters(old.entries));
        } else {
            for number in old.entries..entries {
                let (slice, at) = self.slot(new, number).await?;
                slice.set_number(at, 0);
                self.slices.settle(&slice).await?;
            }
            let (first, behind) = (clusters(entries), clusters(old.entries));
            if behind > first {
                self.release(old.at / cluster + first, behind - first);
            }
        }
        // CAST: bounded.
        let count = (entries as u32).to_be_bytes();
        let place = new.at.to_be_bytes();
        for (at, bytes) in [(AT_TABLE, &place[..]), (AT_ENTRIES, &count[..])] {
            let (slice, at) = self.slices.at(record.at + at).await?;
            slice.put(at, bytes);
            self.slices.settle(&slice).await?;
        }
        Ok(new)
    }
}

/// All of these bits are set.
fn has_all(bytes: &[u8], mut bits: Range<usize>) -> bool {
    bits.all(|bit| bytes[bit / 8] >> (bit % 8) & 1 != 0)
}
