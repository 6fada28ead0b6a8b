// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A guest that serves disks of another guest, `backend=NAME`: the tests for it, whatever its system.

use crate::cases::{load, verify_job};
use crate::guest::{AttachedVbd, Config, Guest, GuestKind};
use crate::{sh, xs, TestedDriver};
use anyhow::{ensure, Context, Result};
use std::time::Duration;

/// Its name, as configurations of guests say it.
pub(crate) const NAME: &str = "back";
/// Block device in the domain of which it makes a phy disk.
pub(crate) const DEVICE: &str = "/dev/xvdb";
/// Name of the phy disk in the other guest; the tap disk is [`load::VDEV`].
const PHY_VDEV: &str = "xvda";
/// Number of deaths of the tap disk's process.
const DEATHS: u32 = 3;
const LIMIT: Duration = Duration::from_secs(120);

/// A driver domain, which has a disk to serve from: [`DEVICE`].
pub(crate) trait DriverDomain {
    /// The guest that it is.
    fn guest(&self) -> &Guest;
    /// Runs a command where its programs are.
    fn run(&self, command: &str) -> Result<String>;
    /// Returns the file there of which it makes a tap disk.
    fn image(&self) -> &'static str;
    /// Returns the logs that explain why a disk is missing.
    fn logs(&self) -> String;
}

/// Another guest works on a phy disk and on a tap disk of this domain, and gives both back.
pub(crate) fn serves_both(
    domain: &dyn DriverDomain,
    note: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    let mut config = Config::new("front", GuestKind::Pv, 1);
    let what = format!("backendtype=phy, target={DEVICE}");
    config.disks = vec![disk(&what, PHY_VDEV)];
    let guest = Guest::create(config)?;
    let phy = find(domain, &guest, PHY_VDEV)?;
    let job = verify_job(&format!("/dev/{PHY_VDEV}"), 16, 100, 512);
    guest.run_for(&job, load::FIO)?;
    note("phy: verified")?;

    let tap = attach_tap(domain, &guest)?;
    let jobs = load::start_load(&guest)?;
    for _ in 0..DEATHS {
        wait_load(domain, &tap)?;
        is_replaced(domain)?;
    }
    wait_load(domain, &tap)?;
    note(&load::end_load(&guest, jobs)?)?;
    for vbd in [&tap, &phy] {
        detach(&guest, vbd)?;
        wait_gone(domain, vbd)?;
    }
    guest.destroy()?;
    nothing_left(domain)
}

/// Gives the other guest a tap disk.
fn attach_tap(domain: &dyn DriverDomain, guest: &Guest) -> Result<AttachedVbd> {
    let image = domain.image();
    domain.run(&format!("truncate -s 32M {image}"))?;
    let tap = format!("script=block-tap-rs, target=aio:{image}");
    let tap = disk(&tap, load::VDEV);
    let command = ["xl", "block-attach", &guest.domid.to_string(), &tap];
    sh::run_for(&command, LIMIT)?;
    let tap = find(domain, guest, load::VDEV)?;
    guest.wait_disk(load::VDEV)?;
    Ok(tap)
}

/// A disk of this domain for another guest, in xl's syntax.
fn disk(what: &str, vdev: &str) -> String {
    format!("format=raw, vdev={vdev}, access=w, backend={NAME}, {what}")
}

/// A disk of the other guest, which ours must serve.
fn find(domain: &dyn DriverDomain, guest: &Guest, vdev: &str) -> Result<AttachedVbd> {
    let vbd = AttachedVbd::of_backend(domain.guest().domid, guest.domid, vdev)?;
    let link = format!("readlink {}/driver", vbd.sysfs().display());
    let serving = domain.run(&link)?;
    let name = serving.trim().rsplit('/').next();
    ensure!(
        name == Some(TestedDriver::Rs.bus_name()),
        "{serving} serves {} in {NAME}",
        vbd.backend
    );
    Ok(vbd)
}

/// Waits until some writes were answered.
fn wait_load(domain: &dyn DriverDomain, vbd: &AttachedVbd) -> Result<()> {
    let file = format!("cat {}/statistics/wr_done", vbd.sysfs().display());
    let done = || -> Result<u64> { Ok(domain.run(&file)?.trim().parse()?) };
    let before = done()?;
    sh::wait_for("a load on the disk", LIMIT, || Ok(done()? > before + 100))
}

/// Returns the process of the tap disk; empty while there is none.
fn process(domain: &dyn DriverDomain) -> Result<String> {
    domain.run("pgrep -o tapdisk || true")
}

/// Kills the process of the tap disk, and waits for another one.
fn is_replaced(domain: &dyn DriverDomain) -> Result<()> {
    let old = process(domain)?;
    ensure!(!old.is_empty(), "no process serves the tap disk in {NAME}");
    domain.run("pkill -KILL tapdisk")?;
    sh::wait_for("another tapdisk in the driver domain", LIMIT, || {
        let new = process(domain)?;
        Ok(!new.is_empty() && new != old)
    })
}

/// Takes a disk away from the other guest.
fn detach(guest: &Guest, vbd: &AttachedVbd) -> Result<()> {
    let command = ["xl", "block-detach", &guest.domid.to_string(), &vbd.vdev];
    sh::run_for(&command, LIMIT).map(drop)
}

/// Waits until nothing of a disk is left there.
fn wait_gone(domain: &dyn DriverDomain, vbd: &AttachedVbd) -> Result<()> {
    let there = format!("[ -e {} ]", vbd.sysfs().display());
    sh::wait_for("the end of a disk in the driver domain", LIMIT, || {
        let there = domain.guest().status(&there)?;
        Ok(there.rc != 0 && xs::read(&format!("{}/state", vbd.backend))?.is_none())
    })
}

/// Waits until no disk and no process of one is left there.
pub(crate) fn nothing_left(domain: &dyn DriverDomain) -> Result<()> {
    let left = "pgrep -l tapdisk; ls /sys/bus/xen-backend/devices";
    let mut last = String::new();
    let gone = sh::wait_for("the end of all disks in the driver domain", LIMIT, || {
        last = domain.run(left)?;
        Ok(last.trim().is_empty())
    });
    gone.with_context(|| format!("it has: {last}"))
}
