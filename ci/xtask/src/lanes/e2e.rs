// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The tests that run in a Xen machine: one boot, many tests.

use crate::build;
use crate::ktap;
use crate::machine::Machine;
use crate::tally::Tally;
use crate::{payload, recipes};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// By default all requests are copied. With this the large ones are mapped, so that a malicious
/// frontend meets both ways.
const MAPPING: &str = "copy_max_segments=16";

/// The tests of what honest guests and toolstacks do.
pub(super) fn tests(tally: &mut Tally, only: &str) -> Result<()> {
    let only = only.replace('\'', "");
    boot(
        tally,
        "e2e",
        "",
        &format!("exec /t/vmtest run --only '{only}'\n"),
    )
}

/// The tests of what a malicious frontend does.
pub(super) fn hostile(tally: &mut Tally) -> Result<()> {
    boot(tally, "hostile", MAPPING, "exec /t/hostile run\n")
}

/// A hundred deaths of the process that serves a disk, under load.
pub(super) fn deaths(tally: &mut Tally) -> Result<()> {
    boot(
        tally,
        "deaths",
        "",
        "exec /t/vmtest run --only tap.s12_hundred_kills\n",
    )
}

/// What the test of late writes says when a late write has done damage.
const LATE_WRITE: &str = "a write of a dead process came after a newer one";

/// Without the fence a late write does damage, and the test of late writes finds it.
pub(super) fn fault(tally: &mut Tally) -> Result<()> {
    let script = "exec /t/vmtest run --only tap.s05_late_write\n";
    let payload = with_everything("fault", script, &build::fenceless_module()?)?;
    let mut said = String::new();
    let outcome = machine("fault").run(&recipes::machines()?, &payload, |line| {
        said.push_str(line);
        said.push('\n');
    })?;
    let caught = outcome.verdict().and_then(|()| {
        anyhow::ensure!(
            said.contains(LATE_WRITE),
            "tap.s05_late_write did not find that the fence is missing:\n{said}"
        );
        Ok(())
    });
    tally.check("fault.missing-fence-is-caught", caught);
    Ok(())
}

/// Random requests of a malicious frontend; each run says its seed.
pub(super) fn fuzz(tally: &mut Tally) -> Result<()> {
    boot(
        tally,
        "fuzz",
        MAPPING,
        "exec /t/hostile fuzz --seed $$ --cases 2000\n",
    )
}

/// Random calls of a malicious process.
pub(super) fn fuzz_tap(tally: &mut Tally) -> Result<()> {
    boot(
        tally,
        "fuzz-tap",
        "",
        "exec /t/hostile fuzz-tap --seed $$ --cases 500\n",
    )
}

/// `options` are those of the module.
fn boot(tally: &mut Tally, name: &str, options: &str, script: &str) -> Result<()> {
    let payload = with_everything(name, script, &build::module()?)?;
    let conf = payload.join("overlay/usr/lib/modprobe.d/test.conf");
    fs::write(&conf, format!("options xen-blkback-rs {options}\n"))
        .with_context(|| format!("cannot write {}", conf.display()))?;
    let mut reader = ktap::Reader::default();
    let outcome = machine(name).run(&recipes::machines()?, &payload, |line| {
        reader.line(line, tally)
    });
    reader.finish(tally);
    tally.check(
        &format!("{name}.consoles-are-clean"),
        outcome.and_then(|outcome| outcome.verdict()),
    );
    Ok(())
}

fn machine(name: &str) -> Machine {
    let mut machine = Machine::new(name);
    machine.timeout = Duration::from_secs(45 * 60);
    machine
}

/// A payload with this module installed, the programs and a guest.
pub(crate) fn with_everything(name: &str, script: &str, module: &Path) -> Result<PathBuf> {
    let payload = payload::new(name, script)?;
    let machines = recipes::machines()?;
    let programs = build::programs()?;
    payload::add_installed(&payload, &machines, module, Some(&programs))?;
    for program in build::program_files(&programs)? {
        payload::add_program(&payload, &program)?;
    }
    payload::add_guest(&payload, &machines, &programs.join("vmtest"))?;
    Ok(payload)
}
