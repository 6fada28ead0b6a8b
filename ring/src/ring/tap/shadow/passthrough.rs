// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests that the kernel executes without the process, because the map of the disk has their place.
//!
//! ```text
//!                          unblocked, and mapped
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
//! - A passthrough request is one like any other: it waits for earlier ones that overlap it, and later ones wait for it, whether
//!   queues or the process execute them. But while the process has no request and none waits for it, requests that
//!   queues execute do not wait for each other, as on a device without a process, because a guest expects no order
//!   among overlapping requests in flight.
//! - A queue executes requests only if it has the memory for that ([`Shadow::set_able`]).
//! - Queues execute only reads and writes of whole blocks that no process ever had. They execute a flush if the process
//!   declared it a flush of the backing.
//! - When the process gets a write or a discard, and when it answers or dies, the map of that range may become wrong
//!   (see [`ExtentMap`]). So the shadow updates the map both times.
//! - The thread of its queue begins a request and ends it. The death of a process does not affect it; the start of the
//!   next one clears the map, so nothing more is begun. (A queue in express may begin more until it has given that up, for
//!   which the process's requests and recalls wait: `express`.)
//! - If a request fails, its effect is unknown, so the process gets it as a replay and answers it. It arrives anew, so
//!   that it waits for requests that queues execute by then, because the process must not move data under them. A
//!   failed flush is answered as failed, because a retry could succeed over lost data.
//! - The data of a request may be in pages of the guest that are mapped, which no process can access. Such a request is
//!   begun at once or not at all ([`Shadow::begin_mapped`]), and the shadow forgets it if it fails: its queue copies
//!   the data to the arena, and posts it anew. Overlapping requests may overtake it, which the guest permits, because
//!   none of them was answered.

use core::ops::DerefMut;

use super::{Shadow, STEPS};
use crate::ring::numbers::DiskTag;
use crate::ring::response::ResponseStatus;
use crate::ring::tap::abi;
use crate::ring::tap::extent::{BackingNumber, DataExtent, ExpressExtent, ExtentAccess, Sectors};
use crate::ring::tap::map::tree::{Leaf, LeafSlot};
use crate::ring::tap::map::{ExtentMap, Miss};
use crate::ring::tap::overlap::writes;
use crate::ring::tap::table::{next, Link, ListNode, TagEntry, TagState};

/// Maximum number of parts that a request is executed in: 1 MiB of 64 KiB clusters at arbitrary places, with neither
/// end of the request on a cluster boundary.
pub const MAX_PARTS: usize = 17;

/// A part of a request that is contiguous in its backing, or reads as zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestPart {
    /// The first sector of 512 bytes in the backing; `None` if it reads as zeroes.
    pub sector: Option<u64>,
    /// Sectors of 512 bytes.
    pub sectors: u64,
}

/// The backing of a request that is in none. No backing has this number.
const NO_BACKING: u8 = u8::MAX;

/// Places of all parts of a request, in its own order. A flush has none.
#[derive(Clone, Debug, Default)]
pub struct RequestParts {
    list: [RequestPart; MAX_PARTS],
    count: usize,
}

impl RequestParts {
    /// Returns all parts.
    pub fn as_slice(&self) -> &[RequestPart] {
        self.list.get(..self.count).unwrap_or(&[])
    }

    fn clear(&mut self) {
        self.count = 0;
    }

    /// Appends a part; does nothing if there are [`MAX_PARTS`].
    fn push(&mut self, part: RequestPart) {
        if let Some(place) = self.list.get_mut(self.count) {
            *place = part;
            self.count = self.count.wrapping_add(1);
        }
    }
}

/// A request that its queue is to execute, at the places in [`RequestParts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Backing of the parts that do not read as zeroes; `None` if there are none.
    pub backing: Option<BackingNumber>,
    /// `OP_READ`, `OP_WRITE` or `OP_FLUSH`.
    pub op: u8,
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// Entries in its segment table.
    pub segments: u16,
}

/// Lookups in the map of a disk, if it has one.
pub trait MapLookup {
    /// Returns false if the map is empty.
    fn is_any(&self) -> bool;

    /// Finds the parts of a range, if it is in one backing at most and in few parts. Overwrites `parts`.
    fn transfer(
        &mut self,
        range: &Sectors,
        access: ExtentAccess,
        parts: &mut RequestParts,
    ) -> Result<Option<BackingNumber>, Miss>;

    /// Returns the backing that a flush of the disk flushes.
    fn flush(&self) -> Option<BackingNumber>;

