// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Negative controls: a fault is planted into a fake, and the checker must find it.
//!
//! Each fault is tried on a number of seeds. A fault that has no chance in a case (no flush, no mapping) or that the
//! schedule happens to hide does not count as a miss; one that is found in few cases does.

use ring::abi::OP_READ;
use ring::request::RequestLimits;
use sim::machine::{MachineFault, MachineSetup};
use sim::rng::Rng;
use sim::schedule::run_setup;
use sim::spec::Spec;
use sim::world::{EngineWorld, ReservedMemory};

const CASES: u64 = 40;

fn setup() -> MachineSetup {
    MachineSetup {
        limits: RequestLimits {
            sectors: 128,
            ..MachineSetup::default().limits
        },
        race: 5,
        ..MachineSetup::default()
    }
}

/// Returns the number of cases in which the planted fault was reported, and the first report.
fn found(setup: &MachineSetup, fault: MachineFault) -> (u64, Vec<String>) {
    let mut found = 0;
    let mut first = Vec::new();
    for seed in 0..CASES {
        let outcome = run_setup(setup.clone(), &mut Rng::new(seed), Some(fault));
        if !outcome.problems.is_empty() {
            found += 1;
            first = outcome.problems;
        }
    }
    (found, first)
}

#[track_caller]
fn must_find(setup: &MachineSetup, fault: MachineFault, least: u64, words: &[&str]) {
    let (found, report) = found(setup, fault);
    assert!(
        found >= least,
        "{fault:?} found in {found} of {CASES} cases"
    );
    let text = report.join("\n");
    assert!(
        words.iter().any(|word| text.contains(word)),
        "{fault:?} was reported as {report:#?}"
    );
}

#[test]
fn without_a_fault_nothing_is_reported() {
    for seed in 0..CASES {
        let outcome = run_setup(setup(), &mut Rng::new(seed), None);
        assert!(
            outcome.problems.is_empty(),
            "{seed}: {:#?}",
            outcome.problems
        );
    }
}

#[test]
fn a_lost_completion_is_found() {
    must_find(
        &setup(),
        MachineFault::LoseCompletion,
        CASES,
        &["asleep", "never answered"],
    );
}

#[test]
fn a_doubled_completion_is_found() {
    // It does harm only once its tag is in use again, and only to I/O that still runs then.
    must_find(
        &setup(),
        MachineFault::DoubleCompletion,
        CASES / 3,
        &["explains", "page", "tag"],
    );
}

#[test]
fn a_completion_that_is_told_twice_in_a_row_does_no_harm() {
    let (found, report) = found(&setup(), MachineFault::RepeatCompletion);
    assert_eq!(found, 0, "{report:#?}");
}

#[test]
fn swapped_sectors_are_found() {
    must_find(
        &setup(),
        MachineFault::SwapSectors,
        CASES / 2,
        &["explains"],
    );
}

#[test]
fn a_misdirected_write_is_found() {
    must_find(
        &setup(),
        MachineFault::MisdirectWrite,
        CASES / 2,
        &["explains"],
    );
}

#[test]
fn a_dropped_write_is_found() {
    must_find(&setup(), MachineFault::DropWrite, CASES / 4, &["explains"]);
}

#[test]
fn a_flush_that_does_nothing_is_found() {
    must_find(
        &setup(),
        MachineFault::IgnoreFlush,
        CASES / 2,
        &["power cut"],
    );
}

#[test]
fn a_torn_read_is_found() {
    must_find(
        &setup(),
        MachineFault::TearRead,
        CASES * 3 / 4,
        &["explains"],
    );
}

#[test]
fn a_copy_beyond_the_segment_is_found() {
    must_find(&setup(), MachineFault::CopyBeyond, CASES / 4, &["outside"]);
}

#[test]
fn a_copy_that_was_not_made_is_found() {
    must_find(&setup(), MachineFault::SkipCopy, CASES / 2, &["explains"]);
}

#[test]
fn a_copy_after_the_answer_is_found() {
    must_find(
        &setup(),
        MachineFault::LateCopy,
        CASES * 3 / 4,
        &["changed"],
    );
}

#[test]
fn a_forgotten_unmap_is_found() {
    must_find(
        &setup(),
        MachineFault::ForgetUnmap,
        CASES * 3 / 4,
        &["mapped"],
    );
}

#[test]
fn a_page_that_cannot_be_unmapped_and_is_used_again_is_found() {
    let setup = MachineSetup {
        stuck: 20,
        ..setup()
    };
    must_find(
        &setup,
        MachineFault::ForgetLost,
        CASES / 2,
        &["mapped over", "pages are free"],
    );
}

#[test]
fn a_leaked_mapping_is_found() {
    must_find(
        &setup(),
        MachineFault::LeakMapping,
        CASES * 3 / 4,
        &["mapped", "answered -1"],
    );
}

#[test]
fn a_lost_event_is_found() {
    // A busy disk would wake the worker and hide the fault.
    let setup = MachineSetup {
        synchronous: 100,
        race: 0,
        ..setup()
    };
    must_find(&setup, MachineFault::LoseEvent, CASES / 4, &["asleep"]);
}

#[test]
fn a_lost_wake_up_is_found() {
    must_find(&setup(), MachineFault::SwallowWake, CASES / 4, &["asleep"]);
}

#[test]
fn an_untold_guest_is_found() {
    must_find(
        &setup(),
        MachineFault::LoseInterrupt,
        CASES / 4,
        &["not told", "never"],
    );
}

#[test]
fn an_answer_to_another_request_is_found() {
    must_find(&setup(), MachineFault::WrongId, CASES, &["nobody waits"]);
}

/// Returns the reports when the guest always has eight requests in the ring.
fn steady_load(fault: Option<MachineFault>) -> Vec<String> {
    let setup = MachineSetup {
        fifo: true,
        race: 0,
        ..setup()
    };
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.machine.borrow_mut().fault = fault.map(|fault| (fault, 0));
    world.send(&vec![Spec::pages(OP_READ, 0, 1); 8]);
    for _ in 0..600 {
        world.send(&[Spec::pages(OP_READ, 0, 1)]);
        let _pass = world.pass();
        let mut m = world.machine.borrow_mut();
        m.disk_step();
        m.consume();
    }
    world.run();
    world.verdict()
}

#[test]
fn a_request_that_is_overtaken_for_ever_is_found() {
    assert_eq!(steady_load(None), Vec::<String>::new());
    let problems = steady_load(Some(MachineFault::StarveFirst)).join("\n");
    assert!(problems.contains("overtaken"), "{problems}");
}

#[test]
fn pages_that_were_said_to_be_lent_and_were_not_are_found() {
    let setup = MachineSetup {
        copy_pages: 352,
        own_pages: 16,
        lendable: 352,
        map_pages: 0,
        copy_max_segments: u16::MAX,
        ..setup()
    };
    must_find(&setup, MachineFault::LendNothing, CASES / 2, &["no memory"]);
}
