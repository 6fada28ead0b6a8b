// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The shadow of a disk: every request that the process has not answered, in arrival order.
//!
//! ```text
//!            post          deliver            commit          reap
//!   (free) -------> waiting -------> delivered -------> done -------> (free)
//!                      ^                 |
//!                      +-----------------+  the process died, or returned it
//! ```
//!
//! These rules hold whatever the process does:
//!
//! - A request is delivered only when no earlier one without a result overlaps it, with a write or discard on either
//!   side. So the order in which overlapping requests are executed is that of their arrival, also when they are
//!   executed again. (A request that the process returned or that failed in a queue arrives anew, and requests that
//!   queues execute may overlap: `direct`.)
//! - A flush (also as part of a write) that a dead process left, or that arrives during the replay of its requests, is
//!   delivered only when every earlier write has a result. Other flushes do not wait: they cover the writes that were
//!   answered before them.
//! - A completion counts only if it comes from the process that has the disk open now and names
//!   the latest delivery of its tag.
//! - After the end of a process nothing is delivered until none of its I/O can touch the arena or the image any longer
//!   (`ending`).
//! - Queues execute requests that the map of the disk covers without a process, in one order with all others
//!   (`direct`).
//! - A request at which processes die again and again is delivered alone, and fails when that proves that it is the
//!   reason (`isolation`).
//!
//! A request waits only for earlier requests, so there is no deadlock.
//!
//! The shadow has no lock, no clock and no memory of its own. The caller holds one lock over all calls. The work of a
//! call is bounded: [`Shadow::deliver`], [`Shadow::has_deliverable`], [`Shadow::fail_waiting`] and [`Shadow::sort`]
//! stop after some [`STEPS`]; [`Shadow::is_executing`], [`Shadow::started`], [`Shadow::quiet`], [`Shadow::excuse`],
//! [`Shadow::orphan`] and [`Shadow::withdraw`] look at every request a few times, once in the life of a process or a
//! queue; so does [`Shadow::fail_waiting`] while a process is fenced; all others take constant time for each request
//! that they name or release, and for each that enters the index over ranges, which happens once at most.

mod ending;
pub mod express;
mod isolation;
mod order;
pub mod passthrough;

use core::ops::DerefMut;

use crate::ring::numbers::DiskTag;
use crate::ring::response::ResponseStatus;
use crate::ring::tap::abi;
use crate::ring::tap::checked::{Claimed, Commit, RequestOutcome};
use crate::ring::tap::map::Miss;
use crate::ring::tap::overlap::Overlap;
use crate::ring::tap::table::{next, Link, ListNode, Suspicion, TagEntry, TagList, TagState};
use ending::Settling;
use express::ExpressQueues;
use isolation::Isolation;
use passthrough::{Executed, MapLookup, NoMap};

/// Maximum number of queues of one disk.
pub const MAX_QUEUES: usize = 64;

/// Number of requests after which a call of [`Shadow::deliver`] stops early. It finishes its current search, so the
/// number can be exceeded by at most [`abi::MAX_TAGS`].
pub const STEPS: u32 = 2048;

/// Operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads into the arena.
    Read,
    /// Writes from the arena.
    Write,
    /// Makes the answered writes durable.
    Flush,
    /// Forgets a range.
    Discard,
    /// Makes a range read as zeroes.
    WriteZeroes,
    /// Makes the content of a range unrecoverable.
    SecureDiscard,
}

impl Op {
    fn wire(self) -> u8 {
        match self {
            Op::Read => abi::OP_READ,
            Op::Write => abi::OP_WRITE,
            Op::Flush => abi::OP_FLUSH,
            Op::Discard => abi::OP_DISCARD,
            Op::WriteZeroes => abi::OP_WRITE_ZEROES,
            Op::SecureDiscard => abi::OP_SECURE_DISCARD,
        }
    }
}

