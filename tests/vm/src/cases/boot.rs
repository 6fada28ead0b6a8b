// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Guests that boot from a tap disk: through pygrub, which reads the disk in dom0, and through the BIOS of
//! an HVM guest, whose QEMU reads it from the tapdisk's NBD socket until the guest has its own driver.

use super::basic::{compare, verify_job, FIO};
use super::formats::{check, over, qemu_img, Format, QCOW2, VHD};
use super::tap::{image, stand_in, wait_progress};
use super::{Case, Context, SharedGuest};
use crate::boot::{self, DATA_MIB, MARK};
use crate::guest::{serial_path, AttachedVbd, Boot, Config, Guest, GuestKind};
use crate::tap::{self, ServedDisk};
use crate::{backing, hotplug, sh, sys, xs};
use anyhow::{bail, ensure, Context as _, Result};
use std::time::Duration;

/// The guest.
const NAME: &str = "boots";
const VDEV: &str = "xvda";
/// The partition for data.
const DATA: &str = "/dev/xvda1";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, SharedGuest::Nothing, run)
            .supervised()
            .no_leaks()
    };
    vec![
        case(
            "boot.pygrub",
            "a PV guest with the kernel of its tap disk, which pygrub reads in dom0",
            pygrub,
        )
        .nightly(),
        case(
            "boot.pygrub_drop_in",
            "the same with tap:aio: and the script that stands in for Xen's",
            pygrub_drop_in,
        )
        .nightly(),
        case(
            "boot.pygrub_qcow2",
            "a PV guest with the kernel of its qcow2 disk, over an image that it shares with others",
            pygrub_qcow2,
        )
        .nightly(),
        case(
            "boot.pygrub_vhd",
            "a PV guest with the kernel of its VHD",
            |context| boots_from(context, GuestKind::Pv, &VHD),
        )
        .nightly(),
        case(
            "boot.hvm_qcow2",
            "an HVM guest boots from a qcow2 image",
            |context| boots_from(context, GuestKind::Hvm, &QCOW2),
        )
        .nightly(),
        case(
            "boot.hvm_vhd",
            "an HVM guest boots from a VHD",
            |context| boots_from(context, GuestKind::Hvm, &VHD),
        )
        .nightly(),
        case(
            "boot.hvm",
            "an HVM guest boots from a tap disk, has a phy disk too; two tapdisks die, one under the BIOS",
            hvm,
        )
        .nightly(),
        case(
            "boot.hvm_drop_in",
            "an HVM guest boots from a file through the script that stands in for Xen's",
            hvm_drop_in,
        )
        .nightly(),
        case(
            "boot.hvm_backendtype",
            "an HVM guest boots from a disk of backendtype=tap",
            hvm_backendtype,
        )
        .nightly(),
    ]
}

/// An image to boot from.
fn bootable(context: &mut Context) -> Result<String> {
    let image = image(context, "boot.img", boot::MIB)?;
    boot::fill(&image)?;
    Ok(image)
}

/// Creates a guest that boots from its first disk.
fn create(kind: GuestKind, disks: Vec<String>) -> Result<Guest> {
    let config = Config {
        boot: Boot::Disk,
        disks,
        ..Config::new(NAME, kind, 1)
    };
    Guest::create(config).with_context(|| {
        let xl = sh::get("/var/log/xen/xl-boots.log").unwrap_or_default();
        let serial = sh::get(serial_path(NAME)).unwrap_or_default();
        let supervisor = tap::log_tail().unwrap_or_default();
        format!(
            "xl says: {}; the guest said: {}; blktapctrl says: {supervisor}",
            sh::tail(&xl, 300),
            sh::tail(&serial, 900)
        )
    })
}

