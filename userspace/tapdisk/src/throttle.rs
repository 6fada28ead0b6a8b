// SPDX-License-Identifier: MIT OR Apache-2.0
//! Holds a guest's requests back, so that its disk does no more in a second than it may.
//!
//! For bytes and for requests there is a time at which all work that has passed would be over at the allowed rate. A
//! request may begin if that time is no further ahead than a burst. So an idle disk may then do much at once, a large
//! request pays for itself afterwards, and no sums are needed in between. A disk in a group has, beside its own limits,
//! a [share](share) of the group's, which the supervisor adjusts again and again.

mod group_share;

use crate::io_errors;
use crate::server::now_ns;
use control::tapdisk::Rules;
use control::{Code, Failure, Limits, RateShare, ShareUsage};
use diskio::{Errno, Gate, Runtime};
use group_share::RateAllotment;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::Duration;

const SECOND: u64 = 1_000_000_000;
/// A shorter wait, behind others that pass at once, is not counted.
const NOTICED: u64 = 1_000_000;

/// Time at which all work that has passed would be over at the allowed rate, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bucket {
    over: u64,
}

impl Bucket {
    /// Returns the nanoseconds that a request has to wait now, at a limit of `rate` in a second; 0 means no limit.
    fn wait(self, now: u64, rate: u64, burst_ns: u64) -> u64 {
        match rate {
            0 => 0,
            _ => self.over.saturating_sub(now).saturating_sub(burst_ns),
        }
    }

    /// Counts `amount` as passed.
    fn take(&mut self, now: u64, amount: u64, rate: u64) {
        let cost = u128::from(amount) * u128::from(SECOND) / u128::from(rate.max(1));
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        self.over = match rate {
            0 => 0,
            _ => self.over.max(now).saturating_add(cost),
        };
    }
}

/// The limits of a disk, and its use of them. They belong to the disk, whatever image it is served from.
#[derive(Debug, Default)]
pub struct Throttle {
    limits: Cell<Limits>,
    bytes: Cell<Bucket>,
    requests: Cell<Bucket>,
    /// The guest's requests pass in their order.
    gate: Gate,
    /// Tasks that wait for their time.
    waiting: RefCell<Vec<Waker>>,
    /// Grows when waiting tasks have to check again.
    changes: Cell<u64>,
    held: Cell<u64>,
    held_ns: Cell<u64>,
    /// Its share of its group's limits, if it is in a group.
    share: Cell<Option<RateAllotment>>,
    used: Cell<ShareUsage>,
    /// Tasks that wait for the next request.
    listening: RefCell<Vec<Waker>>,
}

impl Throttle {
    /// The limits.
    pub(crate) fn limits(&self) -> Limits {
        self.limits.get()
    }

    /// Something is limited: its own, or by its group.
    pub(crate) fn any(rules: &Rules) -> bool {
        rules.limits.any() || rules.share.is_some()
    }

    /// Returns true if requests pass at once, and without being counted.
    pub(crate) fn is_open(&self) -> bool {
        self.share.get().is_none() && !self.limits.get().any()
    }

    /// From now on there are these.
    pub(crate) fn set(&self, rules: &Rules) {
        if self.limits.get() != rules.limits {
            self.set_limits(rules.limits);
        }
        let now = now_ns();
        let share = rules.share.map(|share| match self.share.get() {
            Some(mut known) => {
                known.change(share, now);
                known
            }
            None => RateAllotment::new(share, now),
        });
        self.share.set(share);
        self.look_again();
    }

    fn set_limits(&self, limits: Limits) {
        self.limits.set(limits);
        // Requests that passed under another limit count at most as a burst of the new one.
        self.bytes.take();
        self.requests.take();
    }

    /// Changes its share of its group, and returns its use of the earlier ones.
    ///
    /// # Errors
    /// The disk is in no group any more.
    pub(crate) fn change_share(&self, share: RateShare) -> Result<ShareUsage, Failure> {
        let mut known = self.share.get().ok_or_else(|| {
            let why = "the disk is in no group, of whose limits it could have a share";
            Failure::new(Code::State, why)
        })?;
        known.change(share, now_ns());
        self.share.set(Some(known));
        self.look_again();
        let used = self.used.get();
        self.used.set(ShareUsage {
            lacks_bytes: false,
            lacks_requests: false,
            ..used
        });
        Ok(used)
    }

