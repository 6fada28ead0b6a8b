// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk switches to a new image while its guest works, and the old one keeps its content.

use super::formats::{check, of_guest};
use super::hung::loop_device;
use super::tap::{
    end_load, forget_refused, full_image, image, start_load_with, wait_progress, DEVICE, VDEV,
};
use super::{Case, Context, SharedGuest};
use crate::guest::Guest;
use crate::sh;
use crate::tap::{self, ServedDisk};
use anyhow::{ensure, Context as _, Result};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// MiB of the disk. The load is in the first ten.
const SIZE: u32 = 16;
/// Offset at which the guest stores the number of the next snapshot.
const MARK: u64 = 12 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let about =
        "two snapshots under load that is judged, a death, and each image keeps what it was";
    let load = Case::new("snapshot.t30_load", about, SharedGuest::Pv, t30_load).nightly();
    let about = "an image takes over what is below it under load that is judged, its process dies, and then it is alone";
    let stream = Case::new("snapshot.stream", about, SharedGuest::Pv, stream).nightly();
    let about = "a snapshot ends under load that is judged: the image below takes over what the one above has, a process dies, and the disk goes on there";
    let commit = Case::new("snapshot.commit", about, SharedGuest::Pv, commit).nightly();
    let about = "two disks of a guest at one instant, again and again: what was written to the second one is not newer than what was written to the first before";
    let group = Case::new("snapshot.group", about, SharedGuest::Pv, group).nightly();
    let about = "a device that became a backing image is refused to a configuration that was not changed, also after the supervisor has ended, until a commit into it";
    let volume = Case::new("snapshot.volume", about, SharedGuest::Pv, volume).nightly();
    let all = [load, stream, commit, group, volume];
    all.map(|case| case.supervised().no_leaks()).into()
}

/// The guest writes a number to one disk and then to the other, and then the next number.
const COUNT: &str =
    "n=0; while [ ! -e /tmp/counted ]; do n=$((n+1)); for d in b c; do printf %08d $n | \
    dd of=/dev/xvd$d bs=512 conv=sync,notrunc oflag=direct status=none || exit 1; done; done";
/// Snapshots of both.
const ROUNDS: u32 = 5;

/// The number that an image has.
fn number(context: &mut Context, path: &str) -> Result<u32> {
    let raw = match path.ends_with(".qcow2") {
        true => content(context, path, &format!("{}.raw", path.replace('/', "-")))?,
        false => path.to_owned(),
    };
    let mut digits = [0; 8];
    File::open(&raw)?.read_exact_at(&mut digits, 0)?;
    let text = std::str::from_utf8(&digits)?;
    text.parse()
        .with_context(|| format!("{path} begins with {text:?}"))
}

fn group(context: &mut Context) -> Result<()> {
    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        let mut pair = |name: &str| -> Result<String> {
            if round == 0 {
                return image(context, &format!("{name}.img"), 4);
            }
            let path = image(context, &format!("{name}{round}.qcow2"), 1)?;
            fs::remove_file(&path)?;
            Ok(path)
        };
        rounds.push([pair("a")?, pair("b")?]);
    }
    let guest = context.pv()?;
    let attach =
        |path: &str, vdev| ServedDisk::attach(guest, &tap::disk(&format!("aio:{path}"), vdev, "w"));
    let [first, second] = &rounds[0];
    let disks = [attach(first, VDEV)?, attach(second, "xvdc")?];
    let [one, two] = [&disks[0], &disks[1]].map(|disk| disk.minor.to_string());
    let job = guest.start(COUNT)?;
    let counts = || -> Result<()> {
        let slow = match disks.iter().try_for_each(|disk| wait_progress(disk, 5)) {
            Err(slow) => slow,
            Ok(()) => return Ok(()),
        };
        Err(match guest.wait(job, Duration::ZERO) {
            Ok(done) => slow.context(format!("the guest ended with {}: {}", done.rc, done.text)),
            Err(_) => slow,
        })
    };
    for [first, second] in rounds.iter().skip(1) {
        counts()?;
        tap::ctl(&["snapshot", &one, first, &two, second])?;
    }
    counts()?;
    guest.run("touch /tmp/counted")?;
    let done = guest.wait(job, LIMIT)?;
    guest.run("rm /tmp/counted")?;
    ensure!(done.rc == 0, "the guest could not write: {}", done.text);
    for disk in disks {
        disk.detach(context.pv()?)?;
    }
    let mut told = Vec::new();
    // The last images are in use, and no snapshots.
    rounds.truncate(ROUNDS as usize);
    for (round, [first, second]) in rounds.iter().enumerate() {
        let first = number(context, first)?;
        let second = number(context, second)?;
        ensure!(
            first == second || first == second + 1,
            "of snapshot {round} one disk has number {first} and the other {second}"
        );
        told.push(first);
    }
    context.note(&format!("the instants were at {told:?}"))
}

