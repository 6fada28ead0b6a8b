// SPDX-License-Identifier: MIT OR Apache-2.0
//! Clusters, or what else has a number, that one task at a time may change.

use crate::bell::Bell;
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// Locks of ranges of numbers. There are no more of them than requests.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    /// Locks that are held or waited for, in the order of the requests.
    asked: RefCell<Vec<(u64, Range<u64>)>>,
    next: Cell<u64>,
    bell: Bell,
}

/// A range that is locked, or that a task waits for; dropping it releases the range.
#[derive(Debug)]
#[must_use = "the lock is held as long as this"]
pub(crate) struct HeldRange<'l> {
    locks: &'l RangeLocks,
    ticket: u64,
}

impl RangeLocks {
    /// Waits until no other task holds a part of `range`; tasks get it in the order of their calls. A task that holds a
    /// range must not lock another one.
    pub(crate) async fn lock(&self, range: Range<u64>) -> HeldRange<'_> {
        let ticket = self.next.get();
        self.next.set(ticket + 1);
        self.asked.borrow_mut().push((ticket, range.clone()));
        // Dropping the future while it waits also removes the ticket.
        let held = HeldRange {
            locks: self,
            ticket,
        };
        let meets = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        let free = || {
            let asked = self.asked.borrow();
            let mut earlier = asked.iter().take_while(|(number, _)| *number < ticket);
            (!earlier.any(|(_, other)| meets(other))).then_some(())
        };
        self.bell.until(free).await;
        held
    }

    /// Locks one number, as [`lock`](Self::lock) does for a range.
    pub(crate) async fn alone(&self, number: u64) -> HeldRange<'_> {
        self.lock(number..number.saturating_add(1)).await
    }
}

impl Drop for HeldRange<'_> {
    fn drop(&mut self) {
        let mut asked = self.locks.asked.borrow_mut();
        asked.retain(|(ticket, _)| *ticket != self.ticket);
        drop(asked);
        self.locks.bell.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::RangeLocks;
    use diskio::Runtime;
    use std::cell::RefCell;
    use std::future::{poll_fn, Future};
    use std::rc::Rc;
    use std::task::Poll;

    #[test]
    fn who_asks_first_is_first_and_others_do_not_wait() {
        let runtime = Runtime::new();
        let locks = Rc::new(RangeLocks::default());
        let order = Rc::new(RefCell::new(Vec::new()));
        // The second waits for the first, the third for the second, and the fourth for none.
        for (name, range) in [(1, 0..4), (2, 2..9), (3, 6..7), (4, 20..21)] {
            let (locks, order) = (locks.clone(), order.clone());
            runtime.tasks.spawn(async move {
                let held = locks.lock(range).await;
                order.borrow_mut().push(name);
                let mut turns = 3;
                poll_fn(|cx| {
                    turns -= 1;
                    cx.waker().wake_by_ref();
                    match turns {
                        0 => Poll::Ready(()),
                        _ => Poll::Pending,
                    }
                })
                .await;
                drop(held);
                order.borrow_mut().push(name + 10);
            });
        }
        runtime.finish().unwrap();
        let order = order.take();
        let at = |wanted| order.iter().position(|found| *found == wanted).unwrap();
        assert!(
            at(11) < at(2) && at(12) < at(3) && at(4) < at(11),
            "{order:?}"
        );
    }

    #[test]
    fn who_gives_up_waiting_stands_in_nobodys_way() {
        let runtime = Runtime::new();
        let locks = Rc::new(RangeLocks::default());
        let its = locks.clone();
        let done = runtime.block_on(async move {
            let first = its.alone(1).await;
            {
                let mut second = Box::pin(its.lock(0..5));
                poll_fn(|cx| {
                    assert!(second.as_mut().poll(cx).is_pending());
                    Poll::Ready(())
                })
                .await;
            }
            let _third = its.alone(3).await;
            drop(first);
            let _fourth = its.alone(1).await;
        });
        done.unwrap();
        assert!(locks.asked.borrow().is_empty());
    }
}
