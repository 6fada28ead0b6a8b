// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests that may still rely on where something was.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

/// Requests that are under way, in the order of their beginning.
#[derive(Debug, Default)]
pub(crate) struct InFlightRequests(Rc<InFlightState>);

#[derive(Debug, Default)]
struct InFlightState {
    next: Cell<u64>,
    active: RefCell<BTreeSet<u64>>,
}

/// A request that is under way, until it is dropped.
#[derive(Debug)]
#[must_use = "the request counts as over without this"]
pub(crate) struct ActiveRequest {
    users: Rc<InFlightState>,
    number: u64,
}

impl InFlightRequests {
    pub(crate) fn enter(&self) -> ActiveRequest {
        let number = self.0.next.get();
        self.0.next.set(number + 1);
        self.0.active.borrow_mut().insert(number);
        ActiveRequest {
            users: self.0.clone(),
            number,
        }
    }

    /// Returns a number above that of each request that has begun.
    pub(crate) fn now(&self) -> u64 {
        self.0.next.get()
    }

    /// Returns a number below that of each request that is under way.
    pub(crate) fn oldest(&self) -> u64 {
        let first = self.0.active.borrow().first().copied();
        first.unwrap_or(self.0.next.get())
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.users.active.borrow_mut().remove(&self.number);
    }
}
