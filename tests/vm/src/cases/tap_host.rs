// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Tap disks beside other activities of a host: other users of images, dead storage, and a supervisor that is
//! restarted.

use super::tap::{image, VDEV};
use super::{Case, Context, SharedGuest};
use crate::backing::{self, linear, Dm, Lvm};
use crate::guest::{Config, Guest, GuestKind};
use crate::tap::{self, ServedDisk};
use crate::{leaks, sh};
use anyhow::{ensure, Context as _, Result};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Mount point of storage that dies.
const DEAD: &str = "/mnt/dead";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv};
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run).supervised().no_leaks()
    };
    vec![
        case(
            "tap.claimed",
            "swap, a volume group and a mount are users of an image, and the refusal names them",
            Nothing,
            claimed,
        ),
        case(
            "tap.claimed_in_parts",
            "an array and a file system on several devices are users of each of them",
            Nothing,
            claimed_in_parts,
        )
        .nightly(),
        case(
            "tap.dead_mount",
            "an image whose file system does not answer keeps nobody else from attaching",
            Pv,
            dead_mount,
        )
        .nightly(),
        case(
            "tap.supervisor_away",
            "a disk that is attached while no supervisor runs waits for the next one",
            Pv,
            supervisor_away,
        ),
        case(
            "tap.limited",
            "a guest does no more with its disk than it may, until it may do more",
            Pv,
            limited,
        ),
        case(
            "tap.shared_memory",
            "two guests have one memory: each reads what the other writes, whose process dies, until both have left",
            Pv,
            shared_memory,
        )
        .nightly(),
    ]
}

/// The memory that two guests have, and where it is in dom0.
const SCRATCH: &str = "name=scratch,ram:16M";
const MEMORY: &str = "/run/xentap/ram/scratch.named";

/// Writes something else into a range of the disk that begins at this MiB, past all caches of the guest.
fn scribble(guest: &Guest, at: u32) -> Result<()> {
    let write =
        format!("dd if=/dev/urandom of=/dev/xvdb bs=1M count=4 seek={at} oflag=direct status=none");
    guest.run(&write).map(drop)
}

/// All guests read what dom0 has.
fn all_read_the_same(guests: &[&Guest]) -> Result<()> {
    let memory = backing::sha256(MEMORY, 16)?;
    for guest in guests {
        let read = guest.run("dd if=/dev/xvdb bs=1M iflag=direct 2>/dev/null | sha256sum")?;
        ensure!(
            read.starts_with(&memory),
            "guest {} reads {read}, and the memory has {memory}",
            guest.domid
        );
    }
    Ok(())
}

fn shared_memory(context: &mut Context) -> Result<()> {
    let other = Guest::create(Config::new("beside", GuestKind::Pv, 1))?;
    let guest = context.pv()?;
    let specification = tap::disk(&format!("shared=yes,{SCRATCH}"), VDEV, "w");
    let first = ServedDisk::attach(guest, &specification)?;
    let second = ServedDisk::attach(&other, &specification)?;
    ensure!(
        first.minor != second.minor && first.pid()? != second.pid()?,
        "two guests have one disk"
    );
    let both = [guest, &other];
    refused(SCRATCH, "w", "not free")?;
    let (rc, text) = check("name=scratch,ram:32M", "w!")?;
    ensure!(
        rc != 0 && text.contains("16777216"),
        "another size is not refused: {text}"
    );
    for (writer, disk, at) in [
        (guest, &first, 0),
        (&other, &second, 2),
        (guest, &second, 9),
    ] {
        let before = backing::sha256(MEMORY, 16)?;
        scribble(writer, at)?;
        disk.replace()?;
        all_read_the_same(&both)?;
        ensure!(
            backing::sha256(MEMORY, 16)? != before,
            "nothing was written"
        );
    }
    guest.run("blkdiscard -o 1M -l 2M /dev/xvdb")?;
    all_read_the_same(&both)?;
    first.detach(guest)?;
    ensure!(
        Path::new(MEMORY).exists(),
        "the memory went with a disk, and another one has it"
    );
    second.replace()?;
    all_read_the_same(&[&other])?;
    second.detach(&other)?;
    ensure!(
        !Path::new(MEMORY).exists(),
        "the memory is left when both disks are gone"
    );
    other.destroy()
}

/// 8 MiB, past all caches of the guest.
const WRITES: &str = "dd if=/dev/zero of=/dev/xvdb bs=64k count=128 oflag=direct status=none";

