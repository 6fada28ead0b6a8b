// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks of guests that run get another driver.

use super::basic::{compare, verify_job, FIO};
use super::faults::wait_load;
use super::hung::{hangable, host_is_well};
use super::lifecycle::{end_job, long_job, wait_saved};
use super::tap::{end_load, image, same, start_load, wait_progress, VDEV};
use super::{load_driver, Case, Context, SharedGuest, QUEUES};
use crate::guest::{AttachedVbd, Guest};
use crate::tap::{self, ServedDisk};
use crate::{hotplug, seed, sh, TestedDriver};
use anyhow::{ensure, Context as _, Result};
use sim::rng::Rng;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Place where a package's upgrade keeps the loaded module.
const COPY: &str = "/run/xen-blkback-rs/loaded.ko";
/// The host's settings while a module is exchanged.
const SETTINGS: &str = "/etc/modprobe.d/exchange.conf";
const PROGRAM: &str = "xen-blkback-takeover";
const LIMIT: Duration = Duration::from_secs(120);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Pv, PvWide, Pvh};
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run)
    };
    vec![
        case(
            "takeover.load",
            "disks of a guest go to the C driver and back while it verifies, and it sees pauses",
            PvWide,
            |context| there_and_back(context, PvWide, 1),
        ),
        case(
            "takeover.load_often",
            "disks of a guest go to the C driver and back three times while it verifies",
            PvWide,
            |context| there_and_back(context, PvWide, 3),
        )
        .nightly(),
        case(
            "takeover.pvh",
            "the same with a PVH guest",
            Pvh,
            |context| there_and_back(context, Pvh, 3),
        )
        .nightly(),
        case(
            "takeover.module",
            "the module is exchanged while a guest verifies: it sees two pauses",
            Pv,
            module,
        ),
        case(
            "takeover.exchange",
            "the module is exchanged below phy and tap disks while their guest verifies; one that cannot be loaded gives way",
            Pv,
            exchange,
        ).nightly()
        .supervised(),
        case(
            "takeover.hung",
            "a disk whose storage does not answer keeps its driver, and its guest goes on",
            Pv,
            hung,
        ).nightly(),
        case(
            "takeover.killed",
            "whenever the program is killed, asked again it puts everything right",
            Pv,
            killed,
        )
        .nightly(),
    ]
}

/// Both drivers are loaded for the time of a case, and only ours afterwards.
fn with_both(context: &mut Context) -> Result<()> {
    // As many queues as ours takes.
    sh::run(&[
        "modprobe",
        "--ignore-install",
        TestedDriver::C.module(),
        "max_queues=4",
    ])?;
    context.at_end("unload the C driver", || {
        match TestedDriver::C.is_loaded() {
            true => sh::run(&["rmmod", TestedDriver::C.module()]).map(drop),
            false => Ok(()),
        }
    });
    Ok(())
}

/// Switches to a driver; returns the result and the guest's pause.
fn take_over(guest: &Guest, to: TestedDriver, more: &[&str]) -> Result<(i32, serde_json::Value)> {
    let domid = guest.domid.to_string();
    let asked = [
        &[PROGRAM, "--json", "--to", to.module(), "--domain", &domid],
        more,
    ]
    .concat();
    let done = sh::status(&asked, LIMIT)?;
    let line = done.text.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("{PROGRAM} says: {}", done.text))?;
    Ok((done.rc, serde_json::from_str(line)?))
}

fn is_served_by(vbd: &AttachedVbd, driver: TestedDriver) -> Result<()> {
    let serving = vbd.driver()?;
    ensure!(
        serving == driver.bus_name(),
        "{} is served by {serving}, not by {}",
        vbd.backend,
        driver.bus_name()
    );
    Ok(())
}

/// Starts the program and does not wait for it.
fn start(domid: &str, to: TestedDriver, more: &[&str]) -> Result<Child> {
    Command::new(PROGRAM)
        .args(["--to", to.module(), "--domain", domid])
        .args(more)
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {PROGRAM}"))
}

fn there_and_back(context: &mut Context, needs: SharedGuest, rounds: usize) -> Result<()> {
    let (device, idle) = (context.null_blk(32, &[])?, context.null_blk(16, &[])?);
    with_both(context)?;
    let guest = match needs {
        SharedGuest::Pvh => context.pvh()?,
        _ => context.wide()?,
    };
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let other = guest.attach(&hotplug::disk(&idle.path(), "xvdb", "w")?)?;
    let job = guest.start(&long_job(8))?;
    let mut pauses = Vec::new();
    for to in [TestedDriver::C, TestedDriver::Rs].repeat(rounds) {
        wait_load(&vbd)?;
        let (rc, said) = take_over(guest, to, &[])?;
        ensure!(rc == 0, "to {}: {said}", to.module());
        pauses.extend(said["paused_ms"].as_u64());
        for vbd in [&vbd, &other] {
            is_served_by(vbd, to)?;
        }
    }
    end_job(guest, &vbd, job)?;
    compare(guest, "xvda", &device.path(), 8)?;
    guest.run("dd if=/dev/xvdb of=/dev/null bs=1M count=1 iflag=direct")?;
    guest.detach(&vbd)?;
    guest.detach(&other)?;
    context.note(&format!("paused for {pauses:?} ms"))
}

