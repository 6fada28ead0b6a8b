// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Retries of a failed connect: soon after a shortage has passed, and seldom for a frontend that is refused again and
//! again, whatever it does in between.

use blkback::connect_retry::{is_shortage, store_recovers, ConnectRetry};
use seeds::Seeds;
use sim::rng::Rng;

const MS: u64 = 1_000_000;
const S: u64 = 1000 * MS;

/// A frontend that connects as often as it may, for a number of seconds; returns the number of refusals.
///
/// `is_good` decides for each of its connects whether it works, and `after` how long it does something else afterwards.
fn refusals(
    seconds: u64,
    mut is_good: impl FnMut() -> bool,
    mut after: impl FnMut() -> u64,
) -> u32 {
    let mut retry = ConnectRetry::NEW;
    let (mut now, mut refused) = (S, 0);
    while now < seconds * S {
        now += u64::from(retry.left_ms(now)) * MS;
        assert_eq!(retry.left_ms(now), 0, "a pause that does not end");
        if is_good() {
            retry.connected();
        } else {
            retry.refused(now);
            refused += 1;
        }
        now += after();
    }
    refused
}

#[test]
fn a_frontend_does_not_choose_how_often_it_is_refused() {
    // Each refusal can cost a line in the log, so an hour must not have many.
    const MOST: u32 = 160;
    let always = refusals(3600, || false, || MS);
    assert!(always <= MOST, "{always} refusals in an hour");
    for good_ones in 1..5 {
        let mut turn = 0;
        let alternates = || {
            turn += 1;
            turn % (good_ones + 1) != 0
        };
        let refused = refusals(3600, alternates, || MS);
        assert!(
            refused <= MOST,
            "{refused} refusals in an hour with {good_ones} connects that work after each"
        );
    }
    for seed in Seeds::new(20) {
        let mut rng = Rng::new(seed);
        let mut other = Rng::new(seed ^ 1);
        let refused = refusals(3600, || rng.percent(50), || other.below(3000) * MS);
        assert!(
            refused <= MOST,
            "{refused} refusals in an hour, seed {seed}"
        );
    }
}

#[test]
fn refusals_are_forgotten_with_time() {
    let mut retry = ConnectRetry::NEW;
    let mut now = S;
    for _ in 0..15 {
        retry.refused(now);
        now += u64::from(retry.left_ms(now)) * MS;
    }
    now += 3600 * S;
    assert_eq!(retry.left_ms(now), 0);
    retry.refused(now);
    assert!(retry.left_ms(now) <= 2, "{}", retry.left_ms(now));
}

#[test]
fn a_shortage_is_looked_at_again_with_a_growing_pause() {
    let mut retry = ConnectRetry::NEW;
    let (mut now, mut before) = (S, 0);
    for attempt in 0..100 {
        assert_eq!(retry.left_ms(now), 0);
        retry.ran_short(now);
        let pause = retry.left_ms(now);
        assert!(pause >= before, "pause {attempt} is shorter than the last");
        assert!((100..=5000).contains(&pause), "pause {attempt}: {pause} ms");
        before = pause;
        now += u64::from(pause) * MS;
    }
    assert_eq!(before, 5000, "the pause stopped growing");
    retry.connected();
    retry.ran_short(now);
    assert_eq!(retry.left_ms(now), 100, "the next shortage is a new one");
}

#[test]
fn a_shortage_does_not_make_up_for_refusals() {
    let mut retry = ConnectRetry::NEW;
    let mut now = S;
    for _ in 0..15 {
        retry.refused(now);
        now += u64::from(retry.left_ms(now)) * MS;
    }
    retry.refused(now);
    let pause = retry.left_ms(now);
    retry.ran_short(now);
    assert_eq!(retry.left_ms(now), pause);
    retry.connected();
    assert_eq!(retry.left_ms(now), pause, "the frontend chose the pause");
}

#[test]
fn a_clock_that_differs_between_processors_ends_no_pause_early() {
    let mut retry = ConnectRetry::NEW;
    retry.refused(10 * S);
    assert!(retry.left_ms(10 * S - MS) >= retry.left_ms(10 * S));
}

#[test]
fn what_passes_by_itself() {
    // ENOMEM, EDQUOT, EAGAIN, EBUSY, ENOSPC, EINTR.
    for errno in [12, 122, 11, 16, 28, 4] {
        assert!(is_shortage(errno), "{errno}");
    }
    // EINVAL, ENOENT, EIO, EROFS, EACCES, ENODEV, EPERM.
    for errno in [22, 2, 5, 30, 13, 19, 1, 0, -12] {
        assert!(!is_shortage(errno), "{errno}");
    }
    // EBUSY and E2BIG of xenstored's quotas, EINVAL for oxenstored's EQUOTA.
    for errno in [16, 7, 22, 28, 11, 12] {
        assert!(store_recovers(errno), "{errno}");
    }
    assert!(!store_recovers(2));
}
