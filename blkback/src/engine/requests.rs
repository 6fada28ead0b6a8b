// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The requests of a queue that are taken and not answered: what is known of each, how far it is, and
//! which pages it has.
//!
//! ```text
//!       take           start          complete          end
//! ring ------> Taken -------> Submitted -------> Completed ----> response
//!              |  ^                                |
//!        stall |  | resume      |                  | go_on (it is done piece by piece)
//!              v  |             | take_back        v
//!            Stalled <----------+                Taken
//! ```
//!
//! A [`Handle`] is the right to take the next step of one request. There is one for each, in a list of its
//! stage or in somebody's hand; a step takes it and gives the next one. So a request is answered once.

use core::marker::PhantomData;

use crate::engine::backend::IoKind;
use crate::engine::segments::{Chain, Pool, Segments};
use crate::ring::numbers::QueueTag;
use crate::ring::response::{Response, Status};

/// The end of a list.
const END: QueueTag = QueueTag::new(u16::MAX);

/// Stage: its data is being brought in.
#[derive(Debug)]
pub(crate) enum Taken {}
/// Stage: it waits for copy pages because its own cannot be mapped, or cannot be used where they are.
#[derive(Debug)]
pub(crate) enum Stalled {}
/// Stage: the backend has it.
#[derive(Debug)]
pub(crate) enum Submitted {}
/// Stage: it has a result; its data is being brought out.
#[derive(Debug)]
pub(crate) enum Completed {}

/// The right to take the next step of a request, which is at the stage `S`.
///
/// It cannot be copied. Nor can it be dropped, which would be a request that nobody answers: the build
/// refuses a module in which the compiler has left a way to do so, because that way panics.
#[derive(Debug)]
#[must_use]
pub(crate) struct Handle<S>(QueueTag, PhantomData<S>);

impl<S> Handle<S> {
    /// The request's number, to look at it.
    pub(crate) fn tag(&self) -> QueueTag {
        self.0
    }

    fn step<T>(self) -> Handle<T> {
        let next = Handle(self.0, PhantomData);
        core::mem::forget(self);
        next
    }

    /// Where it is kept now, or that it is at its end, is up to the caller.
    fn put_down(self) -> QueueTag {
        let tag = self.0;
        core::mem::forget(self);
        tag
    }
}

impl<S> Drop for Handle<S> {
    #[expect(
        clippy::panic,
        reason = "never compiled into the module, whose build looks for it"
    )]
    fn drop(&mut self) {
        panic!("request {} is forgotten", self.0.number());
    }
}

impl Handle<Taken> {
    /// It waits for copy pages.
    pub(crate) fn stall(self) -> Handle<Stalled> {
        self.step()
    }

    /// It has failed before it was given to the backend.
    pub(crate) fn fail(self) -> Handle<Completed> {
        self.step()
    }
}

impl Handle<Stalled> {
    /// It waits no longer.
    pub(crate) fn resume(self) -> Handle<Taken> {
        self.step()
    }
}

impl Handle<Completed> {
    /// The next piece of it is to be done.
    pub(crate) fn go_on(self) -> Handle<Taken> {
        self.step()
    }
}

/// A request that is taken and not answered.
#[derive(Clone, Copy, Debug)]
pub struct PendingRequest {
    pub(crate) id: u64,
    pub(crate) sector: u64,
    /// Sectors of a transfer, or those of a discard that are still to do.
    pub(crate) sectors: u64,
    pub(crate) kind: IoKind,
    /// The segments that are being worked on.
    pub(crate) head: u16,
    pub(crate) count: u16,
    /// Those that follow when these are done: there was no room for all.
    pub(crate) rest: u16,
    pub(crate) left: u16,
    /// When the backend got it, if it has it. While spans are counted, when it came to where it is, or 0.
    pub(crate) since: u64,
    /// The next request of the list in which this one is, and the one before, unless this is the first.
    pub(super) next: QueueTag,
    pub(super) prev: QueueTag,
    pub(crate) operation: u8,
    pub(crate) pool: Pool,
    pub(crate) status: Status,
    /// The backend has it. What the backend names is a number, which proves nothing.
    pub(super) submitted: bool,
    /// A page of it cannot be mapped for want of room in the hypervisor.
    pub(crate) unmappable: bool,
    /// A page of it cannot be mapped because the grant is no good.
    pub(crate) refused: bool,
    /// Some of its segments are done already.
    pub(crate) continued: bool,
    /// All of it is in the counters. It may have been begun as a whole, be given back, and be done in pieces.
    pub(crate) counted: bool,
}

impl PendingRequest {
    /// No request.
    pub const FREE: Self = Self {
        id: 0,
        sector: 0,
        sectors: 0,
        kind: IoKind::Flush,
        head: 0,
        count: 0,
        rest: 0,
        left: 0,
        since: 0,
        next: END,
        prev: END,
        operation: 0,
        pool: Pool::Copy,
        status: Status::Okay,
        submitted: false,
        unmappable: false,
        refused: false,
        continued: false,
        counted: false,
    };

