// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Judgement of a negative control: a fault is planted in many cases, and the oracle must find it in enough of them.

use std::fmt::Debug;

/// Number of cases in which a fault is planted, each with a seed of its own.
pub const CASES: u64 = 60;

/// Returns the number of cases with a report, and all reports. `case` returns those of a seed.
pub fn found(case: impl Fn(u64) -> Vec<String>) -> (u64, Vec<String>) {
    let mut found = 0;
    let mut reports = Vec::new();
    for seed in 0..CASES {
        let problems = case(seed);
        found += u64::from(!problems.is_empty());
        reports.extend(problems);
    }
    (found, reports)
}

/// Requires that the fault is found in at least the given number of cases, and that each of the words is in a report.
#[track_caller]
pub fn must_find(
    fault: &impl Debug,
    least: u64,
    words: &[&str],
    case: impl Fn(u64) -> Vec<String>,
) {
    let (found, reports) = found(case);
    println!("{fault:?} found in {found} of {CASES} cases");
    for word in words {
        let report = reports.iter().find(|report| report.contains(word));
        let first: Vec<_> = reports.iter().take(5).collect();
        println!(
            "    {}",
            report.unwrap_or_else(|| panic!("{word}: {first:#?}"))
        );
    }
    assert!(
        found >= least,
        "{fault:?} found in {found} of {CASES} cases"
    );
}
