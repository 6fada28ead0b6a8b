// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The control group of a guest: limits of it hold for phy and tap disks.

use super::tap::VDEV;
use super::{Case, Context, Needs};
use crate::guest::RUN_DIR;
use crate::tap::{self, Served, Supervisor};
use crate::{hotplug, sh};
use anyhow::{ensure, Context as _, Result};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// MiB that are read, and what the group may read in a second.
const MIB: u64 = 8;
const RATE: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let about = "a guest has a control group: what is read by its phy and its tap disk is counted and limited there";
    let groups = Case::new("ops.groups", about, Needs::Pv, groups);
    vec![groups.supervised().no_leaks().nightly()]
}

/// The tree of control groups; nobody has mounted it here.
fn tree(context: &mut Context) -> Result<String> {
    let tree = format!("{RUN_DIR}/cgroup");
    fs::create_dir_all(&tree)?;
    sh::run(&["mount", "-t", "cgroup2", "cgroup2", &tree])?;
    let mounted = tree.clone();
    context.at_end("unmount the control groups", move || {
        sh::run(&["umount", &mounted]).map(drop)
    });
    sh::put(format!("{tree}/cgroup.subtree_control"), "+io")?;
    let guests = format!("{tree}/guests");
    fs::create_dir(&guests)?;
    let made = guests.clone();
    context.at_end("remove the groups", move || Ok(fs::remove_dir(made)?));
    Ok(guests)
}

/// What a group has read of a device, in bytes.
fn has_read(group: &str, device: &str) -> Result<u64> {
    let stat = sh::get(format!("{group}/io.stat"))?;
    let line = stat
        .lines()
        .find(|line| line.starts_with(&format!("{device} ")));
    let bytes = line.and_then(|line| {
        let mut words = line.split_whitespace();
        words.find_map(|word| word.strip_prefix("rbytes=")?.parse().ok())
    });
    Ok(bytes.unwrap_or(0))
}

fn groups(context: &mut Context) -> Result<()> {
    let guests = tree(context)?;
    let template = format!("{guests}/guest-%d");
    context.take_supervisor()?.stop()?;
    context.give_supervisor(Supervisor::start_with(&[("XENTAP_CGROUP", &template)])?);
    let devices = [context.null_blk(16, &[])?, context.null_blk(16, &[])?];
    let guest = context.pv()?;
    let group = format!("{guests}/guest-{}", guest.domid);
    let phy = guest.attach(&hotplug::disk(&devices[0].path(), "xvdc", "w")?)?;
    let target = format!("aio:{}", devices[1].path());
    let tap = Served::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let mut told = Vec::new();
    for (device, disk) in devices.iter().zip(["xvdc", VDEV]) {
        let number = fs::metadata(device.path())?.rdev();
        let number = format!("{}:{}", libc::major(number), libc::minor(number));
        sh::wait_for("the group of the guest", LIMIT, || {
            Ok(Path::new(&format!("{group}/io.max")).exists())
        })?;
        let read = || {
            guest.run(&format!(
                "dd if=/dev/{disk} of=/dev/null bs=64k count={} iflag=direct",
                MIB * 16
            ))
        };
        read()?;
        let counted = has_read(&group, &number)?;
        ensure!(
            counted >= MIB << 20,
            "the group of the guest has read {counted} bytes by {disk}, not {MIB} MiB"
        );
        sh::put(format!("{group}/io.max"), &format!("{number} rbps={RATE}"))?;
        let begun = Instant::now();
        read()?;
        let took = begun.elapsed();
        // The first moment of it is free.
        ensure!(
            took > Duration::from_secs(MIB * (1 << 20) / RATE - 2),
            "{MIB} MiB took {took:?} with {RATE} bytes in a second"
        );
        told.push(format!("{disk}: {:.1} s", took.as_secs_f64()));
    }
    let guest = context.pv()?;
    tap.detach(guest)?;
    guest.detach(&phy)?;
    sh::wait_for("the end of the group", LIMIT, || {
        Ok(!Path::new(&group).exists())
    })?;
    context.take_supervisor()?.stop()?;
    context.supervise(true)?;
    context.note(&told.join(", ")).context("no report")
}
