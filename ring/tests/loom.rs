// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Every interleaving and every legal reordering of a frontend and a backend on a tiny ring.
//!
//! Run it with `RUSTFLAGS="--cfg loom" cargo test -p ring --release --test loom`.

#![cfg(loom)]

#[path = "loom/lent.rs"]
mod lent;
#[path = "loom/passthrough.rs"]
mod passthrough;
#[path = "loom/tap.rs"]
mod tap;
#[path = "loom/wake.rs"]
mod wake;

use loom::sync::atomic::{fence, AtomicU32, AtomicU64, Ordering};
use loom::sync::{Arc, Notify};
use loom::thread;
use ring::abi::MAX_SLOT_SIZE;
use ring::index::BackRing;
use ring::response::{Response, ResponseStatus};
use ring::shared_ring::SharedRing;

/// Barriers of the backend that are left out, to show that the model finds the fault.
#[derive(Clone, Copy, Default)]
struct Planted {
    no_full_barrier: bool,
    no_write_barrier: bool,
}

/// The shared page of a ring of `N` slots, and both event channels.
struct Page<const N: usize> {
    req_prod: AtomicU32,
    req_event: AtomicU32,
    rsp_prod: AtomicU32,
    rsp_event: AtomicU32,
    /// The first word of each slot: a request's or a response's identifier.
    slots: [AtomicU64; N],
    to_back: Notify,
    to_front: Notify,
    planted: Planted,
}

/// Set in a slot that holds a response.
const ANSWER: u64 = 1 << 32;

impl<const N: usize> Page<N> {
    fn new(start: u32, planted: Planted) -> Arc<Self> {
        Arc::new(Self {
            req_prod: AtomicU32::new(start),
            req_event: AtomicU32::new(start.wrapping_add(1)),
            rsp_prod: AtomicU32::new(start),
            rsp_event: AtomicU32::new(start.wrapping_add(1)),
            slots: std::array::from_fn(|_| AtomicU64::new(0)),
            to_back: Notify::new(),
            to_front: Notify::new(),
            planted,
        })
    }

    fn slot(&self, index: u32) -> &AtomicU64 {
        &self.slots[index as usize % N]
    }
}

/// The backend's view of a page.
struct Back<const N: usize>(Arc<Page<N>>);

impl<const N: usize> SharedRing for Back<N> {
    fn load_req_prod(&self) -> u32 {
        let value = self.0.req_prod.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        value
    }

    fn load_rsp_prod(&self) -> u32 {
        self.0.rsp_prod.load(Ordering::Relaxed)
    }

    fn load_rsp_event(&self) -> u32 {
        self.0.rsp_event.load(Ordering::Relaxed)
    }

    fn store_req_event(&self, value: u32) {
        self.0.req_event.store(value, Ordering::Relaxed);
    }

    fn store_rsp_prod(&self, value: u32) {
        if !self.0.planted.no_write_barrier {
            fence(Ordering::Release);
        }
        self.0.rsp_prod.store(value, Ordering::Relaxed);
    }

    fn full_barrier(&self) {
        if !self.0.planted.no_full_barrier {
            fence(Ordering::SeqCst);
        }
    }

    fn copy_slot(&self, index: u32, slot: &mut [u8; MAX_SLOT_SIZE]) {
        let word = self.0.slot(index).load(Ordering::Relaxed);
        slot[..8].copy_from_slice(&word.to_le_bytes());
    }

    fn write_response(&self, index: u32, words: [u32; 4]) {
        let word = u64::from(words[0]) | ANSWER;
        self.0.slot(index).store(word, Ordering::Relaxed);
    }
}

/// A frontend as Xen's macros write it.
struct Front<const N: usize> {
    page: Arc<Page<N>>,
    req_prod: u32,
    rsp_cons: u32,
}

