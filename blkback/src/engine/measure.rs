// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Measure: where requests spend their time before the backend has them and after that, while somebody wants to know:
//! in the ring, while their pages are brought in, and until they are answered.
//!
//! When the frontend has put a request into the ring nobody says. It was after the last look that found none, and not
//! before the event that woke the queue: so what is counted is the longest time that it can have been.

use crate::engine::backend::Backend;
use crate::engine::latency::Span;
use crate::engine::parts::Engine;
use crate::engine::spans::Spans;
use crate::ring::grants::Grants;
use crate::ring::ports::SharedRing;

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Requests are taken from here on.
    pub(super) fn begin_taking(&mut self) {
        self.latencies.spans.taken = match self.latencies.is_on() {
            true => self.backend.now(),
            false => 0,
        };
    }

    /// So many were taken, and others came later.
    pub(super) fn end_taking(&mut self, count: u32) {
        let Spans { empty, taken, .. } = self.latencies.spans;
        if taken != 0 && empty != 0 {
            let waited = taken.saturating_sub(empty);
            self.latencies.add_span(Span::Ring, waited, count);
        }
        self.latencies.spans.empty = taken;
    }

    /// There is nothing in the ring.
    pub(super) fn ring_is_empty(&mut self) {
        if self.latencies.is_on() {
            self.latencies.spans.empty = self.backend.now();
        }
    }

    /// An event of the frontend's came then, in nanoseconds: the first one since the ring was empty.
    pub fn woken(&mut self, at: u64) {
        if self.latencies.is_on() {
            self.latencies.spans.empty = self.latencies.spans.empty.max(at);
        }
    }

    /// A request that the backend gets now came to where it is at that time.
    #[inline]
    pub(super) fn note_pages(&mut self, since: u64, now: u64) {
        if self.latencies.is_on() && since != 0 {
            let took = now.saturating_sub(since);
            self.latencies.add_span(Span::Pages, took, 1);
        }
    }

    /// A request is answered.
    #[inline]
    pub(super) fn note_answer(&mut self) {
        if !self.latencies.is_on() {
            return;
        }
        if self.latencies.spans.held == 0 {
            self.latencies.spans.held_since = self.clock.last(&self.backend);
        }
        self.latencies.spans.held = self.latencies.spans.held.wrapping_add(1);
    }

    /// The guest sees all answers.
    pub(super) fn note_published(&mut self) {
        let count = core::mem::replace(&mut self.latencies.spans.held, 0);
        if count > 0 {
            let held = self
                .backend
                .now()
                .saturating_sub(self.latencies.spans.held_since);
            self.latencies.add_span(Span::Answer, held, count);
        }
    }
}
