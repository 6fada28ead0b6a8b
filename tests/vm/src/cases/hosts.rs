// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Two hosts with one disk between them, and a record of the host that writes to it: guests move from one to the other,
//! and hosts die during that.
//!
//! A guest moves by `xl save` to a pipe whose other end is `xl restore` on the other host. `xl migrate` does that with
//! the pages copied twice, which Xen supports only for PVH guests here; and the emulator loses those when two machines
//! share its processors.

use super::lease::break_lease;
use super::tap::{end_load, same, start_load_with, wait_progress, VDEV};
use super::{Case, Context, SecondMachine, SharedGuest};
use crate::console::{Console, GuestJob};
use crate::guest::{log_path, AttachedVbd, Config, Guest, GuestKind};
use crate::peer::{self, PeerHost};
use crate::sh;
use crate::tap::{self, ServedDisk};
use anyhow::{bail, ensure, Context as _, Result};
use serde_json::Value;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

/// The image, and the record of its lease: two disks that both hosts have.
const IMAGE: &str = "/dev/vdc";
const RECORD: &str = "/dev/vdd";
/// Part of it that the guest uses, in MiB.
pub(super) const MIB: u32 = 16;
/// Time in which xl must move a guest, while two machines share the processors.
pub(super) const MOVE: Duration = Duration::from_secs(600);
pub(super) const LIMIT: Duration = Duration::from_secs(200);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![
        host_case(
            "hosts.there_and_back",
            "a guest moves to another host and back under verified load; one host at a time has the image",
            there_and_back,
        ),
        host_case(
            "hosts.destination_dies",
            "the destination dies in the middle of a move: the guest goes on where it was",
            destination_dies,
        ),
        host_case(
            "hosts.source_dies",
            "a host dies with the guest that has moved to it: its lease is broken, and what was flushed is there",
            source_dies,
        ),
    ]
}

/// Returns a case with a second host.
pub(super) fn host_case(name: &str, about: &str, run: fn(&mut Context) -> Result<()>) -> Case {
    Case::new(name, about, SharedGuest::Nothing, run)
        .supervised()
        .no_leaks()
        .nightly()
        .beside(SecondMachine::Host)
}

fn target() -> String {
    format!("lease=record:{RECORD},aio:{IMAGE}")
}

/// Returns the holder of the lease.
fn holder() -> Result<Value> {
    tap::ctl_json(&["lease", "show", &target()])
}

fn lease_is_here() -> Result<()> {
    let mine = holder()?;
    ensure!(
        mine["is_here"] == true,
        "this host has not the lease: {mine}"
    );
    Ok(())
}

/// Name of the guest that moves, on either host.
pub(super) const GUEST: &str = "moves";

/// All of its memory is sent, so there is little of it.
pub(super) fn config(name: &str) -> Config {
    Config {
        memory: 192,
        ..Config::new(name, GuestKind::Pv, 1)
    }
}

/// Starts a guest that works on a disk with this target.
pub(super) fn working_guest(target: &str) -> Result<(Guest, ServedDisk, [GuestJob; 2])> {
    peer::wait_up()?;
    let guest = Guest::create(config(GUEST))?;
    let disk = ServedDisk::attach(&guest, &tap::disk(target, VDEV, "w"))?;
    let load = start_load_with(&guest, "")?;
    wait_progress(&disk, 50)?;
    Ok((guest, disk, load))
}

/// A guest on the second host.
pub(super) struct AwayGuest {
    config: Config,
    pub(super) console: Console,
}

impl AwayGuest {
    /// Moves a guest there.
    fn to(guest: Guest) -> Result<AwayGuest> {
        let domid = guest.domid.to_string();
        sh::run_for(&["bash", "-c", &moving(&domid, PeerHost::Second)], MOVE)?;
        AwayGuest::arrived(guest)
    }

