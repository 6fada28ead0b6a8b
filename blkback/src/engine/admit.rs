// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Taking requests from the ring: a slot and pages for each, and the segments of indirect ones.

use crate::engine::backend::{Backend, IoKind};
use crate::engine::pass::{Engine, Fetch};
use crate::engine::segments::Pool;
use crate::engine::slots::{Slot, State};
use crate::engine::transfer::{queue_copy, run_copies};
use crate::ring::abi::MAX_SLOT_SIZE;
use crate::ring::grants::{Buffer, Copy, CopyDirection, Grants};
use crate::ring::numbers::QueueTag;
use crate::ring::ports::SharedRing;
use crate::ring::request::{
    Direct, Direction, Discard, Indirect, Ordering, RawRequest, Reason, Reject, Request,
};
use crate::ring::response::{Response, Status};

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Gives requests that waited for pages another chance.
    pub(super) fn take_waiting(&mut self) {
        self.retry_stalled();
        if let Some(request) = self.parked.take() {
            if !self.try_admit(&request) {
                self.parked = Some(request);
            }
        }
    }

    pub(super) fn take(&mut self) -> u32 {
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

    pub(super) fn refuse(&mut self, reject: &Reject) {
        self.stats.refused = self.stats.refused.wrapping_add(1);
        self.respond(&reject.response);
    }

    pub(super) fn respond(&mut self, response: &Response) {
        if !self.ring.respond(response) {
            // Every slot in use stands for a request that was taken and not answered.
            self.stats.failed = self.stats.failed.wrapping_add(1);
        }
    }

    /// Gives a checked request a slot and pages, or parks it.
    pub(super) fn admit(&mut self, request: Request) {
        if !self.try_admit(&request) {
            self.stats.oo_req = self.stats.oo_req.wrapping_add(1);
            self.parked = Some(request);
        }
    }

    pub(super) fn try_admit(&mut self, request: &Request) -> bool {
        match request {
            Request::Flush(id) => self.admit_flush(*id),
            Request::Discard(discard) => self.admit_discard(discard),
            Request::Direct(direct) => self.admit_direct(direct),
            Request::Indirect(indirect) => self.admit_indirect(indirect),
        }
    }

    pub(super) fn admit_flush(&mut self, id: u64) -> bool {
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

    pub(super) fn admit_discard(&mut self, discard: &Discard) -> bool {
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

    pub(super) fn admit_direct(&mut self, direct: &Direct) -> bool {
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

    pub(super) fn admit_indirect(&mut self, indirect: &Indirect) -> bool {
        let room = usize::from(self.grants.descriptor_buffers()).min(self.fetches.len());
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
        // CAST: below the number of descriptor buffers.
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

    pub(super) fn is_failed(&self, tag: QueueTag) -> bool {
        self.slots
            .get(tag)
            .is_none_or(|slot| slot.status != Status::Okay)
    }

    /// Appends a request to the new ones; `false` if there is no slot.
    pub(super) fn enqueue(&mut self, slot: Slot) -> bool {
        self.enqueue_tag(slot).is_some()
    }

    pub(super) fn enqueue_tag(&mut self, slot: Slot) -> Option<QueueTag> {
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
    pub(super) fn enqueue_with_pages(&mut self, mut slot: Slot) -> Option<QueueTag> {
        let wanted = if slot.count <= self.config.copy_max_segments {
            [Pool::Copy, Pool::Map]
        } else {
            [Pool::Map, Pool::Copy]
        };
        let fits = |pool: &Pool| self.segments.most(*pool) >= slot.count;
        let Some(pool) = wanted.into_iter().find(fits) else {
            slot.count = 0;
            slot.status = Status::Error;
            return self.enqueue_tag(slot);
        };
        slot.pool = pool;
        // A barrier or a flush is the first of its queue's I/O, or is for the whole request.
        let may_split = matches!(slot.kind, IoKind::Read | IoKind::Write);
        let chain = self.room(pool, slot.count, may_split)?;
        slot.set_chain(chain);
        let tag = self.enqueue_tag(slot);
        if tag.is_none() {
            self.release(&slot);
        }
        tag
    }

    /// Copies the queued descriptors in and checks the segments in them.
    pub(super) fn fetch(&mut self) {
        if self.fetching == 0 {
            return;
        }
        run_copies(&mut self.grants, &mut self.slots);
        for (buffer, fetch) in (0..=u8::MAX).zip(self.fetches.iter_mut().take(self.fetching)) {
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
            let (mut at, mut sectors, mut now) = (slot.head, 0u64, slot.count);
            let raw = self.grants.descriptor(buffer).iter().copied();
            let checked = request.check_segments(raw, &self.limits, |segment| {
                if now > 0 {
                    now = now.wrapping_sub(1);
                    sectors = sectors.wrapping_add(u64::from(segment.sectors()));
                }
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
}
