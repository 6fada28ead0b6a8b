// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The map of a disk: the extents that reads and in-place writes may use without its process.
//!
//! An extent is a permission that the process gives and the kernel keeps: it is valid until the process recalls it,
//! also when the process is dead. These rules hold whatever the process does:
//!
//! - An extent lies inside the disk and inside a backing that the disk has, allows no more than both, and is aligned in
//!   the backing as it is on the disk. [`ExtentMap::translate`] returns parts of such extents, in whole blocks of the
//!   backing.
//! - Two extents do not overlap. A different extent for a range replaces the old one unless that is writable: the
//!   process must recall a writable one first, because writes to it may be in flight.
//! - A lookup that predates a change of the range is refused: each change has a generation, and the process names with
//!   each extent the generation that it knew ([`ExtentMap::set`]).
//! - A write that the process executes may move the data (copy on write), and a discard may do anything. Both change
//!   the range twice: when the process gets the request and when it answers ([`ExtentMap::written`],
//!   [`ExtentMap::recall`]), because a lookup in between may see the old or the new place.
//! - Any extent may be forgotten at any time. So the map needs no more memory than the caller gave it, forgets extents
//!   where that is easier, and no call fails for lack of memory.
//!
//! Two ranges may have the same place: only the process can know whether that is right.
//!
//! The map has no lock, no clock and no memory of its own, like the shadow. The work of a call is bounded by the number
//! of leaves ([`tree::MAX_LEAVES`]), most of it by the extents of two leaves.

pub mod recent;
pub mod tree;

use core::ops::DerefMut;

use crate::ring::tap::abi;
use crate::ring::tap::extent::{
    BackingNumber, DataExtent, ExpressExtent, ExtentAccess, Sectors, Source,
};
use recent::Recent;
use tree::{Leaf, LeafSlot, Tree};

/// Maximum number of extents that one may replace. For more, the process must recall the range first.
pub const MAX_REPLACED: usize = 64;

/// A file or block device behind the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapBacking {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Sectors of its block, the unit of reads and writes: a power of two.
    pub block: u32,
    /// The kernel may write it.
    pub writable: bool,
}

impl MapBacking {
    /// Returns true if the number of sectors is whole blocks.
    fn whole(&self, sectors: u64) -> bool {
        let mask = u64::from(self.block).wrapping_sub(1);
        // If `block` is not a power of two, no number of sectors is whole. (Counting the ones of `block` would take
        // longer than the rest.)
        self.block != 0 && (sectors | u64::from(self.block)) & mask == 0
    }
}

/// Reason that the map did not take an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedExtent {
    /// The range has changed since the process looked, or the map does not remember that far back.
    Stale,
    /// The extent reaches beyond the end of the disk.
    OutsideDisk,
    /// The disk has no such backing.
    NoBacking,
    /// The extent reaches beyond the end of the backing.
    OutsideBacking,
    /// Its alignment in the backing differs from that on the disk.
    Unaligned,
    /// The disk or the backing may only be read.
    ReadOnly,
    /// A part of the range is mapped to another place and is writable there.
    Writable,
    /// There are more than [`MAX_REPLACED`] extents in the range.
    Crowded,
}

/// Reason that the map cannot translate a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Miss {
    /// The first sector is not mapped.
    #[default]
    Unmapped = abi::MISS_UNMAPPED,
    /// A later part is not mapped.
    Partial = abi::MISS_PARTIAL,
    /// A part may only be read.
    ReadOnly = abi::MISS_READ_ONLY,
    /// A part is not whole blocks of its backing.
    Unaligned = abi::MISS_UNALIGNED,
    /// The range is in more pieces than there is room for.
    Pieces = abi::MISS_PIECES,
    /// The range is in several backings.
    Backings = abi::MISS_BACKINGS,
    /// The map is not consulted: another operation, or a replay.
    Never = abi::MISS_NEVER,
    /// The queue executes nothing.
    Queue = abi::MISS_QUEUE,
}

/// The map of one disk. `S` and `L` are the memory: as many slots as leaves.
#[derive(Clone, Debug)]
pub struct ExtentMap<S, L> {
    tree: Tree<S, L>,
    recent: Recent,
    backings: [Option<MapBacking>; abi::MAX_BACKINGS as usize],
    /// The size of the disk.
    sectors: u64,
    /// Guests may write the disk.
    writable: bool,
    /// A flush of the disk is a flush of its only backing.
    flushes: bool,
}

impl<S: DerefMut<Target = [LeafSlot]>, L: DerefMut<Target = [Leaf]>> ExtentMap<S, L> {
    /// Returns the map of a disk of `sectors` sectors, without backings and extents. Overwrites the memory; uses at
    /// most [`tree::MAX_LEAVES`] leaves.
    pub fn new(slots: S, leaves: L, sectors: u64, writable: bool) -> Self {
        Self {
            tree: Tree::new(slots, leaves),
            recent: Recent::NONE,
            backings: [None; abi::MAX_BACKINGS as usize],
            sectors,
            writable,
            flushes: false,
        }
    }

