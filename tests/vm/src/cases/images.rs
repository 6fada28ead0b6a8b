// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Images that cannot be served, or not any more: who asked hears what is wrong, and nothing is left.

use super::basic::FIO;
use super::tap::{forget_refused, same, DEVICE, VDEV};
use super::{Case, Context, Needs};
use crate::tap::{self, Served};
use crate::{sh, xs};
use anyhow::{ensure, Context as _, Result};
use std::fs;
use std::time::{Duration, Instant};

/// Where the images are.
const FOLDER: &str = "/srv/vmtest";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, Needs::Pv, run)
            .supervised()
            .no_leaks()
    };
    vec![
        case(
            "tap.bad_images",
            "what cannot be served is refused quickly, with the reason, and nothing is left",
            bad_images,
        ),
        case(
            "tap.full_storage",
            "storage that is full fails a write, and serves again when there is room",
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

fn refused(domain: u32, target: &str, words: &str) -> Result<()> {
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

fn full_storage(context: &mut Context) -> Result<()> {
    const MOUNT: &str = "/srv/vmtest-full";
    fs::create_dir_all(MOUNT).context("cannot make the folder for images")?;
    sh::run(&["mount", "-t", "tmpfs", "-o", "size=6m", "none", MOUNT])?;
    context.at_end("unmount the full storage", || {
        sh::run(&["umount", MOUNT]).map(drop)
    });
    let image = format!("{MOUNT}/a.img");
    sh::run(&["truncate", "--size=16M", &image])?;
    let guest = context.pv()?;
    let disk = Served::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    let pid = disk.pid()?;
    let write = |from: u32, count: u32| {
        format!("dd if=/dev/urandom of={DEVICE} bs=64k seek={from} count={count} oflag=direct 2>&1")
    };
    guest.run(&write(0, 32))?;
    let full = guest.status(&write(32, 224))?;
    ensure!(
        full.rc != 0,
        "a guest wrote 16 MiB to 6 MiB of storage and saw no error"
    );
    same(guest, &image, 2).context("what was written before the storage was full")?;
    let stats = tap::ctl_json(&["stats", "-m", &disk.minor.to_string()])?;
    ensure!(
        stats["write"]["errors"].as_u64() > Some(0),
        "the statistics have no failed write: {stats}"
    );
    sh::run(&["mount", "-o", "remount,size=32m", MOUNT])?;
    guest.run_for(&write(0, 256), FIO)?;
    same(guest, &image, 16)?;
    ensure!(
        disk.pid()? == pid,
        "the process was replaced because its storage was full"
    );
    disk.detach(guest)
}