    /// True for a read whose data must be copied to the guest.
    pub(crate) fn copies_out(&self) -> bool {
        self.kind == IoKind::Read && self.pool == Pool::Copy && self.status == Status::Okay
    }

    /// True for a write whose data must be copied from the guest.
    pub(crate) fn copies_in(&self) -> bool {
        self.kind != IoKind::Read && self.pool == Pool::Copy
    }

    pub(crate) fn set_chain(&mut self, chain: Chain) {
        self.head = chain.head;
        self.count = chain.count;
        self.rest = chain.rest;
        self.left = chain.left;
    }
}

/// Requests of one stage, in arrival order.
#[derive(Debug)]
pub(crate) struct List<S> {
    head: QueueTag,
    tail: QueueTag,
    stage: PhantomData<S>,
}

impl<S> List<S> {
    pub(crate) const EMPTY: Self = Self {
        head: END,
        tail: END,
        stage: PhantomData,
    };

    pub(crate) fn is_empty(&self) -> bool {
        self.head == END
    }

    /// The number of the first one.
    pub(crate) fn first(&self) -> Option<QueueTag> {
        (self.head != END).then_some(self.head)
    }
}

/// What is known of each request, by its number.
#[derive(Debug)]
pub(crate) struct Slots<'a> {
    slots: &'a mut [PendingRequest],
    /// What a handle names that names no slot, which none does.
    nobody: PendingRequest,
}

impl Slots<'_> {
    pub(crate) fn get(&self, tag: QueueTag) -> Option<&PendingRequest> {
        self.slots.get(tag.index())
    }

    pub(crate) fn get_mut(&mut self, tag: QueueTag) -> Option<&mut PendingRequest> {
        self.slots.get_mut(tag.index())
    }

    #[inline]
    fn of<S>(&self, handle: &Handle<S>) -> &PendingRequest {
        self.get(handle.0).unwrap_or(&self.nobody)
    }

    /// A part of a request's data cannot be moved.
    pub(crate) fn fail(&mut self, tag: QueueTag) {
        if let Some(request) = self.get_mut(tag) {
            request.status = Status::Error;
        }
    }

    /// There is no room for a mapping of a page of it, which is a reason to copy it instead.
    pub(crate) fn fail_to_map(&mut self, tag: QueueTag) {
        self.fail(tag);
        if let Some(request) = self.get_mut(tag) {
            request.unmappable = !request.refused;
        }
    }

    /// A page of it cannot be mapped because the grant is no good.
    pub(crate) fn refuse_to_map(&mut self, tag: QueueTag) {
        self.fail(tag);
        if let Some(request) = self.get_mut(tag) {
            request.refused = true;
            request.unmappable = false;
        }
    }

    /// Appends a slot that is in no list.
    #[inline]
    fn append<S>(&mut self, list: &mut List<S>, tag: QueueTag) {
        if let Some(slot) = self.get_mut(tag) {
            slot.next = END;
            slot.prev = list.tail;
        }
        match self.get_mut(list.tail) {
            Some(tail) => tail.next = tag,
            None => list.head = tag,
        }
        list.tail = tag;
    }

    #[inline]
    fn remove_first<S>(&mut self, list: &mut List<S>) -> Option<QueueTag> {
        let tag = list.head;
        let slot = self.get_mut(tag)?;
        list.head = slot.next;
        slot.next = END;
        if list.head == END {
            list.tail = END;
        }
        Some(tag)
    }

    /// Takes a slot out of the list in which it is.
    #[inline]
    fn remove<S>(&mut self, list: &mut List<S>, tag: QueueTag) {
        let Some(slot) = self.get_mut(tag) else {
            return;
        };
        let next = core::mem::replace(&mut slot.next, END);
        let prev = slot.prev;
        if list.head == tag {
            list.head = next;
        } else if let Some(before) = self.get_mut(prev) {
            before.next = next;
        }
        if let Some(behind) = self.get_mut(next) {
            behind.prev = prev;
        } else {
            list.tail = if list.head == END { END } else { prev };
        }
    }
}

/// Gives the pages of a request back.
#[inline]
fn release(segments: &mut Segments<'_>, request: &PendingRequest) {
    segments.release(request.pool, request.head, request.count);
    segments.release(Pool::Rest, request.rest, request.left);
}

