// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The guest: its memory, its grants and its half of the ring protocol.

use std::collections::{HashMap, VecDeque};

use ring::abi::{OP_DISCARD, OP_INDIRECT, OP_READ, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};

use crate::heard::{Kept, Unheard};
use crate::history::{encode, value, SECTOR};
use crate::machine::{page, Machine, MachineFault, Page};
use crate::passes::Passes;
use crate::spec::{Expect, Gref, Spec};
use crate::wire::{segment_bytes, Tail, Wire, WireSegment};

/// Grant reference of the guest's first page.
pub const FIRST_GREF: u32 = 1000;
/// Grant reference of the first page of the ring itself.
pub const RING_GREF: u32 = 8;
/// A reference that was never granted.
pub const BAD_GREF: u32 = 0x7fff_ffff;

/// Content of a page that no request uses.
pub(crate) const FREE: u8 = 0x5a;
/// Content of a page before a read fills it.
const EMPTY: u8 = 0xa5;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Grant {
    pub(crate) valid: bool,
    read_only: bool,
}

/// A request that is not answered.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) spec: Spec,
    pub(crate) number: u32,
    pub(crate) issued: u64,
    /// Answers that had arrived when it was made.
    pub(crate) earlier: usize,
    /// Its index in the ring.
    pub(crate) index: u32,
    /// Page (if it is one of the guest's own), first and last sector.
    pub(crate) segments: Vec<(Option<usize>, u8, u8)>,
    /// Every page that it uses, once.
    pub(crate) pages: Vec<usize>,
    /// Content of the pages at the time of the request; once it is answered, at that time.
    pub(crate) before: Vec<Page>,
}

/// An answer as the guest found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestAnswer {
    /// Identifier.
    pub id: u64,
    /// Operation.
    pub operation: u8,
    /// Status.
    pub status: i16,
}

/// Page that a grant reference names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantTarget {
    /// A page of the guest.
    Page(usize),
    /// A page of the ring.
    Ring(usize),
}

/// The guest.
#[derive(Debug)]
pub struct Frontend {
    size: u32,
    /// Requests made.
    pub req_prod: u32,
    /// Requests published.
    pushed: u32,
    rsp_cons: u32,
    pub(crate) published: u32,
    /// The backend sent an event.
    pub interrupt: bool,
    pub(crate) pages: Vec<Page>,
    pub(crate) grants: Vec<Grant>,
    pub(crate) free: Vec<usize>,
    /// Requests that are answered and whose answers the guest has not seen.
    pub(crate) unheard: VecDeque<Unheard>,
    /// Data that the guest has read and keeps.
    pub(crate) kept: VecDeque<Kept>,
    /// The migration of its memory to another host.
    pub(crate) passes: Option<Passes>,
    pub(crate) pending: HashMap<u64, VecDeque<Pending>>,
    pub(crate) by_gref: HashMap<u32, u32>,
    pub(crate) outstanding: u32,
    next: u32,
    /// Answers in the order in which they arrived.
    pub answers: Vec<GuestAnswer>,
}

impl Frontend {
    /// Returns a guest with an empty ring.
    pub fn new(size: u32) -> Self {
        Self {
            size,
            req_prod: 0,
            pushed: 0,
            rsp_cons: 0,
            published: 0,
            interrupt: false,
            pages: Vec::new(),
            grants: Vec::new(),
            free: Vec::new(),
            unheard: VecDeque::new(),
            kept: VecDeque::new(),
            passes: None,
            pending: HashMap::new(),
            by_gref: HashMap::new(),
            outstanding: 0,
            next: 1,
            answers: Vec::new(),
        }
    }

    /// Returns the guest that follows this one, at a ring of `size` slots; its requests continue the numbering.
    pub(crate) fn next_guest(&self, size: u32) -> Self {
        Self {
            next: self.next,
            ..Self::new(size)
        }
    }

    /// Makes the numbers of requests of all queues unique.
    pub(crate) fn count_on(&mut self, other: &mut Self) {
        std::mem::swap(&mut self.next, &mut other.next);
    }

    /// Marks a page as changed, so that the migration copies it again.
    pub(crate) fn mark(&mut self, page: usize) {
        if let Some(passes) = &mut self.passes {
            passes.mark(page);
        }
    }

    /// Starts all indices at a value, as in a ring that was in use.
    pub fn start_at(&mut self, index: u32) {
        self.req_prod = index;
        self.pushed = index;
        self.rsp_cons = index;
        self.published = index;
    }

    /// Returns the number of requests that were made and not answered.
    pub fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// True if a request with this identifier is not answered.
    pub fn is_pending(&self, id: u64) -> bool {
        self.pending.get(&id).is_some_and(|queue| !queue.is_empty())
    }

    /// Returns the number of published requests.
    pub fn pushed(&self) -> u32 {
        self.pushed
    }

