// SPDX-License-Identifier: GPL-2.0-only

//! The module's own work queues: unbound, and usable while memory is being reclaimed.
//!
//! All connecting and disconnecting happens there, so that one disk never blocks the xenwatch thread, which serves
//! every backend of the host. There are two queues, because a worker that waits is not available for other work: work
//! that may wait for storage runs on one queue, and work on the other queue waits only for xenstore and the hypervisor.
//! A file that the kernel serves has a queue of its own.
//!
//! Wraps `alloc_workqueue`, `destroy_workqueue` and `mod_delayed_work` (include/linux/workqueue.h); the works are those
//! of `kernel::workqueue`, which can queue but makes no queues.

use core::ptr::NonNull;
use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Acquire, ordering::Release, Atomic};
use kernel::workqueue::{Queue, RawDelayedWorkItem, RawWorkItem};

/// Addresses of both queues; 0 while there is no queue.
static STEPS: Atomic<usize> = Atomic::new(0);
static STORAGE: Atomic<usize> = Atomic::new(0);

/// A work queue; dropping it finishes all work.
///
/// # Invariants
///
/// `raw` is a live work queue.
pub(in crate::linux) struct OwnQueue {
    raw: NonNull<bindings::workqueue_struct>,
}

// SAFETY: A work queue may be used and destroyed from any thread.
unsafe impl Send for OwnQueue {}
// SAFETY: As above.
unsafe impl Sync for OwnQueue {}

impl OwnQueue {
    /// Makes a queue for work that calls file systems, at most `most` at once. May sleep.
    ///
    /// The queue has no rescuer thread for times without memory, because the work of a queue with one must not wait for
    /// queues without one, which file systems do (`xfs-sync`). The queues of loop devices are made the same way.
    pub(in crate::linux) fn for_files(name: &'static CStr, most: u16) -> Result<Self> {
        Self::new(name, most.into(), bindings::wq_flags_WQ_UNBOUND)
    }

    fn new(
        name: &'static CStr,
        most: kernel::ffi::c_int,
        flags: bindings::wq_flags,
    ) -> Result<Self> {
        // SAFETY: The format takes one string, which is given.
        let raw = unsafe {
            bindings::alloc_workqueue_noprof(c"%s".as_char_ptr(), flags, most, name.as_char_ptr())
        };
        // INVARIANT: Just made.
        NonNull::new(raw).map(|raw| Self { raw }).ok_or(ENOMEM)
    }

    /// Queues a work; callable from any context.
    ///
    /// # Safety
    ///
    /// The work is initialised, is queued nowhere, and lives until it has run.
    pub(in crate::linux) unsafe fn enqueue(&self, work: *mut bindings::work_struct) {
        let any = bindings::wq_misc_consts_WORK_CPU_UNBOUND as kernel::ffi::c_int;
        // SAFETY: By the type invariant, and the caller keeps the rest.
        let _first = unsafe { bindings::queue_work_on(any, self.raw.as_ptr(), work) };
    }
}

impl Drop for OwnQueue {
    fn drop(&mut self) {
        // SAFETY: By the invariant the queue is live. Work that is still queued runs to its end here.
        unsafe { bindings::destroy_workqueue(self.raw.as_ptr()) };
    }
}

/// A queue that the whole module can find.
///
/// # Invariants
///
/// `place` holds its address.
struct WorkQueue {
    // First field, so that work which queues other work finds the queue until it is gone.
    _queue: OwnQueue,
    _place: QueueAddress,
}

/// The address of a queue; dropping this removes the address.
struct QueueAddress(&'static Atomic<usize>);

impl Drop for QueueAddress {
    fn drop(&mut self) {
        self.0.store(0, Release);
    }
}

impl WorkQueue {
    fn new(name: &'static CStr, place: &'static Atomic<usize>) -> Result<Self> {
        // As many workers as the kernel allows: those that wait for storage do it for long.
        let most = bindings::wq_consts_WQ_MAX_ACTIVE as kernel::ffi::c_int;
        let flags = bindings::wq_flags_WQ_UNBOUND | bindings::wq_flags_WQ_MEM_RECLAIM;
        let queue = OwnQueue::new(name, most, flags)?;
        place.store(queue.raw.as_ptr() as usize, Release);
        // INVARIANT: Just stored.
        Ok(Self {
            _queue: queue,
            _place: QueueAddress(place),
        })
    }
}

/// Both queues; the module holds them while it is loaded. Work that may wait for storage holds a reference to the
/// module (`ModuleReference`), so dropping them waits for no storage.
pub(crate) struct WorkQueues {
    _storage: WorkQueue,
    _steps: WorkQueue,
}

impl WorkQueues {
    /// Makes the queues. Called once, at load. May sleep.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            _storage: WorkQueue::new(c"xen-blkback-rs-storage", &STORAGE)?,
            _steps: WorkQueue::new(c"xen-blkback-rs", &STEPS)?,
        })
    }
}

