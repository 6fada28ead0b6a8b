// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Data goes both ways, unchanged, for every kind of guest and disk.

use super::{skip, Case, Context, SharedGuest};
use crate::backing::{self, Lvm, NullBlk};
use crate::guest::{AttachedVbd, Guest};
use crate::hotplug;
use crate::{seed, sh, xs};
use anyhow::{ensure, Context as _, Result};
use dom0::kmsg::Kmsg;
use std::path::Path;
use std::time::Duration;

/// The limit for a fio job.
pub(crate) const FIO: Duration = Duration::from_secs(180);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv, Pvh};
    vec![
        Case::new(
            "phy.dom0.loopback",
            "a disk attached to dom0 itself",
            Nothing,
            loopback,
        )
        .nightly()
        .no_leaks(),
        Case::new(
            "phy.pv.fio_verify",
            "a PV guest writes mixed sizes and verifies them",
            Pv,
            |c| fio_verify(c, Pv),
        )
        .no_leaks(),
        Case::new(
            "phy.pvh.fio_verify",
            "a PVH guest writes mixed sizes and verifies them",
            Pvh,
            |c| fio_verify(c, Pvh),
        )
        .no_leaks(),
        Case::new(
            "phy.pv.disks_2",
            "two disks at once, each with its own data",
            Pv,
            |c| disks(c, 2),
        )
        .nightly(),
        Case::new(
            "phy.pv.disks_4",
            "four disks at once, each with its own data",
            Pv,
            |c| disks(c, 4),
        )
        .nightly()
        .no_leaks(),
        Case::new(
            "phy.pv.read_only",
            "a read-only disk reads and refuses to be written",
            Pv,
            read_only,
        ),
        Case::new(
            "phy.pv.sector_4096",
            "a disk with 4096-byte sectors",
            Pv,
            sector_4096,
        ),
        Case::new(
            "phy.pv.flush",
            "the guest's flushes reach the device",
            Pv,
            flush,
        ),
        Case::new(
            "phy.pv.flush_later",
            "flushes reach a device that gets its write cache while the guest is connected",
            Pv,
            flush_later,
        ),
        Case::new(
            "phy.pv.discard",
            "a discard reaches the device and nothing else is lost",
            Pv,
            discard,
        ),
        Case::new(
            "phy.pv.cdrom",
            "a CD-ROM is announced as one, and as read-only",
            Pv,
            cdrom,
        ),
        Case::new("phy.pv.file", "a raw file through a loop device", Pv, file).no_leaks(),
        Case::new(
            "phy.pv.statistics",
            "the statistics in sysfs count what was done",
            Pv,
            statistics,
        ),
        Case::new(
            "phy.pv.log",
            "the kernel's log says who connects, and what was done when they leave",
            Pv,
            log,
        ),
        Case::new(
            "phy.pv.resize",
            "the guest sees a volume grow, without a reattach",
            Pv,
            resize,
        ),
        Case::new(
            "phy.pv.resize_while_detached",
            "a volume grows while its disk is being taken away, which goes on",
            Pv,
            resize_while_detached,
        )
        .nightly(),
    ]
}

/// Returns a fio job of `writes` random writes of mixed sizes, up to indirect requests, in the first `mib` MiB; then it
/// verifies all of them.
pub(crate) fn verify_job(device: &str, mib: u32, writes: u32, sector: u32) -> String {
    let sizes = if sector == 512 {
        "512/10:4k/40:12k/20:64k/20:512k/5:1m/5"
    } else {
        "4k/50:12k/20:64k/20:512k/5:1m/5"
    };
    format!(
        "fio --name=verify --filename={device} --size={mib}m --number_ios={writes} --direct=1 --ioengine=libaio --iodepth=32 \
         --rw=randwrite --bssplit={sizes} --blockalign={sector} --verify=crc32c --verify_fatal=1 --do_verify=1 \
         --randrepeat=1 --randseed={} --serialize_overlap=1 --output-format=terse",
        seed::get()
    )
}

