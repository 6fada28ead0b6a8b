// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What the kernel executes without the process, because the map of the disk says where it is.
//!
//! ```text
//!                        in nobody's way, and mapped
//!   post --> pending ----------------------------------> direct --> (free)
//!               |   \                                  /    |
//!               |    blocked --> pending --> ready ---+     | it failed
//!               |                              |            v
//!               +---------> missed <-----------+         pending, marked as a replay
//!                      not mapped  (any longer)
//! ```
//!
//! Rules beside those of the shadow:
//!
//! - It is a request like any other: it waits for earlier ones that overlap it, and later ones wait for it,
//!   whoever executes the one or the other. But while there is nothing that a process has or may get, what queues
//!   execute does not wait for each other, as on a device without a process: a guest that has overlapping requests in
//!   flight at the same time has no order for them.
//! - Only a queue that can executes something ([`Shadow::set_able`]): it has what that takes.
//! - Only what moves data of whole blocks is executed so, and what was never given to a process. A flush is
//!   if the process has said that it is one of the backing.
//! - The process gets a write or a discard: what the map says of that range may not be true any longer, then
//!   and when it answers or is gone (see [`Map`]). So it is told both times.
//! - It is begun by the thread of its queue, and it ends there. The death of a process changes nothing of
//!   it; the start of the next one ends what the last one said, so nothing more is begun.
//! - If it fails it is not known what it did, so the process gets it as one that is executed again, and says
//!   what became of it. It arrives anew, so that it waits for what is executed by then: where that writes the process
//!   may not move anything. A flush that failed is answered so: to try again could succeed over lost data.
//! - The data of a request may be in pages of the guest that are mapped, where no process can get it. Such a request
//!   is begun at once or not at all ([`Shadow::begin_mapped`]), and if it fails nothing is left of it here: its
//!   queue brings the data to the arena, and posts it anew. What overlaps it may come first by then: what a guest has
//!   in flight at the same time has no order for it, and nothing of this was answered.

use core::ops::DerefMut;

use super::{Shadow, STEPS};
use crate::ring::numbers::DiskTag;
use crate::ring::response::Status;
use crate::ring::tap::abi;
use crate::ring::tap::extent::{Access, BackingNumber, Extent, Sectors};
use crate::ring::tap::map::tree::{Leaf, Slot};
use crate::ring::tap::map::{Map, Miss};
use crate::ring::tap::overlap::writes;
use crate::ring::tap::table::{next, Entry, Link, Node, State};

/// Parts that a request is executed in at most: 1 MiB of 64 KiB clusters that lie anywhere, in which neither end of the
/// request is one of a cluster.
pub const MAX_PARTS: usize = 17;

/// A part of a request that is in one piece in its backing, or nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// The first sector of 512 bytes there; `None` if it reads as zeroes.
    pub sector: Option<u64>,
    /// Sectors of 512 bytes.
    pub sectors: u64,
}

/// The backing of a request that is in none. There is none of this number.
const NO_BACKING: u8 = u8::MAX;

/// Where all of a request is, in its own order. A flush has none.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    list: [Part; MAX_PARTS],
    count: usize,
}

impl Parts {
    /// All of them.
    pub fn as_slice(&self) -> &[Part] {
        self.list.get(..self.count).unwrap_or(&[])
    }

    fn clear(&mut self) {
        self.count = 0;
    }

    /// Nothing happens if there are [`MAX_PARTS`].
    fn push(&mut self, part: Part) {
        if let Some(place) = self.list.get_mut(self.count) {
            *place = part;
            self.count = self.count.wrapping_add(1);
        }
    }
}

/// A request that its queue is to execute, where [`Parts`] say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// What those are in that do not read as zeroes; `None` if there are none.
    pub backing: Option<BackingNumber>,
    /// `OP_READ`, `OP_WRITE` or `OP_FLUSH`.
    pub op: u8,
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// Entries in its segment table.
    pub segments: u16,
}

/// What the map of a disk says, if it has one.
pub trait Places {
    /// False if nothing is anywhere.
    fn is_any(&self) -> bool;

    /// What a range is in, if it is in one backing at most and in few parts. What `parts` held before is overwritten.
    fn transfer(
        &mut self,
        range: &Sectors,
        access: Access,
        parts: &mut Parts,
    ) -> Result<Option<BackingNumber>, Miss>;

    /// What a flush of the disk is a flush of.
    fn flush(&self) -> Option<BackingNumber>;

    /// The process gets something that changes the range, or answers it.
    fn changed(&mut self, op: u8, range: &Sectors);

    /// Another process begins.
    fn clear(&mut self);
}

/// The map of a disk that has none: all is for the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMap;

impl Places for NoMap {
    fn is_any(&self) -> bool {
        false
    }