/// The guest writes a number, and has the answer when this returns.
fn mark(guest: &Guest, number: u8) -> Result<()> {
    let block = MARK / 4096;
    guest.run(&format!(
        "yes {number} | head -c 4096 | dd of={DEVICE} bs=4k seek={block} oflag=direct conv=notrunc 2>/dev/null"
    ))?;
    Ok(())
}

/// Returns the number that the guest had stored at the time of the snapshot.
fn marked(raw: &str) -> Result<u8> {
    let mut byte = [0];
    let file = File::open(raw).with_context(|| format!("cannot open {raw}"))?;
    file.read_exact_at(&mut byte, MARK)?;
    Ok(byte[0].wrapping_sub(b'0'))
}

/// Returns the checksum of a whole file.
pub(super) fn sum(path: &str) -> Result<String> {
    let text = sh::run_for(&["sha256sum", path], LIMIT)?;
    let sum = text.split_whitespace().next();
    Ok(sum.context("no checksum")?.to_owned())
}

/// Makes a raw copy of the content that QEMU reads from an image.
fn content(context: &mut Context, path: &str, name: &str) -> Result<String> {
    let raw = image(context, name, 1)?;
    let convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw"];
    sh::run_for(&[&convert[..], &[path, &raw]].concat(), LIMIT)?;
    Ok(raw)
}

/// Makes a qcow2 image over a full raw one, which is read-only: returns their paths.
fn chain(context: &mut Context) -> Result<[String; 2]> {
    let base = full_image(context, "base.img", SIZE)?;
    sh::run(&["chmod", "a-w", &base])?;
    let top = image(context, "top.qcow2", 1)?;
    let words = ["qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b"];
    sh::run_for(&[&words[..], &[&base, &top]].concat(), LIMIT)?;
    Ok([base, top])
}

fn stream(context: &mut Context) -> Result<()> {
    let [base, top] = chain(context)?;
    // The kernel writes in passthrough to the clusters that the image has, beside the stream.
    let target = format!("direct=yes,qcow2:{top}");
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let minor = disk.minor.to_string();
    let ask = |words: &[&str]| tap::ctl_json(&[&["stream", "-m", &minor], words].concat());
    let load = start_load_with(guest, "")?;
    wait_progress(&disk, 40)?;
    ask(&["--rate", "1"])?;
    let copied = || Ok::<_, anyhow::Error>(ask(&["--show"])?["copied"].as_u64() > Some(0));
    sh::wait_for("something that is copied", LIMIT, copied)?;
    disk.replace()?;
    let told = ask(&["--rate", "64", "--wait"])?;
    ensure!(told["state"] == "done", "tap-ctl stream says {told}");
    wait_progress(&disk, 40)?;
    let info = sh::run(&["qemu-img", "info", "-U", "-f", "qcow2", &top])?;
    ensure!(!info.contains("backing file:"), "it says: {info}");
    // It is unused, by the next process, too.
    let away = format!("{base}.away");
    fs::rename(&base, &away)?;
    disk.replace()?;
    wait_progress(&disk, 40)?;
    let told = end_load(guest, load)?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    check("qcow2", &top)?;
    let found = sum(&content(context, &top, "top.raw")?)?;
    ensure!(seen == found, "the guest read {seen}, QEMU reads {found}");
    fs::rename(&away, &base)?;
    context.note(&told)
}

