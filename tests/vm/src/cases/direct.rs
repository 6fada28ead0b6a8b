// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Passthrough: the kernel serves the device or the file behind a tap disk, with and without its process.

use super::basic::{flushes_arrive, verify_job, FIO};
use super::faults::{endless_load, wait_load};
use super::formats::{judge, make, of_guest, over, Format, QCOW, QCOW2, VHD, VHD_FIXED, VMDK};
use super::hung::{
    destroy_quickly, hangable, host_is_well, others_are_served, wait_vanished, Pages,
};
use super::lifecycle::own_guest;
use super::memory::Parameter;
use super::tap::{
    end_load, full_image, same, start_load, start_load_with, wait_progress, DEVICE, VDEV,
};
use super::{Case, Context, SharedGuest};
use crate::backing::{linear, unwritable, Dm, NullBlk};
use crate::guest::AttachedVbd;
use crate::tap::{self, EventLog, ServedDisk};
use crate::{sh, sys};
use anyhow::{ensure, Context as _, Result};
use diskio::LockKind;
use ring::tap::abi::{Info, STATE_LIVE};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::time::Duration;
use tapdev::control::Control;

/// Time limit for quick events in an emulated machine.
const SOON: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv};
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run).supervised().no_leaks()
    };
    vec![
        case(
            "direct.serves",
            "the kernel serves a device behind a tap disk: verified, flushed, discarded",
            Pv,
            |context| serves(context, MappableImage::device),
        ),
        case(
            "direct.express",
            "queues without the lock of their disk: under verified load, with discards, a pause and another process between",
            Pv,
            express,
        ),
        case(
            "direct.serves_file",
            "the same of a file with holes",
            Pv,
            |context| serves(context, MappableImage::file),
        ).nightly(),
        case(
            "direct.serves_xfs",
            "the same on XFS",
            Pv,
            |context| serves(context, |context| MappableImage::on(context, "xfs", 320)),
        )
        .nightly(),
        case(
            "direct.qcow2",
            "the kernel serves what a qcow2 image has already, under verified load while its process dies",
            Pv,
            |context| serves_format(context, &QCOW2),
        ),
        case(
            "direct.clone",
            "of a clone the kernel reads what is in the image below it and what is nowhere, from the first request on and without its process",
            Pv,
            clone,
        )
        .nightly(),
        case("direct.qcow", "the same of a qcow image", Pv, |context| {
            serves_format(context, &QCOW)
        })
        .nightly(),
        case("direct.vhd", "the same of a dynamic VHD", Pv, |context| {
            serves_format(context, &VHD)
        }).nightly(),
        case(
            "direct.vhd_fixed",
            "the same of a fixed VHD, which is the disk",
            Pv,
            |context| serves_format(context, &VHD_FIXED),
        )
        .nightly(),
        case("direct.vmdk", "the same of a sparse VMDK", Pv, |context| {
            serves_format(context, &VMDK)
        })
        .nightly(),
        case(
            "direct.many_places",
            "of an image in four thousand places the kernel knows all when it was told of all",
            Pv,
            many_places,
        ).nightly(),
        case(
            "direct.failed_flush",
            "the administrator hears of a flush that fails in the kernel",
            Pv,
            failed_flush,
        ),
        case(
            "direct.without_process",
            "process and supervisor are gone under load: reads, writes and flushes go on, and then the next process",
            Pv,
            |context| without_process(context, MappableImage::device),
        )
        .nightly(),
        case(
            "direct.without_process_file",
            "the same of a file with holes, which are filled without the process",
            Pv,
            |context| without_process(context, MappableImage::file),
        ),
        case(
            "direct.pause",
            "paused under load, nothing is executed and the kernel has let go of the device",
            Pv,
            |context| pause(context, MappableImage::device),
        ).nightly(),
        case(
            "direct.pause_file",
            "the same of a file",
            Pv,
            |context| pause(context, MappableImage::file),
        )
        .nightly(),
        case(
            "direct.locked",
            "nobody else gets an image that the kernel has, though neither process nor supervisor lives",
            Pv,
            locked,
        ),
        case(
            "direct.frozen",
            "the file system of the image is frozen under load: others are served, and it goes on",
            Pv,
            frozen,
        ),
        case(
            "direct.hung",
            "the guest of a disk whose device hangs below the kernel is destroyed: others are served, and it vanishes",
            Nothing,
            |context| hung(context, Pages::Copied),
        )
        .nightly(),
        case(
            "direct.hung_kept",
            "the same with pages of the guest that stay mapped: it vanishes when the device comes back",
            Nothing,
            |context| hung(context, Pages::Kept),
        )
        .nightly(),
    ]
}

