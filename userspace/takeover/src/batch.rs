// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disks of all guests, or of some, change their driver.

use crate::disk::{BusDevice, DiskKeys, RefusedDisk};
use crate::host::{BegunAttempt, Host};
use crate::module_exchange;
use crate::rebind::{self, SwapOutcome, SwapPlan};
use std::collections::BTreeMap;
use std::io;

/// Gives the disks of guests to another driver, one guest after the other; all of them if `only` names none. `tell`
/// hears of each.
///
/// # Errors
/// Nothing could be begun.
pub fn take_over<H: Host>(
    host: &H,
    plan: SwapPlan,
    only: &[u16],
    mut tell: impl FnMut(&SwapOutcome),
) -> io::Result<Vec<SwapOutcome>> {
    let mut outcomes = Vec::new();
    match host.remembered()? {
        Some(begun) if plan.dry_run => {
            let outcome = SwapOutcome::cut_off(&begun);
            tell(&outcome);
            outcomes.push(outcome);
        }
        Some(begun) => put_right(host, &begun)?,
        None => {}
    }
    if !plan.dry_run {
        host.load(plan.to)?;
    }
    let mut guests: BTreeMap<u16, Vec<BusDevice>> = BTreeMap::new();
    for (device, driver) in host.devices()? {
        let is_wanted = only.is_empty() || only.contains(&device.domid);
        if is_wanted && driver == Some(plan.from) {
            guests.entry(device.domid).or_default().push(device);
        }
    }
    for (domid, mut devices) in guests {
        if host.is_interrupted() {
            break;
        }
        devices.sort();
        let outcome = rebind::guest(host, plan, domid, &devices);
        tell(&outcome);
        let is_unfinished = outcome.is_unfinished;
        outcomes.push(outcome);
        if is_unfinished {
            // The remembered state must not be overwritten.
            break;
        }
    }
    Ok(outcomes)
}

/// Result for the driver that is to serve no disk.
#[derive(Debug)]
pub enum RetiredDriver {
    /// The driver is unloaded.
    Unloaded,
    /// The driver serves disks.
    Serves,
    /// The driver serves none, and cannot be unloaded: its module is in use.
    Stays(io::Error),
}

/// Unloads the driver that serves no disk any more, so that new disks get the other one.
///
/// # Errors
/// The drivers of the devices cannot be read, or a disk has no driver.
pub fn retire<H: Host>(host: &H, plan: SwapPlan) -> io::Result<RetiredDriver> {
    let serves = |driver| Ok::<_, io::Error>(host.devices()?.iter().any(|(_, its)| *its == driver));
    if serves(Some(plan.from))? {
        return Ok(RetiredDriver::Serves);
    }
    if let Err(error) = host.unload(plan.from) {
        return Ok(RetiredDriver::Stays(error));
    }
    // One that came to it in between has none now.
    for (device, driver) in host.devices()? {
        if driver.is_none() {
            host.bind(plan.to, &device)?;
        }
    }
    Ok(RetiredDriver::Unloaded)
}

/// Gives disks that an earlier attempt has left without a driver to one, and unpauses the guest.
///
/// # Errors
/// That did not succeed; it stays remembered.
pub fn put_right<H: Host>(host: &H, begun: &BegunAttempt) -> io::Result<()> {
    if begun.exchange {
        return module_exchange::put_right(host, begun);
    }
    let failed = |device: &BusDevice, why: RefusedDisk| {
        io::Error::other(format!(
            "an earlier attempt left {} without a driver, and it cannot be given to one: {}",
            device.name, why.0
        ))
    };
    let mut loaded = false;
    for (device, driver) in host.devices()? {
        if driver.is_some() || !begun.disks.contains(&device.name) {
            continue;
        }
        if !loaded {
            host.load(begun.from)?;
            loaded = true;
        }
        let keys = DiskKeys::read(host, &device).map_err(|why| failed(&device, why))?;
        // Loading it may have done that.
        if host.driver(&device)?.is_none() {
            rebind::give(host, begun.from, &device, &keys).map_err(|why| failed(&device, why))?;
        }
    }
    for domid in &begun.guests {
        // The domain may be running already.
        if let Err(error) = host.unpause(*domid) {
            eprintln!("xen-blkback-takeover: domain {domid}, which an earlier attempt has paused: {error}");
        }
    }
    host.remember(None)
}
