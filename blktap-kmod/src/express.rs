// SPDX-License-Identifier: GPL-2.0-only

//! Express: requests that a queue executes in a block device without the lock of its disk, while no process has anything
//! to do (`ring::tap::shadow::express`).
//!
//! The queue begins them like those of a `phy:` disk, and their completions are answered in the same contexts. Only
//! requests with their data in pages of the guest are begun so: one that fails is given back to the engine, which
//! submits it again with its data in the arena, and then the shadow knows of it. `passthrough` begins and ends them.

use crate::ring::tap::extent::ExpressExtent;
use kernel::sync::atomic::{ordering::Relaxed, ordering::Release, Atomic, AtomicFlag};

/// State of a queue with express that the other users of its disk see.
pub(super) struct ExpressSignal {
    /// The queue must give express up. Changes under the lock of the disk.
    withdrawn: AtomicFlag,
    /// Requests that the queue has in express, and those that it has executed. The queue counts them.
    executing: Atomic<u64>,
    executed: Atomic<u64>,
}

impl ExpressSignal {
    pub(super) fn new() -> Self {
        Self {
            withdrawn: AtomicFlag::new(false),
            executing: Atomic::new(0),
            executed: Atomic::new(0),
        }
    }

    /// Says that the queue must give express up; the caller wakes its thread then. The disk is locked.
    pub(super) fn withdraw(&self) {
        self.withdrawn.store(true, Release);
    }

    /// Returns true if the queue must give express up.
    pub(super) fn is_withdrawn(&self) -> bool {
        self.withdrawn.load(Relaxed)
    }

    /// Records that the queue has given it up. The disk is locked.
    pub(super) fn gave_up(&self) {
        self.withdrawn.store(false, Relaxed);
    }

    /// Returns the number of requests that were executed, and of those that are being executed.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.executed.load(Relaxed), self.executing.load(Relaxed))
    }
}

/// The express of a queue.
pub(super) struct QueueExpress {
    /// Present while the queue has express; the device is that of its bios.
    pub(super) extent: Option<ExpressExtent>,
    /// The queue has seen that it must give up.
    pub(super) is_leaving: bool,
    /// Requests in flight.
    executing: u16,
    /// Requests that have ended well. One that failed is executed again in another way.
    executed: u64,
}

impl QueueExpress {
    pub(super) fn new() -> Self {
        Self {
            extent: None,
            is_leaving: false,
            executing: 0,
            executed: 0,
        }
    }

    /// Returns true while requests are in flight.
    pub(super) fn is_busy(&self) -> bool {
        self.executing > 0
    }

    /// Returns true if the queue has express and need not give it up.
    pub(super) fn is_there(&self) -> bool {
        self.extent.is_some() && !self.is_leaving
    }

    /// Counts a request that begins.
    pub(super) fn begins(&mut self) {
        self.executing = self.executing.wrapping_add(1);
    }

    /// Counts a request that has ended.
    pub(super) fn ends(&mut self, well: bool) {
        self.executing = self.executing.wrapping_sub(1);
        self.executed = self.executed.wrapping_add(well.into());
    }

    /// Shows how many requests are executed and were executed.
    pub(super) fn show(&self, signal: &ExpressSignal) {
        signal.executing.store(self.executing.into(), Relaxed);
        signal.executed.store(self.executed, Relaxed);
    }
}
