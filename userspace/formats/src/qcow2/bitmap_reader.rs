// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads the dirty bitmaps of QEMU in an image, for clients that copy what has changed.
//!
//! Writes of this process set their bits in the same slices of memory before they change the disk
//! ([`bitmap_upkeep`](super::bitmap_upkeep)), so an answer has the bits of all writes that have ended. Bits that cannot
//! be read are an error, and never a part of the disk that did not change.

use super::bitmap::{self, BitmapRecord, MAX_ENTRIES};
use super::geometry::MAX_OFFSET;
use super::header::BITMAPS;
use super::image::Qcow2Image;
use crate::field::refused;
use crate::Storage;
use control::{Code, Failure};
use diskio::Errno;
use drivers::DirtyExtent;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

/// Bitmaps of an image at most that clients can choose from.
const MOST: usize = 1024;
/// Flag of a table entry without a cluster: all of its bits are set.
const ALL_SET: u64 = 1;

/// Bits of an entry of a bitmap's table.
enum EntryBits {
    /// All are like this.
    Alike(bool),
    /// The offset of their cluster.
    At(u64),
}

impl<S: Storage> Qcow2Image<S> {
    /// Returns the names of the bitmaps that can be relied on.
    ///
    /// # Errors
    /// The directory of bitmaps is damaged, or has too many.
    pub(super) async fn bitmap_names(&self) -> Result<Vec<String>, Failure> {
        let all = self.bitmap_records().await?;
        if all.len() > MOST {
            return Err(refused(format!(
                "it has {} dirty bitmaps, and clients can choose from {MOST} at most: remove some with qemu-img bitmap --remove",
                all.len()
            )));
        }
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for name in all.iter().filter_map(BitmapRecord::name) {
            *counts.entry(name).or_default() += 1;
        }
        // A name that two bitmaps have means neither.
        let is_shown = |name: &&str| counts.get(name) == Some(&1);
        let consistent = all.iter().filter(|record| record.is_consistent());
        let names = consistent.filter_map(BitmapRecord::name).filter(is_shown);
        Ok(names.map(str::to_owned).collect())
    }

    /// Returns the bitmaps of the image as they were when this process began to keep them; none if the image does not
    /// claim that they are right.
    async fn bitmap_records(&self) -> Result<Rc<Vec<BitmapRecord>>, Failure> {
        // The first write marks them as in use, which makes them void for other processes only.
        let _alone = self.beginning.alone().await;
        match self.bitmaps {
            Some(place) if self.autoclear.get() & BITMAPS != 0 => {
                if self.has_begun.get() {
                    return Ok(self.notes.kept.borrow().clone());
                }
                let all = bitmap::records(&self.file, place, &self.geometry).await?;
                Ok(Rc::new(all))
            }
            _ => Ok(Rc::default()),
        }
    }

    /// Returns the parts of a range of the disk, in bytes, in the bitmap with this name: at least one, at most `most`.
    ///
    /// # Errors
    /// There is no such bitmap that can be relied on, or it is damaged.
    pub(super) async fn dirty_extents(
        &self,
        name: &str,
        range: Range<u64>,
        most: usize,
    ) -> Result<Vec<DirtyExtent>, Failure> {
        let all = self.bitmap_records().await?;
        let is_meant =
            |record: &&BitmapRecord| record.name() == Some(name) && record.is_consistent();
        let record = all.iter().find(is_meant).ok_or_else(|| {
            Failure::new(
                Code::NotFound,
                format!("the image has no dirty bitmap {name:?} any more that can be relied on, so copy all of the disk"),
            )
        })?;
        if record.entries_for(self.size.get(), &self.geometry) > record.table.entries {
            return Err(refused(format!(
                "the dirty bitmap {name:?} is shorter than the disk"
            )));
        }
        let mut found = FoundExtents::new(range, record.shift, most);
        let read = self.read_bits(record, &mut found).await;
        read.map_err(|error| {
            Failure::system(
                format!("cannot read the dirty bitmap {name:?}, so copy all of the disk"),
                &error.into(),
            )
        })?;
        Ok(found.extents)
    }

    async fn read_bits(
        &self,
        record: &BitmapRecord,
        found: &mut FoundExtents,
    ) -> Result<(), Errno> {
        let table = record.table;
        self.check_bits(table.at, table.entries.min(MAX_ENTRIES) * 8)?;
        let per_cluster = self.geometry.cluster() * 8;
        while let Some(bits) = found.missing() {
            let entry = bits.start / per_cluster;
            let end = bits.end.min((entry + 1) * per_cluster);
            let (slice, at) = self.slot(table, entry).await?;
            match self.entry_bits(slice.number(at))? {
                EntryBits::Alike(is_dirty) => found.add(end, is_dirty),
                EntryBits::At(place) => {
                    let inside = bits.start % per_cluster;
                    let (slice, at) = self.slices.at(place + inside / 8).await?;
                    // CAST: less than a slice, and at most seven.
                    let first = at * 8 + (inside % 8) as usize;
                    let rest = (slice.len() * 8 - first) as u64;
                    let end = end.min(bits.start + rest);
                    slice.look(|bytes| found.add_bits(bytes, first, end));
                }
            }
        }
        Ok(())
    }

