// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The requests of a guest are traced, and replayed on a copy of its disk.

use super::tap::{end_load, full_image, image, start_load, wait_progress, VDEV};
use super::{Case, Context, SharedGuest};
use crate::sh;
use crate::tap::{self, ServedDisk};
use anyhow::{ensure, Result};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// MiB of the disk.
const SIZE: u32 = 16;
const LIMIT: Duration = Duration::from_secs(120);
const TRACE: &str = "/dev/shm/guest.trace";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let about = "a trace over deaths and a hand-off, done again on a copy of the disk, gives what is in the disk";
    let replayed = Case::new("trace.replayed", about, SharedGuest::Pv, replayed);
    vec![replayed.supervised().no_leaks().nightly()]
}

fn replayed(context: &mut Context) -> Result<()> {
    let worked = full_image(context, "a.img", SIZE)?;
    let copy = image(context, "copy.img", SIZE)?;
    sh::run(&["cp", &worked, &copy])?;
    context.at_end(format!("remove {TRACE}"), || Ok(fs::remove_file(TRACE)?));
    let guest = context.pv()?;
    // The process would not see writes of the kernel in passthrough.
    let target = format!("direct=yes,aio:{worked}");
    let disk = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let minor = disk.minor.to_string();
    tap::ctl(&[
        "trace", &minor, "--output", TRACE, "--data", "--size", "256M",
    ])?;
    let load = start_load(guest)?;
    for _ in 0..3 {
        wait_progress(&disk, 50)?;
        disk.replace()?;
    }
    wait_progress(&disk, 50)?;
    tap::ctl(&["handoff", &minor])?;
    wait_progress(&disk, 50)?;
    let told = end_load(guest, load)?;
    let said = tap::ctl(&["trace", &minor, "--end"])?;
    ensure!(said.contains("trace=none"), "the trace did not end: {said}");
    disk.detach(guest)?;
    ensure!(Path::new(TRACE).exists(), "the trace is gone");
    let on = format!("aio:{copy}");
    sh::run_for(&["tapimg", "replay", TRACE, &on], LIMIT)?;
    sh::run(&["cmp", &worked, &copy])?;
    let listed = sh::run_for(&["tapimg", "replay", TRACE, "--list"], LIMIT)?;
    ensure!(
        listed.lines().any(|line| line.contains("op=flush")),
        "no flush is in the trace: {}",
        sh::tail(&listed, 400)
    );
    context.note(&format!("{} requests; {told}", listed.lines().count()))
}
