// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! An image that several guests have at once and none writes: what each of them writes is in memory.

use super::formats::{base, load_and_deaths, of_guest, over, sum_of, SIZE, TOOL};
use super::tap::VDEV;
use super::{Case, Context, SharedGuest};
use crate::tap::{self, ServedDisk};
use crate::{backing, sh};
use anyhow::{ensure, Result};
use std::path::Path;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![Case::new(
        "formats.cow",
        "two disks write into memory over one image, under load while a process dies: neither sees the other, and the image stays",
        SharedGuest::Pv,
        cow,
    ).nightly()
    .supervised()
    .no_leaks()]
}

fn cow(context: &mut Context) -> Result<()> {
    let root = base(context)?;
    let golden = over(context, "golden.qcow2", &root, "raw")?;
    sh::run(&["chmod", "a-w", &root])?;
    let sums = || sh::run(&["sha256sum", &root, &golden]);
    let (before, expected) = (sums()?, backing::sha256(&root, SIZE)?);
    let target = format!("cow:qcow2:{golden}");
    let guest = context.pv()?;
    let worked = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let idle = ServedDisk::attach(guest, &tap::disk(&target, "xvdc", "w"))?;
    context.check_driver(&worked.vbd)?;
    load_and_deaths(context, &worked)?;
    let guest = context.pv()?;
    let (seen, other) = (of_guest(guest)?, sum_of(guest, "/dev/xvdc")?);
    ensure!(seen != expected, "the load has written nothing");
    ensure!(
        other == expected,
        "a disk shows what another one has written"
    );
    worked.replace()?;
    ensure!(
        of_guest(guest)? == seen,
        "a new process shows something else"
    );
    let writer = format!("qcow2:{golden}");
    let writer = sh::status(&["tap-ctl", "create", "-a", &writer], TOOL)?;
    ensure!(
        writer.rc != 0 && writer.text.contains("in use"),
        "what disks go on from can be written: {}",
        writer.text
    );
    let memory = format!("/run/xentap/ram/{}.cow", worked.minor);
    idle.detach(guest)?;
    worked.detach(guest)?;
    ensure!(
        !Path::new(&memory).exists(),
        "the memory of a disk is left when the disk is gone"
    );
    ensure!(sums()? == before, "the image was written");
    // A new disk begins with the image.
    let anew = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    ensure!(
        of_guest(guest)? == expected,
        "a new disk has what an old one had"
    );
    anew.detach(guest)
}
