// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The engine proper: one pass over a ring.

use crate::engine::backend::{Backend, Io, IoKind};
use crate::engine::grants::{Buffer, Copy, CopyDirection, Grants, MapOutcome};
use crate::engine::segments::{Pool, SegmentEntry, Segments};
use crate::engine::slots::{List, Slot, Slots, State, Tag};
use crate::engine::stats::Stats;
use crate::ring::abi::{Protocol, MAX_SLOT_SIZE};
use crate::ring::index::BackRing;
use crate::ring::ports::SharedRing;
use crate::ring::request::{
    Direct, Direction, Discard, Indirect, Limits, Ordering, RawRequest, Reason, Reject, Request,
};
use crate::ring::response::{Response, Status};

/// Indirect requests whose descriptors are fetched by one hypercall.
const MAX_DESCRIPTORS: usize = 16;

/// Sectors of a discard that are given to the backend at once: 1 GiB. A discard may cover the
/// whole disk; in pieces it can be interleaved and torn down.
const DISCARD_CHUNK: u64 = 1 << 21;

/// What is fixed for the life of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Layout of the slots.
    pub protocol: Protocol,
    /// Largest number of segments for which data is copied; larger requests are mapped.
    pub copy_max_segments: u16,
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Pass {
    /// The frontend wants an event.
    pub notify: bool,
    /// There is more to do at once: do not sleep.
    pub again: bool,
    /// The frontend's indices are impossible; only completions are served from now on.
    pub broken: bool,
    /// Requests taken in this pass.
    pub taken: u32,
}

/// An indirect request whose segments are being fetched.
#[derive(Clone, Copy, Debug)]
struct Fetch {
    tag: Tag,
    request: Indirect,
}

/// The data path of one queue.
#[derive(Debug)]
pub struct Engine<'a, R, G, B> {
    ring: BackRing<R>,
    grants: G,
    backend: B,
    slots: Slots<'a>,
    segments: Segments<'a>,
    config: Config,
    limits: Limits,
    /// Taken and not yet submitted, in arrival order.
    new: List,
    /// Waiting for copy pages because nothing more can be mapped.
    stalled: List,
    /// Completed and not yet answered.
    done: List,
    /// Checked, but there was no room for it.
    parked: Option<Request>,
    fetches: [Option<Fetch>; MAX_DESCRIPTORS],
    fetching: usize,
    /// A barrier is being executed: nothing may pass it.
    barrier: bool,
    /// Stalled requests may find copy pages in the next pass.
    retry: bool,
    /// The queue is being torn down: a discard ends with the piece that is running.
    closing: bool,
    stats: Stats,
}

