// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks on DRBD between two hosts: the hotplug script makes a resource Primary, and the driver serves its device.
//!
//! Each host has a disk of its own below the resource; both are files beside the machines, and outlive a power cut.

use super::ceph::fill;
use super::ceph_faults::wait_answers;
use super::hosts::{
    config, has_mark, host_case, moving_by, wait_arrived_there, wait_progress_there, AwayGuest,
    GUEST, LIMIT, MIB, MOVE,
};
use super::tap::{end_load_over, forget_refused, start_load_with, VDEV};
use super::{Case, Context};
use crate::cluster::{self, ScriptResult};
use crate::console::GuestJob;
use crate::guest::Guest;
use crate::peer::{self, PeerHost};
use crate::{backing, sh, tap};
use anyhow::{ensure, Result};

/// The target of the disk.
const TARGET: &str = "drbd:r0";
/// The resource's device, on both hosts.
const DEVICE: &str = "/dev/drbd0";
/// The disk below it on each host. Both hosts see both disks.
const OURS: &str = "/dev/vdc";
const THEIRS: &str = "/dev/vdd";
/// Prints how both hosts are.
const STATE: &str = "drbdadm role r0 && drbdadm cstate r0 && drbdadm dstate r0";
/// Both hosts reach each other, and have equal data.
const WELL: &str = "Connected UpToDate/UpToDate";

/// The resource, as a file of the folder `/etc/drbd.d`. A machine that waits for processors is not dead.
const RESOURCE: &str = "resource r0 { protocol C; device /dev/drbd0; meta-disk internal; \
     net { timeout 100; connect-int 15; ping-int 15; ping-timeout 100; } \
     on first { disk /dev/vdc; address 10.0.0.1:7788; } on second { disk /dev/vdd; address 10.0.0.2:7788; } }";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![
        host_case(
            "hosts.drbd_moves",
            "a guest moves under verified load: two hosts are Primary in that moment only, and a second guest is refused",
            moves,
        ),
        host_case(
            "hosts.drbd_dies",
            "the host that is Primary dies: the other one has all that was flushed, and late data of the first are replaced",
            dies,
        ),
        host_case(
            "hosts.drbd_split",
            "both hosts have written without each other: the disk is refused until an administrator has chosen",
            split,
        ),
    ]
}

/// Runs a line of shell on both hosts, at once.
fn on_both(line: &str) -> Result<()> {
    std::thread::scope(|scope| {
        let there = scope.spawn(|| peer::run(line));
        sh::shell(line)?;
        let there = there.join();
        there.map_err(|_| anyhow::anyhow!("the thread panicked"))?
    })
    .map(drop)
}

/// Makes the resource's configuration, on a host that has booted.
fn configured() -> String {
    format!("echo '{RESOURCE}' >/etc/drbd.d/r0.res && modprobe drbd")
}

/// Makes the resource on both hosts, with equal data, until the end of the case.
fn make_resource(context: &mut Context) -> Result<()> {
    peer::wait_up()?;
    context.at_end("take the resource down", || {
        // A case that failed may have left a guest there.
        let guests = "xl list | awk 'NR > 2 { print $1 }'";
        peer::run(&format!("for guest in $({guests}); do xl destroy $guest; done"))?;
        // The disks are also an image and the record of its lease.
        on_both("drbdadm down r0 && rmmod drbd")?;
        sh::shell("for disk in vdc vdd; do dd if=/dev/zero of=/dev/$disk bs=1M oflag=direct status=none; done; true")
            .map(drop)
    });
    on_both(&format!(
        "{} && drbdadm create-md --force r0 && drbdadm up r0",
        configured()
    ))?;
    wait_state("Connected Inconsistent/Inconsistent")?;
    // Both disks are new, so nothing has to be copied.
    sh::shell("drbdadm new-current-uuid --clear-bitmap r0/0")?;
    wait_state(WELL)
}

/// The state as one line: both roles, the connection, and both disks.
fn state() -> Result<String> {
    Ok(sh::shell(STATE)?
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" "))
}

/// Waits until connection and disks are so.
fn wait_state(wanted: &str) -> Result<()> {
    sh::wait_for(&format!("DRBD to be {wanted}"), LIMIT, || {
        Ok(state()?.ends_with(wanted))
    })
}

/// Waits until this host and its peer have these roles, in this order.
fn wait_roles(wanted: &str) -> Result<()> {
    sh::wait_for(&format!("the roles {wanted}"), LIMIT, || {
        Ok(state()?.starts_with(wanted))
    })
}

/// Checks that two hosts may not be Primary, on either of them.
fn one_primary() -> Result<()> {
    on_both("! drbdsetup show r0 | grep -E 'allow-two-primaries([[:space:]]+yes)?;'")
}

fn disk() -> String {
    tap::disk(TARGET, VDEV, "w")
}

/// Checks that a guest of this host does not get the disk, with these words.
fn refused(guest: &Guest, words: &str) -> Result<()> {
    match cluster::attach(guest, TARGET, VDEV)? {
        ScriptResult::Attached(_) => anyhow::bail!("{TARGET} was attached"),
        ScriptResult::Refused(why) => {
            forget_refused(&guest.domid.to_string(), VDEV)?;
            ensure!(
                why.contains(words),
                "the refusal does not say `{words}`: {why}"
            );
            Ok(())
        }
    }
}

