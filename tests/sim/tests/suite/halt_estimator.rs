// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Halts of a queue's thread: where waits are short, and other tasks end few of them.

use blkback::halt_estimator::HaltEstimator;
use sim::rng::Rng;

const MOST: u64 = 500_000;
const SHORT: u64 = MOST / 5;

/// Lets a queue wait; other tasks end the given part of its halts, in a hundred. Returns the number of halts.
fn run(estimator: &mut HaltEstimator, rng: &mut Rng, waits: u32, length: u64, ended: u64) -> u32 {
    let mut halts = 0;
    for _ in 0..waits {
        if estimator.begin().is_some() {
            halts += 1;
            estimator.halted(rng.percent(ended));
        }
        estimator.waited(length);
    }
    halts
}

fn estimator() -> (HaltEstimator, Rng) {
    let (mut estimator, mut rng) = (HaltEstimator::new(MOST), Rng::new(1));
    // So many short waits that it halts.
    run(&mut estimator, &mut rng, 100, SHORT, 0);
    (estimator, rng)
}

#[test]
fn a_queue_halts_in_short_waits_only() {
    let (mut estimator, mut rng) = estimator();
    assert_eq!(run(&mut estimator, &mut rng, 1000, SHORT, 0), 1000);
    run(&mut estimator, &mut rng, 100, MOST * 3, 0);
    assert_eq!(run(&mut estimator, &mut rng, 1000, MOST * 3, 0), 0);
    assert!(run(&mut estimator, &mut rng, 1000, SHORT, 0) > 950);
}

#[test]
fn a_queue_that_must_never_halt_does_not() {
    let mut estimator = HaltEstimator::new(0);
    assert_eq!(run(&mut estimator, &mut Rng::new(1), 1000, 1, 0), 0);
}

#[test]
fn a_queue_whose_halts_others_end_sleeps() {
    for ended in [70, 85, 100] {
        let (mut estimator, mut rng) = estimator();
        let halts = run(&mut estimator, &mut rng, 10_000, SHORT, ended);
        // It still tries, in fewer than one of a hundred waits.
        assert!((20..100).contains(&halts), "{halts} at {ended} %");
    }
}

#[test]
fn a_queue_whose_halts_others_rarely_end_goes_on() {
    let (mut estimator, mut rng) = estimator();
    let halts = run(&mut estimator, &mut rng, 10_000, SHORT, 5);
    assert!(halts > 9000, "{halts}");
}

#[test]
fn a_queue_that_is_alone_again_halts_soon() {
    let (mut estimator, mut rng) = estimator();
    run(&mut estimator, &mut rng, 1000, SHORT, 100);
    let halts = run(&mut estimator, &mut rng, 1000, SHORT, 0);
    assert!(halts >= 1000 - 512, "{halts}");
}
