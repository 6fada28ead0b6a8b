// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Images that cannot be served, or not any more: the user gets the reason, and nothing is left behind.

use super::basic::{verify_job, FIO};
use super::tap::{forget_refused, same, DEVICE, VDEV};
use super::{Case, Context, SharedGuest};
use crate::tap::{self, ServedDisk};
use crate::{sh, xs};
use anyhow::{ensure, Context as _, Result};
use std::fs;
use std::time::{Duration, Instant};

/// Folder of the images.
const FOLDER: &str = "/srv/vmtest";
/// Folder of storage that becomes full.
pub(super) const FULL: &str = "/srv/vmtest-full";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, SharedGuest::Pv, run)
            .supervised()
            .no_leaks()
    };
    vec![
        case(
            "tap.bad_images",
            "what cannot be served is refused quickly, with the reason, and nothing is left",
            bad_images,
        )
        .nightly(),
        case(
            "tap.large_blocks",
            "storage of 4096-byte blocks: devices and shared images have such sectors, files keep their size",
            large_blocks,
        )
        .nightly(),
        case(
            "tap.full_storage",
            "storage that is full pauses the disk, and the guest sees no error: it goes on when there is room",
            full_storage,
        ),
    ]
}

fn bad_images(context: &mut Context) -> Result<()> {
    fs::create_dir_all(FOLDER).context("cannot make the folder for images")?;
    for (name, bytes) in [("odd.img", 10_000), ("empty.img", 0)] {
        let path = format!("{FOLDER}/{name}");
        fs::File::create(&path)
            .and_then(|file| file.set_len(bytes))
            .with_context(|| format!("cannot make {path}"))?;
        context.at_end(format!("remove {path}"), move || Ok(fs::remove_file(path)?));
    }
    let domain = context.pv()?.domid;
    for (target, words) in [
        ("aio:/srv/vmtest/missing.img", "missing.img"),
        (
            "aio:/srv/vmtest",
            "neither a regular file nor a block device",
        ),
        ("aio:/dev/null", "neither a regular file nor a block device"),
        ("aio:/srv/vmtest/odd.img", "not a multiple"),
        ("aio:/srv/vmtest/empty.img", "empty"),
        ("ram:1000", "512"),
        ("qcow9:/srv/a", "qcow9"),
        // xl takes the prefix away.
        ("aio:a.img", "does not say which driver"),
    ] {
        refused(domain, target, words)?;
    }
    Ok(())
}

pub(super) fn refused(domain: u32, target: &str, words: &str) -> Result<()> {
    let (begun, id) = (Instant::now(), domain.to_string());
    let refused = sh::status(
        &["xl", "block-attach", &id, &tap::disk(target, VDEV, "w")],
        Duration::from_secs(60),
    )?;
    ensure!(refused.rc != 0, "`xl block-attach` accepted {target}");
    ensure!(
        refused.text.contains(words),
        "the refusal of {target} does not say {words}: {}",
        sh::tail(&refused.text, 400)
    );
    ensure!(
        begun.elapsed() < Duration::from_secs(25),
        "xl took {} s to refuse {target}",
        begun.elapsed().as_secs()
    );
    let backend = format!("/local/domain/0/backend/vbd/{domain}");
    for device in xs::list(&backend)? {
        if let Some(error) = xs::read(&format!("{backend}/{device}/hotplug-error"))? {
            ensure!(
                error.contains(words),
                "`hotplug-error` of {target} is `{error}`"
            );
        }
    }
    forget_refused(&id, VDEV)
}

/// A file system in memory for the time of the case; `size` is an option of tmpfs. Direct I/O there is
/// in blocks of 4096 bytes.
pub(super) fn mount_memory(context: &mut Context, mount: &'static str, size: &str) -> Result<()> {
    fs::create_dir_all(mount).context("cannot make the folder for images")?;
    sh::run(&["mount", "-t", "tmpfs", "-o", size, "none", mount])?;
    context.at_end(format!("unmount {mount}"), move || {
        sh::run(&["umount", mount]).map(drop)
    });
    Ok(())
}