impl<const N: usize> Front<N> {
    /// `RING_PUSH_REQUESTS_AND_CHECK_NOTIFY` for one request; true if an event is due.
    fn push(&mut self, id: u32) -> bool {
        let (old, new) = (self.req_prod, self.req_prod.wrapping_add(1));
        let slot = self.page.slot(old);
        slot.store(u64::from(id), Ordering::Relaxed);
        fence(Ordering::Release);
        self.page.req_prod.store(new, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.req_prod = new;
        let event = self.page.req_event.load(Ordering::Relaxed);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Takes one response if there is one.
    fn pop(&mut self) -> Option<u32> {
        let rsp_prod = self.page.rsp_prod.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        if rsp_prod == self.rsp_cons {
            return None;
        }
        let word = self.page.slot(self.rsp_cons).load(Ordering::Relaxed);
        assert!(word & ANSWER != 0, "read a response before it was written");
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Some(word as u32)
    }

    /// `RING_FINAL_CHECK_FOR_RESPONSES`; true if there is one.
    fn final_check(&self) -> bool {
        let event = self.rsp_cons.wrapping_add(1);
        self.page.rsp_event.store(event, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.page.rsp_prod.load(Ordering::Relaxed) != self.rsp_cons
    }
}

fn pair<const N: usize>(start: u32, planted: Planted) -> (Front<N>, BackRing<Back<N>>) {
    let page = Page::new(start, planted);
    let back = BackRing::attach(Back(page.clone()), N as u32).expect("a fresh ring");
    let front = Front {
        page,
        req_prod: start,
        rsp_cons: start,
    };
    (front, back)
}

fn take<const N: usize>(back: &mut BackRing<Back<N>>) -> u32 {
    let mut slot = [0; MAX_SLOT_SIZE];
    assert!(back.take(&mut slot), "an announced request was not there");
    let [a, b, c, d, e, f, g, h, ..] = slot;
    let word = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    assert!(
        word & ANSWER == 0 && word != 0,
        "read a request before it was written"
    );
    word as u32
}

fn answer<const N: usize>(back: &mut BackRing<Back<N>>, id: u32) {
    let response = Response {
        id: u64::from(id),
        operation: 0,
        status: ResponseStatus::Okay,
    };
    assert!(
        back.respond(&response),
        "an open request could not be answered"
    );
}

/// The frontend publishes a request while the backend goes to sleep.
fn request_against_sleep(planted: Planted) {
    loom::model(move || {
        let (mut front, mut back) = pair::<1>(u32::MAX, planted);
        // The event index is stale, as after polling, so no event is due without re-arming.
        front.page.req_event.store(u32::MAX, Ordering::Relaxed);
        let sender = thread::spawn(move || front.push(7));
        let awake = back.final_check().expect("an honest frontend");
        if awake {
            assert_eq!(take(&mut back), 7);
        }
        let event = sender.join().expect("the frontend ends");
        assert!(
            awake || event,
            "a request was lost: no work seen and no event sent"
        );
    });
}

/// The backend publishes a response while the frontend goes to sleep.
fn response_against_sleep(planted: Planted) {
    loom::model(move || {
        let (mut front, mut back) = pair::<1>(u32::MAX, planted);
        front.push(7);
        assert_eq!(back.available(), Ok(1));
        let id = take(&mut back);
        front.page.rsp_event.store(u32::MAX, Ordering::Relaxed);
        let receiver = thread::spawn(move || {
            let awake = front.final_check();
            if awake {
                assert_eq!(front.pop(), Some(7));
            }
            awake
        });
        answer(&mut back, id);
        let event = back.publish();
        let awake = receiver.join().expect("the frontend ends");
        assert!(
            awake || event,
            "a response was lost: not seen and no event sent"
        );
    });
}

#[test]
fn request_is_seen_or_an_event_is_sent() {
    request_against_sleep(Planted::default());
}

#[test]
fn response_is_seen_or_an_event_is_sent() {
    response_against_sleep(Planted::default());
}

#[test]
#[should_panic(expected = "a request was lost")]
fn planted_without_the_full_barrier_a_request_is_lost() {
    request_against_sleep(Planted {
        no_full_barrier: true,
        ..Planted::default()
    });
}

#[test]
#[should_panic(expected = "a response was lost")]
fn planted_without_the_full_barrier_a_response_is_lost() {
    response_against_sleep(Planted {
        no_full_barrier: true,
        ..Planted::default()
    });
}

/// Serves `count` requests, sleeping whenever there is nothing to do.
fn serve<const N: usize>(back: &mut BackRing<Back<N>>, page: &Page<N>, count: u32) {
    let mut served = 0;
    while served < count {
        let available = back.available().expect("an honest frontend");
        for _ in 0..available {
            let id = take(back);
            answer(back, id);
            served += 1;
        }
        if back.publish() {
            page.to_front.notify();
        }
        if served < count && !back.final_check().expect("an honest frontend") {
            page.to_back.wait();
        }
    }
}

/// Sends `count` requests as the ring has room and waits for all answers, in order.
fn request_all<const N: usize>(front: &mut Front<N>, count: u32) {
    let (mut sent, mut received) = (0, 0);
    while received < count {
        while sent < count && sent - received < N as u32 {
            sent += 1;
            if front.push(sent) {
                front.page.to_back.notify();
            }
        }
        while let Some(id) = front.pop() {
            received += 1;
            assert_eq!(id, received, "answers out of order");
        }
        if sent - received == 0 || (sent < count && sent - received < N as u32) {
            continue;
        }
        if !front.final_check() {
            front.page.to_front.wait();
        }
    }
}

/// Forced thread switches in one run of a conversation.
const BOUND: usize = 3;

/// Runs both sides to the end. A lost event leaves both asleep, which loom reports as a deadlock (and then aborts, so
/// no fault is planted here).
fn conversation<const N: usize>(count: u32, planted: Planted) {
    let mut model = loom::model::Builder::new();
    // Unbounded, the run takes more than a minute.
    model.preemption_bound = Some(BOUND);
    model.check(move || {
        let (mut front, mut back) = pair::<N>(u32::MAX, planted);
        let page = front.page.clone();
        let guest = thread::spawn(move || request_all(&mut front, count));
        serve(&mut back, &page, count);
        guest.join().expect("the frontend ends");
    });
}

#[test]
fn two_requests_through_one_slot() {
    conversation::<1>(2, Planted::default());
}

#[test]
fn three_requests_through_two_slots() {
    conversation::<2>(3, Planted::default());
}

#[test]
#[should_panic(expected = "read a response before it was written")]
fn planted_without_the_write_barrier_an_answer_is_read_too_early() {
    let planted = Planted {
        no_write_barrier: true,
        ..Planted::default()
    };
    conversation::<1>(1, planted);
}