/// Switches to the C driver and back, unloading the other one each time.
fn module(context: &mut Context) -> Result<()> {
    let device = context.null_blk(32, &[])?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let job = guest.start(&long_job(8))?;
    for to in [TestedDriver::C, TestedDriver::Rs] {
        wait_load(&vbd)?;
        let done = sh::status(&[PROGRAM, "--to", to.module()], LIMIT)?;
        ensure!(done.rc == 0, "to {}: {}", to.module(), done.text);
        ensure!(
            to.is_loaded() && !to.other().is_loaded(),
            "not {} alone is loaded: {}",
            to.module(),
            done.text
        );
        is_served_by(&vbd, to)?;
    }
    end_job(guest, &vbd, job)?;
    compare(guest, "xvda", &device.path(), 8)?;
    guest.detach(&vbd)?;
    // With what other cases need.
    load_driver(TestedDriver::Rs)
}

/// The module that is loaded, as Linux and the files of modules name it.
pub(crate) fn build_id() -> Result<Vec<u8>> {
    let path = "/sys/module/xen_blkback_rs/notes/.note.gnu.build-id";
    let note = std::fs::read(path).with_context(|| format!("cannot read {path}"))?;
    let at = note.len().checked_sub(20).context("a short note")?;
    Ok(note[at..].to_vec())
}

/// Returns the module with another build identifier.
fn another_build(module: &[u8]) -> Result<Vec<u8>> {
    let id = build_id()?;
    let mut other = module.to_vec();
    let mut places =
        (0..other.len().saturating_sub(id.len())).filter(|at| module[*at..].starts_with(&id));
    let at = places
        .next()
        .context("the installed module is not the one that is loaded")?;
    ensure!(places.next().is_none(), "the identifier is there twice");
    other[at] ^= 0xff;
    Ok(other)
}

/// Returns the file that modprobe loads; its content is restored at the end of the case.
fn installed_module(context: &mut Context) -> Result<(String, Vec<u8>)> {
    let said = sh::run(&[
        "modprobe",
        "--ignore-install",
        "--show-depends",
        TestedDriver::Rs.module(),
    ])?;
    let path = said
        .split_whitespace()
        .find(|word| word.contains("xen-blkback-rs.ko"));
    let path = path
        .with_context(|| format!("modprobe says: {said}"))?
        .to_owned();
    let (content, theirs) = (std::fs::read(&path)?, path.clone());
    let back = content.clone();
    context.at_end("the installed module", move || {
        Ok(std::fs::write(theirs, back)?)
    });
    Ok((path, content))
}

/// The driver gets the number of queues that the cases use from the host's settings: it is on no command line.
fn with_settings(context: &mut Context) -> Result<()> {
    std::fs::write(SETTINGS, format!("options xen-blkback-rs {QUEUES}\n"))?;
    for file in [SETTINGS, COPY] {
        context.at_end(
            format!("remove {file}"),
            move || match std::fs::remove_file(file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
                _ => Ok(()),
            },
        );
    }
    Ok(())
}

/// Exchanges the module; returns the exit code and the output.
fn exchanged() -> Result<(i32, serde_json::Value)> {
    let done = sh::status(&[PROGRAM, "--json", "exchange"], LIMIT)?;
    let line = done.text.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("{PROGRAM} says: {}", done.text))?;
    Ok((done.rc, serde_json::from_str(line)?))
}

