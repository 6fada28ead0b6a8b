// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The history checker: every sector is a register.
//!
//! Each sector that a guest writes carries a value that no other write gives to any sector. A read is explained if it
//! returned the value of a write that could be the last one in some order of the requests. In that order an answered
//! request comes before one that was issued after the answer.

use std::collections::HashMap;
use std::ops::Range;

/// The value of a sector that was never written or was discarded.
pub const ZERO: u64 = 0;

/// Time of the answer to a request without one.
pub const NEVER: u64 = u64::MAX;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// The value that write `number` gives to `sector`.
pub fn value(number: u32, sector: u64) -> u64 {
    (u64::from(number) << 32) | (sector & 0xffff_ffff)
}

/// Fills a sector's bytes with a value.
pub fn encode(value: u64, bytes: &mut [u8]) {
    for (i, word) in (0u64..).zip(bytes.chunks_exact_mut(8)) {
        word.copy_from_slice(&(value ^ i.wrapping_mul(0x0101_0101_0101_0101)).to_le_bytes());
    }
    if value == ZERO {
        bytes.fill(0);
    }
}

/// The value in a sector's bytes; `None` if they are not of one write.
pub fn decode(bytes: &[u8]) -> Option<u64> {
    if bytes.iter().all(|b| *b == 0) {
        return Some(ZERO);
    }
    let mut words = bytes
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
    let value = words.next()?;
    (1u64..)
        .zip(words)
        .all(|(i, word)| word == value ^ i.wrapping_mul(0x0101_0101_0101_0101))
        .then_some(value)
}

#[derive(Clone, Copy, Debug)]
struct Write {
    issued: u64,
    answered: u64,
    okay: bool,
    /// Its data is not known, so it explains any value.
    wild: bool,
    /// If it failed, it may be executed at any time afterwards.
    stray: bool,
    /// Sectors of a discard; a data write is listed under each of its sectors.
    start: u64,
    end: u64,
    number: u32,
}

impl Write {
    /// Returns the time before which it is executed, if at all.
    fn end(&self) -> u64 {
        if self.stray && !self.okay {
            NEVER
        } else {
            self.answered
        }
    }
}

/// The history of one disk.
#[derive(Debug, Default)]
pub struct DiskHistory {
    writes: Vec<Write>,
    /// Data writes by sector.
    by_sector: HashMap<u64, Vec<usize>>,
    discards: Vec<usize>,
    by_number: HashMap<u32, usize>,
    /// Values that answered reads returned.
    seen: HashMap<u64, Vec<SeenValue>>,
}

/// Value that an answered read returned.
#[derive(Clone, Copy, Debug)]
struct SeenValue {
    issued: u64,
    answered: u64,
    value: u64,
    /// When the write of that value was issued.
    write: u64,
}

/// All accesses to one value of a sector: its write and the reads that returned it.
///
/// The value was there at some time between the first end and the last begin of an access, and
/// all that time if that end comes before that begin.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    number: u32,
    first_end: u64,
    last_begin: u64,
}

impl Cluster {
    /// Returns the times from and to which the value must have been on the disk.
    fn forward(&self) -> Option<(u64, u64)> {
        (self.first_end < self.last_begin).then_some((self.first_end, self.last_begin))
    }

    /// Returns true if both values must have been on the disk at one time.
    fn clashes(&self, other: &Self) -> bool {
        match (self.forward(), other.forward()) {
            (Some((from, to)), Some((since, until))) => from < until && since < to,
            (Some((from, to)), None) => from < other.last_begin && other.first_end < to,
            _ => false,
        }
    }
}

impl DiskHistory {
    /// Records that a data write was issued.
    pub fn write(&mut self, number: u32, issued: u64, start: u64, sectors: u64, wild: bool) {
        let index = self.note(number, issued, start, sectors, wild);
        for sector in start..start + sectors {
            self.by_sector.entry(sector).or_default().push(index);
        }
    }

    /// Records that a discard was issued.
    pub fn discard(&mut self, number: u32, issued: u64, start: u64, sectors: u64) {
        let index = self.note(number, issued, start, sectors, false);
        self.discards.push(index);
    }

    fn note(&mut self, number: u32, issued: u64, start: u64, sectors: u64, wild: bool) -> usize {
        let index = self.writes.len();
        self.by_number.insert(number, index);
        self.writes.push(Write {
            issued,
            answered: NEVER,
            okay: false,
            wild,
            stray: false,
            start,
            end: start + sectors,
            number,
        });
        index
    }

    /// Records that a write or discard was answered.
    pub fn answered(&mut self, number: u32, time: u64, okay: bool) {
        if let Some(write) = self.by_number.get(&number).map(|i| &mut self.writes[*i]) {
            write.answered = time;
            write.okay = okay;
        }
    }

