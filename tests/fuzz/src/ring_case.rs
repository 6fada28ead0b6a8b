// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The body of the fuzz target `ring`, and a model of a correct backend ring.
//!
//! The model has the indices as unbounded integers and finds the meaning of a shared word by search instead of by
//! wrapping arithmetic.

use std::collections::VecDeque;

use ring::abi::MAX_SLOT_SIZE;
use ring::index::{BackRing, RingError};
use ring::response::{Response, ResponseStatus};

use crate::fake::{FakeRing, MemoryAccess};

/// Events of a run; the callers check that runs are not vacuous.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingEvents {
    /// Requests taken.
    pub taken: u32,
    /// Responses published.
    pub answered: u32,
    /// Publications that asked for an event.
    pub events: u32,
    /// True if the ring broke.
    pub broke: bool,
}

/// A backend ring and its model.
pub struct Checked<'a> {
    fake: &'a FakeRing,
    back: BackRing<&'a FakeRing>,
    size: u64,
    start: u32,
    /// Identifiers taken and not yet answered, in order.
    taken: VecDeque<u64>,
    /// Requests taken since the start.
    cons: u64,
    /// Responses written since the start.
    prod: u64,
    /// Responses published since the start.
    published: u64,
    /// Requests that may be taken before the next call of `available`.
    budget: u64,
    /// Events of the run.
    pub seen: RingEvents,
}

impl<'a> Checked<'a> {
    /// Attaches to `fake` in its current state; `None` if the ring refuses that, which must be right.
    pub fn attach(fake: &'a FakeRing, size: u32) -> Option<Self> {
        let start = fake.rsp_prod.get();
        let req_prod = fake.req_prod.get();
        let legal = (0..=size).any(|k| start.wrapping_add(k) == req_prod);
        let back = match BackRing::attach(fake, size) {
            Ok(back) => back,
            Err(error) => {
                let want = RingError::Overflow {
                    req_prod,
                    rsp_prod: start,
                };
                assert!(!legal && error == want, "refused a legal ring: {error:?}");
                return None;
            }
        };
        assert!(
            legal,
            "attached with req_prod {req_prod} and rsp_prod {start}"
        );
        assert_eq!(back.size(), size);
        Some(Self {
            fake,
            back,
            size: u64::from(size),
            start,
            taken: VecDeque::new(),
            cons: 0,
            prod: 0,
            published: 0,
            budget: 0,
            seen: RingEvents::default(),
        })
    }

    /// Returns the shared index of the `n`th request since the start.
    fn index(&self, n: u64) -> u32 {
        self.start.wrapping_add(n as u32)
    }

    /// Returns the expected result of `available` for the shared `req_prod`: `None` for a broken ring.
    fn unconsumed(&self) -> Option<u64> {
        let req_prod = self.fake.req_prod.get();
        let ahead = (0..=self.size).find(|k| self.index(self.published + k) == req_prod)?;
        Some((self.published + ahead).saturating_sub(self.cons))
    }

    /// Compares a result about new requests with the model and advances the model.
    fn judge(&mut self, want: Option<u64>, got: Result<u64, RingError>) {
        let want = if self.seen.broke { None } else { want };
        match (want, got) {
            (Some(want), Ok(got)) => assert_eq!(got, want, "unconsumed requests"),
            (None, Err(RingError::Overflow { .. })) => self.seen.broke = true,
            (want, got) => panic!("expected {want:?}, got {got:?}"),
        }
        self.budget = want.unwrap_or(0);
        self.invariants();
    }

    /// Checks for new requests.
    pub fn available(&mut self) -> u64 {
        let want = self.unconsumed();
        // The cheaper check must agree.
        let settled = self.fake.next_req_prod.get().is_none();
        let (broken, worth) = (
            self.back.is_broken(),
            settled && self.back.is_worth_a_look(),
        );
        self.fake.take_log();
        let got = self.back.available().map(u64::from);
        assert!(
            !settled || worth == (!broken && got.map_or(true, |new| new > 0)),
            "a look says {worth}, but it is {got:?}"
        );
        assert_eq!(
            self.fake.take_log(),
            [MemoryAccess::LoadReqProd],
            "not read exactly once"
        );
        self.judge(want, got);
        self.budget
    }

    /// Takes a request if the last answer allows; returns its first eight bytes.
    pub fn take(&mut self) -> Option<u64> {
        if self.budget == 0 {
            return None;
        }
        self.fake.take_log();
        let mut slot = [0; MAX_SLOT_SIZE];
        assert!(
            self.back.take(&mut slot),
            "an announced request was not there"
        );
        let copy = MemoryAccess::CopySlot(self.index(self.cons));
        assert_eq!(self.fake.take_log(), [copy], "not copied exactly once");
        let [a, b, c, d, e, f, g, h, ..] = slot;
        let id = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        self.taken.push_back(id);
        self.cons += 1;
        self.budget -= 1;
        self.seen.taken += 1;
        self.invariants();
        Some(id)
    }

    /// Takes without a check: it must never leave more requests unanswered than the ring's size.
    pub fn take_unasked(&mut self) {
        let full = self.cons - self.published >= self.size;
        if full {
            let mut slot = [0; MAX_SLOT_SIZE];
            self.fake.take_log();
            assert!(
                !self.back.take(&mut slot),
                "took more than the ring can hold"
            );
            assert_eq!(self.fake.take_log(), [], "touched the ring for nothing");
        }
        self.invariants();
    }

