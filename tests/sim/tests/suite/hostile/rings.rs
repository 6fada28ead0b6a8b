// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Indices, events and slots of the shared ring.

use blkback::engine::ReapContext;
use ring::abi::{
    OP_DISCARD, OP_FLUSH_DISKCACHE, OP_READ, OP_WRITE, OP_WRITE_BARRIER, REQ_EVENT, REQ_PROD,
    RSP_EVENT, RSP_PROD,
};
use ring::index::{BackRing, RingError};
use sim::ring::FakeRing;
use sim::spec::{Expect, Spec};
use sim::world::{EngineWorld, ReservedMemory};

use super::{each, settle, unchanged};

#[test]
fn h01_a_producer_index_beyond_the_ring_stops_it_for_good() {
    for jump in [33, 34, 1 << 16, 1 << 31, u32::MAX] {
        each(unchanged, |world| {
            world.send(&[Spec::pages(OP_WRITE, 0, 4)]);
            let _pass = world.pass();
            let maps = world.machine.borrow().host.mappings.len();
            world.machine.borrow_mut().ring.store(REQ_PROD, jump);
            assert!(world.engine.pass().broken, "{jump}");
            assert!(!world.engine.must_stay_awake());
            // The ring stays broken after the index is corrected.
            world.machine.borrow_mut().ring.store(REQ_PROD, 2);
            let pass = world.engine.pass();
            assert!(pass.broken && pass.taken == 0);
            assert_eq!(world.machine.borrow().host.mappings.len(), maps);
            assert_eq!(world.machine.borrow().accesses.slots, 1);
            world.close_clean();
            let answers = world.machine.borrow().front.answers.len();
            assert_eq!(answers, 1, "what was taken before is answered");
        });
    }
}

#[test]
fn h02_indices_wrap_and_may_go_back() {
    each(unchanged, |world| {
        let setup = world.machine.borrow().setup.clone();
        let mut storage = ReservedMemory::new(&setup);
        let mut wrapping = EngineWorld::attached_at(&mut storage, setup, 1, 0xffff_ffe7);
        for _ in 0..5 {
            wrapping.serve(&vec![Spec::pages(OP_READ, 0, 1); 32]);
        }
        wrapping.still_works();
        assert!(wrapping.machine.borrow().front.req_prod < 1000);

        world.send(&vec![Spec::pages(OP_READ, 0, 1); 3]);
        let _pass = world.pass();
        world.machine.borrow_mut().ring.store(REQ_PROD, 1);
        let pass = world.engine.pass();
        assert!(!pass.broken && pass.taken == 0, "nothing new is there");
        world.machine.borrow_mut().ring.store(REQ_PROD, 3);
        world.run_clean();
        assert_eq!(
            world.machine.borrow().accesses.slots,
            3,
            "each is taken once"
        );
        world.still_works();
    });
}

#[test]
fn h03_a_producer_index_is_read_once_a_pass() {
    each(unchanged, |world| {
        world.send(&[Spec::pages(OP_READ, 0, 1)]);
        world.machine.borrow_mut().rewrite_req_prod = Some(1000);
        let before = world.machine.borrow().accesses.req_prod;
        let pass = world.engine.pass();
        assert_eq!(world.machine.borrow().accesses.req_prod, before + 1);
        assert!(pass.taken == 1 && !pass.broken, "only what was read counts");
        // Corrected before the next check, it has no effect.
        world.machine.borrow_mut().ring.store(REQ_PROD, 1);
        world.run_clean();
        world.still_works();
    });
}

#[test]
fn h04_the_backends_words_may_be_overwritten() {
    for junk in [0, 7, 1 << 31, u32::MAX] {
        each(unchanged, |world| {
            for round in 1..=3 {
                world.send(&vec![Spec::pages(OP_READ, 0, 1); 4]);
                let spoil = |world: &mut EngineWorld<'_>| {
                    let mut m = world.machine.borrow_mut();
                    m.ring.store(RSP_PROD, junk);
                    m.ring.store(REQ_EVENT, junk);
                };
                spoil(world);
                settle(world);
                assert_eq!(world.machine.borrow().ring.load(RSP_PROD), 4 * round);
                assert_eq!(world.machine.borrow().ring.load(REQ_EVENT), 4 * round + 1);
                world.machine.borrow_mut().consume();
            }
            world.run_clean();
            world.still_works();
        });
    }
}

