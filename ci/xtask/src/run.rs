// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Running other programs: with a log, and with a failure that names the log.

use anyhow::{bail, Context, Result};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

/// Number of lines of a log that a failure shows.
const TAIL: usize = 25;

/// Runs `command` with all its output in `log`; a failure names the log and shows its end.
pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<()> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write the log {}", log.display()))?;
    command.stdout(file.try_clone()?).stderr(file);
    let status = start(command)?.wait()?;
    if status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    bail!(
        "`{}` failed ({status}); the log is {}, its last lines are:\n{}",
        name(command),
        log.display(),
        tail(&text, TAIL)
    )
}

/// Runs `command` with its output on this process's output.
pub(crate) fn shown(command: &mut Command) -> Result<()> {
    let status = start(command)?.wait()?;
    if !status.success() {
        bail!(
            "`{}` failed ({status}); its messages are above",
            name(command)
        );
    }
    Ok(())
}

/// Runs `command` and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{}`", name(command)))?;
    if !out.status.success() {
        bail!("`{}` failed ({})", name(command), out.status);
    }
    Ok(String::from_utf8(out.stdout)?)
}

/// Starts `command`; a failure names the program.
pub(crate) fn start(command: &mut Command) -> Result<std::process::Child> {
    command
        .spawn()
        .with_context(|| format!("cannot start `{}`: is it installed?", name(command)))
}

/// Removes a tree if it is there, without crossing into another file system, because a leftover mount must never be
/// emptied.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    shown(
        Command::new("rm")
            .args(["-rf", "--one-file-system", "--"])
            .arg(path),
    )
}

/// Returns the last `count` lines of `text`.
pub(crate) fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

fn name(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .take(6)
            .map(|arg| arg.to_string_lossy().into_owned()),
    );
    words.retain(|word| !word.contains('\n'));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_the_end() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
    }

    #[test]
    fn failure_shows_the_end_of_the_log() {
        let log = std::env::temp_dir().join(format!("xtask-run-{}.log", std::process::id()));
        let error = logged(
            Command::new("sh").args(["-c", "echo the reason; exit 1"]),
            &log,
        )
        .unwrap_err();
        assert!(error.to_string().contains("the reason"), "{error}");
        fs::remove_file(log).unwrap();
    }
}