/// A disk of a device that the kernel may serve.
fn disk(path: &str, vdev: &str) -> String {
    tap::disk(&format!("direct=yes,aio:{path}"), vdev, "w")
}

/// Mount point of the file system with the image.
const MOUNT: &str = "/run/vmtest-direct";

/// An image that the kernel may serve.
struct MappableImage {
    /// A device that can all that a guest asks for.
    device: NullBlk,
    image: String,
}

/// Makes one for the time of a case.
type Make = fn(&mut Context) -> Result<MappableImage>;

impl MappableImage {
    fn device(context: &mut Context) -> Result<Self> {
        let device = context.null_blk(16, &[("discard", "1"), ("cache_size", "4")])?;
        let image = device.path();
        Ok(Self { device, image })
    }

    /// Makes a file in which nothing is allocated, on a file system that supports direct writes.
    fn file(context: &mut Context) -> Result<Self> {
        Self::on(context, "ext4", 64)
    }

    /// Makes a file in which nothing is allocated, on a file system of `kind` with that many MiB.
    fn on(context: &mut Context, kind: &str, mib: u32) -> Result<Self> {
        let device = context.null_blk(mib, &[("discard", "1"), ("cache_size", "4")])?;
        sh::run(&[&format!("mkfs.{kind}"), "-q", &device.path()])?;
        sh::run(&["mkdir", "-p", MOUNT])?;
        sh::run(&["mount", &device.path(), MOUNT])?;
        context.at_end("unmount", || {
            sh::shell(&format!("! mountpoint -q {MOUNT} || umount {MOUNT}")).map(drop)
        });
        let image = format!("{MOUNT}/a.img");
        sh::shell(&format!("truncate -s 16M {image}"))?;
        Ok(Self { device, image })
    }
}

fn attach(context: &mut Context, place: &MappableImage) -> Result<ServedDisk> {
    let disk = ServedDisk::attach(context.pv()?, &disk(&place.image, VDEV))?;
    context.check_driver(&disk.vbd)?;
    wait_given(&disk)?;
    Ok(disk)
}

/// Waits until the kernel has the device.
fn wait_given(disk: &ServedDisk) -> Result<()> {
    sh::wait_for("a device that the kernel may use", SOON, || {
        Ok(disk.info()?.backings == 1)
    })
}

/// Waits until the kernel has executed `count` more requests in passthrough.
fn wait_direct(disk: &ServedDisk, count: u64) -> Result<()> {
    let before = disk.info()?.direct;
    sh::wait_for("requests that the kernel executes", SOON, || {
        Ok(disk.info()?.direct >= before + count)
    })
    .with_context(|| format!("{:?}", disk.info()))
}

/// Ends the supervisor and the process of a disk; returns which that was.
fn leave_alone(context: &mut Context, disk: &ServedDisk) -> Result<u32> {
    context.take_supervisor()?.kill()?;
    let old = disk.kill()?;
    sh::wait_for("the end of the process", SOON, || {
        Ok(disk.info()?.state != STATE_LIVE)
    })?;
    Ok(old)
}

fn serves(context: &mut Context, place: Make) -> Result<()> {
    let place = place(context)?;
    let disk = attach(context, &place)?;
    let guest = context.pv()?;
    let verified = |after: &str| -> Result<()> {
        let before = disk.info()?.direct;
        guest.run_for(&verify_job(DEVICE, 16, 200, 512), FIO)?;
        let count = disk.info()?.direct - before;
        // Only a PV dom0 keeps pages of its guests mapped.
        let is_pv = std::fs::read_to_string("/sys/hypervisor/guest_type")?.trim() == "PV";
        let kept = disk.vbd.statistic("kept_pages")?;
        ensure!(
            (kept > 0) == is_pv,
            "{after} {kept} pages of the guest stay mapped"
        );
        // 200 writes, and as many reads at least.
        ensure!(
            count >= 350,
            "{after} the kernel has executed {count} requests of 400: {:?}",
            disk.info()
        );
        same(guest, &place.image, 16)
    };
    verified("at first")?;
    flushes_arrive(guest, &disk.vbd, &place.device)?;
    guest.run(&format!("blkdiscard -o 1M -l 1M {DEVICE}"))?;
    same(guest, &place.image, 4)?;
    verified("after a discard")?;
    // The next process says it again.
    disk.replace()?;
    verified("with another process")?;
    let shown = tap::ctl_json(&["list"])?;
    ensure!(
        shown.to_string().contains("\"direct\""),
        "tap-ctl list does not say that the kernel serves the disk: {shown}"
    );
    disk.detach(context.pv()?)
}

