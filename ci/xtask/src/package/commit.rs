// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The packaged commit and its time.

use crate::{build, run};
use anyhow::{Context, Result};
use std::process::Command;

/// The commit that is packaged.
pub(super) struct Commit {
    pub(super) version: String,
    /// Time of the commit, in seconds since 1970 and in the form of a changelog.
    pub(super) seconds: String,
    pub(super) date: String,
    pub(super) author: String,
}

impl Commit {
    pub(super) fn checked_out() -> Result<Commit> {
        let repository = build::repository()?;
        let ask = |format: &str, date: &str| -> Result<String> {
            let mut git = Command::new("git");
            git.args(["log", "-1", &format!("--format={format}")]);
            git.arg(format!("--date=format:{date}"))
                .env("TZ", "UTC")
                .current_dir(&repository);
            let text = run::output(&mut git).context("only a git checkout has a version")?;
            Ok(text.trim().to_string())
        };
        Ok(Commit {
            version: ask(
                concat!(env!("CARGO_PKG_VERSION"), "~git%cd.%h"),
                "%Y%m%d%H%M",
            )?,
            seconds: ask("%ct", "")?,
            date: ask("%cD", "")?,
            author: ask("%an <%ae>", "")?,
        })
    }
}
