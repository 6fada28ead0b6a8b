// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Random cases of the phy data path.
//!
//! The seeds of a run count up from a random one. `SEEDS=n` runs n cases, `SEED=n SEEDS=1` replays one. Without them
//! cases run until the time for a default run is over.

use std::time::Duration;

use seeds::Seeds;
use sim::schedule::{run_case, CaseOutcome};

const DEFAULT_TIME: Duration = Duration::from_secs(20);
const LEAST_CASES: u64 = 500;

fn check(seed: u64, total: &mut CaseOutcome) {
    let outcome = std::panic::catch_unwind(|| run_case(seed, None));
    let outcome = outcome.unwrap_or_else(|_| panic!("replay it with SEED={seed} SEEDS=1"));
    assert!(
        outcome.problems.is_empty(),
        "replay it with SEED={seed} SEEDS=1: {:#?}",
        outcome.problems
    );
    total.answers += outcome.answers;
    total.okay += outcome.okay;
    total.mapped += outcome.mapped;
    total.answered_asleep += outcome.answered_asleep;
    total.waited += outcome.waited;
    total.special += outcome.special;
    total.broken += outcome.broken;
    total.given_back += outcome.given_back;
}

#[test]
fn every_schedule_is_explained() {
    let mut total = CaseOutcome::default();
    let mut seeds = Seeds::for_time(LEAST_CASES, DEFAULT_TIME);
    for seed in seeds.by_ref() {
        check(seed, &mut total);
    }
    let cases = seeds.given();
    println!("{cases} cases: {total:?}");
    // A run that exercises nothing proves nothing.
    if cases >= LEAST_CASES {
        assert!(total.broken > cases / 100, "{total:?}");
        assert!(total.okay > 20 * cases, "{total:?}");
        assert!(
            total.mapped > cases && total.waited > cases && total.special > cases,
            "{total:?}"
        );
        assert!(total.given_back > cases / 10, "{total:?}");
    }
    // Random machines seldom have room for all pages of their guest; `lent` has those that do.
    if cases >= 10 * LEAST_CASES {
        assert!(total.answered_asleep > 0, "{total:?}");
    }
}