/// Compares the content that the guest reads from its disk with that of the device in dom0.
pub(crate) fn compare(guest: &Guest, vdev: &str, device: &str, mib: u32) -> Result<()> {
    let theirs = guest.run(&format!(
        "dd if=/dev/{vdev} bs=1M count={mib} iflag=direct 2>/dev/null | sha256sum"
    ))?;
    let ours = backing::sha256(device, mib)?;
    ensure!(
        theirs.starts_with(&ours),
        "dom0 reads {ours} from {device}, the guest reads {} from {vdev}",
        theirs.trim()
    );
    Ok(())
}

pub(super) fn fio_verify(context: &mut Context, needs: SharedGuest) -> Result<()> {
    let backing = context.null_blk(64, &[])?;
    let (guest, writes) = if needs == SharedGuest::Pvh {
        (context.pvh()?, 80)
    } else {
        (context.pv()?, 300)
    };
    let vbd = guest.attach(&format!("phy:{},xvda,w", backing.path()))?;
    context.check_driver(&vbd)?;
    let before = vbd.statistic("rd_sect")?;
    guest.run_for(&verify_job("/dev/xvda", 16, writes, 512), FIO)?;
    ensure!(
        vbd.statistic("rd_sect")? > before + 1024,
        "fio verified without reading its disk"
    );
    compare(guest, "xvda", &backing.path(), 16)?;
    guest.detach(&vbd)
}

fn disks(context: &mut Context, count: u8) -> Result<()> {
    let mut all = Vec::new();
    for index in 0..count {
        let device = context.null_blk(16, &[])?;
        let vdev = format!("xvd{}", char::from(b'a' + index));
        let vbd = context
            .pv()?
            .attach(&hotplug::disk(&device.path(), &vdev, "w")?)?;
        context.check_driver(&vbd)?;
        all.push((device, vbd));
    }
    let guest = context.pv()?;
    let mut jobs = Vec::new();
    for (index, (_, vbd)) in (1u64..).zip(&all) {
        let job = verify_job(&format!("/dev/{}", vbd.vdev), 3, 90, 512);
        jobs.push(guest.start(&format!("{job} --randseed={}", seed::get() + index))?);
    }
    for job in jobs {
        let done = guest.wait(job, FIO)?;
        ensure!(
            done.rc == 0,
            "fio failed with status {}: {}",
            done.rc,
            sh::tail(&done.text, 400)
        );
    }
    let mut sums = std::collections::HashSet::new();
    for (device, vbd) in &all {
        compare(guest, &vbd.vdev, &device.path(), 4)?;
        ensure!(
            sums.insert(backing::sha256(&device.path(), 4)?),
            "two disks hold the same data: one disk's writes reached another"
        );
        guest.detach(vbd)?;
    }
    Ok(())
}

fn loopback(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let device = context.null_blk(32, &[])?;
    let vbd = attach_own(context, &device.path(), "xvdz")?;
    context.check_driver(&vbd)?;
    sh::run_for(&["sh", "-c", &verify_job("/dev/xvdz", 12, 300, 512)], FIO)?;
    let (through, below) = (
        backing::sha256("/dev/xvdz", 16)?,
        backing::sha256(&device.path(), 16)?,
    );
    ensure!(
        through == below,
        "the disk reads {through}, the device below {below}"
    );
    detach_own(&vbd)
}

/// Attaches a disk to dom0 itself and waits for the disk.
pub(super) fn attach_own(context: &mut Context, device: &str, vdev: &str) -> Result<AttachedVbd> {
    let disk = hotplug::disk(device, vdev, "w")?;
    sh::run(&["xl", "block-attach", "0", &disk])?;
    let vbd = AttachedVbd::of(0, &disk)?;
    let node = format!("/dev/{vdev}");
    sh::wait_for(
        &format!("the appearance of {node}"),
        Duration::from_secs(30),
        || Ok(Path::new(&node).exists()),
    )?;
    context.check_driver(&vbd)?;
    Ok(vbd)
}

/// Detaches a disk of dom0. Udev may have opened it for a moment, which makes xl fail.
pub(super) fn detach_own(vbd: &AttachedVbd) -> Result<()> {
    dom0::udev::settle()?;
    sh::run(&["xl", "block-detach", "0", &vbd.vdev])?;
    vbd.wait_gone()
}

