// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Whether a thread should halt the processor while it waits, or sleep: arithmetic without a clock.
//!
//! A halt is cheaper than a sleep where nothing else runs on the processor. Where other tasks do, such as the threads of other
//! disks, a wake-up of one of them ends the halt, and the scheduler first has to decide between that task and the one that
//! halts: the wait costs as much as a sleep, and the other task begins later.

use crate::running_mean::{running_mean, VALUES};

/// A wait that lasts for this multiple of the longest mean ends in a sleep.
const LONGEST: u64 = 2;
/// One halt in a mean of halts.
const WHOLE: u64 = 1024;
/// Part of the halts, in [`WHOLE`], that other tasks may end before a queue sleeps instead.
const MOST_ENDED: u64 = WHOLE * 3 / 8;
/// Part that counts when a queue tries halts again.
const ENDED_AGAIN: u64 = WHOLE / 4;
/// Waits in which a queue sleeps before it tries again. So many that a guest does not see the slower waits of the attempts in
/// its 99th percentile.
const SLEEPS: u32 = 512;

/// How long one queue waits, and what ends its halts.
#[derive(Debug)]
pub struct HaltEstimator {
    /// Longest mean for which a queue halts, in nanoseconds; 0 for never.
    most: u64,
    /// Mean length of the last waits, in nanoseconds.
    mean: u64,
    /// Part of the last halts that another task has ended, in [`WHOLE`].
    ended: u64,
    /// Waits in which the queue sleeps, because of that part.
    sleeps: u32,
}

impl HaltEstimator {
    /// Makes the state of a queue that has not waited yet, and sleeps first. `most` is the longest mean of its waits, in
    /// nanoseconds, for which it halts.
    pub fn new(most: u64) -> Self {
        Self {
            most,
            mean: most.saturating_mul(LONGEST),
            ended: 0,
            sleeps: 0,
        }
    }

    /// Begins a wait. Returns the nanoseconds for which the thread may halt; `None` if it has to sleep.
    pub fn begin(&mut self) -> Option<u64> {
        if self.most == 0 || self.mean > self.most {
            return None;
        }
        if let Some(left) = self.sleeps.checked_sub(1) {
            self.sleeps = left;
            return None;
        }
        Some(self.most.saturating_mul(LONGEST))
    }

    /// Records a halt, which another task has ended or not.
    pub fn halted(&mut self, by_other: bool) {
        self.ended = running_mean(self.ended, if by_other { WHOLE } else { 0 });
        if self.ended > MOST_ENDED {
            self.ended = ENDED_AGAIN;
            self.sleeps = SLEEPS;
        }
    }

    /// Learns that a wait, halted or asleep, lasted for this time.
    pub fn waited(&mut self, nanoseconds: u64) {
        // One long wait does not outweigh many short ones.
        let now = nanoseconds.min(self.most.saturating_mul(VALUES));
        self.mean = running_mean(self.mean, now);
    }
}
