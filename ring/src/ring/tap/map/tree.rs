// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Extents in the order of the disk, in memory that the caller provides.
//!
//! Extents are in leaves of [`LEAF`], and the leaves are found by a directory: a slot for each, in the
//! order of the disk, so a search halves twice. The first `live` slots have a leaf in use, the others
//! the leaves that are free. A change shifts within a leaf, or the directory, and never all extents.
//!
//! If an extent does not fit, the tree forgets a whole leaf that was not used since the last search for one. Requests
//! to forgotten extents go to the process, which costs time and breaks nothing.

use core::ops::DerefMut;

use crate::ring::tap::extent::{DataExtent, Sectors};

/// Extents of a leaf.
pub const LEAF: usize = 32;
/// Maximum number of leaves of one map.
pub const MAX_LEAVES: usize = 512;
/// Number of leaves examined for an unused one. If all were used, the next one is forgotten.
const LOOKS: usize = 32;

/// A part of the memory of a map: extents that are neighbours.
#[derive(Clone, Copy, Debug)]
pub struct Leaf([DataExtent; LEAF]);

impl Leaf {
    /// A leaf without extents.
    pub const FREE: Self = Self([DataExtent::NOTHING; LEAF]);
}

/// A part of the memory of a map: the place of a leaf in the order of the disk.
#[derive(Clone, Copy, Debug)]
pub struct LeafSlot {
    /// First sector of its first extent.
    first: u64,
    leaf: u16,
    /// Extents of the leaf.
    len: u16,
    /// The leaf was used since the last search for an unused one.
    used: bool,
}

impl LeafSlot {
    /// A slot without a leaf.
    pub const FREE: Self = Self {
        first: 0,
        leaf: 0,
        len: 0,
        used: false,
    };

    fn len(&self) -> usize {
        self.len.into()
    }
}

const _: () = assert!(size_of::<DataExtent>() == 32 && size_of::<LeafSlot>() == 16);

/// A position in the order of the extents: that of an extent, or behind the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    slot: usize,
    at: usize,
}

/// The extents, none of which overlap.
#[derive(Clone, Debug)]
pub(super) struct Tree<S, L> {
    slots: S,
    leaves: L,
    /// Slots that can be used.
    capacity: usize,
    /// Slots in use; none of their leaves is empty between two calls.
    live: usize,
    /// Slot at which the next search for an unused leaf begins.
    hand: usize,
    evicted: u64,
    /// Position of the last access; another extent may be there now, or none.
    last: Position,
}

impl<S: DerefMut<Target = [LeafSlot]>, L: DerefMut<Target = [Leaf]>> Tree<S, L> {
    /// Returns a tree without extents. Overwrites the memory.
    pub(super) fn new(mut slots: S, leaves: L) -> Self {
        let capacity = slots.len().min(leaves.len()).min(MAX_LEAVES);
        for (slot, leaf) in slots.iter_mut().zip(0..=u16::MAX) {
            *slot = LeafSlot {
                leaf,
                ..LeafSlot::FREE
            };
        }
        Self {
            slots,
            leaves,
            capacity,
            live: 0,
            hand: 0,
            evicted: 0,
            last: Position { slot: 0, at: 0 },
        }
    }

    /// Returns true if there is no extent.
    pub(super) fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Returns true if all leaves are in use, so that another leaf must replace one.
    pub(super) fn is_full(&self) -> bool {
        self.live == self.capacity
    }

    /// Returns the number of leaves.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Moves to larger memory, and returns the memory that it does not need: the old one, or the new one if that is not
    /// larger.
    pub(super) fn grow(&mut self, slots: S, leaves: L) -> (S, L) {
        let mut larger = Self::new(slots, leaves);
        if larger.capacity > self.capacity {
            // The old slots name all old leaves, in some order.
            let slots = larger.slots.iter_mut().zip(self.slots.iter());
            slots.take(self.capacity).for_each(|(new, old)| *new = *old);
            let leaves = larger.leaves.iter_mut().zip(self.leaves.iter());
            leaves
                .take(self.capacity)
                .for_each(|(new, old)| *new = *old);
            larger.live = self.live;
            larger.hand = self.hand;
            larger.evicted = self.evicted;
            core::mem::swap(self, &mut larger);
        }
        (larger.slots, larger.leaves)
    }

    /// Returns how many extents were forgotten because others needed their place.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Returns the position of the first extent that ends behind a sector.
    pub(super) fn find(&self, sector: u64) -> Position {
        let slot = self.slot_of(sector);
        let extents = self.extents(slot);
        let at = partition(extents, |extent| extent.range.end() <= sector);
        self.proper(Position { slot, at })
    }

    /// Returns the position that [`find`](Self::find) does, but tries the last position first, because most images have
    /// few extents.
    pub(super) fn find_again(&mut self, sector: u64) -> Position {
        // Extents do not overlap, so no other one has the sector.
        let has =
            |extent: &DataExtent| extent.range.start() <= sector && sector < extent.range.end();
        if !self.get(self.last).is_some_and(has) {
            self.last = self.find(sector);
        }
        self.last
    }

