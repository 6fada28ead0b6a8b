// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What remains of an engine whose guest is gone: I/O in flight and its pages.

use crate::engine::backend::Backend;
use crate::engine::complete::complete;
use crate::engine::parts::Engine;
use crate::engine::requests::Requests;
use crate::engine::transfers::Transfers;
use crate::ring::grants::Grants;
use crate::ring::response::Status;

/// What remains of an engine whose guest is gone. Nobody is answered any more.
#[derive(Debug)]
pub struct Rest<'a, G, B> {
    pub(super) requests: Requests<'a>,
    pub(super) transfers: Transfers<'a, G>,
    pub(super) backend: B,
}

impl<'a, R, G, B> Engine<'a, R, G, B> {
    /// Lets go of the guest's ring; what is in flight can only be waited for.
    pub fn detach(self) -> Rest<'a, G, B> {
        Rest {
            requests: self.requests,
            transfers: self.transfers,
            backend: self.backend,
        }
    }
}

impl<G: Grants, B: Backend> Rest<'_, G, B> {
    /// True while what is in flight must be waited for.
    pub fn is_bound(&self) -> bool {
        self.backend.is_bound(self.requests.used())
    }

    /// Unmaps and frees what has completed; true while what is in flight must be waited for.
    pub fn drain(&mut self) -> bool {
        let requests = &mut self.requests;
        while let Some(handle) = requests.pop_stalled() {
            requests.push_taken(handle.resume());
        }
        // These were never given to the backend.
        while let Some(handle) = requests.pop_taken() {
            requests.push_completed(handle.fail());
        }
        // Nobody reads how long it took.
        complete(requests, &mut self.backend, |_| ());
        self.end_given_back();
        let requests = &mut self.requests;
        let mut at = requests.completed.first();
        while let Some(tag) = at {
            at = requests.after(tag);
            self.transfers.unmap(requests, tag);
        }
        // Also what no request uses: the guest's domain stays as long as anything of it is mapped.
        self.transfers.sweep(true);
        while let Some(handle) = requests.pop_completed() {
            let _nobody_reads_it = requests.end(handle);
        }
        self.is_bound()
    }

    // Not part of its caller, so that the one has a small frame.
    #[inline(never)]
    fn end_given_back(&mut self) {
        let requests = &mut self.requests;
        self.backend.give_back(|tag| {
            if let Some(handle) = requests.complete(tag, Status::Error) {
                requests.push_completed(handle);
            }
        });
    }
}
