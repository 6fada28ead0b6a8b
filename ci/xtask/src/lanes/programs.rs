// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Runs the test programs that cargo builds, several at once: most tests wait for processes, so that one program after
//! the other leaves half of the processors idle.

use crate::steps::{self, RunningStep, StepKind};
use crate::tally::TestTally;
use crate::{build, run};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Programs that run at once beyond the number of processors.
const WAITING: usize = 1;

/// A test program that cargo has built.
#[derive(Debug)]
struct TestProgram {
    path: PathBuf,
    /// Names of its crate and of its target.
    name: String,
    /// Folder of its crate, in which cargo runs it.
    folder: PathBuf,
}

/// Output of a program that has ended.
struct EndedProgram {
    name: String,
    text: String,
    /// How the program failed.
    failure: Option<String>,
}

/// Builds the programs that `cargo` names, runs each with these words, and adds their counts.
pub(super) fn test(
    tally: &mut TestTally,
    what: &str,
    cargo: &Command,
    words: &[&str],
) -> Result<()> {
    let mut programs = match programs(what, cargo) {
        Ok(programs) => programs,
        Err(error) => {
            tally.fail(what, &format!("{error:#}"));
            return Ok(());
        }
    };
    // The longest ones first, so that none of them runs alone at the end; a program without a time may be long.
    let time = |program: &TestProgram| steps::last_time(StepKind::Program, &program.name);
    programs.sort_by(|a, b| {
        let (a, b) = (time(a), time(b));
        b.unwrap_or(f64::MAX).total_cmp(&a.unwrap_or(f64::MAX))
    });
    let at_once = thread::available_parallelism()?.get() + WAITING;
    let left = Mutex::new(programs.into_iter());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let (done, ended) = channel();
    thread::scope(|scope| {
        for _ in 0..at_once {
            let (next, done) = (&next, done.clone());
            scope.spawn(move || {
                while let Some(program) = next() {
                    // The receiver lives until all threads have ended.
                    let _ = done.send(program.run(cargo, words));
                }
            });
        }
        drop(done);
        ended.iter().for_each(|ended| count(tally, &ended));
    });
    Ok(())
}

/// Runs the examples in documentation comments, which cargo compiles itself, and adds their counts.
pub(super) fn examples(tally: &mut TestTally, what: &str, cargo: &Command) -> Result<()> {
    let mut command = Command::new(cargo.get_program());
    command
        .args(cargo.get_args())
        .args(["--no-fail-fast", "--", "--show-output"])
        .current_dir(build::repository()?);
    give_environment(cargo, &mut command);
    count(tally, &run_to_end(what, &command));
    Ok(())
}

impl TestProgram {
    /// Runs the program as cargo does.
    fn run(&self, cargo: &Command, words: &[&str]) -> EndedProgram {
        let mut command = Command::new(&self.path);
        command
            .args(words)
            .arg("--show-output")
            .current_dir(&self.folder)
            .env("CARGO_MANIFEST_DIR", &self.folder);
        give_environment(cargo, &mut command);
        run_to_end(&self.name, &command)
    }
}

/// Runs a command, with its messages and its output in one text.
fn run_to_end(name: &str, command: &Command) -> EndedProgram {
    let _step = RunningStep::begin(StepKind::Program, name, &format!("running {name}"));
    let mut merged = Command::new("sh");
    merged.args(["-c", "exec \"$@\" 2>&1", "sh"]);
    merged.arg(command.get_program()).args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        merged.current_dir(folder);
    }
    give_environment(command, &mut merged);
    let (text, failure) = match merged.stdin(Stdio::null()).output() {
        Ok(out) => (
            String::from_utf8_lossy(&out.stdout).into_owned(),
            (!out.status.success()).then(|| out.status.to_string()),
        ),
        Err(error) => (
            String::new(),
            Some(format!("cannot start a shell: {error}")),
        ),
    };
    EndedProgram {
        name: name.to_owned(),
        text,
        failure,
    }
}

/// Adds the counts of a program, and shows everything but passed tests.
fn count(tally: &mut TestTally, ended: &EndedProgram) {
    let judged = JudgedLines::of(&ended.text);
    let (passed, failed, skipped) = judged.counts;
    tally.add(passed, failed, skipped);
    steps::printed();
    println!("== {}", ended.name);
    judged.shown.iter().for_each(|line| println!("{line}"));
    for reason in judged.skipped {
        tally.skip_instead(reason);
    }
    if let (Some(how), 0) = (&ended.failure, failed) {
        let why = format!("it did not run to its end ({how}); its messages are above");
        tally.fail(&ended.name, &why);
    }
}