/// A request whose data and segments are in place: the segments at its tag in the descriptor area, and the bytes of a
/// write in the arena. Neither may change any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostedRequest {
    /// Operation.
    pub op: Op,
    /// Writes that were answered before must be durable before this is executed.
    pub preflush: bool,
    /// The write must be durable when it is done.
    pub fua: bool,
    /// First sector of 512 bytes; means nothing without sectors.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u64,
    /// Entries in the segment table.
    pub segments: u16,
}

/// Reason that a request was not taken: a mistake of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostError {
    /// There is no such tag or queue.
    OutOfRange,
    /// The tag has a request already.
    InUse,
    /// The disk does not offer the operation to guests.
    NotOffered,
}

/// Reason that delivery does not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartError {
    /// The caller has not opened the disk, or has started it already.
    NotOpen,
    /// Guests may ask for operations that the process does not understand: one bit for each `OP_*`.
    Lacks(u64),
}

/// Reason that a node cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// A process has it.
    Open,
    /// The I/O of a process that is gone is not known to be over.
    Fencing,
}

/// Effect of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// The request has a result, which this queue must reap.
    Done(u16),
    /// The request waits to be delivered again.
    Returned,
    /// The request's queue is gone: its tag and its part of the arena are free now.
    Released,
    /// The completion names no delivered request.
    Refused,
}

/// Result of a call of [`Shadow::deliver`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Delivered {
    /// Requests handed out.
    pub count: usize,
    /// There may be more: call again before sleeping.
    pub more: bool,
}

/// Requests that a call of [`Shadow::fail_waiting`], [`Shadow::started`] or [`Shadow::quiet`] failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Failed {
    /// Requests failed.
    pub count: usize,
    /// One bit for each queue that has such a request to reap.
    pub queues: u64,
    /// There are more.
    pub more: bool,
}

/// Owner of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No process; requests that were delivered before wait for their replay.
    Recovering,
    /// No process.
    Idle,
    /// A process that has not started it.
    Open,
    /// A process that is served.
    Live,
    /// A process that is gone; its I/O may be running.
    Fencing,
}

/// Fails to compile unless `T` may move to another thread and be shared with it.
const fn crosses_threads<T: Send + Sync>() {}

// The kernel keeps a shadow behind a lock that all threads of a disk take.
const _: () = crosses_threads::<Shadow<[TagEntry; 1]>>();

/// The shadow of one disk. `S` is the memory: one entry for each tag. `M` is the map: it names requests that need no
/// process.
#[derive(Clone, Debug)]
pub struct Shadow<S, M = NoMap> {
    entries: S,
    phase: Phase,
    epoch: u64,
    sequence: u64,
    order: TagList,
    pending: TagList,
    /// For the process, with nothing in the way.
    missed: TagList,
    /// In the order of delivery.
    delivered: TagList,
    /// By queue: for its thread, with nothing in the way.
    ready: [TagList; MAX_QUEUES],
    /// By queue.
    done: [TagList; MAX_QUEUES],
    overlap: Overlap,
    waiting: u32,
    held: u32,
    orphans: u32,
    /// Requests without a result that an earlier process may have executed.
    replaying: u32,
    committed: u64,
    replayed: u64,
    refused: u64,
    /// Operations that may be posted, one bit for each.
    offered: u64,
    /// Capabilities of the process. While it is served they include every offered operation.
    claimed: Claimed,
    /// Operations that the last start lacked.
    lacking: u64,
    settling: Settling,
    isolation: Isolation,
    map: M,
    executed: Executed,
    express: ExpressQueues,
}

impl<S: DerefMut<Target = [TagEntry]>> Shadow<S> {
    /// Returns the shadow of a disk without requests that no process has opened; all of its requests go to the process.
    /// Overwrites `entries`; does not use entries beyond [`abi::MAX_TAGS`].
    pub fn new(entries: S) -> Self {
        Self::with_map(entries, NoMap)
    }
}

impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Returns a shadow like [`new`](Shadow::new), with a map of what is executed without the process.
    pub fn with_map(mut entries: S, map: M) -> Self {
        entries.fill(TagEntry::FREE);
        let overlap = Overlap::new(entries.len().min(abi::MAX_TAGS as usize));
        Self {
            entries,
            phase: Phase::Idle,
            epoch: 0,
            sequence: 0,
            order: TagList::EMPTY,
            pending: TagList::EMPTY,
            missed: TagList::EMPTY,
            delivered: TagList::EMPTY,
            ready: [TagList::EMPTY; MAX_QUEUES],
            done: [TagList::EMPTY; MAX_QUEUES],
            overlap,
            waiting: 0,
            held: 0,
            orphans: 0,
            replaying: 0,
            committed: 0,
            replayed: 0,
            refused: 0,
            offered: abi::OPERATIONS,
            claimed: Claimed::BEFORE,
            lacking: 0,
            settling: Settling::default(),
            isolation: Isolation::default(),
            map,
            executed: Executed::default(),
            express: ExpressQueues::default(),
        }
    }

    // An entry beyond the tags is always free, because nothing is posted there.
    fn get(&self, tag: DiskTag) -> Option<&TagEntry> {
        self.entries.get(tag.index())
    }

    fn get_mut(&mut self, tag: DiskTag) -> Option<&mut TagEntry> {
        self.entries.get_mut(tag.index())
    }

    /// Tags are below this.
    pub fn tags(&self) -> u32 {
        let len = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        len.min(abi::MAX_TAGS)
    }

    /// `STATE_*` of the ABI.
    pub fn state(&self) -> u32 {
        match self.phase {
            Phase::Idle => abi::STATE_IDLE,
            Phase::Open => abi::STATE_OPEN,
            Phase::Live => abi::STATE_LIVE,
            Phase::Fencing => abi::STATE_FENCING,
            Phase::Recovering => abi::STATE_RECOVERING,
        }
    }

    /// Number of the process that has the disk open, or had it last.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Requests that wait to be delivered.
    pub fn waiting(&self) -> u32 {
        self.waiting
    }

    /// Returns the number of requests that a process has, or had when it died and that are not fenced yet.
    pub fn delivered(&self) -> u32 {
        self.held
    }

    /// Delivered requests whose queue is gone. While there are any, their tags and their parts of
    /// the arena must not be used.
    pub fn orphans(&self) -> u32 {
        self.orphans
    }

    /// Fills the shadow's part of an [`abi::Info`]; `now` is in nanoseconds.
    pub fn describe(&self, info: &mut abi::Info, now: u64) {
        let oldest = self.delivered.first().and_then(|node| self.get(node.tag()));
        info.epoch = self.epoch;
        info.tags = self.tags();
        info.state = self.state();
        info.waiting = self.waiting;
        info.delivered = self.held;
        info.committed = self.committed;
        info.replayed = self.replayed;
        info.refused = self.refused;
        info.lacking = self.lacking;
        self.isolation.describe(info);
        self.executed.describe(info);
        // A request that was delivered just now has waited for 1 ns, because 0 means that there is none.
        info.oldest_ns = oldest.map_or(0, |e| now.saturating_sub(e.delivered_ns).max(1));
    }
}

