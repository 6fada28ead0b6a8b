// SPDX-License-Identifier: MIT OR Apache-2.0
//! The module is exchanged for the one that is installed, below all disks at once, phy and tap.
//!
//! All guests that have disks of it are paused, what they have asked for is waited for, their disks are taken from the
//! driver, tap disks give back their nodes, and the module goes. The next one finds each guest's side as it was, as in
//! a [takeover](crate::take_over). It is all or nothing, because a module that serves one disk cannot go.
//!
//! After any failure, and whenever this ends, a module serves the disks and the guests run, at the latest after the
//! next attempt. If the installed module is refused, that is the one that was there before, of which a copy was kept.

use crate::disk::{BusDevice, DiskKeys, RefusedDisk};
use crate::host::{BackendDriver, BegunAttempt, Host};
use crate::rebind::{self, LeftDisk};
use serde::Serialize;
use std::io;
use std::time::Duration;

/// The driver that is exchanged.
const RS: BackendDriver = BackendDriver::Rs;
/// How long to wait for a process that only asks the module for information.
const UNUSED: Duration = Duration::from_secs(2);
/// How long the module may take to give back what it has of disks that were taken from it: the bus does not wait.
const GIVEN_BACK: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// How it is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Exchange {
    /// Time for the requests of all guests to be answered.
    pub patience: Duration,
    /// Also if the installed module is the one that is loaded, for other parameters.
    pub again: bool,
    /// Also if no copy of the one that is loaded was kept.
    pub no_way_back: bool,
    /// Only says what it would do.
    pub dry_run: bool,
}

/// Result of an exchange.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ExchangeResult {
    /// The installed module serves.
    pub is_done: bool,
    /// The module that was there before serves again, or still.
    pub is_as_before: bool,
    /// Disks that it serves, by the guests' names.
    pub disks: Vec<String>,
    /// Disks for which it would not be safe, or that are not served, and why.
    pub left: Vec<LeftDisk>,
    /// Why it was not done, if that is not about a disk.
    pub why: Option<String>,
    /// For how long guests were paused, in milliseconds; nothing if none was.
    pub paused_ms: Option<u64>,
}

/// Comparison of the installed and the loaded module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Modules {
    /// The one that is loaded is the one that is installed.
    Same,
    /// The modules differ, and a copy of the loaded one is there.
    WayBack,
    /// The modules differ, and no copy of the loaded one is there: says where it would be.
    NoWayBack(String),
}

/// Exchanges the module.
///
/// # Errors
/// Nothing could be begun, or what an earlier attempt has left could not be put right.
pub fn exchange<H: Host>(host: &H, plan: Exchange) -> io::Result<ExchangeResult> {
    if let Some(begun) = host.remembered()? {
        if plan.dry_run {
            let why =
                "an earlier attempt was not through: without --dry-run that is put right first";
            return Ok(refused(Vec::new(), Some(why.into())));
        }
        crate::put_right(host, &begun)?;
    }
    host.ask_supervisor()?;
    if let Some(why) = is_needless(host, plan)? {
        let mut outcome = refused(Vec::new(), Some(why));
        outcome.is_done = host.modules()? == Modules::Same;
        return Ok(outcome);
    }
    let all = host.devices()?;
    let served = all.into_iter().filter(|(_, driver)| *driver == Some(RS));
    let mut devices: Vec<BusDevice> = served.map(|(device, _)| device).collect();
    devices.sort();
    let (mut ready, mut left) = (Vec::new(), Vec::new());
    for device in &devices {
        match rebind::look(host, RS, device) {
            Ok(keys) => ready.push((device, keys)),
            Err(why) => left.push(LeftDisk::new(&device.name, why)),
        }
    }
    if !left.is_empty() {
        return Ok(refused(left, None));
    }
    let disks = ready.iter().map(|(device, keys)| named(device, keys));
    let mut outcome = ExchangeResult {
        disks: disks.collect(),
        ..ExchangeResult::default()
    };
    if plan.dry_run {
        return Ok(outcome);
    }
    let mut begun = BegunAttempt {
        guests: Vec::new(),
        disks: devices.iter().map(|device| device.name.clone()).collect(),
        from: RS,
        exchange: true,
    };
    let since = host.now();
    let has_guests = !devices.is_empty();
    let done = pause_all(host, &mut begun, &devices).and_then(|()| with_pause(host, plan, &ready));
    let restored = restore(host, begun, &ready);
    let paused = u64::try_from((host.now() - since).as_millis());
    outcome.paused_ms = paused.ok().filter(|_| has_guests);
    outcome.settle(done, restored);
    Ok(outcome)
}

/// State at the end.
struct RestoredState {
    /// The installed module was refused, or does not serve what the one before has served.
    went_back: Option<String>,
    /// Disks without a driver.
    left: Vec<LeftDisk>,
    /// Guests that are still paused.
    paused: Vec<u16>,
}

