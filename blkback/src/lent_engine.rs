// SPDX-License-Identifier: GPL-2.0-only

//! The engine of a queue whose thread waits, lent to completions: they answer in its place, and the thread sleeps on.

use crate::backing::QueueBackends;
use crate::engine::{Backend, Engine, Grants, ReapContext};
use crate::linux::task::wake_event::{Lending, LentEvent, WaitingWork, WakeEvent};
use crate::linux::xen::guest_mapping::GuestMapping;
use crate::totals::QueueTally;

/// Most requests in flight with which a thread lends its engine while it halts the processor. With more of them, completions
/// gather while the thread, which need not be switched to, answers the first one; interrupts would answer each by itself.
pub(crate) const LENT_IN_HALT: u16 = 8;

/// An engine that is lent while the thread waits.
pub(crate) struct LentEngine<'s, 'e, 'a, D, G, B> {
    engine: &'s mut Engine<'e, &'a GuestMapping, G, B>,
    disk: &'a D,
    /// The size of the disk, in sectors (512 bytes), by which the engine checks requests.
    sectors: u64,
    guest: &'a GuestMapping,
    wake_event: &'s WakeEvent,
    tally: &'s QueueTally,
    calls: u32,
    took: bool,
}

impl<'s, 'e, 'a, D: QueueBackends, G: Grants, B: Backend> LentEngine<'s, 'e, 'a, D, G, B> {
    /// Makes one that is not lent yet. The engine checks requests by the disk's size `sectors`.
    pub(crate) fn new(
        engine: &'s mut Engine<'e, &'a GuestMapping, G, B>,
        (disk, sectors): (&'a D, u64),
        guest: &'a GuestMapping,
        wake_event: &'s WakeEvent,
        tally: &'s QueueTally,
    ) -> Self {
        Self {
            engine,
            disk,
            sectors,
            guest,
            wake_event,
            tally,
            calls: 0,
            took: false,
        }
    }

    /// Returns the engine, for the thread.
    pub(crate) fn engine(&mut self) -> &mut Engine<'e, &'a GuestMapping, G, B> {
        self.engine
    }

    /// Returns how many times it was borrowed.
    pub(crate) fn calls(&self) -> u32 {
        self.calls
    }

    /// Reports whether a borrower took requests, which the event that wakes the thread may have been for.
    pub(crate) fn took(&self) -> bool {
        self.took
    }

    /// Runs `wait`, in which the thread waits, and lends the engine meanwhile if `lends` and that is possible.
    pub(crate) fn while_lent<T>(
        &mut self,
        lends: bool,
        wait: impl FnOnce(LentEvent<'_>) -> T,
    ) -> T {
        let wake_event = self.wake_event;
        let lending = match self.engine.can_lend() {
            ReapContext::Task if lends => Lending::ToTasks,
            ReapContext::Any if lends => Lending::ToAll,
            _ => Lending::Nothing,
        };
        wake_event.lending(self, lending, wait)
    }
}

impl<D: QueueBackends, G: Grants, B: Backend> WaitingWork for LentEngine<'_, '_, '_, D, G, B> {
    fn work(&mut self) -> bool {
        // The guest may know of a new size already, and the thread makes it known to the engine.
        if self.engine.is_served_by_tasks() && self.disk.sectors() != self.sectors {
            return true;
        }
        let answers = self.engine.answer_completed();
        if answers.notify {
            self.guest.notify();
        }
        let traced = self.guest.traced();
        traced.pass(answers.taken, answers.answered, answers.notify);
        let (stats, flight) = (self.engine.stats(), self.engine.flight());
        match answers.taken {
            0 => self.tally.show_answered(stats, flight),
            _ => self.tally.show(stats, flight),
        }
        self.took |= answers.taken > 0;
        self.calls = self.calls.wrapping_add(1);
        answers.rest
    }
}

/// How long a thread may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SleepLength {
    /// For this many nanoseconds at most.
    For(u64),
    /// For a few milliseconds: requests may be in the ring that bring no event.
    Briefly,
    /// For a few seconds. No event announces that a device was resized, so one thread looks now and then; borrowed pages that
    /// are not used are given back; and requests that wait for a process fail when they have waited for too long, also those of
    /// a queue that outlives the first one.
    ForAWhile,
    /// Until it is woken.
    Long,
}

/// Sleeps until woken.
pub(crate) fn sleep(lent: LentEvent<'_>, sleep: SleepLength) {
    match sleep {
        SleepLength::For(nanoseconds) => lent.wait_for(nanoseconds),
        SleepLength::Briefly => lent.wait_briefly(),
        SleepLength::ForAWhile => lent.wait_for_a_while(),
        SleepLength::Long => lent.wait(),
    }
}
