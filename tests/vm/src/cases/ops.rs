// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Reports and statistics of a disk that hangs, for an administrator.

use super::basic::{attach_own, detach_own};
use super::hung::{narrow_loop, wait_for_sleeper};
use super::tap::attach_dom0;
use super::{Case, Context, SharedGuest};
use crate::backing::{linear, Dm};
use crate::guest::AttachedVbd;
use crate::{sh, tap, xs};
use anyhow::{ensure, Context as _, Result};
use dom0::kmsg::Kmsg;
use serde_json::Value;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "ops.status",
            "a phy disk that hangs is named with its device, a tap disk beside it is not, and both are in the metrics",
            SharedGuest::Nothing,
            status,
        )
        .supervised()
        .no_leaks(),
        Case {
            ours: true,
            ..Case::new(
                "ops.log",
                "the kernel's log tells of a disk that comes, has a request that nobody answers for long, and goes",
                SharedGuest::Nothing,
                log,
            )
        }
        .no_leaks()
        .nightly(),
        Case {
            ours: true,
            ..Case::new(
                "ops.log_asleep",
                "the kernel's log tells of requests that nobody answers, whose thread has slept in the block layer from the first pass on",
                SharedGuest::Nothing,
                log_asleep,
            )
        }
        .nightly(),
    ]
}

/// Seconds after which a waiting disk counts as hung.
pub(super) const HUNG: &str = "2";
/// Milliseconds after which a request counts as slow.
pub(super) const SLOW: &str = "100";
/// Programs take long in an emulated machine.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// Returns the exit code of `tap-ctl status`, and its report. A request counts as slow after `slow` milliseconds.
pub(super) fn said(slow: &str) -> Result<(i32, Value)> {
    let argv = [
        "tap-ctl",
        "--json",
        "status",
        "--hung-after",
        HUNG,
        "--slow",
        slow,
    ];
    let output = sh::status(&argv, LIMIT)?;
    let said = serde_json::from_str(&output.stdout)
        .with_context(|| format!("`tap-ctl status` printed no JSON: {}", output.text))?;
    Ok((output.rc, said))
}

/// Returns the part of the output about one disk of dom0.
pub(super) fn of<'a>(said: &'a Value, vdev: &str) -> Result<&'a Value> {
    let disks = said["disks"].as_array().context("no list of disks")?;
    let disk = disks
        .iter()
        .find(|disk| disk["guest"] == 0 && disk["vdev"] == vdev);
    disk.with_context(|| format!("no {vdev} of dom0 in {said}"))
}

/// Returns the label `guest` of the disks of dom0 in metrics: its name, or its number where xenstore has no name.
pub(super) fn own_label() -> Result<String> {
    Ok(xs::read("/local/domain/0/name")?.unwrap_or_else(|| "0".into()))
}

