// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Whether looking for work is worth more than a sleep: arithmetic without a clock.
//!
//! A sleep costs about the same however long it is: an event of the guest, decisions of the
//! hypervisor, an interrupt, switches of tasks. Who looks pays for each nanosecond instead. So nobody
//! looks for longer than a sleep costs: then no wait costs more than two sleeps. And nobody looks
//! where sleeping was the better choice, on average, at the last waits: then few cost that much.
//! A sleep in which several requests gather is cheaper for each of them, and worth that much less
//! looking.

/// Of so many waits one is done the other way, to learn what that would be like now.
const OTHER_WAY: u32 = 64;
/// The mean of what looking gains is that of about so many values.
const MEAN: i64 = 8;
/// Parts of a request in which the mean of requests is counted. It follows quickly: a queue that
/// looks with success sleeps rarely.
const PARTS: u32 = 64;
/// Most requests that count for one sleep.
const MOST_SERVED: u32 = 1024;

/// What one queue has learned from its waits.
#[derive(Debug)]
pub struct Worth {
    /// What a sleep costs, in nanoseconds of looking.
    sleep: u64,
    /// What looking would have gained at a wait, in nanoseconds; a mean.
    gain: i64,
    /// Requests that a sleep serves, a mean, in [`PARTS`]; at least one.
    served: u32,
    /// Waits until one is done the other way.
    waits: u32,
    /// What this wait was like is known already.
    known: bool,
}

impl Worth {
    /// Of a queue that has not waited yet.
    pub fn new(sleep: u64) -> Self {
        Self {
            sleep,
            gain: 0,
            served: PARTS,
            waits: OTHER_WAY,
            known: false,
        }
    }

    /// Nanoseconds to look at this wait before going to sleep; 0 for going to sleep at once.
    pub fn begin(&mut self) -> u64 {
        self.known = false;
        self.waits = self.waits.saturating_sub(1);
        let other_way = self.waits == 0;
        if other_way {
            self.waits = OTHER_WAY;
        }
        if (self.gain > 0) != other_way {
            self.limit()
        } else {
            0
        }
    }

    /// It was looked for so long, and there was work or not.
    pub fn looked(&mut self, nanoseconds: u64, found: bool) {
        self.known = true;
        let limit = if found { self.limit() } else { 0 };
        let gain = signed(limit).saturating_sub(signed(nanoseconds));
        // Clocks of two processors may differ by any time.
        self.learn(gain.max(signed(self.sleep).saturating_neg()));
    }

    /// It was looked, which says nothing about how long that would have had to be.
    pub fn interrupted(&mut self) {
        self.known = true;
    }

    /// Others had the processor until there was work: looking costs nothing.
    pub fn is_free(&mut self) {
        self.known = true;
        self.gain = signed(self.sleep);
    }

    /// Looking keeps the processor from others.
    pub fn is_harmful(&mut self) {
        self.known = true;
        self.gain = 0;
    }

    /// The sleep took so long.
    pub fn slept(&mut self, nanoseconds: u64) {
        if self.known {
            return;
        }
        let limit = signed(self.limit());
        let gain = limit.saturating_sub(signed(nanoseconds));
        self.learn(gain.max(limit.saturating_neg()));
    }

    /// So many requests had gathered at the end of a sleep.
    pub fn served(&mut self, requests: u32) {
        let now = requests.clamp(1, MOST_SERVED);
        let sum = self.served.saturating_add(now.saturating_mul(PARTS));
        self.served = (sum / 2).max(PARTS);
    }

    /// Nanoseconds of looking for one request that cost what the request's part of a sleep costs.
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
