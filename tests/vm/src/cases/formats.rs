// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks whose images have tables: served under load while their processes die, and checked with QEMU's tools
//! afterwards.

use super::basic::{verify_job, wait_size, FIO};
use super::images::{fill, mount_memory, refused, FULL};
use super::tap::{end_load, image, start_load_with, wait_progress, DEVICE, VDEV};
use super::{Case, Context, SharedGuest};
use crate::guest::Guest;
use crate::tap::{self, ServedDisk};
use crate::{backing, sh};
use anyhow::{ensure, Context as _, Result};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// MiB of a disk.
pub(super) const SIZE: u32 = 16;
/// Number of deaths of a process.
const DEATHS: u32 = 20;
/// Images in a long chain, with the raw one at its end.
const CHAIN: u32 = 30;
/// Time limit for QEMU's tools.
pub(super) const TOOL: Duration = Duration::from_secs(60);

/// A format: the name of our driver, QEMU's name, and how an image is made.
pub(super) struct Format {
    pub(super) driver: &'static str,
    pub(super) qemu: &'static str,
    pub(super) options: &'static [&'static str],
}

pub(super) const QCOW2: Format = Format {
    driver: "qcow2",
    qemu: "qcow2",
    options: &[],
};
pub(super) const QCOW: Format = Format {
    driver: "qcow",
    qemu: "qcow",
    options: &[],
};
pub(super) const VHD: Format = Format {
    driver: "vhd",
    qemu: "vpc",
    options: &["-o", "force_size=on"],
};
/// The disk as it is, and a footer.
pub(super) const VHD_FIXED: Format = Format {
    driver: "vhd",
    qemu: "vpc",
    options: &["-o", "force_size=on,subformat=fixed"],
};
pub(super) const VMDK: Format = Format {
    driver: "vmdk",
    qemu: "vmdk",
    options: &[],
};
/// A descriptor, and a file with the content beside it.
const VMDK_FLAT: Format = Format {
    driver: "vmdk",
    qemu: "vmdk",
    options: &["-o", "subformat=monolithicFlat"],
};

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, SharedGuest::Pv, run)
            .supervised()
            .no_leaks()
    };
    vec![
        case(
            "formats.qcow2",
            "a qcow2 image under verified load while its process dies: its content and its tables are right",
            |context| endures(context, &QCOW2),
        ).nightly(),
        case("formats.qcow", "the same for qcow", |context| {
            endures(context, &QCOW)
        })
        .nightly(),
        case("formats.vhd", "the same for VHD", |context| {
            endures(context, &VHD)
        })
        .nightly(),
        case("formats.vmdk", "the same for VMDK", |context| {
            endures(context, &VMDK)
        })
        .nightly(),
        case(
            "formats.vhdx",
            "a VHDX is read and not written, and a guest writes over it",
            vhdx,
        )
        .nightly(),
        case(
            "formats.extents",
            "the same for a VMDK whose content is in a file of its own",
            |context| endures(context, &VMDK_FLAT),
        )
        .nightly(),
        case(
            "formats.chain",
            "qcow2 over qcow2 over a raw image: what is below is read and not written, and must be named or read-only",
            chain,
        )
        .nightly(),
        case(
            "formats.chain_of_30",
            "29 qcow2 images over a raw one, each of which has something of its own",
            long_chain,
        )
        .nightly(),
        case(
            "formats.snapshot",
            "a disk that is paused goes on in a qcow2 image that QEMU made over its own, without the guest seeing it",
            snapshot,
        )
        .nightly(),
        case(
            "formats.grown",
            "a qcow2 image is made larger below a load, and its guest writes behind the old end",
            grown,
        ).nightly(),
        case(
            "formats.full_storage",
            "a qcow2 image on storage that is full pauses the disk, and goes on when there is room",
            full_storage,
        )
        .nightly(),
        case(
            "formats.shared",
            "an image with tables is not written by two: w! is refused, with the remedy",
            shared,
        ).nightly(),
    ]
}

/// Runs qemu-img in dom0.
pub(super) fn qemu_img(args: &[&str]) -> Result<String> {
    let line = [&["qemu-img"], args].concat();
    sh::run_for(&line, TOOL)
}

/// A file that is gone after the case.
fn place(context: &mut Context, name: &str) -> Result<String> {
    // Makes the folder, and takes the file away afterwards.
    image(context, name, 1)
}

