// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The rest of an engine whose guest is gone: I/O in flight and its pages.

use crate::engine::backend::Backend;
use crate::engine::complete::complete;
use crate::engine::requests::Requests;
use crate::engine::state::Engine;
use crate::engine::transfers::Transfers;
use crate::ring::grants::Grants;
use crate::ring::response::ResponseStatus;

/// The rest of an engine whose guest is gone. It answers no more requests.
#[derive(Debug)]
pub struct DetachedEngine<'a, G, B> {
    pub(super) requests: Requests<'a>,
    pub(super) transfers: Transfers<'a, G>,
    pub(super) backend: B,
}

impl<'a, R, G, B> Engine<'a, R, G, B> {
    /// Gives the guest's ring back; the I/O in flight can then only be waited for.
    pub fn detach(self) -> DetachedEngine<'a, G, B> {
        DetachedEngine {
            requests: self.requests,
            transfers: self.transfers,
            backend: self.backend,
        }
    }
}

impl<G: Grants, B: Backend> DetachedEngine<'_, G, B> {
    /// Reports whether I/O in flight must be waited for.
    pub fn is_bound(&self) -> bool {
        self.backend.is_bound(self.requests.used())
    }

    /// Unmaps the pages that no request uses and storage does not hold. Never waits.
    pub fn let_go(&mut self) {
        self.transfers.sweep(true);
    }

    /// Unmaps and frees the pages of completed requests; returns true while I/O in flight must be waited for.
    pub fn drain(&mut self) -> bool {
        let requests = &mut self.requests;
        // The guest has its ring back, so the thread may wait until storage releases the pages.
        requests.look_at_held();
        while let Some(handle) = requests.pop_stalled() {
            requests.push_taken(handle.resume());
        }
        // The backend never got these requests.
        while let Some(handle) = requests.pop_taken() {
            requests.push_completed(handle.fail());
        }
        self.backend.forget_wake_ups();
        // These times are not counted.
        complete(requests, &mut self.backend, |_| ());
        self.end_given_back();
        let requests = &mut self.requests;
        let mut at = requests.completed.first();
        while let Some(tag) = at {
            at = requests.after(tag);
            self.transfers.unmap(requests, tag);
        }
        // Pages that no request uses are unmapped too, because the guest's domain cannot go while any of its pages is
        // mapped.
        self.transfers.sweep(true);
        while let Some(handle) = requests.pop_completed() {
            let _nobody_reads_it = requests.end(handle);
        }
        self.is_bound()
    }

    // A function of its own, so that its caller has a small stack frame.
    #[inline(never)]
    fn end_given_back(&mut self) {
        let requests = &mut self.requests;
        self.backend.give_back(|tag| {
            if let Some(handle) = requests.complete(tag, ResponseStatus::Error) {
                requests.push_completed(handle);
            }
        });
    }
}
