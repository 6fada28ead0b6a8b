// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Whether polling is worth more than a sleep: arithmetic without a clock.
//!
//! A sleep costs about the same however long it is: an event of the guest, decisions of the hypervisor, an interrupt,
//! switches of tasks. Polling costs each nanosecond that it takes. So a queue polls for no longer than a sleep costs:
//! then no wait costs more than two sleeps. And it does not poll where sleeping was the better choice, on average, at
//! the last waits: then few waits cost that much. A sleep in which several requests gather is cheaper for each of them,
//! and justifies less polling in proportion.

/// While a queue polls, one wait in this number is a sleep at once, to learn what a sleep is good for.
const SLEEP_ONCE: u32 = 64;
/// While a queue sleeps, one wait in this number is polled first. That is rare, because the length of each sleep says whether
/// polling would have paid off, except where other domains share the processor; and because each such wait is a slow one:
/// with one in a hundred, a guest would see it in its 99th percentile.
const POLL_ONCE: u32 = 1024;
/// Approximate number of values that the running mean of the gain covers.
const MEAN: i64 = 8;
/// Fractions of a request in which the mean number of requests is counted. The mean follows quickly, because a queue
/// that polls with success sleeps rarely.
const PARTS: u32 = 64;
/// Largest number of requests that counts for one sleep.
const MOST_SERVED: u32 = 1024;

/// Averages that a queue has learned from its waits.
#[derive(Debug)]
pub struct PollEstimator {
    /// Cost of a sleep, in nanoseconds of polling.
    sleep: u64,
    /// Mean gain of polling at a wait, in nanoseconds.
    gain: i64,
    /// Mean number of requests that a sleep serves, in [`PARTS`]; at least one request.
    served: u32,
    /// Waits until one is done the other way.
    waits: u32,
    /// The result of this wait is recorded already.
    known: bool,
}

impl PollEstimator {
    /// Makes the state of a queue that has not waited yet.
    pub fn new(sleep: u64) -> Self {
        Self {
            sleep,
            gain: 0,
            served: PARTS,
            waits: SLEEP_ONCE,
            known: false,
        }
    }

    /// Begins a wait. Returns the nanoseconds to poll before going to sleep; 0 for going to sleep at once.
    pub fn begin(&mut self) -> u64 {
        self.known = false;
        let polls = self.gain > 0;
        let period = if polls { SLEEP_ONCE } else { POLL_ONCE };
        self.waits = self.waits.min(period).saturating_sub(1);
        let other_way = self.waits == 0;
        if other_way {
            self.waits = period;
        }
        if polls != other_way {
            self.limit()
        } else {
            0
        }
    }

    /// Records that the queue polled for this time and found work or not.
    pub fn looked(&mut self, nanoseconds: u64, found: bool) {
        self.known = true;
        let limit = if found { self.limit() } else { 0 };
        let gain = signed(limit).saturating_sub(signed(nanoseconds));
        // Clocks of two processors may differ by any time.
        self.learn(gain.max(signed(self.sleep).saturating_neg()));
    }

    /// Records that polling was interrupted, which says nothing about how long it would have had to last.
    pub fn interrupted(&mut self) {
        self.known = true;
    }

    /// Records that polling costs nothing, because others had the processor until there was work.
    pub fn is_free(&mut self) {
        self.known = true;
        self.gain = signed(self.sleep);
    }

    /// Records that polling keeps the processor from others.
    pub fn is_harmful(&mut self) {
        self.known = true;
        self.gain = 0;
    }

    /// Records the length of a sleep in nanoseconds.
    pub fn slept(&mut self, nanoseconds: u64) {
        if self.known {
            return;
        }
        let limit = signed(self.limit());
        let gain = limit.saturating_sub(signed(nanoseconds));
        self.learn(gain.max(limit.saturating_neg()));
    }

    /// Records how many requests had gathered at the end of a sleep.
    pub fn served(&mut self, requests: u32) {
        let now = requests.clamp(1, MOST_SERVED);
        let sum = self.served.saturating_add(now.saturating_mul(PARTS));
        self.served = (sum / 2).max(PARTS);
    }

    /// Returns the nanoseconds of polling that cost as much as one request's share of a sleep.
    fn limit(&self) -> u64 {
        let parts = self.sleep.saturating_mul(PARTS.into());
        parts.checked_div(self.served.into()).unwrap_or(self.sleep)
    }

    fn learn(&mut self, gain: i64) {
        let step = gain.saturating_sub(self.gain) / MEAN;
        self.gain = self.gain.saturating_add(step);
    }
}

fn signed(nanoseconds: u64) -> i64 {
    i64::try_from(nanoseconds).unwrap_or(i64::MAX)
}