    /// Returns the number of responses that the guest has seen.
    pub(crate) fn heard(&self) -> u32 {
        self.rsp_cons
    }

    /// True if another request fits into the ring.
    pub fn has_room(&self) -> bool {
        self.req_prod.wrapping_sub(self.rsp_cons) < self.size
    }

    /// Returns the number of unanswered requests that use a grant.
    pub fn lent(&self, gref: u32) -> u32 {
        self.by_gref.get(&gref).copied().unwrap_or(0)
    }

    /// Returns the page that a grant names, if it is granted.
    pub fn resolve(&self, gref: u32, write: bool) -> Option<GrantTarget> {
        if (RING_GREF..RING_GREF + 16).contains(&gref) {
            return Some(GrantTarget::Ring((gref - RING_GREF) as usize));
        }
        let index = gref.checked_sub(FIRST_GREF)? as usize;
        let grant = self.grants.get(index)?;
        (grant.valid && !(write && grant.read_only)).then_some(GrantTarget::Page(index))
    }

    /// Inverts bytes of a page that a request lends, as another CPU of the guest may.
    pub(crate) fn rewrite(&mut self, gref: u32, range: std::ops::Range<usize>) {
        let Some(GrantTarget::Page(index)) = self.resolve(gref, false) else {
            return;
        };
        let invert = |page: &mut Page| page[range.clone()].iter_mut().for_each(|b| *b = !*b);
        invert(&mut self.pages[index]);
        self.mark(index);
        for pending in self.pending.values_mut().flatten() {
            let pages = pending.pages.iter().zip(&mut pending.before);
            pages
                .filter(|(page, _)| **page == index)
                .for_each(|(_, before)| invert(before));
        }
    }

    /// Ends every grant of the pages of a request that is not answered.
    pub fn revoke(&mut self, id: u64) {
        for pending in self.pending.get_mut(&id).into_iter().flatten() {
            for index in &pending.pages {
                self.grants[*index].valid = false;
            }
            if pending.spec.expect == Expect::Okay {
                pending.spec.expect = Expect::Any;
            }
        }
    }

    /// Returns the number of responses that the guest has not consumed.
    pub fn unseen(&self) -> u32 {
        self.published.wrapping_sub(self.rsp_cons)
    }

    /// Grants a page for good, for any number of requests. Returns its reference.
    pub fn hold_page(&mut self) -> u32 {
        let gref = gref_of(self.take_page());
        *self.by_gref.entry(gref).or_default() += 1;
        gref
    }

    fn add_page(&mut self) {
        self.free.push(self.pages.len());
        self.pages.push(page(FREE));
        self.grants.push(Grant {
            valid: false,
            read_only: false,
        });
    }

    pub(crate) fn take_page(&mut self) -> usize {
        if self.free.is_empty() {
            self.add_page();
        }
        let index = self.free.pop().expect("one was added");
        self.grants[index] = Grant {
            valid: true,
            read_only: false,
        };
        index
    }
}

pub(crate) fn gref_of(page: usize) -> u32 {
    FIRST_GREF + page as u32
}

impl Machine {
    /// Returns the bytes behind a grant.
    pub fn target(&mut self, target: GrantTarget) -> Option<&mut [u8]> {
        match target {
            GrantTarget::Page(index) => Some(&mut self.front.pages[index][..]),
            GrantTarget::Ring(index) => {
                self.hosed = true;
                self.ring.bytes.chunks_mut(4096).nth(index)
            }
        }
    }

    /// Writes a request into the next slot; it is published by [`push`](Self::push).
    ///
    /// Returns its identifier.
    pub fn post(&mut self, spec: &Spec) -> u64 {
        let time = self.tick();
        let number = self.front.next;
        self.front.next += 1;
        let id = spec.id.unwrap_or_else(|| self.identifier(number));
        let pending = self.pending(spec, number, time);
        self.note(&pending);
        if self.habits.travels {
            self.asked.add(&pending);
        }
        self.enter(pending, id, &[]);
        id
    }

    /// A new request has one of the first few identifiers, or one that no other request ever has.
    fn identifier(&self, number: u32) -> u64 {
        if !self.habits.small_ids {
            return u64::from(number).wrapping_mul(0x9e37_79b9_0000_0001);
        }
        let unheard = |id: &u64| self.front.unheard.iter().any(|unheard| unheard.id == *id);
        let mut ids = 0..;
        let free = ids.find(|id| !self.front.is_pending(*id) && !unheard(id));
        free.expect("there are more of them than slots")
    }

    pub(crate) fn pending(&self, spec: &Spec, number: u32, issued: u64) -> Pending {
        Pending {
            spec: spec.clone(),
            number,
            issued,
            earlier: self.front.answers.len(),
            index: self.front.req_prod,
            segments: Vec::new(),
            pages: Vec::new(),
            before: Vec::new(),
        }
    }