    fn transfer(
        &mut self,
        _range: &Sectors,
        _access: Access,
        _parts: &mut Parts,
    ) -> Result<Option<BackingNumber>, Miss> {
        Err(Miss::Unmapped)
    }

    fn flush(&self) -> Option<BackingNumber> {
        None
    }

    fn changed(&mut self, _op: u8, _range: &Sectors) {}

    fn clear(&mut self) {}
}

impl<P, S, L> Places for Option<P>
where
    P: DerefMut<Target = Map<S, L>>,
    S: DerefMut<Target = [Slot]>,
    L: DerefMut<Target = [Leaf]>,
{
    fn is_any(&self) -> bool {
        self.as_ref().is_some_and(|map| !map.is_empty())
    }

    fn transfer(
        &mut self,
        range: &Sectors,
        access: Access,
        parts: &mut Parts,
    ) -> Result<Option<BackingNumber>, Miss> {
        let mut all_in = None;
        let mut is_one = true;
        parts.clear();
        let each = |piece: &Extent| {
            let is_in = piece.source.backing();
            if let Some(number) = is_in {
                is_one &= all_in.replace(number).is_none_or(|one| one == number);
            }
            parts.push(Part {
                sector: is_in.map(|_| piece.place),
                sectors: piece.range.count(),
            });
        };
        let map = self.as_mut().ok_or(Miss::Unmapped)?;
        map.translate(range, access, MAX_PARTS, each)?;
        is_one.then_some(all_in).ok_or(Miss::Backings)
    }

    fn flush(&self) -> Option<BackingNumber> {
        self.as_ref()?.flushed()
    }

    fn changed(&mut self, op: u8, range: &Sectors) {
        if let Some(map) = self {
            match op {
                abi::OP_WRITE => map.written(range),
                _ => map.recall(range),
            }
        }
    }

    fn clear(&mut self) {
        if let Some(map) = self {
            map.clear();
        }
    }
}

/// What is counted of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Executed {
    /// Requests that are executed now, by backing.
    now: [u32; abi::MAX_BACKINGS as usize],
    /// All of them.
    executing: u32,
    /// Requests that were executed.
    done: u64,
    /// Flushes of them that failed.
    failed_flushes: u32,
    /// Requests that a process got, by `MISS_*`.
    missed: [u64; abi::MISSES as usize],
    /// One bit for each queue that has something to resume.
    resumable: u64,
    /// One bit for each queue that can execute requests.
    able: u64,
}

impl Executed {
    pub(super) fn describe(&self, info: &mut abi::Info) {
        info.direct = self.done;
        info.executing = self.executing;
        info.failed_flushes = self.failed_flushes;
    }

    /// A process gets a request for the first time.
    pub(super) fn count_miss(&mut self, miss: Miss) {
        // CAST: an index below `MISSES`.
        if let Some(missed) = self.missed.get_mut(miss as usize) {
            *missed = missed.wrapping_add(1);
        }
    }

    /// One more, or with `u32::MAX` one less, in a backing or in [`NO_BACKING`].
    fn count(&mut self, backing: u8, by: u32) {
        self.executing = self.executing.wrapping_add(by);
        if let Some(now) = self.now.get_mut(usize::from(backing)) {
            *now = now.wrapping_add(by);
        }
    }
}

/// The queues, and whoever changes the map.
impl<S: DerefMut<Target = [Entry]>, M: Places> Shadow<S, M> {
    /// The map.
    pub fn map(&mut self) -> &mut M {
        &mut self.map
    }

    /// Says whether a queue can execute requests; at first none can.
    pub fn set_able(&mut self, queue: u16, able: bool) {
        self.executed.able &= !bit(queue);
        if able {
            self.executed.able |= bit(queue);
        }
    }

    /// Begins a request that was just posted, if nothing is in its way and it needs no process. Then `parts` say
    /// where.
    pub fn begin(&mut self, tag: DiskTag, parts: &mut Parts) -> Option<Start> {
        let entry = self.get(tag)?;
        if !self.map.is_any() || entry.state != State::Pending {
            return None;
        }
        // It has just been posted, and beside it there is nothing but what queues execute.
        let is_free = !entry.indexed && self.waiting == 1 && self.held == 0;
        if !is_free && self.blocker(tag, &mut { STEPS }).is_some() {
            return None;
        }
        self.execute(tag, parts)
    }

    /// The same for a request whose data is in mapped pages of the guest. If it cannot be begun it is taken back, as if
    /// it had never been posted.
    pub fn begin_mapped(&mut self, tag: DiskTag, parts: &mut Parts) -> Option<Start> {
        let start = self.begin(tag, parts);
        let entry = self.get_mut(tag)?;
        if start.is_some() {
            entry.mapped = true;
        } else if entry.state == State::Pending {
            self.unlist(tag);
            self.waiting = self.waiting.wrapping_sub(1);
            self.forget(tag);
            self.free(tag);
        }
        start
    }

