// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The short way of a read or write whose guest pages all stay mapped: from the ring into the batch of the backend, and
//! from its completion to its answer, without the steps between, in which nothing would be done for such a request.
//!
//! Requests keep their order: one takes the short way only if none before it is left on the long one. While the
//! engine measures how long requests spend in each step, all take the long way.

use crate::engine::backend::{Backend, IoKind};
use crate::engine::requests::{Handle, PendingRequest, StageList, Taken};
use crate::engine::segments::Pool;
use crate::engine::state::Engine;
use crate::engine::submit::add;
use crate::ring::grants::Grants;
use crate::ring::request::Plain;
use crate::ring::response::ResponseStatus;
use crate::ring::shared_ring::SharedRing;

impl PendingRequest {
    /// Reports whether its answer is all that is left to do, provided that its pages stay mapped.
    #[inline]
    pub(super) fn needs_no_step(&self) -> bool {
        self.pool == Pool::Map
            && self.status == ResponseStatus::Okay
            && matches!(self.kind, IoKind::Read | IoKind::Write)
    }
}

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Reports whether the next request may take the short way to the backend.
    #[inline]
    pub(super) fn is_quick(&self) -> bool {
        self.requests.taken.is_empty() && !self.latencies.is_on()
    }

    /// Answers the completed requests of which nothing else is left to do, and returns their number. There is none while any
    /// page is unmapped with its request.
    pub(super) fn answer_at_once(&mut self) -> u32 {
        if self.transfers.mappings.any_goes() || self.latencies.is_on() {
            return 0;
        }
        let mut others = StageList::EMPTY;
        let mut answered: u32 = 0;
        while let Some(handle) = self.requests.pop_completed() {
            if !self.requests.of(&handle).needs_no_step() {
                self.requests.push(&mut others, handle);
                continue;
            }
            let transfers = &mut self.transfers;
            // Each page stays mapped, so none has to be unmapped before the answer.
            let response = self
                .requests
                .end_mapped(handle, |page| transfers.let_go(page));
            self.answer(&response);
            answered = answered.wrapping_add(1);
        }
        self.requests.completed = others;
        answered
    }

    /// Fills the chain from `head` with the segments of a request and the pages at which they are mapped already.
    /// Returns false if one is not; the chain then has some of the others.
    #[inline]
    pub(super) fn find_pages(&mut self, head: u16, plain: &Plain<'_>) -> bool {
        let segments = &mut self.requests.segments;
        let mut at = head;
        for segment in plain.segments() {
            let Some(page) = self.transfers.mappings.find(segment.gref()) else {
                return false;
            };
            at = segments.fill_at(at, segment, page);
        }
        true
    }

    /// Hands a request to the backend in the next step. Its segments have their pages.
    #[inline]
    pub(super) fn start_at_once(&mut self, handle: Handle<Taken>) {
        let now = self.batch.begin(|| self.clock.look(&self.backend));
        let request = self.requests.of_mut(&handle);
        add(self.stats, request);
        request.counted = true;
        self.stats.mapped = self.stats.mapped.wrapping_add(1);
        self.batch.add(self.requests.start(handle, now));
    }
}