fn read_only(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    sh::shell(&format!(
        "dd if=/dev/urandom of={} bs=1M count=4 oflag=direct status=none",
        device.path()
    ))?;
    let before = backing::sha256(&device.path(), 4)?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "r")?)?;
    ensure!(
        xs::must_read(&format!("{}/mode", vbd.backend))? == "r",
        "the backend's mode is not `r`"
    );
    ensure!(
        xs::number(&format!("{}/info", vbd.backend))? & 4 != 0,
        "`info` does not say that the disk is read-only"
    );
    ensure!(
        guest.run("cat /sys/block/xvda/ro")?.trim() == "1",
        "the guest does not see that the disk is read-only"
    );
    let write = guest.status("dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct")?;
    ensure!(write.rc != 0, "the guest could write to a read-only disk");
    compare(guest, "xvda", &device.path(), 4)?;
    ensure!(
        backing::sha256(&device.path(), 4)? == before,
        "the device changed below a read-only disk"
    );
    guest.detach(&vbd)
}

fn sector_4096(context: &mut Context) -> Result<()> {
    let device = context.null_blk(32, &[("blocksize", "4096")])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    ensure!(
        xs::number(&format!("{}/sector-size", vbd.backend))? == 4096,
        "`sector-size` is not 4096"
    );
    ensure!(
        xs::number(&format!("{}/sectors", vbd.backend))? == 65536,
        "`sectors` does not count in units of 512 bytes"
    );
    let seen = guest.run("cat /sys/block/xvda/queue/logical_block_size /sys/block/xvda/size")?;
    ensure!(
        seen.split_whitespace().eq(["4096", "65536"]),
        "the guest sees block size and size `{}`",
        seen.trim()
    );
    guest.run_for(&verify_job("/dev/xvda", 6, 180, 4096), FIO)?;
    compare(guest, "xvda", &device.path(), 8)?;
    guest.detach(&vbd)
}

pub(super) fn flush(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[("cache_size", "4")])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    ensure!(
        xs::number(&format!("{}/feature-flush-cache", vbd.backend))? == 1,
        "no flush is offered for a device with a write cache"
    );
    flushes_arrive(guest, &vbd, &device)?;
    compare(guest, "xvda", &device.path(), 1)?;
    guest.detach(&vbd)
}

fn flush_later(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[("cache_size", "4")])?;
    let cache = format!("/sys/block/{}/queue/write_cache", device.name());
    sh::put(&cache, "write through")?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    ensure!(
        xs::number(&format!("{}/feature-flush-cache", vbd.backend))? == 1,
        "no flush is offered for a device that has no write cache yet"
    );
    sh::put(&cache, "write back")?;
    ensure!(
        sh::get(&cache)? == "write back",
        "null_blk does not turn its write cache on"
    );
    flushes_arrive(guest, &vbd, &device)?;
    compare(guest, "xvda", &device.path(), 1)?;
    guest.detach(&vbd)
}

/// The guest flushes, and the device and the statistics count it.
pub(super) fn flushes_arrive(guest: &Guest, vbd: &AttachedVbd, device: &NullBlk) -> Result<()> {
    const FLUSHES: u64 = 12;
    let (device_before, disk_before) = (device.flushes()?, vbd.statistic("f_req")?);
    guest.run(&format!(
        "fio --name=f --filename=/dev/{} --size=256k --bs=4k --direct=1 --rw=write --fsync=1 --number_ios={} --output-format=terse",
        vbd.vdev,
        // No flush follows the last write.
        FLUSHES + 1
    ))?;
    let (reached, counted) = (
        device.flushes()? - device_before,
        vbd.statistic("f_req")? - disk_before,
    );
    ensure!(
        reached >= FLUSHES,
        "the guest flushed {FLUSHES} times, {reached} flushes reached the device"
    );
    ensure!(
        counted >= FLUSHES,
        "the guest flushed {FLUSHES} times, statistics/f_req counted {counted}"
    );
    Ok(())
}

