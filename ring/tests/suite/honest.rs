// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! An honest frontend and a backend in every order of their steps: no event is lost.

use std::collections::VecDeque;

use ring::abi::MAX_SLOT_SIZE;
use ring::index::BackRing;
use ring::response::{Response, ResponseStatus};

use crate::fake::FakeRing;

/// Both sides of one ring, and which of them sleeps.
struct RingWorld<'a> {
    fake: &'a FakeRing,
    back: BackRing<&'a FakeRing>,
    size: u32,
    /// Requests that the frontend sent; the number is the identifier.
    sent: u64,
    /// Responses that the frontend took off the ring.
    rsp_cons: u32,
    received: u64,
    taken: VecDeque<u64>,
    back_asleep: bool,
    front_asleep: bool,
    /// Events that woke a side.
    woken: u64,
}

impl<'a> RingWorld<'a> {
    fn new(fake: &'a FakeRing, size: u32) -> Self {
        let back = BackRing::attach(fake, size).expect("a fresh ring");
        Self {
            fake,
            back,
            size,
            sent: 0,
            rsp_cons: fake.rsp_prod.get(),
            received: 0,
            taken: VecDeque::new(),
            back_asleep: false,
            front_asleep: false,
            woken: 0,
        }
    }

    /// `RING_PUSH_REQUESTS_AND_CHECK_NOTIFY` with one request.
    fn send(&mut self) {
        let old = self.fake.req_prod.get();
        if old.wrapping_sub(self.rsp_cons) == self.size {
            return;
        }
        self.fake.put(old, &self.sent.to_le_bytes());
        self.sent += 1;
        let new = old.wrapping_add(1);
        self.fake.req_prod.set(new);
        if new.wrapping_sub(self.fake.req_event.get()) < new.wrapping_sub(old) {
            self.woken += u64::from(self.back_asleep);
            self.back_asleep = false;
        }
    }

    /// Takes all responses, then `RING_FINAL_CHECK_FOR_RESPONSES`.
    fn receive(&mut self) {
        while self.rsp_cons != self.fake.rsp_prod.get() {
            let place = self.rsp_cons as usize % self.size as usize;
            let id = self.fake.slots.borrow()[place]
                .first_chunk::<8>()
                .map(|b| u64::from_le_bytes(*b));
            assert_eq!(id, Some(self.received), "answers lost, doubled or mixed up");
            self.received += 1;
            self.rsp_cons = self.rsp_cons.wrapping_add(1);
        }
        self.fake.rsp_event.set(self.rsp_cons.wrapping_add(1));
        self.front_asleep = true;
    }

    fn take(&mut self) {
        let available = self.back.available().expect("an honest frontend");
        if self.back_asleep || available == 0 {
            return;
        }
        let mut slot = [0; MAX_SLOT_SIZE];
        assert!(self.back.take(&mut slot));
        let id = slot.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
        self.taken.extend(id);
    }

    fn respond(&mut self) {
        if let Some(id) = self.taken.pop_front() {
            let status = ResponseStatus::Okay;
            assert!(self.back.respond(&Response {
                id,
                operation: 0,
                status
            }));
        }
    }

    fn publish(&mut self) {
        if self.back.publish() {
            self.woken += u64::from(self.front_asleep);
            self.front_asleep = false;
        }
    }

    fn sleep(&mut self) {
        if !self.back_asleep {
            self.back_asleep = !self.back.final_check().expect("an honest frontend");
        }
    }

    /// A side sleeps only when it has nothing to do.
    fn nobody_waits_in_vain(&self) {
        let unseen = self.sent != self.received + u64::from(self.unreceived());
        assert!(
            !(self.back_asleep && unseen),
            "the backend sleeps over a request"
        );
        let answers = self.fake.rsp_prod.get() != self.rsp_cons;
        assert!(
            !(self.front_asleep && answers),
            "the frontend sleeps over an answer"
        );
    }

    /// Requests that the backend has taken and the frontend has not got back.
    fn unreceived(&self) -> u32 {
        let taken = self.back.unanswered();
        let written = self.fake.responses.borrow().len() as u64;
        taken + (written - self.received) as u32
    }
}

/// Runs one script, a digit a step.
fn run(size: u32, start: u32, mut script: u32, steps: u32) -> (u64, u64) {
    let fake = FakeRing::new(size, start);
    let mut world = RingWorld::new(&fake, size);
    for _ in 0..steps {
        match script % 6 {
            0 => world.send(),
            1 => world.receive(),
            2 => world.take(),
            3 => world.respond(),
            4 => world.publish(),
            _ => world.sleep(),
        }
        script /= 6;
        world.nobody_waits_in_vain();
    }
    (world.received, world.woken)
}

#[test]
fn no_order_of_steps_loses_an_event() {
    const STEPS: u32 = 8;
    let (mut received, mut woken) = (0, 0);
    for size in [1, 2, 4] {
        for start in [u32::MAX - 1, u32::MAX, 0] {
            for script in 0..6u32.pow(STEPS) {
                let (r, w) = run(size, start, script, STEPS);
                received += r;
                woken += w;
            }
        }
    }
    println!("{received} answers received, {woken} sleepers woken");
    assert!(
        received > 1_000 && woken > 10_000,
        "the scripts are vacuous"
    );
}

#[test]
fn a_ring_runs_across_the_wrap_and_loses_nothing() {
    for size in [1, 2, 4, 32] {
        let fake = FakeRing::new(size, u32::MAX - 100);
        let mut world = RingWorld::new(&fake, size);
        for round in 0..1000u32 {
            (0..=round % size).for_each(|_| world.send());
            (0..size).for_each(|_| world.take());
            (0..size).for_each(|_| world.respond());
            world.sleep();
            world.publish();
            world.nobody_waits_in_vain();
            world.receive();
            world.nobody_waits_in_vain();
        }
        assert_eq!(world.sent, world.received);
        assert!(world.received >= 1000);
    }
}
