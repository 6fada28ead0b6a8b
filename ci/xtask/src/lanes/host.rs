// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Unit, property and model tests: `cargo test` over the workspace, and the loom models.

use crate::steps::{self, RunningStep, StepKind};
use crate::tally::TestTally;
use crate::{build, host, run};
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

pub(super) fn tests(tally: &mut TestTally) -> Result<()> {
    host::for_tests()?;
    // One selection of crates, because cargo would rebuild shared crates for another one.
    let mut all = cargo_test();
    all.arg("--workspace");
    count(
        tally,
        "the tests of the workspace",
        all,
        &["--no-fail-fast", "--", "--show-output"],
    )?;
    // The models need another build of everything below them, so it has a folder of its own.
    let mut loom = cargo_test();
    loom.args(["-p", "ring", "--release", "--test", "loom"]);
    loom.env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", build::repository()?.join("target/loom"));
    count(tally, "the loom models", loom, &[])
}

/// Runs the tests of sanlock's daemons that wait for events which take these a minute.
pub(super) fn sanlock(tally: &mut TestTally, _seed: Option<u64>) -> Result<()> {
    host::for_sanlock()?;
    let mut tests = cargo_test();
    tests.args(["-p", "lease", "--lib"]);
    count(
        tally,
        "the tests of sanlock",
        tests,
        &["--", "--ignored", "sanlock"],
    )
}

/// Repairs thousands of images with one wrong word. `SEED` and `SEEDS` select them.
pub(super) fn repairs(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    host::for_tests()?;
    let mut tests = cargo_test();
    tests.args(["-p", "tapimg", "--test", "tool"]);
    if let Some(seed) = seed {
        tests.env("SEED", seed.to_string());
    }
    count(
        tally,
        "the mutations of images",
        tests,
        &["--", "--ignored", "--nocapture", "mutations"],
    )
}

fn cargo_test() -> Command {
    let mut cargo = build::cargo();
    cargo.args(["test", "--locked"]);
    cargo
}

/// Builds the programs that `cargo` names, runs them with the words `run`, and adds the counts in their last lines;
/// shows everything but passed tests.
fn count(tally: &mut TestTally, what: &str, cargo: Command, run: &[&str]) -> Result<()> {
    let programs = match programs(what, &cargo) {
        Ok(programs) => programs,
        Err(error) => {
            tally.fail(what, &format!("{error:#}"));
            return Ok(());
        }
    };
    // cargo reports the next program on its standard error, and the program's lines are on its output.
    let mut merged = Command::new("sh");
    merged.args(["-c", "exec \"$@\" 2>&1", "sh"]);
    merged.arg(cargo.get_program()).args(cargo.get_args());
    merged.args(run);
    give_environment(&cargo, &mut merged);
    merged
        .current_dir(build::repository()?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = run::start(&mut merged)?;
    let out = child.stdout.take().context("cargo has no output")?;
    let _step = RunningStep::begin(StepKind::Machine, what, &format!("running {what}"));
    let (mut failed_before, mut shown) = (false, ShownLines::default());
    let mut program: Option<(String, Instant)> = None;
    for line in BufReader::new(out).lines() {
        let line = line?;
        if let Some(next) = running(&line, &programs) {
            program = Some((next, Instant::now()));
        } else if let Some((passed, failed, skipped)) = result(&line) {
            tally.add(passed, failed, skipped);
            failed_before |= failed > 0;
            if let Some((program, start)) = program.take() {
                steps::took(StepKind::Program, &program, start.elapsed().as_secs_f64());
            }
        }
        if let Some(skipped) = skipped(&line) {
            tally.skip_instead(skipped);
        }
        if shown.wants(&line) {
            steps::printed();
            println!("{line}");
        }
    }
    let status = child.wait()?;
    if !status.success() && !failed_before {
        tally.fail(what, "it did not run; its messages are above");
    }
    Ok(())
}

/// Builds the test programs that `cargo` names; returns their names, by path.
fn programs(what: &str, cargo: &Command) -> Result<Vec<(PathBuf, String)>> {
    let mut build = Command::new(cargo.get_program());
    build.args(cargo.get_args());
    build.args(["--no-run", "--message-format=json-render-diagnostics"]);
    if !steps::cargo_shows_itself() {
        build.arg("--quiet");
    }
    give_environment(cargo, &mut build);
    let _step = RunningStep::begin(StepKind::Build, what, &format!("compiling {what}"));
    let text = run::output(build.current_dir(build::repository()?).stdin(Stdio::null()))
        .context("it did not build; the compiler's messages are above")?;
    Ok(text.lines().filter_map(executable).collect())
}

/// Copies the changes of the environment from one command to another.
fn give_environment(from: &Command, to: &mut Command) {
    for (name, value) in from.get_envs() {
        match value {
            Some(value) => to.env(name, value),
            None => to.env_remove(name),
        };
    }
}

/// Returns the test program in a line of cargo's messages: its path, and the names of its crate and target.
fn executable(line: &str) -> Option<(PathBuf, String)> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let path = message.get("executable")?.as_str()?;
    let manifest = Path::new(message.get("manifest_path")?.as_str()?);
    let package = manifest.parent()?.file_name()?.to_string_lossy();
    let target = message.get("target")?.get("name")?.as_str()?;
    Some((path.into(), format!("{package} {target}")))
}

/// Returns the name of the program that cargo reports to run next.
fn running(line: &str, programs: &[(PathBuf, String)]) -> Option<String> {
    let line = line.trim_start();
    if let Some(package) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{package} (examples in the documentation)"));
    }
    let (_, path) = line.strip_prefix("Running ")?.split_once('(')?;
    let path = path.strip_suffix(')')?;
    let known = programs.iter().find(|(program, _)| program.ends_with(path));
    Some(known.map_or(path, |(_, name)| name).to_string())
}

/// Selection of the shown lines: thousands of passed tests, and their output, would hide the others.
#[derive(Default)]
struct ShownLines {
    /// The lines are those of passed tests.
    passed: bool,
}

impl ShownLines {
    fn wants(&mut self, line: &str) -> bool {
        if line == "successes:" {
            self.passed = true;
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.passed = false;
        }
        !self.passed && !line.ends_with(" ... ok") && !line.trim().is_empty()
    }
}

/// Returns the reason of a test that could not run.
fn skipped(line: &str) -> Option<&str> {
    line.strip_prefix("SKIP ")
}

/// Returns the counts of a `test result:` line.
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
    use super::{executable, result, running, skipped, ShownLines};

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
        let mut shown = ShownLines::default();
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
    fn programs_have_the_names_of_their_crates() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/c/userspace/formats/Cargo.toml","target":{"name":"suite"},"executable":"/c/target/debug/deps/suite-1f"}"#;
        let programs = vec![executable(line).unwrap()];
        let name = |line: &str| running(line, &programs);
        assert_eq!(
            name("     Running tests/suite/main.rs (target/debug/deps/suite-1f)").as_deref(),
            Some("formats suite")
        );
        assert_eq!(
            name("     Running unittests src/lib.rs (target/debug/deps/a-2)").as_deref(),
            Some("target/debug/deps/a-2")
        );
        assert_eq!(
            name("   Doc-tests ring").as_deref(),
            Some("ring (examples in the documentation)")
        );
        assert_eq!(name("running 3 tests"), None);
        assert!(executable(r#"{"reason":"build-finished","success":true}"#).is_none());
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
