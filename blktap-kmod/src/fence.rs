// SPDX-License-Identifier: GPL-2.0-only

//! The end of a process: nothing is delivered to the next one while I/O of this one may go on.
//!
//! What its I/O reads and writes is the arena. Direct I/O pins the pages it uses, so it is over
//! when nobody but us refers to a page of the arena; mappings refer to them as well, and they are
//! gone when the node is released. After that nobody of the process can refer to a page again, so one
//! that was seen free stays free, and is not looked at again. (I/O through buffers of its own is fenced by
//! the lock that the process holds on the image.)
//!
//! A process whose I/O somebody else executes, over a network, has said for how long that may go on
//! after that (`FENCE_SESSION`): what was sent last was sent when its page was still in use. If nobody
//! knows, what it had is not executed again (`FENCE_NONE`).

use super::disk::TapDisk;
use crate::linux::module::ModuleReference;
use crate::linux::monotonic_ns;
use crate::linux::task::workqueue;
use crate::planted;
use kernel::sync::Arc;
use kernel::workqueue::{impl_has_delayed_work, WorkItem};

/// The first pauses are short, because a process is to be replaced soon. One that has left pages
/// where somebody holds on to them is not worth looking often.
const LONGEST_MS: u32 = 1000;
/// Pauses of one length; the next ones are four times as long.
const REPEATED: u32 = 32;

impl_has_delayed_work! {
    impl HasDelayedWork<Self> for TapDisk { self.fence }
}

impl TapDisk {
    /// The process is gone.
    pub(super) fn close(self: &Arc<Self>) {
        {
            let mut inner = self.inner.lock();
            inner.shadow.closed();
            // Its file keeps the module until this returns. It is not going, so there is one.
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

    /// Has the work look again. It does not wait in between, as nothing on its queue does.
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
            if let Some(page) = referenced.filter(|_| !planted::NO_FENCE) {
                inner.fenced_pages = page;
                return false;
            }
            inner.fenced_pages = self.areas.arena_pages();
            let Some(failed) = inner.shadow.quiet(monotonic_ns()) else {
                return false;
            };
            inner.tell(failed.queues);
            // All that waits is looked at again, and not all of it needs a process.
            self.announce(&mut inner);
            inner.kick();
            inner.fencing.take()
        };
        // Whoever waits to open the node.
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

/// Milliseconds between one look and the next.
fn pause_ms(looks: u32) -> u32 {
    let steps = looks.wrapping_div(REPEATED).min(8);
    1_u32.wrapping_shl(steps.wrapping_mul(2)).min(LONGEST_MS)
}