/// A commit that writes next to nothing.
const COMMIT: Duration = Duration::from_secs(60);

fn volume(context: &mut Context) -> Result<()> {
    let below = image(context, "a.img", SIZE)?;
    let top = image(context, "s1.qcow2", 1)?;
    fs::remove_file(&top)?;
    let device = loop_device(context, &below, &["--direct-io=on"])?;
    let old = tap::disk(&format!("aio:{device}"), VDEV, "w");
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &old)?;
    mark(guest, 1)?;
    snapshot(&disk, &top, &device)?;
    mark(guest, 2)?;
    disk.detach(guest)?;
    // As xl does when the guest reboots.
    let domain = guest.domid.to_string();
    let refused = sh::status(&["xl", "block-attach", &domain, &old], COMMIT)?;
    ensure!(
        refused.rc != 0 && refused.text.contains(&top) && refused.text.contains("/frozen/"),
        "the old configuration is not refused in clear words: {}",
        sh::tail(&refused.text, 400)
    );
    forget_refused(&domain, VDEV)?;
    ensure!(marked(&device)? == 1, "the volume was written");
    let minor = tap::ctl(&[
        "create",
        "--minor-only",
        "--files",
        &device,
        "-a",
        &format!("qcow2:{top}"),
    ])?;
    let minor = minor.trim();
    let target = format!("aio:{device}");
    sh::run_for(
        &["tap-ctl", "commit", "-m", minor, &target, "--wait"],
        COMMIT,
    )?;
    sh::run_for(&["tap-ctl", "destroy", "-m", minor], COMMIT)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &old)?;
    let seen = guest.run(&format!(
        "dd if={DEVICE} bs=4k skip={} count=1 iflag=direct 2>/dev/null | head -c 1",
        MARK / 4096
    ))?;
    ensure!(
        seen.trim() == "2",
        "the guest reads {seen} after the commit"
    );
    disk.detach(guest)
}

/// MiB of a disk whose top image has so much data that a commit cannot end before the case interrupts it.
const LONG: u32 = 64;
/// MiB of that which the guest writes, behind the load.
const MUCH: u32 = 40;

fn commit(context: &mut Context) -> Result<()> {
    let base = image(context, "a.img", LONG)?;
    let top = image(context, "s1.qcow2", 1)?;
    fs::remove_file(&top)?;
    let guest = context.pv()?;
    // The kernel writes in passthrough to the clusters that the image has, until each write must go to the backing
    // image as well.
    let target = format!("direct=yes,aio:{base}");
    let disk = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let minor = disk.minor.to_string();
    let load = start_load_with(guest, "--discard --hints")?;
    wait_progress(&disk, 40)?;
    snapshot(&disk, &top, &base)?;
    guest.run(&format!(
        "dd if=/dev/urandom of={DEVICE} bs=1M seek={SIZE} count={MUCH} oflag=direct conv=notrunc 2>/dev/null"
    ))?;
    let ask = |words: &[&str]| tap::ctl_json(&[&["commit", "-m", &minor], words].concat());
    let below = format!("aio:{base}");
    ask(&[&below, "--rate", "1"])?;
    let copied = || Ok::<_, anyhow::Error>(ask(&["--show"])?["copied"].as_u64() > Some(0));
    sh::wait_for("something that is copied", LIMIT, copied)?;
    // The backing image is another disk by now, and stays so if the commit ends there.
    ask(&["--cancel"])?;
    wait_progress(&disk, 40)?;
    ask(&[&below, "--rate", "1"])?;
    disk.replace()?;
    wait_progress(&disk, 40)?;
    ask(&["--cancel"])?;
    let told = ask(&[&below, "--rate", "64", "--wait"])?;
    let to = told["to"].as_str().unwrap_or_default();
    ensure!(
        told["state"] == "complete" && to == below && copied()?,
        "tap-ctl commit says {told}"
    );
    // It is unused, by the next process, too.
    let away = format!("{top}.away");
    fs::rename(&top, &away)?;
    wait_progress(&disk, 40)?;
    disk.replace()?;
    wait_progress(&disk, 40)?;
    let told = end_load(guest, load)?;
    let seen = guest.run(&format!(
        "dd if={DEVICE} bs=1M iflag=direct 2>/dev/null | sha256sum"
    ))?;
    disk.detach(guest)?;
    let found = sum(&base)?;
    ensure!(
        seen.split_whitespace().next() == Some(&*found),
        "the guest read {seen}, {base} has {found}"
    );
    fs::rename(&away, &top)?;
    context.note(&told)
}

