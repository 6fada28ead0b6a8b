// SPDX-License-Identifier: MIT OR Apache-2.0
//! A part of the work of `convert` and `compare`: some ranges of a disk only, at a rate, for the program that started
//! this one.

use control::{Code, Failure};
use diskio::{Errno, Io};
use rustix::process::{getppid, set_parent_process_death_signal, Signal};
use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of a file of ranges at most: millions of ranges.
const LONGEST: u64 = 1 << 28;
/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Ranges of a disk, in order and apart from each other, in bytes: where each begins, and where it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DiskRanges(VecDeque<(u64, u64)>);

impl DiskRanges {
    /// Reads the ranges of a file, one a line, offset and length in bytes, as this prints them:
    /// `tap-ctl dirty GUEST VDEV --since NAME`.
    ///
    /// # Errors
    /// The file cannot be read, or a line is no range behind the one before.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let name = path.display();
        let failed = |error: io::Error| Failure::system(format!("cannot read {name}"), &error);
        let mut file = BufReader::new(File::open(path).map_err(failed)?.take(LONGEST));
        let mut ranges = Self::default();
        for (number, line) in file.by_ref().lines().enumerate() {
            let line = line.map_err(failed)?;
            ranges.add(&line).ok_or_else(|| {
                Failure::invalid(format!(
                    "{name}, line {}: {line:?} is no offset and length in whole sectors of 512 bytes behind the line \
                     before: make the file with `tap-ctl dirty GUEST VDEV --since NAME`",
                    number + 1
                ))
            })?;
        }
        // Ranges behind that would be left out without a word.
        match file.get_ref().limit() {
            0 => Err(Failure::invalid(format!(
                "{name} has more than {LONGEST} bytes of ranges: copy the whole disk"
            ))),
            _ => Ok(ranges),
        }
    }

    fn add(&mut self, line: &str) -> Option<()> {
        let mut words = line.split_whitespace().map(str::parse::<u64>);
        let (offset, length) = (words.next()?.ok()?, words.next()?.ok()?);
        let end = offset.checked_add(length)?;
        let last = self.0.back().map_or(0, |last| last.1);
        let is_whole = offset % SECTOR == 0 && length % SECTOR == 0;
        if words.next().is_some() || length == 0 || offset < last || !is_whole {
            return None;
        }
        match self.0.back_mut() {
            Some(last) if last.1 == offset => last.1 = end,
            _ => self.0.push_back((offset, end)),
        }
        Some(())
    }

    /// Returns the bytes in the ranges up to `end`.
    pub(crate) fn bytes(&self, end: u64) -> u64 {
        let each = self.0.iter();
        each.map(|(from, to)| (*to).min(end).saturating_sub(*from))
            .sum()
    }

    /// Returns the first byte of the ranges from `at` on, and the end of its range. Ranges before it are dropped.
    pub(crate) fn next(&mut self, at: u64) -> Option<(u64, u64)> {
        while self.0.front().is_some_and(|(_, end)| *end <= at) {
            self.0.pop_front();
        }
        let (from, end) = self.0.front()?;
        Some((at.max(*from), *end))
    }
}

/// Delays work so that it does not exceed a rate.
#[derive(Debug)]
pub(crate) struct WorkPace {
    /// Bytes in a second; nothing for as many as there are.
    rate: Option<u64>,
    begin: Instant,
    done: Cell<u64>,
}

impl WorkPace {
    /// Allows `mib` MiB in a second; `None` is no limit.
    pub(crate) fn new(mib: Option<u32>) -> Self {
        Self {
            rate: mib.map(|mib| u64::from(mib) << 20),
            begin: Instant::now(),
            done: Cell::new(0),
        }
    }

    /// Waits until the next bytes may be read, after these.
    pub(crate) async fn pay(&self, io: &Io, bytes: u64) -> Result<(), Failure> {
        let Some(rate) = self.rate else { return Ok(()) };
        self.done.set(self.done.get() + bytes);
        let due = Duration::from_secs_f64(self.done.get() as f64 / rate as f64);
        let wait = due.saturating_sub(self.begin.elapsed());
        if wait.is_zero() {
            return Ok(());
        }
        let waited = io.sleep(wait).await;
        waited.map_err(|error: Errno| Failure::system("cannot wait for the rate", &error.into()))
    }
}

/// Dies with the process that started this one, which has this number: nothing else is to end the work of a program that
/// was killed.
///
/// # Errors
/// The parent process has ended.
pub(crate) fn die_with(parent: u32) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| Failure::system("cannot die with the parent process", &error.into()))?;
    // It may have ended before that.
    let is = getppid().is_some_and(|pid| u32::try_from(pid.as_raw_nonzero().get()) == Ok(parent));
    match is {
        true => Ok(()),
        false => Err(Failure::new(
            Code::Gone,
            format!("process {parent}, which started this one, has ended"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::DiskRanges;

    fn ranges(text: &str) -> Option<DiskRanges> {
        let mut ranges = DiskRanges::default();
        text.lines().try_for_each(|line| ranges.add(line))?;
        Some(ranges)
    }

    #[test]
    fn ranges_are_visited_in_order() {
        let mut some = ranges("0 512\n512 512\n4096 1024").expect("ranges");
        assert_eq!((some.bytes(u64::MAX), some.bytes(4608)), (2048, 1536));
        assert_eq!(some.next(0), Some((0, 1024)));
        assert_eq!(some.next(512), Some((512, 1024)));
        assert_eq!(some.next(1024), Some((4096, 5120)));
        assert_eq!(some.next(5120), None);
        assert_eq!(ranges("").expect("none").next(0), None);
    }

    #[test]
    fn lines_that_are_no_ranges_are_refused() {
        for wrong in [
            "0",
            "a 512",
            "0 512 1",
            "0 0",
            "1 512",
            "0 100",
            "512 512\n0 512",
            "18446744073709551104 1024",
            "-512 512",
        ] {
            assert_eq!(ranges(wrong), None, "{wrong}");
        }
    }
}
