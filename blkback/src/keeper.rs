// SPDX-License-Identifier: GPL-2.0-only

//! When a queue gives back the memory that it has borrowed, and lets go of pages of its guest.

use crate::engine::{Backend, Engine, Grants};
use crate::linux::local_clock;
use crate::ring::ports::SharedRing;
use crate::totals::Tally;

/// What was not used for so long is given back, in nanoseconds. A little less than a thread sleeps
/// that has borrowed something.
const UNUSED_NS: u64 = 3_000_000_000;
/// A guest's page that was not used for one to two of these is unmapped, in nanoseconds.
const KEPT_NS: u64 = 15_000_000_000;
/// Passes after which a thread that does not sleep looks whether it owes something.
const PASSES: u32 = 4096;

/// Looks after what one queue has borrowed.
pub(crate) struct Keeper<'a> {
    tally: &'a Tally,
    /// What the statistics say.
    borrowed: u16,
    /// When it was looked last what is not used, of memory and of what is kept mapped.
    looked: u64,
    swept: u64,
    passes: u32,
}

impl<'a> Keeper<'a> {
    /// For a queue that has borrowed nothing.
    pub(crate) fn new(tally: &'a Tally) -> Self {
        let now = local_clock();
        Self {
            tally,
            borrowed: 0,
            looked: now,
            swept: now,
            passes: 0,
        }
    }

    /// Gives back what others have a right to, and what was not used for a while by a queue that never sleeps.
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
            // It may never sleep.
            self.sweep(engine, local_clock());
        }
        if borrows {
            engine.settle(is_turn);
            self.note(engine.borrowed());
        }
    }

    /// Gives back what was not used for a while. Returns whether something is still borrowed or kept, so
    /// that the thread must not sleep for ever.
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

    /// Has pages of the guest unmapped that it has not used for a while, and tries again to map others.
    fn sweep<R: SharedRing, G: Grants, B: Backend>(
        &mut self,
        engine: &mut Engine<'_, R, G, B>,
        now: u64,
    ) {
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

impl Drop for Keeper<'_> {
    fn drop(&mut self) {
        // It goes with the queue.
        self.note(0);
    }
}
