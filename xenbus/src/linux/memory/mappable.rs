// SPDX-License-Identifier: GPL-2.0-only

//! Pages without memory, at which a queue has guest pages mapped.
//!
//! The pages are allocated all at once when the first guest page is to be mapped, and freed when no page was mapped for
//! a while, so an idle queue has none. Each of them costs the kernel 64 bytes, and addresses.
//!
//! Wraps `gnttab_alloc_pages` and `gnttab_free_pages` (include/xen/grant_table.h).

use super::vectors::{filled, push};
use crate::linux::monotonic_ns;
use crate::linux::sys;
use crate::linux::task::workqueue;
use core::pin::Pin;
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Acquire, ordering::Relaxed, ordering::Release, Atomic};
use kernel::sync::Arc;
use kernel::workqueue::{impl_has_work, new_work, Work, WorkItem};

/// There are no pages.
const NONE: u32 = 0;
/// A thread allocates or frees the pages.
const BUSY: u32 = 1;
/// The pages are there.
const THERE: u32 = 2;

/// Nanoseconds until the next attempt after the kernel had no pages.
const PAUSE_NS: u64 = 1_000_000_000;

/// The pages of a queue at which guest pages are mapped.
///
/// # Invariants
///
/// - A page in `pages` is one of `gnttab_alloc_pages` that was not freed.
/// - Only the thread that has set `state` to [`BUSY`] may change `pages`; they are unused before it is [`THERE`].
#[pin_data(PinnedDrop)]
pub(super) struct Mappable {
    /// 0 if there is no page, or if a guest's page cannot be removed from it any more.
    pages: KVec<Atomic<usize>>,
    state: Atomic<u32>,
    /// Time of the next attempt, in nanoseconds.
    after: Atomic<u64>,
    #[pin]
    work: Work<Mappable>,
}

impl_has_work! {
    impl HasWork<Self> for Mappable { self.work }
}

impl Mappable {
    /// Makes places for `count` pages. May sleep.
    pub(super) fn new(count: u16) -> Result<Arc<Self>> {
        let count = usize::from(count);
        let mut pages = KVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            push(&mut pages, Atomic::new(0))?;
        }
        Arc::pin_init(
            pin_init!(Self {
                pages,
                state: Atomic::new(NONE),
                after: Atomic::new(0),
                work <- new_work!("Mappable::work"),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns the number of places.
    pub(super) fn count(&self) -> u16 {
        // CAST: `new` takes the number as one of 16 bits.
        self.pages.len() as u16
    }

    /// Returns one of the pages, if they are there.
    #[inline]
    pub(super) fn get(&self, at: usize) -> Option<*mut bindings::page> {
        let page = self.pages.get(at)?.load(Acquire);
        (page != 0).then_some(page as *mut bindings::page)
    }

    /// Drops this page for good, because a guest's page cannot be taken from it.
    pub(super) fn lose(&self, at: usize) {
        if let Some(page) = self.pages.get(at) {
            page.store(0, Relaxed);
        }
    }

    /// Schedules the allocation of the pages, if they are not there. Does not sleep.
    #[cold]
    pub(super) fn want(self: &Arc<Self>) {
        let is_due = monotonic_ns() >= self.after.load(Relaxed);
        if is_due && self.state.cmpxchg(NONE, BUSY, Acquire).is_ok() {
            // The work is queued nowhere, because of the state. It runs on the queue for storage, because an allocation
            // may have to wait for storage.
            if !workqueue::enqueue_storage(self.clone()) {
                self.state.store(NONE, Release);
            }
        }
    }

    fn make(&self) -> Result {
        let mut raw = filled(core::ptr::null_mut(), self.pages.len())?;
        // SAFETY: `raw` has room for that number of pointers.
        to_result(unsafe { sys::gnttab_alloc_pages(self.count().into(), raw.as_mut_ptr()) })?;
        for (place, page) in self.pages.iter().zip(raw) {
            // INVARIANT: Just allocated, and the state is `BUSY`.
            place.store(page.addr(), Release);
        }
        Ok(())
    }

    /// Frees the pages, if they are there.
    ///
    /// # Safety
    ///
    /// Nothing is mapped at one of them that was not lost, and no code uses one before it is there again.
    pub(super) unsafe fn free(&self) {
        if self.state.cmpxchg(THERE, BUSY, Acquire).is_ok() {
            self.free_all();
            self.state.store(NONE, Release);
        }
    }

    /// Frees all pages that are there. The caller makes sure that nothing is mapped at them.
    fn free_all(&self) {
        for page in &self.pages {
            let mut raw = page.load(Relaxed) as *mut bindings::page;
            page.store(0, Relaxed);
            if !raw.is_null() {
                // SAFETY: By the type invariant it came from `gnttab_alloc_pages`. The callers keep the rest.
                unsafe { sys::gnttab_free_pages(1, &mut raw) };
            }
        }
    }
}

impl WorkItem for Mappable {
    type Pointer = Arc<Mappable>;

    fn run(this: Arc<Mappable>) {
        let next = if this.make().is_ok() {
            THERE
        } else {
            let later = monotonic_ns().saturating_add(PAUSE_NS);
            this.after.store(later, Relaxed);
            NONE
        };
        this.state.store(next, Release);
    }
}

#[pinned_drop]
impl PinnedDrop for Mappable {
    fn drop(self: Pin<&mut Self>) {
        // Nothing is mapped there any more, because `GuestGrants`, which maps, unmaps before it is gone, and takes out
        // pages that it cannot unmap.
        self.free_all();
    }
}
