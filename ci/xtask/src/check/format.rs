// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Formatting, by the build root's rustfmt, so that all hosts use one version.

use super::source::{self, Source};
use crate::root::Root;
use crate::{artifacts, build};
use anyhow::{bail, Context, Result};
use std::process::Command;

pub(super) fn check(sources: &[Source]) -> Result<()> {
    let files: Vec<String> = source::rust(sources)
        .map(|source| format!("/mnt/b/{}", source.path))
        .collect();
    let root = Root::new(&artifacts::build_root()?).bind_read_only(&build::repository()?, "/mnt/b");
    let mut rustfmt = root.command("rustfmt");
    rustfmt.args(["--check", "--edition", "2021", "--color", "never"]);
    rustfmt.args(["--config-path", "/mnt/b"]);
    judge(rustfmt.args(files))
}

/// Checks the formatting by the host's rustfmt, which may differ a little from the build root's.
pub(super) fn by_host() -> Result<()> {
    let mut cargo = build::cargo();
    judge(
        cargo
            .args(["fmt", "--all", "--check"])
            .current_dir(build::repository()?),
    )
}

/// Returns rustfmt's complaints about the files as an error.
fn judge(rustfmt: &mut Command) -> Result<()> {
    let out = rustfmt.output().context("cannot start rustfmt")?;
    if out.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stdout).replace("/mnt/b/", "");
    let more = String::from_utf8_lossy(&out.stderr).replace("/mnt/b/", "");
    bail!(
        "{}{}remedy: cargo fmt --all",
        first_lines(&text),
        first_lines(&more)
    )
}

fn first_lines(text: &str) -> String {
    text.lines()
        .take(40)
        .map(|line| format!("{line}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn difference_is_an_error_that_shows_it() {
        let mut rustfmt = Command::new("sh");
        rustfmt.args(["-c", "echo 'Diff in /mnt/b/a.rs:1:'; exit 1"]);
        let error = judge(&mut rustfmt).unwrap_err().to_string();
        assert!(error.starts_with("Diff in a.rs:1:"), "{error}");
        assert!(judge(Command::new("sh").args(["-c", "exit 0"])).is_ok());
    }

    #[test]
    fn only_the_beginning_of_a_long_complaint_is_shown() {
        assert_eq!(first_lines(&"x\n".repeat(99)).lines().count(), 40);
    }
}
