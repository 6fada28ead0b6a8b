// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk is backed up each night while its guest works, and each backup is what the disk was.

use super::snapshot::sum;
use super::tap::{end_load, full_image, image, start_load_with, wait_progress, VDEV};
use super::{Case, Context, SharedGuest};
use crate::tap::{self, ServedDisk};
use crate::{backing, sh};
use anyhow::{ensure, Context as _, Result};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// MiB of the disk. The load is in the first ten.
const SIZE: u32 = 12;
/// Number of backups; in each fifth night one is killed first.
const NIGHTS: usize = 30;
const KILLED: usize = 5;
const LIMIT: Duration = Duration::from_secs(120);
/// Folder of the backups, of the checksums of the frozen disk, and of the tapimg that writes those.
const FOLDER: &str = "/srv/vmtest/backups";
const SUMS: &str = "/srv/vmtest/backups.sums";
const TAPIMG: &str = "/srv/vmtest/backups.tapimg";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let about = "thirty backups of a disk under load, some of which are killed, leave its chain as it was, and each that is restored is the disk as of its snapshot";
    let nights = Case::new("backup.nights", about, SharedGuest::Pv, nights);
    let about = "a device with other content is kept without --force; with it the restored disk is there, zeros included";
    let onto = Case::new(
        "backup.onto_used_device",
        about,
        SharedGuest::Pv,
        onto_used_device,
    );
    let both = [nights, onto];
    both.map(|case| case.supervised().no_leaks().nightly())
        .into()
}

/// Makes the folder of the backups.
fn folder(context: &mut Context) -> Result<()> {
    fs::create_dir_all(FOLDER).context("cannot make the folder of backups")?;
    context.at_end(format!("remove {FOLDER}"), || {
        Ok(fs::remove_dir_all(FOLDER)?)
    });
    Ok(())
}

/// Makes a tapimg that writes the checksum of each frozen disk and the name of its backup before it copies it.
fn observe(context: &mut Context) -> Result<()> {
    let script = format!(
        "#!/bin/sh\n[ \"$3\" = convert ] && echo \"$(sha256sum <\"${{4#*:}}\") ${{5##*/}}\" >>{SUMS}\nexec tapimg \"$@\"\n"
    );
    folder(context)?;
    fs::write(SUMS, "")?;
    sh::program(TAPIMG, &script)?;
    context.at_end("remove the checksums", || {
        fs::remove_file(SUMS)?;
        Ok(fs::remove_file(TAPIMG)?)
    });
    Ok(())
}

/// Returns the checksum of the frozen disk for each file of a backup.
fn sums() -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(SUMS)?;
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let file = words.last().context("a name")?.trim_end_matches(".part");
        Ok((file.to_owned(), words.first().context("a sum")?.to_string()))
    };
    text.lines().map(line).collect()
}

/// Checks that the disk is served from its own image, and that nothing is beside that.
pub(super) fn check_chain(disk: &ServedDisk, base: &str) -> Result<()> {
    let listed = tap::ctl_json(&["list", "-m", &disk.minor.to_string()])?;
    let target = listed["disks"][0]["target"].as_str().unwrap_or_default();
    ensure!(target == format!("aio:{base}"), "the disk has {target}");
    let left = sh::shell("ls /srv/vmtest | grep '[.]backup-' || true")?;
    ensure!(left.trim().is_empty(), "a backup has left {left}");
    let marks = tap::ctl_json(&["dirty", "-m", &disk.minor.to_string()])?;
    let marks = marks["marks"].as_array().map_or(0, Vec::len);
    ensure!(marks == 1, "the disk has {marks} dirty bitmaps");
    Ok(())
}

