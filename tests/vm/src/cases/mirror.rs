// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk is copied to another image while its guest works, and goes on there.

use super::formats::{check, of_guest};
use super::snapshot::{as_configured, sum};
use super::tap::{end_load, full_image, image, start_load_with, wait_progress, VDEV};
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

/// Has the disk go on in this image.
fn go_on(disk: &Served, target: &str) -> Result<()> {
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
