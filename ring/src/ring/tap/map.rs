// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The map of a disk: the extents that reads and in-place writes may use without its process.
//!
//! An extent is a permission that the process has given and that the kernel keeps: it is true until it
//! is taken back, also when the process is dead. The rules, all of which hold whatever the process says:
//!
//! - An extent lies inside the disk and inside a backing that the disk has, allows no more than both, and
//!   is aligned in the backing as it is on the disk. What [`Map::translate`] gives out are parts of such
//!   extents, in whole blocks of the backing.
//! - Two extents do not overlap. One that says something else of a range replaces what is there, but not
//!   what may be written: that has to be recalled first, because writes to it may be under way.
//! - What was found out before a range changed does not count for it: each change has a generation, and
//!   the process says of each extent which one it knew ([`Map::set`]).
//! - A write that the process executes may move what it writes (copy on write), and a discard may do
//!   anything. Both change the range twice, when the process gets them and when it answers them
//!   ([`Map::written`], [`Map::recall`]): what it finds out of the range in between may be old or new.
//! - Any extent may be forgotten at any time. So the map has the memory that it was given and needs no more, what is
//!   easier to do by forgetting is done so, and no call fails for want of memory.
//!
//! Two ranges may be at the same place: whether that is right the process alone can know.
//!
//! The map has no lock, no clock and no memory of its own, as the shadow. What a call does is bounded by the
//! number of leaves ([`tree::MAX_LEAVES`]), most of it by the extents of two of them.

pub mod recent;
pub mod tree;

use core::ops::DerefMut;

use crate::ring::tap::abi;
use crate::ring::tap::extent::{Access, BackingNumber, Extent, Sectors, Source};
use recent::Recent;
use tree::{Leaf, Slot, Tree};

/// Extents that one may replace. For more the range is to be recalled before.
pub const MAX_REPLACED: usize = 64;

/// A file or block device behind the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Sectors of a block, in which alone it can be read and written: a power of two.
    pub block: u32,
    /// It may be written.
    pub writable: bool,
}

impl Backing {
    /// True for a number of sectors that is whole blocks.
    fn whole(&self, sectors: u64) -> bool {
        let mask = u64::from(self.block).wrapping_sub(1);
        // Of no power of two none is whole. (To count its ones takes longer than all the rest.)
        self.block != 0 && (sectors | u64::from(self.block)) & mask == 0
    }
}

/// Why an extent was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The range has changed since the process looked, or that is too long ago to know.
    Stale,
    /// It reaches beyond the end of the disk.
    OutsideDisk,
    /// The disk has no such backing.
    NoBacking,
    /// It reaches beyond the end of the backing.
    OutsideBacking,
    /// It has another alignment in the backing than on the disk.
    Unaligned,
    /// The disk or the backing may only be read.
    ReadOnly,
    /// Something of the range may be written elsewhere.
    Writable,
    /// There are more than [`MAX_REPLACED`] extents in the range.
    Crowded,
}

/// Why a range is not to be had from the map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Miss {
    /// Nothing is known of its beginning.
    #[default]
    Unmapped = abi::MISS_UNMAPPED,
    /// Nothing is known of a later part.
    Partial = abi::MISS_PARTIAL,
    /// A part may only be read.
    ReadOnly = abi::MISS_READ_ONLY,
    /// A part is not whole blocks of its backing.
    Unaligned = abi::MISS_UNALIGNED,
    /// It is in more pieces than there is room for.
    Pieces = abi::MISS_PIECES,
    /// It is not all in the same backing.
    Backings = abi::MISS_BACKINGS,
    /// It is nothing that is looked up: another operation, or one that is executed again.
    Never = abi::MISS_NEVER,
    /// Its queue executes nothing.
    Queue = abi::MISS_QUEUE,
}

/// The map of one disk. `S` and `L` are the memory: as many slots as leaves.
#[derive(Clone, Debug)]
pub struct Map<S, L> {
    tree: Tree<S, L>,
    recent: Recent,
    backings: [Option<Backing>; abi::MAX_BACKINGS as usize],
    /// The size of the disk.
    sectors: u64,
    /// Guests may write it.
    writable: bool,
    /// A flush of the disk is one of its only backing.
    flushes: bool,
}

impl<S: DerefMut<Target = [Slot]>, L: DerefMut<Target = [Leaf]>> Map<S, L> {
    /// The map of a disk of so many sectors, without backings and extents. What the memory held is
    /// overwritten; more than [`tree::MAX_LEAVES`] are not used.
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

    /// True if nothing is said of anything.
    pub fn is_empty(&self) -> bool {
        self.tree.is_empty() && !self.flushes
    }

    /// All extents, in the order of the disk.
    pub fn extents(&self) -> impl Iterator<Item = &Extent> {
        self.tree.within(&Sectors::ALL)
    }

    /// How many leaves it should have to forget less, if all are in use and there may be more.
    pub fn wants(&self) -> Option<usize> {
        let more = self.tree.capacity().saturating_mul(4);
        (self.tree.is_full() && more <= tree::MAX_LEAVES).then_some(more)
    }

    /// Goes on in larger memory, with all that is known. What is not needed is given back, to be freed.
    pub fn grow(&mut self, slots: S, leaves: L) -> (S, L) {
        self.tree.grow(slots, leaves)
    }

    /// Extents that there is room for.
    pub fn room(&self) -> usize {
        self.tree.capacity().saturating_mul(tree::LEAF)
    }

    /// How many were forgotten because there was no room.
    pub fn evicted(&self) -> u64 {
        self.tree.evicted()
    }

    /// The generation of the last change.
    pub fn generation(&self) -> u32 {
        self.recent.generation()
    }