    /// Waits until more requests have come.
    pub(crate) async fn came_after(&self, came: u64) {
        poll_fn(|cx| match self.used.get().came > came {
            true => Poll::Ready(()),
            false => {
                io_errors::wait(&mut self.listening.borrow_mut(), cx.waker());
                Poll::Pending
            }
        })
        .await;
    }

    /// A request has come.
    fn came(&self) {
        let mut used = self.used.get();
        used.came += 1;
        self.used.set(used);
        for waker in self.listening.take() {
            waker.wake();
        }
    }

    /// Lets waiting tasks check again after a change.
    pub(crate) fn look_again(&self) {
        self.changes.set(self.changes.get().wrapping_add(1));
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Returns the number of requests that had to wait, and their waiting time in nanoseconds, since the last call.
    pub(crate) fn take_held(&self) -> (u64, u64) {
        (self.held.take(), self.held_ns.take())
    }

    /// Waits until a request of `bytes` bytes may begin; returns false if `is_wanted` cancels it before that.
    pub(crate) async fn pass(
        &self,
        runtime: &Runtime,
        bytes: u64,
        is_wanted: impl Fn() -> Wanted,
    ) -> bool {
        if self.share.get().is_some() {
            self.came();
        } else if !self.limits.get().any() {
            return true;
        }
        let begun = now_ns();
        let _turn = self.gate.alone().await;
        let mut now = now_ns();
        loop {
            let limits = self.limits.get();
            match is_wanted() {
                // The guest is not the reason for this, so it does not pay for it.
                Wanted::Now => return true,
                Wanted::NoMore => return false,
                Wanted::InTime => {}
            }
            let wait = self.wait(now, &limits).max(self.wait_for_group(now));
            if wait == 0 {
                break;
            }
            if let Err(error) = self.sleep(runtime, Duration::from_nanos(wait)).await {
                // Better it does too much than nothing.
                diskio::say!("tapdisk: cannot wait for a limit: {error}");
                break;
            }
            now = now_ns();
        }
        let limits = self.limits.get();
        let (mut all, mut each) = (self.bytes.get(), self.requests.get());
        all.take(now, bytes, limits.bytes);
        each.take(now, 1, limits.requests.into());
        self.bytes.set(all);
        self.requests.set(each);
        self.take_of_group(now, bytes);
        let waited = now.saturating_sub(begun);
        if waited >= NOTICED {
            self.held.set(self.held.get() + 1);
            self.held_ns.set(self.held_ns.get().saturating_add(waited));
        }
        true
    }

    fn wait(&self, now: u64, limits: &Limits) -> u64 {
        let burst = u64::from(limits.burst_s).saturating_mul(SECOND);
        let bytes = self.bytes.get().wait(now, limits.bytes, burst);
        let requests = limits.requests.into();
        bytes.max(self.requests.get().wait(now, requests, burst))
    }

    /// Returns the nanoseconds that its group makes it wait now.
    fn wait_for_group(&self, now: u64) -> u64 {
        let Some(mut share) = self.share.get() else {
            return 0;
        };
        let waits = share.wait(now);
        self.share.set(Some(share));
        let mut used = self.used.get();
        used.lacks_bytes |= waits.bytes > 0;
        used.lacks_requests |= waits.requests > 0;
        self.used.set(used);
        waits.longest()
    }

    fn take_of_group(&self, now: u64, bytes: u64) {
        let Some(mut share) = self.share.get() else {
            return;
        };
        share.take(now, bytes);
        self.share.set(Some(share));
        let mut used = self.used.get();
        used.requests += 1;
        used.bytes = used.bytes.saturating_add(bytes);
        self.used.set(used);
    }

    /// Sleeps for so long, or until something changes.
    async fn sleep(&self, runtime: &Runtime, time: Duration) -> Result<(), Errno> {
        let before = self.changes.get();
        let changed = poll_fn(|cx| match self.changes.get() == before {
            true => {
                io_errors::wait(&mut self.waiting.borrow_mut(), cx.waker());
                Poll::Pending
            }
            false => Poll::Ready(Ok(())),
        });
        match runtime.io.within(time, changed).await {
            Err(Errno::TIMEDOUT) => Ok(()),
            result => result,
        }
    }
}

/// Fate of a request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The request is executed in its time.
    InTime,
    /// The request is executed at once: a task waits until no request is under way.
    Now,
    /// The request is cancelled here.
    NoMore,
}

