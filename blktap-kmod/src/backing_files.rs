// SPDX-License-Identifier: GPL-2.0-only

//! The devices and files behind a disk, and the process' map of them: see `ring::tap::map`.
//!
//! The administrator's program gives a disk its backings, and the process names them by number, so no process reaches a
//! backing of another disk. A backing is kept open while a request is executed in it, and with it the lock that the
//! administrator's program took on it.

use super::disk::{DiskInner, DiskMap, TapDisk};
use super::node::invalid;
use crate::linux::block::storage::DiskStorage;
use crate::linux::char::chardev::user_memory;
use crate::linux::memory::vectors::push;
use crate::linux::versions::not_supported;
use crate::ring::tap::abi::{self, MapOp, Mapped, Maps};
use crate::ring::tap::checked::{MapChange, NewBacking, UserArray};
use crate::ring::tap::extent::BackingNumber;
use crate::ring::tap::map::tree::{Leaf, LeafSlot};
use crate::ring::tap::map::{ExtentMap, MapBacking};
use kernel::alloc::{flags, Flags};
use kernel::prelude::*;
use zerocopy::IntoBytes;

/// Leaves that the map of a disk has at first, for 1024 extents. A raw image is one extent.
const LEAVES: usize = 32;
/// Most changes of the map while the lock is held once.
const CHANGES: usize = 8;

/// Allocates the memory of a map. May sleep.
fn memory(count: usize, flags: Flags) -> Result<(KVVec<LeafSlot>, KVVec<Leaf>)> {
    let mut slots = KVVec::with_capacity(count, flags)?;
    let mut leaves = KVVec::with_capacity(count, flags)?;
    for _ in 0..count {
        push(&mut slots, LeafSlot::FREE)?;
        push(&mut leaves, Leaf::FREE)?;
    }
    Ok((slots, leaves))
}

/// Makes an empty map. May sleep.
fn new_map(sectors: u64) -> Result<DiskMap> {
    let (slots, leaves) = memory(LEAVES, GFP_KERNEL)?;
    // Requests of guests that may not write are refused before they reach the map.
    let map = ExtentMap::new(slots, leaves, sectors, true);
    Ok(Some(KBox::new(map, GFP_KERNEL)?))
}

impl TapDisk {
    /// Gives the disk a device or a file. May sleep for as long as the storage takes.
    ///
    /// # Errors
    ///
    /// `EEXIST` if the disk has another backing of this number.
    pub(super) fn add_backing(&self, new: &NewBacking) -> Result {
        let fd = u32::try_from(new.fd).map_err(|_| EBADF)?;
        let storage = DiskStorage::of_descriptor(fd, new.writable)?;
        let mut map = new_map(self.sectors())?;
        let backing = MapBacking {
            sectors: storage.sectors(),
            block: storage.block(),
            writable: new.writable,
        };
        let result = self.keep_backing(new.number, &storage, backing, &mut map);
        // Not under the lock, because dropping the last reference to a storage takes long.
        drop(map);
        drop(storage);
        result
    }

    fn keep_backing(
        &self,
        number: BackingNumber,
        storage: &DiskStorage,
        backing: MapBacking,
        map: &mut DiskMap,
    ) -> Result {
        let mut inner = self.inner.lock();
        if self.is_destroyed() {
            return Err(ENOENT);
        }
        let DiskInner {
            shadow, backings, ..
        } = &mut *inner;
        let place = backings.get_mut(number.index()).ok_or(EINVAL)?;
        if let Some(before) = place {
            // The block of a file grows when the file is copied by reference.
            let same = before.is_same(storage)
                && before.is_writable() == backing.writable
                && before.block() == backing.block;
            let known = shadow
                .map_seen()
                .as_ref()
                .is_some_and(|map| map.has_backing(number));
            return if same && known { Ok(()) } else { Err(EEXIST) };
        }
        if shadow.map_seen().is_none() {
            *shadow.map() = map.take();
        }
        let known = shadow.map().as_mut().ok_or(ENOMEM)?;
        known.resize(self.sectors());
        if !known.add_backing(number, backing) {
            return Err(EEXIST);
        }
        *place = Some(storage.clone());
        inner.withdraw_express();
        Ok(())
    }

    /// Takes a device or a file away. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOENT` if there is none, `EBUSY` while a request is executed in it; soon no new request is begun in it.
    pub(super) fn remove_backing(&self, number: BackingNumber) -> Result {
        let storage = {
            let mut inner = self.inner.lock();
            if let Some(map) = inner.shadow.map() {
                // The map may have lost this backing before.
                let _known = map.remove_backing(number);
            }
            self.announce(&mut inner);
            if inner.shadow.is_executing_in(number) {
                return Err(EBUSY);
            }
            let place = inner.backings.get_mut(number.index());
            place.and_then(Option::take).ok_or(ENOENT)?
        };
        drop(storage);
        Ok(())
    }

