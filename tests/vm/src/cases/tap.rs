// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Tap disks with the files that a package installs: hotplug scripts, supervisor, tapdisk, tap-ctl.

use super::basic::{check_grown, compare, detach_own, verify_job, FIO};
use super::permission::check_process;
use super::scripted_process::history;
use super::{Case, Context, SharedGuest};
use crate::backing::{self, Lvm};
use crate::console::{Console, GuestJob};
use crate::guest::{AttachedVbd, Guest, COMMAND};
use crate::tap::{self, ServedDisk};
use crate::{sh, xs};
use anyhow::{ensure, Context as _, Result};
use std::path::Path;
use std::time::Duration;

pub(crate) const VDEV: &str = "xvdb";
pub(super) const DEVICE: &str = "/dev/xvdb";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv, Pvh};
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run).supervised().no_leaks()
    };
    vec![
        case(
            "tap.file",
            "script=block-tap-rs: a file, verified, counted, detached without a trace",
            Pv,
            file,
        ),
        case("tap.pvh", "the same file for a PVH guest", Pvh, pvh).nightly(),
        case(
            "tap.drop_in",
            "tap:aio: and file: through the script that stands in for Xen's, and phy: still",
            Pv,
            drop_in,
        )
        .nightly(),
        case(
            "tap.backendtype",
            "backendtype=tap: the kind vbd3, without a script of ours",
            Pv,
            backendtype,
        ).nightly(),
        case(
            "tap.volume",
            "a logical volume grows under the guest",
            Pv,
            volume,
        ),
        case(
            "tap.read_only",
            "a read-only disk reads and refuses to be written",
            Pv,
            read_only,
        ).nightly(),
        case(
            "tap.sharing",
            "an image has one writer or many readers, and who is refused hears why",
            Pv,
            sharing,
        ).nightly(),
        case("tap.dom0", "a disk attached to dom0 itself", Nothing, dom0).nightly(),
        case(
            "tap.memory",
            "a disk of memory keeps its content over deaths and pauses under load; a disk of nothing",
            Pv,
            memory,
        ).nightly(),
        case(
            "tap.pause",
            "pause and unpause under load: requests wait, none fails",
            Pv,
            pause,
        ),
        case(
            "tap.nbd",
            "NBD clients read and write the same disk",
            Nothing,
            nbd,
        ),
        case(
            "tap.history",
            "random requests of all kinds are explained by some order of them",
            Pv,
            history_holds,
        ).nightly(),
        case(
            "tap.cycles",
            "attached and detached again and again, nothing is lost",
            Nothing,
            cycles,
        )
        .nightly(),
    ]
}

/// An image that is removed with the case.
pub(super) fn image(context: &mut Context, name: &str, mib: u32) -> Result<String> {
    let path = tap::image(name, mib)?;
    let theirs = path.clone();
    context.at_end(format!("remove {path}"), move || {
        Ok(std::fs::remove_file(theirs)?)
    });
    Ok(path)
}

/// Makes an image that is full of random data.
pub(super) fn full_image(context: &mut Context, name: &str, mib: u32) -> Result<String> {
    let path = image(context, name, mib)?;
    sh::shell(&format!(
        "dd if=/dev/urandom of={path} bs=1M count={mib} conv=notrunc status=none"
    ))?;
    Ok(path)
}

/// The guest reads the same as dom0 finds in the image.
pub(super) fn same(guest: &Guest, image: &str, mib: u32) -> Result<()> {
    compare(guest, VDEV, image, mib)
}

