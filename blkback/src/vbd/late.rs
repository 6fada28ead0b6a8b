// SPDX-License-Identifier: GPL-2.0-only

//! Requests that nobody answers: the kernel's log says so, for who reads it after the host was reset.
//!
//! The queues count for how long the disk has had its oldest request. A queue whose thread sleeps in the block layer
//! cannot look at that, so a work item does.

use super::{Vbd, AGES};
use crate::linux::task::workqueue;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;

/// Milliseconds between two looks.
const LOOK: u32 = 10_000;
/// The age in seconds at which a request is first told of.
const LATE_S: u64 = 30;

/// What was said of requests that are not answered.
pub(super) struct Late {
    /// The age in seconds at which it is said next: twice the one at which it was said last.
    next_s: u64,
}

/// What is to be said.
enum Word {
    /// The oldest request is so many seconds old.
    Waits(u64),
    /// What was told of is answered.
    Answered,
}

impl Late {
    /// Nothing was said.
    pub(super) const NEW: Self = Self { next_s: LATE_S };

    /// Takes in how old the oldest request is now.
    fn look(&mut self, age_s: u64) -> Option<Word> {
        if age_s >= self.next_s {
            self.next_s = age_s.saturating_mul(2);
            return Some(Word::Waits(age_s));
        }
        let was_told = self.next_s != LATE_S;
        if was_told && age_s < LATE_S {
            self.next_s = LATE_S;
            return Some(Word::Answered);
        }
        None
    }
}

impl Vbd {
    /// Looks from time to time how old requests are, as long as there is a connection.
    pub(super) fn watch_for_late(self: &Arc<Self>) {
        // If it is queued already, that is for this.
        let _queued = workqueue::enqueue_about::<_, AGES>(self.clone(), LOOK);
    }

    pub(super) fn look_for_late(self: &Arc<Self>) {
        let mut life = self.life.lock();
        // As at the end of a life.
        if life.connection.is_none() {
            life.late = Late::NEW;
            return;
        }
        let age_s = self.totals.oldest_ns() / 1_000_000_000;
        let word = life.late.look(age_s);
        // Before the lock is left: who ends the life sees to it that none is queued after that.
        self.watch_for_late();
        drop(life);
        match word {
            Some(Word::Waits(age_s)) => self.warn_of(age_s),
            Some(Word::Answered) => self.device.tell(c"the requests that waited are answered"),
            None => {}
        }
    }

    fn warn_of(&self, age_s: u64) {
        let text = CString::try_from_fmt(fmt!(
            "a request has not been answered for {age_s} s, of {} that the disk has: see tap-ctl status",
            self.totals.in_flight()
        ));
        let fallback = c"a request has not been answered for long: see tap-ctl status";
        self.device.warn(text.as_deref().unwrap_or(fallback));
    }
}
