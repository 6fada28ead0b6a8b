// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Guests that are suspended in the middle of their work, and resume on their host or on another one: the engine's and
//! the shadow's part of the cases S20, S23, S25, S26 and S28, with frontends of different age.
//!
//! `SEEDS=n` runs n of each, `SEED=n SEEDS=1` replays one in each test that is run. The negative controls are in
//! `moves_negative.rs`.

use std::time::Duration;

use seeds::Seeds;
use sim::again::Age;
use sim::moves::{run_journey, Journey, MoveCounts, SuspensionEnd, TransferMode};
use sim::process::{Moment, ProcessPlan};

const DEFAULT_TIME: Duration = Duration::from_secs(3);
const LEAST_CASES: u64 = 100;

fn check(seed: u64, journey: &Journey) -> MoveCounts {
    let run = std::panic::catch_unwind(|| run_journey(seed, journey, None));
    let (problems, counts) = run.unwrap_or_else(|_| panic!("replay it with SEED={seed} SEEDS=1"));
    assert!(
        problems.is_empty(),
        "replay it with SEED={seed} SEEDS=1: {problems:#?}"
    );
    counts
}

/// Runs the schedules of a journey; `enough` decides whether the sums show that it exercised anything.
fn run(journey: Journey, enough: impl Fn(&MoveCounts, u64) -> bool) {
    let mut sum = MoveCounts::default();
    let mut seeds = Seeds::for_time(LEAST_CASES, DEFAULT_TIME);
    for seed in seeds.by_ref() {
        sum.add(&check(seed, &journey));
    }
    let cases = seeds.given();
    println!("{cases} cases: {sum:?}");
    if cases == 1 {
        return;
    }
    // A run that exercises nothing proves nothing.
    assert!(sum.under_way > 3 * cases, "{sum:?}");
    assert!(enough(&sum, cases), "{sum:?}");
}

fn served() -> Option<ProcessPlan> {
    Some(ProcessPlan::default())
}

fn dying() -> Option<ProcessPlan> {
    Some(ProcessPlan {
        deaths: 8,
        moment: Moment::Any,
        death: 5,
        sessions: 25,
        ..ProcessPlan::default()
    })
}

fn only_moved(sum: &MoveCounts, cases: u64) -> bool {
    sum.moved == 3 * cases && sum.again > 3 * cases
}

#[test]
fn s20_h12_a_guest_that_goes_on_with_its_ring_loses_nothing() {
    let journey = Journey {
        suspends: 8,
        end: SuspensionEnd::Cancelled,
        ..Journey::default()
    };
    run(journey, |sum, cases| sum.cancelled == 8 * cases);
}

#[test]
fn s20_h12_a_guest_of_a_tap_disk_that_goes_on_with_its_ring_loses_nothing() {
    for plan in [served(), dying()] {
        let journey = Journey {
            suspends: 8,
            end: SuspensionEnd::Cancelled,
            served: plan,
            ..Journey::default()
        };
        run(journey, |sum, cases| sum.cancelled == 8 * cases);
    }
}

#[test]
fn s25_an_old_frontend_puts_its_table_into_the_new_ring() {
    for age in [&[Age::Old], &[Age::OldTable]] {
        let journey = Journey {
            end: SuspensionEnd::Moved,
            ages: age,
            ..Journey::default()
        };
        run(journey, only_moved);
    }
}

#[test]
fn s25_an_old_frontend_of_a_tap_disk_puts_its_table_into_the_new_ring() {
    for age in [&[Age::Old], &[Age::OldTable]] {
        let journey = Journey {
            end: SuspensionEnd::Moved,
            ages: age,
            served: served(),
            ..Journey::default()
        };
        run(journey, only_moved);
    }
}

#[test]
fn s25_s26_s28_a_new_frontend_makes_other_requests_for_another_host() {
    let journey = Journey {
        end: SuspensionEnd::Moved,
        ages: &[Age::New],
        ..Journey::default()
    };
    run(journey, |sum, cases| {
        let others = sum.rings > cases && sum.poorer > cases;
        only_moved(sum, cases) && sum.again > sum.unheard && others
    });
}

#[test]
fn s25_s26_s28_a_new_frontend_makes_other_requests_for_another_tap_disk() {
    let journey = Journey {
        end: SuspensionEnd::Moved,
        ages: &[Age::New],
        served: served(),
        ..Journey::default()
    };
    run(journey, |sum, cases| {
        let others = sum.rings > cases / 4 && sum.poorer > cases;
        only_moved(sum, cases) && sum.again > sum.unheard && others
    });
}

#[test]
fn s25_s36_processes_die_while_guests_come_and_go() {
    let journey = Journey {
        suspends: 6,
        served: dying(),
        ..Journey::default()
    };
    run(journey, |sum, cases| {
        sum.moved > 2 * cases && sum.cancelled > 2 * cases && sum.deaths > 2 * cases
    });
}

fn copied_while_it_runs(way: TransferMode, served: Option<ProcessPlan>) {
    let journey = Journey {
        way,
        served,
        passes: true,
        ages: &[Age::New],
        ..Journey::default()
    };
    run(journey, |sum, cases| {
        sum.moved > cases && sum.copied > 100 * cases
    });
}

#[test]
fn s23_h10_what_is_copied_to_the_guest_arrives_with_it() {
    copied_while_it_runs(TransferMode::Copied, None);
}

#[test]
fn s23_h10_what_is_written_through_a_mapping_arrives_with_the_guest() {
    copied_while_it_runs(TransferMode::Mapped, None);
}

#[test]
fn s23_h10_what_is_written_to_pages_that_stay_granted_arrives_with_the_guest() {
    copied_while_it_runs(TransferMode::Kept, None);
}

#[test]
fn s23_h10_what_a_tap_disk_answers_arrives_with_the_guest() {
    copied_while_it_runs(TransferMode::Copied, served());
}