    /// True if a request is executed whose data is in mapped pages of the guest.
    pub fn is_mapped(&self, tag: DiskTag) -> bool {
        let is_mapped = |entry: &Entry| entry.mapped && entry.state == State::Direct;
        self.get(tag).is_some_and(is_mapped)
    }

    /// Begins what a queue can begin now of what waited for others, at most `max`.
    pub fn resume(
        &mut self,
        queue: u16,
        max: usize,
        mut each: impl FnMut(DiskTag, Start, &[Part]),
    ) {
        let mut parts = Parts::default();
        self.sort();
        for _ in 0..max {
            let list = self.ready.get(usize::from(queue));
            let Some(node) = list.and_then(|list| list.first()) else {
                return;
            };
            match self.execute(node.tag(), &mut parts) {
                Some(start) => each(node.tag(), start, parts.as_slice()),
                None => self.miss(node.tag()),
            }
        }
        if self.has_ready(queue) {
            self.executed.resumable |= bit(queue);
        }
    }

    /// A queue has executed a request, with this result: it is the request's, whose tag is free then.
    /// `None` if it is for the process now, or if it was a [mapped](Self::is_mapped) one: then nothing is left of it.
    pub fn ended(&mut self, tag: DiskTag, status: Status) -> Option<Status> {
        let entry = self.get_mut(tag).filter(|e| e.state == State::Direct)?;
        let (op, backing, mapped) = (entry.op, entry.backing, entry.mapped);
        self.executed.count(backing, u32::MAX);
        self.forget(tag);
        if status == Status::Okay || op == abi::OP_FLUSH {
            self.executed.done = self.executed.done.wrapping_add(1);
            let failed = u32::from(status != Status::Okay);
            self.executed.failed_flushes = self.executed.failed_flushes.wrapping_add(failed);
            self.free(tag);
            return Some(status);
        }
        if mapped {
            self.free(tag);
            return None;
        }
        if let Some(entry) = self.get_mut(tag) {
            entry.flags |= abi::DESC_REPLAY;
            self.replaying = self.replaying.wrapping_add(1);
        }
        self.arrive(tag);
        None
    }

    /// Finds out who is to execute what waits. To be called after something was posted or has ended, and after
    /// the map has changed; see [`take_resumable`](Self::take_resumable).
    pub fn sort(&mut self) {
        if !self.map.is_any() {
            return;
        }
        let mut steps = STEPS;
        while let Some(node) = self.pending.first() {
            if steps == 0 {
                // The rest is for the thread of a queue that can, which sorts when it resumes.
                let able = self.executed.able;
                self.executed.resumable |= able & able.wrapping_neg();
                return;
            }
            if !self.sort_out(node.tag(), &mut steps) {
                self.miss(node.tag());
            }
        }
    }

    /// One bit for each queue that is to [`resume`](Self::resume) something, and was not told so before.
    #[must_use]
    pub fn take_resumable(&mut self) -> u64 {
        core::mem::replace(&mut self.executed.resumable, 0)
    }

    /// Requests that are executed now.
    pub fn executing(&self) -> u32 {
        self.executed.executing
    }

    /// Requests that a process got, by the reason: an index is one of `abi::MISS_*`.
    pub fn missed(&self) -> [u64; abi::MISSES as usize] {
        self.executed.missed
    }

    /// True if one is executed in this backing.
    pub fn is_executing_in(&self, backing: BackingNumber) -> bool {
        let now = self.executed.now.get(backing.index());
        now.is_some_and(|now| *now > 0)
    }

    /// True if one is executed that has to do with the range. Looks at every request.
    ///
    /// A flush has no range: only everything has to do with it, after whose recall none is begun. If it had to
    /// do with all ranges a guest could have one executed at any time.
    pub fn is_executing(&self, range: &Sectors) -> bool {
        let mut at = self.order.first().filter(|_| self.executing() > 0);
        while let Some(node) = at {
            at = next(&self.entries, node);
            let entry = self.get(node.tag());
            let overlaps = |e: &Entry| e.sector < range.end() && range.start() < e.end;
            let flushes = |e: &Entry| e.op == abi::OP_FLUSH && *range == Sectors::ALL;
            let uses = |e: &Entry| overlaps(e) || flushes(e);
            if entry.is_some_and(|e| e.state == State::Direct && uses(e)) {
                return true;
            }
        }
        false
    }
}

