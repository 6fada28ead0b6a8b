// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! How many requests of the frontend are worth an event while a process works on others: arithmetic without a clock.
//!
//! Each commit of the process takes the requests that have come since the last one, so they need no event, and the queue's
//! thread need not wake up for them. That delays a request until the next commit. The delay stays small against what the
//! request takes anyway if many others are with the process, and these end often.

use crate::running_mean::{running_mean, VALUES};

/// Longest mean time between two commits, in nanoseconds, with which requests gather. Slower storage loses more by a request
/// that it does not have yet than the processor gains.
const MOST_NS: u64 = 250_000;
/// The mean before the first commit.
const START_NS: u32 = 500_000;
/// Requests with the process for each one that may wait in the ring.
const SHARE: u32 = 2;

/// The commits of the process, as one queue sees them.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct RequestGathering {
    /// When the last commit was, in nanoseconds.
    last: u64,
    /// Mean time between two commits, in nanoseconds. Small, because the engine is on its thread's stack.
    mean: u32,
    /// The thread sleeps with a limit, so that no request waits for long if the process commits nothing more.
    is_limited: bool,
}

impl Default for RequestGathering {
    fn default() -> Self {
        Self {
            last: 0,
            mean: START_NS,
            is_limited: false,
        }
    }
}

impl RequestGathering {
    /// Records a pass that has answered requests at this time, in nanoseconds.
    pub(in crate::engine) fn answered(&mut self, now: u64) {
        // One long pause does not outweigh many short ones.
        let pause = now.saturating_sub(self.last);
        self.last = now;
        let pause = pause.min(MOST_NS.saturating_mul(VALUES));
        let mean = running_mean(self.mean.into(), pause);
        self.mean = u32::try_from(mean).unwrap_or(u32::MAX);
    }

    /// Returns how many requests are worth an event while `in_flight` others are with the process.
    fn worth(&self, in_flight: u16) -> u32 {
        match u64::from(self.mean) > MOST_NS {
            true => 1,
            false => (u32::from(in_flight) / SHARE).max(1),
        }
    }

    /// The thread is about to sleep: returns how many requests are worth an event. If that is more than one, it must sleep
    /// with a limit.
    pub(in crate::engine) fn before_sleep(&mut self, in_flight: u16) -> u32 {
        let worth = self.worth(in_flight);
        self.is_limited = worth > 1;
        worth
    }

    /// Returns how many requests are worth an event while the thread sleeps on.
    pub(in crate::engine) fn asleep(&self, in_flight: u16) -> u32 {
        match self.is_limited {
            true => self.worth(in_flight),
            false => 1,
        }
    }

    /// Reports whether the thread must sleep with a limit.
    pub(in crate::engine) fn is_limited(&self) -> bool {
        self.is_limited
    }
}
