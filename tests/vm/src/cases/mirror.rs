// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk is copied to another image while its guest works, and switches to it.

use super::export::QemuServer;
use super::formats::{check, of_guest};
use super::snapshot::{as_configured, sum};
use super::tap::{end_load, full_image, image, same, start_load_with, wait_progress, VDEV};
use super::{Case, Context, SharedGuest};
use crate::guest::AttachedVbd;
use crate::sh;
use crate::tap::{self, EventLog, ServedDisk};
use anyhow::{anyhow, ensure, Result};
use std::thread;
use std::time::Duration;

/// MiB of the disk. The load is in the first ten.
const SIZE: u32 = 16;
const LIMIT: Duration = Duration::from_secs(60);
/// A guest moves in that time.
const MOVE: Duration = Duration::from_secs(240);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let about = "a raw image becomes a qcow2 image, and that another raw one, under load that is judged; its process dies";
    let load = Case::new("mirror.t34_load", about, SharedGuest::Pv, t34_load);
    let about = "a guest moves and takes its disk along, without shared storage: first to a server, which is the image of the other side";
    let moves = Case::new("mirror.moves_along", about, SharedGuest::Pvh, moves_along).nightly();
    let all = [load, moves];
    all.map(|case| case.supervised().no_leaks()).into()
}

/// Begins to copy the disk to this image, slowly; something is copied already.
fn begin(disk: &ServedDisk, target: &str) -> Result<()> {
    let minor = disk.minor.to_string();
    tap::ctl(&["mirror", "-m", &minor, target, "--rate", "2"])?;
    let copied = || {
        let told = tap::ctl_json(&["mirror", "-m", &minor, "--show"])?;
        Ok(told["offset"].as_u64() > Some(0))
    };
    sh::wait_for("something that is copied", LIMIT, copied)
}

/// Switches the disk to this image.
fn go_on(disk: &ServedDisk, target: &str) -> Result<()> {
    let minor = disk.minor.to_string();
    let told = tap::ctl_json(&["mirror", "-m", &minor, target, "--wait"])?;
    ensure!(told["state"] == "complete", "tap-ctl mirror says {told}");
    let list = tap::ctl(&["list", "-m", &minor])?;
    ensure!(list.contains(target), "it is served from {list}");
    wait_progress(disk, 40)
}

fn t34_load(context: &mut Context) -> Result<()> {
    let (first, last) = (
        full_image(context, "a.img", SIZE)?,
        full_image(context, "c.img", SIZE)?,
    );
    let between = image(context, "b.qcow2", 1)?;
    let size = format!("{SIZE}M");
    let create = ["qemu-img", "create", "-f", "qcow2", &between, &size];
    sh::run_for(&create, LIMIT)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{first}"), VDEV, "w"))?;
    let load = start_load_with(guest, "")?;
    wait_progress(&disk, 40)?;
    let target = format!("qcow2:{between}");
    begin(&disk, &target)?;
    // The next process begins from the start.
    disk.replace()?;
    go_on(&disk, &target)?;
    as_configured(&first)?;
    disk.replace()?;
    wait_progress(&disk, 40)?;
    go_on(&disk, &format!("aio:{last}"))?;
    let told = end_load(guest, load)?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    check("qcow2", &between)?;
    let found = sum(&last)?;
    ensure!(seen == found, "the guest read {seen}, dom0 reads {found}");
    context.note(&told)
}

/// Moves as the README describes: the server of the other side's image ends when this side has closed it, and then the
/// other side opens the image.
fn moves_along(context: &mut Context) -> Result<()> {
    let here = full_image(context, "a.img", SIZE)?;
    let there = image(context, "b.img", SIZE)?;
    let events = EventLog::follow()?;
    let guest = context.pvh()?;
    let source = ServedDisk::attach(guest, &tap::disk(&format!("aio:{here}"), VDEV, "w"))?;
    let load = start_load_with(guest, "--discard")?;
    wait_progress(&source, 40)?;
    let mut server = QemuServer::start(&there)?;
    begin(&source, &server.target())?;
    go_on(&source, &server.target())?;
    as_configured(&here)?;
    is_locked(&there)?;
    let before = sum(&here)?;
    let guest = context.take(SharedGuest::Pvh)?;
    let disk = tap::disk(&format!("aio:{there}"), VDEV, "w");
    let mover = thread::spawn(move || guest.migrate_to(&[&disk], &load).map(|guest| (guest, load)));
    // The server has the image locked: the other side cannot write to it before.
    let let_go = events.wait_for("inactive", source.minor, MOVE);
    let ended = let_go.and_then(|_| server.end());
    let moved = mover.join();
    let (guest, load) = moved.map_err(|_| anyhow!("the move panicked"))??;
    context.give(SharedGuest::Pvh, guest);
    ended?;
    let guest = context.guest(SharedGuest::Pvh)?;
    let disk = ServedDisk::of(AttachedVbd::of(guest.domid, VDEV)?)?;
    source.wait_gone()?;
    wait_progress(&disk, 40)?;
    let told = end_load(guest, load)?;
    same(guest, &there, SIZE)?;
    disk.detach(guest)?;
    ensure!(sum(&here)? == before, "the image that was left was written");
    context.note(&told)
}

/// Checks that no process can change the image that a server has.
fn is_locked(image: &str) -> Result<()> {
    let refusal = sh::status(&["tap-ctl", "create", "-a", &format!("aio:{image}")], LIMIT)?;
    ensure!(
        refusal.rc != 0 && refusal.text.contains("locked by another process"),
        "the server's image is served for writing: {}",
        refusal.text
    );
    Ok(())
}
