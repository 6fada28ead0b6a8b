// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! `cargo xtask check`: checks of the sources, and of the compiled module, that do not run it.

mod allowed;
mod circles;
mod direction;
mod format;
pub(crate) mod frames;
mod licences;
mod lints;
pub(crate) mod names;
mod pages;
pub(crate) mod panics;
pub(crate) mod prose;
mod recorded;
pub(crate) mod reference;
mod source;
pub(crate) mod subjects;
mod unsafe_code;

use crate::build;
use crate::tally::TestTally;
use anyhow::{bail, Result};
use source::Source;

/// Runs all checks.
pub(crate) fn run(tally: &mut TestTally) -> Result<()> {
    let sources = source::all()?;
    tally.check("check.format", format::check(&sources));
    of_text(tally, &sources);
    tally.check("check.dependencies", licences::dependencies());
    lints::workspace(tally);
    tally.check("check.clippy-module", lints::module());
    match build::module() {
        Ok(module) => {
            tally.check("check.module-cannot-panic", panics::check(&module));
            tally.check("check.module-stack-frames", frames::check(&module));
        }
        Err(error) => tally.fail("check.module", &format!("{error:#}")),
    }
    Ok(())
}

/// Runs the checks that need neither root nor a Debian tree, before each commit.
pub(crate) fn sources(tally: &mut TestTally) -> Result<()> {
    let sources = source::all()?;
    tally.check("check.format", format::by_host());
    of_text(tally, &sources);
    lints::workspace(tally);
    Ok(())
}

/// Runs the checks of the files' texts alone, which take seconds.
pub(crate) fn texts(tally: &mut TestTally) -> Result<()> {
    of_text(tally, &source::all()?);
    Ok(())
}

/// Runs the checks of the files' texts.
fn of_text(tally: &mut TestTally, sources: &[Source]) {
    tally.check(
        "check.licence-headers",
        none(licences::without_header(sources)),
    );
    tally.check("check.unsafe-code", unsafe_code::check(sources));
    tally.check("check.dependency-direction", direction::check(sources));
    tally.check("check.circles", circles::check(sources));
    tally.check("check.pages", pages::check(sources));
    tally.check("check.recorded-output", recorded::check(sources));
    tally.check("check.prose", prose::check(sources));
    tally.check("check.names", names::check(sources));
    tally.check("check.reference", reference::check(sources));
    tally.check("check.commit-subjects", subjects::history(sources));
}

/// Returns an error that lists the complaints, if there are any.
fn none(complaints: Vec<String>) -> Result<()> {
    if complaints.is_empty() {
        return Ok(());
    }
    bail!("{}", complaints.join("\n"))
}