/// Returns the number of requests that the queues of a disk have executed without its lock.
fn in_express(disk: &ServedDisk) -> Result<u64> {
    let mapped = Control::open()?.mapped(disk.minor)?;
    Ok(mapped
        .context("the module counts nothing of the map")?
        .express)
}

/// Waits until the queues have executed more requests without the lock of their disk.
fn wait_express(disk: &ServedDisk) -> Result<()> {
    let before = in_express(disk)?;
    sh::wait_for("requests in express", FIO, || {
        Ok(in_express(disk)? >= before + 100)
    })
}

fn express(context: &mut Context) -> Result<()> {
    let place = MappableImage::device(context)?;
    let disk = attach(context, &place)?;
    let minor = disk.minor.to_string();
    // Discards would be for the process, so the load makes none.
    let load = start_load_with(context.pv()?, "")?;
    for _ in 0..3 {
        wait_express(&disk)?;
        let before = disk.info()?.committed;
        context
            .pv()?
            .run(&format!("blkdiscard -o 15M -l 1M {DEVICE}"))?;
        ensure!(
            disk.info()?.committed > before,
            "the process has not executed the discard: {:?}",
            disk.info()
        );
    }
    wait_express(&disk)?;
    tap::ctl(&["pause", "-m", &minor])?;
    let (paused, count) = (disk.info()?, in_express(&disk)?);
    has_let_go(&paused)?;
    sh::wait_for("requests that wait", SOON, || Ok(disk.info()?.waiting > 0))?;
    let later = in_express(&disk)?;
    ensure!(
        later == count,
        "{count} requests, then {later} were executed while the disk was paused"
    );
    tap::ctl(&["unpause", "-m", &minor])?;
    wait_express(&disk)?;
    disk.replace()?;
    wait_express(&disk)?;
    let guest = context.pv()?;
    let told = end_load(guest, load)?;
    same(guest, &place.image, 16)?;
    context.note(&format!(
        "{} requests in express; {told}",
        in_express(&disk)?
    ))?;
    disk.detach(context.pv()?)
}

fn failed_flush(context: &mut Context) -> Result<()> {
    const SECTORS: u64 = 32768;
    const FLUSH: &str = "dd if=/dev/zero of=/dev/xvdb count=0 conv=fsync,notrunc";
    let below = context.null_blk(16, &[("cache_size", "4")])?;
    let well = linear(&below.path(), SECTORS);
    let storage = Dm::create("vmtest-flush", &well)?;
    let theirs = storage.clone();
    context.at_end("remove the mapped device", move || theirs.remove());
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &disk(&storage.path(), VDEV))?;
    wait_given(&disk)?;
    sh::wait_for("a flush that the kernel executes", SOON, || {
        let before = disk.info()?.direct;
        guest.run(FLUSH)?;
        Ok(disk.info()?.direct > before)
    })?;
    ensure!(
        disk.info()?.failed_flushes == 0,
        "a flush failed: {:?}",
        disk.info()
    );
    let events = EventLog::follow()?;
    storage.replace(&unwritable(&below.path(), SECTORS)?)?;
    // Linux takes an error of a flush for one that is not supported, and says that all is well.
    guest.run(FLUSH)?;
    let info = disk.info()?;
    ensure!(
        info.failed_flushes == 1,
        "it was not the kernel's: {info:?}"
    );
    let told = events.wait_for("trouble", disk.minor, SOON)?;
    ensure!(
        told["trouble"]["what"] == "flush",
        "of something else: {told}"
    );
    storage.replace(&well)?;
    guest.run(FLUSH)?;
    disk.detach(context.pv()?)
}

