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
//! Rules, all of which hold whatever the process does:
//!
//! - A request is delivered only when no earlier one without a result overlaps it, with a write or
//!   discard on either side. So the order in which overlapping requests are executed is that of
//!   their arrival, also when they are executed again. (What was given back or has failed arrives anew, and what queues
//!   execute may overlap: `direct`.)
//! - A flush, also one that is part of a write, which was left by a dead process or arrives while
//!   what that process left is executed again, is delivered only when no earlier write is without
//!   a result. Other flushes wait for nobody: they cover what was answered before them.
//! - A completion counts only if it comes from the process that has the disk open now and names
//!   the latest delivery of its tag.
//! - After a process is gone nothing is delivered until no I/O which it started can touch the arena or
//!   the image any longer (`ending`).
//! - What the map of the disk covers the queue executes without a process, in the same order with all
//!   others (`direct`).
//! - A request at which processes die again and again is delivered alone, and fails when that makes
//!   sure that it is the reason (`isolation`).
//!
//! Everything a request waits for is earlier than the request, so nothing waits in a circle.
//!
//! The shadow has no lock, no clock and no memory of its own. The caller holds one lock over all
//! calls. What a call does is bounded: [`Shadow::deliver`], [`Shadow::has_deliverable`],
//! [`Shadow::fail_waiting`] and [`Shadow::sort`] stop after some [`STEPS`]; [`Shadow::is_executing`], [`Shadow::started`], [`Shadow::quiet`], [`Shadow::excuse`],
//! [`Shadow::orphan`] and [`Shadow::withdraw`] look at every request a few times, once in the life of a
//! process or a queue; so does [`Shadow::fail_waiting`] while a process is
//! fenced; all others take constant time for each request that they name or set free, and for each that is put into the
//! index over ranges, once at most.

pub mod direct;
mod ending;
mod isolation;
mod order;

use core::ops::DerefMut;

use crate::ring::numbers::DiskTag;
use crate::ring::response::Status;
use crate::ring::tap::abi;
use crate::ring::tap::checked::{Claimed, Commit, Outcome};
use crate::ring::tap::map::Miss;
use crate::ring::tap::overlap::Overlap;
use crate::ring::tap::table::{next, Entry, Link, List, Node, State, Suspicion};
use direct::{Executed, NoMap, Places};
use ending::Settling;
use isolation::Isolation;

/// Queues of one disk at most.
pub const MAX_QUEUES: usize = 64;

/// Requests looked at in one call of [`Shadow::deliver`], beyond which it stops early. The search
/// that is running is finished, so it can be more, by [`abi::MAX_TAGS`] at most.
pub const STEPS: u32 = 2048;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads into the arena.
    Read,
    /// Writes from the arena.
    Write,
    /// Makes durable what was answered.
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

/// A request whose data and segments are in place: the segments at its tag in the descriptor
/// area, and the bytes of a write in the arena. Neither changes any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// What was answered before must be durable before this is executed.
    pub preflush: bool,
    /// It must be durable when it is done.
    pub fua: bool,
    /// First sector of 512 bytes; means nothing without sectors.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u64,
    /// Entries in the segment table.
    pub segments: u16,
}

/// Why a request was not taken: a mistake of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostError {
    /// There is no such tag or queue.
    OutOfRange,
    /// The tag has a request already.
    InUse,
    /// Nobody was told that the disk can do that.
    NotOffered,
}

/// Why delivery does not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartError {
    /// Who asks for it has not opened the disk, or has started it already.
    NotOpen,
    /// Guests may ask for what the process does not understand: one bit for each `OP_*`.
    Lacks(u64),
}

/// Why a node cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// A process has it.
    Open,
    /// The I/O of a process that is gone is not known to be over.
    Fencing,
}

/// What became of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// The request has a result; this queue is to reap it.
    Done(u16),
    /// The request waits to be delivered again.
    Returned,
    /// The request's queue is gone: its tag and its part of the arena are free now.
    Released,
    /// No delivered request is meant.
    Refused,
}

/// What a call of [`Shadow::deliver`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Delivered {
    /// Requests handed out.
    pub count: usize,
    /// There may be more: call again before sleeping.
    pub more: bool,
}

/// What a call failed: of [`Shadow::fail_waiting`], [`Shadow::started`] or [`Shadow::quiet`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Failed {
    /// Requests failed.
    pub count: usize,
    /// One bit for each queue that has something to reap for that.
    pub queues: u64,
    /// There are more.
    pub more: bool,
}

/// Who has the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nobody; requests that were delivered before are to be executed again.
    Recovering,
    /// Nobody.
    Idle,
    /// A process that has not started it.
    Open,
    /// A process that is served.
    Live,
    /// A process that is gone; its I/O may be running.
    Fencing,
}