/// Calls of the process.
impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Opens the disk for a process. Returns its epoch, which its calls carry.
    pub fn opened(&mut self) -> Result<u64, OpenError> {
        match self.phase {
            Phase::Open | Phase::Live => return Err(OpenError::Open),
            Phase::Fencing => return Err(OpenError::Fencing),
            Phase::Idle | Phase::Recovering => {}
        }
        self.phase = Phase::Open;
        self.epoch = self.epoch.wrapping_add(1);
        self.isolation.opened();
        self.claimed = Claimed::BEFORE;
        self.lacking = 0;
        self.settling = Settling::default();
        Ok(self.epoch)
    }

    /// Records the capabilities of the process that has opened the disk and not started it. A process that has started
    /// it and has no request in hand revokes its start with this: it may start again. A process that has requests in
    /// hand may only claim a later fence, and is served on. Returns `false` if the caller is not that process, or has
    /// requests in hand.
    #[must_use]
    pub fn claim(&mut self, epoch: u64, claimed: Claimed) -> bool {
        let phase = match self.phase {
            Phase::Open => Phase::Open,
            Phase::Live if claimed.widens(&self.claimed) => Phase::Live,
            Phase::Live if self.held == 0 => Phase::Open,
            Phase::Live | Phase::Idle | Phase::Recovering | Phase::Fencing => return false,
        };
        let may = epoch == self.epoch;
        if may {
            self.claimed = claimed;
            self.settling.claimed(claimed.fence);
            self.phase = phase;
        }
        may
    }

    /// Returns true if the process claimed a feature.
    pub fn has_claimed(&self, feature: u64) -> bool {
        self.claimed.features & feature == feature
    }

    /// Starts delivery to the process. May fail a request of which earlier processes died.
    pub fn started(&mut self, epoch: u64) -> Result<Failed, StartError> {
        if self.phase != Phase::Open || epoch != self.epoch {
            return Err(StartError::NotOpen);
        }
        self.lacking = self.offered & !self.claimed.operations;
        if self.lacking != 0 {
            return Err(StartError::Lacks(self.lacking));
        }
        // Mappings of the previous process do not count for this one.
        self.map().clear();
        self.phase = Phase::Live;
        Ok(self.judge())
    }

    /// Hands out at most `max` requests that may be executed now; `each` gets the descriptor that the process will read
    /// at the tag. Hands out nothing unless the process is served.
    pub fn deliver(
        &mut self,
        epoch: u64,
        max: usize,
        now: u64,
        mut each: impl FnMut(DiskTag, &abi::Desc),
    ) -> Delivered {
        let mut result = Delivered::default();
        if self.phase != Phase::Live || epoch != self.epoch {
            return result;
        }
        let mut steps = STEPS;
        while result.count < max && self.may_deliver() {
            let Some(tag) = self.find(&mut steps) else {
                break;
            };
            if let Some(desc) = self.hand_out(tag, now) {
                each(tag, &desc);
                result.count = result.count.wrapping_add(1);
            }
        }
        let left = !self.pending.is_empty() || !self.missed.is_empty();
        result.more = left && self.may_deliver();
        result
    }

    /// Returns true if a call of [`deliver`](Self::deliver) would hand out a request: the caller then wakes the
    /// process, or does not let it sleep. May be wrong if very many requests wait for others, and is right after a few
    /// more calls.
    pub fn has_deliverable(&mut self) -> bool {
        let mut steps = STEPS;
        self.phase == Phase::Live
            && self.may_deliver()
            && (self.find(&mut steps).is_some() || !self.pending.is_empty())
    }

    /// Takes the process's completion of a delivered request.
    pub fn commit(&mut self, epoch: u64, commit: &Commit) -> Committed {
        let served = self.phase == Phase::Live && epoch == self.epoch;
        let meant = self.get(commit.tag).filter(|entry| {
            served && entry.state == TagState::Delivered && entry.generation == commit.generation
        });
        let Some((orphan, queue)) = meant.map(|entry| (entry.orphan, entry.queue)) else {
            self.refused = self.refused.wrapping_add(1);
            return Committed::Refused;
        };
        self.delivered
            .remove(&mut self.entries, ListNode::new(commit.tag, Link::State));
        self.held = self.held.wrapping_sub(1);
        self.note_change(commit.tag);
        if orphan {
            self.orphans = self.orphans.wrapping_sub(1);
            self.forget(commit.tag);
            self.free(commit.tag);
            return Committed::Released;
        }
        match commit.outcome {
            RequestOutcome::Returned => {
                self.waiting = self.waiting.wrapping_add(1);
                self.wait(commit.tag, None);
                Committed::Returned
            }
            RequestOutcome::Finished(status) => {
                self.committed = self.committed.wrapping_add(1);
                self.isolation.answered();
                self.finish(commit.tag, status);
                Committed::Done(queue)
            }
        }
    }
}