/// Starts a write to a disk that hangs: it ends when the disk is resumed.
fn write(device: &str, vbd: &AttachedVbd) -> Result<Child> {
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

/// Checks that `tap-ctl report` does not wait for a disk that hangs, and names it.
fn report(served: &tap::ServedDisk) -> Result<()> {
    let words = ["tap-ctl", "report", "--hung-after", HUNG];
    let told = sh::run_for(&words, LIMIT)?;
    for wanted in [
        "dmsetup resume vmtest-slow",
        "/sys/module/xen_blkback_rs/parameters/host_memory_mib",
        "xen_version",
        "backend/vbd/0/",
        &format!("== blktapctrl: statistics of disk {}", served.minor),
        &format!("== /run/xentap/disks/{}.json", served.minor),
    ] {
        ensure!(told.contains(wanted), "`{wanted}` is not in {told}");
    }
    Ok(())
}

/// The size of the storage.
pub(super) const SECTORS: u64 = 32768;

/// Makes a mapped device, which may hang or be slow, and the device below it.
pub(super) fn storage(context: &mut Context) -> Result<(Dm, String)> {
    sh::modprobe("xen-blkfront", &[])?;
    let below = context.null_blk(16, &[])?.path();
    let storage = Dm::create("vmtest-slow", &linear(&below, SECTORS))?;
    let theirs = storage.clone();
    // This also runs after a failure: a device that hangs cannot be removed.
    context.at_end("remove the mapped device", move || {
        theirs.resume()?;
        theirs.remove()
    });
    Ok((storage, below))
}

/// Messages in the kernel's log about one disk.
struct KernelLog {
    kmsg: Kmsg,
    of: String,
}

impl KernelLog {
    /// Waits until it has a line of the disk with these words, and returns that.
    fn wait(&mut self, words: &str) -> Result<String> {
        let mut found = None;
        sh::wait_for(&format!("`{words}` in the log"), LIMIT, || {
            let lines = self.kmsg.take()?;
            let mut lines = lines.into_iter();
            found = lines.find(|line| line.contains(&self.of) && line.contains(words));
            Ok(found.is_some())
        })?;
        found.context("it was found")
    }
}

fn log(context: &mut Context) -> Result<()> {
    let loaded = sh::run(&["dmesg"])?;
    ensure!(
        loaded.contains("loaded: max_queues"),
        "the log does not say what the module's parameters come to"
    );
    let (storage, _) = storage(context)?;
    let mut log = KernelLog {
        kmsg: Kmsg::from_now()?,
        of: "vbd-0-".into(),
    };
    let vbd = attach_own(context, &storage.path(), "xvdk")?;
    log.wait("connected: queues ")?;
    storage.suspend()?;
    let mut writer = write("/dev/xvdk", &vbd)?;
    let begun = Instant::now();
    let late = log.wait("a request has not been answered for 3")?;
    ensure!(
        begun.elapsed() >= Duration::from_secs(30),
        "it is said of a request that is not so old: {late}"
    );
    storage.resume()?;
    log.wait("the requests that waited are answered")?;
    ensure!(writer.wait()?.success(), "the write failed that had hung");
    detach_own(&vbd)?;
    log.wait("disconnected: reads ")?;
    context.note(&late)
}

fn log_asleep(context: &mut Context) -> Result<()> {
    let (storage, _) = storage(context)?;
    let path = narrow_loop(context, &storage.path())?;
    let vbd = attach_own(context, &path, "xvdk")?;
    let mut log = KernelLog {
        kmsg: Kmsg::from_now()?,
        of: "vbd-0-".into(),
    };
    storage.suspend()?;
    // More requests than the device has tags, in one pass of an idle queue.
    let mut writer = Command::new("dd")
        .args(["if=/dev/zero", "of=/dev/xvdk", "bs=4M", "count=1"])
        .args(["oflag=direct", "status=none"])
        .spawn()
        .context("cannot start dd")?;
    wait_for_sleeper(&vbd)?;
    log.wait("a request has not been answered for 3")?;
    storage.resume()?;
    ensure!(writer.wait()?.success(), "the write failed that had hung");
    detach_own(&vbd)
}

fn status(context: &mut Context) -> Result<()> {
    let (storage, _) = storage(context)?;
    let phy = attach_own(context, &storage.path(), "xvdk")?;
    let served = attach_dom0(&tap::disk("ram:16M", "xvdj", "w"), "xvdj")?;

    storage.suspend()?;
    let mut writer = write("/dev/xvdk", &phy)?;
    let (code, said_hung) = said(SLOW)?;
    let hung = of(&said_hung, "xvdk")?;
    ensure!(code == 7, "the exit code is {code}, not 7: {said_hung}");
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
    ensure!(
        hung["oldest"]["seconds"].as_f64() >= Some(2.0),
        "it is not said since when: {hung}"
    );
    let well = of(&said_hung, "xvdj")?;
    ensure!(
        well["severity"]
            .as_u64()
            .is_some_and(|severity| severity < 2)
            && well["kind"] == "tap",
        "the disk beside it is said to hang: {well}"
    );
    let metrics = tap::ctl(&["metrics", "--hung-after", HUNG])?;
    let guest = own_label()?;
    for line in [
        format!(r#"xen_disk_severity{{guest="{guest}",vdev="xvdk",kind="phy"}} 2"#),
        format!(r#"xen_disk_storage_suspended{{guest="{guest}",vdev="xvdk",kind="phy"}} 1"#),
        format!(
            r#"xen_tap_delivered{{guest="{guest}",vdev="xvdj",kind="tap",minor="{}"}} 0"#,
            served.minor
        ),
        format!(r#"xen_guest_domid{{guest="{guest}"}} 0"#),
        "xen_disk_supervisor_up 1".to_owned(),
    ] {
        ensure!(
            metrics.lines().any(|its| its == line),
            "`{line}` is not in {metrics}"
        );
    }

    report(&served)?;

    storage.resume()?;
    ensure!(writer.wait()?.success(), "the write failed that had hung");
    let (code, said_well) = said(SLOW)?;
    // The machine is emulated: its processors may well be short.
    ensure!(
        code < 2,
        "the exit code is {code} after the disk went on: {said_well}"
    );
    detach_own(&phy)?;
    detach_own(&served.vbd)?;
    served.wait_gone()
}