impl ExchangeResult {
    fn settle(&mut self, done: Result<(), RefusedDisk>, restored: io::Result<RestoredState>) {
        let was_done = done.is_ok();
        let mut why: Vec<String> = done.err().map(|why| why.0).into_iter().collect();
        match restored {
            Ok(restored) => {
                let is_whole = restored.left.is_empty() && restored.paused.is_empty();
                let is_new = was_done && restored.went_back.is_none();
                self.is_done = is_whole && is_new;
                self.is_as_before = is_whole && !is_new;
                why.extend(restored.went_back);
                let paused = restored.paused.iter();
                why.extend(paused.map(|domid| {
                    format!("the guest {domid} is still paused: ask again, or xl unpause {domid}")
                }));
                self.left = restored.left;
            }
            Err(error) => why.push(format!("{error}: ask again")),
        }
        self.why = (!why.is_empty()).then(|| why.join("; "));
    }
}

fn refused(left: Vec<LeftDisk>, why: Option<String>) -> ExchangeResult {
    ExchangeResult {
        is_as_before: true,
        left,
        why,
        ..ExchangeResult::default()
    }
}

fn named(device: &BusDevice, keys: &DiskKeys) -> String {
    format!("{} of domain {}", keys.vdev, device.domid)
}

/// Why it need not or should not be done.
fn is_needless<H: Host>(host: &H, plan: Exchange) -> io::Result<Option<String>> {
    Ok(match host.modules()? {
        Modules::Same if !plan.again => {
            Some("the module that is loaded is the one that is installed".into())
        }
        Modules::NoWayBack(path) if !plan.no_way_back => Some(format!(
            "there is no copy of the module that is loaded ({path}), so there would be no way back if the installed one \
             cannot be loaded: copy it there, or say --no-way-back"
        )),
        _ => None,
    })
}

/// Each once more than it was.
fn pause_all<H: Host>(
    host: &H,
    begun: &mut BegunAttempt,
    devices: &[BusDevice],
) -> Result<(), RefusedDisk> {
    let mut guests: Vec<u16> = devices.iter().map(|device| device.domid).collect();
    guests.dedup();
    // Also if there is none: tap disks may be served without a guest.
    host.remember(Some(begun))?;
    for domid in guests {
        begun.guests.push(domid);
        let paused = host.remember(Some(begun)).and_then(|()| host.pause(domid));
        if let Err(error) = paused {
            begun.guests.pop();
            return Err(RefusedDisk(format!(
                "the guest {domid} cannot be paused: {error}"
            )));
        }
    }
    Ok(())
}

/// All guests are paused: the module goes, if nothing is in the way.
fn with_pause<H: Host>(
    host: &H,
    plan: Exchange,
    ready: &[(&BusDevice, DiskKeys)],
) -> Result<(), RefusedDisk> {
    let about = |device: &BusDevice, keys: &DiskKeys, why: RefusedDisk| {
        RefusedDisk(format!("{}: {}", named(device, keys), why.0))
    };
    let until = host.now() + plan.patience;
    let mut drained = Vec::new();
    for (device, keys) in ready {
        // The frontend may have run until the guest was paused.
        let now = rebind::look(host, RS, device).and_then(|keys| {
            rebind::drain(host, device, &keys, until)?;
            Ok(keys)
        });
        drained.push((*device, now.map_err(|why| about(device, keys, why))?));
    }
    // A module that comes takes all devices by itself, before its tap disks are there.
    host.set_autoprobe(false)?;
    for (device, keys) in &drained {
        rebind::take(host, RS, device, keys).map_err(|why| about(device, keys, why))?;
    }
    let_go(host)
}

/// Unloads the module once it is unused.
fn let_go<H: Host>(host: &H) -> Result<(), RefusedDisk> {
    again(host, GIVEN_BACK, || host.park())?;
    let gone = again(host, UNUSED, || host.unload(RS));
    gone.map_err(|error| RefusedDisk(format!("the module does not go: {error}")))
}

/// Does it again until it succeeds, or was refused for so long.
fn again<H: Host>(host: &H, limit: Duration, act: impl Fn() -> io::Result<()>) -> io::Result<()> {
    let until = host.now() + limit;
    loop {
        match act() {
            Err(_) if host.now() < until => host.sleep(LOOK),
            done => return done,
        }
    }
}

/// Puts right what an earlier attempt has left.
///
/// # Errors
/// That did not succeed; it stays remembered.
pub(crate) fn put_right<H: Host>(host: &H, begun: &BegunAttempt) -> io::Result<()> {
    let restored = restore(host, begun.clone(), &[])?;
    if let Some(left) = restored.left.first() {
        let (disk, why) = (&left.disk, &left.why);
        return Err(io::Error::other(format!(
            "an earlier attempt left {disk} without a driver: {why}"
        )));
    }
    for domid in restored.paused {
        // The domain may be running already.
        eprintln!("xen-blkback-takeover: domain {domid}, which an earlier attempt has paused, cannot be unpaused");
    }
    host.remember(None)
}

