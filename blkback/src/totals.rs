// SPDX-License-Identifier: GPL-2.0-only

//! The statistics of a disk, as sysfs shows them.
//!
//! They belong to the device, not to a connection: reading them never meets a queue that is being
//! freed, and they never go backwards.

use crate::engine::Stats;
use crate::linux::memory::vectors::push;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Relaxed, Atomic};
use kernel::sync::{new_mutex, Arc, Mutex};

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

/// What one queue has counted; only its thread writes it.
struct Counters([Atomic<u64>; COUNTERS]);

/// The queues of a device, and the sums of those that it had before.
struct Queues {
    now: KVec<Arc<Counters>>,
    past: [u64; COUNTERS],
}

/// Sums over all queues that the device ever had. They are made by who reads them.
#[pin_data]
pub(crate) struct Totals {
    #[pin]
    queues: Mutex<Queues>,
    /// Memory that the queues always have, in KiB.
    memory: Atomic<u64>,
    /// Pages that they have borrowed.
    borrowed: Atomic<u64>,
}

impl Totals {
    /// All zero.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let none = Queues {
            now: KVec::new(),
            past: [0; COUNTERS],
        };
        let totals = pin_init!(Self {
            queues <- new_mutex!(none, "Totals::queues"),
            memory: Atomic::new(0),
            borrowed: Atomic::new(0),
        });
        Arc::pin_init(totals, GFP_KERNEL)
    }

    /// Records the memory that the queues always have, in KiB.
    pub(crate) fn set_memory(&self, kib: u64) {
        self.memory.store(kib, Relaxed);
    }

    /// The value of an attribute; 0 if there is no such.
    pub(crate) fn value(&self, index: u32) -> u64 {
        let index = index as usize;
        let queues = self.queues.lock();
        let Some(past) = queues.past.get(index) else {
            let borrowed = self.borrowed.load(Relaxed).wrapping_mul(4);
            return self.memory.load(Relaxed).wrapping_add(borrowed);
        };
        let now = queues.now.iter().filter_map(|queue| queue.0.get(index));
        now.fold(*past, |sum, counter| {
            sum.wrapping_add(counter.load(Relaxed))
        })
    }
}

/// A queue's part of its device's statistics. When it goes, what it has counted stays.
pub(crate) struct Tally {
    totals: Arc<Totals>,
    counters: Arc<Counters>,
}

impl Tally {
    /// Of a queue that has counted nothing. May sleep.
    pub(crate) fn new(totals: &Arc<Totals>) -> Result<Self> {
        let counters = Arc::new(Counters([const { Atomic::new(0) }; COUNTERS]), GFP_KERNEL)?;
        let mut queues = totals.queues.lock();
        let mut now = KVec::with_capacity(queues.now.len().wrapping_add(1), GFP_KERNEL)?;
        for queue in &queues.now {
            push(&mut now, queue.clone())?;
        }
        push(&mut now, counters.clone())?;
        queues.now = now;
        drop(queues);
        Ok(Self {
            totals: totals.clone(),
            counters,
        })
    }

    /// Shows what the queue has counted until now.
    #[inline]
    pub(crate) fn show(&self, stats: &Stats) {
        for (counter, now) in self.counters.0.iter().zip(values(stats)) {
            counter.store(now, Relaxed);
        }
    }

    /// Records that the queue has borrowed so many pages, after it had so many.
    pub(crate) fn borrowed(&self, before: u16, now: u16) {
        if before != now {
            let change = u64::from(now).wrapping_sub(u64::from(before));
            self.totals.borrowed.add(change, Relaxed);
        }
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        // In one step for who reads: sums never go back.
        let mut queues = self.totals.queues.lock();
        let ours = |queue: &Arc<Counters>| Arc::ptr_eq(queue, &self.counters);
        let place = (0..queues.now.len()).find(|at| queues.now.get(*at).is_some_and(ours));
        let _removed = place.map(|at| queues.now.remove(at));
        for (past, counter) in queues.past.iter_mut().zip(&self.counters.0) {
            *past = past.wrapping_add(counter.load(Relaxed));
        }
    }
}
