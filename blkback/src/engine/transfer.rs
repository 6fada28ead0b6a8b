// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Moving data between the guest's pages and ours: copies and maps, in and out.

use crate::engine::backend::{Backend, IoKind};
use crate::engine::pass::Engine;
use crate::engine::segments::{Pool, Segments, Slice};
use crate::engine::slots::{List, Slot, Slots};
use crate::ring::grants::{Buffer, Copy, CopyDirection, Grants, MapOutcome};
use crate::ring::numbers::{PageIndex, QueueTag};
use crate::ring::ports::SharedRing;
use crate::ring::response::Status;

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Copies the data of new writes in and maps the pages of large requests.
    pub(super) fn bring_in(&mut self) {
        let mut at = self.new.first();
        let (mut copies, mut maps) = (false, false);
        while let Some(tag) = at {
            at = self.slots.after(tag);
            let Some(slot) = self.slots.get(tag) else {
                break;
            };
            if slot.status != Status::Okay || slot.count == 0 {
                continue;
            }
            let slot = *slot;
            if slot.pool == Pool::Map {
                self.stats.mapped = self.stats.mapped.wrapping_add(1);
                maps = true;
                self.queue_maps(tag, &slot);
            } else if slot.copies_in() {
                copies = true;
                self.queue_copies(tag, &slot, CopyDirection::FromGuest);
            }
        }
        if copies {
            run_copies(&mut self.grants, &mut self.slots);
        }
        if maps {
            run_maps(&mut self.grants, &mut self.slots, &mut self.segments);
            self.rescue_unmappable();
        }
    }
    /// Turns requests for whose pages the hypervisor has no room into copied ones.
    pub(super) fn rescue_unmappable(&mut self) {
        let mut keep = List::EMPTY;
        while let Some(tag) = self.slots.pop(&mut self.new) {
            let unmappable = self.slots.get(tag).is_some_and(|slot| slot.unmappable);
            let list = if unmappable {
                &mut self.stalled
            } else {
                &mut keep
            };
            self.slots.push(list, tag);
        }
        self.new = keep;
        if !self.stalled.is_empty() {
            self.unmap_stalled();
            self.retry = true;
        }
    }

    pub(super) fn unmap_stalled(&mut self) {
        let mut at = self.stalled.first();
        while let Some(tag) = at {
            at = self.slots.after(tag);
            if let Some(slot) = self.slots.get(tag).copied() {
                queue_unmaps(&mut self.grants, &mut self.segments, &slot);
            }
        }
        run_unmaps(&mut self.grants, &mut self.segments);
    }

    /// Moves stalled requests to copy pages, in order, as far as there are any.
    pub(super) fn retry_stalled(&mut self) {
        while let Some(tag) = self.stalled.first() {
            let Some(slot) = self.slots.get(tag).copied() else {
                return;
            };
            let Some(chain) = self.room(Pool::Copy, slot.count, true) else {
                if self.segments.most(Pool::Copy) >= slot.count {
                    return;
                }
                self.slots.pop(&mut self.stalled);
                if let Some(entry) = self.slots.get_mut(tag) {
                    // Or a later failure to map something else would stall it once more.
                    entry.unmappable = false;
                    entry.status = Status::Error;
                }
                self.slots.push(&mut self.new, tag);
                continue;
            };
            self.slots.pop(&mut self.stalled);
            self.segments.move_chain(slot.head, chain.head, slot.count);
            self.segments.release(Pool::Map, slot.head, slot.count);
            let sectors = self.segments.sectors(chain.head, chain.count);
            if let Some(entry) = self.slots.get_mut(tag) {
                entry.pool = Pool::Copy;
                entry.set_chain(chain);
                entry.sectors = sectors;
                entry.status = Status::Okay;
                entry.unmappable = false;
            }
            self.slots.push(&mut self.new, tag);
        }
    }

    /// Copies the data of reads out and unmaps what was mapped.
    pub(super) fn bring_out(&mut self) {
        let mut at = self.done.first();
        let (mut copies, mut unmaps) = (false, false);
        while let Some(tag) = at {
            at = self.slots.after(tag);
            let Some(slot) = self.slots.get(tag).copied() else {
                break;
            };
            if slot.count == 0 {
                continue;
            }
            if slot.pool == Pool::Map {
                unmaps = true;
                queue_unmaps(&mut self.grants, &mut self.segments, &slot);
            } else if slot.copies_out() {
                copies = true;
                self.queue_copies(tag, &slot, CopyDirection::ToGuest);
            }
        }
        if copies {
            run_copies(&mut self.grants, &mut self.slots);
        }
        if unmaps {
            // Before the answer: afterwards the guest may use its pages for something else.
            run_unmaps(&mut self.grants, &mut self.segments);
        }
    }

    pub(super) fn queue_copies(&mut self, tag: QueueTag, slot: &Slot, direction: CopyDirection) {
        for slice in self.segments.slices(slot.head, slot.count) {
            let copy = Copy {
                tag,
                gref: slice.gref,
                buffer: Buffer::Page(slice.page),
                offset: slice.offset,
                len: slice.len,
                direction,
            };
            queue_copy(&mut self.grants, &mut self.slots, &copy);
        }
    }

    pub(super) fn queue_maps(&mut self, tag: QueueTag, slot: &Slot) {
        let read_only = slot.kind != IoKind::Read;
        let mut at = slot.head;
        for _ in 0..slot.count {
            let Some(Slice { page, gref, .. }) = self.segments.slices(at, 1).next() else {
                return;
            };
            at = self.segments.after(at);
            if !self.grants.queue_map(tag, page, gref, read_only) {
                run_maps(&mut self.grants, &mut self.slots, &mut self.segments);
                if !self.grants.queue_map(tag, page, gref, read_only) {
                    fail(&mut self.slots, tag);
                }
            }
        }
    }
}

