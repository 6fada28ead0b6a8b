// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Licences: a header on each source, and dependencies that may be linked (cargo-deny).

use super::source::Source;
use crate::{build, cache, run};
use anyhow::Result;
use std::process::{Command, Stdio};

/// The endings of files that must have a licence header.
const WITH_HEADER: &[&str] = &[
    ".rs",
    ".c",
    ".h",
    ".sh",
    ".py",
    ".hook",
    ".packages",
    ".conf",
];

/// Runs cargo-deny over the whole dependency graph: licences, versions, sources. It is built from source once, without
/// optimisation, which would take four times as long as the run gains.
pub(super) fn dependencies() -> Result<()> {
    let tool = cache::Artefact {
        name: "cargo-deny",
        title: "cargo-deny",
        about: "2 min",
        inputs: vec!["cargo-deny"],
    };
    let dir = tool.get(|dir, log| {
        let mut cargo = build::cargo();
        cargo
            .args(["install", "cargo-deny", "--debug", "--locked", "--root"])
            .arg(dir)
            .env("CARGO_PROFILE_DEV_DEBUG", "0");
        run::logged(cargo.stdin(Stdio::null()), log)
    })?;
    let mut deny = Command::new(dir.join("bin/cargo-deny"));
    deny.args(["--locked", "--log-level", "error", "check"]);
    deny.args(["licenses", "bans", "sources"]);
    run::shown(deny.current_dir(build::repository()?))
}

/// Returns the sources without an SPDX identifier in their first two lines.
pub(super) fn without_header(sources: &[Source]) -> Vec<String> {
    sources
        .iter()
        .filter(|source| {
            WITH_HEADER
                .iter()
                .any(|ending| source.path.ends_with(ending))
        })
        .filter(|source| {
            !source
                .text
                .lines()
                .take(2)
                .any(|line| line.contains("SPDX-License-Identifier: "))
        })
        .map(|source| {
            format!(
                "{}: no SPDX-License-Identifier in its first two lines",
                source.path
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{without_header, Source};

    #[test]
    fn file_without_a_header_is_found() {
        let file = |text: &str| Source::of("a/b.rs", text);
        assert_eq!(without_header(&[file("//! Docs.\n")]).len(), 1);
        assert!(without_header(&[file("// SPDX-License-Identifier: MIT\n")]).is_empty());
    }
}
