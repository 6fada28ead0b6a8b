// SPDX-License-Identifier: GPL-2.0-only

//! The part of a disk that a queue has.

use crate::ring::numbers::{DiskTag, QueueTag};

/// A queue's part of the disk.
#[derive(Clone, Copy)]
pub(super) struct QueueSlice {
    /// Number of the queue.
    pub(super) index: u16,
    /// Its tags begin here.
    pub(super) first_tag: u16,
    /// Its pages of the arena begin here.
    pub(super) first_page: u16,
    /// Its tags.
    pub(super) depth: u16,
}

impl QueueSlice {
    /// Returns the disk's tag of a request of this queue.
    pub(super) fn disk_tag(self, tag: QueueTag) -> DiskTag {
        DiskTag::new(self.first_tag.wrapping_add(tag.number()))
    }

    /// Returns this queue's tag of its own request of the disk.
    pub(super) fn queue_tag(self, tag: DiskTag) -> QueueTag {
        QueueTag::new(tag.number().wrapping_sub(self.first_tag))
    }
}
