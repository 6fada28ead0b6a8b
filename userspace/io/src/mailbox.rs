// SPDX-License-Identifier: MIT OR Apache-2.0
//! Results of operations for which no task waits.

use std::cell::RefCell;
use std::rc::Rc;

use crate::Errno;

/// The result of an operation: a number of bytes, or what the operation's system call returns otherwise.
pub type OpResult = Result<u32, Errno>;

/// A place to which [`Pending::deliver_to`](crate::Pending::deliver_to) has results delivered, in the order in which the
/// operations end. The owner takes them after [`Io::enter`](crate::Io::enter), without a task that has to be woken and polled
/// for each of them. Copies are the same thing.
#[derive(Clone, Debug, Default)]
pub struct ResultMailbox(Rc<RefCell<Vec<(u64, i32)>>>);

impl ResultMailbox {
    pub(crate) fn put(&self, token: u64, result: i32) {
        self.0.borrow_mut().push((token, result));
    }

    /// Moves the results that came, each with the token of its operation, to `results`, which is empty.
    pub fn take(&self, results: &mut Vec<(u64, i32)>) {
        debug_assert!(results.is_empty());
        std::mem::swap(&mut *self.0.borrow_mut(), results);
    }

    /// No result came since the last [`take`](Self::take).
    pub fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }
}

/// Returns what the number that an engine gave as the result of an operation means.
pub fn op_result(number: i32) -> OpResult {
    u32::try_from(number).map_err(|_| Errno::from_raw_os_error(number.wrapping_neg()))
}
