// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Running programs of dom0 with a time limit, and waiting for a condition with a deadline.

use anyhow::{bail, Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// The limit for quick programs (emulation is slow).
const LIMIT: Duration = Duration::from_secs(60);

/// Output and end of a program.
pub(crate) struct Output {
    /// The exit status; 124 when the time limit ended it.
    pub(crate) rc: i32,
    /// Standard output and standard error.
    pub(crate) text: String,
    /// Standard output alone.
    pub(crate) stdout: String,
}

/// Runs a program to its end, whatever its status.
pub(crate) fn status(argv: &[&str], limit: Duration) -> Result<Output> {
    let output = Command::new("timeout")
        .args(["-k", "5", &limit.as_secs().max(1).to_string()])
        .args(argv)
        .output()
        .with_context(|| format!("cannot start `{}`: is it installed in dom0?", argv[0]))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let text = format!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
    Ok(Output {
        rc: output.status.code().unwrap_or(-1),
        text,
        stdout,
    })
}

/// Makes a program of this text.
pub(crate) fn program(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {path}"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make a program of {path}"))
}

/// Runs a program that must succeed and returns its standard output.
pub(crate) fn run(argv: &[&str]) -> Result<String> {
    run_for(argv, LIMIT)
}

/// Runs a program that must succeed, with a time limit of the caller.
pub(crate) fn run_for(argv: &[&str], limit: Duration) -> Result<String> {
    let output = status(argv, limit)?;
    if output.rc != 0 {
        bail!(
            "`{}` failed with status {}: {}",
            argv.join(" "),
            output.rc,
            tail(&output.text, 400)
        );
    }
    Ok(output.stdout)
}

/// Runs a line of shell that must succeed.
pub(crate) fn shell(line: &str) -> Result<String> {
    run(&["sh", "-c", line])
}

/// Loads a module with its dependencies.
pub(crate) fn modprobe(module: &str, args: &[&str]) -> Result<()> {
    let mut argv = vec!["modprobe", module];
    argv.extend(args);
    run(&argv).map(drop)
}

/// Writes one value to a file of sysfs or configfs.
pub(crate) fn put(path: impl AsRef<Path>, value: &str) -> Result<()> {
    let path = path.as_ref();
    std::fs::write(path, value)
        .with_context(|| format!("cannot write `{value}` to {}", path.display()))
}

/// Reads one value from a file of sysfs or procfs, without the white space around it.
pub(crate) fn get(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// Least and most time between two polls.
const PAUSE: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(250)];

/// Polls until the condition holds; an error names what did not come.
pub(crate) fn wait_for(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let found = dom0::poll::until(limit, PAUSE, || {
        Ok::<_, anyhow::Error>(condition()?.then_some(()))
    })?;
    found.with_context(|| format!("{what} did not happen within {} s", limit.as_secs()))
}

/// The end of a text, for messages.
pub(crate) fn tail(text: &str, max: usize) -> String {
    let text = text.trim();
    let skip = text.chars().count().saturating_sub(max);
    text.chars()
        .skip(skip)
        .collect::<String>()
        .replace('\n', " | ")
}
