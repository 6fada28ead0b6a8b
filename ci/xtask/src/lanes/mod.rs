// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The lanes of `cargo xtask test`.

mod build;
pub(crate) mod e2e;
mod host;
mod nightly;
mod programs;

use crate::idle;
use crate::kernel::Dom0Kernel;
use crate::steps::{self, StepKind};
use crate::tally::TestTally;
use anyhow::anyhow;
use std::sync::mpsc::{channel, Receiver};
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

/// Runs the lanes and returns their sums, in two rows at once:
/// - The machines of honest guests, then those of malicious ones. QEMU kills one in four or five hardware virtualised
///   guests while another program wants the host's processors, so the other row is idle beside the honest guests.
/// - Compilers, then the bench, whose machine counts time in instructions, then the tests on the host, some of which have
///   limits in real time.
pub(crate) fn run(lanes: &[Lane], only: &str, seed: Option<u64>) -> TestTally {
    let rows = LaneRows {
        lanes: if lanes.is_empty() { USUAL } else { lanes },
        only,
        seed,
        start: Instant::now(),
    };
    let mut tally = TestTally::default();
    if rows.lanes.contains(&Lane::E2e) {
        // All artefacts at once is faster than each when it is first needed.
        if let Err(error) = crate::artifacts::machines(Dom0Kernel::Stock) {
            tally.fail("the test machines", &format!("{error:#}"));
        }
    }
    let (end, ended) = channel();
    thread::scope(|scope| {
        let second = scope.spawn(|| rows.second(&{ ended }));
        tally.join(rows.each(rows.first()));
        drop(end);
        tally.join(rows.each(&[Lane::Hostile, Lane::Nightly]));
        match second.join() {
            Ok(second) => tally.join(second),
            Err(_) => tally.fail("lanes that run beside others", "their thread panicked"),
        }
    });
    steps::took(
        StepKind::Lane,
        "all lanes",
        rows.start.elapsed().as_secs_f64(),
    );
    tally
}

/// Lanes with honest guests, beside which nothing else may want the host's processors.
const HONEST: &[Lane] = &[Lane::E2e, Lane::Debug];

/// The lanes of a run.
struct LaneRows<'a> {
    lanes: &'a [Lane],
    only: &'a str,
    seed: Option<u64>,
    start: Instant,
}

impl LaneRows<'_> {
    fn wants(&self, lane: Lane) -> bool {
        self.lanes.contains(&lane)
    }

    /// Returns true if honest guests run.
    fn has_guests(&self) -> bool {
        HONEST.iter().any(|lane| self.wants(*lane))
    }

    /// Returns the lanes that the row of compilers starts beside.
    fn first(&self) -> &'static [Lane] {
        match self.has_guests() {
            true => HONEST,
            false => &[Lane::Host],
        }
    }

    /// Runs the wanted ones of these lanes, one after the other.
    fn each(&self, lanes: &[Lane]) -> TestTally {
        let mut tally = TestTally::default();
        for &lane in lanes.iter().filter(|lane| self.wants(**lane)) {
            println!(
                "== {lane:?}, {} s after the start",
                self.start.elapsed().as_secs()
            );
            run_one(lane, self.only, self.seed, &mut tally);
        }
        tally
    }

    /// Runs the row of compilers and of the host's tests. The sender of `honest` is dropped when no honest guest runs
    /// any more.
    fn second(&self, honest: &Receiver<()>) -> TestTally {
        if !self.has_guests() {
            return self.each(&[Lane::Build, Lane::Check, Lane::Bench]);
        }
        let mut tally = idle::leave_time(|| self.compilers()).unwrap_or_else(|error| {
            let mut tally = TestTally::default();
            tally.fail("idle compilers", &format!("{error:#}"));
            tally
        });
        tally.join(self.each(&[Lane::Bench]));
        // Nothing is sent, so it returns when the sender is dropped.
        let _dropped = honest.recv();
        tally.join(self.each(&[Lane::Host]));
        tally
    }

    /// Runs the lanes that compile, and compiles for those that follow.
    fn compilers(&self) -> TestTally {
        let mut tally = self.each(&[Lane::Build, Lane::Check]);
        if self.wants(Lane::Host) {
            if let Err(error) = host::compile() {
                tally.fail("the tests of the workspace", &format!("{error:#}"));
            }
        }
        tally
    }
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