fn exchange(context: &mut Context) -> Result<()> {
    const ROUNDS: usize = 4;
    let device = context.null_blk(32, &[])?;
    let image = image(context, "exchange.img", 16)?;
    let (path, original) = installed_module(context)?;
    with_settings(context)?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    let job = guest.start(&long_job(8))?;
    let load = start_load(guest)?;
    let (rc, said) = exchanged()?;
    ensure!(
        rc == 0 && said["paused_ms"].is_null(),
        "it is the installed one: {said}"
    );
    let other = another_build(&original)?;
    std::fs::write(&path, &other)?;
    let (rc, said) = exchanged()?;
    let why = said["why"].as_str().unwrap_or_default();
    ensure!(
        rc == 1 && why.contains("no way back"),
        "without a copy: {said}"
    );
    let mut pauses = Vec::new();
    for (next, before) in [(&other, &original), (&original, &other)].repeat(ROUNDS / 2) {
        wait_load(&vbd)?;
        wait_progress(&disk, 40)?;
        std::fs::write(COPY, before)?;
        std::fs::write(&path, next)?;
        let (id, pid) = (build_id()?, disk.pid()?);
        let (rc, said) = exchanged()?;
        ensure!(
            rc == 0 && said["is_done"] == true,
            "it was not exchanged: {said}"
        );
        ensure!(build_id()? != id, "the same module is loaded: {said}");
        ensure!(disk.pid()? != pid, "the process was not: {said}");
        pauses.extend(said["paused_ms"].as_u64());
        is_served_by(&vbd, TestedDriver::Rs)?;
    }
    std::fs::write(COPY, &original)?;
    std::fs::write(&path, "this is no module")?;
    let (rc, said) = exchanged()?;
    ensure!(
        rc == 1 && said["is_as_before"] == true,
        "it cannot be loaded: {said}"
    );
    is_served_by(&vbd, TestedDriver::Rs)?;
    std::fs::write(&path, &original)?;
    wait_load(&vbd)?;
    wait_progress(&disk, 40)?;
    context.note(&format!(
        "paused for {pauses:?} ms, and to no avail for {} ms",
        said["paused_ms"]
    ))?;
    let guest = context.pv()?;
    // Both loads end with that.
    end_load(guest, load)?;
    wait_saved(guest, job)?;
    compare(guest, "xvda", &device.path(), 8)?;
    same(guest, &image, 16)?;
    guest.detach(&vbd)?;
    disk.detach(guest)?;
    // A setting in two places would be refused.
    std::fs::remove_file(SETTINGS)?;
    load_driver(TestedDriver::Rs)
}

fn hung(context: &mut Context) -> Result<()> {
    let disk = hangable(context)?;
    with_both(context)?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&disk.path(), "xvda", "w")?)?;
    let before = vbd.statistic("wr_req")?;
    disk.suspend()?;
    let job = guest.start(&verify_job("/dev/xvda", 8, 100, 512))?;
    sh::wait_for("writes that hang", Duration::from_secs(60), || {
        Ok(vbd.statistic("wr_req")? > before)
    })?;
    let domid = guest.domid.to_string();
    let mut child = start(&domid, TestedDriver::C, &["--patience", "15"])?;
    sh::wait_for("a guest that is paused", LIMIT, || {
        Ok(sh::run(&["xl", "list", &domid])?.contains("--p---"))
    })?;
    host_is_well(context, "a guest is paused whose storage does not answer")?;
    let ended = child.wait()?;
    ensure!(ended.code() == Some(1), "it was not refused: {ended}");
    let guest = context.pv()?;
    let (rc, said) = take_over(guest, TestedDriver::C, &["--patience", "1"])?;
    let why = said["left"][0]["why"].as_str().unwrap_or_default();
    ensure!(
        rc == 1 && why.contains("are not answered"),
        "exit code {rc}: {said}"
    );
    is_served_by(&vbd, TestedDriver::Rs)?;
    disk.resume()?;
    let guest = context.pv()?;
    let done = guest.wait(job, FIO)?;
    done.succeeded("fio failed")?;
    let (rc, said) = take_over(guest, TestedDriver::C, &[])?;
    ensure!(rc == 0, "after the storage came back: {said}");
    compare(guest, "xvda", &disk.path(), 8)?;
    let (rc, said) = take_over(guest, TestedDriver::Rs, &[])?;
    ensure!(rc == 0, "and back: {said}");
    guest.detach(&vbd)
}

fn killed(context: &mut Context) -> Result<()> {
    const ROUNDS: usize = 16;
    let device = context.null_blk(32, &[])?;
    with_both(context)?;
    let guest = context.pv()?;
    let domid = guest.domid.to_string();
    let vbd = guest.attach(&hotplug::disk(&device.path(), "xvda", "w")?)?;
    let job = guest.start(&long_job(8))?;
    let mut rng = Rng::new(seed::get());
    for to in [TestedDriver::C, TestedDriver::Rs].repeat(ROUNDS / 2) {
        wait_load(&vbd)?;
        let mut child = start(&domid, to, &[])?;
        // Anywhere on its way, which takes so long here.
        std::thread::sleep(Duration::from_millis(rng.below(700)));
        child.kill()?;
        child.wait()?;
        // A finished step is not repeated.
        let asked = [PROGRAM, "--to", to.module(), "--domain", &domid];
        let done = sh::status(&asked, LIMIT)?;
        ensure!(done.rc == 0, "asked again: {}", done.text);
        is_served_by(&vbd, to)?;
    }
    end_job(guest, &vbd, job)?;
    compare(guest, "xvda", &device.path(), 8)?;
    guest.detach(&vbd)
}
