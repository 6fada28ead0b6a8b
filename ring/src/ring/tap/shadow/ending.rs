// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The end of a process: when its I/O is over, and the fate of its requests.
//!
//! While the process is fenced, the caller looks for its I/O, and reports when none is visible any more
//! ([`Shadow::quiet`]). A remote server may continue to execute its I/O after that, for a time that the process claimed
//! (`FENCE_SESSION`). That time counts from when no I/O was visible, because the process sent its last request before.
//!
//! A claim of a process about its I/O is valid from when it is made, served or not, because the process claims before
//! it opens its storage. A later claim other than `FENCE_LOCAL` withdraws nothing, and the longest time counts; a claim
//! of `FENCE_LOCAL` declares that all earlier I/O is over.

use core::ops::DerefMut;

use super::passthrough::MapLookup;
use super::{Failed, Phase, Shadow};
use crate::ring::numbers::DiskTag;
use crate::ring::response::ResponseStatus;
use crate::ring::tap::abi;
use crate::ring::tap::checked::Fence;
use crate::ring::tap::overlap::writes;
use crate::ring::tap::table::{next, TagEntry, TagList, TagState};

const NS_PER_MS: u64 = 1_000_000;

/// I/O of the process that may continue on a remote server, where this machine does not see it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Settling {
    /// Milliseconds that it may last after none is visible here.
    ms: u32,
    /// Time from which none was visible, in nanoseconds.
    since: Option<u64>,
}

impl Settling {
    /// Takes a claim of the process, which has no request of this disk in hand. The process may do I/O of its own, and
    /// for others such as NBD clients, so the claim counts even if it never gets a request.
    pub(super) fn claimed(&mut self, fence: Fence) {
        match fence {
            Fence::Local => self.ms = 0,
            Fence::Session { settle_ms } => self.ms = self.ms.max(settle_ms),
            Fence::None => {}
        }
    }

    /// Takes the report that no I/O is visible. Returns true if no invisible I/O can be left either.
    fn is_over(&mut self, now: u64) -> bool {
        let since = *self.since.get_or_insert(now);
        now.saturating_sub(since) >= u64::from(self.ms).wrapping_mul(NS_PER_MS)
    }
}

impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Records the end of the process: its completions do not count any more, and nothing is delivered.
    /// [`quiet`](Self::quiet) must follow.
    pub fn closed(&mut self) {
        if matches!(self.phase, Phase::Open | Phase::Live) {
            self.phase = Phase::Fencing;
        }
    }

    /// Takes the report that no I/O of the dead process is visible, and none will be; `now` is in nanoseconds. Returns
    /// `None` if a remote server may still execute some: the caller must report again later.
    ///
    /// Otherwise all of it is over. Requests that the process had wait for the next one, in arrival order; requests
    /// without a queue are released. If the process claimed that the end of its I/O cannot be known (`FENCE_NONE`), its
    /// modifying requests fail instead, because a replay could undo later writes.
    #[must_use]
    pub fn quiet(&mut self, now: u64) -> Option<Failed> {
        let mut failed = Failed::default();
        if self.phase != Phase::Fencing {
            return Some(failed);
        }
        if !self.settling.is_over(now) {
            return None;
        }
        self.pending = TagList::EMPTY;
        self.missed = TagList::EMPTY;
        self.delivered = TagList::EMPTY;
        self.ready.fill(TagList::EMPTY);
        self.isolation.died(self.held);
        let mut at = self.order.first();
        while let Some(node) = at {
            at = next(&self.entries, node);
            let Some(entry) = self.get_mut(node.tag()) else {
                break;
            };
            entry.waiters = TagList::EMPTY;
            entry.ordered = true;
            match entry.state {
                TagState::Delivered => {
                    // The process may have executed it, and answers no more.
                    self.note_change(node.tag());
                    self.left(node.tag(), &mut failed);
                }
                TagState::Pending | TagState::Blocked | TagState::Missed | TagState::Ready => {
                    self.wait(node.tag(), None);
                }
                // Its queue executes it, independently of the process.
                TagState::Direct => {}
                // Not in the order of what has no result.
                TagState::Free | TagState::Done => {}
            }
        }
        self.phase = if self.order.is_empty() {
            Phase::Idle
        } else {
            Phase::Recovering
        };
        Some(failed)
    }

    /// Handles a request that the process had, all lists of which are empty.
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
            self.finish(tag, ResponseStatus::Error);
        } else {
            self.waiting = self.waiting.wrapping_add(1);
            self.wait(tag, None);
        }
    }
}
