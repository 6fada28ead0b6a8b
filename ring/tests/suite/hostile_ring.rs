// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Hostile frontends, H1 to H8: attacks of a guest on the indices and slots.

use ring::abi::{self, Protocol, MAX_SLOT_SIZE};
use ring::index::{BackRing, RingError};
use ring::request::{RawRequest, RingRequest};
use ring::response::{Response, ResponseStatus};

use crate::encode::{rw, Seg};
use crate::fake::{FakeRing, MemoryAccess};
use crate::hostile::DISK;
use crate::ring_case::Checked;

const OKAY: Response = Response {
    id: 7,
    operation: 0,
    status: ResponseStatus::Okay,
};

#[test]
fn h01_producer_index_far_ahead_breaks_the_ring_for_good() {
    for start in [0, 5, u32::MAX - 3] {
        for jump in [33, 34, 1 << 16, 1 << 31] {
            let fake = FakeRing::new(32, start);
            let mut back = BackRing::attach(&fake, 32).expect("a fresh ring");
            fake.req_prod.set(start.wrapping_add(jump));
            let req_prod = start.wrapping_add(jump);
            let error = RingError::Overflow {
                req_prod,
                rsp_prod: start,
            };
            assert_eq!(back.available(), Err(error));
            assert!(back.is_broken());
            fake.req_prod.set(start.wrapping_add(1));
            assert!(back.available().is_err() && back.final_check().is_err());
            assert!(back.is_broken(), "a broken ring came back");
            let log = fake.take_log();
            let armed = log
                .iter()
                .any(|a| matches!(a, MemoryAccess::StoreReqEvent(_)));
            assert!(!armed, "a broken ring asked for events");
        }
    }
}

#[test]
fn h01_exactly_a_full_ring_is_legal() {
    let fake = FakeRing::new(32, u32::MAX - 15);
    let mut back = BackRing::attach(&fake, 32).expect("a fresh ring");
    fake.req_prod.set(16);
    assert_eq!(back.available(), Ok(32));
}

#[test]
fn h02_producer_index_moving_backwards_brings_nothing_new() {
    let fake = FakeRing::new(4, 0);
    fake.req_prod.set(3);
    let mut ring = Checked::attach(&fake, 4).expect("a legal ring");
    assert_eq!(ring.available(), 3);
    while ring.take().is_some() {}
    for back in [2, 1, 0] {
        fake.req_prod.set(back);
        assert_eq!(ring.available(), 0, "took a request twice");
    }
    assert!(!ring.seen.broke);
    fake.req_prod.set(u32::MAX);
    assert_eq!(ring.available(), 0);
    assert!(ring.seen.broke, "behind the answers is far ahead");
}

#[test]
fn h02_producer_index_may_wrap() {
    let fake = FakeRing::new(4, u32::MAX - 1);
    let mut ring = Checked::attach(&fake, 4).expect("a fresh ring");
    for _ in 0..8 {
        fake.req_prod.set(fake.req_prod.get().wrapping_add(1));
        assert_eq!(ring.available(), 1);
        assert!(ring.take().is_some() && ring.respond());
        ring.publish();
    }
    assert_eq!(ring.seen.answered, 8);
}

#[test]
fn h03_producer_index_rewritten_during_a_pass_is_not_looked_at() {
    let fake = FakeRing::new(4, 0);
    let mut back = BackRing::attach(&fake, 4).expect("a fresh ring");
    fake.req_prod.set(2);
    fake.next_req_prod.set(Some(u32::MAX / 2));
    fake.take_log();
    assert_eq!(back.available(), Ok(2));
    let mut slot = [0; MAX_SLOT_SIZE];
    assert!(back.take(&mut slot) && back.take(&mut slot));
    let want = [
        MemoryAccess::LoadReqProd,
        MemoryAccess::CopySlot(0),
        MemoryAccess::CopySlot(1),
    ];
    assert_eq!(fake.take_log(), want);
    assert!(!back.is_broken());
}

#[test]
fn h04_overwritten_backend_words_are_never_read_back() {
    let fake = FakeRing::new(4, 10);
    let mut ring = Checked::attach(&fake, 4).expect("a fresh ring");
    for junk in [0, 9, 0xdead_beef, u32::MAX] {
        fake.req_prod.set(fake.req_prod.get().wrapping_add(2));
        fake.rsp_prod.set(junk);
        fake.req_event.set(junk);
        // `Checked` compares each access: `rsp_prod` is read at attach and never again.
        assert_eq!(ring.available(), 2);
        assert!(ring.take().is_some() && ring.take().is_some());
        fake.rsp_prod.set(junk);
        assert!(ring.respond() && ring.respond());
        ring.publish();
        assert!(!ring.final_check(1));
    }
    assert_eq!(fake.rsp_prod.get(), 18);
    assert_eq!(fake.req_event.get(), 19);
}

