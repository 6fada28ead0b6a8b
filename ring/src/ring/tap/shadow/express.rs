// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Express: a queue executes reads and writes of one extent without the shadow, and so without the lock of the disk,
//! while no process has anything to do.
//!
//! ```text
//!          offered                    withdrawn                     given up
//!   (none) -------> the queue has it -----------> it must give up ----------> (none)
//! ```
//!
//! While no request is for a process, requests that queues execute do not wait for each other (`passthrough`), so the
//! shadow would add nothing to their order. These rules hold:
//!
//! - The shadow offers express only while no request waits and no process has one, and only after [`STREAK`] requests in
//!   a row that needed no process: to take it back costs a wake-up of each queue that has it.
//! - A request that waits, and every change of the map, withdraw it from all queues.
//! - A queue gives it up when its express requests have ended and it uses the extent no more. Until then the shadow
//!   behaves as if these requests covered the whole disk and all backings: it delivers nothing to a process, and every
//!   recall waits. So neither a process nor another queue needs to know of a request in express.
//!
//! The thread of a queue begins its requests and gives express up, so it needs no further lock or order for that.

use core::ops::DerefMut;

use super::passthrough::{bit, MapLookup};
use super::Shadow;
use crate::ring::tap::extent::ExpressExtent;
use crate::ring::tap::table::TagEntry;

/// Number of requests in a row that need no process before a queue gets express.
pub const STREAK: u32 = 256;

/// The queues that have express.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpressQueues {
    /// One bit for each queue that has it.
    having: u64,
    /// One bit for each of them that must give up.
    withdrawn: u64,
    /// The map may have changed since it was offered.
    is_stale: bool,
    /// Requests in a row that needed no process, since express was withdrawn at the earliest.
    streak: u32,
    /// Number of them from which on it is offered.
    enough: u32,
}

impl Default for ExpressQueues {
    fn default() -> Self {
        Self {
            having: 0,
            withdrawn: 0,
            is_stale: false,
            streak: 0,
            enough: STREAK,
        }
    }
}

impl ExpressQueues {
    /// Counts a request that needed no process.
    pub(super) fn needed_no_process(&mut self) {
        self.streak = self.streak.saturating_add(1);
    }

    /// Records that a request is for a process.
    pub(super) fn needed_a_process(&mut self) {
        self.streak = 0;
    }

    /// Records that the map may change.
    pub(super) fn map_changes(&mut self) {
        self.is_stale = true;
    }
}

impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Sets the number of requests in a row that need no process before express is offered, in place of [`STREAK`].
    pub fn set_express_streak(&mut self, enough: u32) {
        self.express.enough = enough;
    }

    /// Gives express to a queue that has just begun a request, if that is possible. The queue must [give it
    /// up](Self::gave_up_express) when [`take_withdrawn`](Self::take_withdrawn) names it.
    pub fn offer_express(&mut self, queue: u16) -> Option<ExpressExtent> {
        let express = &self.express;
        let is_free = self.waiting == 0 && self.held == 0 && !express.is_stale;
        let all_have_it = express.withdrawn == 0 && express.having & bit(queue) == 0;
        if !is_free || !all_have_it || express.streak < express.enough || !self.is_able(queue) {
            return None;
        }
        let extent = self.map.last_used()?;
        self.express.having |= bit(queue);
        Some(extent)
    }

    /// Withdraws express from all queues if something is in its way. Returns one bit for each queue that must give it up, once
    /// for each. The caller asks after a post, after a change of the map, and when a process has started.
    #[must_use]
    pub fn take_withdrawn(&mut self) -> u64 {
        let is_stale = core::mem::replace(&mut self.express.is_stale, false);
        let express = &mut self.express;
        if !is_stale && self.waiting == 0 && self.held == 0 {
            return 0;
        }
        let told = express.having & !express.withdrawn;
        express.withdrawn |= told;
        if told != 0 {
            express.streak = 0;
        }
        told
    }

    /// Records that a queue has given express up: its express requests have ended.
    pub fn gave_up_express(&mut self, queue: u16) {
        self.express.having &= !bit(queue);
        self.express.withdrawn &= !bit(queue);
    }

    /// Returns true if a queue may be executing a request in express.
    pub fn has_express(&self) -> bool {
        self.express.having != 0
    }
}