fn file(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 32)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    context.check_driver(&disk.vbd)?;
    let status = xs::must_read(&format!("{}/tap-status", disk.vbd.backend))?;
    ensure!(status == "live", "`tap-status` is `{status}`");
    ensure!(
        xs::read(&format!("{}/physical-device", disk.vbd.backend))?.is_none(),
        "a tap disk has a block device"
    );
    check_process(disk.pid()?)?;
    // The figure of docs/explanation/process-deaths.md.
    let held = disk.info()?.memory_kib;
    ensure!(
        (1..=2765).contains(&held),
        "the kernel holds {held} KiB for a disk of two queues, which are to be 2.7 MiB"
    );
    let guest = context.pv()?;
    let before = (
        disk.vbd.statistic("wr_req")?,
        disk.vbd.statistic("rd_sect")?,
    );
    guest.run_for(&verify_job(DEVICE, 16, 200, 512), FIO)?;
    ensure!(
        disk.vbd.statistic("wr_req")? >= before.0 + 150
            && disk.vbd.statistic("rd_sect")? >= before.1 + 1024,
        "the statistics do not show what fio did"
    );
    same(guest, &image, 16)?;
    check_xentop(guest)?;
    let flushes = disk.vbd.statistic("f_req")?;
    guest.run("dd if=/dev/zero of=/dev/xvdb count=0 conv=fsync,notrunc")?;
    ensure!(
        disk.vbd.statistic("f_req")? > flushes,
        "a flush of the guest was not counted"
    );
    let rows = tap::ctl_json(&["list"])?;
    ensure!(
        rows.to_string().contains(&image),
        "tap-ctl list does not show {image}: {rows}"
    );
    disk.detach(guest)
}

/// xentop shows that the guest has read and written.
fn check_xentop(guest: &Guest) -> Result<()> {
    let text = sh::run(&["xentop", "-b", "-i", "1"])?;
    let mut lines = text.lines();
    let heads: Vec<&str> = lines
        .find(|line| line.contains("VBD_RD"))
        .context("xentop has no VBD_RD")?
        .split_whitespace()
        .collect();
    let row: Vec<&str> = lines
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|row| row.first() == Some(&guest.config.name.as_str()))
        .with_context(|| format!("xentop does not show {}", guest.config.name))?;
    // `no limit` in a column makes the row longer: count from the end.
    for name in ["VBD_RD", "VBD_WR"] {
        let from_end = heads
            .iter()
            .rev()
            .position(|head| *head == name)
            .with_context(|| format!("xentop has no {name}"))?;
        let value = row.iter().rev().nth(from_end).copied().unwrap_or("");
        ensure!(
            value.parse::<u64>().is_ok_and(|count| count > 0),
            "xentop shows {name} = `{value}` after a load"
        );
    }
    Ok(())
}

fn pvh(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let guest = context.pvh()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    context.check_driver(&disk.vbd)?;
    let guest = context.pvh()?;
    guest.run_for(&verify_job(DEVICE, 8, 60, 512), FIO)?;
    same(guest, &image, 8)?;
    disk.detach(guest)
}

/// Xen's script `block` is ours until the end of the case.
pub(super) fn stand_in(context: &mut Context) -> Result<()> {
    sh::run(&["xentap-block", "enable"])?;
    context.at_end("put Xen's script back", || {
        sh::run(&["xentap-block", "disable"]).map(drop)
    });
    Ok(())
}

fn drop_in(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let device = context.null_blk(16, &[])?;
    stand_in(context)?;
    let guest = context.pv()?;
    for specification in [
        format!("tap:aio:{image},{VDEV},w"),
        format!("file:{image},{VDEV},w"),
    ] {
        let disk = ServedDisk::attach(guest, &specification)?;
        context.check_driver(&disk.vbd)?;
        guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
        same(guest, &image, 4)?;
        disk.detach(guest)?;
    }
    let vbd = guest.attach(&format!("phy:{},{VDEV},w", device.path()))?;
    ensure!(
        xs::read(&format!("{}/tap-minor", vbd.backend))?.is_none(),
        "a block device went to a tapdisk"
    );
    guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
    compare(guest, VDEV, &device.path(), 4)?;
    guest.detach(&vbd)
}

fn backendtype(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let guest = context.pv()?;
    let specification =
        format!("backendtype=tap, format=raw, vdev={VDEV}, access=w, target={image}");
    let disk = ServedDisk::attach(guest, &specification)?;
    ensure!(
        disk.vbd.backend.contains("/backend/vbd3/"),
        "backendtype=tap made {}",
        disk.vbd.backend
    );
    context.check_driver(&disk.vbd)?;
    guest.run_for(&verify_job(DEVICE, 8, 60, 512), FIO)?;
    same(guest, &image, 8)?;
    disk.replace()?;
    guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
    disk.detach(guest)
}

