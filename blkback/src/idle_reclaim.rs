// SPDX-License-Identifier: GPL-2.0-only

//! When a queue gives back the memory that it has borrowed, and unmaps pages of its guest.

use crate::engine::{Backend, Engine, Grants};
use crate::linux::local_clock;
use crate::mapping_room;
use crate::ring::shared_ring::SharedRing;
use crate::totals::QueueTally;

/// Nanoseconds after which unused borrowed memory is given back. It is a little less than a thread with borrowed memory
/// sleeps.
const UNUSED_NS: u64 = 3_000_000_000;
/// Nanoseconds between two sweeps: a guest's page that was not used for one to two of them is unmapped.
const KEPT_NS: u64 = 15_000_000_000;
/// Passes after which a thread that does not sleep checks whether it must give memory back.
const PASSES: u32 = 4096;

/// Looks after what one queue has borrowed.
pub(crate) struct IdleReclaim<'a> {
    tally: &'a QueueTally,
    /// Borrowed pages that the statistics show.
    borrowed: u16,
    /// Nanoseconds of the local clock at the last check for unused memory, and at the last sweep of mappings.
    looked: u64,
    swept: u64,
    passes: u32,
    /// The value of [`mapping_room::wanted`] that this queue has acted on.
    wanted: u32,
}

impl<'a> IdleReclaim<'a> {
    /// Begins for a queue that has borrowed nothing.
    pub(crate) fn new(tally: &'a QueueTally) -> Self {
        let now = local_clock();
        Self {
            tally,
            borrowed: 0,
            looked: now,
            swept: now,
            passes: 0,
            wanted: mapping_room::wanted(),
        }
    }

    /// Gives back memory that other queues have a right to. Every [`PASSES`] passes it also unmaps unused pages,
    /// because a busy queue never sleeps.
    #[inline]
    pub(crate) fn after_pass<R: SharedRing, G: Grants, B: Backend>(
        &mut self,
        engine: &mut Engine<'_, R, G, B>,
    ) {
        let borrows = engine.borrowed() > 0 || self.borrowed > 0;
        if !borrows && !engine.wants_sweep() {
            return;
        }
        self.passes = self.passes.wrapping_add(1);
        let is_turn = self.passes % PASSES == 0;
        if is_turn {
            // The thread may never sleep, so `before_sleep` may never sweep.
            self.sweep(engine, local_clock());
        }
        if borrows {
            engine.settle(is_turn);
            self.note(engine.borrowed());
        }
    }

    /// Gives back memory that was not used for a while. Returns true if pages are still borrowed or kept mapped, so
    /// that the thread must not sleep without a time limit.
    pub(crate) fn before_sleep<R: SharedRing, G: Grants, B: Backend>(
        &mut self,
        engine: &mut Engine<'_, R, G, B>,
        now: u64,
    ) -> bool {
        if engine.borrowed() > 0 && now.saturating_sub(self.looked) > UNUSED_NS {
            self.looked = now;
            let left = engine.tidy();
            self.note(left);
        }
        self.sweep(engine, now);
        engine.borrowed() > 0 || engine.kept() > 0
    }

    /// Unmaps pages of the guest that it has not used for a while, and permits others to be mapped again. Unmaps all
    /// pages that no request uses if another queue needs room for its ring.
    fn sweep<R: SharedRing, G: Grants, B: Backend>(
        &mut self,
        engine: &mut Engine<'_, R, G, B>,
        now: u64,
    ) {
        let wanted = mapping_room::wanted();
        if wanted != self.wanted {
            self.wanted = wanted;
            self.swept = now;
            engine.make_room();
            return;
        }
        if engine.wants_sweep() && now.saturating_sub(self.swept) > KEPT_NS {
            self.swept = now;
            let _left = engine.sweep(false);
        }
    }

    fn note(&mut self, now: u16) {
        self.tally.borrowed(self.borrowed, now);
        self.borrowed = now;
    }
}

impl Drop for IdleReclaim<'_> {
    fn drop(&mut self) {
        // The borrowed memory goes with the queue.
        self.note(0);
    }
}
