// SPDX-License-Identifier: MIT OR Apache-2.0
//! I/O on the image that failed, for a supervisor to ask about.

use control::tapdisk::{IoErrorReport as Told, Trouble};
use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

#[derive(Debug, Default)]
struct TroubleState {
    count: u64,
    /// The one that stopped the disk, or else the latest.
    last: Option<Trouble>,
    is_stopped: bool,
    waiting: Vec<Waker>,
}

/// Adds a waker once: a task may poll again, or have been dropped without a word.
pub(crate) fn wait(waiting: &mut Vec<Waker>, waker: &Waker) {
    if !waiting.iter().any(|known| known.will_wake(waker)) {
        waiting.push(waker.clone());
    }
}

/// I/O errors of this process.
#[derive(Debug, Default)]
pub struct IoErrorLog(RefCell<TroubleState>);

impl IoErrorLog {
    /// Something failed; the disk stops for it, or not.
    pub(crate) fn add(&self, trouble: Trouble, stops: bool) {
        let mut state = self.0.borrow_mut();
        state.count += 1;
        if stops || !state.is_stopped {
            state.last = Some(trouble);
        }
        state.is_stopped |= stops;
        for waker in state.waiting.drain(..) {
            waker.wake();
        }
    }

    /// Something failed since the process was started.
    pub(crate) fn has_any(&self) -> bool {
        self.0.borrow().count > 0
    }

    /// The disk serves again.
    pub(crate) fn go_on(&self) {
        self.0.borrow_mut().is_stopped = false;
    }

    /// Waits until there were more than `after`; without a number, tells how many there were.
    pub async fn after(&self, after: Option<u64>) -> Told {
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            if after.is_some_and(|after| state.count <= after) {
                wait(&mut state.waiting, cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(Told {
                count: state.count,
                last: state.last.clone(),
                is_stopped: state.is_stopped,
            })
        })
        .await
    }
}