fn volume(context: &mut Context) -> Result<()> {
    let device = context.null_blk(64, &[])?;
    let volume = Lvm::create("vmtestvg", &device.path(), 16)?;
    let theirs = volume.clone();
    context.at_end("remove the volume", move || theirs.remove());
    let guest = context.pv()?;
    let disk = ServedDisk::attach(
        guest,
        &tap::disk(&format!("aio:{}", volume.path()), VDEV, "w"),
    )?;
    guest.run_for(&verify_job(DEVICE, 8, 60, 512), FIO)?;
    same(guest, &volume.path(), 8)?;
    volume.extend(32)?;
    tap::ctl(&["resize", "-m", &disk.minor.to_string()])?;
    check_grown(guest, VDEV, &volume)?;
    // The next process finds the new size.
    disk.replace()?;
    guest.run("dd if=/dev/xvdb of=/dev/null bs=512 skip=65535 count=1 iflag=direct")?;
    disk.detach(guest)
}

fn read_only(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    sh::shell(&format!(
        "dd if=/dev/urandom of={image} bs=1M count=4 conv=notrunc status=none"
    ))?;
    let before = backing::sha256(&image, 4)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "r"))?;
    ensure!(
        xs::number(&format!("{}/info", disk.vbd.backend))? & 4 != 0,
        "`info` does not say that the disk is read-only"
    );
    ensure!(
        guest.run("cat /sys/block/xvdb/ro")?.trim() == "1",
        "the guest does not see that the disk is read-only"
    );
    let write = guest.status("dd if=/dev/zero of=/dev/xvdb bs=4k count=1 oflag=direct")?;
    ensure!(write.rc != 0, "the guest could write to a read-only disk");
    same(guest, &image, 4)?;
    ensure!(
        backing::sha256(&image, 4)? == before,
        "the image changed below a read-only disk"
    );
    disk.detach(guest)
}

fn sharing(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let image = image(context, "a.img", 16)?;
    let target = format!("aio:{image}");
    let own = |access: &str| tap::disk(&target, "xvdk", access);
    let guest = context.pv()?;
    let writer = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    for access in ["w", "r"] {
        let refused = sh::status(
            &["xl", "block-attach", "0", &own(access)],
            Duration::from_secs(60),
        )?;
        ensure!(
            refused.rc != 0 && refused.text.contains("not free"),
            "a second user ({access}) of an image with a writer was not refused in clear words: {}",
            sh::tail(&refused.text, 400)
        );
        forget_refused("0", "xvdk")?;
    }
    writer.detach(guest)?;
    let reader = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "r"))?;
    sh::run(&["xl", "block-attach", "0", &own("r")])?;
    let second = ServedDisk::of(AttachedVbd::of(0, "xvdk")?)?;
    wait_node("xvdk")?;
    ensure!(
        second.minor != reader.minor && second.pid()? != reader.pid()?,
        "two disks have one process"
    );
    sh::shell("dd if=/dev/xvdk of=/dev/null bs=64k count=4 iflag=direct status=none")?;
    detach_own(&second.vbd)?;
    second.wait_gone()?;
    let guest = context.pv()?;
    guest.run("dd if=/dev/xvdb of=/dev/null bs=64k count=4 iflag=direct")?;
    reader.detach(guest)
}

/// Removes the entries of xenstore that xl leaves of a disk whose script failed.
pub(super) fn forget_refused(domain: &str, vdev: &str) -> Result<()> {
    sh::run(&["xl", "block-detach", domain, vdev, "--force"]).map(drop)
}

fn wait_node(vdev: &str) -> Result<()> {
    let node = format!("/dev/{vdev}");
    sh::wait_for(
        &format!("the appearance of {node}"),
        Duration::from_secs(30),
        || Ok(Path::new(&node).exists()),
    )
}

