// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What an administrator sees of disks that are not well.

use super::basic::{attach_own, detach_own};
use super::tap::attach_dom0;
use super::{Case, Context, Needs};
use crate::backing::{linear, Dm};
use crate::guest::Vbd;
use crate::{sh, tap};
use anyhow::{ensure, Context as _, Result};
use serde_json::Value;
use std::process::{Child, Command};
use std::time::Duration;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![Case::new(
        "ops.status",
        "a phy disk that hangs is named with its device, a tap disk beside it is not, and both are in the metrics",
        Needs::Nothing,
        status,
    )
    .supervised()
    .no_leaks()]
}

/// What waits for a disk that hangs.
const HUNG: &str = "2";
/// Programs take long in an emulated machine.
const LIMIT: Duration = Duration::from_secs(60);

/// The exit code of `tap-ctl status`, and what it says of each disk.
fn said() -> Result<(i32, Value)> {
    let argv = ["tap-ctl", "--json", "status", "--hung", HUNG];
    let output = sh::status(&argv, LIMIT)?;
    let said = serde_json::from_str(&output.stdout)
        .with_context(|| format!("`tap-ctl status` printed no JSON: {}", output.text))?;
    Ok((output.rc, said))
}

/// What it says of one disk of dom0.
fn of<'a>(said: &'a Value, vdev: &str) -> Result<&'a Value> {
    let disks = said["disks"].as_array().context("no list of disks")?;
    let disk = disks
        .iter()
        .find(|disk| disk["guest"] == 0 && disk["vdev"] == vdev);
    disk.with_context(|| format!("no {vdev} of dom0 in {said}"))
}

/// A write to a disk that hangs: it ends when the disk goes on.
fn write(device: &str, vbd: &Vbd) -> Result<Child> {
    let before = vbd.statistic("wr_req")?;
    let child = Command::new("dd")
        .args(["if=/dev/zero", &format!("of={device}"), "bs=4k", "count=1"])
        .args(["oflag=direct", "status=none"])
        .spawn()
        .context("cannot start dd")?;
    sh::wait_for("a write that hangs", LIMIT, || {
        Ok(vbd.statistic("wr_req")? > before)
    })?;
    Ok(child)
}

fn status(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let below = context.null_blk(16, &[])?;
    let storage = Dm::create("vmtest-slow", &linear(&below.path(), 32768))?;
    let theirs = storage.clone();
    // Whatever a failed case left: a device that hangs cannot be removed.
    context.at_end("remove the mapped device", move || {
        theirs.resume()?;
        theirs.remove()
    });
    let phy = attach_own(context, &storage.path(), "xvdk")?;
    let served = attach_dom0(&tap::disk("ram:16M", "xvdj", "w"), "xvdj")?;

    storage.suspend()?;
    let mut writer = write("/dev/xvdk", &phy)?;
    let (code, said_hung) = said()?;
    let hung = of(&said_hung, "xvdk")?;
    ensure!(code == 2, "the exit code is {code}, not 2: {said_hung}");
    ensure!(
        hung["state"] == "hung" && hung["cause"] == "storage" && hung["kind"] == "phy",
        "the disk that hangs is not named: {hung}"
    );
    ensure!(
        hung["remedy"]
            .as_str()
            .is_some_and(|text| text.contains("dmsetup resume vmtest-slow")),
        "the device that is to be resumed is not named: {hung}"
    );
    let well = of(&said_hung, "xvdj")?;
    ensure!(
        well["severity"]
            .as_u64()
            .is_some_and(|severity| severity < 2)
            && well["kind"] == "tap",
        "the disk beside it is said to hang: {well}"
    );
    let metrics = tap::ctl(&["metrics", "--hung", HUNG])?;
    for line in [
        r#"xen_disk_severity{guest="0",vdev="xvdk",kind="phy"} 2"#.to_owned(),
        r#"xen_disk_storage_suspended{guest="0",vdev="xvdk",kind="phy"} 1"#.to_owned(),
        format!(
            r#"xen_tap_delivered{{guest="0",vdev="xvdj",kind="tap",minor="{}"}} 0"#,
            served.minor
        ),
        "xen_disk_supervisor_up 1".to_owned(),
    ] {
        ensure!(
            metrics.lines().any(|its| its == line),
            "`{line}` is not in {metrics}"
        );
    }

    storage.resume()?;
    ensure!(writer.wait()?.success(), "the write failed that had hung");
    let (code, said_well) = said()?;
    // The machine is emulated: its processors may well be short.
    ensure!(
        code < 2,
        "the exit code is {code} after the disk went on: {said_well}"
    );
    detach_own(&phy)?;
    detach_own(&served.vbd)?;
    served.wait_gone()
}
