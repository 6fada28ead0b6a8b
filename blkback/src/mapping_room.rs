// SPDX-License-Identifier: GPL-2.0-only

//! Room for mappings, which all queues share: Xen has one table of what this domain has mapped of all its guests.
//!
//! Pages that stay mapped for guests that keep them granted may fill the table, and a further guest's ring could not be
//! mapped then. So a queue that finds no room for its ring asks all queues to unmap the pages that no request uses. A
//! queue that got this request copies the data of pages that are not mapped until its next sweep, which leaves the room
//! to the ring.

use kernel::sync::atomic::{ordering::Relaxed, Atomic};

/// Number of times that a queue found no room.
static WANTED: Atomic<u32> = Atomic::new(0);

/// Asks all queues of this module to unmap the pages that they keep mapped and do not use. Callable from any context.
pub(crate) fn want() {
    WANTED.fetch_add(1, Relaxed);
}

/// Returns a number that changes with each call of [`want`].
pub(crate) fn wanted() -> u32 {
    WANTED.load(Relaxed)
}
