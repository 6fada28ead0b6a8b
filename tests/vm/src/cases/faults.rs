// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The device below fails, or is not there at all.

use super::basic::{attach_own, compare, detach_own, verify_job, FIO};
use super::{Case, Context, SharedGuest};
use crate::backing::{linear, Dm, NullBlk};
use crate::guest::{Guest, COMMAND};
use crate::hotplug;
use crate::{sh, xs};
use anyhow::{bail, ensure, Result};
use std::time::{Duration, Instant};

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv};
    vec![
        Case::new(
            "faults.bad_sectors",
            "a bad sector fails the request that meets it, and no other",
            Pv,
            bad_sectors,
        ),
        Case::new(
            "faults.bad_range",
            "an error range in the middle of a disk, with a verified load beside it",
            Pv,
            bad_range,
        )
        .nightly(),
        Case::new(
            "faults.device_dies",
            "the device dies under load and comes back",
            Pv,
            device_dies,
        ),
        Case::new(
            "faults.device_vanishes",
            "the device is taken away below a guest: its requests fail, and dom0 says why",
            Nothing,
            device_vanishes,
        ),
        Case::new(
            "faults.missing_device",
            "xl says quickly that there is no such device",
            Pv,
            missing_device,
        )
        .no_leaks(),
    ]
}

/// Returns whether a direct read or write of 4 KiB at this offset (in 4 KiB) succeeds in the guest.
fn can(guest: &Guest, what: &str, block: u32) -> Result<bool> {
    let line = match what {
        "read" => format!("dd if=/dev/xvda of=/dev/null bs=4k count=1 skip={block} iflag=direct"),
        _ => format!("dd if=/dev/zero of=/dev/xvda bs=4k count=1 seek={block} oflag=direct"),
    };
    let done = guest.status(&line)?;
    if done.rc != 0 && !done.text.contains("I/O error") && !done.text.contains("Input/output error")
    {
        bail!(
            "`{line}` failed, but not by an I/O error: {}",
            sh::tail(&done.text, 200)
        );
    }
    Ok(done.rc == 0)
}

fn check_precision(guest: &Guest, bad: u32) -> Result<()> {
    for what in ["read", "write", "read"] {
        ensure!(
            !can(guest, what, bad)?,
            "a {what} of the bad block {bad} succeeded"
        );
        for good in [bad - 1, bad + 1] {
            ensure!(
                can(guest, what, good)?,
                "a {what} of block {good}, beside the bad one, failed"
            );
        }
    }
    Ok(())
}

fn bad_sectors(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    // Block 100 of 4 KiB is the sectors 800 to 807.
    device.set("badblocks", "+800-807")?;
    check_precision(guest, 100)?;
    device.set("badblocks", "-800-807")?;
    ensure!(
        can(guest, "read", 100)?,
        "the block stays bad after its repair"
    );
    guest.run_for(&verify_job("/dev/xvda", 2, 60, 512), FIO)?;
    guest.detach(&vbd)
}

fn bad_range(context: &mut Context) -> Result<()> {
    let below = context.null_blk(32, &[])?;
    let path = below.path();
    // 16 MiB good, one block of 4 KiB bad, the rest good.
    let table = format!("0 32768 linear {path} 0\n32768 8 error\n32776 32760 linear {path} 32776");
    let disk = Dm::create("vmtest-range", &table)?;
    let theirs = disk.clone();
    context.at_end("remove the mapped device", move || theirs.remove());
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&disk.path(), "xvda", "w")?)?;
    let load = guest.start(&verify_job("/dev/xvda", 5, 150, 512))?;
    check_precision(guest, 4096)?;
    let done = guest.wait(load, FIO)?;
    done.succeeded("a load on the good part failed beside the errors")?;
    compare(guest, "xvda", &disk.path(), 8)?;
    guest.detach(&vbd)
}

