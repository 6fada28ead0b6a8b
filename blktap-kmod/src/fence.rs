// SPDX-License-Identifier: GPL-2.0-only

//! The end of a process: the next one gets no request while I/O of this one may still be under way.
//!
//! Its I/O uses the memory of the arena. Direct I/O pins the pages it uses, so it is over when only we refer to a page
//! of the arena; mappings refer to them as well, and they are gone when the node is released. After that the process
//! cannot refer to a page again, so a page that was seen free stays free, and is not checked again. (I/O through
//! buffers of its own is fenced by the lock that the process holds on the image.)
//!
//! If a server executes a process' I/O over a network, the process has declared for how long that I/O may last after
//! its pages are free (`FENCE_SESSION`), because the pages were still in use when the process sent its last data.
//! Without such a time its requests are not executed again (`FENCE_NONE`).

use super::disk::TapDisk;
use crate::fault_injection;
use crate::linux::module::ModuleReference;
use crate::linux::monotonic_ns;
use crate::linux::task::workqueue;
use kernel::sync::Arc;
use kernel::workqueue::{impl_has_delayed_work, WorkItem};

/// Longest pause between two checks. The first pauses are short, because the process has to be replaced soon. A process
/// that has left pages in use elsewhere needs no frequent check.
const LONGEST_MS: u32 = 1000;
/// Pauses of one length; the next ones are four times as long.
const REPEATED: u32 = 32;

impl_has_delayed_work! {
    impl HasDelayedWork<Self> for TapDisk { self.fence }
}

impl TapDisk {
    /// Begins the fence, after the process has closed the node.
    pub(super) fn close(self: &Arc<Self>) {
        {
            let mut inner = self.inner.lock();
            inner.shadow.closed();
            // Its file keeps the module until this returns. The module is not being unloaded then, so the reference is
            // there.
            inner.fencing = ModuleReference::get();
            inner.looks = 0;
            inner.fenced_pages = 0;
            inner.pid = 0;
            inner.wanted = false;
            self.start_waiting();
            // A queue that drains does not wait for a process that is gone.
            inner.wake_queues();
            inner.kick();
        }
        if !self.try_fence() {
            self.look_later();
        }
    }

    /// Schedules the work that checks again. The work does not sleep in between, because no work on its queue does.
    fn look_later(self: &Arc<Self>) {
        let looks = {
            let mut inner = self.inner.lock();
            inner.looks = inner.looks.saturating_add(1);
            inner.looks
        };
        // If it is queued already, that run looks. While it waits the module stays: `fencing` is
        // taken only where the fence ends, after which nothing is queued.
        let _queued = workqueue::enqueue_after(self.clone(), pause_ms(looks));
    }

    /// Ends the fence if all I/O of the process is over.
    fn try_fence(&self) -> bool {
        let (epoch, first) = {
            let inner = self.inner.lock();
            (inner.shadow.epoch(), inner.fenced_pages)
        };
        let referenced = self.areas.arena().first_referenced(first);
        let kept = {
            let mut inner = self.inner.lock();
            if inner.shadow.epoch() != epoch {
                // The fence of that process has ended, and a later one has its own work.
                return true;
            }
            if let Some(page) = referenced.filter(|_| !fault_injection::NO_FENCE) {
                inner.fenced_pages = page;
                return false;
            }
            inner.fenced_pages = self.areas.arena_pages();
            let Some(failed) = inner.shadow.quiet(monotonic_ns()) else {
                return false;
            };
            inner.tell(failed.queues);
            // All waiting requests are checked again, and not all of them need a process.
            self.announce(&mut inner);
            inner.kick();
            inner.fencing.take()
        };
        // Wakes openers that wait for the node.
        self.ready.notify_all();
        drop(kept);
        true
    }
}

impl WorkItem for TapDisk {
    type Pointer = Arc<TapDisk>;

    fn run(this: Arc<TapDisk>) {
        if !this.is_destroyed() && !this.try_fence() {
            this.look_later();
        }
    }
}

/// Returns the milliseconds between one check and the next.
fn pause_ms(looks: u32) -> u32 {
    let steps = looks.wrapping_div(REPEATED).min(8);
    1_u32.wrapping_shl(steps.wrapping_mul(2)).min(LONGEST_MS)
}