/// Attaches a disk to dom0 itself.
pub(super) fn attach_dom0(specification: &str, vdev: &str) -> Result<ServedDisk> {
    sh::run(&["xl", "block-attach", "0", specification])?;
    let disk = ServedDisk::of(AttachedVbd::of(0, vdev)?)?;
    wait_node(vdev)?;
    Ok(disk)
}

fn dom0(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let image = image(context, "a.img", 16)?;
    let disk = attach_dom0(&tap::disk(&format!("aio:{image}"), "xvdk", "w"), "xvdk")?;
    context.check_driver(&disk.vbd)?;
    sh::run_for(&["sh", "-c", &verify_job("/dev/xvdk", 12, 200, 512)], FIO)?;
    let (through, below) = (
        backing::sha256("/dev/xvdk", 16)?,
        backing::sha256(&image, 16)?,
    );
    ensure!(
        through == below,
        "the disk reads {through}, the image {below}"
    );
    detach_own(&disk.vbd)?;
    disk.wait_gone()
}

fn memory(context: &mut Context) -> Result<()> {
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk("ram:16M", VDEV, "w"))?;
    let load = start_load(guest)?;
    for _ in 0..3 {
        wait_progress(&disk, 50)?;
        disk.replace()?;
    }
    let minor = disk.minor.to_string();
    tap::ctl(&["pause", "-m", &minor])?;
    tap::ctl(&["unpause", "-m", &minor])?;
    wait_progress(&disk, 50)?;
    let told = end_load(guest, load)?;
    let memory = format!("/run/xentap/ram/{minor}");
    same(guest, &memory, 16)?;
    disk.detach(guest)?;
    ensure!(
        !Path::new(&memory).exists(),
        "the memory of a disk is left when the disk is gone"
    );
    context.note(&told)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk("null:16M", VDEV, "w"))?;
    guest.run("dd if=/dev/zero of=/dev/xvdb bs=64k count=8 oflag=direct")?;
    let text = guest
        .run("dd if=/dev/xvdb bs=64k count=8 iflag=direct 2>/dev/null | tr -d '\\000' | wc -c")?;
    ensure!(
        text.trim() == "0",
        "the driver that has nothing reads as something"
    );
    disk.detach(guest)
}

/// Starts the guest's load, which runs until it is stopped: the history, and fio beside it.
pub(crate) fn start_load(guest: &Guest) -> Result<[GuestJob; 2]> {
    start_load_with(guest, "--discard")
}

/// Starts that load with other options of the history: without `--discard` it does not discard, which not every driver
/// can.
pub(super) fn start_load_with(guest: &Guest, options: &str) -> Result<[GuestJob; 2]> {
    guest.run("rm -f /tmp/stop")?;
    let judged = history(
        DEVICE,
        &format!("{options} --sectors 1024 --requests 40 --threads 12 --until /tmp/stop"),
    );
    let fio = "while [ ! -e /tmp/stop ]; do fio --name=v --filename=/dev/xvdb --offset=8m --size=2m --bssplit=4k/60:64k/40 --direct=1 \
         --ioengine=libaio --iodepth=16 --rw=randwrite --verify=crc32c --verify_fatal=1 --do_verify=1 --serialize_overlap=1 \
         --number_ios=60 --output-format=terse || exit 1; done";
    Ok([guest.start(&judged)?, guest.start(fio)?])
}

/// Ends the load, which must not have seen an error; returns what the history says.
pub(crate) fn end_load(guest: &Guest, jobs: [GuestJob; 2]) -> Result<String> {
    end_load_over(&guest.console, jobs)
}

/// Ends a load like [`end_load`], over the console of a guest that need not be on this host.
pub(super) fn end_load_over(console: &Console, jobs: [GuestJob; 2]) -> Result<String> {
    console.run("touch /tmp/stop", COMMAND)?;
    let mut texts = Vec::new();
    for (what, job) in ["the history", "fio"].into_iter().zip(jobs) {
        let done = console.wait(job, FIO)?;
        ensure!(
            done.rc == 0,
            "{what} failed in the guest: {}",
            sh::tail(&done.text, 500)
        );
        texts.push(done.text);
    }
    Ok(texts.remove(0).trim().to_owned())
}

