// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Unit, property and model tests: `cargo test` over the workspace, and the loom models.

use super::programs;
use crate::tally::TestTally;
use crate::{build, host};
use anyhow::Result;
use std::process::Command;

/// Percentage of their cases that tests with new seeds in each run have in the lane `host`, and in the part `seeds` of
/// the lane `nightly`.
const SEEDS_PERCENT: [&str; 2] = ["40", "400"];

pub(super) fn tests(tally: &mut TestTally) -> Result<()> {
    host::for_tests()?;
    // One selection of crates, because cargo would rebuild shared crates for another one.
    let mut all = cargo_test();
    all.arg("--workspace")
        .env("SEEDS_PERCENT", SEEDS_PERCENT[0]);
    programs::test(tally, "the tests of the workspace", &all, &[])?;
    all.arg("--doc");
    programs::examples(tally, "the examples in the documentation", &all)?;
    // The models need another build of everything below them, so it has a folder of its own.
    let mut loom = cargo_test();
    loom.args(["-p", "ring", "--release", "--test", "loom"]);
    loom.env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", build::repository()?.join("target/loom"));
    programs::test(tally, "the loom models", &loom, &[])
}

/// Runs the tests of sanlock's daemons that wait for events which take these a minute.
pub(super) fn sanlock(tally: &mut TestTally, _seed: Option<u64>) -> Result<()> {
    host::for_sanlock()?;
    let mut tests = cargo_test();
    tests.args(["-p", "lease", "--lib"]);
    programs::test(
        tally,
        "the tests of sanlock",
        &tests,
        &["--ignored", "sanlock"],
    )
}

/// Runs the tests with new seeds in each run, with many more of them.
pub(super) fn seeds(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    host::for_tests()?;
    let mut tests = cargo_test();
    tests.args(["-p", "sim", "-p", "formats", "-p", "tapdisk"]);
    tests.env("SEEDS_PERCENT", SEEDS_PERCENT[1]);
    if let Some(seed) = seed {
        tests.env("SEED", seed.to_string());
    }
    programs::test(tally, "the tests with seeds", &tests, &[])
}

/// Repairs thousands of images with one wrong word. `SEED` and `SEEDS` select them.
pub(super) fn repairs(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    host::for_tests()?;
    let mut tests = cargo_test();
    tests.args(["-p", "tapimg", "--test", "tool"]);
    if let Some(seed) = seed {
        tests.env("SEED", seed.to_string());
    }
    programs::test(
        tally,
        "the mutations of images",
        &tests,
        &["--ignored", "--nocapture", "mutations"],
    )
}

/// Kills the hotplug script for shared storage at each of its moments; the lane host takes some by chance.
pub(super) fn kills(tally: &mut TestTally, _seed: Option<u64>) -> Result<()> {
    host::for_tests()?;
    let mut tests = cargo_test();
    tests.args(["-p", "tap-ctl", "--test", "shared_storage"]);
    tests.env("MOMENTS", "all");
    programs::test(tally, "kills of the script", &tests, &["kills"])
}

/// Measures how long conversions take, beside QEMU's.
pub(super) fn conversions(tally: &mut TestTally, _seed: Option<u64>) -> Result<()> {
    host::for_tests()?;
    let mut tests = cargo_test();
    tests.args(["--release", "-p", "tapimg", "--test", "tool"]);
    programs::test(
        tally,
        "the speed of conversions",
        &tests,
        &["--ignored", "--nocapture", "speed"],
    )
}

fn cargo_test() -> Command {
    let mut cargo = build::cargo();
    cargo.args(["test", "--locked"]);
    cargo
}
