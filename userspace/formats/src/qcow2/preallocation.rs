// SPDX-License-Identifier: MIT OR Apache-2.0
//! Preallocation for sequential writers: the clusters behind a write get their place together with its own ones, so
//! that the kernel may then write there without tapdisk.
//!
//! The preallocated clusters still read as zeroes, because their new places are zero. A preallocated cluster that the
//! guest never writes is lost space until the guest discards it, so a row never gets more clusters ahead than it has.

use super::entry::{ClusterLocation, L2Entry};
use super::image::Qcow2Image;
use super::write::WritePlan;
use crate::Storage;
use diskio::Errno;

/// Bytes that get their place ahead of one write, at most.
const MOST: u64 = 8 << 20;
/// Clusters that a writer has to write in a row first.
const FROM: u64 = 16;
/// Concurrent sequential writers that are tracked: a file system writes its journal between its files.
const WRITERS: usize = 4;

/// A writer in a row.
#[derive(Clone, Copy, Debug)]
struct SequentialWriter {
    /// The cluster of the disk that would be its next one.
    next: u64,
    /// The one behind those that have their place: the writes until there did not have to come here.
    reach: u64,
    /// Clusters so far.
    count: u64,
}

/// The most recent sequential writers.
#[derive(Debug, Default)]
pub(crate) struct Rows(Vec<SequentialWriter>);

impl Rows {
    /// Notes that the guest allocates `count` clusters from `first` on, in a new row or in a known one, and returns how
    /// many clusters behind them get their place ahead, `most` at most.
    fn add(&mut self, first: u64, count: u64, most: u64) -> u64 {
        // A write of the guest may begin and end within a cluster.
        let goes_on =
            |row: &SequentialWriter| (row.next.saturating_sub(1)..=row.reach).contains(&first);
        let known = self.0.iter().position(goes_on);
        let known = known.map(|at| self.0.remove(at));
        let next = known.map_or(0, |row| row.next).max(first + count);
        let count = known.map_or(count, |row| row.count + next.saturating_sub(row.next));
        let ahead = match count < FROM {
            true => 0,
            false => count.min(most),
        };
        let reach = known.map_or(next, |row| row.reach).max(next + ahead);
        self.0.truncate(WRITERS - 1);
        self.0.insert(0, SequentialWriter { next, reach, count });
        ahead
    }
}

impl<S: Storage> Qcow2Image<S> {
    /// Returns how many clusters may be preallocated behind a write that begins in cluster `first` and needs `count`.
    pub(crate) fn wanted_ahead(&self, first: u64, count: u64) -> u64 {
        // Clusters of a data file have their place already, and a new encrypted cluster does not read as zeroes.
        if !self.prepares_zeroes() {
            return 0;
        }
        let most = MOST / self.geometry.cluster();
        self.rows.borrow_mut().add(first, count, most)
    }

    /// Returns how many clusters behind those of a plan can get their place together with them, `wanted` at most.
    pub(crate) fn can_be_ahead(&self, plan: &WritePlan, wanted: u64) -> Result<u64, Errno> {
        let cluster = self.geometry.cluster();
        let behind = plan.old.len() as u64;
        let mut count = 0;
        while count < wanted {
            let number = behind + count;
            let at = (plan.first + number) * cluster;
            if at + cluster > self.size.get() {
                break;
            }
            match self.entry(&plan.found, number)? {
                Some(entry) if self.is_blank(&entry, at) => count += 1,
                _ => break,
            }
        }
        Ok(count)
    }

    /// A cluster reads as zeroes, and has no place.
    fn is_blank(&self, entry: &L2Entry, at: u64) -> bool {
        let (run, len) = self.runs(entry, 0);
        self.is_zero(run, at)
            && entry.place == ClusterLocation::Nowhere
            && len == self.geometry.cluster()
    }

    /// Clusters behind those of a plan have got their place, which reads as zeroes, as they do.
    pub(crate) fn place_ahead(&self, plan: &WritePlan, place: u64, count: u64) {
        let behind = plan.old.len() as u64;
        for number in 0..count {
            let entry = L2Entry {
                place: ClusterLocation::Host {
                    at: place + number * self.geometry.cluster(),
                    owned: true,
                },
                alloc: self.geometry.all_parts(),
                zero: 0,
            };
            self.set_entry(&plan.found, behind + number, &entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Rows, FROM};

    const MOST: u64 = 128;

    #[test]
    fn a_row_gets_as_much_as_it_has() {
        let mut rows = Rows::default();
        let ahead: Vec<u64> = (0..FROM + 2)
            .map(|first| rows.add(first, 1, MOST))
            .collect();
        assert!(ahead[..FROM as usize - 1].iter().all(|count| *count == 0));
        assert_eq!(ahead[FROM as usize - 1..], [FROM, FROM + 1, FROM + 2]);
        assert_eq!(rows.add(FROM + 2, 1000, MOST), MOST);
    }

    /// A write of the guest may begin within a cluster, so that two requests share it; and a write into clusters that
    /// have their place does not reach [`Rows`].
    #[test]
    fn a_row_goes_on_within_a_cluster_and_behind_what_it_got() {
        let mut rows = Rows::default();
        assert_eq!(rows.add(0, FROM, MOST), FROM);
        assert_eq!(rows.add(FROM - 1, 2, MOST), FROM + 1);
        // The kernel wrote all that it got.
        assert_eq!(rows.add(2 * FROM + 2, 1, MOST), 2 * FROM + 3);
    }

    #[test]
    fn writers_are_told_apart_and_others_get_nothing() {
        let mut rows = Rows::default();
        for number in 0..FROM {
            for writer in 0..4 {
                let ahead = rows.add(writer * 1000 + number, 1, MOST);
                assert_eq!(ahead > 0, number == FROM - 1);
            }
        }
        for place in (0..1000).rev() {
            assert_eq!(rows.add(5000 + place * 2, 1, MOST), 0);
        }
    }
}