/// Calls of the queues.
impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Sets the operations that guests may ask for, one bit for each. The caller does this before it posts anything and
    /// before a process is served, because guests rely on it from then on.
    pub fn offer(&mut self, operations: u64) {
        self.offered = operations;
    }

    /// Takes a request; `now` is in nanoseconds. It is delivered when the process asks for it.
    pub fn post(
        &mut self,
        tag: DiskTag,
        queue: u16,
        request: &PostedRequest,
        now: u64,
    ) -> Result<(), PostError> {
        if usize::from(queue) >= MAX_QUEUES || u32::from(tag.number()) >= self.tags() {
            return Err(PostError::OutOfRange);
        }
        if self.offered & 1u64.wrapping_shl(request.op.wire().into()) == 0 {
            return Err(PostError::NotOffered);
        }
        let ordered = self.replaying > 0;
        let entry = self.get_mut(tag).ok_or(PostError::OutOfRange)?;
        if entry.state != TagState::Free {
            return Err(PostError::InUse);
        }
        let flag = |on: bool, flag: u8| if on { flag } else { 0 };
        let flush = request.op == Op::Flush;
        let sectors = if flush { 0 } else { request.sectors };
        entry.sector = if sectors == 0 { 0 } else { request.sector };
        entry.end = entry.sector.saturating_add(sectors);
        entry.arrived_ns = now;
        entry.segments = request.segments;
        entry.queue = queue;
        entry.op = request.op.wire();
        entry.flags = flag(request.fua, abi::DESC_FUA) | flag(request.preflush, abi::DESC_PREFLUSH);
        entry.deliveries = 0;
        entry.miss = Miss::Unmapped;
        entry.ordered = ordered;
        entry.orphan = false;
        entry.mapped = false;
        entry.suspicion = Suspicion::NONE;
        self.arrive(tag);
        Ok(())
    }

    /// Yields at most `max` results of a queue's requests and frees their tags. Returns the number of results.
    pub fn reap(
        &mut self,
        queue: u16,
        max: usize,
        mut each: impl FnMut(DiskTag, ResponseStatus),
    ) -> usize {
        let mut count = 0usize;
        let Some(list) = self.done.get_mut(usize::from(queue)) else {
            return count;
        };
        while count < max {
            let Some(node) = list.first() else {
                break;
            };
            list.remove(&mut self.entries, node);
            let mut status = ResponseStatus::Error;
            if let Some(entry) = self.entries.get_mut(node.tag().index()) {
                entry.state = TagState::Free;
                status = entry.status;
            }
            each(node.tag(), status);
            count = count.wrapping_add(1);
        }
        count
    }

    /// True if a queue has results to reap.
    pub fn has_results(&self, queue: u16) -> bool {
        let list = self.done.get(usize::from(queue));
        list.is_some_and(|list| !list.is_empty())
    }

    /// Gives an error to the requests of a queue that are not delivered, as its teardown begins; the queue reaps them.
    /// Returns their number.
    pub fn withdraw(&mut self, queue: u16) -> u32 {
        let mut count = 0u32;
        let mut at = self.order.first();
        while let Some(node) = at {
            at = next(&self.entries, node);
            if self.is_waiting(node.tag(), |entry| entry.queue == queue) {
                self.fail(node.tag());
                count = count.wrapping_add(1);
            }
        }
        count
    }

    /// Forgets the requests of a queue that is gone, except those that the process has: these become orphans. Returns
    /// the number of orphans.
    pub fn orphan(&mut self, queue: u16) -> u32 {
        let mut count = 0u32;
        self.withdraw(queue);
        self.reap(queue, usize::MAX, |_, _| {});
        let mut at = self.order.first();
        while let Some(node) = at {
            at = next(&self.entries, node);
            let entry = self.get_mut(node.tag());
            let left =
                |e: &TagEntry| e.queue == queue && !e.orphan && e.state == TagState::Delivered;
            if let Some(entry) = entry.filter(|entry| left(entry)) {
                entry.orphan = true;
                count = count.wrapping_add(1);
            }
        }
        self.orphans = self.orphans.wrapping_add(count);
        count
    }

    /// Gives an error to at most `max` requests that wait, the oldest first; does nothing while a process is served.
    /// While a process is being fenced its own requests do not count as waiting, because its I/O may still touch the
    /// arena and the image. Requests that queues execute, and those that wait for these, do not wait for a process.
    pub fn fail_waiting(&mut self, max: usize) -> Failed {
        let mut result = Failed::default();
        if self.phase == Phase::Live {
            return result;
        }
        let (mut steps, direct) = (STEPS, self.is_direct());
        let mut at = self.order.first();
        while let Some(node) = at.filter(|_| self.waiting > 0) {
            if result.count >= max || steps == 0 {
                result.more = true;
                break;
            }
            at = next(&self.entries, node);
            let stays = direct && !self.needs_process(node.tag(), &mut steps);
            if !stays && self.is_waiting(node.tag(), |_| true) {
                self.fail_for(node.tag(), &mut result);
            }
        }
        result
    }
}

