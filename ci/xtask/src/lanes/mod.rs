// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The lanes of `cargo xtask test`.

mod build;
pub(crate) mod e2e;
mod host;
mod nightly;
mod programs;

use crate::kernel::Dom0Kernel;
use crate::steps::{self, StepKind};
use crate::tally::TestTally;
use anyhow::anyhow;
use std::thread;
use std::time::Instant;

/// A group of tests that run together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Lane {
    /// Unit and property tests, without a machine (cargo test).
    Host,
    /// Formatting, lints, licences, dependency direction, unsafe code; the module cannot panic.
    Check,
    /// The module and the programs build, and packages are made of them.
    Build,
    /// The tests that run in a Xen machine.
    E2e,
    /// A malicious frontend against the driver, in a Xen machine.
    Hostile,
    /// Honest guests and a malicious frontend on a kernel with lockdep, kmemleak and failing allocations; it is
    /// built first.
    Debug,
    /// Instructions per I/O against recorded bounds, in a Xen machine.
    Bench,
    /// Tests that take too long for each change: random malicious requests, a hundred deaths of a process.
    Nightly,
}

/// The pattern that matches all tests.
pub(crate) const ALL: &str = "*";

/// The lanes that run when none is named.
const USUAL: &[Lane] = &[
    Lane::Host,
    Lane::Check,
    Lane::Build,
    Lane::E2e,
    Lane::Hostile,
    Lane::Bench,
];

/// Runs the lanes, some of them concurrently, and returns their sums:
/// - Compilers of the lanes Check and Build use what the tests on the host leave idle: those tests mostly wait for
///   processes, although several of their programs run at once.
/// - The bench, in a machine whose time is counted in instructions, uses the processors that the malicious guests leave
///   idle. Honest guests run alone, because QEMU kills one in four or five hardware virtualised guests while another
///   program wants the host's processors, and hardly any on a quiet host.
pub(crate) fn run(lanes: &[Lane], only: &str, seed: Option<u64>) -> TestTally {
    let mut tally = TestTally::default();
    let lanes = if lanes.is_empty() { USUAL } else { lanes };
    let start = Instant::now();
    if lanes.contains(&Lane::E2e) {
        // All artefacts at once is faster than each when it is first needed.
        if let Err(error) = crate::recipes::machines(Dom0Kernel::Stock) {
            tally.fail("the test machines", &format!("{error:#}"));
        }
    }
    let of = |wanted: &[Lane]| -> Vec<Lane> {
        let lanes = lanes.iter().filter(|lane| wanted.contains(lane));
        lanes.copied().collect()
    };
    let each = |lanes: Vec<Lane>| {
        let mut tally = TestTally::default();
        for lane in lanes {
            println!(
                "== {lane:?}, {} s after the start",
                start.elapsed().as_secs()
            );
            run_one(lane, only, seed, &mut tally);
        }
        tally
    };
    let beside = |first: &[Lane], second: &[Lane]| -> TestTally {
        thread::scope(|scope| {
            let (first, second) = (of(first), of(second));
            let second = scope.spawn(|| each(second));
            let mut tally = each(first);
            match second.join() {
                Ok(second) => tally.join(second),
                Err(_) => tally.fail("lanes that run beside others", "their thread panicked"),
            }
            tally
        })
    };
    tally.join(beside(&[Lane::Host], &[Lane::Check, Lane::Build]));
    tally.join(each(of(&[Lane::E2e, Lane::Debug])));
    tally.join(beside(&[Lane::Hostile, Lane::Nightly], &[Lane::Bench]));
    steps::took(StepKind::Lane, "all lanes", start.elapsed().as_secs_f64());
    tally
}

fn run_one(lane: Lane, only: &str, seed: Option<u64>, tally: &mut TestTally) {
    let start = Instant::now();
    let done = match lane {
        Lane::E2e => e2e::tests(tally, only, seed),
        Lane::Nightly => nightly::tests(tally, only, seed),
        Lane::Debug => e2e::debug(tally, only, seed),
        _ if only != ALL => Err(anyhow!(
            "--only names tests of the lanes e2e, debug and nightly; for some of the attacks: cargo xtask vm -- '/t/hostile run --only WORD'"
        )),
        Lane::Host => host::tests(tally),
        Lane::Check => crate::check::run(tally),
        Lane::Build => build::tests(tally),
        Lane::Hostile => e2e::hostile(tally, seed),
        Lane::Bench => crate::bench::gate(tally),
    };
    if let Err(error) = done {
        tally.fail(&format!("lane {lane:?}"), &format!("{error:#}"));
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("== {lane:?} took {seconds:.0} s");
    steps::took(StepKind::Lane, &format!("{lane:?}"), seconds);
}