    /// Puts a request into the next slot. Its segments have the data `known`, if there is any; otherwise the guest
    /// makes some.
    pub(crate) fn enter(&mut self, mut pending: Pending, id: u64, known: &[Page]) {
        let spec = pending.spec.clone();
        let descriptor = spec.indirect.then(|| self.page_for(&mut pending, FREE));
        let wire_segments = self.lay_out(&mut pending, descriptor, known);
        let tail = self.tail(&spec, &wire_segments, descriptor);
        for index in &pending.pages {
            pending.before.push(self.front.pages[*index].clone());
        }
        let count = spec.count.unwrap_or(wire_segments.len() as u16);
        let [low, _] = count.to_le_bytes();
        let wire = Wire {
            operation: if spec.indirect {
                OP_INDIRECT
            } else {
                spec.operation
            },
            second: match spec.operation {
                _ if spec.indirect => spec.operation,
                OP_DISCARD => spec.flag,
                _ => low,
            },
            third: if spec.indirect { count } else { spec.handle },
            id,
            sector: spec.sector,
            tail,
        };
        let bytes = wire.bytes(self.setup.protocol);
        let index = self.front.req_prod;
        self.ring.slot(index).copy_from_slice(&bytes);
        self.front.req_prod = index.wrapping_add(1);
        self.front.outstanding += 1;
        self.front.pending.entry(id).or_default().push_back(pending);
    }

    fn page_for(&mut self, pending: &mut Pending, fill: u8) -> usize {
        let index = self.front.take_page();
        if self.front.pages[index].iter().any(|b| *b != FREE) {
            self.problem(format!(
                "guest page {index} was changed while nothing used it"
            ));
        }
        self.front.pages[index].fill(fill);
        self.front.mark(index);
        *self.front.by_gref.entry(gref_of(index)).or_default() += 1;
        pending.pages.push(index);
        index
    }

    /// Chooses a page that is not mapped as the next one, because the guest cannot end the grant of a mapped page.
    pub(crate) fn choose_unmapped(&mut self) {
        let mappings = self.host.mappings.values();
        let mapped: Vec<_> = mappings.map(|mapping| mapping.target).collect();
        let is_free = |page: &usize| !mapped.contains(&GrantTarget::Page(*page));
        match self.front.free.iter().rposition(is_free) {
            Some(at) => {
                let page = self.front.free.remove(at);
                self.front.free.push(page);
            }
            None => self.front.add_page(),
        }
    }

    /// Gives each segment its page and fills those of writes.
    fn lay_out(
        &mut self,
        pending: &mut Pending,
        descriptor: Option<usize>,
        known: &[Page],
    ) -> Vec<WireSegment> {
        let spec = pending.spec.clone();
        let mut sector = spec.sector;
        let mut wire = Vec::new();
        for (at, (gref, first, last)) in spec.segments.iter().enumerate() {
            let earlier = |i: usize, p: &Pending| p.segments.get(i).and_then(|s| s.0);
            let index = match gref {
                Gref::Fresh => Some(self.page_for(pending, EMPTY)),
                Gref::ReadOnly | Gref::Revoked => {
                    self.choose_unmapped();
                    Some(self.page_for(pending, EMPTY))
                }
                Gref::Same(i) => earlier(*i, pending),
                Gref::Descriptor => descriptor,
                Gref::Raw(_) => None,
            };
            if let (Some(index), Gref::ReadOnly | Gref::Revoked) = (index, gref) {
                self.front.grants[index].valid = *gref != Gref::Revoked;
                self.front.grants[index].read_only = true;
            }
            if let (Some(known), Some(index)) = (known.get(at), index) {
                self.front.pages[index].copy_from_slice(&known[..]);
            }
            let makes = spec.operation != OP_READ && known.is_empty();
            for at in *first..=(*last).min(7) {
                if let (true, Some(index)) = (makes, index) {
                    let start = usize::from(at) * SECTOR;
                    let bytes = &mut self.front.pages[index][start..start + SECTOR];
                    encode(value(pending.number, sector), bytes);
                }
                sector = sector.wrapping_add(1);
            }
            let raw = match gref {
                Gref::Raw(raw) => *raw,
                _ => index.map_or(BAD_GREF, gref_of),
            };
            pending.segments.push((index, *first, *last));
            wire.push((raw, *first, *last));
        }
        wire
    }

    fn tail(&mut self, spec: &Spec, wire: &[WireSegment], descriptor: Option<usize>) -> Tail {
        if let Some(index) = descriptor {
            let room = self.front.pages[index].chunks_exact_mut(8);
            for (segment, bytes) in wire.iter().zip(room) {
                bytes.copy_from_slice(&segment_bytes(*segment));
            }
            // The backend must ignore references beyond the needed ones.
            let mut grefs = [BAD_GREF; 8];
            grefs[0] = spec.descriptor.unwrap_or(gref_of(index));
            return Tail::Indirect(grefs);
        }
        if spec.operation == OP_DISCARD {
            return Tail::Discard(spec.discard);
        }
        Tail::Segments(wire.to_vec())
    }