#[cfg(test)]
mod tests {
    use super::{Bucket, Throttle, Wanted, SECOND};
    use control::tapdisk::Rules;
    use control::{GroupRate, Limits, RateShare};
    use diskio::Runtime;
    use proptest::prelude::*;
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::time::{Duration, Instant};

    proptest! {
        /// For any sequence of requests: no window of time has more than its share, a burst and one request.
        #[test]
        fn no_window_has_more_than_its_share(
            steps in prop::collection::vec((0..SECOND, 1..4_000_000_u64), 1..200),
            rate in 1_000_000..50_000_000_u64,
            burst_s in 1..4_u64,
        ) {
            let burst = burst_s * SECOND;
            let (mut bucket, mut now) = (Bucket::default(), SECOND);
            let mut passed: Vec<(u64, u64)> = Vec::new();
            for (pause, amount) in steps {
                now += pause;
                now += bucket.wait(now, rate, burst);
                prop_assert_eq!(bucket.wait(now, rate, burst), 0);
                bucket.take(now, amount, rate);
                passed.push((now, amount));
            }
            for (index, (from, _)) in passed.iter().enumerate() {
                let mut sum = 0;
                for (at, amount) in &passed[index..] {
                    let share = u128::from(at - from + burst) * u128::from(rate) / u128::from(SECOND);
                    prop_assert!(u128::from(sum) <= share + 1, "{sum} in {} ns", at - from);
                    sum += amount;
                }
            }
        }
    }

    fn limits(requests: u32) -> Rules {
        Rules {
            limits: Limits {
                requests,
                ..Limits::default()
            },
            ..Rules::default()
        }
    }

    #[test]
    fn only_a_disk_without_limits_and_group_is_open() {
        let throttle = Throttle::default();
        assert!(throttle.is_open());
        throttle.set(&limits(10));
        assert!(!throttle.is_open());
        throttle.set(&Rules {
            share: Some(share(10)),
            ..Rules::default()
        });
        assert!(!throttle.is_open());
        throttle.set(&Rules::default());
        assert!(throttle.is_open());
    }

    /// Returns a share of that many requests in a second, for an hour.
    fn share(requests: u64) -> RateShare {
        let pace = GroupRate {
            bytes: None,
            milli_requests: Some(requests * 1000),
        };
        RateShare {
            pace,
            until: Duration::from_nanos(super::now_ns()) + Duration::from_secs(3600),
            after: pace,
            from: Duration::ZERO,
            burst_s: 1,
        }
    }

    /// Starts requests at once, and returns the order in which they pass, and how long they take.
    fn pass(throttle: &Rc<Throttle>, count: u32, wanted: Wanted) -> (Vec<u32>, Duration) {
        let (runtime, order) = (Runtime::new(), Rc::new(RefCell::new(Vec::new())));
        let begun = Instant::now();
        for number in 0..count {
            let (throttle, order, its) = (throttle.clone(), order.clone(), runtime.clone());
            runtime.tasks.spawn(async move {
                if throttle.pass(&its, 512, || wanted).await {
                    order.borrow_mut().push(number);
                }
            });
        }
        runtime.finish().unwrap();
        (order.take(), begun.elapsed())
    }