/// An image of a format.
pub(super) fn make(context: &mut Context, name: &str, format: &Format) -> Result<String> {
    let path = place(context, name)?;
    let flat = path.replace(".vmdk", "-flat.vmdk");
    if format.options.contains(&"subformat=monolithicFlat") {
        let theirs = flat.clone();
        context.at_end(format!("remove {flat}"), move || {
            Ok(fs::remove_file(theirs)?)
        });
    }
    let size = format!("{SIZE}M");
    let args = [
        &["create", "-q", "-f", format.qemu],
        format.options,
        &[&path, &size],
    ];
    qemu_img(&args.concat())?;
    Ok(path)
}

/// An image of qcow2 over another one.
pub(super) fn over(context: &mut Context, name: &str, below: &str, format: &str) -> Result<String> {
    let path = place(context, name)?;
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", below, "-F", format, &path,
    ])?;
    Ok(path)
}

/// A qcow2 image, and the disk that is served from it.
pub(super) fn qcow2_disk(context: &mut Context) -> Result<(String, String)> {
    let path = make(context, "a.qcow2", &QCOW2)?;
    let specification = tap::disk(&format!("qcow2:{path}"), VDEV, "w");
    Ok((path, specification))
}

/// Judges an image that is not served any more: it holds the content that the guest has read, and its tables are right.
pub(super) fn judge(context: &mut Context, format: &Format, path: &str, seen: &str) -> Result<()> {
    check(format.qemu, path)?;
    let found = of_image(context, format.qemu, path)?;
    ensure!(
        seen == found,
        "the guest read {seen}, QEMU reads {found} from {path}"
    );
    Ok(())
}

/// Returns the checksum of the content that the guest reads from its disk.
pub(super) fn of_guest(guest: &Guest) -> Result<String> {
    sum_of(guest, DEVICE)
}

/// Returns the checksum of another disk of that size.
pub(super) fn sum_of(guest: &Guest, device: &str) -> Result<String> {
    let text = guest.run(&format!(
        "dd if={device} bs=1M count={SIZE} iflag=direct 2>/dev/null | sha256sum"
    ))?;
    let sum = text.split_whitespace().next();
    Ok(sum.context("no checksum from the guest")?.to_owned())
}

/// Returns the checksum of the content that QEMU reads from an image that is not served.
fn of_image(context: &mut Context, format: &str, path: &str) -> Result<String> {
    let copy = place(context, "content.raw")?;
    read_by_qemu(&copy, format, path)
}

fn read_by_qemu(copy: &str, format: &str, path: &str) -> Result<String> {
    qemu_img(&["convert", "-f", format, "-O", "raw", path, copy])?;
    backing::sha256(copy, SIZE)
}

/// QEMU finds no wrong entry in the tables of an image. Space may be lost that a process had prepared
/// when it was killed.
pub(super) fn check(format: &str, path: &str) -> Result<()> {
    if matches!(format, "vpc" | "qcow") {
        // QEMU has no check for these.
        return Ok(());
    }
    check_tables(&["-f", format, path])
}

/// Checks the tables of an image, given in the words of QEMU's tools.
pub(super) fn check_tables(image: &[&str]) -> Result<()> {
    let checked = sh::status(&[&["qemu-img", "check"], image].concat(), TOOL)?;
    ensure!(
        checked.rc == 0 || checked.rc == 3,
        "the tables of {} are wrong: {}",
        image.join(" "),
        sh::tail(&checked.text, 600)
    );
    Ok(())
}

/// A guest works on a disk while its process is killed again and again.
pub(super) fn load_and_deaths(context: &mut Context, disk: &ServedDisk) -> Result<()> {
    let guest = context.pv()?;
    let load = start_load_with(guest, "")?;
    for _ in 0..DEATHS {
        wait_progress(disk, 30)?;
        disk.replace()?;
    }
    wait_progress(disk, 30)?;
    let told = end_load(guest, load)?;
    let info = disk.info()?;
    ensure!(
        info.replayed > 0,
        "in {DEATHS} deaths no request was executed again"
    );
    context.note(&format!(
        "{DEATHS} deaths, {} requests executed again; {told}",
        info.replayed
    ))
}