fn limited(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let guest = context.pv()?;
    let target = format!("bps=2M,aio:{image}");
    let disk = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let minor = disk.minor.to_string();
    let begun = Instant::now();
    guest.run(WRITES)?;
    let time = begun.elapsed();
    // 2 MiB at once, the others in 3 seconds.
    ensure!(time >= Duration::from_millis(2900), "8 MiB took {time:?}");
    let stats = tap::ctl_json(&["stats", "-m", &minor])?;
    let held = stats["held"].as_u64();
    ensure!(
        held > Some(0) && stats["limits"]["bytes"] == 2 << 20,
        "after a limit that was reached: {stats}"
    );
    tap::ctl(&["set", "-m", &minor, "--bps", "0"])?;
    guest.run(WRITES)?;
    // How long that took says something of the host's other load only.
    let stats = tap::ctl_json(&["stats", "-m", &minor])?;
    ensure!(
        stats["held"].as_u64() == held,
        "requests were held without a limit, {held:?} before: {stats}"
    );
    context.note(&format!("8 MiB took {} ms at 2 MiB/s", time.as_millis()))?;
    disk.detach(context.pv()?)
}

/// Returns the exit code and the output of tap-ctl about an image.
fn check(target: &str, mode: &str) -> Result<(i32, String)> {
    let asked = sh::status(
        &["tap-ctl", "probe", "-a", target, "--mode", mode],
        Duration::from_secs(60),
    )?;
    Ok((asked.rc, asked.text))
}

fn refused(target: &str, mode: &str, words: &str) -> Result<()> {
    let (rc, text) = check(target, mode)?;
    ensure!(
        rc == 3 && text.contains(words),
        "{target} ({mode}) was not refused as in use because of '{words}': exit code {rc}, {text}"
    );
    Ok(())
}

fn free(target: &str, mode: &str) -> Result<()> {
    let (rc, text) = check(target, mode)?;
    ensure!(rc == 0, "{target} ({mode}) is free, and refused: {text}");
    Ok(())
}

fn claimed(context: &mut Context) -> Result<()> {
    let device = context.null_blk(64, &[])?.path();
    let target = format!("aio:{device}");
    free(&target, "w")?;
    sh::run(&["mkswap", &device])?;
    sh::run(&["swapon", &device])?;
    let swap = device.clone();
    context.at_end("end the swap area", move || {
        sh::status(&["swapoff", &swap], Duration::from_secs(60)).map(drop)
    });
    refused(&target, "w", "swap area")?;
    refused(&target, "r", "swap area")?;
    free(&target, "w!")?;
    sh::run(&["swapoff", &device])?;
    let volume = Lvm::create("vmtestpv", &device, 16)?;
    refused(&target, "w", "vmtestpv")?;
    free(&format!("aio:{}", volume.path()), "w")?;
    volume.remove()?;
    free(&target, "w")?;
    sh::run(&["mkfs.ext4", "-q", "-F", &device])?;
    sh::run(&["mkdir", "-p", DEAD])?;
    sh::run(&["mount", "-o", "ro", &device, DEAD])?;
    context.at_end("unmount", || {
        sh::shell(&format!("! mountpoint -q {DEAD} || umount {DEAD}")).map(drop)
    });
    refused(&target, "w", DEAD)?;
    free(&target, "r")?;
    sh::run(&["mount", "-o", "remount,rw", DEAD])?;
    refused(&target, "r", DEAD)?;
    sh::run(&["umount", DEAD])?;
    // A mount through a loop device uses the file.
    let image = image(context, "a.img", 16)?;
    let target = format!("aio:{image}");
    sh::run(&["mkfs.ext4", "-q", "-F", &image])?;
    free(&target, "w")?;
    sh::modprobe("loop", &[])?;
    sh::run(&["mount", "-o", "loop", &image, DEAD])?;
    refused(&target, "w", DEAD)?;
    sh::run(&["umount", DEAD])?;
    free(&target, "w")
}

