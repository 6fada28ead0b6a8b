// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! One pass over a ring: all steps in their order.

use crate::engine::backend::{Backend, ReapContext};
use crate::engine::complete::WakeUps;
use crate::engine::state::Engine;
use crate::ring::grants::Grants;
use crate::ring::shared_ring::SharedRing;

/// The result of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Pass {
    /// The frontend must be sent an event.
    pub notify: bool,
    /// There is more to do at once, so the thread must not sleep.
    pub again: bool,
    /// Requests whose I/O is done wait until storage releases their pages, which nothing reports, so the caller must
    /// make another pass soon.
    pub held: bool,
    /// The frontend's indices are impossible; only completions are served from now on.
    pub broken: bool,
    /// Requests taken in this pass.
    pub taken: u32,
    /// Completed requests that this pass has answered.
    pub answered: u32,
}

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Answers completed requests, takes new ones, starts them, and publishes the answers.
    pub fn pass(&mut self) -> Pass {
        self.one_pass(WakeUps::Forgotten, Self::take)
    }

    /// Makes a pass in place of the thread, which sleeps meanwhile. It leaves new requests to the thread if nothing is in
    /// flight any more: more of them gather until the thread runs.
    pub(super) fn pass_for_thread(&mut self) -> Pass {
        self.one_pass(WakeUps::Kept, |engine| match engine.in_flight() {
            0 => 0,
            _ => engine.take(),
        })
    }

    /// Makes a pass that takes no new request, for teardown.
    pub fn drain_pass(&mut self) -> Pass {
        self.closing = true;
        self.one_pass(WakeUps::Forgotten, |engine| {
            engine.take_waiting();
            0
        })
    }

    fn one_pass(&mut self, wake_ups: WakeUps, take: impl FnOnce(&mut Self) -> u32) -> Pass {
        if self.ring.is_gone() {
            return Pass::default();
        }
        self.stats.passes = self.stats.passes.wrapping_add(1);
        self.clock.begin();
        self.requests.look_at_held();
        self.complete(wake_ups);
        if self.ring.is_gone() {
            // The ring was given back while pages were unmapped.
            return Pass::default();
        }
        let mut answered = self.respond();
        let taken = take(self);
        let full = self.ring.unanswered() >= self.ring.size();
        self.stats.ring_full = self.stats.ring_full.wrapping_add(full.into());
        self.fetch();
        self.copy_in();
        self.submit();
        if self.backend.can_resume() {
            self.backend.resume();
        }
        if self.ring.is_gone() {
            // The ring was given back while I/O was started: the domain number may belong to another guest now.
            return Pass::default();
        }
        // I/O that completed at once is answered in this pass.
        self.complete(wake_ups);
        if self.ring.is_gone() {
            return Pass::default();
        }
        let now = self.respond();
        answered = answered.wrapping_add(now);
        if answered > 0 && self.is_served_by_tasks() {
            let now = self.clock.last(&self.backend);
            self.gathering.answered(now);
        }
        // A completion frees the pages or numbers that a parked request waits for.
        let waiting = self.parked.is_some() || !self.requests.stalled.is_empty();
        self.count_page_wait();
        let retry = core::mem::replace(&mut self.retry, false);
        // I/O may have become resumable after the check above and before the completions were collected, which clears
        // the record that the queue was woken. So it is checked again.
        let resumable = self.backend.can_resume();
        Pass {
            notify: self.publish(),
            again: !self.requests.taken.is_empty() || (now > 0 && waiting) || retry || resumable,
            held: !self.requests.held.is_empty(),
            broken: self.ring.is_broken(),
            taken,
            answered,
        }
    }

    /// Counts for how long a request has been waiting for pages: from the pass that found too few to the pass that
    /// found enough.
    fn count_page_wait(&mut self) {
        let waits = self.is_short_of_pages();
        if !waits && self.short_since.is_none() {
            return;
        }
        let now = self.clock.last(&self.backend);
        let waited = now.saturating_sub(self.short_since.unwrap_or(now));
        self.stats.page_wait_ns = self.stats.page_wait_ns.wrapping_add(waited);
        self.short_since = waits.then_some(now);
    }

    /// Returns true if there is a request to take; requests no event.
    pub fn has_requests(&mut self) -> bool {
        let found = self.can_take() && self.ring.is_worth_a_look();
        if !found {
            self.ring_is_empty();
        }
        found
    }

    /// Returns [`Backend::gathers`].
    pub fn gathers(&self) -> bool {
        self.backend.gathers()
    }

    /// Arms the frontend's event and says whether there is work after all; call before sleeping.
    ///
    /// While no request can be taken it requests no event, because a completion brings the next pass. Where a completion may
    /// answer without the thread, a full ring is no reason for that: the frontend's next request can follow the answer.
    pub fn must_stay_awake(&mut self) -> bool {
        let gathers = self.is_served_by_tasks() && self.can_lend() == ReapContext::Task;
        let in_flight = if gathers { self.requests.used() } else { 0 };
        let worth = self.gathering.before_sleep(in_flight);
        let is_watched = self.can_take() || self.can_lend() != ReapContext::Thread;
        is_watched && self.is_worth_a_pass(worth)
    }

    /// Reports whether the thread has to sleep with a limit of a few milliseconds: requests may gather in the ring meanwhile
    /// that bring no event.
    pub fn must_sleep_briefly(&self) -> bool {
        self.gathering.is_limited()
    }

    /// Arms the frontend's event for this number of requests and reports whether there are as many already.
    pub(super) fn is_worth_a_pass(&mut self, worth: u32) -> bool {
        if !self.is_open() {
            return false;
        }
        // A ring that breaks here is reported by one more pass.
        let found = self.ring.final_check_for(worth).unwrap_or(true);
        if !found {
            self.ring_is_empty();
        }
        found
    }
}