    /// Finds a guest of this host that has moved there.
    pub(super) fn arrived(guest: Guest) -> Result<AwayGuest> {
        let (config, next) = guest.left();
        wait_arrived_there(&config.name)?;
        let tty = peer::run(&format!(
            "xenstore-read /local/domain/$(xl domid {})/console/tty",
            config.name
        ))?;
        let bridge = format!("exec 3<>{}; cat <&3 & exec cat >&3", tty.trim());
        let stream: TcpStream = peer::connect(PeerHost::Second.address(), &bridge)?;
        let console = Console::over(OwnedFd::from(stream).into(), &log_path(&config.name), next)?;
        console.wait_agent(LIMIT)?;
        Ok(AwayGuest { config, console })
    }

    /// Moves it back.
    fn back(self, jobs: &[GuestJob]) -> Result<Guest> {
        peer::run(&moving(&self.config.name, PeerHost::First))?;
        wait_arrived(&self.config.name, |line| {
            Ok(sh::status(&["bash", "-c", line], LIMIT)?.rc == 0)
        })?;
        let next = self.console.next_job();
        Guest::arrived(self.config, next, jobs)
    }

    /// Runs a command that must succeed and returns its output.
    pub(super) fn run(&self, command: &str) -> Result<String> {
        self.console.run(command, LIMIT)
    }

    /// Has it store and flush a mark at this offset of its disk, in MiB.
    pub(super) fn store_mark(&self, at: u32) -> Result<()> {
        self.run(&format!(
            "echo {MARK} >/tmp/mark && dd if=/tmp/mark of=/dev/{VDEV} bs=1M seek={at} conv=sync,fsync"
        ))
        .map(drop)
    }

    /// Destroys it, and waits until the host there has no disk of it.
    pub(super) fn destroy(self) -> Result<()> {
        peer::run(&format!("xl destroy {}", self.config.name))?;
        sh::wait_for("the end of the disk on the second host", LIMIT, || {
            Ok(disks_there()?.is_empty())
        })
    }
}

/// Returns the line of shell that moves a guest to the other host. It fails if the guest is not sent, which then
/// resumes where it was.
fn moving(guest: &str, to: PeerHost) -> String {
    moving_by(&format!("xl save {guest}"), to, "")
}

/// Returns that line for another command that saves a guest, and with a configuration for the other host.
pub(super) fn moving_by(save: &str, to: PeerHost, config: &str) -> String {
    let address = to.address();
    // xl opens its input by a name, which a socket has not.
    let restore = format!("'cat | xl restore {config} /dev/stdin'");
    format!("{save} >(/t/vmtest reach {address} {restore} >/dev/null)")
}

/// Waits until a guest runs on the second host.
pub(super) fn wait_arrived_there(name: &str) -> Result<()> {
    wait_arrived(name, |line| peer::status(line).map(|(rc, _)| rc == "0"))
}

/// Waits until a guest runs on a host on which `is_true` executes a line of shell.
fn wait_arrived(name: &str, is_true: impl Fn(&str) -> Result<bool>) -> Result<()> {
    let line = format!("xl list {name} | grep -q -- ' [r-][b-]---- '");
    sh::wait_for("the guest on the other host", LIMIT, || is_true(&line))
}

/// Returns the tap disks of the second host.
pub(super) fn disks_there() -> Result<Vec<Value>> {
    let text = peer::run("tap-ctl --json list")?;
    let mut listed: Value = serde_json::from_str(&text)
        .with_context(|| format!("the second host's list is no JSON: {text}"))?;
    match listed["disks"].take() {
        Value::Array(disks) => Ok(disks),
        _ => bail!("the second host's list has no disks: {text}"),
    }
}

/// Returns the number of requests that the second host's driver has answered.
fn answered_there() -> Result<u64> {
    let all = peer::run("cat /sys/bus/xen-backend/devices/vbd-*/statistics/wr_done")?;
    Ok(all
        .lines()
        .filter_map(|line| line.parse::<u64>().ok())
        .sum())
}

/// Waits until the second host's driver has answered 50 more requests.
pub(super) fn wait_progress_there() -> Result<()> {
    let before = answered_there()?;
    sh::wait_for("answers of the second host", LIMIT, || {
        Ok(answered_there()? > before + 50)
    })
}

