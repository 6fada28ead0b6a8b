// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The requests that the backend gets together in the next step.

use crate::ring::numbers::QueueTag;

/// Requests that the backend gets together. They are in the list of those that it has, one behind the other.
#[derive(Debug, Default)]
pub(super) struct Batch {
    first: Option<QueueTag>,
    count: u16,
    /// When the backend gets them, in nanoseconds, if one was added.
    begun: u64,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    pub(super) fn first(&self) -> Option<QueueTag> {
        self.first
    }

    pub(super) fn count(&self) -> u16 {
        self.count
    }

    /// Returns the time of all its requests, for which only the first one looks at the clock.
    #[inline]
    pub(super) fn begin(&mut self, now: impl FnOnce() -> u64) -> u64 {
        if self.is_empty() {
            self.begun = now();
        }
        self.begun
    }

    /// Adds the request that was started last.
    #[inline]
    pub(super) fn add(&mut self, tag: QueueTag) {
        self.first = self.first.or(Some(tag));
        self.count = self.count.wrapping_add(1);
    }
}
