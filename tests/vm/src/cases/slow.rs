// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks that are slow in several ways, and the reports about them for an administrator.

use super::basic::{attach_own, detach_own};
use super::formats::qemu_img;
use super::memory::Parameter;
use super::ops::{of, own_label, said, storage, HUNG, LIMIT, SECTORS, SLOW};
use super::tap::{attach_dom0, image};
use super::{Case, Context, SharedGuest};
use crate::backing::{delayed, linear};
use crate::guest::AttachedVbd;
use crate::{sh, tap};
use anyhow::{ensure, Context as _, Result};
use serde_json::{Deserializer, Value};
use std::process::{Child, Command};

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let ours = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case {
            ours: true,
            ..Case::new(name, about, SharedGuest::Nothing, run)
        }
        .no_leaks()
        .nightly()
    };
    vec![
        ours(
            "ops.slow",
            "a phy disk on slow storage and one that waits for pages are each named with what to do",
            slow,
        ),
        ours(
            "ops.slow_ring",
            "a phy disk whose guest has more requests than its ring has room for is named, and is ok",
            full_ring,
        )
        // Without a supervisor the exit code is never that of a host that is well.
        .supervised(),
        ours(
            "ops.slow_process",
            "a tap disk whose process has too much to do is named, and so it is where others take its processor",
            process,
        )
        .supervised(),
    ]
}

/// A program that runs until this is dropped.
struct RunningProgram(Child);

impl RunningProgram {
    fn start(command: &mut Command) -> Result<RunningProgram> {
        let child = command.spawn();
        child
            .map(RunningProgram)
            .with_context(|| format!("cannot start {command:?}"))
    }
}

impl Drop for RunningProgram {
    fn drop(&mut self) {
        let killed = self.0.kill();
        let ended = self.0.wait();
        if killed.is_err() || ended.is_err() {
            eprintln!("a program does not end: {killed:?}, {ended:?}");
        }
    }
}

/// Starts fio on a disk with these words, and waits until its first phase is over.
fn load(words: &str, vbd: &AttachedVbd) -> Result<RunningProgram> {
    const BEGUN: u64 = 100;
    let ended = || Ok::<_, anyhow::Error>(vbd.statistic("wr_done")? + vbd.statistic("rd_done")?);
    let before = ended()?;
    let mut fio = Command::new("fio");
    // A process of its own for each job would outlive this one.
    fio.args(["--name=load", "--thread", "--ioengine=libaio", "--direct=1"])
        .args(["--filename=/dev/xvdk", "--time_based", "--runtime=1h"])
        .arg("--output=/dev/null")
        .args(words.split_whitespace());
    let load = RunningProgram::start(&mut fio)?;
    sh::wait_for(
        "the first requests",
        LIMIT,
        || Ok(ended()? > before + BEGUN),
    )?;
    Ok(load)
}

/// Loads dom0's processors, with so many programs that others get a small share.
fn hogs() -> Result<Vec<RunningProgram>> {
    const COUNT: usize = 8;
    let hog = || RunningProgram::start(Command::new("sh").args(["-c", "while :; do :; done"]));
    (0..COUNT).map(|_| hog()).collect()
}

/// The verdict on xvdk while it is loaded, which is this one, with this exit code; `slow` says which requests are slow.
fn named(slow: &str, wanted: i32, state: &str, cause: &str) -> Result<Value> {
    let (code, said) = said(slow)?;
    let disk = of(&said, "xvdk")?.clone();
    ensure!(
        code == wanted && disk["state"] == state && disk["cause"] == cause,
        "it is not said to be {state} for {cause}, with {wanted} but {code}: {disk}"
    );
    Ok(disk)
}

