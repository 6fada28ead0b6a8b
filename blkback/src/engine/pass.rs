// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The engine proper: one pass over a ring.

use crate::engine::backend::Backend;
use crate::engine::blocks::Group;
use crate::engine::requests::{PendingRequest, Requests};
use crate::engine::rest::Rest;
use crate::engine::segments::{SegmentEntry, Segments, Shape};
use crate::engine::stats::Stats;
use crate::engine::transfers::{Fetch, Transfers};
use crate::ring::abi::Protocol;
use crate::ring::grants::Grants;
use crate::ring::index::BackRing;
use crate::ring::ports::SharedRing;
use crate::ring::request::{Limits, Request};

/// What is fixed for the life of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Layout of the slots.
    pub protocol: Protocol,
    /// Largest number of segments for which data is copied; larger requests are mapped.
    pub copy_max_segments: u16,
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Pass {
    /// The frontend wants an event.
    pub notify: bool,
    /// There is more to do at once: do not sleep.
    pub again: bool,
    /// The frontend's indices are impossible; only completions are served from now on.
    pub broken: bool,
    /// Requests taken in this pass.
    pub taken: u32,
    /// Completed requests that this pass has answered.
    pub answered: u32,
}

/// The data path of one queue.
#[derive(Debug)]
pub struct Engine<'a, R, G, B> {
    pub(super) ring: BackRing<R>,
    pub(super) requests: Requests<'a>,
    pub(super) transfers: Transfers<'a, G>,
    pub(super) backend: B,
    pub(super) config: Config,
    pub(super) limits: Limits,
    /// Checked, but there was no room for it.
    pub(super) parked: Option<Request>,
    /// A barrier is being executed: nothing may pass it.
    pub(super) barrier: bool,
    /// Stalled requests may find copy pages in the next pass.
    pub(super) retry: bool,
    /// The queue is being torn down: a discard ends with the piece that is running.
    pub(super) closing: bool,
    pub(super) stats: Stats,
}

impl<'a, R: SharedRing, G: Grants, B: Backend> Engine<'a, R, G, B> {
    /// Makes the engine of an attached ring.
    ///
    /// `slots` has one entry for each slot of the ring. `entries` has one for each data page of
    /// `shape`, and `groups` one for each 512 pages that can have memory. `fetches` has one for
    /// each descriptor buffer that is to be used, at least one. The larger of both pools must be
    /// able to hold the largest request that `limits` allows; one that fits neither pool is
    /// answered with an error. Where pages come and go, at least [`Self::OWN`] are there for ever,
    /// and `entries` has as many more as the largest request has segments.
    #[allow(
        clippy::too_many_arguments,
        reason = "called once, by the connect path"
    )]
    pub fn new(
        ring: BackRing<R>,
        grants: G,
        backend: B,
        slots: &'a mut [PendingRequest],
        entries: &'a mut [SegmentEntry],
        groups: &'a mut [Group],
        fetches: &'a mut [Option<Fetch>],
        shape: Shape,
        config: Config,
        limits: Limits,
    ) -> Self {
        Self {
            ring,
            requests: Requests::new(slots, Segments::new(entries, groups, shape)),
            transfers: Transfers::new(grants, fetches),
            backend,
            config,
            limits,
            parked: None,
            barrier: false,
            retry: false,
            closing: false,
            stats: Stats::default(),
        }
    }

    /// The counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Requests taken and not answered.
    pub fn in_flight(&self) -> u16 {
        self.requests
            .used()
            .saturating_add(u16::from(self.parked.is_some()))
    }

    /// Changes the size of the disk; requests that are checked from now on must fit into it.
    pub fn set_sectors(&mut self, sectors: u64) {
        self.limits.sectors = sectors;
    }

    /// Answers what is complete, takes what is new, starts it, and publishes.
    pub fn pass(&mut self) -> Pass {
        self.one_pass(Self::take)
    }

    /// A pass that takes nothing new: for teardown.
    pub fn drain_pass(&mut self) -> Pass {
        self.closing = true;
        self.one_pass(|engine| {
            engine.take_waiting();
            0
        })
    }

    fn one_pass(&mut self, take: impl FnOnce(&mut Self) -> u32) -> Pass {
        if self.ring.is_gone() {
            return Pass::default();
        }
        self.stats.passes = self.stats.passes.wrapping_add(1);
        self.complete();
        let mut answered = self.respond();
        let taken = take(self);
        self.fetch();
        self.copy_in();
        self.submit();
        if self.ring.is_gone() {
            // While I/O was started: by now the guest may be another one of the same number.
            return Pass::default();
        }
        // What completed at once is answered at once.
        self.complete();
        let now = self.respond();
        answered = answered.wrapping_add(now);
        // A completion frees what a parked request waits for.
        let waiting = self.parked.is_some() || !self.requests.stalled.is_empty();
        let retry = core::mem::replace(&mut self.retry, false);
        Pass {
            notify: self.publish(),
            again: !self.requests.taken.is_empty() || (now > 0 && waiting) || retry,
            broken: self.ring.is_broken(),
            taken,
            answered,
        }
    }

    /// True if there is something to take; asks for no event.
    pub fn has_requests(&self) -> bool {
        self.can_take() && self.ring.is_worth_a_look()
    }

    /// Arms the frontend's event and says whether there is work after all; call before sleeping.
    ///
    /// While nothing can be taken no event is asked for: a completion brings the next pass.
    pub fn must_stay_awake(&mut self) -> bool {
        if !self.can_take() {
            return false;
        }
        // A ring that breaks here is reported by one more pass.
        self.ring.final_check().unwrap_or(true)
    }

    /// Lets go of the guest's ring; what is in flight can only be waited for.
    pub fn detach(self) -> Rest<'a, G, B> {
        Rest {
            requests: self.requests,
            transfers: self.transfers,
            backend: self.backend,
        }
    }

    pub(super) fn can_take(&self) -> bool {
        !self.barrier
            && self.parked.is_none()
            && self.requests.stalled.is_empty()
            && !self.ring.is_broken()
            && self.ring.unanswered() < self.ring.size()
    }
}
