// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lines on their way to the reader of the log. A thread of its own gives them to it, so a reader that has stopped
//! reading stops that thread alone. Lines that find no room are counted.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of lines that may wait for the reader.
const MOST: usize = 1 << 20;

/// Lines that wait, in order.
#[derive(Debug, Default)]
pub(super) struct LineQueue {
    held: Mutex<HeldLines>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct HeldLines {
    items: VecDeque<QueueItem>,
    /// Bytes of the lines in `items`.
    bytes: usize,
    /// An item was taken and is not written yet.
    writes: bool,
}

/// An entry of the queue.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum QueueItem {
    /// A line, as its reader wants it.
    Line(Vec<u8>),
    /// Number of lines for which there was no room here.
    Lost(u64),
}

impl LineQueue {
    /// Adds a line and returns at once. Returns false if there is no room for it.
    pub(super) fn put(&self, line: Vec<u8>) -> bool {
        let mut held = self.held();
        let bytes = held.bytes.saturating_add(line.len());
        let has_room = bytes <= MOST;
        match held.items.back_mut() {
            _ if has_room => {
                held.bytes = bytes;
                held.items.push_back(QueueItem::Line(line));
            }
            Some(QueueItem::Lost(count)) => *count = count.saturating_add(1),
            _ => held.items.push_back(QueueItem::Lost(1)),
        }
        drop(held);
        self.changed.notify_all();
        has_room
    }

    /// Waits for the next item. The caller says by [`written`](Self::written) when it is done with it.
    pub(super) fn take(&self) -> QueueItem {
        let mut held = self.held();
        loop {
            if let Some(item) = held.items.pop_front() {
                if let QueueItem::Line(line) = &item {
                    held.bytes = held.bytes.saturating_sub(line.len());
                }
                held.writes = true;
                return item;
            }
            held = match self.changed.wait(held) {
                Ok(held) => held,
                Err(poisoned) => poisoned.into_inner(),
            };
        }
    }

    /// Marks the last taken item as printed, or lost.
    pub(super) fn written(&self) {
        self.held().writes = false;
        self.changed.notify_all();
    }

    /// Waits until the queue is empty and no item is being printed, for at most `limit`. Returns whether it is.
    pub(super) fn is_empty_within(&self, limit: Duration) -> bool {
        let is_busy = |held: &mut HeldLines| held.writes || !held.items.is_empty();
        let waited = self
            .changed
            .wait_timeout_while(self.held(), limit, is_busy)
            .unwrap_or_else(PoisonError::into_inner);
        !waited.1.timed_out()
    }

    fn held(&self) -> MutexGuard<'_, HeldLines> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{LineQueue, QueueItem, MOST};
    use std::time::Duration;

    #[test]
    fn lines_without_room_are_counted_where_they_are_missing() {
        let queue = LineQueue::default();
        let half = || vec![b'x'; MOST / 2];
        assert!(queue.put(half()) && queue.put(half()));
        assert!(!queue.put(b"lost".to_vec()) && !queue.put(b"lost".to_vec()));
        assert_eq!(queue.take(), QueueItem::Line(half()));
        assert!(queue.put(b"after".to_vec()));
        assert_eq!(queue.take(), QueueItem::Line(half()));
        assert_eq!(queue.take(), QueueItem::Lost(2));
        assert_eq!(queue.take(), QueueItem::Line(b"after".to_vec()));
        assert!(!queue.is_empty_within(Duration::ZERO), "it is not written");
        queue.written();
        assert!(queue.is_empty_within(Duration::ZERO));
    }
}