/// Boots a guest from its first disk, and runs `meanwhile` beside that.
fn booted(
    context: &mut Context,
    kind: GuestKind,
    disks: Vec<String>,
    meanwhile: fn() -> Result<()>,
) -> Result<(Guest, ServedDisk)> {
    let beside = std::thread::spawn(meanwhile);
    let created = create(kind, disks);
    // Whether the guest has booted or not, no action that began here may continue in the next case.
    let done = beside.join();
    let guest = created?;
    done.unwrap_or_else(|_| bail!("what was done beside the boot has died"))?;
    let words = guest.run("cat /proc/cmdline")?;
    ensure!(
        words.contains(MARK),
        "the kernel of the guest is not that of its disk: it was started with `{}`",
        words.trim()
    );
    let disk = ServedDisk::of(AttachedVbd::of(guest.domid, VDEV)?)?;
    context.check_driver(&disk.vbd)?;
    Ok((guest, disk))
}

/// The guest uses the disk that it booted from, and is destroyed; nothing may stay behind.
fn use_and_destroy(guest: Guest, disk: &ServedDisk, image: &str) -> Result<()> {
    guest.run_for(&verify_job(DATA, DATA_MIB, 60, 512), FIO)?;
    compare(&guest, VDEV, image, 1 + DATA_MIB)?;
    disk.goes_with(guest)
}

fn pygrub(context: &mut Context) -> Result<()> {
    let image = bootable(context)?;
    sh::modprobe("xen-blkfront", &[])?;
    let specification = tap::disk(&format!("aio:{image}"), VDEV, "w");
    let (guest, disk) = booted(context, GuestKind::Pv, vec![specification], || Ok(()))?;
    // dom0 had the disk while pygrub read it, and has it no more.
    ensure!(
        xs::list("/local/domain/0/device/vbd")?.is_empty(),
        "dom0 still has the disk that pygrub read"
    );
    use_and_destroy(guest, &disk, &image)
}

/// The system is in an image of a format; QEMU must find the guest's writes in it afterwards.
fn boots_from(context: &mut Context, kind: GuestKind, format: &Format) -> Result<()> {
    let raw = bootable(context)?;
    let path = image(context, &format!("boot.{}", format.driver), 1)?;
    let convert = [
        &["convert", "-f", "raw", "-O", format.qemu],
        format.options,
        &[&raw, &path],
    ];
    qemu_img(&convert.concat())?;
    sh::modprobe("xen-blkfront", &[])?;
    let target = format!("{}:{path}", format.driver);
    boots(context, kind, &target)?;
    check(format.qemu, &path)?;
    let before = backing::sha256(&raw, 1 + DATA_MIB)?;
    qemu_img(&["convert", "-f", format.qemu, "-O", "raw", &path, &raw])?;
    ensure!(
        backing::sha256(&raw, 1 + DATA_MIB)? != before,
        "nothing in the image is of the guest"
    );
    Ok(())
}

/// A guest boots from a disk, and works on it.
fn boots(context: &mut Context, kind: GuestKind, target: &str) -> Result<()> {
    let disks = vec![tap::disk(target, VDEV, "w")];
    let (guest, disk) = booted(context, kind, disks, || Ok(()))?;
    guest.run_for(&verify_job(DATA, DATA_MIB, 60, 512), FIO)?;
    disk.goes_with(guest)
}

fn pygrub_qcow2(context: &mut Context) -> Result<()> {
    let golden = bootable(context)?;
    sh::run(&["chmod", "a-w", &golden])?;
    let before = backing::sha256(&golden, boot::MIB)?;
    let path = over(context, "boot.qcow2", &golden, "raw")?;
    sh::modprobe("xen-blkfront", &[])?;
    boots(context, GuestKind::Pv, &format!("qcow2:{path}"))?;
    check("qcow2", &path)?;
    ensure!(
        backing::sha256(&golden, boot::MIB)? == before,
        "the guest has written to the image below"
    );
    Ok(())
}

fn pygrub_drop_in(context: &mut Context) -> Result<()> {
    let image = bootable(context)?;
    sh::modprobe("xen-blkfront", &[])?;
    stand_in(context)?;
    let specification = format!("tap:aio:{image},{VDEV},w");
    let (guest, disk) = booted(context, GuestKind::Pv, vec![specification], || Ok(()))?;
    use_and_destroy(guest, &disk, &image)
}