fn discard(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[("discard", "1")])?;
    if sh::get(format!(
        "/sys/block/{}/queue/discard_max_bytes",
        device.name()
    ))? == "0"
    {
        return skip("this kernel's null_blk has no discard");
    }
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    ensure!(
        xs::number(&format!("{}/feature-discard", vbd.backend))? == 1,
        "no discard is offered for a device that can"
    );
    guest.run("fio --name=x --filename=/dev/xvda --rw=write --bs=1m --size=4m --direct=1 --buffer_pattern=0x78 --output-format=terse")?;
    let before = vbd.statistic("ds_req")?;
    guest.run("blkdiscard -o 1048576 -l 2097152 /dev/xvda")?;
    ensure!(
        vbd.statistic("ds_req")? > before,
        "statistics/ds_req did not count the discard"
    );
    let count = |offset: u32, length: u32| -> Result<u64> {
        let line = format!("dd if={} bs=1M skip={offset} count={length} iflag=direct status=none | tr -d 'x' | wc -c", device.path());
        sh::shell(&line)?
            .trim()
            .parse()
            .context("wc printed no number")
    };
    ensure!(
        count(0, 1)? == 0 && count(3, 1)? == 0,
        "data beside the discarded range was lost"
    );
    ensure!(
        count(1, 2)? == 2 << 20,
        "the discarded range still holds data on a device that frees it"
    );
    guest.detach(&vbd)
}

fn cdrom(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let guest = context.pv()?;
    let disk = format!(
        "format=raw, vdev=xvdd, access=ro, devtype=cdrom, target={}",
        device.path()
    );
    let vbd = guest.attach(&disk)?;
    context.check_driver(&vbd)?;
    let info = xs::number(&format!("{}/info", vbd.backend))?;
    ensure!(
        info & 1 != 0,
        "`info` is {info}: the bit for a CD-ROM is missing"
    );
    ensure!(
        info & 4 != 0,
        "`info` is {info}: the bit for read-only is missing"
    );
    compare(guest, "xvdd", &device.path(), 1)?;
    guest.detach(&vbd)
}

fn file(context: &mut Context) -> Result<()> {
    const IMAGE: &str = "/tmp/vmtest.img";
    sh::modprobe("loop", &[])?;
    sh::run(&["truncate", "-s", "16M", IMAGE])?;
    context.at_end("remove the image", || Ok(std::fs::remove_file(IMAGE)?));
    let guest = context.pv()?;
    let vbd = guest.attach(&format!("file:{IMAGE},xvda,w"))?;
    context.check_driver(&vbd)?;
    guest.run_for(&verify_job("/dev/xvda", 3, 90, 512), FIO)?;
    let theirs = guest.run("dd if=/dev/xvda bs=1M count=4 iflag=direct 2>/dev/null | sha256sum")?;
    guest.detach(&vbd)?;
    let ours = sh::shell(&format!("head -c 4M {IMAGE} | sha256sum"))?;
    ensure!(
        theirs.split_whitespace().next() == ours.split_whitespace().next(),
        "the file holds other data than the guest read"
    );
    Ok(())
}

fn statistics(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let numbers = sh::get(format!("/sys/block/{}/dev", device.name()))?;
    let hex = numbers
        .split(':')
        .map(|n| n.parse().map(|n: u32| format!("{n:x}")))
        .collect::<Result<Vec<_>, _>>()?
        .join(":");
    ensure!(
        sh::get(vbd.sysfs().join("physical_device"))? == hex,
        "physical_device in sysfs is not {hex}"
    );
    ensure!(
        sh::get(vbd.sysfs().join("mode"))? == "w",
        "mode in sysfs is not `w`"
    );
    let names = ["rd_req", "wr_req", "rd_sect", "wr_sect", "oo_req"];
    let read = || {
        names
            .iter()
            .map(|name| vbd.statistic(name))
            .collect::<Result<Vec<u64>>>()
    };
    // The first open waits for the end of the guest's search for partitions.
    guest.run("dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct")?;
    let before = read()?;
    guest.run("dd if=/dev/zero of=/dev/xvda bs=4k count=8 oflag=direct && dd if=/dev/xvda of=/dev/null bs=8k count=16 iflag=direct")?;
    let after = read()?;
    let grown: Vec<u64> = after
        .iter()
        .zip(&before)
        .map(|(after, before)| after.wrapping_sub(*before))
        .collect();
    ensure!(
        grown[..4] == [16, 8, 256, 64],
        "{names:?} grew by {grown:?} for 16 reads of 8 KiB and 8 writes of 4 KiB"
    );
    guest.detach(&vbd)
}

