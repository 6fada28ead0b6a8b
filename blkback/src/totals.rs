// SPDX-License-Identifier: GPL-2.0-only

//! The statistics of a disk, as sysfs shows them.
//!
//! They belong to the device, not to a connection: reading them never meets a queue that is being
//! freed, and they never go backwards.

use crate::engine::Stats;
use kernel::sync::atomic::{ordering::Relaxed, Atomic};

/// Number of counters; their order is that of the shim's attributes.
const COUNTERS: usize = 12;

fn values(stats: &Stats) -> [u64; COUNTERS] {
    [
        stats.oo_req,
        stats.rd_req,
        stats.wr_req,
        stats.f_req,
        stats.ds_req,
        stats.rd_sect,
        stats.wr_sect,
        stats.refused,
        stats.failed,
        stats.mapped,
        stats.passes,
        stats.notified,
    ]
}

/// Sums over all queues that the device ever had.
pub(crate) struct Totals {
    counters: [Atomic<u64>; COUNTERS],
    /// Memory that the queues always have, in KiB.
    memory: Atomic<u64>,
    /// Pages that they have borrowed.
    borrowed: Atomic<u64>,
}

impl Totals {
    /// All zero.
    pub(crate) fn new() -> Self {
        Self {
            counters: [const { Atomic::new(0) }; COUNTERS],
            memory: Atomic::new(0),
            borrowed: Atomic::new(0),
        }
    }

    /// Adds what a queue did since `before`.
    pub(crate) fn add(&self, before: &Stats, now: &Stats) {
        let (before, now) = (values(before), values(now));
        for ((counter, before), now) in self.counters.iter().zip(before).zip(now) {
            if before != now {
                counter.add(now.wrapping_sub(before), Relaxed);
            }
        }
    }

    /// Records that a queue has borrowed so many pages, after it had so many.
    pub(crate) fn borrowed(&self, before: u16, now: u16) {
        if before != now {
            let change = u64::from(now).wrapping_sub(u64::from(before));
            self.borrowed.add(change, Relaxed);
        }
    }

    /// Records the memory that the queues always have, in KiB.
    pub(crate) fn set_memory(&self, kib: u64) {
        self.memory.store(kib, Relaxed);
    }

    /// The value of an attribute; 0 if there is no such.
    pub(crate) fn value(&self, index: u32) -> u64 {
        match self.counters.get(index as usize) {
            Some(counter) => counter.load(Relaxed),
            None => {
                let borrowed = self.borrowed.load(Relaxed).wrapping_mul(4);
                self.memory.load(Relaxed).wrapping_add(borrowed)
            }
        }
    }
}