#[test]
fn h05_extreme_event_indices_cost_at_most_one_event_a_publication() {
    for rsp_event in [0, 1, 2, 3, 4, 5, 1 << 31, u32::MAX] {
        let fake = FakeRing::new(4, 0);
        fake.rsp_event.set(rsp_event);
        fake.req_prod.set(4);
        let mut ring = Checked::attach(&fake, 4).expect("a legal ring");
        assert_eq!(ring.available(), 4);
        while ring.take().is_some() {}
        while ring.respond() {}
        let event = ring.publish();
        assert_eq!(event, (1..=4).contains(&rsp_event), "rsp_event {rsp_event}");
        assert!((0..100).all(|_| !ring.publish()), "an event for nothing");
    }
}

#[test]
fn h06_guest_that_never_takes_answers_is_bounded_by_the_ring() {
    let fake = FakeRing::new(4, 0);
    let mut back = BackRing::attach(&fake, 4).expect("a fresh ring");
    fake.req_prod.set(4);
    let mut slot = [0; MAX_SLOT_SIZE];
    assert_eq!(back.available(), Ok(4));
    assert!((0..4).all(|_| back.take(&mut slot)));
    assert!(!back.take(&mut slot), "a fifth request in a ring of four");
    assert_eq!(back.unanswered(), 4);
    fake.req_prod.set(5);
    assert!(back.available().is_err());
}

#[test]
fn h06_answers_not_published_free_no_slot() {
    let fake = FakeRing::new(4, 0);
    let mut back = BackRing::attach(&fake, 4).expect("a fresh ring");
    fake.req_prod.set(4);
    let mut slot = [0; MAX_SLOT_SIZE];
    assert_eq!(back.available(), Ok(4));
    assert!((0..4).all(|_| back.take(&mut slot)));
    assert!((0..4).all(|_| back.respond(&OKAY)));
    assert!(
        !back.take(&mut slot),
        "the frontend cannot have seen an answer yet"
    );
    assert!(!back.respond(&OKAY), "a second answer");
    fake.req_prod.set(8);
    assert!(
        back.available().is_err(),
        "the frontend reused slots without an answer"
    );
}

#[test]
fn h07_attach_accepts_any_start_and_refuses_an_impossible_lead() {
    for rsp_prod in [0, 1, 0xffff_fff0, u32::MAX, 1 << 31] {
        for (lead, legal) in [
            (0, true),
            (1, true),
            (32, true),
            (33, false),
            (u32::MAX, false),
        ] {
            let fake = FakeRing::new(32, rsp_prod);
            let req_prod = rsp_prod.wrapping_add(lead);
            fake.req_prod.set(req_prod);
            match BackRing::attach(&fake, 32) {
                Ok(mut back) => {
                    assert!(legal, "attached with a lead of {lead}");
                    assert_eq!(back.unanswered(), 0);
                    assert_eq!(back.available(), Ok(lead));
                }
                Err(error) => {
                    assert!(!legal, "refused a lead of {lead}");
                    assert_eq!(error, RingError::Overflow { req_prod, rsp_prod });
                }
            }
            assert!(!fake
                .take_log()
                .iter()
                .any(|a| matches!(a, MemoryAccess::StoreRspProd(_))));
        }
    }
}

#[test]
fn h08_each_slot_is_copied_once_and_later_changes_do_not_matter() {
    for protocol in [Protocol::Abi64, Protocol::Abi32] {
        let fake = FakeRing::new(4, u32::MAX - 1);
        let good = rw(
            protocol,
            abi::OP_READ,
            99,
            8,
            2,
            &[Seg::page(1), Seg::page(2)],
        );
        (0..4).for_each(|n| fake.put((u32::MAX - 1).wrapping_add(n), &good.bytes));
        fake.req_prod.set(2);
        // From now on each slot becomes garbage as soon as it was read.
        fake.scribble.set(Some(0xff));
        let mut back = BackRing::attach(&fake, 4).expect("a legal ring");
        assert_eq!(back.available(), Ok(4));
        for n in 0..4 {
            let mut bytes = [0; MAX_SLOT_SIZE];
            assert!(back.take(&mut bytes));
            assert_eq!(fake.copies((u32::MAX - 1).wrapping_add(n)), 1);
            match (RawRequest { bytes, protocol }).check(&DISK) {
                Ok(RingRequest::Direct(d)) => {
                    assert_eq!((d.id, d.operation, d.count()), (99, abi::OP_READ, 2));
                    let grefs: Vec<u32> = d.segments().map(|s| s.gref()).collect();
                    assert_eq!(grefs, [1, 2]);
                }
                other => panic!("the guest changed the copy: {other:?}"),
            }
        }
    }
}
