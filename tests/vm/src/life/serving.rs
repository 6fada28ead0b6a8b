// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Ours serves, and its packages change below guests that work.

use super::groups::{self, GuestGroup};
use super::working::WorkingGuest;
use super::{host, Chapter, LifeStory};
use crate::cases::build_id;
use crate::tap;
use crate::{sh, sys, TestedDriver};
use anyhow::{ensure, Context, Result};
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
/// File that fills the file system.
const FILLER: &str = "/srv/filler";

pub(super) fn chapters() -> Vec<Chapter> {
    vec![
        Chapter {
            name: "life.booted",
            about: "after a boot ours serves phy and tap disks",
            tell: booted,
        },
        Chapter {
            name: "life.supervisor_dies",
            about: "systemd starts the supervisor again, and the journal can be asked about a disk",
            tell: supervisor_dies,
        },
        Chapter {
            name: "life.groups",
            about: "a guest has a control group, whose limits outlive the supervisor",
            tell: groups::groups,
        },
        Chapter {
            name: "life.upgraded",
            about: "supervisor and processes are replaced, then the module, while the guest works",
            tell: upgraded,
        },
        Chapter {
            name: "life.no_room",
            about: "a downgrade for which there is no room hurts nobody, and is done when there is",
            tell: no_room,
        },
        Chapter {
            name: "life.interrupted",
            about: "dpkg is killed in the middle of an upgrade: disks go on, and the upgrade ends when it is told to",
            tell: interrupted,
        },
        Chapter {
            name: "life.xens_tools",
            about: "Xen's scripts are installed again below ours, and both ways to a disk work",
            tell: xens_tools,
        },
        Chapter {
            name: "life.removed",
            about: "removal is refused below a tap disk, and leaves nothing without one",
            tell: removed,
        },
    ]
}

fn booted(story: &mut LifeStory) -> Result<()> {
    host::is_up()?;
    ensure!(
        host::is_active("blktapctrl.service")?,
        "nobody supervises tap disks"
    );
    let mut working = WorkingGuest::begin()?;
    working.is_served_by(TestedDriver::Rs)?;
    ensure!(!TestedDriver::C.is_loaded(), "the C driver is loaded, too");
    working.add_tap()?;
    story.working = Some(working);
    host::nothing_failed()
}

fn supervisor_dies(story: &mut LifeStory) -> Result<()> {
    let working = story.working()?;
    let process = working.disk()?.pid()?;
    host::replace_supervisor()?;
    working.goes_on()?;
    ensure!(
        working.disk()?.pid()? == process,
        "the disk has another process"
    );
    working.disk()?.replace()?;
    working.goes_on()?;
    let field = format!("BLKTAP_MINOR={}", working.disk()?.minor);
    let journal = ["journalctl", "-u", "blktapctrl", "-o", "json", &field];
    sh::wait_for("the journal's word of the death", LIMIT, || {
        Ok(sh::run(&journal)?.contains("\"BLKTAP_EVENT\":\"died\""))
    })
}

/// Has apt bring both packages to a version.
fn bring_to(version: &str) -> Result<String> {
    let [programs, module] = host::both(version)?;
    host::apt_does(&["install", "--allow-downgrades", &programs, &module])
}

/// Both packages change while the guest works, and with them the module and the processes that serve its disks.
/// `change` returns its output.
fn changed(story: &mut LifeStory, change: impl FnOnce() -> Result<String>) -> Result<()> {
    let working = story.working()?;
    let (supervisor, process, module) = (host::supervisor()?, working.disk()?.pid()?, build_id()?);
    let holder = host::property(groups::UNIT, "MainPID")?;
    let said = change()?;
    ensure!(
        host::supervisor()? != supervisor,
        "the supervisor is the old one: {said}"
    );
    ensure!(
        working.disk()?.pid()? != process,
        "the disk's process is the old one: {said}"
    );
    ensure!(
        host::property(groups::UNIT, "MainPID")? == holder,
        "the unit of the guests' groups was started anew below them: {said}"
    );
    let group = GuestGroup::of(working)?;
    group.has(working.disk()?.pid()?)?;
    group.is_limited()?;
    let listed = tap::ctl_json(&["list"])?;
    let listed = listed.to_string();
    ensure!(
        !listed.contains("\"replaced\":true"),
        "a process is not of the installed program: {listed}"
    );
    ensure!(
        said.contains("xen-blkback-rs exchange"),
        "it is not said that the module is the old one: {said}"
    );
    working.goes_on()?;
    ensure!(
        build_id()? == module,
        "the upgrade has exchanged the module"
    );
    sh::run_for(&["xen-blkback-rs", "exchange"], LIMIT)?;
    ensure!(build_id()? != module, "the module is the old one");
    working.goes_on()?;
    working.is_served_by(TestedDriver::Rs)?;
    host::nothing_failed()
}

fn upgraded(story: &mut LifeStory) -> Result<()> {
    let [_, next] = host::versions()?;
    changed(story, || bring_to(&next))
}

