// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Measure: where requests spend their time outside the backend while counting is on: in the ring, while their pages
//! are brought in, and until they are answered.
//!
//! The frontend does not say when it put a request into the ring. It was after the last look that found the ring empty,
//! and not before the event that woke the queue, so the longest possible time is counted.

use crate::engine::backend::Backend;
use crate::engine::state::Engine;
use crate::engine::timing::latency::LatencySpan;
use crate::engine::timing::spans::Spans;
use crate::ring::grants::Grants;
use crate::ring::shared_ring::SharedRing;

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Records the time at which a pass begins to take requests.
    pub(in crate::engine) fn begin_taking(&mut self) {
        self.latencies.spans.taken = match self.latencies.is_on() {
            true => self.backend.now(),
            false => 0,
        };
    }

    /// Records that `count` requests were taken; any others came later.
    pub(in crate::engine) fn end_taking(&mut self, count: u32) {
        let Spans { empty, taken, .. } = self.latencies.spans;
        if taken != 0 && empty != 0 {
            let waited = taken.saturating_sub(empty);
            self.latencies.add_span(LatencySpan::Ring, waited, count);
        }
        self.latencies.spans.empty = taken;
    }

    /// Records that the ring was found empty.
    pub(in crate::engine) fn ring_is_empty(&mut self) {
        if self.latencies.is_on() {
            self.latencies.spans.empty = self.backend.now();
        }
    }

    /// Records the frontend's first event since the ring was empty. `at` is its time in nanoseconds.
    pub fn woken(&mut self, at: u64) {
        if self.latencies.is_on() {
            self.latencies.spans.empty = self.latencies.spans.empty.max(at);
        }
    }

    /// Counts how long a request that the backend gets now has waited for its pages.
    #[inline]
    pub(in crate::engine) fn note_pages(&mut self, since: u64, now: u64) {
        if self.latencies.is_on() && since != 0 {
            let took = now.saturating_sub(since);
            self.latencies.add_span(LatencySpan::Pages, took, 1);
        }
    }

    /// Records that a request is answered.
    #[inline]
    pub(in crate::engine) fn note_answer(&mut self) {
        if !self.latencies.is_on() {
            return;
        }
        if self.latencies.spans.held == 0 {
            self.latencies.spans.held_since = self.clock.last(&self.backend);
        }
        self.latencies.spans.held = self.latencies.spans.held.wrapping_add(1);
    }

    /// Counts how long the answers that the guest now sees were held back.
    pub(in crate::engine) fn note_published(&mut self) {
        let count = core::mem::replace(&mut self.latencies.spans.held, 0);
        if count > 0 {
            let held = self
                .backend
                .now()
                .saturating_sub(self.latencies.spans.held_since);
            self.latencies.add_span(LatencySpan::Answer, held, count);
        }
    }
}
