// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk is copied to another image while its guest works, and goes on there.

use super::formats::{check, of_guest};
use super::tap::{end_load, image, start_load_with, wait_progress, VDEV};
use super::{Case, Context, Needs};
use crate::sh;
use crate::tap::{self, Served};
use anyhow::{ensure, Result};
use std::time::Duration;

/// MiB of the disk. The load is in the first ten.
const SIZE: u32 = 16;
const LIMIT: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let about = "a raw image becomes a qcow2 image, and that another raw one, under load that is judged; its process dies";
    let case = Case::new("mirror.t34_load", about, Needs::Pv, t34_load);
    vec![case.supervised().no_leaks()]
}

/// A raw image with something everywhere.
fn full(context: &mut Context, name: &str) -> Result<String> {
    let path = image(context, name, SIZE)?;
    sh::shell(&format!(
        "dd if=/dev/urandom of={path} bs=1M count={SIZE} conv=notrunc status=none"
    ))?;
    Ok(path)
}

/// Has the disk go on in this image; says how long nobody served it, in microseconds.
fn go_on(disk: &Served, target: &str) -> Result<()> {
    let minor = disk.minor.to_string();
    let told = tap::ctl_json(&["mirror", "-m", &minor, target, "--wait"])?;
    ensure!(told["state"] == "complete", "tap-ctl mirror says {told}");
    let list = tap::ctl(&["list", "-m", &minor])?;
    ensure!(list.contains(target), "it is served from {list}");
    wait_progress(disk, 40)
}

fn t34_load(context: &mut Context) -> Result<()> {
    let (first, last) = (full(context, "a.img")?, full(context, "c.img")?);
    let between = image(context, "b.qcow2", 1)?;
    let size = format!("{SIZE}M");
    let create = ["qemu-img", "create", "-f", "qcow2", &between, &size];
    sh::run_for(&create, LIMIT)?;
    let guest = context.pv()?;
    let disk = Served::attach(guest, &tap::disk(&format!("aio:{first}"), VDEV, "w"))?;
    let minor = disk.minor.to_string();
    let load = start_load_with(guest, "")?;
    wait_progress(&disk, 40)?;
    let target = format!("qcow2:{between}");
    tap::ctl(&["mirror", "-m", &minor, &target, "--rate", "2"])?;
    let copied = || {
        let told = tap::ctl_json(&["mirror", "-m", &minor, "--show"])?;
        Ok(told["offset"].as_u64() > Some(0))
    };
    sh::wait_for("something that is copied", LIMIT, copied)?;
    // The next process begins anew.
    disk.replace()?;
    go_on(&disk, &target)?;
    check_old(&first)?;
    disk.replace()?;
    wait_progress(&disk, 40)?;
    go_on(&disk, &format!("aio:{last}"))?;
    let told = end_load(guest, load)?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    check("qcow2", &between)?;
    let sum = sh::run_for(&["sha256sum", &last], LIMIT)?;
    ensure!(
        sum.starts_with(&seen),
        "the guest read {seen}, dom0 reads {sum}"
    );
    context.note(&told)
}

/// A configuration that was not changed does not write what the disk was.
fn check_old(path: &str) -> Result<()> {
    let target = format!("aio:{path}");
    let refusal = sh::status(&["tap-ctl", "create", "-a", &target], LIMIT)?;
    ensure!(
        refusal.rc != 0,
        "the old image is served for writing: {}",
        refusal.text
    );
    Ok(())
}
