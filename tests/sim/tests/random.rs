// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Random cases of the phy data path.
//!
//! `SIM_CASES=n` runs so many cases, `SIM_SEED=n` replays one. Without them the cases of the first
//! seeds run until the time for a default run is over.

use std::time::{Duration, Instant};

use sim::schedule::{run_case, Outcome};

const DEFAULT_TIME: Duration = Duration::from_secs(20);
const LEAST_CASES: u64 = 500;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
    )
}

fn check(seed: u64, total: &mut Outcome) {
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
}

#[test]
fn every_schedule_is_explained() {
    let mut total = Outcome::default();
    if let Some(seed) = number("SIM_SEED") {
        check(seed, &mut total);
        println!("{total:?}");
        return;
    }
    let cases = number("SIM_CASES");
    let start = Instant::now();
    let mut seed = 0;
    while match cases {
        Some(cases) => seed < cases,
        None => seed < LEAST_CASES || start.elapsed() < DEFAULT_TIME,
    } {
        check(seed, &mut total);
        seed += 1;
    }
    println!("{seed} cases: {total:?}");
    // A run that exercises nothing proves nothing.
    if seed >= LEAST_CASES {
        assert!(total.broken > seed / 100, "{total:?}");
        assert!(total.okay > 20 * seed, "{total:?}");
        assert!(
            total.mapped > seed && total.waited > seed && total.special > seed,
            "{total:?}"
        );
    }
}
