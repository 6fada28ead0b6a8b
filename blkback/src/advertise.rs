// SPDX-License-Identifier: GPL-2.0-only

//! Keys that the backend publishes in its own directory.

use crate::backing::{self, BackingDisk};
use crate::linux::xen::device::XenDevice;
use crate::linux::xen::store::{self, Transaction};
use crate::memory::{queue_pages, Reservation};
use crate::memory_quota;
use crate::params;
use crate::proto::frontend::Offer;
use crate::proto::publish::{self, Present, PublishedKey, Values};
use crate::proto::state::{OnlineWish, Publishing, XenbusState};
use crate::ring::request::RequestLimits;
use kernel::prelude::*;

/// `VDISK_CDROM`.
const INFO_CDROM: u64 = 1;
/// `VDISK_REMOVABLE`.
const INFO_REMOVABLE: u64 = 2;
/// `VDISK_READONLY`.
const INFO_READONLY: u64 = 4;

/// An offer to a frontend, and the memory that is reserved for it until the frontend has answered.
pub(crate) struct Offered {
    pub(crate) offer: Offer,
    pub(crate) reservation: Reservation,
}

impl Offered {
    /// An offer to a frontend that was not offered anything before: as much as its guest's memory has room for with
    /// the disks that the guest has and may come to have. May sleep.
    fn new(domain: u16) -> Result<Self> {
        let order = params::max_ring_order();
        let (reservation, share) = Reservation::new(domain, queue_pages(order))?;
        let (max_queues, max_ring_order) =
            memory_quota::fit(params::max_queues(), order, share, queue_pages);
        let offer = Offer {
            max_queues,
            max_ring_order,
            default_protocol: params::default_protocol(),
        };
        Ok(Self { offer, reservation })
    }

    /// Reserves the memory for it.
    pub(crate) fn hold(&self) {
        let pages = queue_pages(self.offer.max_ring_order);
        self.reservation
            .hold(pages.saturating_mul(self.offer.max_queues));
    }
}

/// Publishes the offer to the frontend, which is in the state `theirs`, with the state InitWait after `before`, and
/// returns it. May sleep.
pub(crate) fn publish_offer(
    device: &XenDevice,
    before: XenbusState,
    theirs: XenbusState,
) -> Result<Offered> {
    let earlier = |key: PublishedKey| store::read_number(device.nodename(), key.name());
    let mut offered = Offered::new(device.otherend_id())?;
    let offer = &mut offered.offer;
    if matches!(theirs, XenbusState::Initialised | XenbusState::Connected) {
        // It has chosen from an earlier backend's offer, and does not choose again.
        let (queues, order) = (
            earlier(PublishedKey::Queues)?,
            earlier(PublishedKey::Order)?,
        );
        *offer = offer.with_earlier(queues, order, params::QUEUES);
    }
    let is_told = theirs == XenbusState::Connected && earlier(PublishedKey::Segments)?.is_some();
    let mut values = Values::default();
    if !is_told {
        values.set(
            PublishedKey::Segments,
            params::max_indirect_segments().into(),
        );
    }
    values.set(PublishedKey::Queues, offer.max_queues.into());
    values.set(PublishedKey::Order, offer.max_ring_order.into());
    offered.hold();
    publish_with_state(device, before, XenbusState::InitWait, &values)?;
    Ok(offered)
}

/// A disk as one device offers it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    device: backing::BlockLimits,
    read_only: bool,
    cdrom: bool,
    discard: bool,
    /// The disk makes use of pages that stay mapped.
    keeps_grants: bool,
    /// The frontend learns that its pages stay mapped.
    persistent: bool,
    /// Segments of the largest indirect request.
    segments: u16,
}

