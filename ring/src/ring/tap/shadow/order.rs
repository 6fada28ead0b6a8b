// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Dependencies among requests: the order of arrival, the lists of waiting requests, and the request that blocks
//! another.
//!
//! A request arrives behind all others and is *pending*: not yet examined. The next call that sorts finds the request
//! that blocks it, if any; it is *blocked* until that one is done, and then pending again. If nothing blocks it, the
//! process or its queue executes it (`direct`). The work for this is bounded: see [`Shadow`].

use core::ops::DerefMut;

use super::passthrough::MapLookup;
use super::Shadow;
use crate::ring::numbers::DiskTag;
use crate::ring::tap::abi;
use crate::ring::tap::overlap::writes;
use crate::ring::tap::table::{next, prev, Link, ListNode, TagEntry, TagList, TagState};

impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Adds a request that is in no list to those that wait, behind all that have arrived before.
    pub(super) fn arrive(&mut self, tag: DiskTag) {
        let sequence = self.sequence;
        let Some(entry) = self.get_mut(tag) else {
            return;
        };
        entry.sequence = sequence;
        entry.indexed = false;
        entry.waiters = TagList::EMPTY;
        self.sequence = sequence.wrapping_add(1);
        self.order
            .push_back(&mut self.entries, ListNode::new(tag, Link::Order));
        self.waiting = self.waiting.wrapping_add(1);
        self.wait(tag, None);
    }

    /// Adds a request that is in no list of a state to those that wait for `blocker`, or to the pending ones if there
    /// is none.
    pub(super) fn wait(&mut self, tag: DiskTag, blocker: Option<DiskTag>) {
        let Some(entry) = self.get_mut(tag) else {
            return;
        };
        let node = ListNode::new(tag, Link::State);
        let Some(blocker) = blocker else {
            entry.state = TagState::Pending;
            return self.pending.push_back(&mut self.entries, node);
        };
        entry.state = TagState::Blocked;
        entry.blocked_on = blocker;
        if let Some(mut waiters) = self.get(blocker).map(|entry| entry.waiters) {
            waiters.push_back(&mut self.entries, node);
            if let Some(entry) = self.get_mut(blocker) {
                entry.waiters = waiters;
            }
        }
    }

    /// Removes a request from the list of its state.
    pub(super) fn unlist(&mut self, tag: DiskTag) {
        let node = ListNode::new(tag, Link::State);
        let Some(entry) = self.get(tag) else {
            return;
        };
        let (state, queue, blocker) = (entry.state, entry.queue, entry.blocked_on);
        match state {
            TagState::Free => {}
            // It is in no list.
            TagState::Direct => {}
            TagState::Pending => self.pending.remove(&mut self.entries, node),
            TagState::Missed => self.missed.remove(&mut self.entries, node),
            TagState::Delivered => self.delivered.remove(&mut self.entries, node),
            TagState::Blocked => {
                if let Some(mut waiters) = self.get(blocker).map(|e| e.waiters) {
                    waiters.remove(&mut self.entries, node);
                    if let Some(blocker) = self.get_mut(blocker) {
                        blocker.waiters = waiters;
                    }
                }
            }
            TagState::Ready => {
                if let Some(list) = self.ready.get_mut(usize::from(queue)) {
                    list.remove(&mut self.entries, node);
                }
            }
            TagState::Done => {
                if let Some(list) = self.done.get_mut(usize::from(queue)) {
                    list.remove(&mut self.entries, node);
                }
            }
        }
    }

    /// Sorts pending requests until it finds one that may be delivered. That one stays in front.
    pub(super) fn find(&mut self, steps: &mut u32) -> Option<DiskTag> {
        if let Some(node) = self.missed.first() {
            return Some(node.tag());
        }
        while *steps > 0 {
            let tag = self.pending.first()?.tag();
            if !self.sort_out(tag, steps) {
                return Some(tag);
            }
        }
        None
    }

    /// Sorts a pending request: finds what it waits for, if not for the process.
    pub(super) fn sort_out(&mut self, tag: DiskTag, steps: &mut u32) -> bool {
        self.block(tag, steps) || self.make_ready(tag)
    }

    /// Blocks a pending request on the one that it must wait for; returns false if there is none.
    pub(super) fn block(&mut self, tag: DiskTag, steps: &mut u32) -> bool {
        let Some(blocker) = self.blocker(tag, steps) else {
            return false;
        };
        self.unlist(tag);
        self.wait(tag, Some(blocker));
        true
    }

    /// Returns the latest earlier request that must be done before this one.
    pub(super) fn blocker(&mut self, tag: DiskTag, steps: &mut u32) -> Option<DiskTag> {
        self.index();
        let sequence = |tag: DiskTag| Some((self.get(tag)?.sequence, tag));
        let overlap = self.overlap.blocker(&self.entries, tag, steps);
        let flush = self.unflushed(tag, steps);
        let latest = overlap.and_then(sequence).max(flush.and_then(sequence));
        latest.map(|(_, tag)| tag)
    }

    /// Adds the missing requests to the index over ranges. These arrived after all that it has. The index is completed
    /// only before a search, because most requests that queues execute are over before there is one.
    fn index(&mut self) {
        let (mut first, mut at) = (None, self.order.last());
        while let Some(node) = at {
            if self.get(node.tag()).is_none_or(|entry| entry.indexed) {
                break;
            }
            first = at;
            at = prev(&self.entries, node);
        }
        while let Some(node) = first {
            self.overlap.insert(&mut self.entries, node.tag());
            if let Some(entry) = self.get_mut(node.tag()) {
                entry.indexed = true;
            }
            first = next(&self.entries, node);
        }
    }

    /// Returns the latest earlier write, if this is a flush that waits for all of them.
    fn unflushed(&self, tag: DiskTag, steps: &mut u32) -> Option<DiskTag> {
        let entry = self.get(tag)?;
        let flushes = entry.op == abi::OP_FLUSH || entry.flags & abi::DESC_PREFLUSH != 0;
        if !entry.ordered || !flushes {
            return None;
        }
        let mut node = ListNode::new(tag, Link::Order);
        loop {
            node = prev(&self.entries, node)?;
            *steps = steps.saturating_sub(1);
            if writes(self.get(node.tag())?.op) {
                return Some(node.tag());
            }
        }
    }

    pub(super) fn is_waiting(&self, tag: DiskTag, and: impl Fn(&TagEntry) -> bool) -> bool {
        let waits = |e: &TagEntry| match e.state {
            TagState::Pending | TagState::Blocked | TagState::Missed | TagState::Ready => true,
            TagState::Free | TagState::Delivered | TagState::Direct | TagState::Done => false,
        };
        self.get(tag)
            .is_some_and(|entry| waits(entry) && and(entry))
    }

    /// Releases all requests that wait for this one.
    pub(super) fn forget(&mut self, tag: DiskTag) {
        self.order
            .remove(&mut self.entries, ListNode::new(tag, Link::Order));
        if self.get(tag).is_some_and(|entry| entry.indexed) {
            self.overlap.remove(&mut self.entries, tag);
        }
        let Some(entry) = self.get_mut(tag) else {
            return;
        };
        let waiters = core::mem::replace(&mut entry.waiters, TagList::EMPTY);
        let replay = entry.flags & abi::DESC_REPLAY != 0;
        let isolated = core::mem::replace(&mut entry.suspicion.isolated, false);
        self.isolation.forget(isolated);
        self.replaying = self.replaying.wrapping_sub(u32::from(replay));
        // The waiters are older than most pending requests, so they go to the front.
        let mut at = waiters.first();
        while let Some(node) = at {
            at = next(&self.entries, node);
            if let Some(waiter) = self.get_mut(node.tag()) {
                waiter.state = TagState::Pending;
            }
        }
        self.pending.prepend(&mut self.entries, waiters);
    }
}