    /// Records in the history which sectors the request may change.
    fn note(&mut self, pending: &Pending) {
        let spec = &pending.spec;
        if matches!(spec.expect, Expect::Error | Expect::NotSupported) && !spec.wild {
            // It must change nothing, so a read that sees its data has no explanation in the history.
            return;
        }
        match spec.operation {
            OP_READ => {}
            OP_DISCARD => {
                self.history
                    .discard(pending.number, pending.issued, spec.sector, spec.discard);
            }
            _ => self.history.write(
                pending.number,
                pending.issued,
                spec.sector,
                spec.sectors(),
                spec.wild,
            ),
        }
    }

    /// Publishes what was posted (`RING_PUSH_REQUESTS_AND_CHECK_NOTIFY`).
    pub fn push(&mut self) {
        let (old, new) = (self.front.pushed, self.front.req_prod);
        if old == new {
            return;
        }
        self.ring.store(REQ_PROD, new);
        self.front.pushed = new;
        let event = self.ring.load(REQ_EVENT);
        let wanted = new.wrapping_sub(event) < new.wrapping_sub(old);
        // A guest that overwrites `req_event` cannot know whether it owes an event.
        if (wanted || self.setup.lawless > 0) && !self.commit(MachineFault::LoseEvent) {
            self.event = true;
        }
    }

    /// Returns true if `req_prod` is not the value that the guest will finally store.
    pub fn is_misleading(&self) -> bool {
        self.ring.load(REQ_PROD) != self.front.pushed
    }

    /// Corrects `req_prod` and notifies the backend.
    pub fn set_right(&mut self) {
        self.ring.store(REQ_PROD, self.front.pushed);
        self.event = true;
    }

    /// Does something to the ring that the protocol forbids.
    pub fn break_rules(&mut self) {
        let junk = self.rng.bits() as u32;
        let published = self.front.published;
        let unanswered = self.taken.wrapping_sub(published);
        match self.rng.below(32) {
            0..=7 => self.ring.store(RSP_PROD, junk),
            8..=15 => self.ring.store(REQ_EVENT, junk),
            16..=23 => self.ring.store(RSP_EVENT, junk),
            24..=27 if unanswered > 0 => {
                let back = 1 + junk % unanswered;
                self.ring.store(REQ_PROD, self.taken.wrapping_sub(back));
            }
            28 | 29 => {
                // The smallest, so that the schedule does not depend on the order of a hash map.
                let pending = self.front.pending.iter().filter(|(_, q)| !q.is_empty());
                if let Some(id) = pending.map(|(id, _)| *id).min() {
                    self.front.revoke(id);
                }
            }
            30 if self.rng.percent(20) => {
                let beyond = published.wrapping_add(self.ring.size() + 1);
                self.ring.store(REQ_PROD, beyond.wrapping_add(junk >> 1));
            }
            _ => self.set_right(),
        }
    }

    fn seen_rsp_prod(&self) -> u32 {
        if self.setup.lawless > 0 {
            return self.front.published;
        }
        self.ring.load(RSP_PROD)
    }

    /// Consumes all responses and arms the next event (`RING_FINAL_CHECK_FOR_RESPONSES`).
    pub fn consume(&mut self) {
        if self.suspended {
            return;
        }
        self.front.interrupt = false;
        while self.front.rsp_cons != self.seen_rsp_prod() {
            if self.front.rsp_cons == self.front.published {
                // Only a guest that overwrites its own ring finds more than was published.
                return;
            }
            self.front.rsp_cons = self.front.rsp_cons.wrapping_add(1);
            if let Some(unheard) = self.front.unheard.pop_front() {
                self.hear(unheard);
            }
        }
        // A lazy guest arms the event for when several more are answered.
        let waiting = self.front.pushed.wrapping_sub(self.front.rsp_cons);
        let lazy = self.rng.below(u64::from(waiting.clamp(1, 4))) as u32;
        let event = self.front.rsp_cons.wrapping_add(1 + lazy);
        self.ring.store(RSP_EVENT, event);
    }

    /// Returns true if there are responses that the guest has not seen and for which it gets no event.
    pub fn guest_overslept(&self) -> bool {
        let waiting = self.front.published.wrapping_sub(self.front.rsp_cons);
        let asked = self.ring.load(RSP_EVENT).wrapping_sub(self.front.rsp_cons);
        let told = self.front.interrupt || self.setup.lawless > 0;
        waiting >= asked && waiting > 0 && asked > 0 && !told
    }
}