fn nights(context: &mut Context) -> Result<()> {
    let base = full_image(context, "a.img", SIZE)?;
    let restored = image(context, "restored.img", SIZE)?;
    observe(context)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{base}"), VDEV, "w"))?;
    let domid = guest.domid.to_string();
    let back_up = format!("tap-ctl backup {domid} {VDEV} {FOLDER} --json --tapimg {TAPIMG}");
    let load = start_load_with(guest, "")?;
    let mut fulls = 0;
    for night in 0..NIGHTS {
        wait_progress(&disk, 40)?;
        if night % KILLED == KILLED - 1 {
            // Each time at a later moment. It may have ended before.
            let after = (night / KILLED + 1) * 100;
            sh::shell(&format!(
                "timeout -s KILL 0.{after:03} {back_up} >/dev/null 2>&1 || true"
            ))?;
        }
        let told = sh::run_for(&["sh", "-c", &back_up], LIMIT)?;
        let told: serde_json::Value = serde_json::from_str(&told).context("JSON")?;
        fulls += usize::from(told["backups"][0]["parent"].is_null());
        check_chain(&disk, &base)?;
    }
    let told = end_load(context.pv()?, load)?;
    ensure!(fulls <= 1, "{fulls} backups were full ones");
    sh::run_for(&["tap-ctl", "backup", "verify", FOLDER], LIMIT)?;
    let sums = sums()?;
    let listed = tap::ctl_json(&["backup", "list", FOLDER])?;
    let listed = listed["backups"].as_array().context("a list")?;
    ensure!(listed.len() >= NIGHTS, "there are {} backups", listed.len());
    for backup in listed {
        let word = |name: &str| backup[name].as_str().context("a word");
        let (id, to) = (word("id")?, format!("aio:{restored}"));
        let words = ["restore", FOLDER, &to, "--force", "--id", id];
        sh::run_for(&[&["tap-ctl"], &words[..]].concat(), LIMIT)?;
        let wanted = sums.get(word("file")?).context("no checksum")?;
        ensure!(
            sum(&restored)? == *wanted,
            "the backup {id} is not what the disk was"
        );
    }
    disk.detach(context.pv()?)?;
    context.note(&format!("{} backups; {told}", listed.len()))
}

/// MiB of a device behind the end of the disk that is restored onto it.
const BEHIND: u32 = 4;

fn onto_used_device(context: &mut Context) -> Result<()> {
    let base = image(context, "a.img", SIZE)?;
    folder(context)?;
    let device = context.null_blk(SIZE + BEHIND, &[])?.path();
    let whole = SIZE + BEHIND;
    sh::shell(&format!(
        "dd if=/dev/urandom of={device} bs=1M count={whole} oflag=direct status=none"
    ))?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{base}"), VDEV, "w"))?;
    // Most of the disk is a hole.
    guest.run(&format!(
        "dd if=/dev/urandom of=/dev/{VDEV} bs=1M seek=2 count=1 conv=fsync 2>/dev/null"
    ))?;
    let domid = guest.domid.to_string();
    sh::run_for(&["tap-ctl", "backup", &domid, VDEV, FOLDER], LIMIT)?;
    disk.detach(guest)?;
    let before = backing::sha256(&device, whole)?;
    let to = format!("aio:{device}");
    let words = ["tap-ctl", "restore", FOLDER, &to];
    let refused = sh::status(&words, LIMIT)?;
    ensure!(
        refused.rc != 0 && refused.text.contains(&device) && refused.text.contains("--force"),
        "the content of {device} was not protected: {}",
        refused.text
    );
    ensure!(
        backing::sha256(&device, whole)? == before,
        "a restore that was refused has written to {device}"
    );
    let behind = || {
        sh::shell(&format!(
            "dd if={device} bs=1M skip={SIZE} iflag=direct status=none | sha256sum"
        ))
    };
    let kept = behind()?;
    sh::run_for(&[&words[..], &["--force"]].concat(), LIMIT)?;
    ensure!(
        backing::sha256(&device, SIZE)? == backing::sha256(&base, SIZE)?,
        "{device} is not what the disk was"
    );
    ensure!(
        behind()? == kept,
        "the restore has written behind the end of the disk"
    );
    Ok(())
}
