// SPDX-License-Identifier: GPL-2.0-only

//! The statistics of a disk, as sysfs shows them.
//!
//! The statistics belong to the device, not to a connection, so a read never meets a queue that is being freed, and the
//! counters never go backwards.

use crate::engine::timing::latency::{ROWS, STEPS};
use crate::engine::{Latencies, QueueLoad, Stats, Times};
use crate::linux::memory::vectors::{filled, push};
use crate::linux::monotonic_ns;
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::atomic::{ordering::Relaxed, Atomic, AtomicFlag};
use kernel::sync::{new_mutex, Arc, Mutex};

/// Number of counts of latencies: a histogram for each operation and each span.
const LATENCIES: usize = ROWS * STEPS;
/// Number of counters; their order is that of the shim's attributes.
const COUNTERS: usize = 23;
// Places of some of them.
const READS: u32 = 1;
const WRITES: u32 = 2;
const FLUSHES: u32 = 3;
const DISCARDS: u32 = 4;
const SECTORS_READ: u32 = 5;
const SECTORS_WRITTEN: u32 = 6;
const REFUSED: u32 = 7;
const FAILED: u32 = 8;
const PASSES: u32 = 10;
const NOTIFIED: u32 = 11;
const READ_DONE: u32 = 12;
const READ_NS: u32 = 13;
const WRITE_DONE: u32 = 14;
const WRITE_NS: u32 = 15;
const PAGE_WAIT: u32 = 20;
const RING_FULL: u32 = 22;
// Attributes that follow the counters there, and are no counters.
const MEMORY_KIB: usize = COUNTERS;
const IN_FLIGHT: usize = COUNTERS + 1;
const OLDEST_NS: usize = COUNTERS + 2;
const KEPT_PAGES: usize = COUNTERS + 3;
const RING_SLOTS: usize = COUNTERS + 4;

fn values(stats: &Stats) -> [u64; COUNTERS] {
    let Times {
        read,
        write,
        flush,
        discard,
    } = stats.times;
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
        read.done,
        read.ns,
        write.done,
        write.ns,
        flush.done,
        flush.ns,
        discard.done,
        discard.ns,
        stats.page_wait_ns,
        stats.pieces,
        stats.ring_full,
    ]
}

/// A value that its queue shows. Each access to one of the kernel's atomics is a call of a function, and these are all
/// stored before each sleep; they order no other memory.
struct ShownValue(AtomicU64);

impl ShownValue {
    const fn zero() -> Self {
        Self(AtomicU64::new(0))
    }

    #[inline]
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    #[inline]
    fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// Counters and present state of one queue; only its thread writes them, or a borrower in its place.
struct Counters {
    counters: [ShownValue; COUNTERS],
    in_flight: ShownValue,
    /// When the disk got the oldest request in flight, in nanoseconds; 0 if the disk has none.
    oldest: ShownValue,
    /// Pages of the guest that stay mapped.
    kept: ShownValue,
    /// Requests for which its ring has room.
    slots: u16,
    /// By operation and span, then by step.
    latencies: KVec<Atomic<u64>>,
}

impl Counters {
    /// Makes the counters of a queue whose ring has `slots` slots, all zero.
    fn new(slots: u16) -> Result<Self> {
        let mut latencies = KVec::with_capacity(LATENCIES, GFP_KERNEL)?;
        for _ in 0..LATENCIES {
            push(&mut latencies, Atomic::new(0))?;
        }
        Ok(Self {
            counters: [const { ShownValue::zero() }; COUNTERS],
            in_flight: ShownValue::zero(),
            oldest: ShownValue::zero(),
            kept: ShownValue::zero(),
            slots,
            latencies,
        })
    }
}

/// Counters and present state of a queue, for a reader.
pub(crate) struct QueueView {
    /// Reads, writes, flushes, and discards that the guest requested.
    pub(crate) asked: [u64; 4],
    /// Passes over the ring, those that found it full, and events sent to the guest.
    pub(crate) passes: u64,
    pub(crate) ring_full: u64,
    pub(crate) notified: u64,
    /// Requests that are taken and not answered.
    pub(crate) in_flight: u64,
    /// Nanoseconds for which the disk has had the oldest of them; 0 if it has none.
    pub(crate) oldest_ns: u64,
    /// Nanoseconds for which requests waited for pages.
    pub(crate) page_wait_ns: u64,
    /// Pages of the guest that stay mapped.
    pub(crate) kept: u64,
}

impl Counters {
    fn value(&self, index: u32) -> u64 {
        let counter = self.counters.get(index as usize);
        counter.map_or(0, ShownValue::get)
    }

