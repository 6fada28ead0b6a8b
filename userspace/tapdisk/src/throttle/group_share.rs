// SPDX-License-Identifier: MIT OR Apache-2.0
//! The part of its group's limits that a disk has at the moment.
//!
//! A purse counts what may be done now, and not the time at which earlier work would be over, because the pace changes
//! all the time: credit and debt stay the same in bytes, whatever the pace becomes. A disk that was just opened has no
//! credit, so a new process gains nothing over the old one. Credit is at most a burst at the present pace, so disks
//! whose paces together never exceed the group's never have more credit than the group's burst.

use control::{GroupRate, RateShare, MILLI};
use std::time::Duration;

const SECOND: i128 = 1_000_000_000;
/// Nanoseconds after which a disk without a pace checks again; a new pace wakes it earlier.
const LONGEST: u64 = 3_600_000_000_000;

/// Credit in billionths of a byte or request, and its time in nanoseconds. A debt is below 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RateCredit {
    have: i128,
    at: u64,
}

impl RateCredit {
    /// Time has passed, at this pace.
    fn fill(&mut self, now: u64, pace: Option<u64>, burst_s: u32) {
        let time = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        let Some(pace) = pace else {
            self.have = 0;
            return;
        };
        let pace = i128::from(pace);
        let most = pace.saturating_mul(burst_s.into()).saturating_mul(SECOND);
        let gained = pace.saturating_mul(time.into());
        self.have = self.have.saturating_add(gained).min(most);
    }

    /// Nanoseconds until something may begin.
    fn wait(self, pace: Option<u64>) -> u64 {
        match pace {
            None => 0,
            Some(_) if self.have >= 0 => 0,
            Some(0) => LONGEST,
            Some(pace) => {
                let pace = i128::from(pace);
                let ns = (-self.have).saturating_add(pace - 1) / pace;
                u64::try_from(ns).unwrap_or(LONGEST).min(LONGEST)
            }
        }
    }

    fn take(&mut self, amount: u64, pace: Option<u64>) {
        if pace.is_some() {
            let cost = i128::from(amount).saturating_mul(SECOND);
            self.have = self.have.saturating_sub(cost);
        }
    }
}

/// Time that a request has to wait, for each kind of limit, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Waits {
    pub(super) bytes: u64,
    pub(super) requests: u64,
}

impl Waits {
    /// Nanoseconds.
    pub(super) fn longest(self) -> u64 {
        self.bytes.max(self.requests)
    }
}

/// A share, and its remaining credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RateAllotment {
    share: RateShare,
    bytes: RateCredit,
    requests: RateCredit,
}

impl RateAllotment {
    /// Makes the allotment of a disk without credit.
    pub(super) fn new(share: RateShare, now: u64) -> Self {
        let empty = RateCredit { have: 0, at: now };
        Self {
            share,
            bytes: empty,
            requests: empty,
        }
    }

    /// Replaces the share; the credit stays, up to a burst of the new one. A share that is older than the present one
    /// is ignored.
    pub(super) fn change(&mut self, share: RateShare, now: u64) {
        self.fill(now);
        if share.until < self.share.until {
            return;
        }
        self.share = share;
        self.fill(now);
    }

    fn pace(&self, now: u64) -> GroupRate {
        self.share.pace_at(Duration::from_nanos(now))
    }

    /// Returns the times at which its pace changes, in nanoseconds.
    fn turns(&self) -> [u64; 2] {
        [self.share.until, self.share.from]
            .map(|turn| u64::try_from(turn.as_nanos()).unwrap_or(u64::MAX))
    }

    fn fill(&mut self, now: u64) {
        for turn in self.turns() {
            let before = self.bytes.at;
            if before < turn && turn < now {
                self.fill_at(turn, self.pace(before));
            }
        }
        self.fill_at(now, self.pace(self.bytes.at));
        // Credit is limited to a burst of the present pace.
        self.fill_at(now, self.pace(now));
    }

    fn fill_at(&mut self, now: u64, pace: GroupRate) {
        let burst_s = self.share.burst_s;
        self.bytes.fill(now, pace.bytes, burst_s);
        self.requests.fill(now, pace.milli_requests, burst_s);
    }

    /// Returns the time that a request has to wait now.
    pub(super) fn wait(&mut self, now: u64) -> Waits {
        self.fill(now);
        let pace = self.pace(now);
        // Afterwards it may be quicker.
        let turns = self.turns().into_iter().filter(|turn| *turn > now);
        let at_first = turns.min().map_or(LONGEST, |turn| turn - now);
        Waits {
            bytes: self.bytes.wait(pace.bytes).min(at_first),
            requests: self.requests.wait(pace.milli_requests).min(at_first),
        }
    }

    /// DirtyBitmap that a request of that many bytes begins.
    pub(super) fn take(&mut self, now: u64, bytes: u64) {
        self.fill(now);
        let pace = self.pace(now);
        self.bytes.take(bytes, pace.bytes);
        self.requests.take(MILLI, pace.milli_requests);
    }
}

#[cfg(test)]
mod tests {
    use super::{GroupRate, RateAllotment, RateShare};
    use proptest::prelude::*;
    use std::time::Duration;

    const MS: u64 = 1_000_000;
    const SECOND: u64 = 1000 * MS;
    const GRACE: Duration = Duration::from_millis(500);

    fn share(pace: u64, until: u64, after: u64, burst_s: u32) -> RateShare {
        let bytes = |pace| GroupRate {
            bytes: Some(pace),
            milli_requests: None,
        };
        RateShare {
            pace: bytes(pace),
            until: Duration::from_nanos(until),
            after: bytes(after),
            from: Duration::from_nanos(until) + GRACE,
            burst_s,
        }
    }