/// Moves a guest as `xl migrate` does: its disk is attached there before it is detached here.
fn move_away(guest: Guest) -> Result<AwayGuest> {
    let (name, domid) = (guest.config.name.clone(), guest.domid.to_string());
    // xl's name of a guest that arrives.
    let incoming = format!("{name}--incoming");
    let path = guest.config.written_with(&incoming, &[&disk()])?;
    let text = sh::shell(&format!("base64 -w0 {path}"))?;
    peer::run(&format!("echo {text} | base64 -d >{path}"))?;
    let line = moving_by(&format!("xl save -p {domid}"), PeerHost::Second, &path);
    sh::run_for(&["bash", "-c", &line], MOVE)?;
    wait_arrived_there(&incoming)?;
    wait_roles("Primary/Primary")?;
    sh::run(&["xl", "destroy", &domid])?;
    peer::run(&format!("xl rename {incoming} {name}"))?;
    AwayGuest::arrived(guest)
}

/// A guest that works on the disk and has moved to the second host, and its load.
fn moved_guest(context: &mut Context) -> Result<(AwayGuest, [GuestJob; 2])> {
    make_resource(context)?;
    let guest = Guest::create(config(GUEST))?;
    let vbd = guest.attach(&disk())?;
    let load = start_load_with(&guest, "")?;
    wait_answers(&vbd, 50)?;
    wait_roles("Primary/Secondary")?;
    Ok((move_away(guest)?, load))
}

fn moves(context: &mut Context) -> Result<()> {
    let (away, load) = moved_guest(context)?;
    wait_roles("Secondary/Primary")?;
    one_primary()?;
    wait_progress_there()?;
    let other = Guest::create(config("other"))?;
    refused(&other, "is Primary on another host")?;
    other.destroy()?;
    let said = end_load_over(&away.console, load)?;
    away.destroy()?;
    wait_roles("Secondary/Secondary")?;
    equal_disks()?;
    context.note(&said)
}

fn dies(context: &mut Context) -> Result<()> {
    let (away, _load) = moved_guest(context)?;
    away.store_mark(MIB)?;
    peer::cut_power()?;
    sh::wait_for("the loss of the peer", LIMIT, || {
        Ok(!state()?.contains(" Connected "))
    })?;
    let guest = Guest::create(config("again"))?;
    let vbd = guest.attach(&disk())?;
    has_mark(&guest, MIB)?;
    fill(&guest, VDEV, 0, MIB / 2)?;
    peer::wait_up()?;
    peer::run(&format!("{} && drbdadm up r0", configured()))?;
    wait_state(WELL)?;
    equal_disks()?;
    guest.detach(&vbd)?;
    guest.destroy()
}

/// Writes on the second host as soon as that does not reach the first one, as a guest would that was started there.
const WRITES_ALONE: &str = "( until drbdadm cstate r0 | grep -q WFConnection; do sleep 0.2; done; \
     drbdadm primary r0 && dd if=/dev/urandom of=/dev/drbd0 bs=1M count=1 oflag=direct ) \
     </dev/null >/run/vmtest/alone.log 2>&1 &";

fn split(context: &mut Context) -> Result<()> {
    make_resource(context)?;
    let guest = Guest::create(config("splits"))?;
    let vbd = guest.attach(&disk())?;
    fill(&guest, VDEV, 0, MIB)?;
    peer::run(&format!("mkdir -p /run/vmtest; {WRITES_ALONE}"))?;
    let before = backing::sha256(THEIRS, 1)?;
    let card = peer::card()?;
    let cable = move |to| sh::run(&["ip", "link", "set", &card, to]).map(drop);
    cable("down")?;
    let mine = cable.clone();
    context.at_end("have a network", move || mine("up"));
    sh::wait_for("data that only the second host has", LIMIT, || {
        Ok(backing::sha256(THEIRS, 1)? != before)
    })?;
    fill(&guest, VDEV, 1, 2)?;
    cable("up")?;
    const ALONE: &str = "drbdadm cstate r0 | grep StandAlone";
    sh::wait_for("the end of the connection", LIMIT, || {
        let there = peer::status(ALONE)?.0 == "0";
        Ok(there && state()?.contains(" StandAlone "))
    })?;
    let chosen = backing::sha256(DEVICE, MIB)?;
    guest.detach(&vbd)?;
    refused(&guest, "drbd:r0 is StandAlone")?;
    peer::run("drbdadm secondary r0 && drbdadm connect --discard-my-data r0")?;
    sh::run(&["drbdadm", "connect", "r0"])?;
    wait_state(WELL)?;
    let vbd = guest.attach(&disk())?;
    ensure!(
        backing::sha256(DEVICE, MIB)? == chosen,
        "the host whose data were chosen has lost them"
    );
    equal_disks()?;
    guest.detach(&vbd)?;
    guest.destroy()
}

/// Checks that both hosts' disks have equal data.
fn equal_disks() -> Result<()> {
    let (here, there) = (
        backing::sha256(OURS, MIB + 1)?,
        backing::sha256(THEIRS, MIB + 1)?,
    );
    ensure!(
        here == there,
        "the disks of both hosts differ: {here} here, {there} there"
    );
    Ok(())
}
