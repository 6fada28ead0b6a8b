// SPDX-License-Identifier: GPL-2.0-only

//! A place where one thread sleeps until an interrupt handler or another thread wakes it.
//!
//! A wake-up that finds the thread awake costs one atomic exchange and no lock.
//!
//! Wraps `wait_for_completion_state`, `wait_for_completion_interruptible_timeout` and `complete`
//! (include/linux/completion.h). `kernel::sync::Completion` waits uninterruptibly and without a limit,
//! which would count as load and as a hung task.

use crate::linux::monotonic_ns;
use crate::linux::sys;
use crate::linux::versions;
use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::atomic::{
    ordering::{Full, Relaxed},
    Atomic, AtomicFlag,
};
use kernel::sync::Arc;
use kernel::types::Opaque;

/// Longest sleep of [`WakeEvent::wait_for_a_while`].
const IDLE_SECONDS: u32 = 5;

const RUNNING: u32 = 0;
const NOTIFIED: u32 = 1;
const SLEEPING: u32 = 2;

/// A place where one thread sleeps.
#[pin_data]
pub(crate) struct WakeEvent {
    /// Written by the sleeper (any change) and by wakers (to NOTIFIED only).
    state: Atomic<u32>,
    /// Whether wakers say when, and when the last one did that found a sleeper.
    is_timed: AtomicFlag,
    woken_ns: Atomic<u64>,
    #[pin]
    done: Opaque<bindings::completion>,
}

// SAFETY: The state is atomic and a completion may be used from any context.
unsafe impl Send for WakeEvent {}
// SAFETY: As above.
unsafe impl Sync for WakeEvent {}

impl WakeEvent {
    /// Makes one. May sleep.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                state: Atomic::new(RUNNING),
                is_timed: AtomicFlag::new(false),
                woken_ns: Atomic::new(0),
                done <- Opaque::ffi_init(|slot| {
                    // SAFETY: `slot` is valid for writes and stays pinned in the `Arc`.
                    unsafe { bindings::init_completion(slot) }
                }),
            }),
            GFP_KERNEL,
        )
    }

    /// Makes the sleeper return from [`wait`](Self::wait), now or when it calls it next. Callable
    /// from any context, interrupts included.
    pub(crate) fn wake(&self) {
        if self.state.xchg(NOTIFIED, Full) == SLEEPING {
            if self.is_timed.load(Relaxed) {
                // The sleeper does not go on before the next line.
                self.woken_ns.store(monotonic_ns(), Relaxed);
            }
            // SAFETY: `done` was initialised by the constructor; `complete` is callable from any
            // context.
            unsafe { bindings::complete(self.done.get()) }
        }
    }

    /// Has wakers say from now on when they wake the sleeper, or no more.
    pub(crate) fn time(&self, wanted: bool) {
        self.is_timed.store(wanted, Relaxed);
    }

    /// When the sleeper was woken last, in nanoseconds of the monotonic clock, as far as that was [wanted](Self::time).
    pub(crate) fn woken_ns(&self) -> u64 {
        self.woken_ns.load(Relaxed)
    }

    /// Forgets earlier wake-ups. The sleeper calls this before it looks for work, so that the
    /// wake-up of work that it finds anyway does not cost another round.
    ///
    /// The full barrier pairs with the exchange in [`wake`](Self::wake): whoever set the state
    /// before has made its work visible to what the sleeper reads from here on.
    pub(crate) fn rearm(&self) {
        self.state.store(RUNNING, Relaxed);
        versions::smp_mb();
    }

    /// Waits as [`wait`](Self::wait) does, for a few seconds at most: see [`IDLE_SECONDS`].
    pub(crate) fn wait_for_a_while(&self) {
        // All sleepers of the host wake up in the same tick.
        // SAFETY: Plain arithmetic on the current time.
        let ticks =
            unsafe { bindings::round_jiffies_relative((IDLE_SECONDS * bindings::HZ) as usize) };
        self.wait_ticks(ticks);
    }

    /// Waits as [`wait`](Self::wait) does, for so many nanoseconds at most, rounded up to whole ticks.
    pub(crate) fn wait_for(&self, nanoseconds: u64) {
        // SAFETY: Plain arithmetic.
        let ticks = unsafe { bindings::nsecs_to_jiffies(nanoseconds) };
        self.wait_ticks(ticks.saturating_add(1));
    }

    fn wait_ticks(&self, ticks: usize) {
        if self.state.cmpxchg(RUNNING, SLEEPING, Full).is_ok() {
            // SAFETY: `done` was initialised by the constructor.
            let left = unsafe {
                bindings::wait_for_completion_interruptible_timeout(self.done.get(), ticks)
            };
            if left <= 0 && self.state.cmpxchg(SLEEPING, RUNNING, Full).is_err() {
                // A waker took the state meanwhile, so it completes, or already has.
                // SAFETY: As above.
                unsafe { bindings::wait_for_completion_state(self.done.get(), sys::TASK_IDLE) };
            }
        }
        self.rearm();
    }

    /// True if a wake-up came since [`rearm`](Self::rearm).
    pub(crate) fn is_notified(&self) -> bool {
        self.state.load(Relaxed) == NOTIFIED
    }

    /// Sleeps until woken; returns at once if a wake-up came since [`rearm`](Self::rearm).
    ///
    /// Only one thread may wait here. May sleep.
    pub(crate) fn wait(&self) {
        if self.state.cmpxchg(RUNNING, SLEEPING, Full).is_ok() {
            // SAFETY: `done` was initialised by the constructor. The waker that replaces SLEEPING
            // completes exactly once, so no completion is left over.
            unsafe { bindings::wait_for_completion_state(self.done.get(), sys::TASK_IDLE) };
        }
        self.rearm();
    }
}
