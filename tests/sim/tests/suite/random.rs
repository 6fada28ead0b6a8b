// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Random cases of the phy data path.
//!
//! The seeds of a run count up from a random one. `SIM_CASES=n` runs n cases, `SIM_SEED=n` replays one. Without them
//! cases run until the time for a default run is over.

use std::time::{Duration, Instant};

use sim::rng::fresh_seed;
use sim::schedule::{run_case, CaseOutcome};

const DEFAULT_TIME: Duration = Duration::from_secs(20);
const LEAST_CASES: u64 = 500;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
    )
}

fn check(seed: u64, total: &mut CaseOutcome) {
    let outcome = std::panic::catch_unwind(|| run_case(seed, None));
    let outcome = outcome.unwrap_or_else(|_| panic!("replay it with SIM_SEED={seed}"));
    assert!(
        outcome.problems.is_empty(),
        "replay it with SIM_SEED={seed}: {:#?}",
        outcome.problems
    );
    total.answers += outcome.answers;
    total.okay += outcome.okay;
    total.mapped += outcome.mapped;
    total.waited += outcome.waited;
    total.special += outcome.special;
    total.broken += outcome.broken;
    total.given_back += outcome.given_back;
}

#[test]
fn every_schedule_is_explained() {
    let mut total = CaseOutcome::default();
    if let Some(seed) = number("SIM_SEED") {
        check(seed, &mut total);
        println!("{total:?}");
        return;
    }
    let wanted = number("SIM_CASES");
    let start = Instant::now();
    let (first, mut cases) = (fresh_seed(), 0);
    while match wanted {
        Some(wanted) => cases < wanted,
        None => cases < LEAST_CASES || start.elapsed() < DEFAULT_TIME,
    } {
        check(first.wrapping_add(cases), &mut total);
        cases += 1;
    }
    println!("{cases} cases from the seed {first} on: {total:?}");
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
}
