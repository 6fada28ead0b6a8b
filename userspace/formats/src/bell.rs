// SPDX-License-Identifier: MIT OR Apache-2.0
//! Waiting for something that another task of this thread does.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Wakes all waiting tasks; each checks its own condition again.
#[derive(Debug, Default)]
pub(crate) struct Bell(RefCell<Vec<Waker>>);

impl Bell {
    pub(crate) fn ring(&self) {
        for waker in self.0.take() {
            waker.wake();
        }
    }

    /// Waits until `look` finds something.
    pub(crate) async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        poll_fn(|cx| match look() {
            Some(found) => Poll::Ready(found),
            None => {
                let mut waiting = self.0.borrow_mut();
                if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                    waiting.push(cx.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }
}