impl<'a, R: SharedRing, G: Grants, B: Backend> Engine<'a, R, G, B> {
    /// Makes the engine of an attached ring.
    ///
    /// `slots` has one entry for each slot of the ring. `entries` has one for each data page, the
    /// first `copy_pages` of them with memory. The larger of both pools must hold the largest
    /// request that `limits` allows; one that fits neither pool is answered with an error.
    #[allow(
        clippy::too_many_arguments,
        reason = "called once, by the connect path"
    )]
    pub fn new(
        ring: BackRing<R>,
        grants: G,
        backend: B,
        slots: &'a mut [Slot],
        entries: &'a mut [SegmentEntry],
        copy_pages: u16,
        config: Config,
        limits: Limits,
    ) -> Self {
        Self {
            ring,
            grants,
            backend,
            slots: Slots::new(slots),
            segments: Segments::new(entries, copy_pages),
            config,
            limits,
            new: List::EMPTY,
            stalled: List::EMPTY,
            done: List::EMPTY,
            parked: None,
            fetches: [None; MAX_DESCRIPTORS],
            fetching: 0,
            barrier: false,
            retry: false,
            closing: false,
            stats: Stats::default(),
        }
    }

    /// The counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Requests taken and not answered.
    pub fn in_flight(&self) -> u16 {
        self.slots
            .used()
            .saturating_add(u16::from(self.parked.is_some()))
    }

    /// The backend, for the owner's own bookkeeping.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// The ports, for tests that look behind the scenes.
    pub fn grants_mut(&mut self) -> &mut G {
        &mut self.grants
    }

    /// Changes the size of the disk; requests that are checked from now on must fit into it.
    pub fn set_sectors(&mut self, sectors: u64) {
        self.limits.sectors = sectors;
    }

    /// Free pages of both pools, for tests.
    pub fn free_pages(&self) -> (u16, u16) {
        (
            self.segments.free(Pool::Copy),
            self.segments.free(Pool::Map),
        )
    }

    /// Answers what is complete, takes what is new, starts it, and publishes.
    pub fn pass(&mut self) -> Pass {
        self.one_pass(Self::take)
    }

    /// The same without taking anything new: for teardown.
    pub fn drain_pass(&mut self) -> Pass {
        self.closing = true;
        self.one_pass(|engine| {
            engine.take_waiting();
            0
        })
    }

    fn one_pass(&mut self, take: impl FnOnce(&mut Self) -> u32) -> Pass {
        self.stats.passes = self.stats.passes.wrapping_add(1);
        self.reap();
        let taken = take(self);
        self.fetch();
        self.bring_in();
        self.submit();
        // What completed at once is answered at once.
        let reaped = self.reap();
        self.publish(taken, reaped)
    }

    /// Arms the frontend's event and says whether there is work after all; call before sleeping.
    ///
    /// While nothing can be taken no event is asked for: a completion brings the next pass.
    pub fn must_stay_awake(&mut self) -> bool {
        if !self.can_take() {
            return false;
        }
        // A ring that breaks here is reported by one more pass.
        self.ring.final_check().unwrap_or(true)
    }

    /// Lets go of the guest's ring; what is in flight can only be waited for.
    pub fn detach(self) -> Rest<'a, G, B> {
        Rest {
            grants: self.grants,
            backend: self.backend,
            slots: self.slots,
            segments: self.segments,
            lists: [self.new, self.stalled, self.done],
        }
    }

    fn can_take(&self) -> bool {
        !self.barrier
            && self.parked.is_none()
            && self.stalled.is_empty()
            && !self.ring.is_broken()
            && self.ring.unanswered() < self.ring.size()
    }

    fn publish(&mut self, taken: u32, reaped: bool) -> Pass {
        let notify = self.ring.publish();
        if notify {
            self.stats.notified = self.stats.notified.wrapping_add(1);
        }
        // A completion frees what a parked request waits for.
        let unblocked = reaped && (self.parked.is_some() || !self.stalled.is_empty());
        let retry = core::mem::replace(&mut self.retry, false);
        Pass {
            notify,
            again: !self.new.is_empty() || unblocked || retry,
            broken: self.ring.is_broken(),
            taken,
        }
    }

    // Taking.

    /// Gives requests that waited for pages another chance.
    fn take_waiting(&mut self) {
        self.retry_stalled();
        if let Some(request) = self.parked.take() {
            if !self.try_admit(&request) {
                self.parked = Some(request);
            }
        }
    }

    fn take(&mut self) -> u32 {
        self.take_waiting();
        if !self.can_take() {
            return 0;
        }
        let Ok(available) = self.ring.available() else {
            return 0;
        };
        let mut raw = RawRequest {
            bytes: [0; MAX_SLOT_SIZE],
            protocol: self.config.protocol,
        };
        let mut taken: u32 = 0;
        while taken < available && self.can_take() && self.ring.take(&mut raw.bytes) {
            taken = taken.wrapping_add(1);
            match raw.check(&self.limits) {
                Ok(request) => self.admit(request),
                Err(reject) => self.refuse(&reject),
            }
        }
        taken
    }

    fn refuse(&mut self, reject: &Reject) {
        self.stats.refused = self.stats.refused.wrapping_add(1);
        self.respond(&reject.response);
    }

    fn respond(&mut self, response: &Response) {
        if !self.ring.respond(response) {
            // Every slot in use stands for a request that was taken and not answered.
            self.stats.failed = self.stats.failed.wrapping_add(1);
        }
    }

    /// Gives a checked request a slot and pages, or parks it.
    fn admit(&mut self, request: Request) {
        if !self.try_admit(&request) {
            self.stats.oo_req = self.stats.oo_req.wrapping_add(1);
            self.parked = Some(request);
        }
    }

    fn try_admit(&mut self, request: &Request) -> bool {
        match request {
            Request::Flush(id) => self.admit_flush(*id),
            Request::Discard(discard) => self.admit_discard(discard),
            Request::Direct(direct) => self.admit_direct(direct),
            Request::Indirect(indirect) => self.admit_indirect(indirect),
        }
    }

    fn admit_flush(&mut self, id: u64) -> bool {
        let response = Response {
            id,
            operation: crate::ring::abi::OP_FLUSH_DISKCACHE,
            status: Status::Okay,
        };
        if !self.limits.flush {
            // Completed writes are durable already.
            self.stats.f_req = self.stats.f_req.wrapping_add(1);
            self.respond(&response);
            return true;
        }
        self.enqueue(Slot {
            id,
            operation: response.operation,
            kind: IoKind::Flush,
            ..Slot::FREE
        })
    }

    fn admit_discard(&mut self, discard: &Discard) -> bool {
        if discard.sectors == 0 {
            self.respond(&Response {
                id: discard.id,
                operation: crate::ring::abi::OP_DISCARD,
                status: Status::Okay,
            });
            return true;
        }
        let admitted = self.enqueue(Slot {
            id: discard.id,
            operation: crate::ring::abi::OP_DISCARD,
            kind: IoKind::Discard {
                secure: discard.secure,
            },
            sector: discard.sector,
            sectors: discard.sectors,
            ..Slot::FREE
        });
        if admitted {
            self.stats.ds_req = self.stats.ds_req.wrapping_add(1);
        }
        admitted
    }

    fn admit_direct(&mut self, direct: &Direct) -> bool {
        let barrier = direct.ordering == Ordering::Barrier;
        if barrier && self.slots.used() > 0 {
            return false;
        }
        let kind = match (direct.direction, direct.ordering) {
            (Direction::Read, _) => IoKind::Read,
            (Direction::Write, Ordering::Plain) => IoKind::Write,
            (Direction::Write, Ordering::PreFlush) => IoKind::PreFlushWrite,
            (Direction::Write, Ordering::Barrier) => IoKind::BarrierWrite,
        };
        let slot = Slot {
            id: direct.id,
            operation: direct.operation,
            kind,
            sector: direct.sector,
            count: direct.count(),
            ..Slot::FREE
        };
        let Some(tag) = self.enqueue_with_pages(slot) else {
            return false;
        };
        if self.is_failed(tag) {
            // It has no pages: there is nothing to fill.
            return true;
        }
        let mut at = self.slots.get(tag).map_or(u16::MAX, |slot| slot.head);
        let mut sectors: u64 = 0;
        for segment in direct.segments() {
            sectors = sectors.wrapping_add(u64::from(segment.sectors()));
            at = self.segments.fill(at, segment);
        }
        if let Some(slot) = self.slots.get_mut(tag) {
            slot.sectors = sectors;
        }
        self.barrier = barrier;
        true
    }

    fn admit_indirect(&mut self, indirect: &Indirect) -> bool {
        let room = usize::from(self.grants.descriptor_buffers()).min(MAX_DESCRIPTORS);
        // One buffer holds one page of segments; more pages than that are never advertised.
        if indirect.pages() != 1 {
            self.refuse(&indirect.reject(Reason::SegmentCount));
            return true;
        }
        if self.fetching >= room {
            self.fetch();
        }
        let slot = Slot {
            id: indirect.id,
            operation: indirect.operation,
            kind: match indirect.direction {
                Direction::Read => IoKind::Read,
                Direction::Write => IoKind::Write,
            },
            sector: indirect.sector,
            count: indirect.count(),
            ..Slot::FREE
        };
        let Some(tag) = self.enqueue_with_pages(slot) else {
            return false;
        };
        if self.is_failed(tag) {
            return true;
        }
        // CAST: below `MAX_DESCRIPTORS`.
        let buffer = self.fetching as u8;
        for (gref, len) in indirect.descriptors() {
            let copy = Copy {
                tag,
                gref,
                buffer: Buffer::Descriptor(buffer),
                offset: 0,
                // CAST: at most 4096.
                len: len as u16,
                direction: CopyDirection::FromGuest,
            };
            queue_copy(&mut self.grants, &mut self.slots, &copy);
        }
        if let Some(fetch) = self.fetches.get_mut(self.fetching) {
            *fetch = Some(Fetch {
                tag,
                request: *indirect,
            });
            self.fetching = self.fetching.wrapping_add(1);
        }
        true
    }

    fn is_failed(&self, tag: Tag) -> bool {
        self.slots
            .get(tag)
            .is_none_or(|slot| slot.status != Status::Okay)
    }

    /// Appends a request to the new ones; `false` if there is no slot.
    fn enqueue(&mut self, slot: Slot) -> bool {
        self.enqueue_tag(slot).is_some()
    }

    fn enqueue_tag(&mut self, slot: Slot) -> Option<Tag> {
        let tag = self.slots.alloc()?;
        if let Some(entry) = self.slots.get_mut(tag) {
            *entry = Slot {
                state: State::New,
                ..slot
            };
        }
        self.slots.push(&mut self.new, tag);
        Some(tag)
    }

    /// The same with a chain of `slot.count` pages; a request that can never get them is failed.
    fn enqueue_with_pages(&mut self, mut slot: Slot) -> Option<Tag> {
        let wanted = if slot.count <= self.config.copy_max_segments {
            [Pool::Copy, Pool::Map]
        } else {
            [Pool::Map, Pool::Copy]
        };
        let fits = |pool: &Pool| self.segments.capacity(*pool) >= slot.count;
        let Some(pool) = wanted.into_iter().find(fits) else {
            slot.count = 0;
            slot.status = Status::Error;
            return self.enqueue_tag(slot);
        };
        slot.pool = pool;
        slot.head = self.segments.alloc(pool, slot.count)?;
        let (head, count) = (slot.head, slot.count);
        let tag = self.enqueue_tag(slot);
        if tag.is_none() {
            self.segments.release(pool, head, count);
        }
        tag
    }

    /// Copies the queued descriptors in and checks the segments in them.
    fn fetch(&mut self) {
        if self.fetching == 0 {
            return;
        }
        run_copies(&mut self.grants, &mut self.slots);
        for (buffer, fetch) in (0u8..).zip(self.fetches.iter_mut().take(self.fetching)) {
            let Some(Fetch { tag, request }) = fetch.take() else {
                continue;
            };
            let Some(slot) = self.slots.get_mut(tag) else {
                continue;
            };
            if slot.status != Status::Okay {
                continue;
            }
            let segments = &mut self.segments;
            let (mut at, mut sectors) = (slot.head, 0u64);
            let raw = self.grants.descriptor(buffer).iter().copied();
            let checked = request.check_segments(raw, &self.limits, |segment| {
                sectors = sectors.wrapping_add(u64::from(segment.sectors()));
                at = segments.fill(at, segment);
            });
            slot.sectors = sectors;
            if let Err(reject) = checked {
                slot.status = reject.response.status;
                self.stats.refused = self.stats.refused.wrapping_add(1);
            }
        }
        self.fetching = 0;
    }

    // Bringing in.

    /// Copies the data of new writes in and maps the pages of large requests.
    fn bring_in(&mut self) {
        let mut at = self.new.first();
        let (mut copies, mut maps) = (false, false);
        while let Some(tag) = at {
            at = self.slots.after(tag);
            let Some(slot) = self.slots.get(tag) else {
                break;
            };
            if slot.status != Status::Okay || slot.count == 0 {
                continue;
            }
            let slot = *slot;
            if slot.pool == Pool::Map {
                self.stats.mapped = self.stats.mapped.wrapping_add(1);
                maps = true;
                self.queue_maps(tag, &slot);
            } else if slot.copies_in() {
                copies = true;
                self.queue_copies(tag, &slot, CopyDirection::FromGuest);
            }
        }
        if copies {
            run_copies(&mut self.grants, &mut self.slots);
        }
        if maps {
            run_maps(&mut self.grants, &mut self.slots, &mut self.segments);
            self.rescue_unmappable();
        }
    }

    fn queue_copies(&mut self, tag: Tag, slot: &Slot, direction: CopyDirection) {
        for slice in self.segments.slices(slot.head, slot.count) {
            let copy = Copy {
                tag,
                gref: slice.gref,
                buffer: Buffer::Page(slice.page),
                offset: slice.offset,
                len: slice.len,
                direction,
            };
            queue_copy(&mut self.grants, &mut self.slots, &copy);
        }
    }

    fn queue_maps(&mut self, tag: Tag, slot: &Slot) {
        let read_only = slot.kind != IoKind::Read;
        let mut page = slot.head;
        for _ in 0..slot.count {
            let Some(slice) = self.segments.slices(page, 1).next() else {
                return;
            };
            let next = self.segments.after(page);
            if !self.grants.queue_map(tag, page, slice.gref, read_only) {
                run_maps(&mut self.grants, &mut self.slots, &mut self.segments);
                if !self.grants.queue_map(tag, page, slice.gref, read_only) {
                    fail(&mut self.slots, tag);
                }
            }
            page = next;
        }
    }

    /// Turns requests for whose pages the hypervisor has no room into copied ones.
    fn rescue_unmappable(&mut self) {
        let mut keep = List::EMPTY;
        while let Some(tag) = self.slots.pop(&mut self.new) {
            let unmappable = self.slots.get(tag).is_some_and(|slot| slot.unmappable);
            let list = if unmappable {
                &mut self.stalled
            } else {
                &mut keep
            };
            self.slots.push(list, tag);
        }
        self.new = keep;
        if !self.stalled.is_empty() {
            self.unmap_stalled();
            self.retry = true;
        }
    }

    fn unmap_stalled(&mut self) {
        let mut at = self.stalled.first();
        while let Some(tag) = at {
            at = self.slots.after(tag);
            if let Some(slot) = self.slots.get(tag).copied() {
                queue_unmaps(&mut self.grants, &mut self.segments, &slot);
            }
        }
        self.grants.run_unmaps();
    }

    /// Moves stalled requests to copy pages, in order, as far as there are any.
    fn retry_stalled(&mut self) {
        while let Some(tag) = self.stalled.first() {
            let Some(slot) = self.slots.get(tag).copied() else {
                return;
            };
            let Some(head) = self.segments.alloc(Pool::Copy, slot.count) else {
                if self.segments.capacity(Pool::Copy) >= slot.count {
                    return;
                }
                self.slots.pop(&mut self.stalled);
                if let Some(entry) = self.slots.get_mut(tag) {
                    // Or a later failure to map something else would stall it once more.
                    entry.unmappable = false;
                    entry.status = Status::Error;
                }
                self.slots.push(&mut self.new, tag);
                continue;
            };
            self.slots.pop(&mut self.stalled);
            self.segments.move_chain(slot.head, head, slot.count);
            self.segments.release(Pool::Map, slot.head, slot.count);
            if let Some(entry) = self.slots.get_mut(tag) {
                entry.pool = Pool::Copy;
                entry.head = head;
                entry.status = Status::Okay;
                entry.unmappable = false;
            }
            self.slots.push(&mut self.new, tag);
        }
    }

    // Submitting.

    fn submit(&mut self) {
        let mut ready = List::EMPTY;
        while let Some(tag) = self.slots.pop(&mut self.new) {
            let Some(slot) = self.slots.get_mut(tag) else {
                continue;
            };
            if slot.status == Status::Okay {
                slot.state = State::Submitted;
                count(&mut self.stats, slot);
                self.slots.push(&mut ready, tag);
            } else {
                slot.state = State::Done;
                self.slots.push(&mut self.done, tag);
            }
        }
        if ready.is_empty() {
            return;
        }
        let (slots, segments) = (&self.slots, &self.segments);
        self.backend.submit(slots.iter(&ready).filter_map(|tag| {
            let slot = slots.get(tag)?;
            Some(Io {
                tag,
                kind: slot.kind,
                sector: slot.sector,
                sectors: slot.piece(),
                segments,
                head: slot.head,
                count: slot.count,
            })
        }));
    }

    // Completing.

    /// Answers everything that is complete; says whether there was anything.
    fn reap(&mut self) -> bool {
        let (slots, done) = (&mut self.slots, &mut self.done);
        self.backend.reap(|tag, status| {
            if let Some(slot) = slots.get_mut(tag) {
                // A completion for anything else is not ours to act on.
                if slot.state == State::Submitted {
                    slot.state = State::Done;
                    slot.status = status;
                    slots.push(done, tag);
                }
            }
        });
        if self.done.is_empty() {
            return false;
        }
        self.bring_out();
        while let Some(tag) = self.slots.pop(&mut self.done) {
            self.finish(tag);
        }
        true
    }

    /// Copies the data of reads out and unmaps what was mapped.
    fn bring_out(&mut self) {
        let mut at = self.done.first();
        let (mut copies, mut unmaps) = (false, false);
        while let Some(tag) = at {
            at = self.slots.after(tag);
            let Some(slot) = self.slots.get(tag).copied() else {
                break;
            };
            if slot.count == 0 {
                continue;
            }
            if slot.pool == Pool::Map {
                unmaps = true;
                queue_unmaps(&mut self.grants, &mut self.segments, &slot);
            } else if slot.copies_out() {
                copies = true;
                self.queue_copies(tag, &slot, CopyDirection::ToGuest);
            }
        }
        if copies {
            run_copies(&mut self.grants, &mut self.slots);
        }
        if unmaps {
            // Before the answer: afterwards the guest may use its pages for something else.
            self.grants.run_unmaps();
        }
    }

    /// Answers one request, or continues a discard.
    fn finish(&mut self, tag: Tag) {
        let Some(slot) = self.slots.get_mut(tag) else {
            return;
        };
        if matches!(slot.kind, IoKind::Discard { .. }) && slot.status == Status::Okay {
            let piece = slot.piece();
            slot.sector = slot.sector.wrapping_add(piece);
            slot.sectors = slot.sectors.wrapping_sub(piece);
            if slot.sectors > 0 && self.closing {
                slot.status = Status::Error;
            } else if slot.sectors > 0 {
                slot.state = State::New;
                self.slots.push(&mut self.new, tag);
                return;
            }
        }
        let slot = *slot;
        if slot.kind == IoKind::BarrierWrite {
            self.barrier = false;
        }
        if slot.status != Status::Okay {
            self.stats.failed = self.stats.failed.wrapping_add(1);
        }
        self.segments.release(slot.pool, slot.head, slot.count);
        self.slots.release(tag);
        self.respond(&Response {
            id: slot.id,
            operation: slot.operation,
            status: slot.status,
        });
    }
}