fn there_and_back(context: &mut Context) -> Result<()> {
    let (guest, disk, load) = working_guest(&target())?;
    lease_is_here()?;
    let away = AwayGuest::to(guest)?;
    disk.wait_gone()?;
    wait_progress_there()?;
    let theirs = holder()?;
    ensure!(
        theirs["is_here"] == false && theirs["host"] == "second",
        "the second host has not the lease: {theirs}"
    );
    refused("second")?;
    let guest = away.back(&load)?;
    let disk = ServedDisk::of(AttachedVbd::of(guest.domid, VDEV)?)?;
    wait_progress(&disk, 50)?;
    let told = end_load(&guest, load)?;
    same(&guest, IMAGE, MIB)?;
    disk.detach(&guest)?;
    guest.destroy()?;
    context.note(&told)
}

/// Checks that another disk of the image is refused, with the name of the holder.
fn refused(name: &str) -> Result<()> {
    let asked = sh::status(&["tap-ctl", "create", "-a", &target()], LIMIT)?;
    ensure!(
        asked.rc != 0 && asked.text.contains(name),
        "an image of host {name} was not refused: {}",
        asked.text
    );
    Ok(())
}

fn destination_dies(context: &mut Context) -> Result<()> {
    let (guest, disk, load) = working_guest(&target())?;
    let domid = guest.domid.to_string();
    let name = guest.config.name.clone();
    let line = moving(&domid, PeerHost::Second);
    let mover = thread::spawn(move || sh::status(&["bash", "-c", &line], MOVE));
    let incoming = sh::wait_for("the guest on the second host", LIMIT, || {
        let (rc, text) = peer::status("xl list")?;
        Ok(rc == "0" && text.contains(&name))
    });
    peer::cut_power()?;
    let moved = mover
        .join()
        .map_err(|_| anyhow::anyhow!("the move panicked"))??;
    incoming?;
    ensure!(moved.rc != 0, "a guest has moved to a host that is dead");
    wait_progress(&disk, 50)?;
    lease_is_here()?;
    let told = end_load(&guest, load)?;
    same(&guest, IMAGE, MIB)?;
    disk.detach(&guest)?;
    guest.destroy()?;
    context.note(&told)
}

/// Last data that a guest stores before its host dies.
const MARK: &str = "the last word";
/// Where it is in the image, in MiB: behind the area of the load.
const MARK_AT: u32 = 15;

/// Checks that a disk has the mark that was stored at this offset, in MiB.
pub(super) fn has_mark(guest: &Guest, at: u32) -> Result<()> {
    let said = guest.run(&format!(
        "dd if=/dev/{VDEV} bs=1M skip={at} count=1 2>/dev/null | head -n 1"
    ))?;
    ensure!(
        said.trim() == MARK,
        "what the guest had flushed is gone: {said:?}"
    );
    Ok(())
}

fn source_dies(context: &mut Context) -> Result<()> {
    let (guest, disk, _load) = working_guest(&target())?;
    let away = AwayGuest::to(guest)?;
    disk.wait_gone()?;
    wait_progress_there()?;
    away.store_mark(MARK_AT)?;
    let theirs = holder()?;
    let generation = theirs["generation"]
        .as_u64()
        .context("no generation")?
        .to_string();
    let alive = break_lease(&target(), &generation, LIMIT)?;
    ensure!(
        alive.rc != 0 && alive.text.contains("second"),
        "the lease of a host that lives was broken: {}",
        alive.text
    );
    peer::cut_power()?;
    let cut = Instant::now();
    refused("second")?;
    let broken = break_lease(&target(), &generation, LIMIT)?;
    ensure!(
        broken.rc == 0,
        "the lease of a dead host was not broken: {}",
        broken.text
    );
    let guest = Guest::create(config("again"))?;
    let disk = ServedDisk::attach(&guest, &tap::disk(&target(), VDEV, "w"))?;
    let again = cut.elapsed();
    has_mark(&guest, MARK_AT)?;
    disk.detach(&guest)?;
    guest.destroy()?;
    context.note(&format!(
        "served {} s after the host had died",
        again.as_secs()
    ))
}