/// The metrics have the same verdict on xvdk; returns them.
fn measured(slow: &str, kind: &str, state: &str, cause: &str) -> Result<String> {
    let metrics = tap::ctl(&["metrics", "--hung-after", HUNG, "--slow", slow])?;
    let guest = own_label()?;
    let start = format!(r#"xen_disk_verdict{{guest="{guest}",vdev="xvdk",kind="{kind}","#);
    // Between them the minor of a tap disk.
    let end = format!(r#"verdict="{state}",cause="{cause}"}} 1"#);
    ensure!(
        metrics
            .lines()
            .any(|line| line.starts_with(&start) && line.ends_with(&end)),
        "no `{start}` with `{end}` is in {metrics}"
    );
    Ok(metrics)
}

/// Checks that the reason and the remedy have all these words.
fn tells(disk: &Value, why: &[&str], remedy: &[&str]) -> Result<()> {
    for (sentence, words) in [("why", why), ("remedy", remedy)] {
        let text = disk[sentence].as_str().unwrap_or("");
        ensure!(
            words.iter().all(|word| text.contains(word)),
            "its `{sentence}` has not all of {words:?}: {disk}"
        );
    }
    Ok(())
}

/// The figures of xvdk in the last of two pictures of `top`.
fn shown() -> Result<Value> {
    let text = tap::ctl(&["--json", "top", "-n", "2"])?;
    let pictures = Deserializer::from_str(&text).into_iter::<Value>();
    let last = pictures.last().context("no picture")??;
    Ok(of(&last, "xvdk")?["figures"].clone())
}

/// Returns the time of its writes, in milliseconds.
fn write_ms() -> Result<f64> {
    let figures = shown()?;
    let awaits = figures["awaits"].as_array().context("no times")?;
    let writes = awaits.iter().find(|one| one["operation"] == "write");
    writes
        .and_then(|one| one["mean_ms"].as_f64())
        .with_context(|| format!("no time of writes in {figures}"))
}

/// fio's words for a job on each of two processors, each of which has a ring.
const ON_BOTH: &str = "--numjobs=2 --cpus_allowed=0-1 --cpus_allowed_policy=split";

/// Its storage is fast again, so that nothing is left.
fn ends(vbd: &AttachedVbd) -> Result<()> {
    for (name, left) in [("in_flight", 0), ("oldest_ns", 0)] {
        sh::wait_for("the end of all requests", LIMIT, || {
            Ok(vbd.statistic(name)? == left)
        })?;
    }
    detach_own(vbd)
}

fn slow(context: &mut Context) -> Result<()> {
    let (storage, below) = storage(context)?;
    // Copied requests need pages, which the disk will lack.
    let copies = Parameter::set("feature_persistent", "N")?;
    let vbd = attach_own(context, &storage.path(), "xvdk")?;
    drop(copies);

    storage.replace(&delayed(&below, SECTORS, 300)?)?;
    let running = load("--rw=write --bs=4k --iodepth=4", &vbd)?;
    let disk = named(SLOW, 1, "slow", "storage")?;
    // udev may read at that time, which takes as long.
    tells(&disk, &["took", "vmtest-slow"], &["iostat", "vmtest-slow"])?;
    let ms = write_ms()?;
    ensure!(ms >= 300.0, "writes that are held for 300 ms took {ms}");
    let metrics = measured(SLOW, "phy", "slow", "storage")?;
    let guest = own_label()?;
    for start in [
        format!(r#"xen_disk_in_flight{{guest="{guest}",vdev="xvdk",kind="phy"}} "#),
        format!(
            r#"xen_disk_time_seconds_total{{guest="{guest}",vdev="xvdk",kind="phy",operation="write"}} "#
        ),
    ] {
        ensure!(
            metrics.lines().any(|line| line.starts_with(&start)),
            "`{start}` is not in {metrics}"
        );
    }
    drop(running);

    // Not so slow that it is called so. Large requests then do without pages: they have those of the queue.
    storage.replace(&delayed(&below, SECTORS, 20)?)?;
    let bound = Parameter::set("domain_memory_mib", "0")?;
    let running = load("--rw=write --bs=1M", &vbd)?;
    let disk = named(SLOW, 1, "slow", "page-pool")?;
    tells(
        &disk,
        &["waited for pages"],
        &["parameters/domain_memory_mib"],
    )?;
    measured(SLOW, "phy", "slow", "page-pool")?;
    let (waited, pieces) = (vbd.statistic("page_wait_ns")?, vbd.statistic("pieces")?);
    context.note(&format!(
        "writes took {ms:.0} ms; {} ms without pages, {pieces} pieces",
        waited / 1_000_000
    ))?;
    drop(running);
    drop(bound);

    storage.replace(&linear(&below, SECTORS))?;
    ends(&vbd)
}

fn full_ring(context: &mut Context) -> Result<()> {
    let (storage, below) = storage(context)?;
    let vbd = attach_own(context, &storage.path(), "xvdk")?;
    // Not so slow that it is called so. A ring of one page has room for 32 requests, and each processor has one.
    storage.replace(&delayed(&below, SECTORS, 80)?)?;
    let work = format!("--rw=randwrite --bs=4k --iodepth=64 {ON_BOTH}");
    let running = load(&work, &vbd)?;
    let disk = named(SLOW, 0, "ok", "ring")?;
    tells(&disk, &["room in its rings"], &["max_ring_page_order"])?;
    measured(SLOW, "phy", "ok", "ring")?;
    let used = shown()?["ring_used"].as_f64();
    let used = used.context("it is not shown how full the rings are")?;
    drop(running);
    // This load leaves room in the ring all the time.
    let running = load("--rw=randwrite --bs=4k --iodepth=8", &vbd)?;
    let (code, said) = said(SLOW)?;
    let disk = of(&said, "xvdk")?;
    ensure!(
        code == 0 && disk["state"] == "ok" && disk["cause"].is_null(),
        "a ring that has room is named: {disk}"
    );
    drop(running);
    context.note(&format!("{:.0} % of the rings were in use", used * 100.0))?;
    storage.replace(&linear(&below, SECTORS))?;
    ends(&vbd)
}

/// Milliseconds after which a process's request counts as slow: other machines are quicker than this one may be.
const PROCESS_SLOW: &str = "20";

/// An image that costs its process most: for each block that is read it unpacks a cluster.
fn compressed(context: &mut Context) -> Result<String> {
    const MIB: u32 = 16;
    let plain = image(context, "plain.raw", MIB)?;
    let fill = format!("head -c {MIB}M /dev/urandom | base64 -w 0 | head -c {MIB}M > {plain}");
    sh::shell(&fill)?;
    let packed = image(context, "packed.qcow2", 1)?;
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &plain, &packed])?;
    Ok(packed)
}

fn process(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let image = compressed(context)?;
    let target = format!("qcow2:{image}");
    let served = attach_dom0(&tap::disk(&target, "xvdk", "r"), "xvdk")?;
    let work = format!("--rw=randread --bs=4k --iodepth=32 {ON_BOTH}");
    let running = load(&work, &served.vbd)?;
    let disk = named(PROCESS_SLOW, 1, "slow", "process")?;
    tells(
        &disk,
        &["its process uses", "processors"],
        &["several disks"],
    )?;
    measured(PROCESS_SLOW, "tap", "slow", "process")?;
    let ran = shown()?["process_ran"].as_f64();
    let ran = ran.context("it is not shown what its process ran")?;

    let hogs = hogs()?;
    let disk = named(PROCESS_SLOW, 1, "slow", "host-cpu")?;
    tells(&disk, &["waited for a processor"], &["top"])?;
    measured(PROCESS_SLOW, "tap", "slow", "host-cpu")?;
    let starved = shown()?["starved"]
        .as_f64()
        .context("no waits of its thread")?;
    drop(hogs);
    drop(running);
    context.note(&format!(
        "its process used {ran:.1} processors, and waited {:.0} % of the time beside others",
        starved * 100.0
    ))?;
    detach_own(&served.vbd)?;
    served.wait_gone()
}