#[test]
fn h05_an_extreme_response_event_makes_no_storm() {
    for event in [0, 1, 2, 1 << 31, u32::MAX, u32::MAX - 3] {
        each(unchanged, |world| {
            for round in 1..=4 {
                world.machine.borrow_mut().ring.store(RSP_EVENT, event);
                world.send(&vec![Spec::pages(OP_READ, 0, 1); 5]);
                settle(world);
                assert_eq!(world.machine.borrow().front.answers.len(), 5 * round);
                world.machine.borrow_mut().consume();
            }
            let published = world.machine.borrow().accesses.published;
            assert!(world.engine.stats().notified <= published);
            world.run_clean();
            world.still_works();
        });
    }
}

#[test]
fn h06_a_guest_that_consumes_nothing_gets_no_more_than_a_ring() {
    each(unchanged, |world| {
        for round in 1..=3 {
            world.send(&vec![Spec::pages(OP_READ, 0, 1); 32]);
            assert!(world.engine.pass().taken <= 32);
            assert!(world.engine.in_flight() <= 32);
            settle(world);
            assert_eq!(world.machine.borrow().front.answers.len(), 32 * round);
        }
        // One more than fits while none is answered.
        world.send(&vec![Spec::pages(OP_READ, 0, 1); 32]);
        let _pass = world.pass();
        world.send(&[Spec::pages(OP_READ, 0, 1)]);
        assert_eq!(world.engine.pass().taken, 0);
        assert_eq!(world.engine.in_flight(), 32);
        // It looks only where a completion could answer without it.
        let looks = world.engine.can_lend() != ReapContext::Thread;
        assert_eq!(world.engine.must_stay_awake(), looks);
        assert_eq!(world.engine.pass().broken, looks);
        assert!(!world.engine.must_stay_awake(), "it would never sleep");
        settle(world);
        // The next check of the index finds the extra request, and it is not served.
        assert!(world.engine.pass().broken);
        assert_eq!(world.machine.borrow().front.answers.len(), 32 * 4);
        world.close_clean();
    });
}

#[test]
fn h07_attach_takes_any_index_at_which_the_ring_can_be() {
    each(unchanged, |world| {
        let m = world.machine.clone();
        let attach = |rsp_prod: u32, req_prod: u32| {
            m.borrow_mut().ring.store(RSP_PROD, rsp_prod);
            m.borrow_mut().ring.store(REQ_PROD, req_prod);
            BackRing::attach(FakeRing::new(m.clone()), 32).map(|_| ())
        };
        for rsp_prod in [0, 1, 0xffff_fff0, 1 << 31] {
            assert_eq!(attach(rsp_prod, rsp_prod), Ok(()));
            assert_eq!(attach(rsp_prod, rsp_prod.wrapping_add(32)), Ok(()));
            for ahead in [33, 1 << 31, u32::MAX] {
                let req_prod = rsp_prod.wrapping_add(ahead);
                let overflow = RingError::Overflow { req_prod, rsp_prod };
                assert_eq!(attach(rsp_prod, req_prod), Err(overflow));
            }
        }
        let setup = m.borrow().setup.clone();
        let mut storage = ReservedMemory::new(&setup);
        EngineWorld::attached_at(&mut storage, setup, 1, 0xffff_fff0).still_works();
    });
}

#[test]
fn h08_a_slot_is_fetched_once() {
    let specs = [
        Spec::pages(OP_WRITE, 0, 11),
        Spec::indirect(OP_WRITE, 128, 40),
        Spec::pages(OP_READ, 512, 11),
        Spec::new(OP_FLUSH_DISKCACHE, 0),
        Spec {
            discard: 64,
            ..Spec::new(OP_DISCARD, 1024)
        },
        Spec::pages(OP_WRITE_BARRIER, 2048, 2),
        Spec::new(77, 0).expect(Expect::NotSupported),
    ];
    each(
        |setup| setup.scribble = true,
        |world| {
            world.serve(&specs);
            assert_eq!(world.machine.borrow().accesses.slots, specs.len() as u64);
            world.still_works();
        },
    );
}