/// What remains of an engine whose guest is gone: I/O in flight and its pages.
#[derive(Debug)]
pub struct Rest<'a, G, B> {
    grants: G,
    backend: B,
    slots: Slots<'a>,
    segments: Segments<'a>,
    /// Requests that were never given to the backend, or whose answer was not written.
    lists: [List; 3],
}

impl<G: Grants, B: Backend> Rest<'_, G, B> {
    /// Unmaps and frees what has completed; returns how many are still in flight.
    pub fn drain(&mut self) -> u16 {
        let mut done = List::EMPTY;
        for mut list in core::mem::replace(&mut self.lists, [List::EMPTY; 3]) {
            while let Some(tag) = self.slots.pop(&mut list) {
                self.slots.push(&mut done, tag);
            }
        }
        let slots = &mut self.slots;
        self.backend.reap(|tag, _status| {
            if let Some(slot) = slots.get_mut(tag) {
                if slot.state == State::Submitted {
                    slot.state = State::Done;
                    slots.push(&mut done, tag);
                }
            }
        });
        while let Some(tag) = self.slots.pop(&mut done) {
            if let Some(slot) = self.slots.get(tag).copied() {
                queue_unmaps(&mut self.grants, &mut self.segments, &slot);
                self.segments.release(slot.pool, slot.head, slot.count);
            }
            self.slots.release(tag);
        }
        self.grants.run_unmaps();
        self.slots.used()
    }
}