    /// Applies the process' changes of the map, in order.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` if the process has not claimed the feature, `EINVAL` if it does not serve the disk or at the first
    /// operation that is malformed, `ERESTARTSYS` if a signal came during the wait for I/O of a range.
    pub(super) fn change_maps(&self, epoch: u64, ops: UserArray) -> Result {
        if let Some(leaves) = self.follow_sizes(epoch)? {
            self.widen_map(leaves);
        }
        // CAST: at most `MAX_MAP_OPS`.
        let mut left = ops.len as usize;
        let mut reader = user_memory(ops.addr, left.saturating_mul(size_of::<MapOp>())).reader();
        while left > 0 {
            let mut batch = [MapOp::default(); CHANGES];
            let here = batch.get_mut(..left.min(CHANGES)).unwrap_or(&mut []);
            reader.read_slice(here.as_mut_bytes())?;
            for op in here {
                self.change_map(epoch, &op.check().map_err(invalid)?)?;
            }
            left = left.saturating_sub(CHANGES);
        }
        Ok(())
    }

    /// Updates the map with the sizes of devices and files, which may have grown. Returns the number of leaves that the
    /// map needs.
    fn follow_sizes(&self, epoch: u64) -> Result<Option<usize>> {
        let mut inner = self.inner.lock();
        if !inner.shadow.has_claimed(abi::FEATURE_MAPS) {
            return Err(not_supported());
        }
        inner.must_be_served_by(epoch)?;
        let DiskInner {
            shadow, backings, ..
        } = &mut *inner;
        let numbers = (0..abi::MAX_BACKINGS).filter_map(BackingNumber::new);
        for (number, storage) in numbers.zip(&*backings) {
            let (Some(storage), Some(map)) = (storage, shadow.map_seen()) else {
                continue;
            };
            let sectors = storage.sectors();
            // Most have their size still, and then the map stays as it is.
            if map
                .backing_sectors(number)
                .is_none_or(|known| known == sectors)
            {
                continue;
            }
            if let Some(map) = shadow.map() {
                map.resize_backing(number, sectors);
            }
        }
        inner.withdraw_express();
        let map = inner.shadow.map_seen().as_ref();
        Ok(map.and_then(|map| map.wants()))
    }

    /// Gives the map `count` leaves, because it has forgotten extents for want of leaves, or is about to. They count
    /// against the process' cgroup, whose limit is for that; without memory the map keeps its size.
    fn widen_map(&self, count: usize) {
        let flags = flags::GFP_KERNEL_ACCOUNT | flags::__GFP_NOWARN;
        if let Ok((slots, leaves)) = memory(count, flags) {
            let mut inner = self.inner.lock();
            let rest = match inner.shadow.map() {
                Some(map) => map.grow(slots, leaves),
                None => (slots, leaves),
            };
            inner.withdraw_express();
            drop(inner);
            // Not under the lock.
            drop(rest);
        }
    }

    fn change_map(&self, epoch: u64, change: &MapChange) -> Result {
        let mut inner = self.inner.lock();
        inner.must_be_served_by(epoch)?;
        let DiskInner {
            shadow,
            sets_refused,
            ..
        } = &mut *inner;
        let map = shadow.map().as_mut();
        let taken = match (change, map) {
            (MapChange::Set { extent, generation }, Some(map)) => {
                map.set(extent, *generation).is_ok()
            }
            (MapChange::Flush, Some(map)) => map.set_flush().is_ok(),
            (MapChange::Recall { range }, Some(map)) => {
                map.recall(range);
                true
            }
            // Without a map no request could be executed.
            (MapChange::Recall { .. }, None) => true,
            (MapChange::Set { .. } | MapChange::Flush, None) => false,
        };
        *sets_refused = sets_refused.wrapping_add(u64::from(!taken));
        self.announce(&mut inner);
        if let MapChange::Recall { range } = change {
            inner.recalls = inner.recalls.wrapping_add(1);
            inner.recallers = inner.recallers.wrapping_add(1);
            let mut result = Ok(());
            while inner.shadow.is_executing(range) && result.is_ok() {
                if self.ready.wait_interruptible(&mut inner) {
                    result = Err(ERESTARTSYS);
                }
            }
            inner.recallers = inner.recallers.wrapping_sub(1);
            return result;
        }
        Ok(())
    }

    /// Fills in the state of the mappings.
    pub(super) fn describe_maps(&self, maps: &mut Maps) {
        let inner = self.inner.lock();
        maps.refused = inner.sets_refused;
        let map = inner.shadow.map_seen().as_ref();
        maps.generation = map.map_or(0, |map| map.generation());
        maps.backings = map.map_or(0, |map| map.backings());
    }

    /// Fills in the statistics of the mappings.
    pub(super) fn describe_mapped(&self, mapped: &mut Mapped) {
        let inner = self.inner.lock();
        mapped.missed = inner.shadow.missed();
        mapped.refused = inner.sets_refused;
        mapped.recalled = inner.recalls;
        (mapped.express, _) = inner.express_counts();
        if let Some(map) = inner.shadow.map_seen() {
            mapped.evicted = map.evicted();
            // CAST: there are at most `MAX_LEAVES`.
            mapped.room = map.room() as u32;
        }
    }
}

impl DiskInner {
    /// Refuses changes of the map by a process that was replaced: `EINVAL`.
    fn must_be_served_by(&self, epoch: u64) -> Result {
        if self.is_live() && self.shadow.epoch() == epoch {
            Ok(())
        } else {
            Err(EINVAL)
        }
    }
}
