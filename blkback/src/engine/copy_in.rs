// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Copy in: the data of new writes into our pages; and map the pages of large requests.

use crate::engine::backend::Backend;
use crate::engine::requests::{PendingRequest, StageList};
use crate::engine::segments::Pool;
use crate::engine::state::Engine;
use crate::ring::grants::{CopyDirection, Grants};
use crate::ring::numbers::QueueTag;
use crate::ring::response::ResponseStatus;
use crate::ring::shared_ring::SharedRing;

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    pub(super) fn copy_in(&mut self) {
        let (requests, transfers) = (&mut self.requests, &mut self.transfers);
        let mut at = requests.taken.first();
        let (mut copies, mut maps) = (false, false);
        while let Some(tag) = at {
            at = requests.after(tag);
            let Some(request) = requests.get(tag) else {
                break;
            };
            if request.status != ResponseStatus::Okay || request.count == 0 {
                continue;
            }
            if request.pool == Pool::Map {
                self.stats.mapped = self.stats.mapped.wrapping_add(1);
                maps = true;
                transfers.map(requests, tag);
            } else if request.copies_in() {
                copies = true;
                transfers.copy(requests, tag, CopyDirection::FromGuest);
            }
        }
        if maps {
            transfers.run_maps(requests);
            copies |= self.copy_unmappable();
        }
        if copies {
            self.transfers.run_copies(&mut self.requests.slots);
        }
    }

    /// Moves requests whose pages there is no room to map to copy pages, at once if such pages are free. Returns true
    /// if data must be copied now.
    fn copy_unmappable(&mut self) -> bool {
        self.stall_unmappable();
        let Some(first) = self.resume_stalled() else {
            return false;
        };
        let mut at = Some(first);
        let mut copies = false;
        while let Some(tag) = at {
            at = self.requests.after(tag);
            let request = self.requests.get(tag);
            if request.is_some_and(PendingRequest::copies_in) {
                copies = true;
                let direction = CopyDirection::FromGuest;
                self.transfers.copy(&mut self.requests, tag, direction);
            }
        }
        copies
    }

    /// Sets aside the requests whose pages there is no room to map.
    fn stall_unmappable(&mut self) {
        let requests = &mut self.requests;
        let mut keep = StageList::EMPTY;
        while let Some(handle) = requests.pop_taken() {
            if requests.of(&handle).unmappable {
                requests.push_stalled(handle.stall());
            } else {
                requests.push(&mut keep, handle);
            }
        }
        requests.taken = keep;
        self.unmap_stalled();
    }

    /// Unmaps the pages of the requests that are set aside: they need no mappings any more, and may find copy pages.
    pub(super) fn unmap_stalled(&mut self) {
        let requests = &mut self.requests;
        if requests.stalled.is_empty() {
            return;
        }
        let mut at = requests.stalled.first();
        while let Some(tag) = at {
            at = requests.after(tag);
            self.transfers.unmap(requests, tag);
        }
        let transfers = &mut self.transfers;
        // Storage or a process may hold a page although it did not execute the request.
        self.backend.aside(|| transfers.run_unmaps());
        self.retry = true;
    }

    /// Moves stalled requests to copy pages, in order, while there are enough pages. Returns the first of them, behind
    /// which the others are.
    pub(super) fn resume_stalled(&mut self) -> Option<QueueTag> {
        let mut first = None;
        while let Some(tag) = self.requests.stalled.first() {
            let Some(request) = self.requests.get(tag).copied() else {
                break;
            };
            let chain = self.room(Pool::Copy, request.count, true);
            if chain.is_none() && self.requests.segments.most(Pool::Copy) >= request.count {
                break;
            }
            let Some(handle) = self.requests.pop_stalled() else {
                break;
            };
            first = first.or(Some(tag));
            // Or a later failure to map something else would stall it once more.
            self.requests.of_mut(&handle).unmappable = false;
            if let Some(chain) = chain {
                let segments = &mut self.requests.segments;
                segments.move_chain(request.head, chain.head, request.count);
                segments.release(Pool::Map, request.head, request.count);
                let sectors = segments.sectors(chain.head, chain.count);
                let entry = self.requests.of_mut(&handle);
                entry.pool = Pool::Copy;
                entry.set_chain(chain);
                entry.sectors = sectors;
                entry.status = ResponseStatus::Okay;
            } else {
                self.requests.of_mut(&handle).status = ResponseStatus::Error;
            }
            self.requests.push_taken(handle.resume());
        }
        first
    }
}
