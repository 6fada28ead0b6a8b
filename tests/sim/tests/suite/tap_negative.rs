// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Negative controls of a disk that processes serve: effects of a crash are planted into the surroundings of the
//! shadow, and the checker must find them.
//!
//! H1 to H6, H9 and H11 are the hazards of a replay. Each fault is tried on a number of seeds; one that is found in few
//! of them is a miss.

use sim::machine::MachineFault;
use sim::negative::{self, CASES};
use sim::process::{Moment, ProcessPlan};
use sim::schedule::{run_rebound, run_served, run_two_guests, Leaves};

fn plan() -> ProcessPlan {
    ProcessPlan {
        deaths: 30,
        moment: Moment::Any,
        death: 10,
        // Only the guest's view is checked, except in the case that it cannot see.
        any_order: true,
        ..ProcessPlan::default()
    }
}

fn found(plan: &ProcessPlan, fault: Option<MachineFault>) -> (u64, Vec<String>) {
    negative::found(|seed| run_served(seed, plan, fault).problems)
}

#[track_caller]
fn must_find(plan: &ProcessPlan, fault: MachineFault, least: u64, words: &[&str]) {
    negative::must_find(&fault, least, words, |seed| {
        run_served(seed, plan, Some(fault)).problems
    });
}

#[test]
fn without_a_fault_nothing_is_reported() {
    let all = ProcessPlan {
        lies: 10,
        rewrite: 10,
        any_order: false,
        ..plan()
    };
    let tiny = ProcessPlan {
        sectors: Some(8),
        ..all
    };
    let elsewhere = ProcessPlan {
        moment: Moment::Running,
        sessions: 70,
        unknown: 50,
        claims: 5,
        ..plan()
    };
    for plan in [plan(), all, tiny, elsewhere] {
        let (found, reports) = found(&plan, None);
        assert_eq!(found, 0, "{reports:#?}");
    }
}

#[test]
fn h1_a_late_write_is_found() {
    let plan = ProcessPlan {
        moment: Moment::Running,
        ..plan()
    };
    let words = ["which no order of the writes explains"];
    must_find(&plan, MachineFault::SkipFence, CASES / 8, &words);
}

#[test]
fn h1_a_write_that_was_sent_over_a_network_is_found() {
    let plan = ProcessPlan {
        moment: Moment::Running,
        sessions: 100,
        sectors: Some(12),
        // So that the fault is found in twice as many cases as are demanded.
        death: 40,
        ..plan()
    };
    let words = ["which no order of the writes explains"];
    must_find(&plan, MachineFault::ForgetClass, CASES / 12, &words);
}

#[test]
fn h1_a_write_that_may_come_at_any_time_is_found() {
    let plan = ProcessPlan {
        moment: Moment::Running,
        unknown: 100,
        sectors: Some(16),
        ..plan()
    };
    let words = ["which no order of the writes explains"];
    must_find(&plan, MachineFault::ForgetClass, CASES / 12, &words);
}

#[test]
fn h2_a_write_that_is_executed_twice_is_found() {
    let plan = ProcessPlan {
        patient: true,
        sectors: Some(64),
        ..plan()
    };
    let words = ["which no order of the writes explains"];
    must_find(&plan, MachineFault::ExecuteTwice, CASES / 6, &words);
}

#[test]
fn h3_requests_that_overtake_others_are_found() {
    // A guest cannot see it before one of them is answered.
    let plan = ProcessPlan {
        any_order: false,
        ..plan()
    };
    let words = ["in arrival order"];
    must_find(&plan, MachineFault::HideRanges, CASES / 2, &words);
}

#[test]
fn h4_reads_that_go_backwards_are_found() {
    // Only the guest can see this: it read two values in turn.
    let plan = ProcessPlan {
        deaths: 200,
        moment: Moment::Executed,
        hoard: 95,
        sectors: Some(16),
        ..plan()
    };
    let words = ["no order of all accesses explains"];
    must_find(&plan, MachineFault::HideRanges, CASES / 12, &words);
}

#[test]
fn h5_a_flush_that_is_lost_is_found() {
    must_find(
        &plan(),
        MachineFault::IgnoreFlush,
        CASES / 6,
        &["power cut"],
    );
}

#[test]
fn h5_writes_that_die_with_their_process_are_found() {
    let words = ["which no order of the writes explains"];
    must_find(&plan(), MachineFault::PrivateCache, CASES / 4, &words);
}

#[test]
fn h6_a_write_that_stays_torn_is_found() {
    let plan = ProcessPlan {
        moment: Moment::Running,
        death: 30,
        ..plan()
    };
    let words = ["which no order of the writes explains"];
    must_find(&plan, MachineFault::SkipReplay, CASES / 8, &words);
}

#[test]
fn h9_data_that_is_taken_from_the_guest_again_is_found() {
    let plan = ProcessPlan {
        rewrite: 20,
        ..plan()
    };
    let words = ["which no order of the writes explains"];
    must_find(&plan, MachineFault::RereadGuest, CASES / 4, &words);
}

#[test]
fn h11_an_old_completion_that_counts_is_found() {
    let plan = ProcessPlan { lies: 20, ..plan() };
    let words = ["which no order of the writes explains"];
    must_find(&plan, MachineFault::TrustStale, CASES / 2, &words);
}

#[test]
fn a_guest_that_is_served_while_there_are_orphans_is_found() {
    let mut found = 0;
    for seed in 0..CASES {
        let served = run_two_guests(seed, &plan(), Some(MachineFault::ForgetOrphans));
        let reports = served.problems.join("\n");
        found += u64::from(reports.contains("cannot be posted"));
    }
    assert!(found >= CASES / 4, "found in {found} of {CASES} cases");
}

/// A driver that attaches again begins at the first slot without an answer, which may hold the answer to a later
/// request.
#[test]
fn rings_that_are_given_back_before_all_is_answered_and_served_again_are_found() {
    let plan = ProcessPlan {
        deaths: 0,
        ..plan()
    };
    let words = ["that nobody waits for"];
    negative::must_find(&Leaves::AtOnce, CASES / 4, &words, |seed| {
        run_rebound(seed, &plan, Leaves::AtOnce).problems
    });
}

#[test]
fn a_completion_that_is_lost_is_found() {
    // A death would bring the request back.
    let plan = ProcessPlan {
        deaths: 0,
        ..plan()
    };
    must_find(&plan, MachineFault::LoseCompletion, CASES / 2, &["asleep"]);
}

#[test]
fn a_process_that_is_not_woken_is_found() {
    let plan = ProcessPlan {
        deaths: 0,
        ..plan()
    };
    must_find(&plan, MachineFault::LeaveAsleep, CASES / 4, &["asleep"]);
}

#[test]
fn a_worker_that_is_not_woken_is_found() {
    let plan = ProcessPlan {
        deaths: 0,
        ..plan()
    };
    must_find(&plan, MachineFault::SwallowWake, CASES / 8, &["asleep"]);
}
