// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disks of one guest change their driver.
//!
//! The guest is paused, so that it asks for nothing more, and what it has asked for is waited for: then its rings say
//! that all is answered, and another driver that takes them finds nothing that is half done. Each disk goes to the
//! other driver, which finds the guest's side as it was and continues with its rings. The guest has seen a pause, and
//! nothing else.
//!
//! After any failure, each disk is given back to the driver that it had, and the guest runs again. The attempt is
//! remembered from its beginning, so that the next one puts right the parts that this one did not reach.

use crate::disk::{self, BusDevice, DiskKeys, RefusedDisk};
use crate::host::{BackendDriver, BegunAttempt, Host};
use serde::Serialize;
use std::io;
use std::time::Duration;

/// Time for a driver to serve a disk that it was given.
const SERVE: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// Result for a guest's disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SwapOutcome {
    /// The guest.
    pub domid: u16,
    /// Disks that have the other driver now, by the guest's names.
    pub moved: Vec<String>,
    /// Disks that have not, and why.
    pub left: Vec<LeftDisk>,
    /// How long the guest was paused, in milliseconds; nothing if it was not.
    pub paused_ms: Option<u64>,
    /// The guest could not be unpaused, or a disk has no driver: the next attempt puts that right.
    pub is_unfinished: bool,
}

/// A disk that stays with the driver that it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftDisk {
    /// By the guest's name.
    pub disk: String,
    /// Reason of the failure.
    pub why: String,
}

impl LeftDisk {
    pub(crate) fn new(disk: &str, why: RefusedDisk) -> LeftDisk {
        LeftDisk {
            disk: disk.to_owned(),
            why: why.0,
        }
    }
}

/// How it is to be done.
#[derive(Clone, Copy, Debug)]
pub struct SwapPlan {
    /// Present driver.
    pub from: BackendDriver,
    /// New driver.
    pub to: BackendDriver,
    /// Time for a guest's requests to be answered.
    pub patience: Duration,
    /// Only says what it would do.
    pub dry_run: bool,
}

/// Gives the disks of one guest to another driver.
pub(crate) fn guest<H: Host>(
    host: &H,
    plan: SwapPlan,
    domid: u16,
    devices: &[BusDevice],
) -> SwapOutcome {
    let mut outcome = SwapOutcome {
        domid,
        moved: Vec::new(),
        left: Vec::new(),
        paused_ms: None,
        is_unfinished: false,
    };
    let mut ready = Vec::new();
    for device in devices {
        match look(host, plan.to, device) {
            Ok(keys) => ready.push((device, keys)),
            Err(why) => outcome.leave(&disk::vdev(host, device), why),
        }
    }
    if plan.dry_run || ready.is_empty() {
        let names = ready.into_iter().map(|(_, keys)| keys.vdev);
        outcome.moved = names.collect();
        return outcome;
    }
    let begun = BegunAttempt {
        guests: vec![domid],
        disks: ready
            .iter()
            .map(|(device, _)| device.name.clone())
            .collect(),
        from: plan.from,
        exchange: false,
    };
    if let Err(error) = host.remember(Some(&begun)) {
        let why = format!("the attempt cannot be remembered: {error}");
        outcome.leave_all(&ready, &why);
        return outcome;
    }
    with_pause(host, plan, &ready, &mut outcome);
    finish(host, &ready, &mut outcome);
    outcome
}

/// The guest is paused while its disks are moved.
fn with_pause<H: Host>(
    host: &H,
    plan: SwapPlan,
    ready: &[(&BusDevice, DiskKeys)],
    outcome: &mut SwapOutcome,
) {
    let (since, domid) = (host.now(), outcome.domid);
    if let Err(error) = host.pause(domid) {
        let why = format!("its guest cannot be paused: {error}");
        return outcome.leave_all(ready, &why);
    }
    move_paused(host, plan, ready, outcome);
    end_pause(host, domid, outcome);
    outcome.paused_ms = u64::try_from((host.now() - since).as_millis()).ok();
}