/// For an image with tables, the process sends mappings of the ranges that requests touched.
fn serves_format(context: &mut Context, format: &Format) -> Result<()> {
    const DEATHS: u32 = 3;
    let path = make(context, &format!("a.{}", format.driver), format)?;
    let target = format!("direct=yes,{}:{path}", format.driver);
    let specification = tap::disk(&target, VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &specification)?;
    context.check_driver(&disk.vbd)?;
    wait_given(&disk)?;
    let guest = context.pv()?;
    let verified = || -> Result<u64> {
        let before = disk.info()?.direct;
        guest.run_for(&verify_job(DEVICE, 16, 200, 512), FIO)?;
        Ok(disk.info()?.direct - before)
    };
    // Now the image has all of the disk in clusters that lie anywhere, and the process has looked at all of it.
    guest.run(&format!(
        "fio --name=fill --filename={DEVICE} --direct=1 --rw=randwrite --bs=64k --size=16M --output=/dev/null && \
         dd if={DEVICE} of=/dev/null bs=64k iflag=direct"
    ))?;
    let full = verified()?;
    ensure!(
        full >= 350,
        "of a full disk the kernel has executed {full} requests of 400: {:?}",
        disk.info()
    );
    guest.run(&format!("blkdiscard -o 1M -l 4M {DEVICE}"))?;
    let discarded = verified()?;
    // The kernel drops the mapping of a discarded range, except for parts of clusters.
    let load = start_load_with(guest, "--discard --hints")?;
    for _ in 0..DEATHS {
        wait_direct(&disk, 30)?;
        disk.replace()?;
    }
    wait_direct(&disk, 30)?;
    let told = end_load(guest, load)?;
    let seen = of_guest(guest)?;
    context.note(&format!(
        "by the kernel: {full} of 400 of a full disk, {discarded} after a discard; {DEATHS} deaths, {told}"
    ))?;
    disk.detach(context.pv()?)?;
    judge(context, format, &path, &seen)
}

/// A clone of an image that is shorter than it.
fn clone(context: &mut Context) -> Result<()> {
    let below = full_image(context, "base.img", 8)?;
    sh::run(&["chmod", "a-w", &below])?;
    let path = over(context, "clone.qcow2", &below, "raw")?;
    sh::run(&["qemu-img", "resize", "-q", &path, "16M"])?;
    let sum = sh::shell(&format!(
        "{{ cat {below}; head -c 8M /dev/zero; }} | sha256sum"
    ))?;
    let expected = sum.split_whitespace().next().context("no checksum")?;
    let before = sh::run(&["sha256sum", &below])?;
    let specification = tap::disk(&format!("direct=yes,qcow2:{path}"), VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &specification)?;
    context.check_driver(&disk.vbd)?;
    sh::wait_for(
        "the image and the one below it with the kernel",
        SOON,
        || Ok(disk.info()?.backings == 0b11),
    )?;
    ensure!(
        of_guest(context.pv()?)? == expected,
        "the guest does not read what is below"
    );
    let mapped_first = mapped(&disk)?;
    ensure!(
        mapped_first["missed"]["unmapped"].as_u64() == Some(0),
        "the kernel was not told before the guest asked: {mapped_first}"
    );
    let old = leave_alone(context, &disk)?;
    let guest = context.pv()?;
    ensure!(
        of_guest(guest)? == expected,
        "without the process the guest does not read what is below"
    );
    ensure!(
        !is_free(&below)?,
        "somebody could write {below}, which the kernel reads"
    );
    context.supervise(true)?;
    disk.wait_replaced(old)?;
    let guest = context.pv()?;
    guest.run_for(&verify_job(DEVICE, 16, 200, 512), FIO)?;
    let load = start_load_with(guest, "--discard --hints")?;
    wait_progress(&disk, 30)?;
    disk.replace()?;
    wait_progress(&disk, 30)?;
    let told = end_load(guest, load)?;
    let seen = of_guest(guest)?;
    let mapped = mapped(&disk)?;
    context.note(&format!("{told}; {mapped}"))?;
    disk.detach(context.pv()?)?;
    judge(context, &QCOW2, &path, &seen)?;
    ensure!(
        sh::run(&["sha256sum", &below])? == before,
        "the image below was written"
    );
    Ok(())
}