    fn view(&self) -> QueueView {
        let oldest = self.oldest.get();
        let waits = |start| monotonic_ns().saturating_sub(start);
        QueueView {
            asked: [READS, WRITES, FLUSHES, DISCARDS].map(|index| self.value(index)),
            passes: self.value(PASSES),
            ring_full: self.value(RING_FULL),
            notified: self.value(NOTIFIED),
            in_flight: self.in_flight.get(),
            oldest_ns: if oldest == 0 { 0 } else { waits(oldest) },
            page_wait_ns: self.value(PAGE_WAIT),
            kept: self.kept.get(),
        }
    }
}

/// The queues of a device, and the sums of those that it had before.
struct Queues {
    now: KVec<Arc<Counters>>,
    past: [u64; COUNTERS],
    past_latencies: KVec<u64>,
}

/// Sums over all queues that the device ever had. A reader computes them.
#[pin_data]
pub(crate) struct Totals {
    #[pin]
    queues: Mutex<Queues>,
    /// Memory that the queues always have, in KiB.
    memory: Atomic<u64>,
    /// Pages that they have borrowed.
    borrowed: Atomic<u64>,
    /// True while the queues count how long I/O takes.
    measures: AtomicFlag,
}

impl Totals {
    /// Makes the statistics of a device, all zero. May sleep.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let none = Queues {
            now: KVec::new(),
            past: [0; COUNTERS],
            past_latencies: filled(0, LATENCIES)?,
        };
        let totals = pin_init!(Self {
            queues <- new_mutex!(none, "Totals::queues"),
            memory: Atomic::new(0),
            borrowed: Atomic::new(0),
            measures: AtomicFlag::new(false),
        });
        Arc::pin_init(totals, GFP_KERNEL)
    }

    /// Adds a queue. Readers of sysfs wait for the lock, so memory is allocated without it. May sleep.
    fn add(&self, counters: &Arc<Counters>) -> Result {
        let mut room = self.queues.lock().now.len();
        loop {
            room = room.wrapping_add(1);
            let mut now = KVec::with_capacity(room, GFP_KERNEL)?;
            let mut queues = self.queues.lock();
            if queues.now.len() >= room {
                // Another queue came.
                room = queues.now.len();
                continue;
            }
            for queue in &queues.now {
                push(&mut now, queue.clone())?;
            }
            push(&mut now, counters.clone())?;
            let before = core::mem::replace(&mut queues.now, now);
            drop(queues);
            // Not under the lock either.
            drop(before);
            return Ok(());
        }
    }

    /// Reports whether the queues count how long I/O takes.
    pub(crate) fn measures(&self) -> bool {
        self.measures.load(Relaxed)
    }

    /// Switches counting on or off.
    pub(crate) fn measure(&self, on: bool) {
        self.measures.store(on, Relaxed);
    }

    /// Returns how many I/Os of each operation, and requests in each span, took as long as this step, while counting
    /// was on.
    pub(crate) fn latencies(&self, step: usize) -> [u64; ROWS] {
        let queues = self.queues.lock();
        let mut sums = [0; ROWS];
        for (row, sum) in sums.iter_mut().enumerate() {
            let place = row.wrapping_mul(STEPS).wrapping_add(step);
            let past = queues.past_latencies.get(place).copied();
            let now = queues.now.iter();
            let now = now.filter_map(|queue| queue.latencies.get(place));
            let add = |sum: u64, count: &Atomic<u64>| sum.wrapping_add(count.load(Relaxed));
            *sum = now.fold(past.unwrap_or(0), add);
        }
        sums
    }

    /// Passes the counters of each queue, in order, to `tell` until that fails.
    pub(crate) fn each_queue<E>(
        &self,
        tell: impl FnMut(QueueView) -> Result<(), E>,
    ) -> Result<(), E> {
        let queues = self.queues.lock();
        let mut views = queues.now.iter().map(|queue| queue.view());
        views.try_for_each(tell)
    }

    /// Records the memory that the queues always have, in KiB.
    pub(crate) fn set_memory(&self, kib: u64) {
        self.memory.store(kib, Relaxed);
    }

    /// Returns for how many nanoseconds the disk has had its oldest request; 0 if it has none. May sleep.
    pub(crate) fn oldest_ns(&self) -> u64 {
        // CAST: a small constant.
        self.value(OLDEST_NS as u32)
    }

    /// Returns the number of requests that are taken and not answered. May sleep.
    pub(crate) fn in_flight(&self) -> u64 {
        // CAST: a small constant.
        self.value(IN_FLIGHT as u32)
    }

    /// Returns a summary of the device's work, in words.
    pub(crate) fn summary(&self) -> Result<CString> {
        let of = |index| self.value(index);
        CString::try_from_fmt(fmt!(
            "disconnected: reads {} of {} sectors, writes {} of {} sectors, flushes {}, discards {}, failed {}, refused {}",
            of(READS),
            of(SECTORS_READ),
            of(WRITES),
            of(SECTORS_WRITTEN),
            of(FLUSHES),
            of(DISCARDS),
            of(FAILED),
            of(REFUSED),
        ))
    }

    /// Returns the value of an attribute; 0 if there is no such attribute.
    pub(crate) fn value(&self, index: u32) -> u64 {
        let index = index as usize;
        let queues = self.queues.lock();
        let sum = |sum: u64, counter: &ShownValue| sum.wrapping_add(counter.get());
        let now = queues.now.iter();
        match (queues.past.get(index), index) {
            (Some(past), _) => now
                .filter_map(|queue| queue.counters.get(index))
                .fold(*past, sum),
            (None, MEMORY_KIB) => {
                let borrowed = self.borrowed.load(Relaxed).wrapping_mul(4);
                self.memory.load(Relaxed).wrapping_add(borrowed)
            }
            (None, KEPT_PAGES) => now.map(|queue| &queue.kept).fold(0, sum),
            (None, RING_SLOTS) => now.fold(0, |sum, queue| sum.wrapping_add(queue.slots.into())),
            (None, IN_FLIGHT) => now.map(|queue| &queue.in_flight).fold(0, sum),
            (None, OLDEST_NS) => {
                let starts = now.map(|queue| queue.oldest.get());
                let oldest = starts.filter(|start| *start != 0).min();
                oldest.map_or(0, |start| monotonic_ns().saturating_sub(start))
            }
            (None, _) => 0,
        }
    }
}

