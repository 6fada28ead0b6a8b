// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Complete: record what the backend has completed.

use crate::engine::backend::Backend;
use crate::engine::requests::{PendingRequest, Requests};
use crate::engine::state::Engine;
use crate::engine::timing::times::Times;
use crate::ring::grants::Grants;
use crate::ring::numbers::QueueTag;
use crate::ring::response::ResponseStatus;
use crate::ring::shared_ring::SharedRing;

/// Earlier wake-ups of the queue's thread, in a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WakeUps {
    /// The pass finds what they were for.
    Forgotten,
    /// The thread sleeps while others make the pass.
    Kept,
}

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    pub(super) fn complete(&mut self, wake_ups: WakeUps) {
        if wake_ups == WakeUps::Forgotten {
            self.backend.forget_wake_ups();
        }
        self.collect();
        self.take_back();
    }

    /// Records what the backend has completed, and nothing else.
    fn collect(&mut self) {
        let mut batch = Times::default();
        complete(&mut self.requests, &mut self.backend, |request| {
            batch.ends(request.kind, request.since);
        });
        self.add_times(&batch);
    }

    /// Records what can be collected in any context. Returns true if something is left for the thread.
    pub(super) fn collect_anywhere(&mut self) -> bool {
        let mut batch = Times::default();
        let record = recorder(&mut self.requests, |request| {
            batch.ends(request.kind, request.since);
        });
        let left = self.backend.reap_anywhere(record);
        self.add_times(&batch);
        left
    }

    fn add_times(&mut self, batch: &Times) {
        if !batch.is_empty() {
            let now = self.clock.look(&self.backend);
            self.stats.times.add(batch, now);
        }
    }

    /// Makes requests wait for copy pages if the backend cannot serve them from mapped pages.
    fn take_back(&mut self) {
        let requests = &mut self.requests;
        let mut any = false;
        self.backend.give_back(|tag| {
            if let Some(handle) = requests.take_back(tag) {
                any = true;
                requests.push_stalled(handle);
            }
        });
        if any {
            self.unmap_stalled();
        }
    }
}

/// Moves requests whose I/O is done to the list of those that wait for their answer.
pub(super) fn complete(
    requests: &mut Requests<'_>,
    backend: &mut impl Backend,
    ended: impl FnMut(&PendingRequest),
) {
    backend.reap(recorder(requests, ended));
}

/// Returns the code that moves a request to that list when its I/O is done.
#[inline]
fn recorder<'r, 'q, F: FnMut(&PendingRequest)>(
    requests: &'r mut Requests<'q>,
    mut ended: F,
) -> impl FnMut(QueueTag, ResponseStatus) + use<'r, 'q, F> {
    move |tag, status| {
        // A completion of a request that the backend does not have is ignored.
        if let Some(handle) = requests.complete(tag, status) {
            ended(requests.of(&handle));
            requests.push_completed(handle);
        }
    }
}
