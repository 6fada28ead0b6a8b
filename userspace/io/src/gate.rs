// SPDX-License-Identifier: MIT OR Apache-2.0
//! A lock for tasks of one thread: many may share it, or one has it alone.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// A lock. Tasks get it in the order of their calls, so none waits for ever. Copies are the same lock.
#[derive(Clone, Debug, Default)]
pub struct Gate(Rc<RefCell<GateState>>);

#[derive(Debug, Default)]
struct GateState {
    /// Passes that are shared, or `usize::MAX` for one alone.
    held: usize,
    next_ticket: u64,
    /// Waiting tasks, in order.
    queue: VecDeque<(u64, Option<Waker>)>,
}

const ALONE: usize = usize::MAX;

/// The right to be inside; dropping it gives it back.
#[derive(Debug)]
#[must_use = "the lock is held as long as this"]
pub struct Pass(Rc<RefCell<GateState>>);

impl Gate {
    /// Waits until no task is inside alone.
    pub async fn shared(&self) -> Pass {
        self.enter(|held| (held != ALONE).then(|| held + 1)).await
    }

    /// Waits until no task is inside.
    pub async fn alone(&self) -> Pass {
        self.enter(|held| (held == 0).then_some(ALONE)).await
    }

    async fn enter(&self, admit: impl Fn(usize) -> Option<usize>) -> Pass {
        let ticket = GateTicket::new(&self.0);
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            let is_first = state
                .queue
                .front()
                .is_some_and(|(number, _)| *number == ticket.number);
            match admit(state.held).filter(|_| is_first) {
                Some(held) => {
                    state.held = held;
                    Poll::Ready(())
                }
                None => {
                    for (number, waker) in &mut state.queue {
                        if *number == ticket.number {
                            *waker = Some(cx.waker().clone());
                        }
                    }
                    Poll::Pending
                }
            }
        })
        .await;
        // Leaves the queue, and lets the next one look.
        drop(ticket);
        Pass(self.0.clone())
    }
}

/// A place in the queue, which is left even if the future that waits is dropped.
struct GateTicket<'g> {
    state: &'g Rc<RefCell<GateState>>,
    number: u64,
}

impl<'g> GateTicket<'g> {
    fn new(state: &'g Rc<RefCell<GateState>>) -> Self {
        let mut inner = state.borrow_mut();
        let number = inner.next_ticket;
        inner.next_ticket += 1;
        inner.queue.push_back((number, None));
        Self { state, number }
    }
}

impl Drop for GateTicket<'_> {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        state.queue.retain(|(number, _)| *number != self.number);
        wake_first(&mut state);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.0.borrow_mut();
        state.held = match state.held {
            ALONE => 0,
            held => held - 1,
        };
        wake_first(&mut state);
    }
}

fn wake_first(state: &mut GateState) {
    if let Some((_, Some(waker))) = state.queue.front() {
        waker.wake_by_ref();
    }
}