impl Features {
    /// Reads the toolstack's keys about the disk. May sleep.
    pub(crate) fn read(device: &XenDevice, disk: &(impl BackingDisk + ?Sized)) -> Result<Self> {
        let limits = disk.limits();
        let read_only = !disk.is_writable() || limits.read_only;
        // The toolstack's own copy: that of the frontend is the guest's to write.
        let cdrom = value_is(device, c"device-type", b"cdrom")?;
        let discard = !read_only
            && limits.discard_granularity.is_some()
            && !value_is(device, c"discard-enable", b"0")?;
        let keeps_grants = disk.keeps_grants();
        let offered = params::max_indirect_segments().min(disk.offered_segments());
        // A frontend that was connected to an earlier backend does not look again. It fails if a page that it did not
        // expect so stays mapped, and continues to send requests of the size that it read then.
        let (persistent, segments) = match is_connected(device)? {
            true => (
                value_is(device, PublishedKey::Persistent.name(), b"1")?,
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

    /// Returns these properties as limits for the engine.
    pub(crate) fn limits(&self) -> RequestLimits {
        RequestLimits {
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

    /// Publishes the disk, and then the state Connected after `before`. May sleep.
    ///
    /// `limits` are those of the connection, which may offer less than the disk could.
    pub(crate) fn publish(
        &self,
        device: &XenDevice,
        limits: &RequestLimits,
        before: XenbusState,
    ) -> Result {
        let mut values = Values::default();
        values.set(PublishedKey::Flush, limits.flush.into());
        values.set(PublishedKey::Discard, self.discard.into());
        if let (true, Some(granularity)) = (self.discard, self.device.discard_granularity) {
            values.set(PublishedKey::DiscardGranularity, granularity.into());
            values.set(
                PublishedKey::DiscardAlignment,
                self.device.discard_alignment.into(),
            );
            values.set(PublishedKey::DiscardSecure, limits.secure_discard.into());
        }
        values.set(PublishedKey::Barrier, limits.barrier.into());
        values.set(PublishedKey::Segments, limits.max_indirect_segments.into());
        values.set(PublishedKey::Persistent, self.persistent.into());
        values.set(PublishedKey::Sectors, self.device.sectors);
        values.set(PublishedKey::Info, self.info());
        values.set(PublishedKey::SectorSize, self.device.logical_block.into());
        values.set(
            PublishedKey::PhysicalSectorSize,
            self.device.physical_block.into(),
        );
        publish_with_state(device, before, XenbusState::Connected, &values)
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
pub(crate) fn publish_size(device: &XenDevice, sectors: u64) -> Result {
    let dir = device.nodename();
    store::transaction(|t| {
        let there = t.read_state(dir)?;
        t.write_number(dir, PublishedKey::Sectors.name(), sectors)?;
        match there {
            XenbusState::Connected => t.write_number(dir, c"state", there.number().into()),
            _ => Ok(()),
        }
    })
}

/// Our state, as the directory has it. May sleep.
pub(crate) fn state(device: &XenDevice) -> Result<XenbusState> {
    store::read_state(device.nodename())
}

/// Publishes how a disk is served. May sleep.
pub(crate) fn publish_status(device: &XenDevice, status: backing::TapStatus) -> Result {
    while_there(device, |t| {
        t.write(device.nodename(), c"tap-status", status.text())
    })
}

/// Writes the state Closed, also where it is that already, so that the watch on it fires. A state
/// that the toolstack has reset for a new device is left as it is, but written as well. May sleep.
pub(crate) fn touch_state(device: &XenDevice) -> Result {
    let dir = device.nodename();
    store::transaction(|t| match t.read_state(dir) {
        Err(error) if error == ENOENT => Ok(()),
        Err(error) => Err(error),
        Ok(XenbusState::Initialising) => t.write(dir, c"state", c"1"),
        Ok(_) => t.write(dir, c"state", c"6"),
    })
}

/// Nothing is left of a device that was unbound: one that was Closing, by whomever, is Closed now. May sleep.
pub(crate) fn close_after_unbind(device: &XenDevice) -> Result {
    if device.is_vanished() {
        return Ok(());
    }
    let dir = device.nodename();
    store::transaction(|t| match t.read_state(dir) {
        Ok(XenbusState::Closing) => {
            t.write_number(dir, c"state", XenbusState::Closed.number().into())
        }
        Ok(_) => Ok(()),
        // The toolstack has removed our directory: there is no reader left.
        Err(error) if error == ENOENT => Ok(()),
        Err(error) => Err(error),
    })
}

/// Publishes the state `now` after `before`, unless it is there: a toolstack that takes a device away
/// writes Closing itself, and the frontend has heard of it. Fails like [`publish_with_state`]. May sleep.
pub(crate) fn publish_state(device: &XenDevice, before: XenbusState, now: XenbusState) -> Result {
    if store::read_state(device.nodename()).is_ok_and(|there| there == now) {
        device.note_state(now);
        return Ok(());
    }
    publish_with_state(device, before, now, &Values::default())
}

/// Publishes `values` and then the state `now` after `before`: the bus's `xenbus_switch_state`, with what belongs to the
/// state. ENOENT if our directory is gone, or is that of a new device already; [`TAKEN_AWAY`]. May sleep.
fn publish_with_state(
    device: &XenDevice,
    before: XenbusState,
    now: XenbusState,
    values: &Values,
) -> Result {
    if device.is_vanished() {
        return Err(ENOENT);
    }
    match publish::publish(&mut Directory(device), before, now, values)? {
        Publishing::Written => {
            device.note_state(now);
            Ok(())
        }
        Publishing::Gone => Err(ENOENT),
        Publishing::TakenAway => Err(TAKEN_AWAY),
    }
}

/// Our directory, to write there.
struct Directory<'a>(&'a XenDevice);

impl<'a> publish::BackendStore for Directory<'a> {
    type Error = Error;
    type Transaction<'t> = InDirectory<'t>;

    fn present(&mut self) -> Result<Option<Present>> {
        let mut present = Present::default();
        match store::each_key(self.0.nodename(), |name| present.note(name)) {
            Err(error) if error == ENOENT => Ok(None),
            other => other.map(|()| Some(present)),
        }
    }

    fn write(&mut self, key: PublishedKey, value: u64) -> Result {
        // Less often than the transaction finds out that it was removed, which then removes it again.
        if self.0.is_vanished() {
            return Err(ENOENT);
        }
        store::write_number(self.0.nodename(), key.name(), value)
    }

    fn atomically<T>(&mut self, mut body: impl FnMut(&InDirectory<'_>) -> Result<T>) -> Result<T> {
        let dir = self.0.nodename();
        store::transaction(|transaction| body(&InDirectory { transaction, dir }))
    }
}

/// Our directory, in a transaction.
struct InDirectory<'a> {
    transaction: &'a Transaction,
    dir: &'a CStr,
}

impl publish::Transaction for InDirectory<'_> {
    type Error = Error;

    fn state(&self) -> Result<Option<XenbusState>> {
        match self.transaction.read_state(self.dir) {
            Err(error) if error == ENOENT => Ok(None),
            other => other.map(Some),
        }
    }

    fn online(&self) -> Result<OnlineWish> {
        let number = self.transaction.read_number(self.dir, c"online")?;
        Ok(OnlineWish::of(number))
    }

    fn set_state(&self, state: XenbusState) -> Result {
        let number = state.number().into();
        self.transaction.write_number(self.dir, c"state", number)
    }

    fn remove_leftovers(&self) -> Result {
        let mut value = [0; 1];
        let is_theirs = self.transaction.read(self.dir, c"frontend", &mut value)?;
        match is_theirs {
            Some(_) => Ok(()),
            None => match self.transaction.remove(self.dir, c"") {
                Err(error) if error == ENOENT => Ok(()),
                other => other,
            },
        }
    }
}

/// A transaction in our directory, if that is still there: a write must not bring it back.
fn while_there(device: &XenDevice, mut body: impl FnMut(&Transaction) -> Result) -> Result {
    store::transaction(|t| {
        t.read_state(device.nodename())?;
        body(t)
    })
}

/// True if the frontend is connected already. One that is gone is not, which others will see.
fn is_connected(device: &XenDevice) -> Result<bool> {
    match store::read_state(device.otherend()) {
        Ok(state) => Ok(state == XenbusState::Connected),
        Err(error) if error == ENOENT => Ok(false),
        Err(error) => Err(error),
    }
}

/// Segments of the largest indirect request, as our directory tells the frontend.
fn told_segments(device: &XenDevice) -> Result<u16> {
    let told = store::read_number(device.nodename(), PublishedKey::Segments.name())?;
    let told = told.unwrap_or(0).min(params::MOST_SEGMENTS.into());
    // CAST: not more than a `u16`.
    Ok(told as u16)
}

/// True if a key of the backend's directory has this value.
fn value_is(device: &XenDevice, key: &CStr, wanted: &[u8]) -> Result<bool> {
    let mut value = [0; 16];
    let len = store::read(device.nodename(), key, &mut value)?;
    Ok(len.and_then(|len| value.get(..len)) == Some(wanted))
}