/// Internals of the calls.
impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Turns a pending request into a delivered one.
    fn hand_out(&mut self, tag: DiskTag, now: u64) -> Option<abi::Desc> {
        self.express.needed_a_process();
        self.unlist(tag);
        self.note_change(tag);
        let entry = self.get_mut(tag)?;
        entry.state = TagState::Delivered;
        entry.delivered_ns = now;
        entry.generation = entry.generation.wrapping_add(1);
        let again = entry.flags & abi::DESC_REPLAY != 0;
        let miss = entry.miss;
        entry.deliveries = entry.deliveries.saturating_add(1);
        let desc = abi::Desc {
            op: entry.op,
            flags: entry.flags,
            segments: entry.segments,
            generation: entry.generation,
            sector: entry.sector,
            sectors: entry.end.wrapping_sub(entry.sector),
            sequence: entry.sequence,
            arrived_ns: entry.arrived_ns,
            tag: tag.number(),
            queue: entry.queue,
            deliveries: entry.deliveries,
            reserved: [0; 4],
        };
        self.delivered
            .push_back(&mut self.entries, ListNode::new(tag, Link::State));
        if desc.deliveries == 1 {
            self.executed.count_miss(miss);
        }
        self.waiting = self.waiting.wrapping_sub(1);
        self.held = self.held.wrapping_add(1);
        self.replayed = self.replayed.wrapping_add(u64::from(again));
        Some(desc)
    }

    /// Gives an error to a request that waits, and counts it.
    fn fail_for(&mut self, tag: DiskTag, failed: &mut Failed) {
        let queue = self.get(tag).map_or(0, |entry| entry.queue);
        failed.queues |= 1u64.wrapping_shl(u32::from(queue));
        failed.count = failed.count.wrapping_add(1);
        self.fail(tag);
    }

    /// Gives an error to a request that waits.
    fn fail(&mut self, tag: DiskTag) {
        self.unlist(tag);
        self.waiting = self.waiting.wrapping_sub(1);
        self.finish(tag, ResponseStatus::Error);
    }

    /// Gives a result to a request that is in no list of a state.
    fn finish(&mut self, tag: DiskTag, status: ResponseStatus) {
        self.forget(tag);
        let Some(entry) = self.get_mut(tag) else {
            return;
        };
        entry.state = TagState::Done;
        entry.status = status;
        let queue = usize::from(entry.queue);
        if let Some(list) = self.done.get_mut(queue) {
            list.push_back(&mut self.entries, ListNode::new(tag, Link::State));
        }
    }

    fn free(&mut self, tag: DiskTag) {
        if let Some(entry) = self.get_mut(tag) {
            entry.state = TagState::Free;
        }
    }
}