/// Meaning of a program's lines.
#[derive(Debug, Default, PartialEq, Eq)]
struct JudgedLines<'a> {
    /// Passed, failed and skipped tests.
    counts: (u64, u64, u64),
    /// Reasons of tests that passed because they could not run.
    skipped: Vec<&'a str>,
    /// All lines but those of passed tests.
    shown: Vec<&'a str>,
}

impl<'a> JudgedLines<'a> {
    fn of(text: &'a str) -> JudgedLines<'a> {
        let (mut judged, mut shown) = (JudgedLines::default(), ShownLines::default());
        for line in text.lines() {
            if let Some((passed, failed, skipped)) = result(line) {
                judged.counts.0 += passed;
                judged.counts.1 += failed;
                judged.counts.2 += skipped;
            }
            judged.skipped.extend(skipped(line));
            if shown.wants(line) {
                judged.shown.push(line);
            }
        }
        judged
    }
}

/// Builds the test programs that `cargo` names.
fn programs(what: &str, cargo: &Command) -> Result<Vec<TestProgram>> {
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

/// Returns the test program in a line of cargo's messages.
fn executable(line: &str) -> Option<TestProgram> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    // Tests of a program need the program itself, which cargo builds and reports as well.
    message
        .get("profile")?
        .get("test")?
        .as_bool()?
        .then_some(())?;
    let path = message.get("executable")?.as_str()?;
    let manifest = Path::new(message.get("manifest_path")?.as_str()?);
    let folder = manifest.parent()?;
    let package = folder.file_name()?.to_string_lossy();
    let target = message.get("target")?.get("name")?.as_str()?;
    Some(TestProgram {
        path: path.into(),
        name: format!("{package} {target}"),
        folder: folder.into(),
    })
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
    use super::{
        count, executable, result, run_to_end, skipped, EndedProgram, JudgedLines, ShownLines,
    };
    use crate::tally::TestTally;
    use std::path::Path;
    use std::process::Command;

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
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/c/userspace/formats/Cargo.toml","target":{"name":"suite"},"profile":{"test":true},"executable":"/c/target/debug/deps/suite-1f"}"#;
        let program = executable(line).unwrap();
        assert_eq!(program.name, "formats suite");
        assert_eq!(program.folder, Path::new("/c/userspace/formats"));
        assert_eq!(program.path, Path::new("/c/target/debug/deps/suite-1f"));
        assert!(executable(r#"{"reason":"build-finished","success":true}"#).is_none());
    }

    #[test]
    fn a_program_of_the_tests_is_not_run() {
        let line = r#"{"manifest_path":"/c/tapimg/Cargo.toml","target":{"name":"tapimg"},"profile":{"test":false},"executable":"/c/target/debug/tapimg"}"#;
        assert!(executable(line).is_none());
    }

    #[test]
    fn lines_are_judged() {
        // In parts, so that this program's own lines have no such line.
        let sum = |rest: &str| format!("test result: {rest}");
        let text = format!(
            "test a ... ok\nSKIP a: why\n{}\n",
            sum("ok. 2 passed; 0 failed; 1 ignored;")
        );
        let judged = JudgedLines::of(&text);
        assert_eq!((judged.counts, judged.skipped), ((2, 0, 1), vec!["a: why"]));
        let text = sum("FAILED. 1 passed; 2 failed; 0 ignored;");
        assert_eq!(JudgedLines::of(&text).counts, (1, 2, 0));
        assert_eq!(JudgedLines::of("test a ... ok").counts, (0, 0, 0));
    }

    #[test]
    fn a_program_that_dies_before_its_sum_is_a_failure() {
        let mut tally = TestTally::default();
        let mut ended = EndedProgram {
            name: "a".into(),
            text: "test a ... ok".into(),
            failure: Some("signal: 6".into()),
        };
        count(&mut tally, &ended);
        assert_eq!(tally.line(), "0 passed, 1 failed, 0 skipped");
        ended.failure = None;
        count(&mut tally, &ended);
        assert_eq!(tally.line(), "0 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn output_and_messages_of_a_program_are_read_to_their_end() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo message >&2; exit 3"]);
        let ended = run_to_end("sh", &command);
        assert_eq!(ended.text, "out\nmessage\n");
        assert_eq!(ended.failure.as_deref(), Some("exit status: 3"));
        let ended = run_to_end("none", &Command::new("/nonexistent"));
        assert!(ended.failure.is_some());
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
