// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A disk that processes serve, which die, hang and lie: the engine's and the shadow's part of the cases S1 to S13 and
//! S16 to S18.
//!
//! Each case is a plan with its own random schedules: the seeds count up from a random one, until the time for a
//! default run is over. `SEEDS=n` runs n of each, `SEED=n SEEDS=1` replays one in each test that is run.

use std::time::Duration;

use seeds::Seeds;
use sim::process::{Moment, ProcessPlan};
use sim::schedule::{run_rebound, run_served, run_two_guests, Leaves, ServedOutcome};
use sim::tap::TapCounts;

const DEFAULT_TIME: Duration = Duration::from_secs(3);
const LEAST_CASES: u64 = 300;

type CaseRun = fn(u64, &ProcessPlan) -> ServedOutcome;

fn check(seed: u64, plan: &ProcessPlan, case: CaseRun) -> ServedOutcome {
    let served = std::panic::catch_unwind(|| case(seed, plan));
    let served = served.unwrap_or_else(|_| panic!("replay it with SEED={seed} SEEDS=1"));
    assert!(
        served.problems.is_empty(),
        "replay it with SEED={seed} SEEDS=1: {:#?}",
        served.problems
    );
    served
}

/// Runs the schedules of a plan; `enough` decides whether the sums show that it exercised anything.
fn run(plan: &ProcessPlan, enough: impl Fn(&TapCounts, u64) -> bool) {
    run_cases(plan, |seed, plan| run_served(seed, plan, None), enough);
}

fn run_cases(plan: &ProcessPlan, case: CaseRun, enough: impl Fn(&TapCounts, u64) -> bool) {
    let mut sum = TapCounts::default();
    let mut answers = 0;
    let mut seeds = Seeds::for_time(LEAST_CASES, DEFAULT_TIME);
    for seed in seeds.by_ref() {
        let served = check(seed, plan, case);
        answers += served.answers;
        sum.add(&served.counts);
    }
    let cases = seeds.given();
    println!("{cases} cases, {answers} answers: {sum:?}");
    if cases == 1 {
        return;
    }
    // A run that exercises nothing proves nothing.
    assert!(answers > 20 * cases, "{answers} answers");
    assert!(enough(&sum, cases), "{sum:?}");
}

fn deaths(moment: Moment) -> ProcessPlan {
    ProcessPlan {
        deaths: 4,
        moment,
        death: 30,
        sessions: 25,
        claims: 3,
        ..ProcessPlan::default()
    }
}

#[test]
fn s01_a_process_that_dies_idle_is_replaced() {
    let plan = ProcessPlan {
        death: 100,
        patient: true,
        ..deaths(Moment::Idle)
    };
    run(&plan, |sum, cases| {
        sum.deaths > cases && sum.deaths_in_work == 0 && sum.replayed == 0
    });
}

#[test]
fn s02_what_was_delivered_and_not_executed_is_executed_once() {
    run(&deaths(Moment::Unstarted), |sum, cases| {
        sum.deaths_in_work > 2 * cases && sum.replayed > 2 * cases && sum.late == 0
    });
}

#[test]
fn s03_what_was_executed_and_not_committed_is_executed_again() {
    run(&deaths(Moment::Executed), |sum, cases| {
        sum.deaths_in_work > 2 * cases && sum.replayed > 2 * cases
    });
}

#[test]
fn s04_overlapping_writes_are_executed_again_in_arrival_order() {
    run(&deaths(Moment::Overlapping), |sum, cases| {
        sum.deaths_in_work > cases && sum.replayed > cases
    });
}

#[test]
fn s05_a_late_write_of_a_dead_process_does_no_harm() {
    run(&deaths(Moment::Running), |sum, cases| {
        sum.late > cases && sum.replayed > cases
    });
}

#[test]
fn s05_what_a_dead_process_sent_over_a_network_does_no_harm() {
    let plan = ProcessPlan {
        sessions: 100,
        ..deaths(Moment::Running)
    };
    run(&plan, |sum, cases| {
        sum.elsewhere > cases / 2 && sum.unsettled > 5 * cases && sum.replayed > cases
    });
}

