// SPDX-License-Identifier: GPL-2.0-only

//! The engine of a queue whose thread waits, lent to completions: they answer in its place, and the thread sleeps on.

use crate::engine::{Backend, Engine, Grants, ReapContext};
use crate::linux::task::wake_event::{Lending, LentEvent, WaitingWork, WakeEvent};
use crate::linux::xen::guest_mapping::GuestMapping;
use crate::totals::QueueTally;

/// Most requests in flight with which a thread lends its engine while it halts the processor. With more of them, completions
/// gather while the thread, which need not be switched to, answers the first one; interrupts would answer each by itself.
pub(crate) const LENT_IN_HALT: u16 = 8;

/// An engine that is lent while the thread waits.
pub(crate) struct LentEngine<'s, 'e, 'a, G, B> {
    engine: &'s mut Engine<'e, &'a GuestMapping, G, B>,
    guest: &'a GuestMapping,
    wake_event: &'s WakeEvent,
    tally: &'s QueueTally,
    calls: u32,
}

impl<'s, 'e, 'a, G: Grants, B: Backend> LentEngine<'s, 'e, 'a, G, B> {
    /// Makes one that is not lent yet.
    pub(crate) fn new(
        engine: &'s mut Engine<'e, &'a GuestMapping, G, B>,
        guest: &'a GuestMapping,
        wake_event: &'s WakeEvent,
        tally: &'s QueueTally,
    ) -> Self {
        Self {
            engine,
            guest,
            wake_event,
            tally,
            calls: 0,
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

impl<G: Grants, B: Backend> WaitingWork for LentEngine<'_, '_, '_, G, B> {
    fn work(&mut self) -> bool {
        let answers = self.engine.answer_completed();
        if answers.notify {
            self.guest.notify();
        }
        let traced = self.guest.traced();
        traced.pass(0, answers.answered, answers.notify);
        let (stats, flight) = (self.engine.stats(), self.engine.flight());
        self.tally.show_answered(stats, flight);
        self.calls = self.calls.wrapping_add(1);
        answers.rest
    }
}

/// Sleeps until woken, for `pause` nanoseconds at most if there is one. `looks` means that the thread must not sleep without a
/// limit: no event announces that a device was resized, so one thread looks now and then; borrowed pages that are not used are
/// given back; and requests that wait for a process fail when they have waited for too long, also those of a queue that
/// outlives the first one.
pub(crate) fn sleep(lent: LentEvent<'_>, pause: Option<u64>, looks: bool) {
    match pause {
        Some(pause) => lent.wait_for(pause),
        None if looks => lent.wait_for_a_while(),
        None => lent.wait(),
    }
}
