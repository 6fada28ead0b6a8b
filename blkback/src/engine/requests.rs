// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The requests of a queue that are taken and not answered: the state, the stage and the pages of each.
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
//! A [`Handle`] is the right to take the next step of one request. Each request has exactly one, in the list of its
//! stage or held by the code that works on it; a step takes it and gives the next one. So a request is answered once.

use core::marker::PhantomData;

use crate::engine::backend::IoKind;
use crate::engine::segments::{Chain, Pool, Segments};
use crate::ring::numbers::{PageIndex, QueueTag};
use crate::ring::response::{Response, ResponseStatus};

/// The end of a list.
const END: QueueTag = QueueTag::new(u16::MAX);

/// Stage: the request's data is being brought in.
#[derive(Debug)]
pub(crate) enum Taken {}
/// Stage: the request waits for copy pages because the guest's pages cannot be mapped, or cannot be used where they are
/// mapped.
#[derive(Debug)]
pub(crate) enum Stalled {}
/// Stage: the backend has the request.
#[derive(Debug)]
pub(crate) enum Submitted {}
/// Stage: the request has a result; its data is being brought out.
#[derive(Debug)]
pub(crate) enum Completed {}

/// The right to take the next step of a request, which is at the stage `S`.
///
/// A handle cannot be copied. It cannot be dropped either, because its request would never be answered: the build
/// refuses a module in which the compiler has left a way to do so, because that way panics.
#[derive(Debug)]
#[must_use]
pub(crate) struct Handle<S>(QueueTag, PhantomData<S>);

impl<S> Handle<S> {
    /// Returns the request's number, to look at it.
    pub(crate) fn tag(&self) -> QueueTag {
        self.0
    }

    fn step<T>(self) -> Handle<T> {
        let next = Handle(self.0, PhantomData);
        core::mem::forget(self);
        next
    }

    /// Gives the handle up. The caller must put the request into a list or end it.
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
    /// Makes the request wait for copy pages.
    pub(crate) fn stall(self) -> Handle<Stalled> {
        self.step()
    }

    /// Ends the request, which has failed before the backend got it.
    pub(crate) fn fail(self) -> Handle<Completed> {
        self.step()
    }
}

impl Handle<Stalled> {
    /// Ends the wait for copy pages.
    pub(crate) fn resume(self) -> Handle<Taken> {
        self.step()
    }
}

impl Handle<Completed> {
    /// Begins the next piece of the request.
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
    /// The segments that follow when these are done, because there were too few pages for all.
    pub(crate) rest: u16,
    pub(crate) left: u16,
    /// When the backend got it, in nanoseconds, if the backend has it. Before that, while spans are counted, when it
    /// came to its present stage; else 0.
    pub(crate) since: u64,
    /// The next request of the same list, and the one before, unless this is the first.
    pub(super) next: QueueTag,
    pub(super) prev: QueueTag,
    pub(crate) operation: u8,
    pub(crate) pool: Pool,
    pub(crate) status: ResponseStatus,
    /// The backend has it. Checked for each completion, because the number in one proves nothing.
    pub(super) submitted: bool,
    /// A page of the request cannot be mapped, because the hypervisor has no room.
    pub(crate) unmappable: bool,
    /// A page of it cannot be mapped because the grant is no good.
    pub(crate) refused: bool,
    /// Storage still holds a page of it, although the I/O is done.
    pub(crate) held: bool,
    /// Some of its segments are done already.
    pub(crate) continued: bool,
    /// All of the request is in the counters. It may have been begun as a whole, be given back, and then be done in
    /// pieces.
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
        status: ResponseStatus::Okay,
        submitted: false,
        unmappable: false,
        refused: false,
        held: false,
        continued: false,
        counted: false,
    };

    /// Reports whether it is a read whose data must be copied to the guest.
    pub(crate) fn copies_out(&self) -> bool {
        self.kind == IoKind::Read && self.pool == Pool::Copy && self.status == ResponseStatus::Okay
    }

    /// Reports whether it is a write whose data must be copied from the guest.
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
pub(crate) struct StageList<S> {
    head: QueueTag,
    tail: QueueTag,
    stage: PhantomData<S>,
}

