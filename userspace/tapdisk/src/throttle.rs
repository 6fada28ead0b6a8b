// SPDX-License-Identifier: MIT OR Apache-2.0
//! Holds a guest's requests back, so that its disk does no more in a second than it may.
//!
//! For bytes and for requests there is a time at which what was let through so far would be over at the rate that is
//! allowed. A request may begin if that time is no further ahead than a burst. So a disk that did nothing may do much
//! at once, a large request pays for itself afterwards, and nothing has to be added up in between.

use crate::server::now_ns;
use control::Limits;
use diskio::{Errno, Gate, Runtime};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::Duration;

const SECOND: u64 = 1_000_000_000;
/// A shorter wait, behind others that pass at once, is not counted.
const NOTICED: u64 = 1_000_000;

/// When what was let through would be over, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bucket {
    over: u64,
}

impl Bucket {
    /// How long something has to wait now, of which `rate` may be done in a second. 0 limits nothing.
    fn wait(self, now: u64, rate: u64, burst_ns: u64) -> u64 {
        match rate {
            0 => 0,
            _ => self.over.saturating_sub(now).saturating_sub(burst_ns),
        }
    }

    /// So much is let through.
    fn take(&mut self, now: u64, amount: u64, rate: u64) {
        let cost = u128::from(amount) * u128::from(SECOND) / u128::from(rate.max(1));
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        self.over = match rate {
            0 => 0,
            _ => self.over.max(now).saturating_add(cost),
        };
    }
}

/// The limits of a disk, and what it has used of them. They are its own, whatever image it is served from.
#[derive(Debug, Default)]
pub struct Throttle {
    limits: Cell<Limits>,
    bytes: Cell<Bucket>,
    requests: Cell<Bucket>,
    /// The guest's requests pass in their order.
    gate: Gate,
    /// Who waits for its time.
    waiting: RefCell<Vec<Waker>>,
    /// Grows when who waits has to look again.
    changes: Cell<u64>,
    held: Cell<u64>,
    held_ns: Cell<u64>,
}

impl Throttle {
    /// The limits.
    pub(crate) fn limits(&self) -> Limits {
        self.limits.get()
    }

    /// From now on there are these.
    pub(crate) fn set(&self, limits: Limits) {
        self.limits.set(limits);
        // What was let through under another limit counts no more than a burst of the new one.
        self.bytes.take();
        self.requests.take();
        self.look_again();
    }

    /// Something has changed for those who wait.
    pub(crate) fn look_again(&self) {
        self.changes.set(self.changes.get().wrapping_add(1));
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Requests that had to wait, and how long, since this was asked last.
    pub(crate) fn take_held(&self) -> (u64, u64) {
        (self.held.take(), self.held_ns.take())
    }

    /// Waits until a request of so many bytes may begin; false if `is_wanted` says before that it is not to.
    pub(crate) async fn pass(
        &self,
        runtime: &Runtime,
        bytes: u64,
        is_wanted: impl Fn() -> Wanted,
    ) -> bool {
        if !self.limits.get().any() {
            return true;
        }
        let begun = now_ns();
        let _turn = self.gate.alone().await;
        let mut now = now_ns();
        loop {
            let limits = self.limits.get();
            match is_wanted() {
                // It is not the guest that wants it now, so it does not pay for it.
                Wanted::Now => return true,
                Wanted::NoMore => return false,
                Wanted::InTime => {}
            }
            let wait = self.wait(now, &limits);
            if wait == 0 {
                break;
            }
            if let Err(error) = self.sleep(runtime, Duration::from_nanos(wait)).await {
                // Better it does too much than nothing.
                eprintln!("tapdisk: cannot wait for a limit: {error}");
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

    /// Sleeps for so long, or until something changes.
    async fn sleep(&self, runtime: &Runtime, time: Duration) -> Result<(), Errno> {
        let before = self.changes.get();
        let changed = poll_fn(|cx| match self.changes.get() == before {
            true => {
                crate::troubles::wait(&mut self.waiting.borrow_mut(), cx.waker());
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

/// What becomes of a request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// It is executed when it may.
    InTime,
    /// It is executed at once: somebody waits until nothing is under way.
    Now,
    /// It is not executed here any more.
    NoMore,
}

#[cfg(test)]
mod tests {
    use super::{Bucket, Throttle, Wanted, SECOND};
    use control::Limits;
    use diskio::Runtime;
    use proptest::prelude::*;
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::time::{Duration, Instant};

    proptest! {
        /// Whatever comes when: in no window of time there is more than its share, a burst and one request.
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

    fn limits(requests: u32) -> Limits {
        Limits {
            requests,
            ..Limits::default()
        }
    }

    /// Requests that begin at once, in which order they pass, and how long they take.
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
        throttle.set(limits(100));
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
        throttle.set(limits(10));
        pass(&throttle, 11, Wanted::InTime);
        let (order, time) = pass(&throttle, 200, Wanted::Now);
        assert_eq!(order.len(), 200);
        assert!(time < Duration::from_secs(5), "{time:?}");
        // Nor does the guest pay for that if it goes on.
        let (_, time) = pass(&throttle, 1, Wanted::InTime);
        assert!(time < Duration::from_secs(5), "{time:?}");
        let (order, _) = pass(&throttle, 100, Wanted::NoMore);
        assert!(order.is_empty());
    }

    #[test]
    fn limit_that_is_taken_away_is_heard_by_who_waits() {
        let throttle = Rc::new(Throttle::default());
        throttle.set(Limits {
            bytes: 1 << 20,
            ..Limits::default()
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
            its.set(Limits::default());
        });
        let begun = Instant::now();
        runtime.finish().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}