/// Checks the messages about a disk: the guest, its features, and the clean-up at its end.
fn log(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    let guest = context.pv()?;
    // All guests share a few lines a second, which others may have used up.
    let mut seen = Vec::new();
    for _ in 0..5 {
        let mut kmsg = Kmsg::from_now()?;
        let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
        let name = vbd.sysfs();
        let name = name.file_name().context("a device has a name")?;
        let name = name.to_string_lossy().into_owned();
        guest.run("dd if=/dev/zero of=/dev/xvda bs=4k count=8 oflag=direct")?;
        guest.detach(&vbd)?;
        let messages = kmsg.take()?;
        let line = |words: &[&str]| {
            let has = |line: &&String| words.iter().all(|word| line.contains(word));
            messages.iter().any(|line| has(&line))
        };
        if line(&[&name, "connected: queues ", "x86_64-abi"])
            && line(&[&name, "disconnected: reads ", "writes 8 of 64 sectors"])
        {
            return Ok(());
        }
        seen.extend(messages);
    }
    anyhow::bail!("the log says neither who connects nor what was done: {seen:#?}")
}

/// A volume that can grow, and the disk of the guest on it.
fn growing(context: &mut Context) -> Result<(Lvm, AttachedVbd)> {
    let device = context.null_blk(64, &[])?;
    let volume = Lvm::create("vmtestvg", &device.path(), 16)?;
    let theirs = volume.clone();
    context.at_end("remove the volume", move || theirs.remove());
    let vbd = context
        .pv()?
        .attach(&format!("phy:{},xvda,w", volume.path()))?;
    Ok((volume, vbd))
}

fn resize(context: &mut Context) -> Result<()> {
    let (volume, vbd) = growing(context)?;
    let guest = context.pv()?;
    guest.run("dd if=/dev/zero of=/dev/xvda bs=4k count=1 oflag=direct")?;
    volume.extend(32)?;
    check_grown(guest, "xvda", &volume)?;
    guest.detach(&vbd)
}

/// The toolstack has begun to take the disk away, and the guest has not answered.
fn resize_while_detached(context: &mut Context) -> Result<()> {
    let (volume, vbd) = growing(context)?;
    let guest = context.pv()?;
    let (id, back) = (guest.domid.to_string(), vbd.backend.clone());
    let (state, online) = (format!("{back}/state"), format!("{back}/online"));
    sh::run(&["xl", "pause", &id])?;
    let seen = (|| {
        xs::write(&[(&online, "0"), (&state, "5")])?;
        volume.extend(32)?;
        xs::wait_value(&format!("{back}/sectors"), "65536", Duration::from_secs(30))?;
        xs::must_read(&state)
    })();
    sh::run(&["xl", "unpause", &id])?;
    let seen = seen?;
    ensure!(
        seen == "5",
        "a new size has put state {seen} in place of the toolstack's Closing"
    );
    guest.detach(&vbd)
}

/// Waits until the guest sees that `volume`, its disk `vdev`, has 32 MiB now, and writes the last
/// sector.
pub(super) fn check_grown(guest: &Guest, vdev: &str, volume: &Lvm) -> Result<()> {
    wait_size(guest, vdev, 65536)?;
    guest.run(&format!(
        "echo beyond | dd of=/dev/{vdev} bs=512 seek=65535 conv=sync oflag=direct"
    ))?;
    let last = sh::shell(&format!(
        "dd if={} bs=512 skip=65535 count=1 iflag=direct status=none | head -c 6",
        volume.path()
    ))?;
    ensure!(
        last == "beyond",
        "a write into the new part did not reach the volume"
    );
    Ok(())
}

/// Waits until the guest knows that its disk has `sectors` sectors of 512 bytes.
pub(super) fn wait_size(guest: &Guest, vdev: &str, sectors: u64) -> Result<()> {
    let limit = Duration::from_secs(20);
    sh::wait_for("the guest's notice of the new size", limit, || {
        let seen = guest.run(&format!("cat /sys/block/{vdev}/size"))?;
        Ok(seen.trim() == sectors.to_string())
    })
}