fn large_blocks(context: &mut Context) -> Result<()> {
    const MOUNT: &str = "/srv/vmtest-large";
    mount_memory(context, MOUNT, "size=64m")?;
    let [whole, odd] = ["whole.img", "odd.img"].map(|name| format!("{MOUNT}/{name}"));
    sh::run(&["truncate", "--size=16M", &whole])?;
    let odd_size = (16 << 20) + 512;
    sh::run(&["truncate", &format!("--size={odd_size}"), &odd])?;
    check_shared(&whole, &odd)?;

    let device = context.null_blk(16, &[("blocksize", "4096")])?;
    let guest = context.pv()?;
    let target = format!("aio:{}", device.path());
    let disk = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let sector = xs::number(&format!("{}/sector-size", disk.vbd.backend))?;
    let seen = guest.run(&format!("cat /sys/block/{VDEV}/queue/logical_block_size"))?;
    ensure!(
        sector == 4096 && seen.trim() == "4096",
        "a device of 4096-byte blocks has sectors of {sector} bytes, the guest sees {}",
        seen.trim()
    );
    guest.run_for(&verify_job(DEVICE, 8, 60, 4096), FIO)?;
    same(guest, &device.path(), 16)?;
    disk.replace()?;
    guest.run_for(&verify_job(DEVICE, 4, 40, 4096), FIO)?;
    disk.detach(guest)?;

    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{odd}"), VDEV, "w"))?;
    guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
    let last = odd_size / 512 - 1;
    guest.run(&format!(
        "dd if=/dev/urandom of={DEVICE} bs=512 seek={last} count=1 oflag=direct && sync"
    ))?;
    let tail = guest.run(&format!(
        "dd if={DEVICE} bs=512 skip={last} count=1 iflag=direct 2>/dev/null | sha256sum"
    ))?;
    let ours = sh::shell(&format!("tail -c 512 {odd} | sha256sum"))?;
    let size = fs::metadata(&odd)?.len();
    ensure!(
        size == odd_size && tail.trim() == ours.trim(),
        "a file of {odd_size} bytes has {size} after its last sector was written; the guest reads {}, dom0 {}",
        tail.trim(),
        ours.trim()
    );
    same(guest, &odd, 16)?;
    disk.detach(guest)
}

/// Checks shared images, which xl has no word for: one of whole blocks, and one that is not.
fn check_shared(whole: &str, odd: &str) -> Result<()> {
    let create = |image: &str| {
        let target = format!("aio:{image}");
        sh::status(
            &["tap-ctl", "--json", "create", "--mode", "w!", "-a", &target],
            Duration::from_secs(60),
        )
    };
    let refused = create(odd)?;
    ensure!(
        refused.rc != 0 && refused.text.contains("--size=%4096"),
        "a shared image with a part of a block is not refused in clear words: {}",
        sh::tail(&refused.text, 400)
    );
    let made: serde_json::Value = serde_json::from_str(&create(whole)?.stdout)?;
    ensure!(
        made["disk"]["logical_block"] == 4096,
        "an image that others write too has no blocks of 4096 bytes: {made}"
    );
    tap::ctl(&["destroy", "-m", &made["minor"].to_string()]).map(drop)
}

fn full_storage(context: &mut Context) -> Result<()> {
    mount_memory(context, FULL, "size=6m")?;
    let image = format!("{FULL}/a.img");
    sh::run(&["truncate", "--size=16M", &image])?;
    let disk = fill(context, &format!("aio:{image}"))?;
    let guest = context.pv()?;
    same(guest, &image, 16)?;
    disk.detach(guest)
}

/// Lets a guest fill an image of 16 MiB on the [`FULL`] file system, which first has room for a part of it, and then
/// for all.
pub(super) fn fill(context: &mut Context, target: &str) -> Result<ServedDisk> {
    let image = target.split_once(':').map_or(target, |(_, path)| path);
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(target, VDEV, "w"))?;
    let (pid, minor) = (disk.pid()?, disk.minor.to_string());
    let write = |from: u32, count: u32| {
        format!("dd if=/dev/urandom of={DEVICE} bs=64k seek={from} count={count} oflag=direct 2>&1")
    };
    guest.run(&write(0, 32))?;
    let events = tap::EventLog::follow()?;
    let job = guest.start(&write(32, 224))?;
    let limit = Duration::from_secs(60);
    let told = events.wait_for("trouble", disk.minor, limit)?;
    ensure!(
        told["stopped"] == true
            && told["trouble"]["errno"] == libc::ENOSPC
            && told["trouble"]["what"] == "write"
            && told["target"]
                .as_str()
                .is_some_and(|target| target.ends_with(image)),
        "the event does not say that {image} is full: {told}"
    );
    events.wait_for("paused", disk.minor, limit)?;
    ensure!(
        tap::log_tail()?.contains("No space left on device"),
        "the log does not say that the storage is full"
    );
    // This is too early: it stops again, and the guest gets no error.
    tap::ctl(&["unpause", "-m", &minor])?;
    events.wait_for("trouble", disk.minor, limit)?;
    events.wait_for("paused", disk.minor, limit)?;
    let waiting = disk.info()?.waiting;
    ensure!(waiting > 0, "no request waits for room");
    sh::run(&["mount", "-o", "remount,size=32m", FULL])?;
    tap::ctl(&["unpause", "-m", &minor])?;
    let written = guest.wait(job, FIO)?;
    ensure!(
        written.rc == 0,
        "the guest saw an error of storage that was full for a while: {}",
        sh::tail(&written.text, 400)
    );
    ensure!(
        disk.pid()? == pid,
        "the process was replaced because its storage was full"
    );
    Ok(disk)
}
