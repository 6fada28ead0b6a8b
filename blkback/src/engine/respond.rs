// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Respond: answer completed requests, or begin their next piece.

use crate::engine::backend::{Backend, IoKind};
use crate::engine::requests::{Completed, Handle};
use crate::engine::state::Engine;
use crate::ring::grants::Grants;
use crate::ring::request::Reject;
use crate::ring::response::{Response, ResponseStatus};
use crate::ring::shared_ring::SharedRing;

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Answers all completed requests and returns their number.
    pub(super) fn respond(&mut self) -> u32 {
        if self.requests.completed.is_empty() {
            return 0;
        }
        let mut answered = self.answer_at_once();
        if self.requests.completed.is_empty() {
            return answered;
        }
        let any_held = self.copy_out();
        while let Some(handle) = self.requests.pop_completed() {
            if any_held && self.requests.of(&handle).held {
                self.requests.push_held(handle);
                continue;
            }
            self.finish(handle);
            answered = answered.wrapping_add(1);
        }
        answered
    }

    /// Answers a request, or begins its next piece.
    fn finish(&mut self, handle: Handle<Completed>) {
        self.note_latency(&handle);
        let request = self.requests.of_mut(&handle);
        if matches!(request.kind, IoKind::Discard { .. }) && request.status == ResponseStatus::Okay
        {
            let piece = request.piece();
            request.sector = request.sector.wrapping_add(piece);
            request.sectors = request.sectors.wrapping_sub(piece);
            if request.sectors > 0 && self.closing {
                request.status = ResponseStatus::Error;
            } else if request.sectors > 0 {
                self.requests.push_taken(handle.go_on());
                return;
            }
        }
        if request.left > 0 && request.status == ResponseStatus::Okay {
            self.next_piece(handle);
            return;
        }
        if request.kind == IoKind::BarrierWrite {
            self.barrier = false;
        }
        if request.status != ResponseStatus::Okay {
            self.stats.failed = self.stats.failed.wrapping_add(1);
        }
        self.note_answer();
        let response = self.requests.end(handle);
        self.answer(&response);
    }

    /// Counts how long an I/O took, while counting is on. A failed I/O is not counted, because it may never have begun.
    #[inline]
    fn note_latency(&mut self, handle: &Handle<Completed>) {
        if !self.latencies.is_on() {
            return;
        }
        let request = self.requests.of(handle);
        let (kind, status, since) = (request.kind, request.status, request.since);
        // The clock was read when the request was found to be complete.
        let now = self.clock.last(&self.backend);
        if status == ResponseStatus::Okay {
            self.latencies.add(kind, now.saturating_sub(since));
        }
        // The next piece, if there is one, begins here.
        self.requests.of_mut(handle).since = now;
    }

    /// Answers a request that is not well-formed.
    pub(super) fn refuse(&mut self, reject: &Reject) {
        self.stats.refused = self.stats.refused.wrapping_add(1);
        self.answer(&reject.response);
    }

    pub(super) fn answer(&mut self, response: &Response) {
        if !self.ring.respond(response) {
            // Every slot in use stands for a request that was taken and not answered.
            self.stats.failed = self.stats.failed.wrapping_add(1);
        }
    }

    /// Shows the guest all answers at once; returns true if the guest wants an event.
    pub(super) fn publish(&mut self) -> bool {
        let notify = self.ring.publish();
        self.note_published();
        if notify {
            self.stats.notified = self.stats.notified.wrapping_add(1);
        }
        notify
    }
}