    /// Returns the extent that was found last by [`find_again`](Self::find_again), if it is still there.
    pub(super) fn get_last(&self) -> Option<&DataExtent> {
        self.get(self.last)
    }

    /// Returns the position behind that of an extent.
    pub(super) fn next(&self, position: Position) -> Position {
        self.proper(Position {
            at: position.at.wrapping_add(1),
            ..position
        })
    }

    /// Returns the extent at a position.
    pub(super) fn get(&self, position: Position) -> Option<&DataExtent> {
        self.extents(position.slot).get(position.at)
    }

    /// Returns the extent at a position like [`get`](Self::get), and marks its leaf as used, so that it is kept longer.
    pub(super) fn get_used(&mut self, position: Position) -> Option<DataExtent> {
        if let Some(slot) = self.slots.get_mut(position.slot) {
            slot.used = true;
        }
        self.get(position).copied()
    }

    /// Returns the extents that overlap a range, in order.
    pub(super) fn within<'a>(&'a self, range: &Sectors) -> impl Iterator<Item = &'a DataExtent> {
        let mut position = self.find(range.start());
        let end = range.end();
        core::iter::from_fn(move || {
            let extent = self.get(position)?;
            position = self.next(position);
            Some(extent)
        })
        .take_while(move |extent| extent.range.start() < end)
    }

    /// Adds an extent that overlaps none; may forget others for it.
    pub(super) fn insert(&mut self, extent: DataExtent) {
        let start = extent.range.start();
        self.make_room(start);
        let slot = self.slot_of(start);
        let Some((slot, Leaf(extents))) = self.leaf_mut(slot) else {
            // There is no memory at all.
            self.evicted = self.evicted.saturating_add(1);
            return;
        };
        let before = |other: &DataExtent| other.range.start() < start;
        let there = extents.get(..slot.len()).unwrap_or_default();
        let at = partition(there, before);
        let mut carried = extent;
        for place in extents.iter_mut().skip(at) {
            core::mem::swap(place, &mut carried);
        }
        slot.len = slot.len.wrapping_add(1);
        slot.used = true;
        slot.first = slot.first.min(start);
    }

    /// Removes a range from the extents that overlap it.
    pub(super) fn cut(&mut self, range: &Sectors) {
        let mut from = self.find(range.start());
        let Some(first) = self.get(from).copied() else {
            return;
        };
        let before = Sectors::between(first.range.start(), range.start());
        let behind = Sectors::between(range.end(), first.range.end());
        if let Some(part) = before.and_then(|before| first.part(&before)) {
            self.replace(from, part);
            // A hole in one extent makes two of it.
            if let Some(rest) = behind.and_then(|behind| first.part(&behind)) {
                return self.insert(rest);
            }
            from = self.next(from);
        }
        // An extent that ends behind the range keeps its part there; extents in between are removed.
        let to = self.find(range.end());
        let last = self.get(to).copied();
        let rest = last.and_then(|last| {
            let behind = Sectors::between(range.end(), last.range.end())?;
            last.part(&behind)
        });
        if let Some(rest) = rest {
            self.replace(to, rest);
        }
        self.remove(from, to);
    }

    /// Removes all extents.
    pub(super) fn clear(&mut self) {
        self.close(0, self.live);
    }
}

/// Leaves and their directory.
impl<S: DerefMut<Target = [LeafSlot]>, L: DerefMut<Target = [Leaf]>> Tree<S, L> {
    fn directory(&self) -> &[LeafSlot] {
        self.slots.get(..self.live).unwrap_or_default()
    }

    /// Returns the slot whose range has a sector, if any has: the last slot that begins at or before that sector.
    fn slot_of(&self, sector: u64) -> usize {
        let before = partition(self.directory(), |slot| slot.first <= sector);
        before.saturating_sub(1)
    }

    fn extents(&self, slot: usize) -> &[DataExtent] {
        let extents = self.directory().get(slot).and_then(|slot| {
            let Leaf(extents) = self.leaves.get(usize::from(slot.leaf))?;
            extents.get(..slot.len())
        });
        extents.unwrap_or_default()
    }

    fn leaf_mut(&mut self, slot: usize) -> Option<(&mut LeafSlot, &mut Leaf)> {
        let slot = self.slots.get_mut(..self.live)?.get_mut(slot)?;
        let leaf = self.leaves.get_mut(usize::from(slot.leaf))?;
        Some((slot, leaf))
    }

    /// Returns the equal position in the next leaf if `position` is behind the last extent of a leaf.
    fn proper(&self, position: Position) -> Position {
        if position.at < self.extents(position.slot).len() {
            return position;
        }
        Position {
            slot: position.slot.wrapping_add(1),
            at: 0,
        }
    }

    /// Replaces an extent by a part of it.
    fn replace(&mut self, position: Position, part: DataExtent) {
        let Some((slot, Leaf(extents))) = self.leaf_mut(position.slot) else {
            return;
        };
        if let Some(extent) = extents.get_mut(position.at) {
            *extent = part;
        }
        if position.at == 0 {
            slot.first = part.range.start();
        }
    }

