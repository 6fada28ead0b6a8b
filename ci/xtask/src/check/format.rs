// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Formatting, by the build root's rustfmt, so that one version judges on every host.

use super::source::{self, Source};
use crate::root::Root;
use crate::{build, recipes};
use anyhow::{bail, Context, Result};

pub(super) fn check(sources: &[Source]) -> Result<()> {
    let files: Vec<String> = source::rust(sources)
        .map(|source| format!("/mnt/b/{}", source.path))
        .collect();
    check_files(&build::repository()?, &files)
}

fn check_files(folder: &std::path::Path, files: &[String]) -> Result<()> {
    let root = Root::new(&recipes::build_root()?).bind_read_only(folder, "/mnt/b");
    let mut rustfmt = root.command("rustfmt");
    rustfmt.args(["--check", "--edition", "2021", "--color", "never"]);
    rustfmt.args(["--config-path", "/mnt/b"]);
    let out = rustfmt
        .args(files)
        .output()
        .context("cannot start rustfmt in the build root")?;
    if out.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stdout).replace("/mnt/b/", "");
    let more = String::from_utf8_lossy(&out.stderr).replace("/mnt/b/", "");
    bail!(
        "{}{}\nremedy: cargo fmt --all",
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
    #[test]
    fn only_the_beginning_of_a_long_complaint_is_shown() {
        assert_eq!(super::first_lines(&"x\n".repeat(99)).lines().count(), 40);
    }
}