/// A queue's part of its device's statistics. Its counts stay when it is dropped.
pub(crate) struct QueueTally {
    totals: Arc<Totals>,
    counters: Arc<Counters>,
}

impl QueueTally {
    /// Makes the part of a queue whose ring has `slots` slots, all zero. May sleep.
    pub(crate) fn new(totals: &Arc<Totals>, slots: u16) -> Result<Self> {
        let counters = Arc::new(Counters::new(slots)?, GFP_KERNEL)?;
        totals.add(&counters)?;
        Ok(Self {
            totals: totals.clone(),
            counters,
        })
    }

    /// Shows the queue's present counters and state.
    #[inline]
    pub(crate) fn show(&self, stats: &Stats, flight: QueueLoad) {
        let shown = &*self.counters;
        for (counter, now) in shown.counters.iter().zip(values(stats)) {
            counter.set(now);
        }
        shown.in_flight.set(flight.requests.into());
        shown.oldest.set(flight.oldest.unwrap_or(0));
        shown.kept.set(flight.kept.into());
    }

    /// Shows what answers change while the queue's thread waits: the thread does not show it before it wakes.
    #[inline]
    pub(crate) fn show_answered(&self, stats: &Stats, flight: QueueLoad) {
        let shown = &*self.counters;
        let Times { read, write, .. } = stats.times;
        let changed = [
            (NOTIFIED, stats.notified),
            (READ_DONE, read.done),
            (READ_NS, read.ns),
            (WRITE_DONE, write.done),
            (WRITE_NS, write.ns),
        ];
        for (index, now) in changed {
            if let Some(counter) = shown.counters.get(index as usize) {
                counter.set(now);
            }
        }
        shown.in_flight.set(flight.requests.into());
        shown.oldest.set(flight.oldest.unwrap_or(0));
    }

    /// Returns the place where the queue shows an I/O that begins.
    pub(crate) fn begun(&self) -> Begun {
        Begun(self.counters.clone())
    }

    /// Reports whether to count how long I/O takes.
    #[inline]
    pub(crate) fn measures(&self) -> bool {
        self.totals.measures()
    }

    /// Shows how long I/O took until now.
    #[inline(never)]
    pub(crate) fn show_latencies(&self, latencies: &Latencies) {
        let counts = latencies.counts().iter().flatten();
        for (counter, now) in self.counters.latencies.iter().zip(counts) {
            counter.store(*now, Relaxed);
        }
    }

    /// Records that the queue has `now` borrowed pages, after it had `before`.
    pub(crate) fn borrowed(&self, before: u16, now: u16) {
        if before != now {
            let change = u64::from(now).wrapping_sub(u64::from(before));
            self.totals.borrowed.add(change, Relaxed);
        }
    }
}

/// The place where a queue shows an I/O before it may sleep in the backend.
pub(crate) struct Begun(Arc<Counters>);

impl Begun {
    /// Shows an I/O that is about to be given to the disk, if none was shown: the thread may sleep there, and shows no
    /// more until it wakes.
    #[inline]
    pub(crate) fn show(&self, since: u64) {
        if self.0.oldest.get() == 0 {
            self.0.oldest.set(since);
            self.0.in_flight.set(1);
        }
    }
}

impl Drop for QueueTally {
    fn drop(&mut self) {
        // In one step under the lock, so that a reader's sums never go back.
        let mut queues = self.totals.queues.lock();
        let ours = |queue: &Arc<Counters>| Arc::ptr_eq(queue, &self.counters);
        let place = (0..queues.now.len()).find(|at| queues.now.get(*at).is_some_and(ours));
        let _removed = place.map(|at| queues.now.remove(at));
        for (past, counter) in queues.past.iter_mut().zip(&self.counters.counters) {
            *past = past.wrapping_add(counter.get());
        }
        let latencies = self.counters.latencies.iter();
        for (past, counter) in queues.past_latencies.iter_mut().zip(latencies) {
            *past = past.wrapping_add(counter.load(Relaxed));
        }
    }
}