/// Restores service after any exchange: a module is loaded, all disks have their driver and the guests run. Any part
/// that fails stays remembered.
///
/// # Errors
/// No module can be loaded.
fn restore<H: Host>(
    host: &H,
    mut begun: BegunAttempt,
    ready: &[(&BusDevice, DiskKeys)],
) -> io::Result<RestoredState> {
    let mut went_back = None;
    if !host.is_loaded(RS)? {
        if let Err(error) = host.load(RS) {
            host.load_back().map_err(|also| {
                let also = format!("nor the one from before: {also}");
                io::Error::other(format!(
                    "no module can be loaded, and guests wait: {error}; {also}"
                ))
            })?;
            went_back = Some(format!("the installed module cannot be loaded: {error}"));
        }
    }
    let mut left = serve_all(host, ready)?;
    if let Some(first) = left.first().filter(|_| went_back.is_none()) {
        let why = format!(
            "the installed module does not serve {}: {}",
            first.disk, first.why
        );
        went_back = go_back(host, ready).then_some(why);
        // Disks that were taken from a driver for that are served again, too.
        left = serve_all(host, ready)?;
    }
    host.set_autoprobe(true)?;
    // Those that came until then.
    let came = |device: &BusDevice| !begun.disks.contains(&device.name);
    left.extend(give_all(host, &[], true, came)?);
    begun.guests.retain(|domid| !rebind::unpause(host, *domid));
    let paused = begun.guests.clone();
    let is_whole = left.is_empty() && paused.is_empty();
    host.remember(Some(&begun).filter(|_| !is_whole))?;
    Ok(RestoredState {
        went_back,
        left,
        paused,
    })
}

/// Resumes tap disks, and gives each disk without a driver its driver. Returns those that are not served.
fn serve_all<H: Host>(host: &H, ready: &[(&BusDevice, DiskKeys)]) -> io::Result<Vec<LeftDisk>> {
    let mut left = Vec::new();
    let unparked = unpark(host);
    if let Err(error) = &unparked {
        left.push(LeftDisk::new(
            "all tap disks",
            RefusedDisk(error.to_string()),
        ));
    }
    left.extend(give_all(host, ready, unparked.is_ok(), |_| true)?);
    Ok(left)
}

/// Each disk that has no driver gets it, of those that are meant. Returns those that are not served, or not as before.
fn give_all<H: Host>(
    host: &H,
    ready: &[(&BusDevice, DiskKeys)],
    unparked: bool,
    is_meant: impl Fn(&BusDevice) -> bool,
) -> io::Result<Vec<LeftDisk>> {
    let mut begun = Vec::new();
    for (device, driver) in host.devices()? {
        if driver.is_none() && is_meant(&device) {
            begun.push((begin(host, &device, unparked), device));
        }
    }
    let mut left = Vec::new();
    // All are on their way by now: guests wait for the slowest alone.
    for (keys, device) in begun {
        let before = ready.iter().find(|(other, _)| **other == device);
        let served =
            keys.and_then(|keys| serves(host, &device, keys, before.map(|(_, keys)| keys)));
        left.extend(served.err().map(|why| LeftDisk::new(&device.name, why)));
    }
    Ok(left)
}

fn unpark<H: Host>(host: &H) -> io::Result<()> {
    // One that fails now may succeed at once.
    for _ in 0..2 {
        if host.unpark().is_ok() {
            return Ok(());
        }
        host.sleep(LOOK);
    }
    host.unpark()
}

/// A disk gets the driver, unless it is on its way out.
fn begin<H: Host>(
    host: &H,
    device: &BusDevice,
    unparked: bool,
) -> Result<Option<DiskKeys>, RefusedDisk> {
    let keys = DiskKeys::read(host, device)?;
    if keys.is_going() {
        return Ok(None);
    }
    if keys.is_tap && !unparked {
        return Err(RefusedDisk("its tap disk does not resume".into()));
    }
    rebind::begin(host, RS, device)?;
    Ok(Some(keys))
}

/// Checks that the disk is served as before.
fn serves<H: Host>(
    host: &H,
    device: &BusDevice,
    keys: Option<DiskKeys>,
    before: Option<&DiskKeys>,
) -> Result<(), RefusedDisk> {
    let Some(keys) = keys else { return Ok(()) };
    rebind::served(host, RS, device, &keys)?;
    match before {
        Some(before) => DiskKeys::read(host, device)?.offers_as_much(before),
        None => Ok(()),
    }
}

/// The module that was there before takes the place of one that does not serve what that did. True if it is loaded.
fn go_back<H: Host>(host: &H, ready: &[(&BusDevice, DiskKeys)]) -> bool {
    if !host.has_other_copy() {
        return false;
    }
    let gone = || {
        for (device, driver) in host.devices()? {
            let keys = ready.iter().find(|(other, _)| **other == device);
            match (driver, keys) {
                (Some(RS), Some((_, keys))) => rebind::take(host, RS, &device, keys)?,
                (Some(RS), None) => host.unbind(RS, &device)?,
                _ => {}
            }
        }
        let_go(host)
    };
    if let Err(why) = gone() {
        eprintln!(
            "xen-blkback-takeover: the installed module cannot go any more: {}",
            why.0
        );
        return false;
    }
    match host.load_back() {
        Ok(()) => true,
        Err(error) => {
            eprintln!("xen-blkback-takeover: the module from before cannot be loaded: {error}");
            // It serves some at least.
            host.load(RS).is_ok()
        }
    }
}