fn with<R>(place: &Atomic<usize>, body: impl FnOnce(&Queue) -> R) -> Option<R> {
    let raw = place.load(Acquire) as *const bindings::workqueue_struct;
    if raw.is_null() {
        return None;
    }
    // SAFETY: The queue lives until the module's last field is dropped, which is after the driver is unregistered and
    // every thread has ended: no code is left to call this.
    Some(body(unsafe { Queue::from_raw(raw) }))
}

/// Queues work that waits for no storage; callable from any context. Returns `false` if the work
/// is queued already, or if there is no queue.
pub(crate) fn enqueue<W, const ID: u64>(work: W) -> bool
where
    W: RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    with(&STEPS, |queue| queue.enqueue(work).is_ok()) == Some(true)
}

/// Queues work that may wait for storage, without limit if the storage hangs. Otherwise like [`enqueue`].
pub(crate) fn enqueue_storage<W, const ID: u64>(work: W) -> bool
where
    W: RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    with(&STORAGE, |queue| queue.enqueue(work).is_ok()) == Some(true)
}

/// Queues work as [`enqueue`] does, to run after `milliseconds`. Work that is queued for an earlier time keeps that
/// time.
pub(crate) fn enqueue_after<W, const ID: u64>(work: W, milliseconds: u32) -> bool
where
    W: RawDelayedWorkItem<ID> + RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    enqueue_in(work, jiffies(milliseconds))
}

/// Queues work as [`enqueue_after`] does, to run after about `milliseconds`: the time is rounded, so that a sleeping
/// processor is woken once for all such work.
pub(crate) fn enqueue_about<W, const ID: u64>(work: W, milliseconds: u32) -> bool
where
    W: RawDelayedWorkItem<ID> + RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    // SAFETY: Plain arithmetic on the current time.
    let delay = unsafe { bindings::round_jiffies_relative(jiffies(milliseconds)) };
    enqueue_in(work, delay)
}

fn jiffies(milliseconds: u32) -> usize {
    // SAFETY: Plain arithmetic.
    unsafe { bindings::__msecs_to_jiffies(milliseconds) }
}

fn enqueue_in<W, const ID: u64>(work: W, delay: usize) -> bool
where
    W: RawDelayedWorkItem<ID> + RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    with(&STEPS, |queue| queue.enqueue_delayed(work, delay).is_ok()) == Some(true)
}

/// Makes work of [`put_off`] and [`enqueue_about`] run now instead of later; after that it has no timer.
pub(crate) fn hasten<W, const ID: u64>(work: W)
where
    W: RawDelayedWorkItem<ID> + RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    run_in(work, 0);
}

/// Makes work run after `milliseconds`, whatever its time was before; callable from any context.
pub(crate) fn put_off<W, const ID: u64>(work: W, milliseconds: u32)
where
    W: RawDelayedWorkItem<ID> + RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    run_in(work, jiffies(milliseconds));
}

fn run_in<W, const ID: u64>(work: W, delay: usize)
where
    W: RawDelayedWorkItem<ID> + RawWorkItem<ID, EnqueueOutput = Result<(), W>> + Send + 'static,
{
    let raw = STEPS.load(Acquire) as *mut bindings::workqueue_struct;
    if raw.is_null() {
        return;
    }
    // SAFETY: The queue is live, as for `with`. The closure returns `false` only if the work was pending: then it stays
    // with the code that queued it. By the requirement of `RawDelayedWorkItem` the work is that of a `delayed_work`.
    let _pending = unsafe {
        work.__enqueue(|work| {
            !bindings::mod_delayed_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as kernel::ffi::c_int,
                raw,
                kernel::container_of!(work, bindings::delayed_work, work),
                delay,
            )
        })
    };
}
