// SPDX-License-Identifier: GPL-2.0-only

//! A queue's side of its guest: the event channel and the mapped ring, which can be given back while the queue's thread
//! is stuck in the block layer.
//!
//! The thread alone uses them, without a lock. While it is in the block layer, where it may sleep for as long as a
//! device hangs, it does not use them: it puts them aside ([`GuestMapping::away`]), and another thread may give them
//! back then ([`MappingRevoker::take`]). If the queue's thread is not away, it gives them back itself before it goes away again,
//! or as soon as it has seen the command to stop.

use super::evtchn::{Activity, EventChannel};
use super::ring_map::RingMap;
use crate::linux::trace;
use crate::ring::abi::MAX_SLOT_SIZE;
use crate::ring::shared_ring::SharedRing;
use core::cell::{Cell, UnsafeCell};
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Full, ordering::Relaxed, Atomic};
use kernel::sync::Arc;

/// The owner is away.
const AWAY: u32 = 1;
/// Another thread requests that the guest's side is given back.
const WANTED: u32 = 2;

struct GuestSide {
    // The order matters: no event may come for a ring that is unmapped.
    channel: EventChannel,
    ring: RingMap,
}

/// # Invariants
///
/// `side` belongs to the owner, with one exception: if a thread sets `WANTED` while `AWAY` is set, it belongs to that
/// thread from then on. The owner alone changes `AWAY`, and only while `WANTED` is not set.
struct SharedMapping {
    state: Atomic<u32>,
    side: UnsafeCell<Option<GuestSide>>,
    traced: trace::TracedQueue,
}

// SAFETY: By the type invariant `side` is used by one thread at a time, and both of its parts may be
// used and dropped on any thread.
unsafe impl Send for SharedMapping {}
// SAFETY: As above.
unsafe impl Sync for SharedMapping {}

/// The owner's end: one thread has it. Dropping it gives everything back.
pub(crate) struct GuestMapping {
    shared: Arc<SharedMapping>,
    /// Everything was given back. (A cell also keeps references to this object on one thread.)
    gone: Cell<bool>,
    /// A call of [`GuestMapping::away`] on this thread's stack has put everything aside.
    away: Cell<bool>,
}

/// The other end.
pub(crate) struct MappingRevoker(Arc<SharedMapping>);

impl GuestMapping {
    /// Makes both ends of a guest's side. May sleep.
    pub(crate) fn new(
        channel: EventChannel,
        ring: RingMap,
        traced: trace::TracedQueue,
    ) -> Result<(Self, MappingRevoker)> {
        let shared = Arc::new(
            SharedMapping {
                state: Atomic::new(0),
                side: UnsafeCell::new(Some(GuestSide { channel, ring })),
                traced,
            },
            GFP_KERNEL,
        )?;
        let taker = MappingRevoker(shared.clone());
        let held = Self {
            shared,
            gone: Cell::new(false),
            away: Cell::new(false),
        };
        Ok((held, taker))
    }

    /// Returns the queue that has it, for trace points.
    #[inline(always)]
    pub(crate) fn traced(&self) -> &trace::TracedQueue {
        &self.shared.traced
    }

    /// Runs `body` with the guest's side; `body` is one of those below, which do nothing else.
    #[inline]
    fn with<R>(&self, body: impl FnOnce(&GuestSide) -> R) -> Option<R> {
        if self.gone.get() || self.away.get() {
            return None;
        }
        // SAFETY: The owner is not away, so by the type invariant the side is ours. All references
        // to `self` are on one thread, and `body` does not go away.
        unsafe { (*self.shared.side.get()).as_ref() }.map(body)
    }

    /// Runs `body`, which may sleep long and must not need the guest. After it everything may be gone. If another
    /// thread has already requested that, everything is given back first, and `gone` is called before `body`.
    pub(crate) fn away<R>(&self, gone: impl FnOnce(), body: impl FnOnce() -> R) -> R {
        if self.gone.get() || self.away.get() {
            return body();
        }
        if self.shared.state.cmpxchg(0, AWAY, Full).is_err() {
            // Another thread has requested it, and only this thread can give it back.
            self.let_go();
            gone();
            return body();
        }
        self.away.set(true);
        let result = body();
        self.away.set(false);
        if self.shared.state.cmpxchg(AWAY, 0, Full).is_err() {
            // INVARIANT: The thread that has set `WANTED` since has taken it.
            self.gone.set(true);
        }
        result
    }

    /// Gives everything back, if that has not been done. Waits for a running interrupt handler.
    pub(crate) fn let_go(&self) {
        if self.away.get() || self.gone.replace(true) {
            return;
        }
        // SAFETY: It was not gone and we are not away, so by the type invariant the side is ours, on
        // this thread alone, and nothing borrows it now.
        drop(unsafe { (*self.shared.side.get()).take() });
    }

    /// Sends an event to the frontend.
    pub(crate) fn notify(&self) {
        self.with(|side| side.channel.notify());
    }

    /// Ends the event that came; returns false if none did.
    pub(crate) fn end_event(&self, activity: Activity) -> bool {
        let ended = self.with(|side| match side.channel.take_pending() {
            Some(pending) => {
                pending.end(activity);
                true
            }
            None => false,
        });
        ended == Some(true)
    }
}

impl Drop for GuestMapping {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl MappingRevoker {
    /// Gives everything back if the owner is away, and then returns `true`. Otherwise the owner does that, at the
    /// latest before it goes away. Call it once the owner has got the order to give everything back. Waits for a
    /// running interrupt handler, and for nothing else.
    pub(crate) fn take(&self) -> bool {
        if !self.want() {
            return false;
        }
        // SAFETY: This thread has set `WANTED` while the owner was away: by the type invariant the side belongs to it.
        drop(unsafe { (*self.0.side.get()).take() });
        true
    }

    /// Sets `WANTED`; returns true if this call has set it, and the owner is away.
    fn want(&self) -> bool {
        let mut now = self.0.state.load(Relaxed);
        while now & WANTED == 0 {
            // The exchange fails only if the owner goes away or comes back at this moment.
            match self.0.state.cmpxchg(now, now | WANTED, Full) {
                Ok(before) => return before == AWAY,
                Err(other) => now = other,
            }
        }
        false
    }
}

/// Reads of a ring that is gone return nothing, and writes have no effect.
impl SharedRing for &GuestMapping {
    fn is_gone(&self) -> bool {
        self.gone.get()
    }

    fn load_req_prod(&self) -> u32 {
        self.with(|side| side.ring.load_req_prod()).unwrap_or(0)
    }

    fn peek_req_prod(&self) -> u32 {
        self.with(|side| side.ring.peek_req_prod()).unwrap_or(0)
    }

    fn load_rsp_prod(&self) -> u32 {
        self.with(|side| side.ring.load_rsp_prod()).unwrap_or(0)
    }

    fn load_rsp_event(&self) -> u32 {
        self.with(|side| side.ring.load_rsp_event()).unwrap_or(0)
    }

    fn store_req_event(&self, value: u32) {
        self.with(|side| side.ring.store_req_event(value));
    }

    fn store_rsp_prod(&self, value: u32) {
        self.with(|side| side.ring.store_rsp_prod(value));
    }

    fn full_barrier(&self) {
        self.with(|side| side.ring.full_barrier());
    }

    fn copy_slot(&self, index: u32, slot: &mut [u8; MAX_SLOT_SIZE]) {
        self.with(|side| side.ring.copy_slot(index, slot));
    }

    fn write_response(&self, index: u32, words: [u32; 4]) {
        self.with(|side| side.ring.write_response(index, words));
    }
}
