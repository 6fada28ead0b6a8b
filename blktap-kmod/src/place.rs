// SPDX-License-Identifier: GPL-2.0-only

//! Which part of a disk a queue has.

use crate::ring::numbers::{DiskTag, QueueTag};

/// A queue's part of the disk.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Number of the queue.
    pub(super) index: u16,
    /// Its tags begin here.
    pub(super) first_tag: u16,
    /// Its pages of the arena begin here.
    pub(super) first_page: u16,
    /// Its tags.
    pub(super) depth: u16,
}

impl Place {
    /// What the disk calls a request of this queue.
    pub(super) fn disk_tag(self, tag: QueueTag) -> DiskTag {
        DiskTag::new(self.first_tag.wrapping_add(tag.number()))
    }

    /// What this queue calls a request of the disk that is its own.
    pub(super) fn queue_tag(self, tag: DiskTag) -> QueueTag {
        QueueTag::new(tag.number().wrapping_sub(self.first_tag))
    }
}
