// SPDX-License-Identifier: GPL-2.0-only

//! Waiting with the processor halted by the queue's own thread.
//!
//! A thread that goes to sleep makes way for the idle task, which halts the processor, that is, gives it to other domains;
//! the next event wakes the thread, and the idle task makes way for it. Where no other task could run, the thread halts
//! the processor itself: for Xen nothing differs, and two switches of tasks and a wake-up are saved, which cost more than
//! a small request.
//!
//! Linux counts the time as time of the thread, so a queue waits in this manner only while its waits are short: it must
//! not look busy while its guest does little.

use crate::linux;
use crate::linux::task::wake_event::LentEvent;
use crate::params;

/// Approximate number of waits that the mean covers.
const MEAN: u64 = 8;
/// A wait that lasts for this multiple of the longest mean ends in a sleep.
const LONGEST: u64 = 2;

/// How long one queue waits.
#[derive(Debug)]
pub(crate) struct HaltEstimator {
    /// Longest mean for which a queue halts, in nanoseconds; 0 for never.
    most: u64,
    /// Mean length of the last waits, in nanoseconds.
    mean: u64,
}

impl HaltEstimator {
    /// Makes the state of a queue that has not waited yet, and sleeps first.
    pub(crate) fn new() -> Self {
        let most = params::halt_nanoseconds();
        Self {
            most,
            mean: most.saturating_mul(LONGEST),
        }
    }

    /// Waits for a wake-up, if waits are short. Returns false if the thread has to sleep for that. `start` is the local clock
    /// at the beginning of the wait.
    pub(crate) fn wait(&self, lent: LentEvent<'_>, start: u64) -> bool {
        if self.most == 0 || self.mean > self.most {
            return false;
        }
        let longest = self.most.saturating_mul(LONGEST);
        loop {
            if lent.halt() {
                return true;
            }
            if linux::cpu_is_wanted() || linux::local_clock().saturating_sub(start) > longest {
                return false;
            }
        }
    }

    /// Learns that a wait, halted or asleep, lasted for this time.
    pub(crate) fn waited(&mut self, nanoseconds: u64) {
        // One long wait does not outweigh many short ones.
        let now = nanoseconds.min(self.most.saturating_mul(MEAN));
        self.mean = self
            .mean
            .saturating_sub(self.mean / MEAN)
            .saturating_add(now / MEAN);
    }
}
