// SPDX-License-Identifier: MIT OR Apache-2.0
//! Statistics in memory that survives this process, so that a death does not reset them.
//!
//! There are two places, which are used in turn, because a process may be killed while it writes one. A text begins
//! with its version and its number and ends with that number; of two the higher one counts. An invalid text is ignored.

use control::stats::{Counter, Stats};
use diskio::Errno;
use rustix::io::{pread, pwrite};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Bytes of the memory.
pub(crate) const SIZE: u64 = 2 * PLACE as u64;
/// Bytes of one of its places.
const PLACE: usize = 32 << 10;
/// Time between two texts.
const PERIOD: Duration = Duration::from_secs(1);
/// First word of a text of this version.
const VERSION: &str = "tapdisk-stats-1";

/// The memory.
#[derive(Debug)]
pub(crate) struct PersistentStats {
    memory: OwnedFd,
    /// Number of the last text.
    number: Cell<u64>,
    written: Cell<Instant>,
    /// Number of counts at that time.
    counted: Cell<u64>,
    /// A task waits to wake this process when the next text is due.
    is_awaited: Cell<bool>,
}

/// The numbers of texts are below this, so that they never run out, even if a hostile process left a high one.
const NUMBERS: u64 = 1 << 62;

impl PersistentStats {
    /// Takes the memory, and returns the statistics of an earlier process.
    pub(crate) fn new(memory: OwnedFd) -> Result<(Self, Option<Stats>), Errno> {
        let mut found = [None, None];
        for (place, text) in (0..).zip(&mut found) {
            let mut bytes = vec![0; PLACE];
            let offset = place * PLACE as u64;
            let count = pread(&memory, &mut bytes, offset)?;
            *text = bytes.get(..count).and_then(parse);
        }
        let last = found
            .into_iter()
            .flatten()
            .max_by_key(|(number, _)| *number);
        let before = last.as_ref().map(|(_, stats)| stats.clone());
        let kept = Self {
            memory,
            number: Cell::new(last.as_ref().map_or(0, |(number, _)| *number)),
            written: Cell::new(Instant::now()),
            counted: Cell::new(before.as_ref().map_or(0, counted)),
            is_awaited: Cell::new(false),
        };
        Ok((kept, before))
    }

    /// Returns the time until the next text is due; `None` if all counts are stored.
    pub(crate) fn is_due(&self, stats: &Stats) -> Option<Duration> {
        let is_new = counted(stats) != self.counted.get();
        is_new.then(|| PERIOD.saturating_sub(self.written.get().elapsed()))
    }

    /// Returns true to the first caller, until its wait is [over](Self::awaited): that one wakes this process when the
    /// next text is due.
    pub(crate) fn must_await(&self) -> bool {
        !self.is_awaited.replace(true)
    }

    pub(crate) fn awaited(&self) {
        self.is_awaited.set(false);
    }

    /// Writes the next text.
    pub(crate) fn write(&self, stats: &Stats) -> Result<(), Errno> {
        self.written.set(Instant::now());
        self.counted.set(counted(stats));
        let number = self.number.get().wrapping_add(1);
        // Numbers and names of ours always become text.
        let body = serde_json::to_string(stats).map_err(|_| Errno::INVAL)?;
        let text = format!("{VERSION} {number} {}\n{body}\n{number}\n", body.len());
        if text.len() > PLACE {
            return Err(Errno::NOSPC);
        }
        let offset = number % 2 * PLACE as u64;
        let count = pwrite(&self.memory, text.as_bytes(), offset)?;
        if count < text.len() {
            return Err(Errno::NOSPC);
        }
        self.number.set(number);
        Ok(())
    }
}

/// A text that is whole.
fn parse(bytes: &[u8]) -> Option<(u64, Stats)> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let (head, rest) = bytes.split_at_checked(end + 1)?;
    let mut words = std::str::from_utf8(head).ok()?.split_whitespace();
    if words.next()? != VERSION {
        return None;
    }
    let number = words.next()?.parse().ok().filter(|n| *n < NUMBERS)?;
    let (body, rest) = rest.split_at_checked(words.next()?.parse().ok()?)?;
    let tail = format!("\n{number}\n");
    if !rest.starts_with(tail.as_bytes()) {
        return None;
    }
    let stats = serde_json::from_slice(body).ok().and_then(own)?;
    Some((number, stats))
}

/// Returns an earlier process's counters, without its momentary values. A number that no counter can reach is not from
/// a tapdisk, so the text is refused: it would overflow.
fn own(stats: Stats) -> Option<Stats> {
    let counters = counters(&stats);
    let own = |counter: &Counter| {
        let mut requests = counter.latency.counts.iter();
        let rest = [counter.requests, counter.errors];
        let fits = |count: &u64| *count < NUMBERS / 64;
        requests.all(fits) && rest.iter().all(fits) && counter.bytes < NUMBERS
    };
    let is_own = counters.into_iter().all(own);
    let others = [stats.replayed, stats.nbd];
    if !is_own || others.iter().any(|count| *count >= NUMBERS) {
        return None;
    }
    Some(Stats {
        read: stats.read,
        write: stats.write,
        flush: stats.flush,
        discard: stats.discard,
        zeroes: stats.zeroes,
        replayed: stats.replayed,
        nbd: stats.nbd,
        held: stats.held.min(NUMBERS),
        held_ns: stats.held_ns.min(NUMBERS),
        failed_traces: stats.failed_traces.min(NUMBERS),
        owed: stats.owed.filter(|error| (1..4096).contains(error)),
        ..Stats::default()
    })
}