    /// Returns where the bits of a table entry are.
    fn entry_bits(&self, entry: u64) -> Result<EntryBits, Errno> {
        if entry & !(MAX_OFFSET - 512) & !ALL_SET != 0 {
            return Err(self.damaged(format_args!(
                "an entry {entry:#x} of a bitmap's table cannot be"
            )));
        }
        match self.table_at(entry, "cluster of a bitmap")? {
            None => Ok(EntryBits::Alike(entry & ALL_SET != 0)),
            Some(_) if entry & ALL_SET != 0 => Err(self.damaged(format_args!(
                "an entry {entry:#x} of a bitmap's table cannot be"
            ))),
            Some(place) => {
                self.check_bits(place, self.geometry.cluster())?;
                Ok(EntryBits::At(place))
            }
        }
    }

    /// Refuses a part of a bitmap that is not in the file, or where a table of the image is.
    fn check_bits(&self, at: u64, len: u64) -> Result<(), Errno> {
        self.check_no_table(at, len)?;
        match at + len <= self.file.size()? {
            true => Ok(()),
            false => Err(self.damaged(format_args!(
                "a part of a bitmap at {at:#x} is behind the end of the file"
            ))),
        }
    }
}

/// Parts of a range that were found, in order.
struct FoundExtents {
    /// Bytes of the disk.
    range: Range<u64>,
    /// A bit stands for `1 << shift` bytes.
    shift: u32,
    most: usize,
    /// The next bit.
    next: u64,
    /// There would be more than `most`.
    is_full: bool,
    extents: Vec<DirtyExtent>,
}

impl FoundExtents {
    fn new(range: Range<u64>, shift: u32, most: usize) -> Self {
        Self {
            next: range.start >> shift,
            is_full: range.is_empty(),
            range,
            shift,
            most,
            extents: Vec::new(),
        }
    }

    /// Returns the bits that are still missing; `None` if all are there.
    fn missing(&self) -> Option<Range<u64>> {
        let end = self.range.end.saturating_sub(1) >> self.shift;
        let bits = self.next..end + 1;
        (!self.is_full && !bits.is_empty()).then_some(bits)
    }

    /// Adds all bits up to `end`, which are alike.
    fn add(&mut self, end: u64, is_dirty: bool) {
        let byte = |bit: u64| (bit << self.shift).clamp(self.range.start, self.range.end);
        let len = byte(end) - byte(self.next);
        let count = self.extents.len();
        match self.extents.last_mut() {
            Some(last) if last.is_dirty == is_dirty => last.len += len,
            _ if count == self.most => {
                self.is_full = true;
                return;
            }
            _ => self.extents.push(DirtyExtent { len, is_dirty }),
        }
        self.next = end;
    }

    /// Adds the bits up to `end`, of which the next one is bit `first` of `bytes`.
    fn add_bits(&mut self, bytes: &[u8], first: usize, end: u64) {
        let (begin, mut at) = (self.next, first);
        while self.next < end && !self.is_full {
            let (is_dirty, behind) = run(bytes, at);
            at = behind;
            self.add(end.min(begin + (at - first) as u64), is_dirty);
        }
    }
}

/// Returns the state of a bit, which must be inside, and the first bit behind it that differs, or the end.
fn run(bytes: &[u8], first: usize) -> (bool, usize) {
    let end = bytes.len() * 8;
    let is_set = |at: usize| bytes[at / 8] >> (at % 8) & 1 != 0;
    let state = is_set(first);
    let same = if state { 0xff } else { 0 };
    let mut at = first + 1;
    while at < end {
        if at % 8 == 0 && bytes[at / 8] == same {
            at += 8;
        } else if is_set(at) == state {
            at += 1;
        } else {
            break;
        }
    }
    (state, at)
}

#[cfg(test)]
mod tests {
    use super::{run, FoundExtents};

    #[test]
    fn runs_end_where_bits_differ() {
        let bytes = [0b1100_0000, 0xff, 0b0000_0001, 0, 0, 0b1000_0000];
        for (first, is_set, end) in [
            (0, false, 6),
            (5, false, 6),
            (6, true, 17),
            (16, true, 17),
            (17, false, 47),
            (47, true, 48),
        ] {
            assert_eq!(run(&bytes, first), (is_set, end), "{first}");
        }
    }

    /// Parts of 512 bytes, of the bits of two slices.
    #[test]
    fn extents_are_inside_of_the_range() {
        let found = |range, most| {
            let mut found = FoundExtents::new(range, 10, most);
            let mut steps = 0;
            while let Some(bits) = found.missing() {
                match bits.start {
                    0..16 => {
                        let first = bits.start as usize;
                        found.add_bits(&[0b0000_0011, 0b1100_0000], first, bits.end.min(16));
                    }
                    _ => found.add(bits.end, true),
                }
                steps += 1;
                assert!(steps < 4);
            }
            let extents = found.extents.iter();
            let extents = extents.map(|part| (part.len / 512, part.is_dirty));
            extents.collect::<Vec<_>>()
        };
        let all = [(4, true), (24, false), (12, true)];
        assert_eq!(found(0..20 << 10, 9), all);
        assert_eq!(found(0..20 << 10, 3), all);
        assert_eq!(found(0..20 << 10, 2), all[..2]);
        assert_eq!(found(0..20 << 10, 1), all[..1]);
        // Neither end is one of a bit.
        let all = [(3, true), (24, false), (3, true)];
        assert_eq!(found(512..(16 << 10) - 512, 9), all);
        assert_eq!(found(3 << 10..(3 << 10) + 512, 9), [(1, false)]);
        assert_eq!(found(0..0, 9), []);
    }
}