    /// Returns the extent in which the last range was found, if it is in a backing.
    fn last_used(&self) -> Option<ExpressExtent>;

    /// Records that the process gets a request that changes the range, or answers it.
    fn changed(&mut self, op: u8, range: &Sectors);

    /// Forgets the mappings, because another process begins.
    fn clear(&mut self);
}

/// The map of a disk that has none: all requests go to the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMap;

impl MapLookup for NoMap {
    fn is_any(&self) -> bool {
        false
    }

    fn transfer(
        &mut self,
        _range: &Sectors,
        _access: ExtentAccess,
        _parts: &mut RequestParts,
    ) -> Result<Option<BackingNumber>, Miss> {
        Err(Miss::Unmapped)
    }

    fn flush(&self) -> Option<BackingNumber> {
        None
    }

    fn last_used(&self) -> Option<ExpressExtent> {
        None
    }

    fn changed(&mut self, _op: u8, _range: &Sectors) {}

    fn clear(&mut self) {}
}

impl<P, S, L> MapLookup for Option<P>
where
    P: DerefMut<Target = ExtentMap<S, L>>,
    S: DerefMut<Target = [LeafSlot]>,
    L: DerefMut<Target = [Leaf]>,
{
    fn is_any(&self) -> bool {
        self.as_ref().is_some_and(|map| !map.is_empty())
    }

    fn transfer(
        &mut self,
        range: &Sectors,
        access: ExtentAccess,
        parts: &mut RequestParts,
    ) -> Result<Option<BackingNumber>, Miss> {
        let mut all_in = None;
        let mut is_one = true;
        parts.clear();
        let each = |piece: &DataExtent| {
            let is_in = piece.source.backing();
            if let Some(number) = is_in {
                is_one &= all_in.replace(number).is_none_or(|one| one == number);
            }
            parts.push(RequestPart {
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

    fn last_used(&self) -> Option<ExpressExtent> {
        self.as_ref()?.last_used()
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

/// Counts of direct requests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Executed {
    /// Requests that are executed now, by backing.
    now: [u32; abi::MAX_BACKINGS as usize],
    /// Requests that are executed now, in all backings.
    executing: u32,
    /// Requests that queues have executed.
    done: u64,
    /// Flushes among them that failed.
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

    /// Counts a request that a process gets for the first time.
    pub(super) fn count_miss(&mut self, miss: Miss) {
        // CAST: an index below `MISSES`.
        if let Some(missed) = self.missed.get_mut(miss as usize) {
            *missed = missed.wrapping_add(1);
        }
    }

    /// Adds `by` (1, or `u32::MAX` for minus 1) to the count of a backing or of [`NO_BACKING`].
    fn count(&mut self, backing: u8, by: u32) {
        self.executing = self.executing.wrapping_add(by);
        if let Some(now) = self.now.get_mut(usize::from(backing)) {
            *now = now.wrapping_add(by);
        }
    }
}

/// Calls of the queues, and of ioctls that change the map.
impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Returns the map, to be changed.
    pub fn map(&mut self) -> &mut M {
        self.express.map_changes();
        &mut self.map
    }

    /// Returns the map, for a look.
    pub fn map_seen(&self) -> &M {
        &self.map
    }

    /// Sets whether a queue can execute requests; at first none can.
    pub fn set_able(&mut self, queue: u16, able: bool) {
        self.executed.able &= !bit(queue);
        if able {
            self.executed.able |= bit(queue);
        }
    }

    /// Begins a request that was just posted, if no other request blocks it and it needs no process; `parts` then has
    /// the places.
    pub fn begin(&mut self, tag: DiskTag, parts: &mut RequestParts) -> Option<Start> {
        let entry = self.get(tag)?;
        if !self.map.is_any() || entry.state != TagState::Pending {
            return None;
        }
        // It has just been posted, and all other requests are those that queues execute.
        let is_free = !entry.indexed && self.waiting == 1 && self.held == 0;
        if !is_free && self.blocker(tag, &mut { STEPS }).is_some() {
            return None;
        }
        self.execute(tag, parts)
    }

    /// Begins a request whose data is in mapped pages of the guest, like [`begin`](Self::begin). If it cannot be begun,
    /// the shadow takes it back, as if it had never been posted.
    pub fn begin_mapped(&mut self, tag: DiskTag, parts: &mut RequestParts) -> Option<Start> {
        let start = self.begin(tag, parts);
        let entry = self.get_mut(tag)?;
        if start.is_some() {
            entry.mapped = true;
        } else if entry.state == TagState::Pending {
            self.unlist(tag);
            self.waiting = self.waiting.wrapping_sub(1);
            self.forget(tag);
            self.free(tag);
        }
        start
    }

    /// Returns true if a request is executed whose data is in mapped pages of the guest.
    pub fn is_mapped(&self, tag: DiskTag) -> bool {
        let is_mapped = |entry: &TagEntry| entry.mapped && entry.state == TagState::Direct;
        self.get(tag).is_some_and(is_mapped)
    }

    /// Begins at most `max` requests of a queue that waited for others and can begin now.
    pub fn resume(
        &mut self,
        queue: u16,
        max: usize,
        mut each: impl FnMut(DiskTag, Start, &[RequestPart]),
    ) {
        let mut parts = RequestParts::default();
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

    /// Ends a request that a queue has executed with this result: returns the result for the guest, and frees the tag.
    /// `None` if the process gets the request now, or if it was a [mapped](Self::is_mapped) one, which the shadow
    /// forgets.
    pub fn ended(&mut self, tag: DiskTag, status: ResponseStatus) -> Option<ResponseStatus> {
        let entry = self.get_mut(tag).filter(|e| e.state == TagState::Direct)?;
        let (op, backing, mapped) = (entry.op, entry.backing, entry.mapped);
        self.executed.count(backing, u32::MAX);
        self.forget(tag);
        if status == ResponseStatus::Okay || op == abi::OP_FLUSH {
            self.executed.done = self.executed.done.wrapping_add(1);
            let failed = u32::from(status != ResponseStatus::Okay);
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

    /// Assigns waiting requests to the process or to their queues. The caller calls this after a post, after the end of
    /// a request, and after a change of the map; see [`take_resumable`](Self::take_resumable).
    pub fn sort(&mut self) {
        if !self.map.is_any() {
            return;
        }
        let mut steps = STEPS;
        while let Some(node) = self.pending.first() {
            if steps == 0 {
                // The other requests are for the thread of an able queue, which sorts when it resumes.
                let able = self.executed.able;
                self.executed.resumable |= able & able.wrapping_neg();
                return;
            }
            if !self.sort_out(node.tag(), &mut steps) {
                self.miss(node.tag());
            }
        }
    }

    /// Returns one bit for each queue that must [`resume`](Self::resume) something, once for each such event.
    #[must_use]
    pub fn take_resumable(&mut self) -> u64 {
        core::mem::replace(&mut self.executed.resumable, 0)
    }

    /// Returns the number of requests that are executed now.
    pub fn executing(&self) -> u32 {
        self.executed.executing
    }

    /// Returns the number of requests that a process got, by the reason: an index is one of `abi::MISS_*`.
    pub fn missed(&self) -> [u64; abi::MISSES as usize] {
        self.executed.missed
    }

    /// Returns true if a request is executed in this backing, or may be in express.
    pub fn is_executing_in(&self, backing: BackingNumber) -> bool {
        let now = self.executed.now.get(backing.index());
        self.has_express() || now.is_some_and(|now| *now > 0)
    }

    /// Counts requests that a queue has executed in express.
    pub fn count_express(&mut self, done: u64) {
        self.executed.done = self.executed.done.wrapping_add(done);
    }

    /// Returns true if a request is executed that overlaps the range, or may be in express. Looks at every request.
    ///
    /// A flush has no range: it overlaps only the whole disk, after whose recall none is begun. If a flush overlapped
    /// all ranges, a guest could keep one executing at any time.
    pub fn is_executing(&self, range: &Sectors) -> bool {
        if self.has_express() {
            return true;
        }
        let mut at = self.order.first().filter(|_| self.executing() > 0);
        while let Some(node) = at {
            at = next(&self.entries, node);
            let entry = self.get(node.tag());
            let overlaps = |e: &TagEntry| e.sector < range.end() && range.start() < e.end;
            let flushes = |e: &TagEntry| e.op == abi::OP_FLUSH && *range == Sectors::ALL;
            let uses = |e: &TagEntry| overlaps(e) || flushes(e);
            if entry.is_some_and(|e| e.state == TagState::Direct && uses(e)) {
                return true;
            }
        }
        false
    }
}

/// Internals of the calls.
impl<S: DerefMut<Target = [TagEntry]>, M: MapLookup> Shadow<S, M> {
    /// Turns a request that waits, with nothing in its way, into one that its queue executes.
    fn execute(&mut self, tag: DiskTag, parts: &mut RequestParts) -> Option<Start> {
        let backing = self.place(tag, parts)?;
        self.unlist(tag);
        self.waiting = self.waiting.wrapping_sub(1);
        let entry = self.get_mut(tag)?;
        entry.state = TagState::Direct;
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
        self.express.needed_no_process();
        Some(start)
    }

    /// Returns the place where a request could be executed without the process. Stores the reason in the entry if it
    /// cannot.
    fn place(&mut self, tag: DiskTag, parts: &mut RequestParts) -> Option<Option<BackingNumber>> {
        let place = self.look_up(tag, parts);
        if let (Err(miss), Some(entry)) = (place, self.get_mut(tag)) {
            entry.miss = miss;
        }
        place.ok()
    }

    fn look_up(
        &mut self,
        tag: DiskTag,
        parts: &mut RequestParts,
    ) -> Result<Option<BackingNumber>, Miss> {
        let fresh = |e: &&TagEntry| e.flags == 0 && e.deliveries == 0;
        let entry = self.get(tag).filter(fresh).ok_or(Miss::Never)?;
        if !self.is_able(entry.queue) {
            return Err(Miss::Queue);
        }
        let range = Sectors::between(entry.sector, entry.end);
        match (entry.op, range) {
            (abi::OP_READ, Some(range)) => self.map.transfer(&range, ExtentAccess::Read, parts),
            (abi::OP_WRITE, Some(range)) => {
                self.map.transfer(&range, ExtentAccess::ReadWrite, parts)
            }
            (abi::OP_FLUSH, _) => {
                parts.clear();
                self.map.flush().map(Some).ok_or(Miss::Never)
            }
            _ => Err(Miss::Never),
        }
    }

    /// Decides for a waiting request that nothing blocks: returns true if its queue must execute it, and marks the
    /// queue as resumable.
    pub(super) fn make_ready(&mut self, tag: DiskTag) -> bool {
        if !self.map.is_any() || self.place(tag, &mut RequestParts::default()).is_none() {
            return false;
        }
        self.unlist(tag);
        let Some(entry) = self.get_mut(tag) else {
            return false;
        };
        entry.state = TagState::Ready;
        let queue = entry.queue;
        if let Some(list) = self.ready.get_mut(usize::from(queue)) {
            list.push_back(&mut self.entries, ListNode::new(tag, Link::State));
        }
        self.executed.resumable |= bit(queue);
        true
    }

    /// Returns true if a queue can execute requests.
    pub(super) fn is_able(&self, queue: u16) -> bool {
        self.executed.able & bit(queue) != 0
    }

    /// Assigns a waiting request that nothing blocks to the process.
    fn miss(&mut self, tag: DiskTag) {
        self.express.needed_a_process();
        self.unlist(tag);
        if let Some(entry) = self.get_mut(tag) {
            entry.state = TagState::Missed;
        }
        self.missed
            .push_back(&mut self.entries, ListNode::new(tag, Link::State));
    }

    /// Returns true if a queue executes a request, or is about to.
    pub(super) fn is_direct(&self) -> bool {
        self.executing() > 0 || self.ready.iter().any(|list| !list.is_empty())
    }

    /// Returns true if a request waits for a process, itself or because of a request that blocks it. The caller asks in
    /// the order of arrival, while it fails those that do.
    pub(super) fn needs_process(&mut self, tag: DiskTag, steps: &mut u32) -> bool {
        if self.is_waiting(tag, |entry| entry.state == TagState::Pending) {
            self.block(tag, steps);
        }
        self.get(tag).is_some_and(|entry| match entry.state {
            TagState::Pending | TagState::Missed => true,
            // A blocking request that waits was examined before, and does not wait for a process.
            TagState::Blocked => {
                let blocker = self.get(entry.blocked_on);
                blocker.is_none_or(|blocker| blocker.state == TagState::Delivered)
            }
            TagState::Ready | TagState::Direct => false,
            TagState::Free | TagState::Delivered | TagState::Done => false,
        })
    }

    fn has_ready(&self, queue: u16) -> bool {
        let list = self.ready.get(usize::from(queue));
        list.is_some_and(|list| !list.is_empty())
    }

    /// Updates the map when the process gets a request, answers it, or dies with it.
    pub(super) fn note_change(&mut self, tag: DiskTag) {
        let Some(entry) = self.get(tag).filter(|entry| writes(entry.op)) else {
            return;
        };
        if let Some(range) = Sectors::between(entry.sector, entry.end) {
            self.map.changed(entry.op, &range);
        }
    }
}

/// Returns the bit of a queue in a word of all queues.
pub(super) fn bit(queue: u16) -> u64 {
    1u64.wrapping_shl(u32::from(queue))
}