fn many_places(context: &mut Context) -> Result<()> {
    let disk = attach_scattered(context)?;
    let guest = context.pv()?;
    guest.run_for(&scattered("--rw=randwrite"), FIO)?;
    guest.run_for(&scattered("--rw=read"), FIO)?;
    hits_all(context, &disk)?;
    let mapped = mapped(&disk)?;
    context.note(&format!("its map: {mapped}"))?;
    let room = mapped["room"].as_u64().context("no room is told")?;
    ensure!(room >= PLACES, "the map has grown to {room} extents only");
    // These are writes to clusters that the image did not have: the kernel may know that they are zeroes.
    let missed = |reason: &str| mapped["missed"][reason].as_u64().unwrap_or(0);
    let unmapped = missed("unmapped") + missed("read_only");
    ensure!(unmapped >= PLACES, "{unmapped} requests were not mapped");
    disk.detach(context.pv()?)
}

/// Clusters of the image that [`attach_scattered`] makes.
pub(super) const PLACES: u64 = 4096;

/// A job on all of such an image, a cluster at a time.
pub(super) fn scattered(what: &str) -> String {
    format!(
        "fio --name=many --filename={DEVICE} --size=16m --direct=1 --ioengine=libaio --iodepth=16 --bs=4k {what} \
         --output-format=terse"
    )
}

/// Attaches a disk whose clusters have 4 KiB and lie in the order of their first writes.
pub(super) fn attach_scattered(context: &mut Context) -> Result<ServedDisk> {
    let path = make(context, "a.qcow", &QCOW)?;
    let specification = tap::disk(&format!("direct=yes,qcow:{path}"), VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &specification)?;
    context.check_driver(&disk.vbd)?;
    wait_given(&disk)?;
    Ok(disk)
}

/// Returns the statistics of a disk's mappings.
pub(super) fn mapped(disk: &ServedDisk) -> Result<serde_json::Value> {
    let mut stats = tap::ctl_json(&["stats", "-m", &disk.minor.to_string()])?;
    Ok(stats["direct"]["mapped"].take())
}

/// Nearly all reads are the kernel's.
pub(super) fn hits_all(context: &mut Context, disk: &ServedDisk) -> Result<()> {
    let before = disk.info()?.direct;
    let job = scattered("--rw=randread --number_ios=1000");
    context.pv()?.run_for(&job, FIO)?;
    let hits = disk.info()?.direct - before;
    context.note(&format!("by the kernel: {hits} of 1000 reads"))?;
    ensure!(
        hits >= 950,
        "the kernel has executed {hits} of 1000 reads: {:?}",
        disk.info()
    );
    Ok(())
}

fn without_process(context: &mut Context, place: Make) -> Result<()> {
    let place = place(context)?;
    let disk = attach(context, &place)?;
    // A discard would be for the process, and the threads of the load wait for theirs.
    let load = start_load_with(context.pv()?, "")?;
    wait_direct(&disk, 50)?;
    let old = leave_alone(context, &disk)?;
    for _ in 0..4 {
        wait_direct(&disk, 200)?;
        let guest = context.pv()?;
        let flushes = place.device.flushes()?;
        guest.run(&format!(
            "dd if=/dev/zero of={DEVICE} bs=4k count=1 seek=4000 conv=fsync,notrunc"
        ))?;
        ensure!(
            place.device.flushes()? > flushes,
            "a flush was answered and has not reached the device"
        );
    }
    let info = disk.info()?;
    ensure!(
        info.state != STATE_LIVE,
        "there is a process, which nobody has started: {info:?}"
    );
    context.supervise(true)?;
    disk.wait_replaced(old)?;
    wait_direct(&disk, 200)?;
    let guest = context.pv()?;
    let told = end_load(guest, load)?;
    same(guest, &place.image, 16)?;
    context.note(&format!(
        "{} requests without the process; {told}",
        info.direct
    ))?;
    disk.detach(context.pv()?)
}

/// Checks that the kernel has nothing of a paused disk.
fn has_let_go(paused: &Info) -> Result<()> {
    ensure!(
        paused.backings == 0 && paused.executing == 0,
        "the kernel has not let go of a paused disk: {paused:?}"
    );
    Ok(())
}