/// Forgets the attempt, unless a disk has no driver or the guest is paused.
fn finish<H: Host>(host: &H, ready: &[(&BusDevice, DiskKeys)], outcome: &mut SwapOutcome) {
    // One that is not there any more needs no driver.
    let is_left = |device: &BusDevice| match host.devices() {
        Ok(all) => all.contains(&(device.clone(), None)),
        Err(_) => true,
    };
    outcome.is_unfinished |= ready.iter().any(|(device, _)| is_left(device));
    if outcome.is_unfinished {
        return;
    }
    if let Err(error) = host.remember(None) {
        let why = format!("that it has ended cannot be remembered: {error}");
        outcome.leave("all", RefusedDisk(why));
    }
}

impl SwapOutcome {
    /// Of a guest with which an earlier attempt was not through, which is only said.
    pub(crate) fn cut_off(begun: &BegunAttempt) -> SwapOutcome {
        let left = begun.disks.iter().map(|disk| LeftDisk {
            disk: disk.clone(),
            why: "an earlier attempt was not through with it: without --dry-run that is put right first".into(),
        });
        SwapOutcome {
            domid: begun.guests.first().copied().unwrap_or_default(),
            moved: Vec::new(),
            left: left.collect(),
            paused_ms: None,
            is_unfinished: true,
        }
    }

    fn leave_all(&mut self, ready: &[(&BusDevice, DiskKeys)], why: &str) {
        for (_, keys) in ready {
            self.leave(&keys.vdev, RefusedDisk(why.to_owned()));
        }
    }

    fn leave(&mut self, disk: &str, why: RefusedDisk) {
        self.left.push(LeftDisk::new(disk, why));
    }
}

/// A disk may be served by another driver, or another module of its own.
pub(crate) fn look<H: Host>(
    host: &H,
    to: BackendDriver,
    device: &BusDevice,
) -> Result<DiskKeys, RefusedDisk> {
    if device.domid == 0 {
        return Err(RefusedDisk(
            "domain 0 has it itself and cannot be paused: detach it, and attach it again afterwards".into(),
        ));
    }
    let keys = DiskKeys::read(host, device)?;
    keys.check(host.limits(to), to)?;
    Ok(keys)
}

/// Unpauses a guest. False if it exists and does not run again.
pub(crate) fn unpause<H: Host>(host: &H, domid: u16) -> bool {
    // One that fails now may succeed at once: a guest must not stay so.
    let tried = (0..3).any(|_| {
        let done = host.unpause(domid);
        if done.is_err() {
            host.sleep(LOOK);
        }
        done.is_ok()
    });
    let has_gone = || {
        let all = host.devices()?;
        Ok::<_, io::Error>(!all.iter().any(|(device, _)| device.domid == domid))
    };
    tried || has_gone().unwrap_or(false)
}

fn end_pause<H: Host>(host: &H, domid: u16, outcome: &mut SwapOutcome) {
    if !unpause(host, domid) {
        outcome.is_unfinished = true;
        let why = format!("its guest is still paused: ask again, or xl unpause {domid}");
        outcome.leave("all", RefusedDisk(why));
    }
}

/// The guest is paused: drains its rings, and moves its disks.
fn move_paused<H: Host>(
    host: &H,
    plan: SwapPlan,
    ready: &[(&BusDevice, DiskKeys)],
    outcome: &mut SwapOutcome,
) {
    let until = host.now() + plan.patience;
    let mut drained = Vec::new();
    for (device, keys) in ready {
        // The frontend may have run until the guest was paused.
        let now = look(host, plan.to, device).and_then(|keys| {
            drain(host, device, &keys, until)?;
            Ok(keys)
        });
        match now {
            Ok(keys) => drained.push((*device, keys)),
            Err(why) => outcome.leave(&keys.vdev, why),
        }
    }
    for (device, keys) in drained {
        match swap(host, plan, device, &keys) {
            Ok(()) => outcome.moved.push(keys.vdev),
            Err(why) => outcome.leave(&keys.vdev, why),
        }
    }
}