    /// Where a range is: `each` gets it piece by piece, in the order of the disk, each a part of an extent. It is
    /// there only if there are at most `most` pieces, all of which allow `access`; `each` may have had some that count
    /// for nothing if not.
    pub fn translate(
        &mut self,
        range: &Sectors,
        access: Access,
        most: usize,
        mut each: impl FnMut(&Extent),
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

    fn allow(&self, piece: &Extent, access: Access) -> Result<(), Miss> {
        if access == Access::ReadWrite && piece.access == Access::Read {
            return Err(Miss::ReadOnly);
        }
        let Source::Backing(number) = piece.source else {
            return Ok(());
        };
        let backing = self.backing(number).ok_or(Miss::Unmapped)?;
        let (start, end) = (piece.range.start(), piece.range.end());
        // The place has the same alignment.
        if backing.whole(start | end) {
            Ok(())
        } else {
            Err(Miss::Unaligned)
        }
    }

    fn backing(&self, number: BackingNumber) -> Option<&Backing> {
        self.backings.get(number.index())?.as_ref()
    }
}

/// What the process says, and what it does.
impl<S: DerefMut<Target = [Slot]>, L: DerefMut<Target = [Leaf]>> Map<S, L> {
    /// Takes an extent of which the process found out when it knew that generation.
    pub fn set(&mut self, extent: &Extent, generation: u32) -> Result<(), Refused> {
        self.check(extent)?;
        if !self.recent.is_unchanged(&extent.range, generation) {
            return Err(Refused::Stale);
        }
        let mut replaced = 0usize;
        for other in self.tree.within(&extent.range) {
            // One that becomes a part of it is not replaced: those that a raw disk is in after discards.
            if other.same_place(extent) && other.access == extent.access {
                continue;
            }
            if replaced >= MAX_REPLACED {
                return Err(Refused::Crowded);
            }
            if other.access == Access::ReadWrite && !other.same_place(extent) {
                return Err(Refused::Writable);
            }
            replaced = replaced.wrapping_add(1);
        }
        // With what it goes on from and what goes on from it, it is one extent.
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

    /// A flush of the disk is one of its backing, until everything is taken back.
    pub fn set_flush(&mut self) -> Result<(), Refused> {
        self.only_backing().ok_or(Refused::NoBacking)?;
        self.flushes = true;
        Ok(())
    }

    /// The backing of which a flush of the disk is one.
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

    /// What was said of a range is not true any longer: the process takes it back, or it has a request
    /// that may free or move it. For a request this is done twice, as [`written`](Self::written).
    pub fn recall(&mut self, range: &Sectors) {
        self.recent.note(*range);
        self.tree.cut(range);
        self.flushes &= *range != Sectors::ALL;
    }

    /// The process gets a write of the range, or answers it. What may be written stays where it is; other
    /// data may be elsewhere then.
    pub fn written(&mut self, range: &Sectors) {
        self.recent.note(*range);
        if !self.stays(range) {
            self.tree.cut(range);
        }
    }

    /// True if all that is known of a range may be written, and that is soon found out.
    fn stays(&self, range: &Sectors) -> bool {
        let mut extents = self.tree.within(range).enumerate();
        extents.all(|(count, extent)| count < MAX_REPLACED && extent.access == Access::ReadWrite)
    }

    /// Another process begins: nothing of what was said before counts.
    pub fn clear(&mut self) {
        self.recent.note(Sectors::ALL);
        self.tree.clear();
        self.flushes = false;
    }

    fn check(&self, extent: &Extent) -> Result<(), Refused> {
        if extent.range.end() > self.sectors {
            return Err(Refused::OutsideDisk);
        }
        let writes = extent.access == Access::ReadWrite;
        let Source::Backing(number) = extent.source else {
            return if writes {
                Err(Refused::ReadOnly)
            } else {
                Ok(())
            };
        };
        let backing = self.backing(number).ok_or(Refused::NoBacking)?;
        let end = extent.place.checked_add(extent.range.count());
        if end.is_none_or(|end| end > backing.sectors) {
            return Err(Refused::OutsideBacking);
        }
        if !backing.whole(extent.place ^ extent.range.start()) {
            return Err(Refused::Unaligned);
        }
        if writes && !(backing.writable && self.writable) {
            return Err(Refused::ReadOnly);
        }
        Ok(())
    }
}

/// What the disk is.
impl<S: DerefMut<Target = [Slot]>, L: DerefMut<Target = [Leaf]>> Map<S, L> {
    /// The disk has another size.
    pub fn resize(&mut self, sectors: u64) {
        self.sectors = sectors;
        if let Some(gone) = Sectors::between(sectors, u64::MAX) {
            self.recall(&gone);
        }
    }

    /// The disk gets a backing. `false` if it has one of this number.
    #[must_use]
    pub fn add_backing(&mut self, number: BackingNumber, backing: Backing) -> bool {
        match self.backings.get_mut(number.index()) {
            Some(place @ None) => *place = Some(backing),
            _ => return false,
        }
        true
    }

    /// A backing has another size. If it is smaller, all extents go, as when it is removed.
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

    /// True if the disk has a backing of this number.
    pub fn has_backing(&self, number: BackingNumber) -> bool {
        self.backing(number).is_some()
    }

    /// One bit for each backing.
    pub fn backings(&self) -> u32 {
        let mut bits = 0u32;
        for (number, backing) in (0..).zip(&self.backings) {
            bits |= u32::from(backing.is_some()).wrapping_shl(number);
        }
        bits
    }

    /// The disk loses a backing. `false` if it has none of this number.
    ///
    /// All extents go, not only those in it: to look for those would take long, and this is rare. What the
    /// process has found out before does not count any more, so the number can name another one.
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
