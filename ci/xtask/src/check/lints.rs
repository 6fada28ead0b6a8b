// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! clippy: over the workspace with the host's, over the module with the build root's.

use crate::build;
use crate::run;
use crate::steps::{RunningStep, StepKind};
use crate::tally::TestTally;
use anyhow::Result;
use std::process::Stdio;

pub(super) fn workspace(tally: &mut TestTally) {
    let mut probe = build::cargo();
    probe
        .args(["clippy", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if !probe.status().is_ok_and(|status| status.success()) {
        tally.skip(
            "check.clippy-workspace",
            "the host has no clippy: rustup component add clippy",
        );
        return;
    }
    tally.check("check.clippy-workspace", clippy());
}

fn clippy() -> Result<()> {
    let mut cargo = build::cargo();
    cargo.args([
        "clippy",
        "--quiet",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    let _step = RunningStep::begin(
        StepKind::Build,
        "clippy of the workspace",
        "looking at the workspace with clippy",
    );
    run::shown(cargo.current_dir(build::repository()?).stdin(Stdio::null()))
}

pub(super) fn module() -> Result<()> {
    let messages = build::clippy_messages()?;
    super::none(warnings(&messages))
}

/// Returns the messages of the compiler, if there are warnings among them.
fn warnings(messages: &str) -> Vec<String> {
    if messages
        .lines()
        .any(|line| line.starts_with("warning") || line.contains(": warning:"))
    {
        vec![messages.trim().to_string()]
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::warnings;

    #[test]
    fn warning_of_either_compiler_is_found() {
        assert_eq!(
            warnings("warning: unused variable: `x`\n --> a.rs\n").len(),
            1
        );
        assert_eq!(warnings("shim.c:1:2: warning: unused variable\n").len(), 1);
        assert!(warnings("").is_empty());
    }
}