/// Returns the time of the slowest request of a load that has [ended](end_load).
pub(super) fn slowest(told: &str) -> Result<Duration> {
    let ms = told
        .split_once("slowest ")
        .and_then(|(_, rest)| rest.split_once(" ms"));
    let (ms, _) =
        ms.with_context(|| format!("the history does not say how slow it was: {told}"))?;
    Ok(Duration::from_millis(ms.parse()?))
}

fn pause(context: &mut Context) -> Result<()> {
    let first = image(context, "a.img", 16)?;
    let second = image(context, "b.img", 16)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{first}"), VDEV, "w"))?;
    let minor = disk.minor.to_string();
    let load = start_load(guest)?;
    for _ in 0..3 {
        wait_progress(&disk, 50)?;
        tap::ctl(&["pause", "-m", &minor])?;
        let before = disk.info()?.committed;
        sh::wait_for("requests that wait", Duration::from_secs(30), || {
            Ok(disk.info()?.waiting > 0)
        })?;
        ensure!(
            disk.info()?.committed == before,
            "requests were answered while the disk was paused"
        );
        tap::ctl(&["unpause", "-m", &minor])?;
    }
    wait_progress(&disk, 50)?;
    let told = end_load(guest, load)?;
    same(guest, &first, 16)?;
    // A paused disk may resume with another image, here with a copy.
    tap::ctl(&["pause", "-m", &minor])?;
    sh::run(&["cp", &first, &second])?;
    tap::ctl(&["unpause", "-m", &minor, "-a", &format!("aio:{second}")])?;
    guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
    same(guest, &second, 16)?;
    context.note(&told)?;
    let guest = context.pv()?;
    disk.detach(guest)
}

/// Waits until `count` more requests were answered, by the kernel or a process.
pub(crate) fn wait_progress(disk: &ServedDisk, count: u64) -> Result<()> {
    let answered = || disk.info().map(|info| info.committed + info.direct);
    let before = answered()?;
    sh::wait_for(
        "requests that are answered",
        Duration::from_secs(60),
        || Ok(answered()? >= before + count),
    )
}

fn nbd(context: &mut Context) -> Result<()> {
    let image = full_image(context, "a.img", 8)?;
    let target = format!("aio:{image}");
    let minor = tap::ctl(&["create", "--minor-only", "--nbd", "-a", &target])?;
    let minor = minor.trim();
    let url = format!("nbd+unix:///?socket=/run/xentap/nbd/{minor}.sock");
    // `qemu-img compare` would need a lock on the image, which tapdisk has.
    sh::shell(&format!(
        "qemu-img convert -f raw -O raw '{url}' {image}.copy && cmp {image}.copy {image}; \
         rc=$?; rm -f {image}.copy; exit $rc"
    ))?;
    sh::run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write -P 0x61 64k 64k",
        "-c",
        "flush",
        &url,
    ])?;
    let held = sh::shell(&format!(
        "dd if={image} bs=64k skip=1 count=1 iflag=direct status=none | fold -w 1 | sort -u"
    ))?;
    ensure!(
        held.trim() == "a",
        "what an NBD client wrote did not reach the image"
    );
    tap::ctl(&["destroy", "-m", minor]).map(drop)
}

fn history_holds(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    let told = guest.run_for(&history(DEVICE, "--rounds 6 --discard"), FIO)?;
    same(guest, &image, 16)?;
    context.note(told.trim())?;
    let guest = context.pv()?;
    disk.detach(guest)
}

fn cycles(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let image = image(context, "a.img", 16)?;
    let specification = tap::disk(&format!("aio:{image}"), "xvdk", "w");
    let cycle = || -> Result<()> {
        let disk = attach_dom0(&specification, "xvdk")?;
        sh::shell("dd if=/dev/zero of=/dev/xvdk bs=64k count=4 oflag=direct status=none")?;
        detach_own(&disk.vbd)?;
        disk.wait_gone()
    };
    super::lifecycle::keeps_memory(3, 10, cycle)
}