    /// Returns true if the map has no extents and executes no flush.
    pub fn is_empty(&self) -> bool {
        self.tree.is_empty() && !self.flushes
    }

    /// Returns all extents, in the order of the disk.
    pub fn extents(&self) -> impl Iterator<Item = &DataExtent> {
        self.tree.within(&Sectors::ALL)
    }

    /// Returns the number of leaves with which the map would forget less, if all are in use and more are allowed.
    pub fn wants(&self) -> Option<usize> {
        let more = self.tree.capacity().saturating_mul(4);
        (self.tree.is_full() && more <= tree::MAX_LEAVES).then_some(more)
    }

    /// Moves to larger memory, and keeps all extents. Returns the unneeded memory, for the caller to free.
    pub fn grow(&mut self, slots: S, leaves: L) -> (S, L) {
        self.tree.grow(slots, leaves)
    }

    /// Returns the number of extents that fit.
    pub fn room(&self) -> usize {
        self.tree.capacity().saturating_mul(tree::LEAF)
    }

    /// Returns how many extents were forgotten for lack of room.
    pub fn evicted(&self) -> u64 {
        self.tree.evicted()
    }

    /// Returns the generation of the last change.
    pub fn generation(&self) -> u32 {
        self.recent.generation()
    }

    /// Finds the place of a range: calls `each` piece by piece, in the order of the disk, each a part of an extent.
    /// Fails unless there are at most `most` pieces, all of which allow `access`; the caller must then drop the pieces
    /// that `each` got.
    pub fn translate(
        &mut self,
        range: &Sectors,
        access: ExtentAccess,
        most: usize,
        mut each: impl FnMut(&DataExtent),
    ) -> Result<(), Miss> {
        let mut position = self.tree.find_again(range.start());
        let mut rest = *range;
        for before in 0..most {
            let extent = self.tree.get_used(position);
            let begun = extent.filter(|extent| extent.range.start() <= rest.start());
            let Some(piece) = begun.and_then(|extent| extent.part(&rest)) else {
                return Err(if before == 0 {
                    Miss::Unmapped
                } else {
                    Miss::Partial
                });
            };
            self.allow(&piece, access)?;
            each(&piece);
            match Sectors::between(piece.range.end(), rest.end()) {
                Some(more) => rest = more,
                None => return Ok(()),
            }
            position = self.tree.next(position);
        }
        Err(Miss::Pieces)
    }

    /// Returns the extent in which the last [`translate`](Self::translate) began, if it is in a backing.
    pub fn last_used(&self) -> Option<ExpressExtent> {
        let extent = self.tree.get_last()?;
        let backing = self.backing(extent.source.backing()?)?;
        ExpressExtent::new(extent, backing.block)
    }

    fn allow(&self, piece: &DataExtent, access: ExtentAccess) -> Result<(), Miss> {
        if access == ExtentAccess::ReadWrite && piece.access == ExtentAccess::Read {
            return Err(Miss::ReadOnly);
        }
        let Source::Backing(number) = piece.source else {
            return Ok(());
        };
        let backing = self.backing(number).ok_or(Miss::Unmapped)?;
        let (start, end) = (piece.range.start(), piece.range.end());
        // The place in the backing has the same alignment.
        if backing.whole(start | end) {
            Ok(())
        } else {
            Err(Miss::Unaligned)
        }
    }

    fn backing(&self, number: BackingNumber) -> Option<&MapBacking> {
        self.backings.get(number.index())?.as_ref()
    }
}

/// Calls and requests of the process.
impl<S: DerefMut<Target = [LeafSlot]>, L: DerefMut<Target = [Leaf]>> ExtentMap<S, L> {
    /// Takes an extent that the process looked up when it knew `generation`.
    pub fn set(&mut self, extent: &DataExtent, generation: u32) -> Result<(), RefusedExtent> {
        self.check(extent)?;
        if !self.recent.is_unchanged(&extent.range, generation) {
            return Err(RefusedExtent::Stale);
        }
        let mut replaced = 0usize;
        for other in self.tree.within(&extent.range) {
            // An extent that becomes a part of the new one does not count as replaced: discards leave many such on a
            // raw disk.
            if other.same_place(extent) && other.access == extent.access {
                continue;
            }
            if replaced >= MAX_REPLACED {
                return Err(RefusedExtent::Crowded);
            }
            if other.access == ExtentAccess::ReadWrite && !other.same_place(extent) {
                return Err(RefusedExtent::Writable);
            }
            replaced = replaced.wrapping_add(1);
        }
        // Join the extent with its neighbours where they are adjacent.
        let (start, end) = (extent.range.start(), extent.range.end());
        let mut merged = *extent;
        for side in [start.saturating_sub(1), end] {
            let neighbour = self.tree.get(self.tree.find(side));
            merged = neighbour
                .and_then(|other| merged.joined(other))
                .unwrap_or(merged);
        }
        self.tree.cut(&merged.range);
        self.tree.insert(merged);
        Ok(())
    }

