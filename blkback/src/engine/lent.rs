// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! An engine that its thread lends while it waits: a completion of I/O answers its request in the context in which it comes,
//! and the thread sleeps on.
//!
//! In an interrupt that works for requests of which nothing is left to do but the answer. The task of a process that has
//! executed requests makes a whole pass: it also copies their data to the guest, takes the guest's next requests and finds
//! them posted when it looks for more. Both work only while the thread does not wait for a completion to do something else.
//! All other completions wake the thread.

use crate::engine::backend::{Backend, ReapContext};
use crate::engine::state::Engine;
use crate::ring::grants::Grants;
use crate::ring::shared_ring::SharedRing;

/// The result of [`Engine::answer_completed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct LentAnswers {
    /// The frontend must be sent an event.
    pub notify: bool,
    /// Something is left for the thread.
    pub rest: bool,
    /// Requests taken.
    pub taken: u32,
    /// Requests answered.
    pub answered: u32,
}

impl<R: SharedRing, G: Grants, B: Backend> Engine<'_, R, G, B> {
    /// Returns where [`answer_completed`](Self::answer_completed) may be called while the thread waits. The thread has armed
    /// the frontend's event, for the requests that follow the answers.
    pub fn can_lend(&self) -> ReapContext {
        let requests = &self.requests;
        let may_lend = requests.used() > 0
            && requests.taken.is_empty()
            && requests.completed.is_empty()
            && requests.held.is_empty()
            && !self.transfers.mappings.any_goes()
            && !self.latencies.is_on();
        match self.backend.reap_context() {
            _ if !may_lend => ReapContext::Thread,
            // An interrupt could not begin what waits for its completion.
            ReapContext::Any if !self.is_open() => ReapContext::Thread,
            // Nor could it answer anything where all data is copied.
            ReapContext::Any if !self.transfers.mappings.keeps() => ReapContext::Thread,
            context => context,
        }
    }

    /// Reports whether all I/O goes to a process, whose tasks answer it.
    pub fn is_served_by_tasks(&self) -> bool {
        self.backend.reap_context() == ReapContext::Task
    }

    /// Answers what has completed, in place of the thread. No more is done than there are slots in the ring. Neither sleeps
    /// nor calls the hypervisor if the backend is reaped in any context; then a request of which more is to be done than
    /// to answer it is left to the thread.
    pub fn answer_completed(&mut self) -> LentAnswers {
        match self.backend.reap_context() {
            ReapContext::Any => self.answer_in_interrupt(),
            ReapContext::Task | ReapContext::Thread => self.serve_in_task(),
        }
    }

    fn answer_in_interrupt(&mut self) -> LentAnswers {
        self.clock.begin();
        let left = self.collect_anywhere();
        let answered = self.answer_at_once();
        let requests = &self.requests;
        let rest = left
            || self.ring.is_gone()
            || !requests.completed.is_empty()
            || !requests.taken.is_empty()
            || !requests.held.is_empty();
        LentAnswers {
            notify: answered > 0 && self.publish(),
            rest,
            taken: 0,
            answered,
        }
    }

    /// Makes a pass. The task of a process may sleep and call the hypervisor.
    fn serve_in_task(&mut self) -> LentAnswers {
        let pass = self.pass_for_thread();
        let worth = self.gathering.asleep(self.requests.used());
        LentAnswers {
            notify: pass.notify,
            rest: self.ring.is_gone()
                || pass.again
                || pass.held
                || pass.broken
                || self.is_worth_a_pass(worth),
            taken: pass.taken,
            answered: pass.answered,
        }
    }
}
