// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Negative controls of disks with mappings: a rule of the kernel or of the process is switched off, and the oracle
//! must find the consequences.

use sim::mapped::{run_mapped, MappedFault, MappedPlan};
use sim::negative::{self, CASES};

/// Report of the history checker about an impossible value.
const UNEXPLAINED: &str = "no order of the writes";

fn found(plan: &MappedPlan, fault: Option<MappedFault>) -> (u64, Vec<String>) {
    negative::found(|seed| run_mapped(seed, plan, fault).0)
}

#[track_caller]
fn must_find(plan: MappedPlan, fault: MappedFault, least: u64, words: &str) {
    negative::must_find(&fault, least, &[words], |seed| {
        run_mapped(seed, &plan, Some(fault)).0
    });
}

fn moving() -> MappedPlan {
    MappedPlan {
        moves: 60,
        deaths: 0,
        ..MappedPlan::default()
    }
}

fn dying() -> MappedPlan {
    MappedPlan {
        moves: 60,
        deaths: 20,
        death: 3,
        ..MappedPlan::default()
    }
}

fn growing() -> MappedPlan {
    MappedPlan {
        base: false,
        grows: true,
        deaths: 0,
        ..MappedPlan::default()
    }
}

fn in_express() -> MappedPlan {
    MappedPlan {
        mapped: 90,
        slow: 40,
        streak: 1,
        calm: 90,
        ..MappedPlan::default()
    }
}

#[test]
fn without_a_fault_nothing_is_reported() {
    let plans = [
        MappedPlan::default(),
        moving(),
        dying(),
        growing(),
        in_express(),
    ];
    for plan in plans {
        let (found, reports) = found(&plan, None);
        assert_eq!(found, 0, "{reports:#?}");
    }
}

#[test]
fn a_recall_that_waits_for_nothing_is_found() {
    must_find(moving(), MappedFault::RecallAtOnce, CASES / 8, UNEXPLAINED);
}

#[test]
fn a_change_of_the_process_that_the_kernel_forgets_is_found() {
    let plan = MappedPlan {
        moves: 0,
        ..moving()
    };
    must_find(plan, MappedFault::ForgetChanges, CASES / 4, UNEXPLAINED);
}

#[test]
fn what_outlives_the_start_of_a_process_is_found() {
    must_find(dying(), MappedFault::KeepAtStart, CASES / 8, UNEXPLAINED);
}

#[test]
fn a_request_that_queue_and_process_have_is_found() {
    must_find(dying(), MappedFault::GiveAway, CASES / 12, "still executed");
}

#[test]
fn a_queue_that_overtakes_is_found() {
    must_find(moving(), MappedFault::IgnoreOverlap, CASES / 2, UNEXPLAINED);
}

#[test]
fn what_was_looked_up_too_early_is_found() {
    must_find(
        moving(),
        MappedFault::IgnoreGeneration,
        CASES / 4,
        UNEXPLAINED,
    );
}

#[test]
fn what_is_told_before_the_image_says_it_is_found() {
    must_find(dying(), MappedFault::TellEarly, CASES / 12, UNEXPLAINED);
}

#[test]
fn a_process_that_gets_what_has_its_data_mapped_is_found() {
    for plan in [moving(), dying()] {
        let plan = MappedPlan {
            mapped: 80,
            failing: 20,
            ..plan
        };
        must_find(plan, MappedFault::ServeMapped, CASES / 2, UNEXPLAINED);
    }
}

#[test]
fn a_queue_that_gives_express_up_too_early_is_found() {
    must_find(
        in_express(),
        MappedFault::LeaveEarly,
        CASES / 12,
        UNEXPLAINED,
    );
}

#[test]
fn a_queue_that_keeps_the_extent_of_its_express_is_found() {
    must_find(
        in_express(),
        MappedFault::KeepExtent,
        CASES / 12,
        UNEXPLAINED,
    );
}

#[test]
fn a_flush_of_one_store_of_two_is_found() {
    must_find(
        growing(),
        MappedFault::FlushOne,
        CASES / 8,
        "after a power cut",
    );
}