/// The shadow of one disk. `S` is the memory: one entry for each tag. `M` says what needs no process.
#[derive(Clone, Debug)]
pub struct Shadow<S, M = NoMap> {
    entries: S,
    phase: Phase,
    epoch: u64,
    sequence: u64,
    order: List,
    pending: List,
    /// For the process, with nothing in the way.
    missed: List,
    /// In the order of delivery.
    delivered: List,
    /// By queue: for its thread, with nothing in the way.
    ready: [List; MAX_QUEUES],
    /// By queue.
    done: [List; MAX_QUEUES],
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
    /// What the process can do. While it is served that is everything that is offered.
    claimed: Claimed,
    /// What the last start lacked.
    lacking: u64,
    settling: Settling,
    isolation: Isolation,
    map: M,
    executed: Executed,
}

impl<S: DerefMut<Target = [Entry]>> Shadow<S> {
    /// The shadow of a disk without requests, which nobody has opened, and all of whose requests are for the
    /// process. What `entries` held is overwritten; entries beyond [`abi::MAX_TAGS`] are not used.
    pub fn new(entries: S) -> Self {
        Self::with_map(entries, NoMap)
    }
}

impl<S: DerefMut<Target = [Entry]>, M: Places> Shadow<S, M> {
    /// As [`new`](Shadow::new), with what is executed without the process.
    pub fn with_map(mut entries: S, map: M) -> Self {
        entries.fill(Entry::FREE);
        let overlap = Overlap::new(entries.len().min(abi::MAX_TAGS as usize));
        Self {
            entries,
            phase: Phase::Idle,
            epoch: 0,
            sequence: 0,
            order: List::EMPTY,
            pending: List::EMPTY,
            missed: List::EMPTY,
            delivered: List::EMPTY,
            ready: [List::EMPTY; MAX_QUEUES],
            done: [List::EMPTY; MAX_QUEUES],
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
        }
    }

    // An entry beyond the tags is always free, because nothing is posted there.
    fn get(&self, tag: DiskTag) -> Option<&Entry> {
        self.entries.get(tag.index())
    }

    fn get_mut(&mut self, tag: DiskTag) -> Option<&mut Entry> {
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

    /// Requests that a process has, or had when it died and that are not fenced.
    pub fn delivered(&self) -> u32 {
        self.held
    }

    /// Delivered requests whose queue is gone. While there are any, their tags and their parts of
    /// the arena must not be used.
    pub fn orphans(&self) -> u32 {
        self.orphans
    }

    /// Fills what the shadow knows of an [`abi::Info`]; `now` is in nanoseconds.
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
        // What was delivered just now has waited for 1: 0 means that there is none.
        info.oldest_ns = oldest.map_or(0, |e| now.saturating_sub(e.delivered_ns).max(1));
    }
}

/// The process.
impl<S: DerefMut<Target = [Entry]>, M: Places> Shadow<S, M> {
    /// A process opens the disk. Returns its epoch, which its calls carry.
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

    /// Says what the process can do that has opened the disk and not started it. One that has started it
    /// and has nothing in hand gives that up with it: it may start again. Whatever that one has in hand, it
    /// may say that its I/O is over later than it said, and nothing else: it is served on. `false` if that
    /// is somebody else, or has something in hand.
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

    /// True if the process uses a feature.
    pub fn has_claimed(&self, feature: u64) -> bool {
        self.claimed.features & feature == feature
    }

    /// The process wants requests from now on. A request of which earlier processes died may fail now.
    pub fn started(&mut self, epoch: u64) -> Result<Failed, StartError> {
        if self.phase != Phase::Open || epoch != self.epoch {
            return Err(StartError::NotOpen);
        }
        self.lacking = self.offered & !self.claimed.operations;
        if self.lacking != 0 {
            return Err(StartError::Lacks(self.lacking));
        }
        // What the process before said does not count for this one.
        self.map.clear();
        self.phase = Phase::Live;
        Ok(self.judge())
    }

    /// Hands out at most `max` requests that may be executed now; `each` gets what the process is
    /// to read at the tag. Nothing unless the process is served.
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

    /// True if a call of [`deliver`](Self::deliver) would hand out a request: wake the process,
    /// or do not let it sleep. May be wrong if very many requests wait for others, and is right
    /// after some more calls.
    pub fn has_deliverable(&mut self) -> bool {
        let mut steps = STEPS;
        self.phase == Phase::Live
            && self.may_deliver()
            && (self.find(&mut steps).is_some() || !self.pending.is_empty())
    }

