// SPDX-License-Identifier: GPL-2.0-only

//! Waiting with the processor halted by the queue's own thread.
//!
//! A thread that goes to sleep makes way for the idle task, which halts the processor, that is, gives it to other domains;
//! the next event wakes the thread, and the idle task makes way for it. Where no other task could run, the thread halts
//! the processor itself: for Xen nothing differs, and two switches of tasks and a wake-up are saved, which cost more than
//! a small request.
//!
//! Linux counts the time as time of the thread, so a queue waits in this manner only while its waits are short: it must
//! not look busy while its guest does little. Nor does it where other tasks end its halts ([`HaltEstimator`]).

use crate::halt_estimator::HaltEstimator;
use crate::linux;
use crate::linux::task::wake_event::LentEvent;

/// Waits for a wake-up, if that is worth it. Returns false if the thread has to sleep for that. `start` is the local clock at
/// the beginning of the wait.
pub(crate) fn wait(estimator: &mut HaltEstimator, lent: LentEvent<'_>, start: u64) -> bool {
    let Some(longest) = estimator.begin() else {
        return false;
    };
    loop {
        if lent.halt() {
            estimator.halted(false);
            return true;
        }
        if linux::cpu_is_wanted() {
            estimator.halted(true);
            return false;
        }
        if linux::local_clock().saturating_sub(start) > longest {
            return false;
        }
    }
}
