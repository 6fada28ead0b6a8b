// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Unit, property and model tests: `cargo test` over the workspace, and the loom models.

use crate::tally::Tally;
use crate::{build, host, run};
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

pub(super) fn tests(tally: &mut Tally) -> Result<()> {
    host::for_tests()?;
    // One selection of crates: with another one cargo builds what they share anew.
    let mut all = cargo_test();
    all.args(["--workspace", "--no-fail-fast", "--", "--show-output"]);
    count(tally, "cargo test", all)?;
    // Another build of everything below the models, so it has a folder of its own.
    let mut loom = cargo_test();
    loom.args(["-p", "ring", "--release", "--test", "loom"]);
    loom.env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", build::repository()?.join("target/loom"));
    count(tally, "the loom models", loom)
}

/// The tests of sanlock's daemons that wait for what takes these a minute.
pub(super) fn sanlock(tally: &mut Tally, _seed: Option<u64>) -> Result<()> {
    host::for_sanlock()?;
    let mut tests = cargo_test();
    tests.args(["-p", "lease", "--lib", "--", "--ignored", "sanlock"]);
    count(tally, "the tests of sanlock", tests)
}

fn cargo_test() -> Command {
    let mut cargo = build::cargo();
    cargo.args(["test", "--locked"]);
    cargo
}

/// Runs the tests and adds what their closing lines say; shows what is not simply in order.
fn count(tally: &mut Tally, what: &str, mut cargo: Command) -> Result<()> {
    cargo
        .current_dir(build::repository()?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = run::start(&mut cargo)?;
    let out = child.stdout.take().context("cargo has no output")?;
    let (mut failed_before, mut shown) = (false, Shown::default());
    for line in BufReader::new(out).lines() {
        let line = line?;
        if let Some((passed, failed, skipped)) = result(&line) {
            tally.add(passed, failed, skipped);
            failed_before |= failed > 0;
        }
        if let Some(skipped) = skipped(&line) {
            tally.skip_instead(skipped);
        }
        if shown.wants(&line) {
            println!("{line}");
        }
    }
    let status = child.wait()?;
    if !status.success() && !failed_before {
        tally.fail(
            what,
            "it did not build or did not run; its messages are above",
        );
    }
    Ok(())
}

/// Which lines are worth showing: thousands of tests that passed, and what they printed, would hide the others.
#[derive(Default)]
struct Shown {
    /// These are lines of tests that passed.
    passed: bool,
}

impl Shown {
    fn wants(&mut self, line: &str) -> bool {
        if line == "successes:" {
            self.passed = true;
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.passed = false;
        }
        !self.passed && !line.ends_with(" ... ok") && !line.trim().is_empty()
    }
}

/// What a test says that could not run.
fn skipped(line: &str) -> Option<&str> {
    line.strip_prefix("SKIP ")
}

/// The counts of a `test result:` line.
fn result(line: &str) -> Option<(u64, u64, u64)> {
    let rest = line.strip_prefix("test result: ")?;
    let count = |what: &str| -> Option<u64> {
        let before = rest.split(&format!(" {what}")).next()?;
        before
            .rsplit(|c: char| !c.is_ascii_digit())
            .next()?
            .parse()
            .ok()
    };
    Some((count("passed")?, count("failed")?, count("ignored")?))
}

#[cfg(test)]
mod tests {
    use super::{result, skipped, Shown};

    #[test]
    fn what_passed_is_not_shown() {
        let lines = [
            "running 2 tests",
            "test a ... ok",
            "test b ... FAILED",
            "successes:",
            "---- a stdout ----",
            "SKIP a: why",
            "successes:",
            "    a",
            "failures:",
            "---- b stdout ----",
            "why",
            "test result: FAILED. 1 passed; 1 failed",
        ];
        let mut shown = Shown::default();
        let of: Vec<_> = lines.into_iter().filter(|line| shown.wants(line)).collect();
        assert_eq!(
            of,
            [
                "running 2 tests",
                "test b ... FAILED",
                "failures:",
                "---- b stdout ----",
                "why",
                "test result: FAILED. 1 passed; 1 failed"
            ]
        );
    }

    #[test]
    fn a_skip_is_seen() {
        assert_eq!(skipped("SKIP a: why"), Some("a: why"));
        assert_eq!(skipped("test a ... ok"), None);
    }

    #[test]
    fn counts_are_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 4 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(result(line), Some((12, 3, 4)));
        assert_eq!(result("test a ... ok"), None);
    }
}
