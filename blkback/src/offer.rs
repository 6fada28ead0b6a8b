// SPDX-License-Identifier: GPL-2.0-only

//! What the backend publishes in its own directory.

use crate::backing::{self, BackingDisk};
use crate::linux::xen::device::Device;
use crate::linux::xen::store::{self, Transaction};
use crate::params;
use crate::proto::frontend::Offer;
use crate::proto::state::{publishing, Online, Publishing, State};
use crate::ring::request::Limits;
use kernel::prelude::*;

/// `VDISK_CDROM`.
const INFO_CDROM: u64 = 1;
/// `VDISK_REMOVABLE`.
const INFO_REMOVABLE: u64 = 2;
/// `VDISK_READONLY`.
const INFO_READONLY: u64 = 4;

/// Pages that the frontend keeps granted stay mapped.
const PERSISTENT_KEY: &CStr = c"feature-persistent";
/// Queues of a frontend at most.
const QUEUES_KEY: &CStr = c"multi-queue-max-queues";
/// Size of a ring at most, as a power of two of pages.
const ORDER_KEY: &CStr = c"max-ring-page-order";
/// Segments of an indirect request.
const SEGMENTS_KEY: &CStr = c"feature-max-indirect-segments";

/// What a frontend may ask for that was not offered anything before.
fn usual_offer() -> Offer {
    Offer {
        max_queues: params::max_queues(),
        max_ring_order: params::max_ring_order(),
        default_protocol: params::default_protocol(),
    }
}

/// Publishes what the frontend, which is in the state `theirs`, may ask for, with the state InitWait after `before`, and
/// returns it. May sleep.
pub(crate) fn publish_offer(device: &Device, before: State, theirs: State) -> Result<Offer> {
    let dir = device.nodename();
    let mut offer = usual_offer();
    publish_with_state(device, before, State::InitWait, |t| {
        if matches!(theirs, State::Initialised | State::Connected) {
            // It has chosen from what was offered by whoever had the device before, and does not choose again.
            let queues = t.read_number(dir, QUEUES_KEY)?;
            let order = t.read_number(dir, ORDER_KEY)?;
            offer = offer.with_earlier(queues, order, params::QUEUES);
        }
        let segments = params::max_indirect_segments();
        let is_told = theirs == State::Connected && t.read_number(dir, SEGMENTS_KEY)?.is_some();
        if segments > 0 && !is_told {
            t.write_number(dir, SEGMENTS_KEY, segments.into())?;
        }
        t.write_number(dir, QUEUES_KEY, offer.max_queues.into())?;
        t.write_number(dir, ORDER_KEY, offer.max_ring_order.into())
    })?;
    Ok(offer)
}

/// A disk as one device offers it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    device: backing::Limits,
    read_only: bool,
    cdrom: bool,
    discard: bool,
    /// The disk makes use of pages that stay mapped.
    keeps_grants: bool,
    /// The frontend is told that they do.
    persistent: bool,
    /// Segments of the largest indirect request.
    segments: u16,
}

impl Features {
    /// Reads what the toolstack says about the disk. May sleep.
    pub(crate) fn read(device: &Device, disk: &(impl BackingDisk + ?Sized)) -> Result<Self> {
        let limits = disk.limits();
        let read_only = !disk.is_writable() || limits.read_only;
        // The toolstack's own copy: that of the frontend is the guest's to write.
        let cdrom = value_is(device, c"device-type", b"cdrom")?;
        let discard = !read_only
            && limits.discard_granularity.is_some()
            && !value_is(device, c"discard-enable", b"0")?;
        let keeps_grants = disk.keeps_grants();
        let offered = params::max_indirect_segments().min(disk.offered_segments());
        // A frontend that is connected, to whoever had the device before, does not look again. It fails if a page that
        // it did not expect so stays mapped, and goes on to send requests of the size that it was told.
        let (persistent, segments) = match is_connected(device)? {
            true => (
                value_is(device, PERSISTENT_KEY, b"1")?,
                told_segments(device)?,
            ),
            false => (keeps_grants, offered),
        };
        Ok(Self {
            device: limits,
            read_only,
            cdrom,
            discard,
            keeps_grants,
            persistent,
            segments,
        })
    }

    /// A guest that keeps its pages granted knows that they stay mapped, and they do.
    pub(crate) fn keeps_grants(&self) -> bool {
        self.keeps_grants && self.persistent
    }

    /// The same as limits for the engine.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            sectors: self.device.sectors,
            block_sectors: (self.device.logical_block / 512).max(1),
            read_only: self.read_only,
            max_indirect_segments: self.segments,
            flush: self.device.write_cache && !self.read_only,
            barrier: self.device.write_cache && !self.read_only,
            discard: self.discard,
            secure_discard: self.discard && self.device.secure_erase,
        }
    }

    /// Publishes the disk, with the state Connected after `before`, in one transaction. May sleep.
    ///
    /// `limits` are those of the connection, which may offer less than the disk could.
    pub(crate) fn publish(&self, device: &Device, limits: &Limits, before: State) -> Result {
        let dir = device.nodename();
        publish_with_state(device, before, State::Connected, |t| {
            let number = |key: &CStr, value: u64| t.write_number(dir, key, value);
            number(c"feature-flush-cache", limits.flush.into())?;
            if let (true, Some(granularity)) = (self.discard, self.device.discard_granularity) {
                number(c"discard-granularity", granularity.into())?;
                number(c"discard-alignment", self.device.discard_alignment.into())?;
                number(c"discard-secure", limits.secure_discard.into())?;
            }
            number(c"feature-discard", self.discard.into())?;
            number(c"feature-barrier", limits.barrier.into())?;
            if limits.max_indirect_segments > 0 {
                number(SEGMENTS_KEY, limits.max_indirect_segments.into())?;
            }
            number(PERSISTENT_KEY, self.persistent.into())?;
            number(c"sectors", self.device.sectors)?;
            number(c"info", self.info())?;
            number(c"sector-size", self.device.logical_block.into())?;
            number(c"physical-sector-size", self.device.physical_block.into())
        })
    }

    fn info(&self) -> u64 {
        let cdrom = if self.cdrom || self.device.cdrom {
            INFO_CDROM
        } else {
            0
        };
        let removable = if self.device.removable {
            INFO_REMOVABLE
        } else {
            0
        };
        let read_only = if self.read_only { INFO_READONLY } else { 0 };
        cdrom | removable | read_only
    }
}