    /// Makes a flush of the disk a flush of its only backing, until everything is recalled.
    pub fn set_flush(&mut self) -> Result<(), RefusedExtent> {
        self.only_backing().ok_or(RefusedExtent::NoBacking)?;
        self.flushes = true;
        Ok(())
    }

    /// Returns the backing that a flush of the disk flushes.
    pub fn flushed(&self) -> Option<BackingNumber> {
        self.only_backing().filter(|_| self.flushes)
    }

    fn only_backing(&self) -> Option<BackingNumber> {
        let mut there = (0..abi::MAX_BACKINGS)
            .filter_map(BackingNumber::new)
            .filter(|number| self.backing(*number).is_some());
        let first = there.next()?;
        there.next().is_none().then_some(first)
    }

    /// Withdraws the mapping of a range: the process recalls it, or has a request that may free or move it. For a
    /// request the caller does this twice, as for [`written`](Self::written).
    pub fn recall(&mut self, range: &Sectors) {
        self.recent.note(*range);
        self.tree.cut(range);
        self.flushes &= *range != Sectors::ALL;
    }

    /// Records that the process gets a write of the range, or answers it. Writable extents stay mapped, because writes
    /// to them happen in place; all others may have moved.
    pub fn written(&mut self, range: &Sectors) {
        self.recent.note(*range);
        if !self.stays(range) {
            self.tree.cut(range);
        }
    }

    /// Returns true if all extents of a range are writable, as far as a short search can tell.
    fn stays(&self, range: &Sectors) -> bool {
        let mut extents = self.tree.within(range).enumerate();
        extents
            .all(|(count, extent)| count < MAX_REPLACED && extent.access == ExtentAccess::ReadWrite)
    }

    /// Forgets all extents, because another process begins.
    pub fn clear(&mut self) {
        self.recent.note(Sectors::ALL);
        self.tree.clear();
        self.flushes = false;
    }

    fn check(&self, extent: &DataExtent) -> Result<(), RefusedExtent> {
        if extent.range.end() > self.sectors {
            return Err(RefusedExtent::OutsideDisk);
        }
        let writes = extent.access == ExtentAccess::ReadWrite;
        let Source::Backing(number) = extent.source else {
            return if writes {
                Err(RefusedExtent::ReadOnly)
            } else {
                Ok(())
            };
        };
        let backing = self.backing(number).ok_or(RefusedExtent::NoBacking)?;
        let end = extent.place.checked_add(extent.range.count());
        if end.is_none_or(|end| end > backing.sectors) {
            return Err(RefusedExtent::OutsideBacking);
        }
        if !backing.whole(extent.place ^ extent.range.start()) {
            return Err(RefusedExtent::Unaligned);
        }
        if writes && !(backing.writable && self.writable) {
            return Err(RefusedExtent::ReadOnly);
        }
        Ok(())
    }
}

/// Changes of the disk.
impl<S: DerefMut<Target = [LeafSlot]>, L: DerefMut<Target = [Leaf]>> ExtentMap<S, L> {
    /// Sets a new size of the disk.
    pub fn resize(&mut self, sectors: u64) {
        self.sectors = sectors;
        if let Some(gone) = Sectors::between(sectors, u64::MAX) {
            self.recall(&gone);
        }
    }

    /// Adds a backing. Returns `false` if the disk has one of this number.
    #[must_use]
    pub fn add_backing(&mut self, number: BackingNumber, backing: MapBacking) -> bool {
        match self.backings.get_mut(number.index()) {
            Some(place @ None) => *place = Some(backing),
            _ => return false,
        }
        true
    }

    /// Sets a new size of a backing. If it is smaller, all extents are forgotten, as when the backing is removed.
    pub fn resize_backing(&mut self, number: BackingNumber, sectors: u64) {
        let Some(Some(backing)) = self.backings.get_mut(number.index()) else {
            return;
        };
        let smaller = sectors < backing.sectors;
        backing.sectors = sectors;
        if smaller {
            self.clear();
        }
    }

    /// Returns true if the disk has a backing of this number.
    pub fn has_backing(&self, number: BackingNumber) -> bool {
        self.backing(number).is_some()
    }

    /// Returns the size of a backing in sectors of 512 bytes, if the disk has it.
    pub fn backing_sectors(&self, number: BackingNumber) -> Option<u64> {
        Some(self.backing(number)?.sectors)
    }

    /// Returns one bit for each backing.
    pub fn backings(&self) -> u32 {
        let mut bits = 0u32;
        for (number, backing) in (0..).zip(&self.backings) {
            bits |= u32::from(backing.is_some()).wrapping_shl(number);
        }
        bits
    }

    /// Removes a backing. Returns `false` if the disk has none of this number.
    ///
    /// Forgets all extents, not only those in it: a search for those would take long, and this is rare. Earlier lookups
    /// of the process are refused afterwards, so the number can name another backing.
    #[must_use]
    pub fn remove_backing(&mut self, number: BackingNumber) -> bool {
        let place = self.backings.get_mut(number.index());
        let removed = place.is_some_and(|place| place.take().is_some());
        if removed {
            self.clear();
        }
        removed
    }
}