impl Slot {
    /// Sectors that the backend gets at once.
    fn piece(&self) -> u64 {
        match self.kind {
            IoKind::Discard { .. } => self.sectors.min(DISCARD_CHUNK),
            _ => self.sectors,
        }
    }
}

fn fail(slots: &mut Slots<'_>, tag: Tag) {
    if let Some(slot) = slots.get_mut(tag) {
        slot.status = Status::Error;
    }
}

fn run_copies<G: Grants>(grants: &mut G, slots: &mut Slots<'_>) {
    grants.run_copies(|tag| fail(slots, tag));
}

fn queue_copy<G: Grants>(grants: &mut G, slots: &mut Slots<'_>, copy: &Copy) {
    if grants.queue_copy(copy) {
        return;
    }
    run_copies(grants, slots);
    if !grants.queue_copy(copy) {
        fail(slots, copy.tag);
    }
}

fn queue_unmaps<G: Grants>(grants: &mut G, segments: &mut Segments<'_>, slot: &Slot) {
    if slot.pool != Pool::Map {
        return;
    }
    let mut page = slot.head;
    for _ in 0..slot.count {
        let next = segments.after(page);
        if let Some(handle) = segments.handle(page) {
            if !grants.queue_unmap(page, handle) {
                grants.run_unmaps();
                // The batch is empty now, so it takes the operation.
                let _queued = grants.queue_unmap(page, handle);
            }
            segments.set_handle(page, None);
        }
        page = next;
    }
}