/// Nothing was published, because the toolstack is taking the device away.
pub(crate) const TAKEN_AWAY: Error = EPIPE;

/// Publishes a new size. Writing the state Connected again makes the frontend look; it is left alone if
/// it is another one by now, because the toolstack, which takes the device away, has written it. May sleep.
pub(crate) fn publish_size(device: &Device, sectors: u64) -> Result {
    let dir = device.nodename();
    store::transaction(|t| {
        let there = t.read_state(dir)?;
        t.write_number(dir, c"sectors", sectors)?;
        match there {
            State::Connected => t.write_number(dir, c"state", there.number().into()),
            _ => Ok(()),
        }
    })
}

/// Our state, as the directory has it. May sleep.
pub(crate) fn state(device: &Device) -> Result<State> {
    store::read_state(device.nodename())
}

/// Publishes how a disk is served. May sleep.
pub(crate) fn publish_status(device: &Device, status: backing::Status) -> Result {
    while_there(device, |t| {
        t.write(device.nodename(), c"tap-status", status.text())
    })
}

/// Writes the state Closed, also where it is that already, so that the watch on it fires. A state
/// that the toolstack has reset for a new device is left as it is, but written as well. May sleep.
pub(crate) fn touch_state(device: &Device) -> Result {
    let dir = device.nodename();
    store::transaction(|t| match t.read_state(dir) {
        Err(error) if error == ENOENT => Ok(()),
        Err(error) => Err(error),
        Ok(State::Initialising) => t.write(dir, c"state", c"1"),
        Ok(_) => t.write(dir, c"state", c"6"),
    })
}

/// Nothing is left of a device that was unbound: one that was Closing, by whomever, is Closed now. May sleep.
pub(crate) fn close_after_unbind(device: &Device) -> Result {
    if device.is_vanished() {
        return Ok(());
    }
    let dir = device.nodename();
    store::transaction(|t| match t.read_state(dir) {
        Ok(State::Closing) => t.write_number(dir, c"state", State::Closed.number().into()),
        Ok(_) => Ok(()),
        // The toolstack has removed our directory: nobody is left to tell.
        Err(error) if error == ENOENT => Ok(()),
        Err(error) => Err(error),
    })
}

/// Publishes the state `now` after `before`, unless it is there: a toolstack that takes a device away
/// writes Closing itself, and the frontend has heard of it. Fails like [`publish_with_state`]. May sleep.
pub(crate) fn publish_state(device: &Device, before: State, now: State) -> Result {
    if store::read_state(device.nodename()).is_ok_and(|there| there == now) {
        device.note_state(now);
        return Ok(());
    }
    publish_with_state(device, before, now, |_| Ok(()))
}

/// Publishes what `body` writes and the state `now` after `before`, or nothing of both. That is the
/// bus's `xenbus_switch_state` in one transaction with what belongs to the state. ENOENT if our
/// directory is gone, or is that of a new device already; [`TAKEN_AWAY`]. May sleep.
fn publish_with_state(
    device: &Device,
    before: State,
    now: State,
    mut body: impl FnMut(&Transaction) -> Result,
) -> Result {
    if device.is_vanished() {
        return Err(ENOENT);
    }
    let dir = device.nodename();
    let published = store::transaction(|t| {
        // Only what is about to be served is held against it.
        let online = match now {
            State::Connected => Online::of(t.read_number(dir, c"online")?),
            _ => Online::Unsaid,
        };
        match publishing(before, t.read_state(dir)?, online, now) {
            Publishing::Written => {}
            Publishing::Gone => return Err(ENOENT),
            Publishing::TakenAway => return Err(TAKEN_AWAY),
        }
        body(t)?;
        t.write_number(dir, c"state", now.number().into())
    });
    if published.is_ok() {
        device.note_state(now);
    }
    published
}

/// A transaction in our directory, if that is still there: a write must not bring it back.
fn while_there(device: &Device, mut body: impl FnMut(&Transaction) -> Result) -> Result {
    store::transaction(|t| {
        t.read_state(device.nodename())?;
        body(t)
    })
}

/// True if the frontend is connected already. One that is gone is not, which others will see.
fn is_connected(device: &Device) -> Result<bool> {
    match store::read_state(device.otherend()) {
        Ok(state) => Ok(state == State::Connected),
        Err(error) if error == ENOENT => Ok(false),
        Err(error) => Err(error),
    }
}

/// Segments of the largest indirect request, as our directory tells the frontend.
fn told_segments(device: &Device) -> Result<u16> {
    let told = store::read_number(device.nodename(), SEGMENTS_KEY)?;
    let told = told.unwrap_or(0).min(params::MOST_SEGMENTS.into());
    // CAST: not more than a `u16`.
    Ok(told as u16)
}

/// True if a key of the backend's directory has this value.
fn value_is(device: &Device, key: &CStr, wanted: &[u8]) -> Result<bool> {
    let mut value = [0; 16];
    let len = store::read(device.nodename(), key, &mut value)?;
    Ok(len.and_then(|len| value.get(..len)) == Some(wanted))
}