    /// Forgets the answer to a request that was issued at this time, because the guest has not seen it; a read of these
    /// sectors counts as never made.
    pub fn unheard(&mut self, number: u32, issued: u64, sectors: Range<u64>) {
        if let Some(write) = self.by_number.get(&number).map(|i| &mut self.writes[*i]) {
            write.answered = NEVER;
            write.okay = false;
        }
        for sector in sectors {
            if let Some(seen) = self.seen.get_mut(&sector) {
                seen.retain(|seen| seen.issued != issued);
            }
        }
    }

    /// Records that a write may be executed after it was answered, if the answer was an error.
    pub fn stray(&mut self, number: u32) {
        if let Some(write) = self.by_number.get(&number).map(|i| &mut self.writes[*i]) {
            write.stray = true;
        }
    }

    fn covering(&self, sector: u64) -> impl Iterator<Item = (&Write, bool)> {
        let data = self.by_sector.get(&sector).into_iter().flatten();
        let data = data.map(|i| (&self.writes[*i], false));
        let discards = self.discards.iter().map(|i| (&self.writes[*i], true));
        data.chain(discards.filter(move |(w, _)| (w.start..w.end).contains(&sector)))
    }

    /// Explains the value that a read returned, which was issued and answered at these times; the error says why it
    /// cannot.
    ///
    /// `None` as value means bytes that no write of the history can have left.
    pub fn read(
        &mut self,
        sector: u64,
        found: Option<u64>,
        issued: u64,
        answered: u64,
    ) -> Result<(), String> {
        let write = self.explain(sector, found, issued, answered)?;
        let seen = self.seen.entry(sector).or_default();
        seen.push(SeenValue {
            issued,
            answered,
            value: found.unwrap_or(ZERO),
            write,
        });
        Ok(())
    }

    /// Explains a read without remembering it; returns when the write that it saw was issued.
    pub fn explain(
        &self,
        sector: u64,
        found: Option<u64>,
        issued: u64,
        answered: u64,
    ) -> Result<u64, String> {
        // Writes that were overwritten before this time cannot be seen any longer.
        let overwritten = self
            .covering(sector)
            .filter(|(w, _)| w.okay && w.answered < issued)
            .map(|(w, _)| w.issued);
        let observed = self.seen.get(&sector).into_iter().flatten();
        let observed = observed.filter(|s| s.answered < issued).map(|s| s.write);
        let floor = overwritten.chain(observed).max().unwrap_or(0);
        let matches = |w: &Write, discard: bool| {
            w.wild
                || found
                    == Some(if discard {
                        ZERO
                    } else {
                        value(w.number, sector)
                    })
        };
        let blank = (found == Some(ZERO) && floor == 0).then_some(0);
        let best = self
            .covering(sector)
            .filter(|(w, discard)| matches(w, *discard) && w.issued < answered && w.end() >= floor)
            .map(|(w, _)| w.issued)
            .chain(blank)
            .min();
        best.ok_or_else(|| {
            format!("sector {sector} read as {found:x?}, which no order of the writes explains")
        })
    }

    /// Checks all reads of all sectors together: there is one order of all accesses to a sector, in which what is over
    /// comes before what begins later, and every read sees the write before it. Returns the violations.
    ///
    /// One write makes each value, so an order exists if and only if no two values must have been on the disk at one
    /// time. Zeroes are left out, because any discard makes them.
    pub fn judge(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut sectors = self.sectors();
        sectors.sort_unstable();
        for sector in sectors {
            let clusters = self.clusters(sector);
            let forward = clusters.iter().filter(|c| c.forward().is_some());
            for one in forward {
                let mut others = clusters.iter().filter(|c| c.number != one.number);
                if let Some(other) = others.find(|other| one.clashes(other)) {
                    wrong.push(format!(
                        "sector {sector}: no order of all accesses explains that the writes {} \
                         and {} were seen as they were",
                        one.number, other.number
                    ));
                    break;
                }
            }
        }
        wrong
    }

    fn clusters(&self, sector: u64) -> Vec<Cluster> {
        let writes = self.by_sector.get(&sector).into_iter().flatten();
        let writes = writes.map(|i| &self.writes[*i]);
        // A stray write may have been executed before, by an earlier process.
        let writes = writes.filter(|w| !w.wild && (!w.stray || w.okay));
        let seen = self.seen.get(&sector).map_or(&[][..], |s| &s[..]);
        writes
            .map(|write| {
                let mine = |s: &&SeenValue| s.value == value(write.number, sector);
                let end = if write.okay { write.answered } else { NEVER };
                let reads = || seen.iter().filter(mine);
                Cluster {
                    number: write.number,
                    first_end: reads().map(|s| s.answered).fold(end, u64::min),
                    last_begin: reads().map(|s| s.issued).fold(write.issued, u64::max),
                }
            })
            .collect()
    }

