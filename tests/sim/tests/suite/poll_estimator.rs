// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Benefit of polling: the polls and sleeps of a queue cost little more than the better of both would have, whatever
//! its guest does.

use blkback::poll_estimator::PollEstimator;
use sim::rng::Rng;

const SLEEP: u64 = 20_000;

/// A queue, and the cost of its waits in nanoseconds.
struct PolledQueue {
    estimator: PollEstimator,
    waits: u64,
    looks: u64,
    cost: u64,
}

impl PolledQueue {
    fn new(sleep: u64) -> Self {
        Self {
            estimator: PollEstimator::new(sleep),
            waits: 0,
            looks: 0,
            cost: 0,
        }
    }

    /// Waits once for work that arrives after `after` nanoseconds; `gather` requests arrive during a sleep.
    fn wait(&mut self, after: u64, gather: u32) {
        self.waits += 1;
        let limit = self.estimator.begin();
        assert!(limit <= SLEEP);
        if limit > 0 {
            self.looks += 1;
            self.cost += after.min(limit);
            self.estimator.looked(after.min(limit), after <= limit);
            if after <= limit {
                return;
            }
        }
        self.cost += SLEEP;
        self.estimator.slept(after);
        self.estimator.served(gather);
    }

    fn run(&mut self, waits: u64, after: u64, gather: u32) -> u64 {
        let before = self.looks;
        (0..waits).for_each(|_| self.wait(after, gather));
        self.looks - before
    }
}

#[test]
fn a_guest_that_comes_back_sooner_than_a_sleep_is_worth_is_looked_for() {
    let mut queue = PolledQueue::new(SLEEP);
    assert!(queue.run(1000, SLEEP / 4, 1) >= 980);
    assert!(queue.cost < 1000 * SLEEP * 3 / 10);
}

#[test]
fn a_guest_that_comes_back_later_is_not() {
    let mut queue = PolledQueue::new(SLEEP);
    assert!(queue.run(1000, 5 * SLEEP / 2, 1) <= 2);
    assert!(queue.cost < 1000 * SLEEP * 102 / 100);
}

#[test]
fn where_requests_gather_in_a_sleep_each_is_worth_less_looking() {
    let mut queue = PolledQueue::new(SLEEP);
    // Polling for each of them would cost more than one sleep for all of them.
    queue.run(100, SLEEP / 4, 6);
    assert!(queue.run(1000, SLEEP / 4, 6) <= 20);
    // Requests that follow each other closely cost less with polling than with a sleep, so the queue polls.
    assert!(queue.run(1000, SLEEP / 20, 6) >= 900);
}

#[test]
fn a_guest_that_changes_its_ways_is_followed() {
    let mut queue = PolledQueue::new(SLEEP);
    for _ in 0..10 {
        queue.run(100, SLEEP / 4, 1);
        assert!(queue.run(100, SLEEP / 4, 1) >= 97);
        queue.run(100, 3 * SLEEP, 1);
        assert!(queue.run(100, 3 * SLEEP, 1) <= 3);
    }
    // The queue polls now, with success; only a sleep shows that requests gather.
    queue.run(1000, SLEEP / 4, 1);
    queue.run(1000, SLEEP / 4, 64);
    assert!(queue.run(640, SLEEP / 4, 64) <= 40);
}

#[test]
fn nothing_costs_more_than_twice_the_better_of_both() {
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let mut queue = PolledQueue::new(SLEEP);
        let (mut always_look, mut always_sleep) = (0u64, 0u64);
        while queue.waits < 4000 {
            // A guest keeps its behaviour for a while.
            let (mean, length) = (rng.below(4 * SLEEP) + 1, rng.below(200) + 1);
            for _ in 0..length {
                let after = rng.below(2 * mean);
                always_look += after;
                always_sleep += SLEEP;
                queue.wait(after, 1);
            }
        }
        let better = always_look.min(always_sleep);
        assert!(
            queue.cost <= 2 * better,
            "seed {seed}: {queue_cost} for {better}",
            queue_cost = queue.cost
        );
    }
}

#[test]
fn others_on_the_processor_make_looking_free_or_harmful() {
    let mut worth = PollEstimator::new(SLEEP);
    worth.is_free();
    assert_eq!(worth.begin(), SLEEP);
    worth.is_harmful();
    assert_eq!(worth.begin(), 0);
    worth.is_free();
    worth.interrupted();
    // That sleep was the rest of a wait that began with polling.
    worth.slept(100 * SLEEP);
    assert_eq!(worth.begin(), SLEEP);
}

#[test]
fn zero_never_looks() {
    let mut queue = PolledQueue::new(0);
    assert_eq!(queue.run(1000, 0, 1) + queue.run(1000, 1, 1), 0);
}

#[test]
fn nothing_that_is_measured_overflows() {
    let mut rng = Rng::new(7);
    for sleep in [1, SLEEP, u64::MAX] {
        let mut worth = PollEstimator::new(sleep);
        for _ in 0..2000 {
            assert!(worth.begin() <= sleep);
            let time = [0, 1, sleep, u64::MAX][rng.below(4) as usize];
            match rng.below(4) {
                0 => worth.looked(time, true),
                1 => worth.looked(time, false),
                2 => worth.slept(time),
                _ => worth.served(time as u32),
            }
        }
    }
}
