// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk is copied again and again while its guest works, each time only the changed ranges.

use super::snapshot::{snapshot, sum};
use super::tap::{end_load, full_image, image, start_load_with, wait_progress, VDEV};
use super::{Case, Context, SharedGuest};
use crate::sh;
use crate::tap::{self, ServedDisk};
use anyhow::{ensure, Context as _, Result};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// MiB of the disk. The load is in the first ten.
const SIZE: u32 = 16;
/// Number of copies; the first one is of the whole disk.
const ROUNDS: usize = 3;
const LIMIT: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let about = "three copies of a disk under load, of which each but the first takes only what has changed, over a death and a hand-off";
    let copies = Case::new("dirty.copies", about, SharedGuest::Pv, copies);
    vec![copies.supervised().no_leaks().nightly()]
}

/// Returns the ranges that may have changed since a mark: offset and length in bytes of the disk.
fn changed(minor: &str, since: &str) -> Result<Vec<(u64, u64)>> {
    let told = tap::ctl(&["dirty", "-m", minor, "--since", since])?;
    let part = |line: &str| {
        let words = line.split_once(' ').context("two words")?;
        Ok((words.0.parse()?, words.1.parse()?))
    };
    told.lines().map(part).collect()
}

/// Copies parts of one file to another one; returns the number of bytes.
fn copy(from: &str, to: &str, parts: &[(u64, u64)]) -> Result<u64> {
    let (from, to) = (File::open(from)?, File::options().write(true).open(to)?);
    let mut copied = 0;
    for &(offset, length) in parts {
        let mut bytes = vec![0; usize::try_from(length)?];
        from.read_exact_at(&mut bytes, offset)?;
        to.write_all_at(&bytes, offset)?;
        copied += length;
    }
    Ok(copied)
}

/// Returns the content of an image that is a disk's backing image, and that no process changes. QEMU would need more
/// than a read lock on it.
fn beside(context: &mut Context, path: &str, name: &str) -> Result<String> {
    let raw = image(context, name, 1)?;
    fs::remove_file(&raw)?;
    let (from, to) = (format!("qcow2:{path}"), format!("aio:{raw}"));
    sh::run_for(&["tapimg", "convert", &from, &to], LIMIT)?;
    Ok(raw)
}

fn copies(context: &mut Context) -> Result<()> {
    let base = full_image(context, "a.img", SIZE)?;
    let backup = image(context, "backup.img", SIZE)?;
    let mut frozen = base.clone();
    let mut images = Vec::new();
    for round in 0..ROUNDS {
        // Only the name is needed: the clean-up removes the file that the case makes there.
        let path = image(context, &format!("s{round}.qcow2"), 1)?;
        fs::remove_file(&path)?;
        images.push(path);
    }
    let guest = context.pv()?;
    // The kernel writes in passthrough where it may, until there is a mark.
    let target = format!("direct=yes,aio:{base}");
    let disk = ServedDisk::attach(guest, &tap::disk(&target, VDEV, "w"))?;
    let minor = disk.minor.to_string();
    let load = start_load_with(guest, "")?;
    let mut copied = Vec::new();
    for (round, next) in images.iter().enumerate() {
        wait_progress(&disk, 40)?;
        let (mark, before) = (format!("copy-{round}"), round.checked_sub(1));
        tap::ctl(&["dirty", "-m", &minor, "--mark", &mark])?;
        wait_progress(&disk, 10)?;
        snapshot(&disk, next, &frozen)?;
        let parts = match before {
            Some(before) => changed(&minor, &format!("copy-{before}"))?,
            None => vec![(0, u64::from(SIZE) << 20)],
        };
        let raw = match frozen.ends_with(".qcow2") {
            true => beside(context, &frozen, &format!("{round}.raw"))?,
            false => frozen.clone(),
        };
        copied.push(copy(&raw, &backup, &parts)?);
        let (is, wanted) = (sum(&backup)?, sum(&raw)?);
        ensure!(is == wanted, "copy {round} is not what the disk was");
        if let Some(before) = before {
            tap::ctl(&["dirty", "-m", &minor, "--forget", &format!("copy-{before}")])?;
        }
        match round {
            0 => drop(disk.replace()?),
            _ => drop(tap::ctl(&["handoff", "-m", &minor])?),
        }
        frozen.clone_from(next);
    }
    ensure!(
        copied[1..].iter().all(|&some| some > 0 && some < copied[0]),
        "so many bytes were copied: {copied:?}"
    );
    let told = end_load(context.pv()?, load)?;
    let left = sh::run(&["ls", "/run/xentap/notes"])?;
    ensure!(left.lines().count() == 1, "there is one mark, and {left}");
    disk.detach(context.pv()?)?;
    let left = sh::run(&["ls", "/run/xentap/notes"])?;
    ensure!(
        left.trim().is_empty(),
        "the disk is gone, and has left {left}"
    );
    context.note(&format!("copied {copied:?} bytes; {told}"))
}