    /// Returns the sectors that the history knows.
    pub fn sectors(&self) -> Vec<u64> {
        self.by_sector.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Write 1 over [1, 10], write 2 over [20, 30], both of sector 5 and answered without error.
    fn two_writes() -> DiskHistory {
        let mut history = DiskHistory::default();
        history.write(1, 1, 5, 1, false);
        history.answered(1, 10, true);
        history.write(2, 20, 5, 1, false);
        history.answered(2, 30, true);
        history
    }

    #[test]
    fn an_overwritten_value_is_not_explained() {
        let mut history = two_writes();
        assert!(history.read(5, Some(value(1, 5)), 31, 40).is_err());
        assert!(history.read(5, Some(value(2, 5)), 31, 40).is_ok());
    }

    #[test]
    fn during_a_write_both_values_are_explained() {
        for number in [1, 2] {
            let mut history = two_writes();
            assert!(history.read(5, Some(value(number, 5)), 25, 40).is_ok());
        }
    }

    #[test]
    fn a_value_does_not_come_back() {
        let mut history = two_writes();
        assert!(history.read(5, Some(value(2, 5)), 21, 22).is_ok());
        assert!(history.read(5, Some(value(1, 5)), 23, 24).is_err());
    }

    #[test]
    fn a_value_is_not_read_before_it_is_written() {
        let mut history = two_writes();
        assert!(history.read(5, Some(value(2, 5)), 11, 19).is_err());
        assert!(history.read(5, Some(ZERO), 11, 19).is_err());
    }

    #[test]
    fn a_failed_write_may_have_happened_or_not() {
        let mut history = two_writes();
        history.write(3, 41, 5, 1, false);
        history.answered(3, 50, false);
        assert!(history.explain(5, Some(value(2, 5)), 60, 70).is_ok());
        assert!(history.explain(5, Some(value(3, 5)), 60, 70).is_ok());
        assert!(history.explain(5, Some(value(1, 5)), 60, 70).is_err());
    }

    #[test]
    fn a_failed_write_that_strays_may_happen_at_any_time() {
        let mut history = two_writes();
        history.write(3, 41, 5, 1, false);
        history.answered(3, 50, false);
        history.write(4, 51, 5, 1, false);
        history.answered(4, 60, true);
        assert!(history.explain(5, Some(value(3, 5)), 61, 70).is_err());
        for number in [1, 3] {
            // A write that was answered without an error cannot become visible again.
            history.stray(number);
        }
        assert!(history.explain(5, Some(value(3, 5)), 61, 70).is_ok());
        assert!(history.explain(5, Some(value(4, 5)), 61, 70).is_ok());
        assert!(history.explain(5, Some(value(1, 5)), 61, 70).is_err());
    }

    #[test]
    fn what_nobody_has_heard_of_says_nothing() {
        let mut history = two_writes();
        history.write(3, 41, 5, 1, false);
        history.answered(3, 50, true);
        assert!(history.read(5, Some(value(3, 5)), 51, 60).is_ok());
        assert!(history.explain(5, Some(value(2, 5)), 61, 70).is_err());
        history.unheard(3, 41, 0..0);
        // A read has returned the value.
        assert!(history.explain(5, Some(value(2, 5)), 61, 70).is_err());
        history.unheard(9, 51, 5..6);
        for number in [2, 3] {
            assert!(history.explain(5, Some(value(number, 5)), 61, 70).is_ok());
        }
        assert!(history.explain(5, Some(value(1, 5)), 61, 70).is_err());
    }

    #[test]
    fn values_belong_to_their_sector_and_come_whole() {
        let mut history = two_writes();
        assert!(history.read(5, Some(value(2, 6)), 31, 40).is_err());
        let mut bytes = [0; SECTOR];
        encode(value(2, 5), &mut bytes);
        assert_eq!(decode(&bytes), Some(value(2, 5)));
        bytes[511] ^= 1;
        assert_eq!(decode(&bytes), None);
        assert!(history.read(5, None, 31, 40).is_err());
    }

    #[test]
    fn values_that_take_turns_are_not_explained_together() {
        // Two overlapping writes, neither of which is answered: each read alone can be explained.
        for (seen, wrong) in [
            (&[1, 2, 1][..], true),
            (&[1, 2, 2], false),
            (&[1, 1, 2], false),
            (&[2, 1, 1], false),
            (&[2, 1, 2], true),
        ] {
            let mut history = DiskHistory::default();
            history.write(1, 1, 5, 1, false);
            history.write(2, 2, 5, 1, false);
            for (at, number) in (1u64..).zip(seen) {
                let read = history.read(5, Some(value(*number, 5)), 10 * at, 10 * at + 1);
                assert_eq!(read, Ok(()));
            }
            assert_eq!(!history.judge().is_empty(), wrong, "{seen:?}");
        }
        assert_eq!(two_writes().judge(), Vec::<String>::new());
    }

    #[test]
    fn a_discard_is_a_write_of_zeros() {
        let mut history = two_writes();
        history.discard(3, 41, 0, 100);
        assert!(history.explain(5, Some(ZERO), 42, 43).is_ok());
        history.answered(3, 50, true);
        assert!(history.explain(5, Some(value(2, 5)), 51, 60).is_err());
    }
}
