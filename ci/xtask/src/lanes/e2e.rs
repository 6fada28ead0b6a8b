// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The tests that run in a Xen machine: one boot, many tests.

use crate::build;
use crate::ktap;
use crate::machine::Machine;
use crate::tally::Tally;
use crate::{payload, recipes};
use anyhow::Result;
use std::time::Duration;

pub(super) fn tests(tally: &mut Tally, only: &str) -> Result<()> {
    let only = only.replace('\'', "");
    let script = format!("exec /t/vmtest run --only '{only}'\n");
    let payload = with_everything("e2e", &script)?;
    let mut machine = Machine::new("e2e");
    machine.timeout = Duration::from_secs(45 * 60);
    let mut reader = ktap::Reader::default();
    let outcome = machine.run(&recipes::machines()?, &payload, |line| {
        reader.line(line, tally)
    });
    reader.finish(tally);
    tally.check(
        "e2e.consoles-are-clean",
        outcome.and_then(|outcome| outcome.verdict()),
    );
    Ok(())
}

/// A payload with our module installed, the programs and a guest.
pub(crate) fn with_everything(name: &str, script: &str) -> Result<std::path::PathBuf> {
    let payload = payload::new(name, script)?;
    let machines = recipes::machines()?;
    let module = build::module()?;
    let programs = build::programs()?;
    payload::add_installed(&payload, &machines, &module, Some(&programs))?;
    for program in build::program_files(&programs)? {
        payload::add_program(&payload, &program)?;
    }
    payload::add_guest(&payload, &machines, &programs.join("vmtest"))?;
    Ok(payload)
}