fn run_maps<G: Grants>(grants: &mut G, slots: &mut Slots<'_>, segments: &mut Segments<'_>) {
    grants.run_maps(|tag, page, outcome| match outcome {
        MapOutcome::Mapped(handle) => segments.set_handle(page, Some(handle)),
        MapOutcome::Refused => {
            fail(slots, tag);
            if let Some(slot) = slots.get_mut(tag) {
                slot.refused = true;
                slot.unmappable = false;
            }
        }
        MapOutcome::NoSpace => {
            fail(slots, tag);
            if let Some(slot) = slots.get_mut(tag) {
                slot.unmappable = !slot.refused;
            }
        }
    });
}

fn count(stats: &mut Stats, slot: &Slot) {
    let (requests, sectors) = match slot.kind {
        IoKind::Read => (&mut stats.rd_req, &mut stats.rd_sect),
        IoKind::Write => (&mut stats.wr_req, &mut stats.wr_sect),
        IoKind::Flush | IoKind::PreFlushWrite | IoKind::BarrierWrite => {
            (&mut stats.f_req, &mut stats.wr_sect)
        }
        // Counted when it was admitted: it is submitted in pieces.
        IoKind::Discard { .. } => return,
    };
    *requests = requests.wrapping_add(1);
    *sectors = sectors.wrapping_add(slot.sectors);
}