fn device_dies(context: &mut Context) -> Result<()> {
    let below = context.null_blk(16, &[])?;
    let whole = linear(&below.path(), 32768);
    let disk = Dm::create("vmtest-dies", &whole)?;
    let theirs = disk.clone();
    context.at_end("remove the mapped device", move || theirs.remove());
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&disk.path(), "xvda", "w")?)?;
    let load = guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&vbd)?;
    disk.replace("0 32768 error")?;
    let done = guest.wait(load, COMMAND)?;
    ensure!(
        done.rc != 0,
        "the load did not notice that its device had died"
    );
    ensure!(
        !can(guest, "write", 1)?,
        "a write to a dead device succeeded"
    );
    disk.replace(&whole)?;
    ensure!(
        can(guest, "write", 1)?,
        "a write fails although the device is back"
    );
    guest.run_for(&verify_job("/dev/xvda", 2, 60, 512), FIO)?;
    guest.detach(&vbd)
}

fn device_vanishes(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = NullBlk::create(16, &[])?;
    let vbd = attach_own(context, &device.path(), "xvdk")?;
    let write = "dd if=/dev/zero of=/dev/xvdk bs=64k count=4 oflag=direct status=none";
    sh::shell(write)?;
    let sectors = format!("{}/sectors", vbd.backend);
    let error = vbd.backend.replace("/backend/", "/error/backend/") + "/error";
    let before = xs::must_read(&sectors)?;
    device.remove()?;
    ensure!(sh::shell(write).is_err(), "a write to nothing succeeded");
    // The thread that idles looks at the size from time to time.
    sh::wait_for("the report of the device", Duration::from_secs(30), || {
        Ok(xs::read(&error)?.is_some_and(|text| text.contains("device is gone")))
    })?;
    ensure!(sh::shell(write).is_err(), "a write to nothing succeeded");
    let after = xs::must_read(&sectors)?;
    ensure!(before == after, "the size was {before} and became {after}");
    ensure!(vbd.statistic("failed")? > 0, "no request failed");
    let refused = vbd.statistic("refused")?;
    ensure!(
        refused == 0,
        "{refused} requests count as the guest's fault"
    );
    detach_own(&vbd)
}

/// A deep random load that ends at the first error only.
pub(super) fn endless_load(device: &str) -> String {
    endless(device, "16k", 64)
}

/// Returns such a load with requests of `size`, `depth` at a time.
pub(super) fn endless(device: &str, size: &str, depth: u32) -> String {
    format!(
        "fio --name=load --filename={device} --direct=1 --ioengine=libaio --iodepth={depth} --rw=randrw --bs={size} --size=8m \
         --time_based --runtime=600 --output-format=terse"
    )
}

/// Waits until requests flow through the backend.
pub(crate) fn wait_load(vbd: &crate::guest::AttachedVbd) -> Result<()> {
    let before = vbd.statistic("wr_req")?;
    sh::wait_for("a load on the disk", Duration::from_secs(60), || {
        Ok(vbd.statistic("wr_req")? > before + 100)
    })
}

fn missing_device(context: &mut Context) -> Result<()> {
    let guest = context.pv()?;
    let id = guest.domid.to_string();
    for disk in [
        "phy:/dev/vmtest-missing,xvda,w",
        "file:/tmp/vmtest-missing.img,xvda,w",
    ] {
        let started = Instant::now();
        let output = sh::status(&["xl", "block-attach", &id, disk], Duration::from_secs(60))?;
        ensure!(output.rc != 0, "`xl block-attach` accepted {disk}");
        ensure!(
            started.elapsed() < Duration::from_secs(25),
            "xl took {} s to refuse {disk}",
            started.elapsed().as_secs()
        );
        let left = xs::list(&format!("/local/domain/0/backend/vbd/{id}"))?;
        ensure!(
            left.is_empty(),
            "xl left {left:?} behind after it refused {disk}"
        );
    }
    let device = context.null_blk(16, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&format!("phy:{},xvda,w", device.path()))?;
    guest.detach(&vbd)
}