    /// Answers the oldest request, or shows that there is none to answer.
    pub fn respond(&mut self) -> bool {
        let id = self.taken.pop_front();
        let response = Response {
            id: id.unwrap_or(u64::MAX),
            operation: 1,
            status: ResponseStatus::Okay,
        };
        self.fake.take_log();
        let written = self.back.respond(&response);
        assert_eq!(written, id.is_some(), "answers and requests do not match");
        let want = MemoryAccess::WriteResponse(self.index(self.prod));
        let log = self.fake.take_log();
        assert_eq!(log, if written { vec![want] } else { vec![] });
        if written {
            self.prod += 1;
        }
        self.invariants();
        written
    }

    /// Publishes; returns whether the guest gets an event.
    pub fn publish(&mut self) -> bool {
        let rsp_event = self.fake.rsp_event.get();
        // The guest asked for an event if its index is one of those just published.
        let want = (self.published + 1..=self.prod).any(|n| self.index(n) == rsp_event);
        self.fake.take_log();
        let got = self.back.publish();
        assert_eq!(got, want, "event for {rsp_event}");
        let log = self.fake.take_log();
        if self.prod == self.published {
            assert_eq!(log, [], "published nothing, yet touched the ring");
        } else {
            let store = MemoryAccess::StoreRspProd(self.index(self.prod));
            assert_eq!(
                log,
                [store, MemoryAccess::Barrier, MemoryAccess::LoadRspEvent]
            );
            assert_eq!(self.fake.rsp_prod.get(), self.index(self.prod));
        }
        self.seen.answered += (self.prod - self.published) as u32;
        self.seen.events += u32::from(got);
        self.published = self.prod;
        self.invariants();
        got
    }

    /// Makes the check before sleeping, for an event as soon as `least` requests are there; returns whether there is work after
    /// all.
    pub fn final_check(&mut self, least: u32) -> bool {
        let at_least = u64::from(least.max(1));
        let want = self.unconsumed();
        let idle = !self.seen.broke && want.is_some_and(|want| want < at_least);
        self.fake.take_log();
        let got = self.back.final_check_for(least);
        let log = self.fake.take_log();
        if idle {
            let arm = MemoryAccess::StoreReqEvent(self.index(self.cons + at_least));
            let order = [
                MemoryAccess::LoadReqProd,
                arm,
                MemoryAccess::Barrier,
                MemoryAccess::LoadReqProd,
            ];
            assert_eq!(log, order);
        } else {
            assert_eq!(log, [MemoryAccess::LoadReqProd]);
        }
        // The second read of `req_prod` may see a request that the first did not.
        let want = if idle { self.unconsumed() } else { want };
        let work = want.map(|n| n >= at_least);
        assert_eq!(got.ok(), if self.seen.broke { None } else { work });
        self.judge(want, got.map(|_| want.unwrap_or(0)));
        self.budget > 0
    }

    /// Checks the invariants of the ring, which hold in every state.
    fn invariants(&self) {
        assert_eq!(self.back.is_broken(), self.seen.broke);
        assert_eq!(u64::from(self.back.unanswered()), self.cons - self.prod);
        assert_eq!(self.taken.len() as u64, self.cons - self.prod);
        assert!(self.published <= self.prod && self.prod <= self.cons);
        assert!(
            self.cons - self.published <= self.size,
            "more than a ring of requests"
        );
    }
}

/// Runs one input: ring size, start, then a script of both sides' steps.
pub fn run(data: &[u8]) -> Option<RingEvents> {
    let (&[order, a, b, c, d, lead], script) = data.split_first_chunk::<6>()?;
    let size = 1u32 << (order % 6);
    // Half of the runs start near the wrap of the indices.
    let start = match order & 64 {
        0 => u32::from_le_bytes([a, b, c, d]),
        _ => u32::MAX - u32::from(a % 16),
    };
    let fake = FakeRing::new(size, start);
    fake.req_prod
        .set(start.wrapping_add(u32::from(lead) % (size + 2)));
    let mut ring = Checked::attach(&fake, size)?;
    for step in script.chunks_exact(2) {
        let &[what, value] = step else { continue };
        guest_or_backend(&fake, &mut ring, what, value);
    }
    Some(ring.seen)
}

fn guest_or_backend(fake: &FakeRing, ring: &mut Checked<'_>, what: u8, value: u8) {
    let small = u32::from(value);
    match what % 16 {
        0..=3 => {
            // An honest frontend: fills no slot whose answer it has not seen.
            let (size, old) = (ring.size as u32, fake.req_prod.get());
            let open = old.wrapping_sub(ring.index(ring.published)).min(size);
            fake.put(old, &[value; 8]);
            fake.req_prod
                .set(old.wrapping_add(small % (size - open + 1)));
        }
        4 => fake
            .rsp_event
            .set(fake.rsp_prod.get().wrapping_add(small % 8)),
        5 => hostile(fake, value),
        // A change right after the next read, mostly a legal one.
        6 if value < 64 => fake
            .next_req_prod
            .set(Some(fake.req_prod.get().wrapping_add(small % 3))),
        7..=8 => drop(ring.available()),
        9..=11 => drop(ring.take()),
        12..=13 => drop(ring.respond()),
        14 => drop(ring.publish()),
        _ if value % 4 == 0 => ring.take_unasked(),
        _ => drop(ring.final_check(u32::from(value) % 5)),
    }
}

/// Does something that a frontend must not do.
fn hostile(fake: &FakeRing, value: u8) {
    let junk = u32::from(value).wrapping_mul(0x0204_0811);
    match value % 8 {
        0 => fake.rsp_prod.set(junk),
        1 => fake.req_event.set(junk),
        2 => fake.rsp_event.set(junk),
        3 => fake
            .req_prod
            .set(fake.req_prod.get().wrapping_sub(u32::from(value) / 64)),
        4 => fake.scribble.set(Some(value)),
        5 if value > 0xe0 => fake.req_prod.set(junk),
        _ => fake.put(junk, &[value; 16]),
    }
}