/// Switches the disk to a new image; returns the number of microseconds in which no process served it.
pub(super) fn snapshot(disk: &ServedDisk, new: &str, old: &str) -> Result<u64> {
    let minor = disk.minor.to_string();
    let told = tap::ctl_json(&["snapshot", &minor, new])?;
    ensure!(
        told["parent"] == old && told["marked"] == true,
        "tap-ctl snapshot says {told}"
    );
    told["pause_us"].as_u64().context("no pause is told")
}

fn t30_load(context: &mut Context) -> Result<()> {
    let base = image(context, "a.img", SIZE)?;
    let mut images = vec![base.clone()];
    for name in ["s1.qcow2", "s2.qcow2"] {
        // Only the name is needed: the clean-up removes the file that the case makes there.
        let path = image(context, name, 1)?;
        fs::remove_file(&path)?;
        images.push(path);
    }
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{base}"), VDEV, "w"))?;
    let load = start_load_with(guest, "")?;
    let (mut pauses, mut sums) = (Vec::new(), Vec::new());
    for (number, pair) in (1..).zip(images.windows(2)) {
        wait_progress(&disk, 40)?;
        mark(guest, number)?;
        pauses.push(snapshot(&disk, &pair[1], &pair[0])?);
        mark(guest, number + 1)?;
        sums.push(sum(&pair[0])?);
        wait_progress(&disk, 40)?;
        if number == 1 {
            disk.replace()?;
        }
    }
    let taken = tap::ctl(&["list"])?;
    ensure!(taken.contains("s2.qcow2"), "it is served from {taken}");
    let told = end_load(guest, load)?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    judge(context, &images, &sums, &seen)?;
    as_configured(&base)?;
    context.note(&format!("nobody served for {pauses:?} us; {told}"))
}

/// Checks that each image has the content of its snapshot, and the last one the content that the guest reads.
fn judge(context: &mut Context, images: &[String], sums: &[String], seen: &str) -> Result<()> {
    for (image, was) in images.iter().zip(sums) {
        let now = sum(image)?;
        ensure!(now == *was, "{image} was written after the snapshot");
    }
    ensure!(
        marked(&images[0])? == 1,
        "the first image is of another time"
    );
    for (number, image) in (2..).zip(&images[1..]) {
        check("qcow2", image)?;
        sh::run(&["tapimg", "check", &format!("qcow2:{image}")])?;
        let raw = content(context, image, &format!("{number}.raw"))?;
        let mark = marked(&raw)?;
        ensure!(mark == number, "{image} is of the time {mark}");
        if image == images.last().context("there are images")? {
            let found = sum(&raw)?;
            ensure!(seen == found, "the guest read {seen}, QEMU reads {found}");
        }
    }
    Ok(())
}

/// An old configuration cannot change a backing image of others.
pub(super) fn as_configured(base: &str) -> Result<()> {
    let target = format!("aio:{base}");
    let refusal = sh::status(&["tap-ctl", "create", "-a", &target], LIMIT)?;
    ensure!(
        refusal.rc != 0 && refusal.text.contains("after a snapshot"),
        "the old image is served for writing: {}",
        refusal.text
    );
    Ok(())
}
