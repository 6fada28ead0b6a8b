// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A delayed check runs when the first of its callers needs it.

use blkback::due::DueTime;
use sim::rng::Rng;

/// A timer, as the kernel's work queue has one.
#[derive(Default)]
struct Timer(Option<u64>);

#[test]
fn a_later_look_is_brought_forward_and_an_earlier_one_stays() {
    let mut due = DueTime::NEVER;
    assert!(due.wants(100, 30_100));
    assert!(due.wants(200, 1_200), "half a minute is too late");
    assert!(!due.wants(300, 5_000), "what is due before that stays");
    assert!(due.wants(1_200, 5_000), "what has run is not due");
}

/// The kernel's timers count ticks: a timer may fire some milliseconds before its time.
#[test]
fn a_timer_that_fires_early_is_set_again() {
    let mut due = DueTime::NEVER;
    assert!(due.wants(100, 200));
    due.fired();
    assert!(
        due.wants(197, 200),
        "the look was too early and is due again"
    );
}

#[test]
fn whoever_wants_a_look_gets_one_in_time() {
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let (mut due, mut timer, mut now) = (DueTime::NEVER, Timer::default(), 1);
        let mut wanted: Vec<u64> = Vec::new();
        for _ in 0..200 {
            now += rng.below(50);
            let early = rng.below(4);
            if timer.0.is_some_and(|at| at <= now + early) {
                // The timer fires, perhaps early, and all callers that still wait ask again.
                timer.0 = None;
                due.fired();
                wanted.retain(|at| *at > now);
                for at in &wanted {
                    if due.wants(now, *at) {
                        timer.0 = Some(*at);
                    }
                }
            }
            let at = now + 1 + rng.below(300);
            wanted.push(at);
            if due.wants(now, at) {
                timer.0 = Some(at);
            }
            let first = wanted.iter().min().copied();
            assert_eq!(timer.0, first, "seed {seed}");
        }
    }
}
