// SPDX-License-Identifier: GPL-2.0-only

//! Reports unanswered requests in the kernel's log, for a reader after the host was reset.
//!
//! Each queue shows since when the disk has had its oldest request. A queue whose thread sleeps in the block layer
//! cannot check that, so a work item does.

use super::{Vbd, AGES};
use crate::linux::task::workqueue;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;

/// Milliseconds between two checks.
const LOOK: u32 = 10_000;
/// The age in seconds at which a request is reported first.
const LATE_S: u64 = 30;

/// State of the reports of unanswered requests.
pub(super) struct StallWatch {
    /// The age in seconds at which the next report is made: twice the age of the last one.
    next_s: u64,
}

/// A report to make.
enum Word {
    /// The oldest request is this number of seconds old.
    Waits(u64),
    /// The requests that were reported are answered.
    Answered,
}

impl StallWatch {
    /// No report was made.
    pub(super) const NEW: Self = Self { next_s: LATE_S };

    /// Takes the present age of the oldest request, and returns the report to make.
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
    /// Checks the age of requests from time to time, while there is a connection.
    pub(super) fn watch_for_late(self: &Arc<Self>) {
        // Already queued is fine.
        let _queued = workqueue::enqueue_about::<_, AGES>(self.clone(), LOOK);
    }

    pub(super) fn look_for_late(self: &Arc<Self>) {
        let mut life = self.life.lock();
        // No connection, as at the end of a life.
        if life.connection.is_none() {
            life.stalls = StallWatch::NEW;
            return;
        }
        let age_s = self.totals.oldest_ns() / 1_000_000_000;
        let word = life.stalls.look(age_s);
        // Queued under the lock, because the end of the life makes sure that none is queued after it.
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
            "a request has not been answered for {age_s} s, of {} that the disk has: see `tap-ctl status`",
            self.totals.in_flight()
        ));
        let fallback = c"a request has not been answered for long: see `tap-ctl status`";
        self.device.warn(text.as_deref().unwrap_or(fallback));
    }
}
