// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Completions that find the worker asleep, and answer in its place; commits of a process also take requests then.

use seeds::Seeds;
use sim::machine::{MachineFault, MachineSetup};
use sim::negative;
use sim::process::ProcessPlan;
use sim::rng::Rng;
use sim::schedule::{run_served, run_setup};

/// Returns a guest whose pages stay mapped.
fn setup(rng: &mut Rng) -> MachineSetup {
    MachineSetup {
        map_pages: 512,
        copy_max_segments: u16::MAX,
        keeps_grants: true,
        fifo: rng.percent(50),
        // A request that fails is left to the worker.
        bad_sectors: if rng.percent(50) { 40..44 } else { 0..0 },
        measures: rng.pick(&[0, 0, 3]),
        ..MachineSetup::default()
    }
}

#[test]
fn every_schedule_is_explained() {
    let (mut asleep, mut answers) = (0, 0);
    let mut seeds = Seeds::new(100);
    for seed in seeds.by_ref() {
        let mut rng = Rng::new(seed);
        let outcome = run_setup(setup(&mut rng), &mut rng, None);
        assert_eq!(outcome.problems, Vec::<String>::new(), "seed {seed}");
        asleep += outcome.answered_asleep;
        answers += outcome.answers;
    }
    println!("{asleep} of {answers} requests were answered while the worker slept");
    // A run that exercises nothing proves nothing.
    assert!(asleep > seeds.given() / 2, "{asleep} of {answers}");
}

#[test]
fn a_worker_that_sleeps_on_is_found() {
    let found = (0..100).filter(|seed| {
        let mut rng = Rng::new(*seed);
        let fault = Some(MachineFault::SleepOn);
        let outcome = run_setup(setup(&mut rng), &mut rng, fault);
        outcome
            .problems
            .iter()
            .any(|problem| problem.contains("asleep"))
    });
    let found = found.count();
    assert!(found > 2, "{found}");
}

#[test]
fn commits_take_requests_while_the_worker_sleeps() {
    let (mut asleep, mut answers) = (0, 0);
    let mut seeds = Seeds::new(60);
    for seed in seeds.by_ref() {
        let outcome = run_served(seed, &ProcessPlan::default(), None);
        assert_eq!(outcome.problems, Vec::<String>::new(), "seed {seed}");
        asleep += outcome.taken_asleep;
        answers += outcome.answers;
    }
    println!("{asleep} of {answers} requests were taken while the worker slept");
    assert!(asleep > seeds.given() / 2, "{asleep} of {answers}");
}

#[test]
fn a_worker_that_sleeps_for_long_while_requests_gather_is_found() {
    let plan = ProcessPlan::default();
    let fault = MachineFault::SleepLong;
    negative::must_find(
        &fault,
        negative::CASES / 30,
        &["asleep without a limit"],
        |seed| run_served(seed, &plan, Some(fault)).problems,
    );
}
