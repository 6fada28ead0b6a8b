// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Giving requests to the backend, and answering those that are complete.

use crate::engine::backend::{Backend, Io, IoKind};
use crate::engine::pass::Engine;
use crate::engine::segments::{Pool, Segments};
use crate::engine::slots::{List, Slot, Slots, State};
use crate::engine::stats::Stats;
use crate::engine::transfer::{queue_unmaps, run_unmaps};
use crate::ring::grants::Grants;
use crate::ring::numbers::QueueTag;
use crate::ring::ports::SharedRing;
use crate::ring::response::{Response, Status};

/// Sectors of a discard that are given to the backend at once: 1 GiB. A discard may cover the
/// whole disk; in pieces it can be interleaved and torn down.
const DISCARD_CHUNK: u64 = 1 << 21;

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    pub(super) fn submit(&mut self) {
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

    /// Notes what the backend has completed.
    pub(super) fn collect(&mut self) {
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
    }

    /// Answers everything that is complete; says how many requests that was.
    pub(super) fn answer(&mut self) -> u32 {
        if self.done.is_empty() {
            return 0;
        }
        self.bring_out();
        let mut answered: u32 = 0;
        while let Some(tag) = self.slots.pop(&mut self.done) {
            self.finish(tag);
            answered = answered.wrapping_add(1);
        }
        answered
    }

    /// Answers one request, or continues a discard.
    pub(super) fn finish(&mut self, tag: QueueTag) {
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
        if slot.left > 0 && slot.status == Status::Okay {
            self.go_on(tag);
            return;
        }
        let slot = *slot;
        if slot.kind == IoKind::BarrierWrite {
            self.barrier = false;
        }
        if slot.status != Status::Okay {
            self.stats.failed = self.stats.failed.wrapping_add(1);
        }
        self.release(&slot);
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
    pub(super) grants: G,
    pub(super) backend: B,
    pub(super) slots: Slots<'a>,
    pub(super) segments: Segments<'a>,
    /// Requests that were never given to the backend, or whose answer was not written.
    pub(super) lists: [List; 3],
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
        let mut at = done.first();
        while let Some(tag) = at {
            at = self.slots.after(tag);
            if let Some(slot) = self.slots.get(tag) {
                queue_unmaps(&mut self.grants, &mut self.segments, slot);
            }
        }
        // Before the pages are free: one that cannot be unmapped never is.
        run_unmaps(&mut self.grants, &mut self.segments);
        while let Some(tag) = self.slots.pop(&mut done) {
            if let Some(slot) = self.slots.get(tag).copied() {
                self.segments.release(slot.pool, slot.head, slot.count);
                self.segments.release(Pool::Rest, slot.rest, slot.left);
            }
            self.slots.release(tag);
        }
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
    *requests = requests.wrapping_add(u64::from(!slot.continued));
    *sectors = sectors.wrapping_add(slot.sectors);
}