fn vhdx(context: &mut Context) -> Result<()> {
    let (root, path) = (base(context)?, place(context, "a.vhdx")?);
    qemu_img(&["convert", "-f", "raw", "-O", "vhdx", &root, &path])?;
    let expected = backing::sha256(&root, SIZE)?;
    let sums = || sh::run(&["sha256sum", &path]);
    let before = sums()?;
    let target = format!("vhdx:{path}");
    let writer = sh::status(&["tap-ctl", "create", "-a", &target], TOOL)?;
    ensure!(
        writer.rc != 0 && writer.text.contains("tapimg convert"),
        "a VHDX can be written: {}",
        writer.text
    );
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "r"))?;
    ensure!(
        of_guest(guest)? == expected,
        "the guest does not read what is in the image"
    );
    disk.detach(guest)?;
    let over = ServedDisk::attach(guest, &tap::disk(&format!("cow:{target}"), VDEV, "w"))?;
    load_and_deaths(context, &over)?;
    let guest = context.pv()?;
    ensure!(of_guest(guest)? != expected, "the load has written nothing");
    over.detach(guest)?;
    ensure!(sums()? == before, "the image was written");
    Ok(())
}

fn endures(context: &mut Context, format: &Format) -> Result<()> {
    let path = make(context, &format!("a.{}", format.driver), format)?;
    let specification = tap::disk(&format!("{}:{path}", format.driver), VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &specification)?;
    context.check_driver(&disk.vbd)?;
    load_and_deaths(context, &disk)?;
    let guest = context.pv()?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    judge(context, format, &path, &seen)?;
    once_more(context, &specification, &seen)?;
    check(format.qemu, &path)
}

/// Attaches the disk again: the guest must read the earlier content, and writes it again.
pub(super) fn once_more(context: &mut Context, specification: &str, seen: &str) -> Result<()> {
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, specification)?;
    let again = of_guest(guest)?;
    ensure!(
        again == seen,
        "the guest read {seen} before, and {again} now"
    );
    guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
    disk.detach(guest)
}

/// A raw image with something in it.
pub(super) fn base(context: &mut Context) -> Result<String> {
    let path = image(context, "base.img", SIZE)?;
    sh::run(&[
        "dd",
        "if=/dev/urandom",
        &format!("of={path}"),
        "bs=1M",
        &format!("count={SIZE}"),
        "conv=notrunc",
        "status=none",
    ])?;
    Ok(path)
}

fn chain(context: &mut Context) -> Result<()> {
    let base = base(context)?;
    let middle = over(context, "mid.qcow2", &base, "raw")?;
    let leaf = over(context, "leaf.qcow2", &middle, "qcow2")?;
    let specification = tap::disk(&format!("qcow2:{leaf}"), VDEV, "w");
    let domain = context.pv()?.domid;
    // A file beside the image could be another guest's.
    refused(domain, &format!("qcow2:{leaf}"), "chmod a-w")?;
    for path in [&base, &middle] {
        sh::run(&["chmod", "a-w", path])?;
    }
    let sums = |paths: [&str; 2]| -> Result<String> { sh::run(&["sha256sum", paths[0], paths[1]]) };
    let before = sums([&base, &middle])?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &specification)?;
    let (seen, expected) = (of_guest(guest)?, backing::sha256(&base, SIZE)?);
    ensure!(seen == expected, "the guest does not read what is below");
    load_and_deaths(context, &disk)?;
    let guest = context.pv()?;
    let seen = of_guest(guest)?;
    // Another process cannot get the backing image for writing.
    let target = format!("aio:{base}");
    let writer = sh::status(&["tap-ctl", "create", "-a", &target], TOOL)?;
    ensure!(
        writer.rc != 0 && writer.text.contains("in use"),
        "what a disk goes on from can be written: {}",
        writer.text
    );
    disk.detach(guest)?;
    check("qcow2", &leaf)?;
    let found = of_image(context, "qcow2", &leaf)?;
    ensure!(seen == found, "the guest read {seen}, QEMU reads {found}");
    let after = sums([&base, &middle])?;
    ensure!(before == after, "what is below was written: {after}");
    Ok(())
}