/// The requests of a queue.
///
/// # Invariants
///
/// - A handle, and an entry of a list, names a slot that there is.
/// - A slot is free, or in one list, or somebody has its handle.
/// - A slot is in the list `submitted` if its own `submitted` is set, and then only.
/// - The chain of a slot that is not free belongs to its request.
#[derive(Debug)]
pub(crate) struct Requests<'a> {
    pub(crate) slots: Slots<'a>,
    /// Slots without a request.
    free: List<()>,
    used: u16,
    pub(crate) segments: Segments<'a>,
    pub(crate) taken: List<Taken>,
    pub(crate) stalled: List<Stalled>,
    /// What the backend has, the oldest first. It completes in any order.
    submitted: List<Submitted>,
    pub(crate) completed: List<Completed>,
}

impl<'a> Requests<'a> {
    /// Of a queue that has taken nothing.
    pub(crate) fn new(slots: &'a mut [PendingRequest], segments: Segments<'a>) -> Self {
        let total = u16::try_from(slots.len()).unwrap_or(u16::MAX);
        slots.fill(PendingRequest::FREE);
        let mut requests = Self {
            slots: Slots {
                slots,
                nobody: PendingRequest::FREE,
            },
            free: List::EMPTY,
            used: 0,
            segments,
            taken: List::EMPTY,
            stalled: List::EMPTY,
            submitted: List::EMPTY,
            completed: List::EMPTY,
        };
        for tag in (0..total).map(QueueTag::new) {
            requests.slots.append(&mut requests.free, tag);
        }
        requests
    }

    /// Requests that are not answered.
    pub(crate) fn used(&self) -> u16 {
        self.used
    }

    /// A request by its number.
    pub(crate) fn get(&self, tag: QueueTag) -> Option<&PendingRequest> {
        self.slots.get(tag)
    }

    /// The request of a handle.
    #[inline]
    pub(crate) fn of<S>(&self, handle: &Handle<S>) -> &PendingRequest {
        self.slots.of(handle)
    }

    /// The same, to change it.
    #[inline]
    pub(crate) fn of_mut<S>(&mut self, handle: &Handle<S>) -> &mut PendingRequest {
        match self.slots.slots.get_mut(handle.0.index()) {
            Some(slot) => slot,
            None => &mut self.slots.nobody,
        }
    }

    /// The number of the request behind `tag` in its list.
    pub(crate) fn after(&self, tag: QueueTag) -> Option<QueueTag> {
        let next = self.get(tag)?.next;
        (next != END).then_some(next)
    }