    /// Ensures that the leaf to which an extent belongs exists and is not full.
    fn make_room(&mut self, sector: u64) {
        let is_full = |tree: &Self| {
            let leaf = tree.directory().get(tree.slot_of(sector));
            leaf.is_none_or(|slot| slot.len() == LEAF)
        };
        if is_full(self) && self.live == self.capacity {
            self.evict();
        }
        // That leaf may have been the one that was forgotten.
        if is_full(self) {
            self.split(self.slot_of(sector), sector);
        }
    }

    /// Moves the upper half of a leaf to a free one behind it. Moves nothing if the sector is behind all extents of the
    /// leaf, so that extents that arrive in order fill their leaves.
    fn split(&mut self, slot: usize, sector: u64) {
        let extents = self.extents(slot);
        let kept = match extents.last() {
            Some(last) if sector < last.range.start() => LEAF / 2,
            _ => extents.len(),
        };
        let behind = slot.wrapping_add(1).min(self.live);
        if !self.open(behind, sector) {
            return;
        }
        for at in kept..LEAF {
            let Some(extent) = self.extents(slot).get(at).copied() else {
                break;
            };
            let Some((slot, Leaf(extents))) = self.leaf_mut(behind) else {
                break;
            };
            if let Some(place) = extents.get_mut(slot.len()) {
                *place = extent;
            }
            if slot.len == 0 {
                slot.first = extent.range.start();
            }
            slot.len = slot.len.wrapping_add(1);
        }
        self.drain(slot, kept, LEAF);
    }

    /// Inserts a free leaf into the directory. Returns `false` if there is none.
    fn open(&mut self, place: usize, first: u64) -> bool {
        if self.live >= self.capacity {
            return false;
        }
        let slots = self.slots.get_mut(place..=self.live);
        let Some(slots) = slots.filter(|slots| !slots.is_empty()) else {
            return false;
        };
        rotate_left(slots, slots.len().saturating_sub(1));
        if let Some(slot) = slots.first_mut() {
            slot.first = first;
        }
        self.live = self.live.wrapping_add(1);
        true
    }

    /// Removes leaves, from one slot of the directory to another.
    fn close(&mut self, from: usize, to: usize) {
        let Some(slots) = self.slots.get_mut(from..self.live) else {
            return;
        };
        let count = to.saturating_sub(from).min(slots.len());
        slots.iter_mut().take(count).for_each(|slot| slot.len = 0);
        rotate_left(slots, count);
        self.live = self.live.wrapping_sub(count);
    }

    /// Removes extents, from one position to another.
    fn remove(&mut self, from: Position, to: Position) {
        if from.slot == to.slot {
            // There is an extent at the position behind them, so the leaf does not become empty.
            return self.drain(from.slot, from.at, to.at);
        }
        self.drain(from.slot, from.at, LEAF);
        self.drain(to.slot, 0, to.at);
        self.close(from.slot.wrapping_add(usize::from(from.at > 0)), to.slot);
    }

    /// Removes extents of one leaf.
    fn drain(&mut self, slot: usize, from: usize, to: usize) {
        let Some((slot, Leaf(extents))) = self.leaf_mut(slot) else {
            return;
        };
        let Some(behind) = extents.get_mut(from..slot.len()) else {
            return;
        };
        let count = to.saturating_sub(from).min(behind.len());
        rotate_left(behind, count);
        // CAST: the extents of one leaf.
        slot.len = slot.len.wrapping_sub(count as u16);
        let [first, ..] = extents;
        slot.first = first.range.start();
    }

    /// Forgets a leaf that was not used lately, or a used one if the search takes too long.
    fn evict(&mut self) {
        for _ in 0..LOOKS {
            if self.hand >= self.live {
                self.hand = 0;
            }
            match self.slots.get_mut(self.hand) {
                Some(slot) if slot.used => slot.used = false,
                _ => break,
            }
            self.hand = self.hand.wrapping_add(1);
        }
        if self.hand >= self.live {
            self.hand = 0;
        }
        let lost = self.extents(self.hand).len();
        self.evicted = self
            .evicted
            .saturating_add(u64::try_from(lost).unwrap_or(0));
        self.close(self.hand, self.hand.wrapping_add(1));
    }
}

// `core` has the functions below, but with arithmetic that panics on overflow, which a kernel module must not have.

/// Returns the number of leading items for which `is_before` is true; it is false for all items behind them.
fn partition<T>(items: &[T], is_before: impl Fn(&T) -> bool) -> usize {
    let (mut low, mut high) = (0usize, items.len());
    while low < high {
        let middle = low.wrapping_add(high.wrapping_sub(low) / 2);
        if items.get(middle).is_some_and(&is_before) {
            low = middle.wrapping_add(1);
        } else {
            high = middle;
        }
    }
    low
}

/// Moves the first `count` items behind the others.
fn rotate_left<T>(items: &mut [T], count: usize) {
    if let Some((head, tail)) = items.split_at_mut_checked(count) {
        reverse(head);
        reverse(tail);
        reverse(items);
    }
}

fn reverse<T>(mut items: &mut [T]) {
    while let [first, between @ .., last] = items {
        core::mem::swap(first, last);
        items = between;
    }
}
