// SPDX-License-Identifier: GPL-2.0-only

//! The module's own work queue: unbound, and usable while memory is being reclaimed.
//!
//! All connecting and disconnecting happens there, so that the xenwatch thread, which serves every
//! backend of the host, is never blocked by one disk.

use core::ptr::NonNull;
use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Acquire, ordering::Release, Atomic};
use kernel::workqueue::{Queue, RawWorkItem};

/// The queue's address; 0 while there is none.
static QUEUE: Atomic<usize> = Atomic::new(0);

/// Owns the work queue; dropping it finishes all work.
///
/// # Invariants
///
/// The pointer is a live work queue, and `QUEUE` holds its address.
pub(crate) struct WorkQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A work queue may be used and destroyed from any thread.
unsafe impl Send for WorkQueue {}
// SAFETY: There is no method that takes `&self`.
unsafe impl Sync for WorkQueue {}

impl WorkQueue {
    /// Makes the queue. Called once, at load. May sleep.
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        let flags = bindings::wq_flags_WQ_UNBOUND | bindings::wq_flags_WQ_MEM_RECLAIM;
        // SAFETY: The format takes one string, which is given.
        let raw = unsafe {
            bindings::alloc_workqueue_noprof(c"%s".as_char_ptr(), flags, 0, name.as_char_ptr())
        };
        let queue = NonNull::new(raw).ok_or(ENOMEM)?;
        QUEUE.store(raw as usize, Release);
        // INVARIANT: Just made and stored.
        Ok(Self(queue))
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        // SAFETY: By the invariant the queue is live. Work that is still queued runs to its end
        // here, and what it queues in turn as well, because `QUEUE` still points to the queue.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
        QUEUE.store(0, Release);
    }
}

/// Queues work on the module's queue; callable from any context. Returns `false` if the work is
/// queued already, or if there is no queue.
pub(crate) fn enqueue<W, const ID: u64>(work: W) -> bool
where
    W: RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    let raw = QUEUE.load(Acquire) as *const bindings::workqueue_struct;
    if raw.is_null() {
        return false;
    }
    // SAFETY: The queue lives until the module's last field is dropped, which is after the driver
    // is unregistered and every thread has ended: nobody is left to call this.
    let queue = unsafe { Queue::from_raw(raw) };
    queue.enqueue(work).is_ok()
}