fn pause(context: &mut Context, place: Make) -> Result<()> {
    let place = place(context)?;
    let disk = attach(context, &place)?;
    let minor = disk.minor.to_string();
    let load = start_load(context.pv()?)?;
    for _ in 0..3 {
        wait_progress(&disk, 50)?;
        wait_direct(&disk, 50)?;
        tap::ctl(&["pause", "-m", &minor])?;
        let paused = disk.info()?;
        has_let_go(&paused)?;
        sh::wait_for("requests that wait", SOON, || Ok(disk.info()?.waiting > 0))?;
        let later = disk.info()?;
        ensure!(
            (later.direct, later.committed) == (paused.direct, paused.committed),
            "requests were executed while the disk was paused: {paused:?}, then {later:?}"
        );
        tap::ctl(&["unpause", "-m", &minor])?;
    }
    wait_direct(&disk, 50)?;
    let guest = context.pv()?;
    let told = end_load(guest, load)?;
    same(guest, &place.image, 16)?;
    context.note(&told)?;
    disk.detach(context.pv()?)
}

/// Returns true if another program can lock the image as other programs do.
fn is_free(image: &str) -> Result<bool> {
    let file = File::options().read(true).write(true).open(image)?;
    match diskio::lock_whole(file.as_fd(), LockKind::Write) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn locked(context: &mut Context) -> Result<()> {
    let place = MappableImage::file(context)?;
    let disk = attach(context, &place)?;
    ensure!(!is_free(&place.image)?, "the image of a disk is not locked");
    let old = leave_alone(context, &disk)?;
    ensure!(
        !is_free(&place.image)?,
        "an image is not locked in which the kernel writes"
    );
    context.supervise(true)?;
    disk.wait_replaced(old)?;
    ensure!(
        !is_free(&place.image)?,
        "the next process has lost the lock"
    );
    disk.detach(context.pv()?)?;
    sh::wait_for("the end of the lock", SOON, || is_free(&place.image))
}

fn frozen(context: &mut Context) -> Result<()> {
    let place = MappableImage::file(context)?;
    let disk = attach(context, &place)?;
    let load = start_load(context.pv()?)?;
    wait_direct(&disk, 50)?;
    sh::run(&["fsfreeze", "--freeze", MOUNT])?;
    context.at_end("thaw", || {
        sh::shell(&format!("fsfreeze --unfreeze {MOUNT} 2>/dev/null || true")).map(drop)
    });
    // All threads of the load come to a write sooner or later.
    sh::wait_for("requests that wait for the file system", SOON, || {
        Ok(disk.info()?.executing > 0)
    })?;
    others_are_served(context, "the file system of an image is frozen")?;
    sh::run(&["fsfreeze", "--unfreeze", MOUNT])?;
    wait_direct(&disk, 200)?;
    let guest = context.pv()?;
    let told = end_load(guest, load)?;
    same(guest, &place.image, 16)?;
    context.note(&told)?;
    disk.detach(context.pv()?)
}

fn hung(context: &mut Context, pages: Pages) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let copies = || Parameter::set("feature_persistent", "N");
    let _copies = (pages == Pages::Copied).then(copies).transpose()?;
    let device = hangable(context)?;
    let guest = own_guest(2, vec![disk(&device.path(), "xvda")])?;
    let served = ServedDisk::of(AttachedVbd::of(guest.domid, "xvda")?)?;
    wait_given(&served)?;
    guest.start(&endless_load("/dev/xvda"))?;
    wait_load(&served.vbd)?;
    wait_direct(&served, 50)?;
    device.suspend()?;
    sh::wait_for("requests that hang in the kernel", SOON, || {
        Ok(served.info()?.executing > 0)
    })?;
    // They hang with and without a process.
    let pid = served.pid()?;
    sys::kill(pid, libc::SIGKILL).context("cannot kill tapdisk")?;
    others_are_served(context, "a device hangs below a tap disk")?;
    let guest = match pages {
        // This ends only when the hypervisor has released the domain: not while a page of it is mapped.
        Pages::Copied => {
            guest.destroy()?;
            None
        }
        Pages::Kept => {
            destroy_quickly(&guest)?;
            Some(guest)
        }
    };
    host_is_well(context, "its guest was destroyed")?;
    ensure!(
        served.info()?.executing > 0,
        "the kernel has forgotten requests that hang"
    );
    device.resume()?;
    guest.map_or(Ok(()), wait_vanished)?;
    served.vbd.wait_gone()?;
    served.wait_gone()
}
