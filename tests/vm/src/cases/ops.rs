// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What an administrator sees of disks that are not well.

use super::basic::{attach_own, detach_own};
use super::memory::Parameter;
use super::tap::attach_dom0;
use super::{Case, Context, Needs};
use crate::backing::{delayed, linear, Dm};
use crate::guest::Vbd;
use crate::{sh, tap};
use anyhow::{ensure, Context as _, Result};
use serde_json::{Deserializer, Value};
use std::fs;
use std::process::{Child, Command};
use std::time::Duration;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "ops.status",
            "a phy disk that hangs is named with its device, a tap disk beside it is not, and both are in the metrics",
            Needs::Nothing,
            status,
        )
        .supervised()
        .no_leaks(),
        Case {
            ours: true,
            ..Case::new(
                "ops.slow",
                "a phy disk on slow storage and one that waits for pages are each named with what to do",
                Needs::Nothing,
                slow,
            )
        }
        .no_leaks()
        .nightly(),
    ]
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

/// What is collected for who is to help does not wait for a disk that hangs, and names it.
fn report(served: &tap::Served) -> Result<()> {
    let words = ["tap-ctl", "report", "--hung", HUNG];
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

    report(&served)?;

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

/// What a disk does until this is dropped: `dd` again and again, past the guest's cache.
struct Load {
    child: Child,
}

impl Load {
    const GOES_ON: &str = "/run/vmtest-ops-load";

    fn start(device: &str, size: &str, vbd: &Vbd) -> Result<Load> {
        fs::write(Load::GOES_ON, "").context("cannot mark the load")?;
        let before = vbd.statistic("wr_done")?;
        let line = format!(
            "while [ -e {} ]; do dd if=/dev/zero of={device} bs={size} count=4 oflag=direct status=none; done",
            Load::GOES_ON
        );
        let child = Command::new("sh")
            .args(["-c", &line])
            .spawn()
            .context("cannot start the load")?;
        let load = Load { child };
        sh::wait_for("the first writes", LIMIT, || {
            Ok(vbd.statistic("wr_done")? > before)
        })?;
        Ok(load)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let marked = fs::remove_file(Load::GOES_ON);
        let ended = self.child.wait();
        if marked.is_err() || ended.is_err() {
            eprintln!("the load does not end: {marked:?}, {ended:?}");
        }
    }
}

/// The verdict on xvdk while it is loaded, which is one of these words and no hang.
fn named(state: &str, cause: &str) -> Result<Value> {
    let (code, said) = said()?;
    let disk = of(&said, "xvdk")?.clone();
    ensure!(
        code == 1 && disk["state"] == state && disk["cause"] == cause,
        "it is not said to be {state} for {cause}, with 1 but {code}: {disk}"
    );
    Ok(disk)
}

/// True if one of its sentences has all these words.
fn says(disk: &Value, sentence: &str, words: &[&str]) -> bool {
    let text = disk[sentence].as_str().unwrap_or("");
    words.iter().all(|word| text.contains(word))
}

/// What the last of two pictures of `top` says of how long writes of xvdk take, in milliseconds.
fn write_ms() -> Result<f64> {
    let text = tap::ctl(&["--json", "top", "-n", "2"])?;
    let pictures = Deserializer::from_str(&text).into_iter::<Value>();
    let last = pictures.last().context("no picture")??;
    let figures = &of(&last, "xvdk")?["figures"];
    let awaits = figures["awaits"].as_array().context("no times")?;
    let writes = awaits.iter().find(|one| one["operation"] == "write");
    writes
        .and_then(|one| one["mean_ms"].as_f64())
        .with_context(|| format!("no time of writes in {figures}"))
}

fn slow(context: &mut Context) -> Result<()> {
    const SECTORS: u64 = 32768;
    sh::modprobe("xen-blkfront", &[])?;
    let below = context.null_blk(16, &[])?;
    let storage = Dm::create("vmtest-slow", &linear(&below.path(), SECTORS))?;
    let theirs = storage.clone();
    context.at_end("remove the mapped device", move || theirs.remove());
    // What is copied needs pages, which it will lack.
    let copies = Parameter::set("feature_persistent", "N")?;
    let vbd = attach_own(context, &storage.path(), "xvdk")?;
    drop(copies);

    storage.replace(&delayed(&below.path(), SECTORS, 300)?)?;
    let load = Load::start("/dev/xvdk", "4k", &vbd)?;
    let disk = named("slow", "storage")?;
    ensure!(
        // udev may read meanwhile, which takes as long.
        says(&disk, "why", &["took", "vmtest-slow"])
            && says(&disk, "remedy", &["iostat", "vmtest-slow"]),
        "neither what is slow nor where is said: {disk}"
    );
    let ms = write_ms()?;
    ensure!(ms >= 300.0, "writes that are held for 300 ms took {ms}");
    let metrics = tap::ctl(&["metrics", "--hung", HUNG])?;
    for start in [
        r#"xen_disk_verdict{guest="0",vdev="xvdk",kind="phy",verdict="slow",cause="storage"} 1"#,
        r#"xen_disk_in_flight{guest="0",vdev="xvdk",kind="phy"} "#,
        r#"xen_disk_time_seconds_total{guest="0",vdev="xvdk",kind="phy",operation="write"} "#,
    ] {
        ensure!(
            metrics.lines().any(|line| line.starts_with(start)),
            "`{start}` is not in {metrics}"
        );
    }
    drop(load);

    // Not so slow that it is called so. Large requests then do without pages: they have those of the queue.
    storage.replace(&delayed(&below.path(), SECTORS, 20)?)?;
    let bound = Parameter::set("domain_memory_mib", "0")?;
    let load = Load::start("/dev/xvdk", "1M", &vbd)?;
    let disk = named("slow", "page-pool")?;
    ensure!(
        says(&disk, "why", &["waited for pages"])
            && says(&disk, "remedy", &["parameters/domain_memory_mib"]),
        "the limit that is to be raised is not named: {disk}"
    );
    let (waited, pieces) = (vbd.statistic("page_wait_ns")?, vbd.statistic("pieces")?);
    context.note(&format!(
        "writes took {ms:.0} ms; {} ms without pages, {pieces} pieces",
        waited / 1_000_000
    ))?;
    drop(load);
    drop(bound);

    storage.replace(&linear(&below.path(), SECTORS))?;
    for (name, left) in [("in_flight", 0), ("oldest_ns", 0)] {
        sh::wait_for("the end of all requests", LIMIT, || {
            Ok(vbd.statistic(name)? == left)
        })?;
    }
    detach_own(&vbd)
}