#[test]
fn s05_what_may_be_executed_at_any_time_is_not_executed_again() {
    let plan = ProcessPlan {
        sessions: 0,
        unknown: 100,
        ..deaths(Moment::Running)
    };
    run(&plan, |sum, cases| {
        sum.lost > cases && sum.elsewhere > cases / 4
    });
}

#[test]
fn s06_new_writes_wait_for_those_that_are_executed_again() {
    // The guest continues while there is no process and during a replay.
    let plan = ProcessPlan {
        deaths: 8,
        death: 10,
        fetch: 1,
        ..deaths(Moment::Overlapping)
    };
    run(&plan, |sum, cases| sum.replayed > cases);
}

#[test]
fn s07_reads_do_not_go_backwards() {
    // Reads are answered before the writes that they see.
    let plan = ProcessPlan {
        deaths: 20,
        death: 20,
        hoard: 90,
        ..deaths(Moment::Executed)
    };
    run(&plan, |sum, cases| sum.replayed > 5 * cases);
}

#[test]
fn s08_a_flush_comes_after_the_writes_before_it() {
    run(&deaths(Moment::Flush), |sum, cases| sum.flushes > cases / 4);
}

#[test]
fn s09_a_write_that_must_be_durable_is_durable_when_it_is_answered() {
    run(&deaths(Moment::Fua), |sum, cases| sum.fua > cases / 4);
}

#[test]
fn s10_discards_keep_their_place() {
    run(&deaths(Moment::Discard), |sum, cases| {
        sum.discards > cases / 2
    });
}

#[test]
fn s11_what_is_not_true_is_refused() {
    let plan = ProcessPlan {
        lies: 30,
        returns: 10,
        ..deaths(Moment::Any)
    };
    run(&plan, |sum, cases| sum.refused > 20 * cases);
}

#[test]
fn s12_processes_die_all_the_time() {
    let plan = ProcessPlan {
        deaths: 100,
        death: 25,
        lies: 3,
        returns: 3,
        hang: 1,
        rewrite: 1,
        unknown: 20,
        ..deaths(Moment::Any)
    };
    run(&plan, |sum, cases| {
        let again = sum.replayed > 10 * cases && sum.claimed_again > cases;
        let elsewhere = sum.elsewhere > cases && sum.lost > cases && sum.widened > cases;
        sum.deaths > 20 * cases && sum.late > cases && again && elsewhere
    });
}

#[test]
fn s12_a_replay_is_cut_short_again_and_again() {
    let plan = ProcessPlan {
        deaths: 100,
        death: 15,
        ..deaths(Moment::Replay)
    };
    run(&plan, |sum, cases| sum.deaths > 2 * cases);
}

#[test]
fn s13_a_process_that_hangs_and_is_killed_is_replaced() {
    let plan = ProcessPlan {
        deaths: 10,
        death: 0,
        hang: 10,
        ..deaths(Moment::Any)
    };
    run(&plan, |sum, cases| sum.deaths > 5 * cases);
}

#[test]
fn s16_s17_a_guest_that_goes_away_leaves_nothing_that_harms_the_next() {
    let plan = ProcessPlan {
        returns: 10,
        lies: 5,
        hang: 1,
        unknown: 20,
        ..deaths(Moment::Any)
    };
    run_cases(
        &plan,
        |seed, plan| run_two_guests(seed, plan, None),
        |sum, cases| sum.orphans > cases && sum.deaths > cases,
    );
}

#[test]
fn a_driver_that_leaves_a_guest_and_comes_back_answers_each_request_once() {
    let plan = ProcessPlan {
        sessions: 0,
        ..deaths(Moment::Any)
    };
    run_cases(
        &plan,
        |seed, plan| run_rebound(seed, plan, Leaves::Answered),
        |sum, cases| sum.under_way > cases && sum.deaths > cases && sum.orphans == 0,
    );
}

#[test]
fn s18_a_guest_that_rewrites_its_pages_changes_nothing() {
    let plan = ProcessPlan {
        rewrite: 20,
        ..deaths(Moment::Any)
    };
    run(&plan, |sum, cases| sum.rewritten > 10 * cases);
}

#[test]
fn requests_may_fail_while_no_process_serves_them() {
    let plan = ProcessPlan {
        fail: 50,
        ..deaths(Moment::Any)
    };
    run(&plan, |sum, cases| sum.failed > cases);
}