    /// The numbers of this request and of those behind it in its list, in order.
    pub(crate) fn from(&self, mut tag: QueueTag) -> impl Iterator<Item = QueueTag> + '_ {
        core::iter::from_fn(move || {
            let here = tag;
            tag = self.get(here)?.next;
            Some(here)
        })
    }

    /// Gives a new request a number; `None` if there is none left.
    #[inline]
    pub(crate) fn take(&mut self, request: PendingRequest) -> Option<Handle<Taken>> {
        let tag = self.slots.remove_first(&mut self.free)?;
        *self.slots.get_mut(tag)? = request;
        self.used = self.used.wrapping_add(1);
        Some(Handle(tag, PhantomData))
    }

    /// The backend gets it now. It is behind all that it got before.
    #[inline]
    pub(crate) fn start(&mut self, handle: Handle<Taken>, now: u64) -> QueueTag {
        let request = self.of_mut(&handle);
        request.submitted = true;
        request.since = now;
        let tag = handle.put_down();
        self.slots.append(&mut self.submitted, tag);
        tag
    }

    /// When the backend got the oldest one that it has.
    pub(crate) fn oldest_start(&self) -> Option<u64> {
        Some(self.get(self.submitted.first()?)?.since)
    }

    /// The backend says that it is done. `None` if the backend does not have it.
    #[inline]
    pub(crate) fn complete(&mut self, tag: QueueTag, status: Status) -> Option<Handle<Completed>> {
        let slot = self.slots.get_mut(tag)?;
        if !core::mem::replace(&mut slot.submitted, false) {
            return None;
        }
        slot.status = status;
        self.slots.remove(&mut self.submitted, tag);
        Some(Handle(tag, PhantomData))
    }

    /// The backend gives it back as it got it. `None` if the backend does not have it.
    pub(crate) fn take_back(&mut self, tag: QueueTag) -> Option<Handle<Stalled>> {
        let slot = self.slots.get_mut(tag)?;
        if !core::mem::replace(&mut slot.submitted, false) {
            return None;
        }
        // It waits for pages, and not since it was submitted.
        slot.since = 0;
        self.slots.remove(&mut self.submitted, tag);
        Some(Handle(tag, PhantomData))
    }

    /// Its end: its pages and its number are free, and this is what the guest is to be told.
    #[inline]
    #[must_use]
    pub(crate) fn end(&mut self, handle: Handle<Completed>) -> Response {
        let request = self.slots.of(&handle);
        let response = Response {
            id: request.id,
            operation: request.operation,
            status: request.status,
        };
        release(&mut self.segments, request);
        self.slots.append(&mut self.free, handle.put_down());
        self.used = self.used.wrapping_sub(1);
        response
    }

    /// Gives the pages back of a request that has got no number.
    pub(crate) fn release(&mut self, request: &PendingRequest) {
        release(&mut self.segments, request);
    }

    /// Appends a request to a list that is not one of ours.
    #[inline]
    pub(crate) fn push<S>(&mut self, list: &mut List<S>, handle: Handle<S>) {
        self.slots.append(list, handle.put_down());
    }

    /// Appends a request to those that are taken.
    #[inline]
    pub(crate) fn push_taken(&mut self, handle: Handle<Taken>) {
        self.slots.append(&mut self.taken, handle.put_down());
    }

    /// Appends a request to those that are stalled.
    pub(crate) fn push_stalled(&mut self, handle: Handle<Stalled>) {
        self.slots.append(&mut self.stalled, handle.put_down());
    }

    /// Appends a request to those that are completed.
    #[inline]
    pub(crate) fn push_completed(&mut self, handle: Handle<Completed>) {
        self.slots.append(&mut self.completed, handle.put_down());
    }

    /// The first one of those that are taken.
    #[inline]
    pub(crate) fn pop_taken(&mut self) -> Option<Handle<Taken>> {
        let tag = self.slots.remove_first(&mut self.taken)?;
        Some(Handle(tag, PhantomData))
    }

    /// The first one of those that are stalled.
    pub(crate) fn pop_stalled(&mut self) -> Option<Handle<Stalled>> {
        let tag = self.slots.remove_first(&mut self.stalled)?;
        Some(Handle(tag, PhantomData))
    }

    /// The first one of those that are completed.
    #[inline]
    pub(crate) fn pop_completed(&mut self) -> Option<Handle<Completed>> {
        let tag = self.slots.remove_first(&mut self.completed)?;
        Some(Handle(tag, PhantomData))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::{PendingRequest, Requests};
    use crate::engine::segments::{Segments, Shape};
    use crate::ring::response::Status;
    use std::vec::Vec;

    const NO_PAGES: Shape = Shape {
        copy: 0,
        own: 0,
        map: 0,
    };

    #[test]
    #[should_panic(expected = "request 0 is forgotten")]
    fn a_request_that_is_taken_cannot_be_forgotten() {
        let mut slots = [PendingRequest::FREE; 2];
        let mut requests = Requests::new(&mut slots, Segments::new(&mut [], &mut [], NO_PAGES));
        drop(requests.take(PendingRequest::FREE));
    }

    #[test]
    fn a_request_is_completed_only_while_the_backend_has_it() {
        let mut slots = [PendingRequest::FREE; 2];
        let mut requests = Requests::new(&mut slots, Segments::new(&mut [], &mut [], NO_PAGES));
        let handle = requests.take(PendingRequest::FREE).unwrap();
        let tag = handle.tag();
        assert!(requests.complete(tag, Status::Okay).is_none());
        let started = requests.start(handle, 7);
        assert_eq!(started, tag);
        let handle = requests.complete(tag, Status::Error).unwrap();
        assert!(requests.complete(tag, Status::Okay).is_none());
        assert_eq!(requests.end(handle).status, Status::Error);
        assert_eq!(requests.used(), 0);
    }

    #[test]
    fn the_oldest_one_is_known_in_whatever_order_they_complete() {
        // All orders in which four can complete, and each followed by one that is new.
        for seed in 0..24usize {
            let mut slots = [PendingRequest::FREE; 4];
            let mut requests = Requests::new(&mut slots, Segments::new(&mut [], &mut [], NO_PAGES));
            let mut running = Vec::new();
            for now in 1..=4 {
                let handle = requests.take(PendingRequest::FREE).unwrap();
                running.push((now, requests.start(handle, now)));
            }
            let (mut order, mut now) = (seed, 4);
            for count in (1..=4).rev().chain((1..=4).rev()) {
                let (_, tag) = running.remove(order % count);
                order /= count;
                let handle = requests.complete(tag, Status::Okay).unwrap();
                let _response = requests.end(handle);
                if now < 8 {
                    now += 1;
                    let handle = requests.take(PendingRequest::FREE).unwrap();
                    running.push((now, requests.start(handle, now)));
                }
                let oldest = running.first().map(|(started, _)| *started);
                assert_eq!(requests.oldest_start(), oldest, "order {seed}");
                let tags: Vec<_> = requests
                    .submitted
                    .first()
                    .map_or(Vec::new(), |first| requests.from(first).collect());
                let expected: Vec<_> = running.iter().map(|(_, tag)| *tag).collect();
                assert_eq!(tags, expected, "order {seed}");
            }
            assert!(running.is_empty() && requests.submitted.tail == super::END);
        }
    }
}
