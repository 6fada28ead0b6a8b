// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The end of a process: when its I/O is over, and what becomes of the requests that it had.
//!
//! While it is fenced the caller looks for I/O of it, and says when none is to be seen any more
//! ([`Shadow::quiet`]). If somebody else executes its I/O, over a network, that is not the end of it yet: it
//! has said for how long that may go on (`FENCE_SESSION`). That counts from when nothing was to be seen,
//! because what it sent last it sent while it was seen.
//!
//! What a process has said of its I/O holds from the claim on, served or not: it says so before it reaches its
//! storage. So with a claim that is not `FENCE_LOCAL` it cannot take back what it said before, and the longest
//! time counts; with one that is it says that all of it is over.

use core::ops::DerefMut;

use super::direct::Places;
use super::{Failed, Phase, Shadow};
use crate::ring::numbers::DiskTag;
use crate::ring::response::Status;
use crate::ring::tap::abi;
use crate::ring::tap::checked::Fence;
use crate::ring::tap::overlap::writes;
use crate::ring::tap::table::{next, Entry, List, State};

const NS_PER_MS: u64 = 1_000_000;

/// I/O of the process that may go on where nobody sees it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Settling {
    /// For so long after nothing of it is to be seen.
    ms: u32,
    /// When that was, in nanoseconds.
    since: Option<u64>,
}

impl Settling {
    /// The process says this of its I/O, and has nothing of ours in hand. It may do I/O of its own, and for
    /// others, such as NBD clients: so it counts even if it never gets anything of ours.
    pub(super) fn claimed(&mut self, fence: Fence) {
        match fence {
            Fence::Local => self.ms = 0,
            Fence::Session { settle_ms } => self.ms = self.ms.max(settle_ms),
            Fence::None => {}
        }
    }

    /// Nothing is to be seen. True if nothing can happen where it is not seen either.
    fn is_over(&mut self, now: u64) -> bool {
        let since = *self.since.get_or_insert(now);
        now.saturating_sub(since) >= u64::from(self.ms).wrapping_mul(NS_PER_MS)
    }
}

impl<S: DerefMut<Target = [Entry]>, M: Places> Shadow<S, M> {
    /// The process is gone. From now on nothing that it says counts, and nothing is delivered.
    /// [`quiet`](Self::quiet) must follow.
    pub fn closed(&mut self) {
        if matches!(self.phase, Phase::Open | Phase::Live) {
            self.phase = Phase::Fencing;
        }
    }

    /// No I/O of the process that is gone is to be seen, and none will be; `now` is in nanoseconds. `None` if
    /// there may be some where nobody sees it: say it again later.
    ///
    /// Otherwise all of it is over. What the process had been delivered waits for the next one, in arrival
    /// order; requests without a queue are released. If nobody can know that it is over, as the process
    /// claimed, what changes the disk fails instead: to execute it again could undo what comes later.
    #[must_use]
    pub fn quiet(&mut self, now: u64) -> Option<Failed> {
        let mut failed = Failed::default();
        if self.phase != Phase::Fencing {
            return Some(failed);
        }
        if !self.settling.is_over(now) {
            return None;
        }
        self.pending = List::EMPTY;
        self.missed = List::EMPTY;
        self.delivered = List::EMPTY;
        self.ready.fill(List::EMPTY);
        self.isolation.died(self.held);
        let mut at = self.order.first();
        while let Some(node) = at {
            at = next(&self.entries, node);
            let Some(entry) = self.get_mut(node.tag()) else {
                break;
            };
            entry.waiters = List::EMPTY;
            entry.ordered = true;
            match entry.state {
                State::Delivered => {
                    // It may have done it, and answers no more.
                    self.note_change(node.tag());
                    self.left(node.tag(), &mut failed);
                }
                State::Pending | State::Blocked | State::Missed | State::Ready => {
                    self.wait(node.tag(), None);
                }
                // Its queue has it, whoever is gone.
                State::Direct => {}
                // Not in the order of what has no result.
                State::Free | State::Done => {}
            }
        }
        self.phase = if self.order.is_empty() {
            Phase::Idle
        } else {
            Phase::Recovering
        };
        Some(failed)
    }

    /// A request that the process had, all lists of which are empty.
    fn left(&mut self, tag: DiskTag, failed: &mut Failed) {
        let Some(entry) = self.get_mut(tag) else {
            return;
        };
        let (orphan, fresh) = (entry.orphan, entry.flags & abi::DESC_REPLAY == 0);
        let changes = writes(entry.op);
        entry.flags |= abi::DESC_REPLAY;
        entry.suspicion.in_last = true;
        let queue = entry.queue;
        self.held = self.held.wrapping_sub(1);
        self.replaying = self.replaying.wrapping_add(u32::from(fresh));
        if orphan {
            self.orphans = self.orphans.wrapping_sub(1);
            self.forget(tag);
            self.free(tag);
        } else if changes && self.claimed.fence == Fence::None {
            failed.queues |= 1u64.wrapping_shl(u32::from(queue));
            failed.count = failed.count.wrapping_add(1);
            self.finish(tag, Status::Error);
        } else {
            self.waiting = self.waiting.wrapping_add(1);
            self.wait(tag, None);
        }
    }
}
