// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was counted, in memory that the next process gets: so a death does not set it back.
//!
//! There are two places, written in turn: a process may be killed while it writes one. A text begins
//! with its version and its number and ends with that number; of two the higher one counts. What is
//! not understood counts as nothing.

use control::stats::Stats;
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
/// What a text of this version begins with.
const VERSION: &str = "tapdisk-stats-1";

/// The memory.
#[derive(Debug)]
pub(crate) struct Kept {
    memory: OwnedFd,
    /// Number of the last text.
    number: Cell<u64>,
    written: Cell<Instant>,
}

impl Kept {
    /// Uses memory, and returns what an earlier process left there.
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
        let kept = Self {
            memory,
            number: Cell::new(last.as_ref().map_or(0, |(number, _)| *number)),
            written: Cell::new(Instant::now()),
        };
        Ok((kept, last.map(|(_, stats)| stats)))
    }

    /// It is time for the next text.
    pub(crate) fn is_due(&self) -> bool {
        self.written.get().elapsed() >= PERIOD
    }

    /// Writes the next text.
    pub(crate) fn write(&self, stats: &Stats) -> Result<(), Errno> {
        self.written.set(Instant::now());
        let number = self.number.get() + 1;
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
    let number: u64 = words.next()?.parse().ok()?;
    let (body, rest) = rest.split_at_checked(words.next()?.parse().ok()?)?;
    let tail = format!("\n{number}\n");
    if !rest.starts_with(tail.as_bytes()) {
        return None;
    }
    Some((number, serde_json::from_slice(body).ok()?))
}

#[cfg(test)]
mod tests {
    use super::{parse, Kept, PLACE, SIZE};
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
        let (kept, before) = Kept::new(memory.try_clone().unwrap()).unwrap();
        assert_eq!(before, None);
        for nbd in 1..=3 {
            kept.write(&stats(nbd)).unwrap();
        }
        let (kept, before) = Kept::new(memory.try_clone().unwrap()).unwrap();
        assert_eq!(before, Some(stats(3)));
        kept.write(&stats(4)).unwrap();
        // The process was killed while it wrote that one: the middle is of an older text.
        pwrite(&memory, b"tapdisk-stats-1 9", 0).unwrap();
        let (_, before) = Kept::new(memory).unwrap();
        assert_eq!(before, Some(stats(3)));
    }

    #[test]
    fn what_another_program_left_is_nothing() {
        let memory = memory();
        pwrite(&memory, &[0xff; PLACE], 0).unwrap();
        pwrite(&memory, b"tapdisk-stats-2 7 2\n{}\n7\n", PLACE as u64).unwrap();
        let (kept, before) = Kept::new(memory.try_clone().unwrap()).unwrap();
        assert_eq!(before, None);
        kept.write(&stats(1)).unwrap();
        assert_eq!(Kept::new(memory).unwrap().1, Some(stats(1)));
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