fn claimed_in_parts(context: &mut Context) -> Result<()> {
    const ARRAY: &str = "/dev/md/vmtest";
    // The smallest that Btrfs takes.
    let device = |context: &mut Context| context.null_blk(128, &[("memory_backed", "1")]);
    let devices = [device(context)?.path(), device(context)?.path()];
    let targets = devices.each_ref().map(|device| format!("aio:{device}"));
    let both = devices.join(" ");
    sh::shell(&format!(
        "mdadm --create {ARRAY} --run --level=1 --raid-devices=2 --metadata=1.2 {both} && udevadm settle"
    ))?;
    context.at_end("stop the array", move || {
        sh::shell(&format!("! [ -e {ARRAY} ] || mdadm --stop {ARRAY}")).map(drop)
    });
    for target in &targets {
        refused(target, "w", "md")?;
        refused(target, "r", "md")?;
    }
    free(&format!("aio:{ARRAY}"), "w")?;
    sh::shell(&format!(
        "mdadm --stop {ARRAY} && mdadm --zero-superblock {both} && udevadm settle"
    ))?;
    for target in &targets {
        free(target, "w")?;
    }
    // The file system is mounted from one of them, with a device number that is neither's.
    sh::shell(&format!(
        "mkfs.btrfs -q -f {both} && modprobe btrfs && btrfs device scan {both}"
    ))?;
    sh::run(&["mkdir", "-p", DEAD])?;
    sh::run(&["mount", &devices[0], DEAD])?;
    context.at_end("unmount", || {
        sh::shell(&format!("! mountpoint -q {DEAD} || umount {DEAD}")).map(drop)
    });
    for target in &targets {
        refused(target, "w", DEAD)?;
        refused(target, "r", DEAD)?;
    }
    sh::run(&["umount", DEAD])?;
    for target in &targets {
        free(target, "w")?;
    }
    Ok(())
}

/// Starts xl, and waits until its script asks the supervisor.
fn attach_slowly(domain: &str, specification: &str) -> Result<Child> {
    let mut child = Command::new("xl")
        .args(["block-attach", domain, specification])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start xl")?;
    sh::wait_for("a question of the script", Duration::from_secs(60), || {
        ensure!(child.try_wait()?.is_none(), "xl has ended already");
        Ok(leaks::processes("tap-ctl")? > 0)
    })?;
    Ok(child)
}

fn dead_mount(context: &mut Context) -> Result<()> {
    let below = context.null_blk(64, &[("memory_backed", "1")])?;
    let device = Dm::create("vmtestdead", &linear(&below.path(), 64 << 11))?;
    sh::run(&["mkfs.ext4", "-q", "-F", &device.path()])?;
    sh::run(&["mkdir", "-p", DEAD])?;
    sh::run(&["mount", &device.path(), DEAD])?;
    sh::shell(&format!("truncate -s 8M {DEAD}/a.img"))?;
    sh::run(&["umount", DEAD])?;
    // Nothing of its folder is in memory now.
    sh::run(&["mount", &device.path(), DEAD])?;
    device.suspend()?;
    let theirs = device.clone();
    context.at_end("bring the storage back and take it away", move || {
        theirs.resume()?;
        sh::run(&["umount", DEAD])?;
        theirs.remove()
    });
    let mut dead = attach_slowly("0", &tap::disk(&format!("aio:{DEAD}/a.img"), "xvdk", "w"))?;
    let image = image(context, "a.img", 16)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    disk.detach(guest)?;
    ensure!(
        dead.try_wait()?.is_none(),
        "a disk was attached only when the one on dead storage had been given up"
    );
    sh::wait_for("xl to give up", Duration::from_secs(120), || {
        Ok(dead.try_wait()?.is_some())
    })?;
    super::tap::forget_refused("0", "xvdk")?;
    // The second time it is known.
    let (rc, text) = check(&format!("aio:{DEAD}/a.img"), "w")?;
    ensure!(
        rc != 0 && text.contains("does not answer"),
        "dead storage is not called so: {text}"
    );
    device.resume()?;
    sh::wait_for("an answer of the storage", Duration::from_secs(60), || {
        Ok(check(&format!("aio:{DEAD}/a.img"), "w")?.0 == 0)
    })
}

fn supervisor_away(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let specification = tap::disk(&format!("aio:{image}"), VDEV, "w");
    for crash in [true, false] {
        let supervisor = context.take_supervisor()?;
        match crash {
            true => supervisor.kill()?,
            false => supervisor.stop()?,
        }
        let domain = context.pv()?.domid.to_string();
        let mut attach = attach_slowly(&domain, &specification)?;
        context.supervise(true)?;
        sh::wait_for("the disk to be attached", Duration::from_secs(120), || {
            Ok(attach.try_wait()?.is_some())
        })?;
        let status = attach.wait()?;
        ensure!(
            status.success(),
            "a disk was not attached while the supervisor was started: {status}, {}",
            tap::log_tail()?
        );
        let guest = context.pv()?;
        ServedDisk::of(crate::guest::AttachedVbd::of(guest.domid, VDEV)?)?.detach(guest)?;
    }
    Ok(())
}