/// Returns the number of QEMU's requests to the process of a tap disk.
fn asked_by_qemu(minor: u64) -> Result<u64> {
    let stats = tap::ctl_json(&["stats", "-m", &minor.to_string()])?;
    let asked = stats["nbd"].as_u64();
    asked.with_context(|| format!("tap-ctl stats has no number of NBD requests: {stats}"))
}

/// Kills the process of the only tap disk as soon as QEMU has read from it for a while.
fn kill_while_qemu_reads() -> Result<()> {
    let mut first = None;
    sh::wait_for("the tap disk of the guest", Duration::from_secs(60), || {
        let disk = &tap::ctl_json(&["list"])?["disks"][0];
        first = disk["minor"].as_u64().zip(disk["pid"].as_u64());
        Ok(first.is_some())
    })?;
    let (minor, pid) = first.context("there is no tap disk")?;
    sh::wait_for("the reads of QEMU", Duration::from_secs(60), || {
        Ok(asked_by_qemu(minor)? >= 100)
    })?;
    sys::kill(u32::try_from(pid)?, libc::SIGKILL).context("cannot kill the tapdisk")
}

fn hvm(context: &mut Context) -> Result<()> {
    let image = bootable(context)?;
    let device = context.null_blk(16, &[])?;
    let disks = vec![
        tap::disk(&format!("aio:{image}"), VDEV, "w"),
        hotplug::disk(&device.path(), "xvdb", "w")?,
    ];
    let (guest, disk) = booted(context, GuestKind::Hvm, disks, kill_while_qemu_reads)?;
    let asked = asked_by_qemu(disk.minor.into())?;
    ensure!(
        asked > 0,
        "QEMU did not go on with the next tapdisk after the first one had died"
    );
    let phy = AttachedVbd::of(guest.domid, "xvdb")?;
    context.check_driver(&phy)?;
    guest.run_for(&verify_job("/dev/xvdb", 4, 40, 512), FIO)?;
    compare(&guest, "xvdb", &device.path(), 4)?;
    let load = guest.start(&verify_job(DATA, DATA_MIB, 300, 512))?;
    wait_progress(&disk, 50)?;
    let pause = disk.replace()?;
    let done = guest.wait(load, FIO)?;
    done.succeeded("the guest saw the death of its tapdisk")?;
    context.note(&format!(
        "QEMU asked the second tapdisk {asked} times until the guest had its own driver; its death took {} ms",
        pause.as_millis()
    ))?;
    use_and_destroy(guest, &disk, &image)
}

fn hvm_drop_in(context: &mut Context) -> Result<()> {
    let image = bootable(context)?;
    stand_in(context)?;
    // libxl then gives the image to QEMU; the tapdisk has it open already, and refuses.
    let beside = format!("tap:aio:{image},{VDEV},w");
    ensure!(
        booted(context, GuestKind::Hvm, vec![beside], || Ok(())).is_err(),
        "QEMU opened an image beside the tapdisk that serves it"
    );
    let log = sh::get("/var/log/xen/qemu-dm-boots.log")?;
    ensure!(
        log.contains("Failed to lock"),
        "QEMU was refused for another reason: {log}"
    );
    let specification = format!("format=raw, script=block, vdev={VDEV}, access=w, target={image}");
    let (guest, disk) = booted(context, GuestKind::Hvm, vec![specification], || Ok(()))?;
    use_and_destroy(guest, &disk, &image)
}

fn hvm_backendtype(context: &mut Context) -> Result<()> {
    let image = bootable(context)?;
    let specification = format!(
        "backendtype=tap, script=block-tap-rs, format=raw, vdev={VDEV}, access=w, target={image}"
    );
    let (guest, disk) = booted(context, GuestKind::Hvm, vec![specification], || Ok(()))?;
    use_and_destroy(guest, &disk, &image)
}