/// Waits until all requests of a disk are answered.
pub(crate) fn drain<H: Host>(
    host: &H,
    device: &BusDevice,
    keys: &DiskKeys,
    until: Duration,
) -> Result<(), RefusedDisk> {
    if !keys.is_connected() {
        return Ok(());
    }
    let rings = keys.rings(host)?;
    loop {
        let mut waiting = 0;
        for ring in &rings {
            let head = host
                .ring(device.domid, *ring)
                .map_err(|error| RefusedDisk(format!("its ring cannot be looked at: {error}")))?;
            if !head.is_drained() {
                waiting += u64::from(head.requested.wrapping_sub(head.answered));
            }
        }
        if waiting == 0 {
            return Ok(());
        }
        if host.is_interrupted() {
            return Err(RefusedDisk("a signal came".into()));
        }
        if host.now() >= until {
            return Err(RefusedDisk(format!(
                "{waiting} of its requests are not answered: see to its storage, or give it more time (--patience)"
            )));
        }
        host.sleep(LOOK);
    }
}

/// Takes a disk whose rings are drained from its driver.
pub(crate) fn take<H: Host>(
    host: &H,
    from: BackendDriver,
    device: &BusDevice,
    keys: &DiskKeys,
) -> Result<(), RefusedDisk> {
    if keys.is_connected() && !keys.keeps_grants {
        // The guest does not expect persistent grants, because the old driver did not offer them when it connected.
        host.write(&keys.persistent(), "0")?;
    }
    // Whether it has a driver shows; one that is on its way out is the next one's to see to.
    host.unbind(from, device)
        .map_err(|error| RefusedDisk(format!("{} does not let go of it: {error}", from.module())))
}

/// A disk whose rings are drained goes to the other driver, or back.
fn swap<H: Host>(
    host: &H,
    plan: SwapPlan,
    device: &BusDevice,
    keys: &DiskKeys,
) -> Result<(), RefusedDisk> {
    take(host, plan.from, device, keys)?;
    let taken = give(host, plan.to, device, keys).and_then(|()| {
        // It was not asked anything yet, and says only now what it takes.
        DiskKeys::read(host, device)?.offers_as_much(keys)
    });
    taken.or_else(|why| {
        if host.driver(device)? == Some(plan.to) {
            host.unbind(plan.to, device)?;
        }
        give(host, plan.from, device, keys).map_err(|back| {
            RefusedDisk(format!(
                "{}; and {} does not take it back: {}: ask again",
                why.0,
                plan.from.module(),
                back.0
            ))
        })?;
        Err(why)
    })
}

/// A driver gets a disk, and serves it if it was served before.
pub(crate) fn give<H: Host>(
    host: &H,
    driver: BackendDriver,
    device: &BusDevice,
    keys: &DiskKeys,
) -> Result<(), RefusedDisk> {
    begin(host, driver, device)?;
    served(host, driver, device, keys)
}

/// A driver gets a disk. Whether it serves that shows later.
pub(crate) fn begin<H: Host>(
    host: &H,
    driver: BackendDriver,
    device: &BusDevice,
) -> Result<(), RefusedDisk> {
    // Keys of the last driver say nothing about this one.
    if !host.renew(device)? {
        return Err(RefusedDisk("it is being detached".into()));
    }
    host.bind(driver, device)
        .map_err(|error| RefusedDisk(format!("{} does not take it: {error}", driver.module())))
}

/// Waits until a driver serves a disk that it has got, if that was served before.
pub(crate) fn served<H: Host>(
    host: &H,
    driver: BackendDriver,
    device: &BusDevice,
    keys: &DiskKeys,
) -> Result<(), RefusedDisk> {
    if !keys.is_connected() {
        return Ok(());
    }
    let (name, state) = (driver.module(), device.back("state"));
    let until = host.now() + SERVE;
    loop {
        let now = host.read(&state)?;
        match now.as_deref().map(str::trim) {
            Some("4") => return Ok(()),
            Some("5" | "6") => {
                let error = host.read(&format!("error/{}", device.back("error")))?;
                let error = error.unwrap_or_else(|| "see the kernel's log".into());
                return Err(RefusedDisk(format!("{name} does not serve it: {error}")));
            }
            _ => {}
        }
        if host.now() >= until {
            return Err(RefusedDisk(format!(
                "{name} has not connected it in {SERVE:?}"
            )));
        }
        host.sleep(LOOK);
    }
}