/// Fills the file system of the root.
fn fill() -> Result<()> {
    let filled = sh::status(
        &["dd", "if=/dev/zero", &format!("of={FILLER}"), "bs=1M"],
        LIMIT,
    )?;
    ensure!(
        filled.text.contains("No space left"),
        "the disk is not full: {}",
        filled.text
    );
    Ok(())
}

fn no_room(story: &mut LifeStory) -> Result<()> {
    let [version, _] = host::versions()?;
    let [programs, module] = host::both(&version)?;
    fill()?;
    let done = host::apt(&["install", "--allow-downgrades", &programs, &module]);
    let working = story.working()?;
    let went_on = working.goes_on();
    let answered = tap::ctl(&["list"]);
    std::fs::remove_file(FILLER)?;
    let done = done?;
    ensure!(done.rc != 0, "there was room: {}", done.text);
    went_on.context("while the disk was full")?;
    answered.context("while the disk was full")?;
    changed(story, || {
        // The place where the room ended decides which of these has work to do.
        let ended = host::dpkg_ends()?;
        let mended = host::apt_does(&["--fix-broken", "install"])?;
        Ok([ended, mended, bring_to(&version)?].concat())
    })
}

/// Returns dpkg's state of a package, as `installed` or `unpacked`.
fn dpkg_state(package: &str) -> Result<String> {
    let format = "--showformat=${db:Status-Status}";
    sh::run(&["dpkg-query", "--show", format, package])
}

fn interrupted(story: &mut LifeStory) -> Result<()> {
    let [_, next] = host::versions()?;
    let [programs, _] = host::packages()?;
    let was = (host::supervisor()?, story.working()?.disk()?.pid()?);
    let wanted = ["install", &format!("{programs}={next}")];
    let mut upgrade = host::apt_begins(&wanted)?;
    // Its files are being exchanged, or have been, and no program knows of that yet.
    sh::wait_for("the middle of the upgrade", LIMIT, || {
        Ok(dpkg_state(&programs)? != "installed")
    })?;
    sh::run(&["pkill", "-KILL", "-x", "dpkg"])?;
    let ended = upgrade.wait()?;
    ensure!(
        !ended.success(),
        "the upgrade has ended before dpkg was killed"
    );
    let left = dpkg_state(&programs)?;
    ensure!(left != "installed", "dpkg has ended before it was killed");
    let working = story.working()?;
    working.goes_on().context("while the packages are broken")?;
    let (supervisor, process) = was;
    ensure!(
        sys::kill(supervisor, 0).is_ok() && working.disk()?.pid()? == process,
        "the supervisor or the disk's process was ended by half an upgrade"
    );
    working.disk()?.replace()?;
    working
        .goes_on()
        .context("with a process of the half that is there")?;
    host::dpkg_ends()?;
    host::apt_does(&wanted)?;
    ensure!(
        dpkg_state(&programs)? == "installed",
        "the upgrade has not ended"
    );
    tap::wait_supervisor()?;
    working.goes_on()?;
    let [version, _] = host::versions()?;
    bring_to(&version)?;
    tap::wait_supervisor()?;
    working.goes_on()?;
    host::nothing_failed()
}

fn xens_tools(story: &mut LifeStory) -> Result<()> {
    sh::run(&["xentap-block", "enable"])?;
    let folder = std::fs::read_dir("/srv/xen")?;
    let package = folder
        .last()
        .context("there is no package of Xen's")??
        .path();
    let package = package.display().to_string();
    host::apt_does(&["install", "--reinstall", &package])?;
    let link = std::fs::read_link("/etc/xen/scripts/block")?;
    ensure!(
        link == Path::new("block-or-tap"),
        "our script is no longer in place: it is {}",
        link.display()
    );
    let working = story.working()?;
    working.attaches_both_ways()?;
    working.goes_on()
}

fn removed(story: &mut LifeStory) -> Result<()> {
    let packages = host::packages()?;
    let purge = ["purge", &packages[0], &packages[1]];
    let refused = host::apt(&purge)?;
    ensure!(
        refused.rc != 0 && refused.text.contains("tap-ctl list"),
        "it is not refused: {}",
        refused.text
    );
    let working = story.working()?;
    working.goes_on()?;
    ensure!(
        host::is_active("blktapctrl.service")?,
        "nobody supervises the disk that is still there"
    );
    let group = GuestGroup::of(working)?;
    story.working.take().context("nobody works")?.end()?;
    group.is_gone()?;
    host::apt_does(&purge)?;
    host::nothing_failed()?;
    for left in [
        "blktapctrl.service",
        "blktapctrl.socket",
        groups::UNIT,
        "xentap-metrics.timer",
    ] {
        ensure!(!host::is_active(left)?, "{left} is active");
    }
    ensure!(
        !Path::new("/run/xentap/control.sock").exists(),
        "the supervisor's socket is left"
    );
    Ok(())
}
