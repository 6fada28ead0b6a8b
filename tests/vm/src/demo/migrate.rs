// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The story of a guest that never stops: it moves to another domain, its disk's process is upgraded, its disk switches
//! to another image, and the kernel's module is exchanged, while it writes and verifies its data all the time.

use super::direct::{end, job, USED_MIB};
use crate::cases::{outlive_emulator, wait_progress};
use crate::console::GuestJob;
use crate::guest::{AttachedVbd, Config, Guest, GuestKind};
use crate::report::CaseReport;
use crate::sh;
use crate::tap::{self, disk, image, wait_supervisor, EventLog, ServedDisk};
use anyhow::{ensure, Context, Result};
use std::time::{Duration, Instant};

const IMAGE_MIB: u32 = 32;
/// Answered requests that show that the load has resumed.
const AT_WORK: u64 = 40;
/// For what takes as long as an emulated machine does.
const LIMIT: Duration = Duration::from_secs(120);

/// Tells it to the end, from the beginning again if the emulator breaks it off.
pub(super) fn tell(report: &mut CaseReport) -> Result<()> {
    wait_supervisor()?;
    outlive_emulator(report, tell_once, |report, death| {
        report.say(&format!(
            "the emulator killed the guest ({death}), which says nothing of the driver: once more"
        ))
    })
}

/// Leaves nothing behind.
fn tell_once(report: &mut CaseReport) -> Result<()> {
    let (first, second) = (image("moving.img", IMAGE_MIB)?, image("moving.qcow2", 1)?);
    let size = format!("{IMAGE_MIB}M");
    sh::run_for(
        &[
            "tapimg",
            "create",
            "--force",
            &format!("qcow2:{second}"),
            &size,
        ],
        LIMIT,
    )?;
    let result = with_images(report, &first, &second);
    for file in [first, second] {
        std::fs::remove_file(&file).with_context(|| format!("cannot remove {file}"))?;
    }
    result
}

fn with_images(report: &mut CaseReport, first: &str, second: &str) -> Result<()> {
    let guest = Guest::create(Config::new("moving", GuestKind::Pvh, 2))?;
    let specification = disk(&format!("aio:{first}"), "xvdb", "w");
    let source = ServedDisk::attach(&guest, &specification)?;
    report.say(&format!(
        "a PVH guest, domain {}, has {specification}; it writes, flushes and verifies from now on",
        guest.domid
    ))?;
    let job = guest.start(&job())?;
    let (guest, disk) = moves(report, guest, &source, job)?;
    is_upgraded(report, &disk)?;
    goes_on_elsewhere(report, &disk, second)?;
    gets_another_module(report, &disk)?;
    let longest = end(&guest, job)?;
    report.say(&format!(
        "the guest's load has seen no error and found all that it wrote; the longest that one of its requests waited was {longest} ms"
    ))?;
    let seen = guest.run(&format!(
        "dd if=/dev/xvdb bs=1M count={USED_MIB} iflag=direct 2>/dev/null | sha256sum"
    ))?;
    disk.detach(&guest)?;
    let raw = format!("{second}.raw");
    sh::run_for(
        &[
            "tapimg",
            "convert",
            &format!("qcow2:{second}"),
            &format!("aio:{raw}"),
        ],
        LIMIT,
    )?;
    let found = sh::run(&[
        "sh",
        "-c",
        &format!("head -c {USED_MIB}M {raw} | sha256sum"),
    ])?;
    std::fs::remove_file(&raw).context("cannot remove the copy")?;
    ensure!(
        seen == found,
        "the guest read {seen}, the image holds {found}"
    );
    report.say("guest and dom0 read the same from the image")?;
    guest.destroy()
}

/// Returns a number in tap-ctl's output.
fn number(told: &serde_json::Value, name: &str) -> Result<u64> {
    let number = told[name].as_u64();
    number.with_context(|| format!("{name} is missing in {told}"))
}

fn moves(
    report: &mut CaseReport,
    guest: Guest,
    source: &ServedDisk,
    job: GuestJob,
) -> Result<(Guest, ServedDisk)> {
    wait_progress(source, AT_WORK)?;
    let events = EventLog::follow()?;
    let (before, begun) = (guest.domid, Instant::now());
    let guest = guest.migrate(&[job])?;
    let took = begun.elapsed();
    let there = ServedDisk::of(AttachedVbd::of(guest.domid, "xvdb")?)?;
    // In any order: the supervisor hears of each from another process.
    let both = [("inactive", source.minor), ("active", there.minor)];
    events.wait_for_all(&both, LIMIT)?;
    source.wait_gone()?;
    wait_progress(&there, AT_WORK)?;
    report.say(&format!(
        "xl migrate: domain {before} goes on as domain {}, after {} s; one side after the other had the image",
        guest.domid,
        took.as_secs()
    ))?;
    Ok((guest, there))
}

fn is_upgraded(report: &mut CaseReport, disk: &ServedDisk) -> Result<()> {
    let told = tap::ctl_json(&["handoff", &disk.minor.to_string()])?;
    report.say(&format!(
        "tap-ctl handoff, as after an upgrade: tapdisk {} took the disk from {}; the guest's requests waited for {} ms",
        number(&told, "to")?,
        number(&told, "from")?,
        number(&told, "pause_us")? / 1000
    ))?;
    wait_progress(disk, AT_WORK)
}

fn goes_on_elsewhere(report: &mut CaseReport, disk: &ServedDisk, file: &str) -> Result<()> {
    let (minor, target) = (disk.minor.to_string(), format!("qcow2:{file}"));
    let told = tap::ctl_json(&["mirror", "-m", &minor, &target, "--wait"])?;
    ensure!(told["state"] == "complete", "tap-ctl mirror says {told}");
    report.say(&format!(
        "tap-ctl mirror: the disk was copied to {target}, and goes on there"
    ))?;
    wait_progress(disk, AT_WORK)
}

fn gets_another_module(report: &mut CaseReport, disk: &ServedDisk) -> Result<()> {
    let done = sh::status(
        &["xen-blkback-takeover", "exchange", "--again", "--json"],
        LIMIT,
    )?;
    let line = done.text.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("the exchange says: {}", done.text))?;
    let told: serde_json::Value = serde_json::from_str(line)?;
    ensure!(told["is_done"] == true, "the exchange says {told}");
    report.say(&format!(
        "xen-blkback-rs exchange: the module was unloaded and loaded below the disk; the guest was paused for {} ms",
        number(&told, "paused_ms")?
    ))?;
    wait_progress(disk, AT_WORK)
}
