// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Negative controls of guests that move: a rule of the hosts or of the guest is switched off, and the checker must
//! find the consequences. H1, H10 and H12 are the hazards of moving.

use sim::again::Age;
use sim::machine::MachineFault;
use sim::moves::{run_journey, Journey, SuspensionEnd, TransferMode};
use sim::negative::{self, CASES};
use sim::process::ProcessPlan;

fn served() -> Option<ProcessPlan> {
    Some(ProcessPlan::default())
}

fn found(journey: &Journey, fault: Option<MachineFault>) -> (u64, Vec<String>) {
    negative::found(|seed| run_journey(seed, journey, fault).0)
}

#[track_caller]
fn must_find(journey: Journey, fault: Option<MachineFault>, least: u64, words: &str) {
    negative::must_find(&fault, least, &[words], |seed| {
        run_journey(seed, &journey, fault).0
    });
}

#[track_caller]
fn finds_nothing(journey: Journey, fault: Option<MachineFault>) {
    let (found, reports) = found(&journey, fault);
    assert_eq!(found, 0, "{reports:#?}");
}

fn moved() -> Journey {
    Journey {
        end: SuspensionEnd::Moved,
        ..Journey::default()
    }
}

fn cancelled() -> Journey {
    Journey {
        end: SuspensionEnd::Cancelled,
        ..Journey::default()
    }
}

/// A guest whose memory is copied while it runs, and that always moves.
fn copied(way: TransferMode) -> Journey {
    Journey {
        way,
        passes: true,
        ages: &[Age::New],
        ..moved()
    }
}

#[test]
fn without_a_fault_nothing_is_reported() {
    for journey in [
        moved(),
        cancelled(),
        copied(TransferMode::Any),
        copied(TransferMode::Kept),
    ] {
        finds_nothing(journey, None);
        let served = Journey {
            served: served(),
            ..journey
        };
        if journey.way == TransferMode::Any {
            finds_nothing(served, None);
        }
    }
}

/// An answer that the guest has seen holds on every host.
#[test]
fn what_is_lost_before_a_move_is_found() {
    let words = "which no order of the writes explains";
    must_find(moved(), Some(MachineFault::DropWrite), CASES / 4, words);
    must_find(
        moved(),
        Some(MachineFault::IgnoreFlush),
        CASES / 10,
        "power cut",
    );
    let served = Journey {
        served: served(),
        ..moved()
    };
    must_find(served, Some(MachineFault::PrivateCache), CASES / 8, words);
}

#[test]
fn h1_a_host_that_is_left_with_io_under_way_is_found() {
    let words = "which no order of the writes explains";
    must_find(moved(), Some(MachineFault::LeaveRunning), CASES / 10, words);
}

#[test]
fn h12_what_is_given_up_is_found_when_the_guest_goes_on_with_its_ring() {
    for plan in [None, served()] {
        let journey = Journey {
            served: plan,
            ..cancelled()
        };
        must_find(
            journey,
            Some(MachineFault::AbortAtSuspend),
            CASES / 2,
            "were never answered",
        );
    }
}

/// That is why the loss shows only if a suspend is cancelled.
#[test]
fn h12_what_is_given_up_is_asked_for_again_by_a_guest_that_is_moved() {
    for plan in [None, served()] {
        let journey = Journey {
            served: plan,
            ..moved()
        };
        finds_nothing(journey, Some(MachineFault::AbortAtSuspend));
    }
}

#[test]
fn s25_a_frontend_that_forgets_a_request_is_found() {
    let words = "nothing was ever heard of";
    for plan in [None, served()] {
        let journey = Journey {
            served: plan,
            ..moved()
        };
        must_find(journey, Some(MachineFault::ForgetReplay), CASES / 2, words);
    }
}

const OTHER_DATA: &str = "the other host has other data";

#[test]
fn h10_a_change_that_is_written_down_before_it_is_made_is_found() {
    let fault = Some(MachineFault::MarkEarly);
    must_find(copied(TransferMode::Copied), fault, CASES / 4, OTHER_DATA);
    let served = Journey {
        served: served(),
        ..copied(TransferMode::Copied)
    };
    must_find(served, fault, CASES / 4, OTHER_DATA);
}

#[test]
fn h10_an_answer_before_its_data_is_there_is_found() {
    let fault = Some(MachineFault::CopyLater);
    for way in [
        TransferMode::Copied,
        TransferMode::Mapped,
        TransferMode::Kept,
    ] {
        must_find(copied(way), fault, CASES / 4, OTHER_DATA);
    }
    let served = Journey {
        served: served(),
        ..copied(TransferMode::Copied)
    };
    must_find(served, fault, CASES / 4, OTHER_DATA);
}

#[test]
fn h10_a_page_that_is_unmapped_late_is_found() {
    let fault = Some(MachineFault::LateUnmap);
    must_find(copied(TransferMode::Mapped), fault, CASES / 4, OTHER_DATA);
}

#[test]
fn h10_a_guest_that_leaves_its_data_in_pages_that_stay_mapped_is_found() {
    let journey = Journey {
        bounces: false,
        ..copied(TransferMode::Kept)
    };
    must_find(journey, None, CASES / 4, OTHER_DATA);
}
