// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Copy out: the data of reads into the guest's pages; and unmap the pages of large requests.
//!
//! An unmap waits until no one else has a reference to the page, and network storage keeps one until its peer has
//! acknowledged the data. So a request with such a page is set aside with its pages until a later pass, and only that
//! request waits, not the queue.

use crate::engine::backend::Backend;
use crate::engine::segments::Pool;
use crate::engine::state::Engine;
use crate::ring::grants::{CopyDirection, Grants};
use crate::ring::shared_ring::SharedRing;

/// A build that is never shipped answers before it unmaps, which happens with a later request (`fault_injection.rs`).
const UNMAPS_LATE: bool = cfg!(planted_faults);

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Returns whether storage holds a page of one of the requests, which are marked.
    pub(super) fn copy_out(&mut self) -> bool {
        let (requests, transfers) = (&mut self.requests, &mut self.transfers);
        let mut at = requests.completed.first();
        let (mut copies, mut unmaps, mut held) = (false, false, false);
        while let Some(tag) = at {
            at = requests.after(tag);
            let Some(request) = requests.get(tag) else {
                break;
            };
            if request.count == 0 {
                continue;
            }
            if request.pool == Pool::Map {
                if transfers.is_held(requests, tag) {
                    requests.slots.hold(tag);
                    held = true;
                    continue;
                }
                unmaps = true;
                transfers.unmap(requests, tag);
            } else if request.copies_out() {
                copies = true;
                transfers.copy(requests, tag, CopyDirection::ToGuest);
            }
        }
        if copies {
            transfers.run_copies(&mut requests.slots);
        }
        if unmaps && !UNMAPS_LATE {
            // Before the answer: afterwards the guest may use its pages for something else.
            transfers.run_unmaps();
        }
        held
    }
}
