// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Permissions of the nodes and images of tap disks: the supervisor opens them, and hands each process its own.

use super::tap::{image, VDEV};
use super::{Case, Context, SharedGuest};
use crate::tap::{self, ServedDisk};
use crate::{node, sh};
use anyhow::{ensure, Context as _, Result};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Name of the second disk.
const OTHER: &str = "xvdc";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![Case::new(
        "tap.permissions",
        "nobody else opens a node or talks to the supervisor, and a process has its own disk alone",
        SharedGuest::Pv,
        permissions,
    )
    .supervised()
    .no_leaks()]
}

fn permissions(context: &mut Context) -> Result<()> {
    let images = [image(context, "a.img", 4)?, image(context, "b.img", 4)?];
    for image in &images {
        fs::set_permissions(image, fs::Permissions::from_mode(0o600))?;
    }
    let guest = context.pv()?;
    let mine = ServedDisk::attach(guest, &tap::disk(&format!("aio:{}", images[0]), VDEV, "w"))?;
    let other = ServedDisk::attach(guest, &tap::disk(&format!("aio:{}", images[1]), OTHER, "w"))?;
    let pids = [mine.pid()?, other.pid()?];
    pids.iter().try_for_each(|pid| check_process(*pid))?;
    let user = ids(pids[0])?;
    let control = format!("{}/control", tapdev::control::FOLDER);
    for node in [node::path(mine.minor), node::path(other.minor), control] {
        let meta = fs::metadata(&node).with_context(|| format!("{node} is not there"))?;
        ensure!(
            meta.uid() == 0 && meta.mode() & 0o077 == 0,
            "{node} belongs to {} and has the mode {:o}",
            meta.uid(),
            meta.mode() & 0o777
        );
        refused(user, &["dd", &format!("if={node}"), "count=0"])?;
        refused((NOBODY, NOBODY), &["dd", &format!("if={node}"), "count=0"])?;
    }
    // The image of a disk is not even open to the user of the processes by its name.
    refused(user, &["dd", &format!("if={}", images[1]), "count=1"])?;
    for who in [user, (NOBODY, NOBODY)] {
        refused(who, &["tap-ctl", "list"])?;
    }
    let mut theirs = Vec::new();
    for (pid, (image, disk)) in pids.iter().zip(images.iter().zip([&mine, &other])) {
        let open = files(*pid)?;
        let (node, image) = (node::path(disk.minor), image.clone());
        for wanted in [&node, &image] {
            ensure!(
                open.contains(wanted),
                "tapdisk {pid} has {open:?} open, but not {wanted}"
            );
        }
        theirs.push((open, [node, image]));
    }
    for (at, (open, _)) in theirs.iter().enumerate() {
        let foreign = theirs[1 - at].1.iter().find(|file| open.contains(file));
        ensure!(
            foreign.is_none(),
            "tapdisk {} has {foreign:?} of the other disk open",
            pids[at]
        );
    }
    let guest = context.pv()?;
    other.detach(guest)?;
    mine.detach(guest)
}

/// Number of the unprivileged user and group.
const NOBODY: u32 = 65534;

/// User and group of a process.
fn ids(pid: u32) -> Result<(u32, u32)> {
    let status = sh::get(format!("/proc/{pid}/status"))?;
    let id = |name: &str| -> Result<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let first = line.and_then(|line| line.split_whitespace().next());
        first
            .and_then(|word| word.parse().ok())
            .with_context(|| format!("/proc/{pid}/status has no {name}"))
    };
    Ok((id("Uid:")?, id("Gid:")?))
}

/// Checks that this command of this user fails because it is not allowed.
fn refused((uid, gid): (u32, u32), argv: &[&str]) -> Result<()> {
    let out = Command::new(argv[0])
        .args(&argv[1..])
        .env("LC_ALL", "C")
        .uid(uid)
        .gid(gid)
        .output()
        .with_context(|| format!("cannot start {}", argv[0]))?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(
        !out.status.success() && said.contains("ermission denied"),
        "user {uid} may run `{}` ({}): {said}",
        argv.join(" "),
        out.status
    );
    Ok(())
}

/// The files that a process has open.
fn files(pid: u32) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let place = entry?.path();
        match fs::read_link(&place) {
            Ok(target) => found.push(target.to_string_lossy().into_owned()),
            // The file was closed in between.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot look at {}", place.display()))
            }
        }
    }
    Ok(found)
}

/// Checks that the process is unprivileged: it is not root, has no capabilities, and has no way to get any; in all of
/// its threads, each of which has credentials and a filter of its own.
pub(super) fn check_process(pid: u32) -> Result<()> {
    let mut threads = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = format!("{}/status", entry?.path().display());
        match check_thread(&path) {
            // Workers of io_uring come and go.
            Err(_) if !Path::new(&path).exists() => {}
            result => {
                result?;
                threads += 1;
            }
        }
    }
    // One thread serves, and one executes calls that may sleep.
    ensure!(threads > 1, "tapdisk {pid} has {threads} threads");
    Ok(())
}

/// Checks the thread whose folder is `path`.
fn check_thread(path: &str) -> Result<()> {
    let status = sh::get(path)?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
            .with_context(|| format!("{path} has no {name}"))
    };
    ensure!(
        !field("Uid:")?.split_whitespace().any(|id| id == "0")
            && !field("Gid:")?.split_whitespace().any(|id| id == "0"),
        "{path}: it runs as root"
    );
    for (name, wanted) in [
        ("CapEff:", "0000000000000000"),
        ("CapPrm:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
    ] {
        let is = field(name)?;
        ensure!(is == wanted, "{path}: {name} is {is}, not {wanted}");
    }
    Ok(())
}