impl<S> StageList<S> {
    pub(crate) const EMPTY: Self = Self {
        head: END,
        tail: END,
        stage: PhantomData,
    };

    pub(crate) fn is_empty(&self) -> bool {
        self.head == END
    }

    /// Returns the number of the first request.
    pub(crate) fn first(&self) -> Option<QueueTag> {
        (self.head != END).then_some(self.head)
    }
}

/// The state of each request, by its number.
#[derive(Debug)]
pub(crate) struct Slots<'a> {
    slots: &'a mut [PendingRequest],
    /// Stands in for the request of a handle that names no slot; there is no such handle.
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

    /// Marks a request as failed, because part of its data cannot be moved.
    pub(crate) fn fail(&mut self, tag: QueueTag) {
        if let Some(request) = self.get_mut(tag) {
            request.status = ResponseStatus::Error;
        }
    }

    /// Marks a request as failed for want of room for a mapping. Its data can be copied instead.
    pub(crate) fn fail_to_map(&mut self, tag: QueueTag) {
        self.fail(tag);
        if let Some(request) = self.get_mut(tag) {
            request.unmappable = !request.refused;
        }
    }

    /// Marks a request as failed, because a page of it cannot be mapped: the grant is no good.
    pub(crate) fn refuse_to_map(&mut self, tag: QueueTag) {
        self.fail(tag);
        if let Some(request) = self.get_mut(tag) {
            request.refused = true;
            request.unmappable = false;
        }
    }

    /// Marks a request of which storage still holds a page.
    pub(crate) fn hold(&mut self, tag: QueueTag) {
        if let Some(request) = self.get_mut(tag) {
            request.held = true;
        }
    }

    /// Appends a slot that is in no list.
    #[inline]
    fn append<S>(&mut self, list: &mut StageList<S>, tag: QueueTag) {
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
    fn remove_first<S>(&mut self, list: &mut StageList<S>) -> Option<QueueTag> {
        let tag = list.head;
        let slot = self.get_mut(tag)?;
        list.head = slot.next;
        slot.next = END;
        if list.head == END {
            list.tail = END;
        }
        Some(tag)
    }

    /// Takes a slot out of its list.
    #[inline]
    fn remove<S>(&mut self, list: &mut StageList<S>, tag: QueueTag) {
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
/// - A slot is free, or in one list, or its handle is held by the code that works on it.
/// - A slot is in the list `submitted` if its own `submitted` is set, and then only.
/// - The chain of a slot that is not free belongs to its request.
#[derive(Debug)]
pub(crate) struct Requests<'a> {
    pub(crate) slots: Slots<'a>,
    /// Slots without a request.
    free: StageList<()>,
    used: u16,
    pub(crate) segments: Segments<'a>,
    pub(crate) taken: StageList<Taken>,
    pub(crate) stalled: StageList<Stalled>,
    /// The requests that the backend has, the oldest first. They complete in any order.
    submitted: StageList<Submitted>,
    pub(crate) completed: StageList<Completed>,
    /// Requests whose I/O is done while storage still holds one of their pages.
    pub(crate) held: StageList<Completed>,
}

impl<'a> Requests<'a> {
    /// Makes the requests of a queue that has taken none.
    pub(crate) fn new(slots: &'a mut [PendingRequest], segments: Segments<'a>) -> Self {
        let total = u16::try_from(slots.len()).unwrap_or(u16::MAX);
        slots.fill(PendingRequest::FREE);
        let mut requests = Self {
            slots: Slots {
                slots,
                nobody: PendingRequest::FREE,
            },
            free: StageList::EMPTY,
            used: 0,
            segments,
            taken: StageList::EMPTY,
            stalled: StageList::EMPTY,
            submitted: StageList::EMPTY,
            completed: StageList::EMPTY,
            held: StageList::EMPTY,
        };
        for tag in (0..total).map(QueueTag::new) {
            requests.slots.append(&mut requests.free, tag);
        }
        requests
    }

    /// Returns the number of requests that are not answered.
    pub(crate) fn used(&self) -> u16 {
        self.used
    }

    /// Returns a request by its number.
    pub(crate) fn get(&self, tag: QueueTag) -> Option<&PendingRequest> {
        self.slots.get(tag)
    }

    /// Returns the request of a handle.
    #[inline]
    pub(crate) fn of<S>(&self, handle: &Handle<S>) -> &PendingRequest {
        self.slots.of(handle)
    }

    /// Returns the request of a handle, to change it.
    #[inline]
    pub(crate) fn of_mut<S>(&mut self, handle: &Handle<S>) -> &mut PendingRequest {
        match self.slots.slots.get_mut(handle.0.index()) {
            Some(slot) => slot,
            None => &mut self.slots.nobody,
        }
    }

    /// Returns the number of the request behind `tag` in its list.
    pub(crate) fn after(&self, tag: QueueTag) -> Option<QueueTag> {
        let next = self.get(tag)?.next;
        (next != END).then_some(next)
    }

    /// Returns the numbers of this request and of those behind it in its list, in order.
    pub(crate) fn from(&self, mut tag: QueueTag) -> impl Iterator<Item = QueueTag> + '_ {
        core::iter::from_fn(move || {
            let here = tag;
            tag = self.get(here)?.next;
            Some(here)
        })
    }

    /// Gives the new request that `make` returns a number; `None` if all numbers are in use.
    #[inline(always)]
    pub(crate) fn take(&mut self, make: impl FnOnce() -> PendingRequest) -> Option<Handle<Taken>> {
        let tag = self.slots.remove_first(&mut self.free)?;
        // Made in its place, because it is large.
        *self.slots.get_mut(tag)? = make();
        self.used = self.used.wrapping_add(1);
        Some(Handle(tag, PhantomData))
    }

    /// Hands a request to the backend at the time `now`. Appends it to the list of those that the backend has.
    #[inline]
    pub(crate) fn start(&mut self, handle: Handle<Taken>, now: u64) -> QueueTag {
        let request = self.of_mut(&handle);
        request.submitted = true;
        request.since = now;
        let tag = handle.put_down();
        self.slots.append(&mut self.submitted, tag);
        tag
    }

    /// Returns when the backend got the oldest request that it has, in nanoseconds.
    pub(crate) fn oldest_start(&self) -> Option<u64> {
        Some(self.get(self.submitted.first()?)?.since)
    }

    /// Takes a completed request from the backend. `None` if the backend does not have it.
    #[inline]
    pub(crate) fn complete(
        &mut self,
        tag: QueueTag,
        status: ResponseStatus,
    ) -> Option<Handle<Completed>> {
        let slot = self.slots.get_mut(tag)?;
        if !core::mem::replace(&mut slot.submitted, false) {
            return None;
        }
        slot.status = status;
        self.slots.remove(&mut self.submitted, tag);
        Some(Handle(tag, PhantomData))
    }

    /// Takes back a request that the backend gives up unchanged. `None` if the backend does not have it.
    pub(crate) fn take_back(&mut self, tag: QueueTag) -> Option<Handle<Stalled>> {
        let slot = self.slots.get_mut(tag)?;
        if !core::mem::replace(&mut slot.submitted, false) {
            return None;
        }
        // The request waits for pages from now on, not since it was submitted.
        slot.since = 0;
        self.slots.remove(&mut self.submitted, tag);
        Some(Handle(tag, PhantomData))
    }

    /// Ends a request: frees its pages and its number, and returns the answer for the guest.
    #[inline]
    #[must_use]
    pub(crate) fn end(&mut self, handle: Handle<Completed>) -> Response {
        release(&mut self.segments, self.slots.of(&handle));
        self.free(handle)
    }

    /// As [`end`](Self::end), for a request of mapped pages; `each` gets them.
    #[inline]
    #[must_use]
    pub(crate) fn end_mapped(
        &mut self,
        handle: Handle<Completed>,
        each: impl FnMut(PageIndex),
    ) -> Response {
        let request = self.slots.of(&handle);
        self.segments
            .release_mapped(request.head, request.count, each);
        self.free(handle)
    }

    /// Frees the number of a request without pages, and returns the answer for the guest.
    #[inline]
    fn free(&mut self, handle: Handle<Completed>) -> Response {
        let request = self.slots.of(&handle);
        let response = Response {
            id: request.id,
            operation: request.operation,
            status: request.status,
        };
        self.slots.append(&mut self.free, handle.put_down());
        self.used = self.used.wrapping_sub(1);
        response
    }

    /// Frees the pages of a request that got no number.
    #[cold]
    pub(crate) fn release(&mut self, pool: Pool, chain: Chain) {
        self.segments.release(pool, chain.head, chain.count);
        self.segments.release(Pool::Rest, chain.rest, chain.left);
    }

    /// Appends a request to a list that is not one of ours.
    #[inline]
    pub(crate) fn push<S>(&mut self, list: &mut StageList<S>, handle: Handle<S>) {
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

    /// Appends a request to the list of requests with a page that the storage still holds.
    #[cold]
    pub(crate) fn push_held(&mut self, handle: Handle<Completed>) {
        self.slots.append(&mut self.held, handle.put_down());
    }

    /// Moves requests with a page that storage held back to the completed ones.
    #[inline]
    pub(crate) fn look_at_held(&mut self) {
        while let Some(tag) = self.slots.remove_first(&mut self.held) {
            let handle = Handle(tag, PhantomData);
            self.of_mut(&handle).held = false;
            self.push_completed(handle);
        }
    }

    /// Takes the first request from those that are taken.
    #[inline]
    pub(crate) fn pop_taken(&mut self) -> Option<Handle<Taken>> {
        let tag = self.slots.remove_first(&mut self.taken)?;
        Some(Handle(tag, PhantomData))
    }

    /// Takes the first request from those that are stalled.
    pub(crate) fn pop_stalled(&mut self) -> Option<Handle<Stalled>> {
        let tag = self.slots.remove_first(&mut self.stalled)?;
        Some(Handle(tag, PhantomData))
    }

    /// Takes the first request from those that are completed.
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
    use crate::engine::segments::{Segments, TableShape};
    use crate::ring::response::ResponseStatus;
    use std::vec::Vec;

    const NO_PAGES: TableShape = TableShape {
        copy: 0,
        own: 0,
        map: 0,
    };

    #[test]
    #[should_panic(expected = "request 0 is forgotten")]
    fn a_request_that_is_taken_cannot_be_forgotten() {
        let mut slots = [PendingRequest::FREE; 2];
        let mut requests = Requests::new(&mut slots, Segments::new(&mut [], &mut [], NO_PAGES));
        drop(requests.take(|| PendingRequest::FREE));
    }

    #[test]
    fn a_request_is_completed_only_while_the_backend_has_it() {
        let mut slots = [PendingRequest::FREE; 2];
        let mut requests = Requests::new(&mut slots, Segments::new(&mut [], &mut [], NO_PAGES));
        let handle = requests.take(|| PendingRequest::FREE).unwrap();
        let tag = handle.tag();
        assert!(requests.complete(tag, ResponseStatus::Okay).is_none());
        let started = requests.start(handle, 7);
        assert_eq!(started, tag);
        let handle = requests.complete(tag, ResponseStatus::Error).unwrap();
        assert!(requests.complete(tag, ResponseStatus::Okay).is_none());
        assert_eq!(requests.end(handle).status, ResponseStatus::Error);
        assert_eq!(requests.used(), 0);
    }

    #[test]
    fn the_oldest_one_is_known_in_whatever_order_they_complete() {
        // All orders in which four requests can complete, with a new one after each.
        for seed in 0..24usize {
            let mut slots = [PendingRequest::FREE; 4];
            let mut requests = Requests::new(&mut slots, Segments::new(&mut [], &mut [], NO_PAGES));
            let mut running = Vec::new();
            for now in 1..=4 {
                let handle = requests.take(|| PendingRequest::FREE).unwrap();
                running.push((now, requests.start(handle, now)));
            }
            let (mut order, mut now) = (seed, 4);
            for count in (1..=4).rev().chain((1..=4).rev()) {
                let (_, tag) = running.remove(order % count);
                order /= count;
                let handle = requests.complete(tag, ResponseStatus::Okay).unwrap();
                let _response = requests.end(handle);
                if now < 8 {
                    now += 1;
                    let handle = requests.take(|| PendingRequest::FREE).unwrap();
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