pub(super) fn fail(slots: &mut Slots<'_>, tag: QueueTag) {
    if let Some(slot) = slots.get_mut(tag) {
        slot.status = Status::Error;
    }
}

pub(super) fn run_copies<G: Grants>(grants: &mut G, slots: &mut Slots<'_>) {
    grants.run_copies(|tag| fail(slots, tag));
}

#[inline]
pub(super) fn queue_copy<G: Grants>(grants: &mut G, slots: &mut Slots<'_>, copy: &Copy) {
    if !grants.queue_copy(copy) {
        queue_copy_of_next_batch(grants, slots, copy);
    }
}

#[cold]
fn queue_copy_of_next_batch<G: Grants>(grants: &mut G, slots: &mut Slots<'_>, copy: &Copy) {
    run_copies(grants, slots);
    if !grants.queue_copy(copy) {
        fail(slots, copy.tag);
    }
}

pub(super) fn run_unmaps<G: Grants>(grants: &mut G, segments: &mut Segments<'_>) {
    grants.run_unmaps(|page| segments.lose(page));
}

pub(super) fn queue_unmaps<G: Grants>(grants: &mut G, segments: &mut Segments<'_>, slot: &Slot) {
    if slot.pool != Pool::Map {
        return;
    }
    let mut at = slot.head;
    for _ in 0..slot.count {
        let page = PageIndex::new(at);
        at = segments.after(at);
        if let Some(handle) = segments.handle(page) {
            if !grants.queue_unmap(page, handle) {
                run_unmaps(grants, segments);
                // The batch is empty now, so it takes the operation.
                let _queued = grants.queue_unmap(page, handle);
            }
            segments.set_handle(page, None);
        }
    }
}

pub(super) fn run_maps<G: Grants>(
    grants: &mut G,
    slots: &mut Slots<'_>,
    segments: &mut Segments<'_>,
) {
    grants.run_maps(|tag, page, outcome| match outcome {
        MapOutcome::Mapped(handle) => segments.set_handle(page, Some(handle)),
        MapOutcome::Refused => {
            fail(slots, tag);
            if let Some(slot) = slots.get_mut(tag) {
                slot.refused = true;
                slot.unmappable = false;
            }
        }
        MapOutcome::NoSpace => {
            fail(slots, tag);
            if let Some(slot) = slots.get_mut(tag) {
                slot.unmappable = !slot.refused;
            }
        }
    });
}