    #[test]
    fn what_is_too_much_waits_in_its_order() {
        let throttle = Rc::new(Throttle::default());
        throttle.set(&limits(100));
        // A burst, and half a second more.
        let (order, time) = pass(&throttle, 150, Wanted::InTime);
        assert_eq!(order, (0..150).collect::<Vec<_>>());
        assert!(time >= Duration::from_millis(480), "{time:?}");
        let (held, ns) = throttle.take_held();
        assert!((1..=50).contains(&held) && ns > 0, "{held} {ns}");
        assert_eq!(throttle.take_held(), (0, 0));
    }

    #[test]
    fn who_waits_for_quiet_does_not_wait_for_a_limit() {
        let throttle = Rc::new(Throttle::default());
        throttle.set(&limits(10));
        pass(&throttle, 11, Wanted::InTime);
        let (order, time) = pass(&throttle, 200, Wanted::Now);
        assert_eq!(order.len(), 200);
        assert!(time < Duration::from_secs(5), "{time:?}");
        // The guest does not pay for that later either.
        let (_, time) = pass(&throttle, 1, Wanted::InTime);
        assert!(time < Duration::from_secs(5), "{time:?}");
        let (order, _) = pass(&throttle, 100, Wanted::NoMore);
        assert!(order.is_empty());
    }

    #[test]
    fn limit_that_is_taken_away_is_heard_by_who_waits() {
        let throttle = Rc::new(Throttle::default());
        throttle.set(&Rules {
            limits: Limits {
                bytes: 1 << 20,
                ..Limits::default()
            },
            ..Rules::default()
        });
        let (runtime, its) = (Runtime::new(), throttle.clone());
        let again = runtime.clone();
        let waits = async move {
            // The second one would wait for minutes.
            for _ in 0..2 {
                its.pass(&again, 1 << 30, || Wanted::InTime).await;
            }
        };
        runtime.tasks.spawn(waits);
        let (its, again) = (throttle.clone(), runtime.clone());
        runtime.tasks.spawn(async move {
            again.io.sleep(Duration::from_millis(50)).await.unwrap();
            its.set(&Rules::default());
        });
        let begun = Instant::now();
        runtime.finish().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn share_of_a_group_holds_beside_the_limits() {
        let throttle = Rc::new(Throttle::default());
        assert!(throttle.change_share(share(50)).is_err());
        throttle.set(&Rules {
            share: Some(share(50)),
            ..limits(1000)
        });
        // Nothing was saved up, so this takes half a second.
        let (order, time) = pass(&throttle, 26, Wanted::InTime);
        assert_eq!(order.len(), 26);
        assert!(time >= Duration::from_millis(480), "{time:?}");
        let used = throttle.change_share(share(5000)).expect("used");
        assert_eq!((used.came, used.requests, used.bytes), (26, 26, 26 * 512));
        assert!(used.lacks_requests && !used.lacks_bytes, "{used:?}");
        // The report comes once, and a waiting task learns of a larger share.
        let used = throttle.change_share(share(5000)).expect("used");
        assert!(!used.lacks_requests, "{used:?}");
        let begun = Instant::now();
        let (_, time) = pass(&throttle, 100, Wanted::InTime);
        assert!(time < Duration::from_secs(1), "{time:?}");
        throttle.set(&Rules::default());
        assert!(throttle.change_share(share(50)).is_err());
        pass(&throttle, 1000, Wanted::InTime);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn larger_share_is_heard_by_who_waits() {
        let throttle = Rc::new(Throttle::default());
        throttle.set(&Rules {
            share: Some(share(0)),
            ..Rules::default()
        });
        let runtime = Runtime::new();
        let (its, again) = (throttle.clone(), runtime.clone());
        runtime.tasks.spawn(async move {
            for _ in 0..2 {
                its.pass(&again, 512, || Wanted::InTime).await;
            }
        });
        let (its, again) = (throttle.clone(), runtime.clone());
        runtime.tasks.spawn(async move {
            // The first one is owed, and the second one has come.
            its.came_after(1).await;
            again.io.sleep(Duration::from_millis(20)).await.unwrap();
            let used = its.change_share(share(1000)).unwrap();
            assert_eq!((used.came, used.requests), (2, 1));
            assert!(used.lacks_requests);
        });
        let begun = Instant::now();
        runtime.finish().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}