/// What the calls are made of.
impl<S: DerefMut<Target = [Entry]>, M: Places> Shadow<S, M> {
    /// Turns a request that waits, with nothing in its way, into one that its queue executes.
    fn execute(&mut self, tag: DiskTag, parts: &mut Parts) -> Option<Start> {
        let backing = self.place(tag, parts)?;
        self.unlist(tag);
        self.waiting = self.waiting.wrapping_sub(1);
        let entry = self.get_mut(tag)?;
        entry.state = State::Direct;
        // CAST: a small number.
        let number = backing.map_or(NO_BACKING, |backing| backing.index() as u8);
        entry.backing = number;
        let start = Start {
            backing,
            op: entry.op,
            sectors: entry.end.wrapping_sub(entry.sector),
            segments: entry.segments,
        };
        self.executed.count(number, 1);
        Some(start)
    }

    /// Where a request could be executed without the process. The entry has the reason if it cannot.
    fn place(&mut self, tag: DiskTag, parts: &mut Parts) -> Option<Option<BackingNumber>> {
        let place = self.look_up(tag, parts);
        if let (Err(miss), Some(entry)) = (place, self.get_mut(tag)) {
            entry.miss = miss;
        }
        place.ok()
    }

    fn look_up(&mut self, tag: DiskTag, parts: &mut Parts) -> Result<Option<BackingNumber>, Miss> {
        let fresh = |e: &&Entry| e.flags == 0 && e.deliveries == 0;
        let able = |e: &&Entry| self.executed.able & bit(e.queue) != 0;
        let entry = self.get(tag).filter(fresh).ok_or(Miss::Never)?;
        if !able(&entry) {
            return Err(Miss::Queue);
        }
        let range = Sectors::between(entry.sector, entry.end);
        match (entry.op, range) {
            (abi::OP_READ, Some(range)) => self.map.transfer(&range, Access::Read, parts),
            (abi::OP_WRITE, Some(range)) => self.map.transfer(&range, Access::ReadWrite, parts),
            (abi::OP_FLUSH, _) => {
                parts.clear();
                self.map.flush().map(Some).ok_or(Miss::Never)
            }
            _ => Err(Miss::Never),
        }
    }

    /// Nothing is in the way of a request that waits: true if its queue is to execute it, which it is told.
    pub(super) fn make_ready(&mut self, tag: DiskTag) -> bool {
        if !self.map.is_any() || self.place(tag, &mut Parts::default()).is_none() {
            return false;
        }
        self.unlist(tag);
        let Some(entry) = self.get_mut(tag) else {
            return false;
        };
        entry.state = State::Ready;
        let queue = entry.queue;
        if let Some(list) = self.ready.get_mut(usize::from(queue)) {
            list.push_back(&mut self.entries, Node::new(tag, Link::State));
        }
        self.executed.resumable |= bit(queue);
        true
    }

    /// A request that waits, with nothing in its way, is for the process.
    fn miss(&mut self, tag: DiskTag) {
        self.unlist(tag);
        if let Some(entry) = self.get_mut(tag) {
            entry.state = State::Missed;
        }
        self.missed
            .push_back(&mut self.entries, Node::new(tag, Link::State));
    }

    /// True if a queue executes something, or is about to.
    pub(super) fn is_direct(&self) -> bool {
        self.executing() > 0 || self.ready.iter().any(|list| !list.is_empty())
    }

    /// True if a request waits for a process, itself or because of what is in its way. To be asked in the order
    /// of arrival, while those that do are failed.
    pub(super) fn needs_process(&mut self, tag: DiskTag, steps: &mut u32) -> bool {
        if self.is_waiting(tag, |entry| entry.state == State::Pending) {
            self.block(tag, steps);
        }
        self.get(tag).is_some_and(|entry| match entry.state {
            State::Pending | State::Missed => true,
            // What waits has been asked before, and does not wait for a process.
            State::Blocked => {
                let blocker = self.get(entry.blocked_on);
                blocker.is_none_or(|blocker| blocker.state == State::Delivered)
            }
            State::Ready | State::Direct => false,
            State::Free | State::Delivered | State::Done => false,
        })
    }

    fn has_ready(&self, queue: u16) -> bool {
        let list = self.ready.get(usize::from(queue));
        list.is_some_and(|list| !list.is_empty())
    }

    /// The process gets a request, answers it, or is gone with it.
    pub(super) fn note_change(&mut self, tag: DiskTag) {
        let Some(entry) = self.get(tag).filter(|entry| writes(entry.op)) else {
            return;
        };
        if let Some(range) = Sectors::between(entry.sector, entry.end) {
            self.map.changed(entry.op, &range);
        }
    }
}

fn bit(queue: u16) -> u64 {
    1u64.wrapping_shl(u32::from(queue))
}