fn counters(stats: &Stats) -> [&Counter; 5] {
    [
        &stats.read,
        &stats.write,
        &stats.flush,
        &stats.discard,
        &stats.zeroes,
    ]
}

/// Returns the sum of all counters, which grows with each request.
fn counted(stats: &Stats) -> u64 {
    let requests = counters(stats).map(|counter| counter.requests);
    requests
        .iter()
        .fold(stats.nbd, |sum, n| sum.wrapping_add(*n))
}

#[cfg(test)]
mod tests {
    use super::{parse, PersistentStats, NUMBERS, PERIOD, PLACE, SIZE, VERSION};
    use control::stats::Stats;
    use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
    use rustix::io::pwrite;
    use std::os::fd::OwnedFd;

    fn memory() -> OwnedFd {
        let memory = memfd_create("kept", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memory, SIZE).unwrap();
        memory
    }

    fn stats(nbd: u64) -> Stats {
        Stats {
            nbd,
            ..Stats::default()
        }
    }

    #[test]
    fn the_latest_text_that_is_whole_counts() {
        let memory = memory();
        let (kept, before) = PersistentStats::new(memory.try_clone().unwrap()).unwrap();
        assert_eq!(before, None);
        for nbd in 1..=3 {
            kept.write(&stats(nbd)).unwrap();
        }
        let (kept, before) = PersistentStats::new(memory.try_clone().unwrap()).unwrap();
        assert_eq!(before, Some(stats(3)));
        kept.write(&stats(4)).unwrap();
        // The process was killed while it wrote that one: the middle is of an older text.
        pwrite(&memory, b"tapdisk-stats-1 9", 0).unwrap();
        let (_, before) = PersistentStats::new(memory).unwrap();
        assert_eq!(before, Some(stats(3)));
    }

    #[test]
    fn is_due_when_something_is_new() {
        let (kept, _) = PersistentStats::new(memory()).unwrap();
        assert_eq!(kept.is_due(&stats(0)), None);
        let soon = kept.is_due(&stats(1)).expect("something is new");
        assert!(soon <= PERIOD);
        kept.write(&stats(1)).unwrap();
        assert_eq!(kept.is_due(&stats(1)), None);
        assert!(kept.must_await() && !kept.must_await());
        kept.awaited();
        assert!(kept.must_await());
    }

    /// The next process continues the counts, so no number may be near its limit, and it must not report the driver's
    /// facts of an earlier process as its own.
    #[test]
    fn what_a_hostile_process_left_is_nothing_or_harmless() {
        let text = |number: u64, stats: &Stats| {
            let body = serde_json::to_string(stats).unwrap();
            format!("{VERSION} {number} {}\n{body}\n{number}\n", body.len())
        };
        assert_eq!(parse(text(u64::MAX, &stats(1)).as_bytes()), None);
        assert_eq!(parse(text(NUMBERS, &stats(1)).as_bytes()), None);
        assert!(parse(text(NUMBERS - 1, &stats(1)).as_bytes()).is_some());
        assert_eq!(parse(text(1, &stats(u64::MAX)).as_bytes()), None);
        let mut large = stats(1);
        large.write.bytes = u64::MAX;
        assert_eq!(parse(text(1, &large).as_bytes()), None);
        large.write.bytes = 0;
        large.write.latency.counts[3] = u64::MAX;
        assert_eq!(parse(text(1, &large).as_bytes()), None);
        let mut foreign = stats(5);
        foreign.driver.insert("clusters".into(), 7);
        foreign.in_flight = 9;
        let found = parse(text(1, &foreign).as_bytes());
        assert_eq!(found, Some((1, stats(5))));
    }

    #[test]
    fn what_another_program_left_is_nothing() {
        let memory = memory();
        pwrite(&memory, &[0xff; PLACE], 0).unwrap();
        pwrite(&memory, b"tapdisk-stats-2 7 2\n{}\n7\n", PLACE as u64).unwrap();
        let (kept, before) = PersistentStats::new(memory.try_clone().unwrap()).unwrap();
        assert_eq!(before, None);
        kept.write(&stats(1)).unwrap();
        assert_eq!(PersistentStats::new(memory).unwrap().1, Some(stats(1)));
        for text in [
            "",
            "\n",
            "tapdisk-stats-1 1 9999\n{}\n1\n",
            "tapdisk-stats-1 1 2\n{}\n2\n",
        ] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }
}