fn long_chain(context: &mut Context) -> Result<()> {
    let mut top = base(context)?;
    let mut format = "raw";
    for number in 1..CHAIN {
        sh::run(&["chmod", "a-w", &top])?;
        top = over(context, &format!("{number}.qcow2"), &top, format)?;
        format = "qcow2";
        // 96 KiB from every half MiB on, across clusters, so that each image shows through somewhere.
        let write = format!("write -P {number} {}k 96k", number * 512 + 16);
        sh::run(&["qemu-io", "-f", format, "-c", &write, &top])?;
    }
    let copy = place(context, "content.raw")?;
    let expected = read_by_qemu(&copy, format, &top)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("qcow2:{top}"), VDEV, "w"))?;
    let seen = of_guest(guest)?;
    ensure!(
        seen == expected,
        "the guest reads {seen}, and QEMU {expected}"
    );
    load_and_deaths(context, &disk)?;
    let guest = context.pv()?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    check(format, &top)?;
    let found = read_by_qemu(&copy, format, &top)?;
    ensure!(seen == found, "the guest read {seen}, QEMU reads {found}");
    Ok(())
}

fn snapshot(context: &mut Context) -> Result<()> {
    let base = base(context)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{base}"), VDEV, "w"))?;
    let minor = disk.minor.to_string();
    let load = start_load_with(guest, "")?;
    let mut below = (base, "raw");
    for name in ["s1.qcow2", "s2.qcow2", "s3.qcow2"] {
        wait_progress(&disk, 50)?;
        tap::ctl(&["pause", "-m", &minor])?;
        let next = over(context, name, &below.0, below.1)?;
        let target = format!("qcow2:{next}");
        tap::ctl(&["unpause", "-m", &minor, "-a", &target])?;
        wait_progress(&disk, 30)?;
        disk.replace()?;
        below = (next, "qcow2");
    }
    wait_progress(&disk, 50)?;
    let told = end_load(context.pv()?, load)?;
    let guest = context.pv()?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    check("qcow2", &below.0)?;
    let found = of_image(context, "qcow2", &below.0)?;
    ensure!(seen == found, "the guest read {seen}, QEMU reads {found}");
    context.note(&told)
}

fn grown(context: &mut Context) -> Result<()> {
    /// Needs another L1 table.
    const GIB: u64 = 64;
    let (path, specification) = qcow2_disk(context)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &specification)?;
    let load = start_load_with(guest, "")?;
    wait_progress(&disk, 50)?;
    let (minor, size) = (disk.minor.to_string(), format!("{GIB}G"));
    tap::ctl(&["resize", "-m", &minor, "--size", &size])?;
    wait_size(guest, VDEV, GIB << 21)?;
    let last = format!("bs=512 seek={} conv=sync", (GIB << 21) - 1);
    guest.run(&format!("echo beyond | dd of={DEVICE} {last} oflag=direct"))?;
    wait_progress(&disk, 50)?;
    let told = end_load(guest, load)?;
    // The next process finds the new size.
    disk.replace()?;
    let last = format!("bs=512 skip={} count=1", (GIB << 21) - 1);
    let read = guest.run(&format!("dd if={DEVICE} {last} iflag=direct 2>/dev/null"))?;
    ensure!(
        read.starts_with("beyond"),
        "a write into the new part is lost"
    );
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    judge(context, &QCOW2, &path, &seen)?;
    context.note(&told)
}

fn shared(context: &mut Context) -> Result<()> {
    let path = make(context, "a.qcow2", &QCOW2)?;
    ensure!(Path::new(&path).exists(), "there is no image");
    let refusal = sh::status(
        &[
            "tap-ctl",
            "create",
            "--mode",
            "w!",
            "-a",
            &format!("qcow2:{path}"),
        ],
        TOOL,
    )?;
    ensure!(
        refusal.rc != 0 && refusal.text.contains("use the mode w,"),
        "w! is not refused as it should be: {}",
        refusal.text
    );
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("qcow2:{path}"), VDEV, "w"))?;
    guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
    disk.detach(guest)?;
    check("qcow2", &path)
}

fn full_storage(context: &mut Context) -> Result<()> {
    mount_memory(context, FULL, "size=6m")?;
    let path = format!("{FULL}/a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", &path, &format!("{SIZE}M")])?;
    let disk = fill(context, &format!("qcow2:{path}"))?;
    let guest = context.pv()?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    check("qcow2", &path)?;
    let found = of_image(context, "qcow2", &path)?;
    ensure!(seen == found, "the guest read {seen}, QEMU reads {found}");
    Ok(())
}
