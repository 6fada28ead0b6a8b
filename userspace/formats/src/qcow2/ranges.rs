// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ranges of clusters of which one task at a time changes where they are.

use super::bell::Bell;
use std::cell::RefCell;
use std::ops::Range;

/// Locks of ranges. There are no more of them than requests.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    held: RefCell<Vec<Range<u64>>>,
    bell: Bell,
}

/// A range that nobody else has; dropping it gives it back.
#[derive(Debug)]
#[must_use = "the lock is held as long as this"]
pub(crate) struct Held<'r> {
    ranges: &'r Ranges,
    range: Range<u64>,
}

impl Ranges {
    /// Waits until nobody has a part of `range`. A task that has one must not ask for another.
    pub(crate) async fn lock(&self, range: Range<u64>) -> Held<'_> {
        self.bell
            .until(|| {
                let mut held = self.held.borrow_mut();
                let meets = |other: &Range<u64>| other.start < range.end && range.start < other.end;
                let free = !held.iter().any(meets);
                free.then(|| held.push(range.clone()))
            })
            .await;
        Held {
            ranges: self,
            range,
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.ranges.held.borrow_mut();
        if let Some(at) = held.iter().position(|range| *range == self.range) {
            held.swap_remove(at);
        }
        drop(held);
        self.ranges.bell.ring();
    }
}
