// SPDX-License-Identifier: MIT OR Apache-2.0
//! How far a verb is, for who waits.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Time between two messages: on a terminal, where each replaces the last one, and elsewhere.
const PERIODS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Bytes of a disk that are done.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Nothing if no progress is shown.
    shown: Option<ShownProgress>,
    all: u64,
    done: Cell<u64>,
}

#[derive(Debug)]
struct ShownProgress {
    is_terminal: bool,
    begin: Instant,
    last: Cell<Instant>,
}

impl Progress {
    /// Of `all` bytes. Progress is shown on a terminal, and elsewhere if `wanted` is set.
    pub(crate) fn new(all: u64, wanted: bool) -> Self {
        let is_terminal = io::stderr().is_terminal();
        let now = Instant::now();
        let shown = (is_terminal || wanted).then_some(ShownProgress {
            is_terminal,
            begin: now,
            last: Cell::new(now),
        });
        Self {
            shown,
            all,
            done: Cell::new(0),
        }
    }

    /// Adds to the number of bytes that are done.
    pub(crate) fn add(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        let Some(shown) = &self.shown else { return };
        let (terminal, other) = PERIODS;
        let period = if shown.is_terminal { terminal } else { other };
        if shown.last.get().elapsed() >= period {
            shown.last.set(Instant::now());
            self.show(shown, "");
        }
    }

    /// All bytes before that one are done.
    pub(crate) fn reach(&self, at: u64) {
        let at = at.min(self.all);
        self.add(at.saturating_sub(self.done.get()));
    }

    /// Percent.
    pub(crate) fn share(&self) -> u64 {
        // CAST: at most 100.
        (u128::from(self.done.get().min(self.all)) * 100 / u128::from(self.all.max(1))) as u64
    }

    /// Nothing comes after this.
    pub(crate) fn end(&self) {
        if let Some(shown) = &self.shown {
            self.show(shown, if shown.is_terminal { "\n" } else { "" });
        }
    }

    fn show(&self, shown: &ShownProgress, end: &str) {
        let line = line(
            self.done.get(),
            self.all,
            self.share(),
            shown.begin.elapsed(),
        );
        let text = match shown.is_terminal {
            true => format!("\r{line}\x1b[K{end}"),
            false => format!("{line}\n"),
        };
        // The reader may be gone.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

fn line(done: u64, all: u64, share: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let rate = if seconds > 0.0 {
        done as f64 / seconds
    } else {
        0.0
    };
    let left = match rate > 0.0 {
        true => ((all - done.min(all)) as f64 / rate).ceil() as u64,
        false => 0,
    };
    format!(
        "{share:3} %  {} of {}  {}/s  {}:{:02} left",
        bytes(done),
        bytes(all),
        bytes(rate as u64),
        left / 60,
        left % 60
    )
}

/// A number of bytes, so that it can be read.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if count >> shift > 0 {
            // One digit, cut off.
            // CAST: at most 10 * 2^24.
            let tenths = ((u128::from(count) * 10) >> shift) as u64;
            return match tenths % 10 {
                0 => format!("{} {unit}", tenths / 10),
                part => format!("{}.{part} {unit}", tenths / 10),
            };
        }
    }
    format!("{count} bytes")
}

#[cfg(test)]
mod tests {
    use super::{bytes, line};
    use std::time::Duration;

    #[test]
    fn numbers_can_be_read() {
        for (count, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn a_line() {
        assert_eq!(
            line(1 << 30, 4 << 30, 25, Duration::from_secs(10)),
            " 25 %  1 GiB of 4 GiB  102.3 MiB/s  0:30 left"
        );
        assert_eq!(
            line(0, 0, 0, Duration::ZERO),
            "  0 %  0 bytes of 0 bytes  0 bytes/s  0:00 left"
        );
    }
}
