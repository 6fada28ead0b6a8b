// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What takes too long for each change.

use crate::tally::Tally;
use crate::{build, cache, run};
use anyhow::Result;
use std::process::Stdio;

pub(super) fn tests(tally: &mut Tally) -> Result<()> {
    tally.check("nightly.cargo-deny", deny());
    super::e2e::fuzz(tally)
}

/// cargo-deny over the whole dependency graph. Its installation from source is what takes long.
fn deny() -> Result<()> {
    let tool = cache::Artefact {
        name: "cargo-deny",
        title: "cargo-deny",
        about: "10 min",
        inputs: vec!["cargo-deny"],
    };
    let dir = tool.get(|dir, log| {
        let mut cargo = build::cargo();
        cargo
            .args(["install", "cargo-deny", "--locked", "--root"])
            .arg(dir);
        run::logged(cargo.stdin(Stdio::null()), log)
    })?;
    let mut deny = std::process::Command::new(dir.join("bin/cargo-deny"));
    deny.args(["--locked", "check", "licenses", "bans", "sources"]);
    run::shown(deny.current_dir(build::repository()?))
}
