// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk is an export of an NBD server.

use super::formats::of_guest;
use super::snapshot::sum;
use super::tap::{end_load, full_image, start_load_with, wait_progress, VDEV};
use super::{Case, Context, SharedGuest};
use crate::sh;
use crate::tap::{self, EventLog, ServedDisk};
use anyhow::{ensure, Context as _, Result};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// MiB of the disk. The load is in the first ten.
const SIZE: u32 = 16;
/// Deaths of the server.
const DEATHS: u32 = 3;
/// A server takes so long to start, or an event to come, at most.
const LIMIT: Duration = Duration::from_secs(60);
/// Time limit for a tapdisk, whose requests may be anywhere on a network.
const FENCE: Duration = Duration::from_secs(150);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, SharedGuest::Pv, run)
            .supervised()
            .no_leaks()
    };
    vec![
        case(
            "export.server_dies",
            "an export of QEMU's NBD server under load that is judged, while the server is killed and started again",
            server_dies,
        ).nightly(),
        case(
            "export.tapdisk_dies",
            "the same while its tapdisk is killed: what may still be executed is waited for",
            tapdisk_dies,
        )
        .nightly(),
    ]
}

/// QEMU's server of an image.
pub(super) struct QemuServer {
    child: Child,
    image: String,
}

impl QemuServer {
    pub(super) fn start(image: &str) -> Result<Self> {
        let image = image.to_owned();
        Ok(Self {
            child: spawn(&image)?,
            image,
        })
    }

    pub(super) fn end(&mut self) -> Result<()> {
        self.child.kill().context("cannot kill qemu-nbd")?;
        self.child.wait().context("qemu-nbd does not end")?;
        sh::run(&["rm", "-f", &socket(&self.image)]).map(drop)
    }

    pub(super) fn target(&self) -> String {
        format!("nbd+unix:///disk?socket={}", socket(&self.image))
    }
}

impl Drop for QemuServer {
    fn drop(&mut self) {
        // The server may have ended already, and another failure cannot be handled here.
        let _ = self.end();
    }
}

fn socket(image: &str) -> String {
    format!("{image}.sock")
}

fn spawn(image: &str) -> Result<Child> {
    let socket = socket(image);
    let child = Command::new("qemu-nbd")
        .args(["--persistent", "--shared=0", "--format=raw", "--cache=none"])
        .args(["--discard=unmap", "--export-name=disk", "--socket", &socket])
        .arg(image)
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start qemu-nbd")?;
    let listens = || Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok());
    sh::wait_for("qemu-nbd, which is to listen", LIMIT, listens)?;
    Ok(child)
}

fn under_load(
    context: &mut Context,
    work: impl FnOnce(&ServedDisk, &mut QemuServer) -> Result<()>,
) -> Result<()> {
    let image = full_image(context, "a.img", SIZE)?;
    let mut server = QemuServer::start(&image)?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&server.target(), VDEV, "w"))?;
    let load = start_load_with(guest, "")?;
    wait_progress(&disk, 40)?;
    work(&disk, &mut server)?;
    let told = end_load(guest, load)?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    server.end()?;
    let found = sum(&image)?;
    ensure!(seen == found, "the guest read {seen}, dom0 reads {found}");
    context.note(&told)
}

fn server_dies(context: &mut Context) -> Result<()> {
    let events = EventLog::follow()?;
    under_load(context, |disk, server| {
        for _ in 0..DEATHS {
            server.end()?;
            // Requests wait for it, and none fails.
            server.child = spawn(&server.image)?;
            wait_progress(disk, 40)?;
        }
        let minor = disk.minor.to_string();
        let stats = tap::ctl_json(&["stats", "-m", &minor])?;
        let connections = stats["driver"]["nbd_connections"].as_u64();
        ensure!(
            connections == Some(u64::from(DEATHS) + 1),
            "after {DEATHS} deaths of the server: {stats}"
        );
        let told = events.wait_for("reconnected", disk.minor, LIMIT)?;
        let place = told["path"].as_str().unwrap_or_default();
        ensure!(place == server.target(), "what is told is {told}");
        is_said(disk, &server.target())
    })
}

/// Checks that the process's own messages are in the supervisor's log, each as a line about its disk.
fn is_said(disk: &ServedDisk, target: &str) -> Result<()> {
    let (minor, pid) = (disk.minor, disk.pid()?);
    let line = format!("disk {minor}: tapdisk {pid}: {target} is connected again");
    sh::wait_for("what the tapdisk says of its connection", LIMIT, || {
        Ok(tap::log_tail()?.contains(&line))
    })
}

fn tapdisk_dies(context: &mut Context) -> Result<()> {
    under_load(context, |disk, _| {
        let old = disk.kill()?;
        let replaced = || Ok(disk.info()?.pid != old && disk.info()?.replayed > 0);
        sh::wait_for(
            "what the dead process had to be executed again",
            FENCE,
            replaced,
        )?;
        wait_progress(disk, 40)
    })
}
