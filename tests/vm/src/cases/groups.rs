// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The control group of a guest: limits of it hold for phy and tap disks.

use super::tap::VDEV;
use super::{Case, Context, SharedGuest};
use crate::guest::{Guest, RUN_DIR};
use crate::tap::{self, RunningSupervisor, ServedDisk};
use crate::{hotplug, sh};
use anyhow::{ensure, Context as _, Result};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// MiB that the guest reads, and the group's limit in bytes a second.
const MIB: u64 = 8;
const RATE: u64 = 1 << 20;
/// Discards that the guest makes, of 1 MiB each, and those that the group may make in a second.
const DISCARDS: u64 = 8;
const DISCARD_RATE: u64 = 2;
const LIMIT: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let about = "a guest has a control group: what its phy and its tap disk read, and what phy discards, is counted and limited there";
    let groups = Case::new("ops.groups", about, SharedGuest::Pv, groups);
    vec![groups.supervised().no_leaks().nightly()]
}

/// Mounts the tree of control groups, which is not mounted here.
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

/// Returns what a group has done to a device, by the name of the count in its `io.stat`.
fn counted(group: &str, device: &str, count: &str) -> Result<u64> {
    let stat = sh::get(format!("{group}/io.stat"))?;
    let line = stat
        .lines()
        .find(|line| line.starts_with(&format!("{device} ")));
    let number = line.and_then(|line| {
        let mut words = line.split_whitespace();
        words.find_map(|word| word.strip_prefix(count)?.strip_prefix('=')?.parse().ok())
    });
    Ok(number.unwrap_or(0))
}

/// The discards of a phy disk, `xvdc` on `device`, are counted and limited as its reads are.
fn discards(guest: &Guest, group: &str, device: &str) -> Result<String> {
    sh::put(
        format!("{group}/io.max"),
        &format!("{device} rbps=max wiops={DISCARD_RATE}"),
    )?;
    let begun = Instant::now();
    for mib in 0..DISCARDS {
        guest.run(&format!(
            "blkdiscard -o {} -l {} /dev/xvdc",
            mib << 20,
            1 << 20
        ))?;
    }
    let took = begun.elapsed();
    let bytes = counted(group, device, "dbytes")?;
    ensure!(
        bytes == DISCARDS << 20,
        "the group of the guest has discarded {bytes} bytes, not {DISCARDS} MiB"
    );
    // The first moment of it is free.
    ensure!(
        took > Duration::from_secs(DISCARDS / DISCARD_RATE - 1),
        "{DISCARDS} discards took {took:?} with {DISCARD_RATE} in a second"
    );
    Ok(format!("discards: {:.1} s", took.as_secs_f64()))
}

fn groups(context: &mut Context) -> Result<()> {
    let guests = tree(context)?;
    let template = format!("{guests}/guest-%d");
    context.take_supervisor()?.stop()?;
    context.give_supervisor(RunningSupervisor::start_with(&[(
        "XENTAP_CGROUP",
        &template,
    )])?);
    let devices = [
        context.null_blk(16, &[("discard", "1")])?,
        context.null_blk(16, &[])?,
    ];
    let guest = context.pv()?;
    let group = format!("{guests}/guest-{}", guest.domid);
    let phy = guest.attach(&hotplug::disk(&devices[0].path(), "xvdc", "w")?)?;
    let target = format!("aio:{}", devices[1].path());
    let tap = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let mut told = Vec::new();
    for (device, disk) in devices.iter().zip(["xvdc", VDEV]) {
        let number = device.number()?;
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
        let bytes = counted(&group, &number, "rbytes")?;
        ensure!(
            bytes >= MIB << 20,
            "the group of the guest has read {bytes} bytes by {disk}, not {MIB} MiB"
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
    told.push(discards(guest, &group, &devices[0].number()?)?);
    tap.detach(guest)?;
    guest.detach(&phy)?;
    sh::wait_for("the end of the group", LIMIT, || {
        Ok(!Path::new(&group).exists())
    })?;
    context.take_supervisor()?.stop()?;
    context.supervise(true)?;
    context.note(&told.join(", ")).context("no report")
}
