// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk whose storage refuses the writes of all hosts but one: `lease=reservation`.

use super::lease::{alpha, break_lease};
use super::tap::{end_load, same, start_load_with, wait_progress, VDEV};
use super::{Case, Context, SharedGuest};
use crate::reserved::Reserved;
use crate::tap::{self, EventLog, ServedDisk};
use crate::{backing, sh};
use ::lease::Kind;
use anyhow::{ensure, Context as _, Result};
use std::path::Path;
use std::time::Duration;

/// Megabytes of the disk.
const MIB: u32 = 16;
/// Time limit for a command.
const LONG: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, SharedGuest::Pv, run)
            .supervised()
            .no_leaks()
            .nightly()
    };
    vec![
        case(
            "lease.reservation",
            "an NVMe namespace is reserved: others' writes are refused, a break stops the disk, nothing lands afterwards",
            nvme,
        ),
        case(
            "lease.reservation_scsi",
            "a SCSI disk is reserved for one initiator after the other",
            scsi,
        ),
    ]
}

/// The key that has a disk reserved, if one has.
fn key(disk: &str) -> Result<Option<String>> {
    let view = tap::ctl_json(&["lease", "show", &format!("lease=reservation,aio:{disk}")])?;
    Ok(view["key"].as_str().map(str::to_owned))
}

/// Writes zeroes to a block of a disk, past the page cache; returns the result.
fn zero(disk: &str) -> Result<sh::Output> {
    let to = format!("of={disk}");
    let line = [
        "dd",
        "if=/dev/zero",
        &to,
        "bs=4k",
        "count=1",
        "oflag=direct",
    ];
    sh::status(&line, LONG)
}

/// Copies a whole disk, past the page cache.
fn copy(from: &str, to: &str) -> Result<()> {
    let (from, to) = (format!("if={from}"), format!("of={to}"));
    let count = format!("count={MIB}");
    let flags = ["iflag=fullblock", "oflag=direct", "conv=notrunc"];
    let line = ["dd", &from, &to, "bs=1M", &count];
    sh::run(&[&line[..], &flags[..]].concat()).map(drop)
}

/// A disk on storage that is taken down with the case, in use by its guest.
fn attach(
    context: &mut Context,
    storage: Reserved,
) -> Result<(ServedDisk, [crate::console::GuestJob; 2])> {
    let [own, other] = storage.disks.clone();
    context.at_end(format!("take {own} and {other} down"), move || {
        storage.remove()
    });
    let guest = context.pv()?;
    let target = format!("lease=reservation,aio:{own}");
    let disk = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let load = start_load_with(guest, "")?;
    wait_progress(&disk, 50)?;
    Ok((disk, load))
}

/// Checks that the guest has seen no error, and that the disk has its data.
fn finish(
    context: &mut Context,
    disk: ServedDisk,
    load: [crate::console::GuestJob; 2],
    medium: &str,
) -> Result<()> {
    let guest = context.pv()?;
    let told = end_load(guest, load)?;
    same(guest, medium, MIB)?;
    disk.detach(guest)?;
    context.note(&told)
}

fn nvme(context: &mut Context) -> Result<()> {
    let storage = Reserved::nvme(MIB)?;
    let ([own, other], medium) = (storage.disks.clone(), storage.medium.path());
    let (disk, load) = attach(context, storage)?;
    let held = key(&own)?.context("nothing is reserved")?;
    disk.replace()?;
    wait_progress(&disk, 50)?;
    ensure!(
        key(&other)? == Some(held.clone()),
        "another process has another key"
    );
    refused(&other)?;
    let events = EventLog::follow()?;
    let broken = break_lease(&other, &held, LONG)?;
    ensure!(
        broken.rc == 0 && broken.text.contains("state=free was=host="),
        "the reservation was not broken: {}",
        broken.text
    );
    let mut theirs = ::lease::open(&Kind::Reservation, Path::new(&other), alpha()?)?;
    theirs.take(Duration::ZERO)?;
    while_another_has_it(&disk, &events, &medium, &other)?;
    let minor = disk.minor.to_string();
    let busy = sh::status(&["tap-ctl", "unpause", "-m", &minor], LONG)?;
    ensure!(
        busy.rc != 0 && busy.text.contains("is reserved by host id-"),
        "a disk that another host has reserved was served: {}",
        busy.text
    );
    theirs.give_up()?;
    tap::ctl(&["unpause", "-m", &minor])?;
    wait_progress(&disk, 50)?;
    ensure!(
        key(&own)?.is_some_and(|key| key != held),
        "the key is that of before"
    );
    finish(context, disk, load, &medium)?;
    ensure!(key(&own)?.is_none(), "what is reserved outlives the disk");
    Ok(())
}

/// Without a break of the lease: the kernel's target deadlocks when a command that came by its loopback preempts and
/// aborts (`core_tmr_lun_reset` flushes the work that executes it).
fn scsi(context: &mut Context) -> Result<()> {
    let storage = Reserved::scsi(MIB)?;
    let ([own, other], medium) = (storage.disks.clone(), storage.medium.path());
    let (disk, load) = attach(context, storage)?;
    let held = key(&own)?.context("nothing is reserved")?;
    refused(&other)?;
    let minor = disk.minor.to_string();
    tap::ctl(&["pause", "-m", &minor])?;
    ensure!(
        key(&other)?.is_none(),
        "a disk that is paused has it reserved"
    );
    refused(&other)?;
    tap::ctl(&["unpause", "-m", &minor])?;
    wait_progress(&disk, 50)?;
    ensure!(
        key(&other)?.is_some_and(|key| key != held),
        "the key is that of before"
    );
    finish(context, disk, load, &medium)
}

/// Checks that the storage refuses writes of all other paths, and allows reads.
fn refused(other: &str) -> Result<()> {
    let write = zero(other)?;
    ensure!(
        write.rc != 0 && write.text.contains("Invalid exchange"),
        "the storage took what another host wrote: {}",
        write.text
    );
    backing::sha256(other, 1).map(drop)
}

/// Requests of the guest wait, and none of them reaches the storage while the other host writes to it.
fn while_another_has_it(
    disk: &ServedDisk,
    events: &EventLog,
    medium: &str,
    other: &str,
) -> Result<()> {
    let saved = "/srv/vmtest/reserved.saved";
    std::fs::create_dir_all("/srv/vmtest")?;
    sh::run(&[
        "dd",
        &format!("if={medium}"),
        &format!("of={saved}"),
        "bs=1M",
        "iflag=direct",
    ])?;
    copy("/dev/zero", other)?;
    events.wait_for("paused", disk.minor, LONG)?;
    sh::wait_for("requests that wait", LONG, || Ok(disk.info()?.waiting > 0))?;
    sh::run(&[
        "cmp",
        "-n",
        &format!("{}", u64::from(MIB) << 20),
        medium,
        "/dev/zero",
    ])
    .context("something landed after another host had the disk")?;
    copy(saved, other)?;
    std::fs::remove_file(saved)?;
    Ok(())
}