    #[derive(Clone, Debug)]
    enum ShareStep {
        /// A request, after a pause.
        Request(u64, u64),
        /// Another share, after a pause: the pause, its pace, its time, and the pace after that.
        Share(u64, u64, u64, u64),
    }

    fn step() -> impl Strategy<Value = ShareStep> {
        let pace = || 0..20_000_000_u64;
        let pause = || prop_oneof![3 => 0..50 * MS, 1 => 0..3 * SECOND];
        prop_oneof![
            4 => (pause(), 1..2_000_000_u64).prop_map(|(pause, bytes)| ShareStep::Request(pause, bytes)),
            1 => (pause(), pace(), 0..3 * SECOND, pace())
                .prop_map(|(pause, at_first, time, after)| ShareStep::Share(pause, at_first, time, after)),
        ]
    }

    /// Bytes that the announced shares allow between two moments, in whole milliseconds.
    struct AllowedBytes(Vec<(u64, RateShare)>);

    impl AllowedBytes {
        fn pace(&self, at: u64) -> u64 {
            let (_, share) = self
                .0
                .iter()
                .rev()
                .find(|(from, _)| *from <= at)
                .expect("one");
            share
                .pace_at(Duration::from_nanos(at))
                .bytes
                .expect("a pace")
        }
    }

    proptest! {
        /// For any sequence of requests and shares: no window has more than its shares, the burst of its beginning, and
        /// one request.
        #[test]
        fn no_window_has_more_than_what_was_told(
            steps in prop::collection::vec(step(), 1..60),
            burst_s in 1..4_u32,
        ) {
            // In whole milliseconds, so that the sum over a window is exact.
            let whole = |ns: u64| ns.div_ceil(MS) * MS;
            let mut now = SECOND;
            let first = share(1_000_000, 2 * SECOND, 500_000, burst_s);
            let (mut of, mut told) = (RateAllotment::new(first, now), AllowedBytes(vec![(now, first)]));
            let mut passed: Vec<(u64, u64)> = Vec::new();
            for step in steps {
                match step {
                    ShareStep::Request(pause, bytes) => {
                        now = whole(now + pause);
                        loop {
                            match of.wait(now).longest() {
                                0 => break,
                                _ if now > 600 * SECOND => return Ok(()),
                                wait => now = whole(now + wait),
                            }
                        }
                        of.take(now, bytes);
                        passed.push((now, bytes));
                    }
                    ShareStep::Share(pause, pace, time, after) => {
                        now = whole(now + pause);
                        let last = told.0.last().expect("one").1.until;
                        let until = last.max(Duration::from_nanos(whole(now + time)));
                        let until = u64::try_from(until.as_nanos()).expect("small");
                        let next = share(pace, until, after, burst_s);
                        of.change(next, now);
                        told.0.push((now, next));
                    }
                }
            }
            for (index, (from, _)) in passed.iter().enumerate() {
                let mut allowed = u128::from(told.pace(*from)) * u128::from(burst_s) * u128::from(SECOND);
                // Credit from just before a lower pace is gone.
                let before = told.pace(from.saturating_sub(MS).max(SECOND));
                allowed = allowed.max(u128::from(before) * u128::from(burst_s) * u128::from(SECOND));
                let (mut at, mut sum) = (*from, 0_u128);
                for (when, bytes) in &passed[index..] {
                    while at < *when {
                        allowed += u128::from(told.pace(at)) * u128::from(MS);
                        at += MS;
                    }
                    prop_assert!(sum * u128::from(SECOND) <= allowed, "{sum} from {from} to {when}");
                    sum += u128::from(*bytes);
                }
            }
        }
    }

    #[test]
    fn who_owes_still_owes_with_another_share() {
        let mut of = RateAllotment::new(share(1000, 10 * SECOND, 500, 1), 0);
        of.take(0, 1000);
        assert_eq!(of.wait(0).bytes, SECOND);
        of.change(share(2000, 10 * SECOND, 500, 1), 0);
        assert_eq!(of.wait(0).bytes, SECOND / 2);
        // Nothing can be done until the share ends, when it is looked at again; nor a moment after that.
        of.change(share(0, 10 * SECOND, 500, 1), 0);
        assert_eq!(of.wait(0).bytes, 10 * SECOND);
        assert_eq!(of.wait(10 * SECOND).bytes, 500 * MS);
        assert_eq!(of.wait(10 * SECOND + 500 * MS).bytes, 2 * SECOND);
        assert_eq!(of.wait(13 * SECOND).bytes, 0);
        // An older share that arrives late changes nothing.
        of.change(share(u64::MAX, SECOND, u64::MAX, 1), 13 * SECOND);
        of.take(13 * SECOND, 750);
        assert_eq!(of.wait(13 * SECOND).bytes, SECOND);
    }

    #[test]
    fn nothing_is_saved_up_before_the_first_second() {
        let mut of = RateAllotment::new(share(1000, 100 * SECOND, 500, 2), 0);
        of.take(0, 1);
        assert_eq!(of.wait(0).bytes, MS);
        // A burst of two seconds, and one request.
        let mut begun = 0;
        while of.wait(50 * SECOND).longest() == 0 {
            of.take(50 * SECOND, 100);
            begun += 1;
        }
        assert_eq!(begun, 21);
    }

    #[test]
    fn what_has_no_pace_is_not_limited() {
        let mut of = RateAllotment::new(share(1000, SECOND, 500, 1), 0);
        for _ in 0..1000 {
            assert_eq!(of.wait(0).requests, 0);
            of.take(0, 0);
        }
        assert_eq!(of.wait(0).longest(), 0);
    }
}
