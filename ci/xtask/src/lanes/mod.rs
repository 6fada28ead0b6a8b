// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The lanes of `cargo xtask test`.

mod build;
pub(crate) mod e2e;
mod host;
mod nightly;
mod programs;

use crate::kernel::Dom0Kernel;
use crate::low_priority;
use crate::steps::{self, RunningLine, StepKind};
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
/// - First the tests on the host, some of which have limits in real time. They mostly wait for processes, and compilers
///   use what they leave.
/// - Then honest guests, and malicious ones. QEMU kills one in four or five hardware virtualised guests while another
///   program wants the host's processors, so what runs beside them has low priority: the checks, which compile the
///   workspace once more, and the bench, whose machine counts time in instructions.
pub(crate) fn run(lanes: &[Lane], only: &str, seed: Option<u64>) -> TestTally {
    let wanted = WantedLanes {
        lanes: if lanes.is_empty() { USUAL } else { lanes },
        only,
        seed,
        start: Instant::now(),
    };
    let mut tally = TestTally::default();
    if wanted.has(&[Lane::E2e]) {
        // All artefacts at once is faster than each when it is first needed.
        if let Err(error) = crate::artifacts::machines(Dom0Kernel::Stock) {
            tally.fail("the test machines", &format!("{error:#}"));
        }
    }
    let has_guests = wanted.has(HONEST);
    let compilers: &[Lane] = match has_guests {
        true => &[Lane::Build],
        false => &[Lane::Check, Lane::Build],
    };
    let both = |first: &[Lane], second: &(dyn Fn() -> TestTally + Sync)| {
        thread::scope(|scope| {
            let second = scope.spawn(second);
            let mut tally = wanted.each(first);
            match second.join() {
                Ok(second) => tally.join(second),
                Err(_) => tally.fail("lanes that run beside others", "their thread panicked"),
            }
            tally
        })
    };
    tally.join(both(&[Lane::Host], &|| wanted.each(compilers)));
    let beside: &[Lane] = match has_guests {
        true => &[Lane::Check, Lane::Bench],
        false => &[Lane::Bench],
    };
    tally.join(both(MACHINES, &|| wanted.at_low_priority(beside)));
    let seconds = wanted.start.elapsed().as_secs_f64();
    steps::took(StepKind::Lane, "all lanes", seconds);
    tally
}

/// Lanes with honest guests.
const HONEST: &[Lane] = &[Lane::E2e, Lane::Debug];

/// Lanes that boot machines whose clock is that of the host, in this order.
const MACHINES: &[Lane] = &[Lane::E2e, Lane::Debug, Lane::Hostile, Lane::Nightly];

/// The lanes of a run.
struct WantedLanes<'a> {
    lanes: &'a [Lane],
    only: &'a str,
    seed: Option<u64>,
    start: Instant,
}

impl WantedLanes<'_> {
    /// Returns true if the run has one of these lanes.
    fn has(&self, lanes: &[Lane]) -> bool {
        lanes.iter().any(|lane| self.lanes.contains(lane))
    }

    /// Runs those of these lanes that the run has, one after the other.
    fn each(&self, lanes: &[Lane]) -> TestTally {
        let mut tally = TestTally::default();
        for &lane in lanes.iter().filter(|lane| self.has(&[**lane])) {
            println!(
                "== {lane:?}, {} s after the start",
                self.start.elapsed().as_secs()
            );
            run_one(lane, self.only, self.seed, &mut tally);
        }
        tally
    }

    /// Runs those of these lanes that the run has, at low priority.
    fn at_low_priority(&self, lanes: &[Lane]) -> TestTally {
        low_priority::leave_time(|| self.each(lanes)).unwrap_or_else(|error| {
            let mut tally = TestTally::default();
            tally.fail("lanes of low priority", &format!("{error:#}"));
            tally
        })
    }
}

fn run_one(lane: Lane, only: &str, seed: Option<u64>, tally: &mut TestTally) {
    let running = RunningLine::begin(&format!("in lane {lane:?}"));
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
    let seconds = running.seconds();
    println!("== {lane:?} took {seconds:.0} s");
    steps::took(StepKind::Lane, &format!("{lane:?}"), seconds);
}