    /// Takes what the process says of a delivered request.
    pub fn commit(&mut self, epoch: u64, commit: &Commit) -> Committed {
        let served = self.phase == Phase::Live && epoch == self.epoch;
        let meant = self.get(commit.tag).filter(|entry| {
            served && entry.state == State::Delivered && entry.generation == commit.generation
        });
        let Some((orphan, queue)) = meant.map(|entry| (entry.orphan, entry.queue)) else {
            self.refused = self.refused.wrapping_add(1);
            return Committed::Refused;
        };
        self.delivered
            .remove(&mut self.entries, Node::new(commit.tag, Link::State));
        self.held = self.held.wrapping_sub(1);
        self.note_change(commit.tag);
        if orphan {
            self.orphans = self.orphans.wrapping_sub(1);
            self.forget(commit.tag);
            self.free(commit.tag);
            return Committed::Released;
        }
        match commit.outcome {
            Outcome::Returned => {
                self.waiting = self.waiting.wrapping_add(1);
                self.wait(commit.tag, None);
                Committed::Returned
            }
            Outcome::Finished(status) => {
                self.committed = self.committed.wrapping_add(1);
                self.isolation.answered();
                self.finish(commit.tag, status);
                Committed::Done(queue)
            }
        }
    }
}

/// The queues.
impl<S: DerefMut<Target = [Entry]>, M: Places> Shadow<S, M> {
    /// Guests are told that they may ask for these operations, one bit for each, and nothing else. To
    /// be called before anything is posted and before a process is served: what they were told stays.
    pub fn offer(&mut self, operations: u64) {
        self.offered = operations;
    }

    /// Takes a request; `now` is in nanoseconds. It is delivered when the process asks for it.
    pub fn post(
        &mut self,
        tag: DiskTag,
        queue: u16,
        request: &Request,
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
        if entry.state != State::Free {
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

    /// Yields at most `max` results of a queue's requests, whose tags are free then. Returns how
    /// many it yielded.
    pub fn reap(&mut self, queue: u16, max: usize, mut each: impl FnMut(DiskTag, Status)) -> usize {
        let mut count = 0usize;
        let Some(list) = self.done.get_mut(usize::from(queue)) else {
            return count;
        };
        while count < max {
            let Some(node) = list.first() else {
                break;
            };
            list.remove(&mut self.entries, node);
            let mut status = Status::Error;
            if let Some(entry) = self.entries.get_mut(node.tag().index()) {
                entry.state = State::Free;
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

    /// Gives an error to the requests of a queue that are not delivered, as its teardown begins;
    /// the queue reaps them. Returns how many these were.
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

    /// A queue is gone: its requests are forgotten, but those that the process has become
    /// orphans. Returns how many these are.
    pub fn orphan(&mut self, queue: u16) -> u32 {
        let mut count = 0u32;
        self.withdraw(queue);
        self.reap(queue, usize::MAX, |_, _| {});
        let mut at = self.order.first();
        while let Some(node) = at {
            at = next(&self.entries, node);
            let entry = self.get_mut(node.tag());
            let left = |e: &Entry| e.queue == queue && !e.orphan && e.state == State::Delivered;
            if let Some(entry) = entry.filter(|entry| left(entry)) {
                entry.orphan = true;
                count = count.wrapping_add(1);
            }
        }
        self.orphans = self.orphans.wrapping_add(count);
        count
    }

    /// Gives an error to at most `max` requests that wait, the oldest first. Nothing while a
    /// process is served. While one has to be fenced, what it has does not wait: its I/O may be
    /// running, with the arena and on the image. What queues execute, and what waits for that, waits for no
    /// process.
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

/// What the calls are made of.
impl<S: DerefMut<Target = [Entry]>, M: Places> Shadow<S, M> {
    /// Turns a pending request into a delivered one.
    fn hand_out(&mut self, tag: DiskTag, now: u64) -> Option<abi::Desc> {
        self.unlist(tag);
        self.note_change(tag);
        let entry = self.get_mut(tag)?;
        entry.state = State::Delivered;
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
            .push_back(&mut self.entries, Node::new(tag, Link::State));
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
        self.finish(tag, Status::Error);
    }

    /// Gives a result to a request that is in no list of a state.
    fn finish(&mut self, tag: DiskTag, status: Status) {
        self.forget(tag);
        let Some(entry) = self.get_mut(tag) else {
            return;
        };
        entry.state = State::Done;
        entry.status = status;
        let queue = usize::from(entry.queue);
        if let Some(list) = self.done.get_mut(queue) {
            list.push_back(&mut self.entries, Node::new(tag, Link::State));
        }
    }

    fn free(&mut self, tag: DiskTag) {
        if let Some(entry) = self.get_mut(tag) {
            entry.state = State::Free;
        }
    }
}
