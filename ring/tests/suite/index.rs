// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Every state of small rings with every word that a guest may have written, compared with the model.

use ring::index::{BackRing, RingError};

use crate::fake::FakeRing;
use crate::ring_case::Checked;

const SIZES: [u32; 3] = [1, 2, 4];

/// Start indices around the wrap.
fn starts() -> impl Iterator<Item = u32> {
    (0..=16).map(|n| (u32::MAX - 7).wrapping_add(n))
}

/// Words around `centre`, where all comparisons turn, and the far ends.
fn words(centre: u32, size: u32) -> impl Iterator<Item = u32> {
    let reach = 2 * size + 2;
    (0..=2 * reach)
        .map(move |n| centre.wrapping_sub(reach).wrapping_add(n))
        .chain([0x7fff_ffff, 0x8000_0000, 0x8000_0001].map(|far| centre.wrapping_add(far)))
}

/// Calls `test` with a new ring in each reachable state: `written` answers written but not
/// published and `open` requests not yet answered.
fn each_state(mut test: impl FnMut(&FakeRing, &mut Checked<'_>, u32)) {
    for size in SIZES {
        for start in starts() {
            for written in 0..=size {
                for open in 0..=size - written {
                    let fake = FakeRing::new(size, start);
                    let taken = written + open;
                    fake.req_prod.set(start.wrapping_add(taken));
                    let mut ring = Checked::attach(&fake, size).expect("a legal ring");
                    assert_eq!(ring.available(), u64::from(taken));
                    for _ in 0..taken {
                        assert!(ring.take().is_some());
                    }
                    for _ in 0..written {
                        assert!(ring.respond());
                    }
                    test(&fake, &mut ring, start);
                }
            }
        }
    }
}

/// As [`each_state`], once more for each word near the state.
fn each_state_and_word(mut test: impl FnMut(&FakeRing, &mut Checked<'_>, u32)) {
    for size in SIZES {
        for n in 0..words(0, size).count() {
            each_state(|fake, ring, start| {
                if fake.slots.borrow().len() == size as usize {
                    let word = words(start, size).nth(n).expect("counted");
                    test(fake, ring, word);
                }
            });
        }
    }
}

#[test]
fn available_agrees_with_the_model_for_every_producer_index() {
    each_state_and_word(|fake, ring, word| {
        fake.req_prod.set(word);
        let count = ring.available();
        for _ in 0..count {
            assert!(ring.take().is_some());
        }
        assert!(ring.take().is_none());
        ring.take_unasked();
    });
}

#[test]
fn final_check_agrees_with_the_model_for_every_producer_index() {
    for least in 1..4 {
        each_state_and_word(|fake, ring, word| {
            fake.req_prod.set(word);
            ring.final_check(least);
            // A broken ring stays broken, whatever the guest writes later.
            fake.req_prod.set(fake.rsp_prod.get());
            ring.final_check(least);
        });
    }
}

#[test]
fn final_check_sees_a_request_that_came_between_its_two_looks() {
    for least in 1..4 {
        each_state_and_word(|fake, ring, word| {
            fake.next_req_prod.set(Some(word));
            ring.final_check(least);
        });
    }
}

#[test]
fn publish_agrees_with_the_model_for_every_event_index() {
    each_state_and_word(|fake, ring, word| {
        fake.rsp_event.set(word);
        ring.publish();
        assert!(!ring.publish(), "a second event for the same answers");
        while ring.respond() {}
        ring.publish();
    });
}

#[test]
fn every_request_is_answered_once_and_no_more() {
    each_state(|fake, ring, _| {
        while ring.respond() {}
        assert!(!ring.respond(), "a second answer");
        let total = fake.responses.borrow().len();
        ring.publish();
        assert_eq!(ring.seen.answered as usize, total);
        assert_eq!(ring.seen.taken as usize, total);
    });
}

#[test]
fn sizes_that_are_no_power_of_two_are_refused() {
    let fake = FakeRing::new(4, 0);
    for size in [0, 3, 5, 6, 31, 33, u32::MAX] {
        let got = BackRing::attach(&fake, size).map(|_| ());
        assert_eq!(got, Err(RingError::BadSize), "size {size}");
    }
    assert_eq!(fake.take_log(), [], "touched the ring for nothing");
}
