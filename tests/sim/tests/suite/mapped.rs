// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A disk whose process maps extents for the kernel, copies, moves and frees clusters, and dies.
//!
//! Each case is a plan with its own random schedules. `SEEDS=n` runs n of each, `SEED=n SEEDS=1` replays one in
//! each test that is run.

use seeds::Seeds;
use sim::mapped::{run_mapped, MappedCounts, MappedPlan};

/// Schedules of each plan.
const CASES: u64 = 300;

/// Runs the schedules of a plan; `enough` decides whether the sums show that it exercised anything.
fn run(plan: &MappedPlan, enough: impl Fn(&MappedCounts, u64) -> bool) {
    let (mut sum, mut count) = (MappedCounts::default(), 0);
    for seed in Seeds::new(CASES) {
        let run = std::panic::catch_unwind(|| run_mapped(seed, plan, None));
        let (problems, counts) =
            run.unwrap_or_else(|_| panic!("replay it with SEED={seed} SEEDS=1"));
        assert!(
            problems.is_empty(),
            "replay it with SEED={seed} SEEDS=1: {problems:#?}"
        );
        sum.add(&counts);
        count += 1;
    }
    println!("{count} cases: {sum:?}");
    // A single case may exercise little.
    assert!(count == 1 || enough(&sum, count), "{sum:?}");
}

#[test]
fn what_the_kernel_knows_is_true_while_clusters_are_copied_and_freed() {
    run(
        &MappedPlan {
            moves: 0,
            ..MappedPlan::default()
        },
        |sum, cases| {
            let both = sum.executed > 10 * cases && sum.served > 10 * cases;
            let changes = sum.copied > 2 * cases && sum.freed > cases;
            both && changes && sum.resumed > cases / 4 && sum.redone > cases / 4
        },
    );
}

#[test]
fn what_is_moved_is_taken_back_first() {
    let plan = MappedPlan {
        moves: 60,
        deaths: 0,
        ..MappedPlan::default()
    };
    run(&plan, |sum, cases| {
        sum.moved > 5 * cases && sum.waited > cases / 4 && sum.refused > cases / 4
    });
}

#[test]
fn a_process_that_dies_leaves_nothing_that_is_not_true() {
    let plan = MappedPlan {
        moves: 40,
        deaths: 20,
        death: 3,
        ..MappedPlan::default()
    };
    run(&plan, |sum, cases| {
        sum.deaths > 2 * cases && sum.begun_beside > cases / 2 && sum.executed > 10 * cases
    });
}

#[test]
fn a_flush_is_one_of_all_that_the_disk_is_in() {
    let plan = MappedPlan {
        base: false,
        grows: true,
        ..MappedPlan::default()
    };
    run(&plan, |sum, cases| {
        sum.flushed > cases / 2 && sum.synced > cases
    });
}

#[test]
fn what_has_its_data_mapped_is_begun_at_once_or_posted_anew() {
    let plan = MappedPlan {
        mapped: 80,
        failing: 20,
        moves: 40,
        deaths: 10,
        ..MappedPlan::default()
    };
    run(&plan, |sum, cases| {
        let given_back = sum.taken_back > 5 * cases && sum.failed_mapped > cases;
        given_back && sum.begun_mapped > 5 * cases && sum.deaths > cases && sum.moved > cases
    });
}

#[test]
fn what_is_in_express_is_over_before_a_process_has_anything() {
    let plan = MappedPlan {
        mapped: 90,
        failing: 10,
        streak: 1,
        calm: 90,
        ..MappedPlan::default()
    };
    run(&plan, |sum, cases| {
        let enough = sum.begun_in_express > 3 * cases && sum.left_express > cases;
        enough && sum.deaths > cases / 4 && sum.moved > cases && sum.served > 5 * cases
    });
}

#[test]
fn who_lies_harms_his_own_disk_alone() {
    let plan = MappedPlan {
        lies: 90,
        moves: 40,
        ..MappedPlan::default()
    };
    run(&plan, |sum, cases| {
        sum.refused > cases && sum.executed > 5 * cases
    });
}
