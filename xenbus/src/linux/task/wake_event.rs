// SPDX-License-Identifier: GPL-2.0-only

//! A place where one thread sleeps until an interrupt handler or another thread wakes it.
//!
//! A wake-up that finds the thread awake costs one atomic exchange and no lock.
//!
//! A thread whose waits are short may keep its processor while it waits: it halts the processor itself, as the idle task
//! would, so that two switches of tasks and what goes with them are saved.
//!
//! A thread that waits may lend what it works on ([`WaitingWork`]): a completion of I/O then finishes its request in the
//! context in which it comes, and the thread keeps waiting.
//!
//! Wraps `timer_setup`, `mod_timer` and `timer_shutdown_sync` (include/linux/timer.h), `safe_halt` (include/linux/irqflags.h) and `smp_send_reschedule` (include/linux/smp.h), `wait_for_completion_state`, `wait_for_completion_interruptible_timeout` and `complete`
//! (include/linux/completion.h). `kernel::sync::Completion` waits uninterruptibly and without a limit,
//! which would count as load and as a hung task.

use crate::linux::monotonic_ns;
use crate::linux::sys;
use crate::linux::versions;
pub(crate) use crate::ring::wake::Lending;
use crate::ring::wake::{halted, Loan, Sleeper, StateWord, WakeState};
use core::cell::UnsafeCell;
use core::pin::Pin;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::container_of;
use kernel::prelude::*;
use kernel::sync::atomic::{
    ordering::{Full, Relaxed},
    Atomic, AtomicFlag,
};
use kernel::sync::Arc;
use kernel::types::Opaque;

/// Longest sleep of [`LentEvent::wait_for_a_while`].
const IDLE_SECONDS: u32 = 5;

// States of the alarm: not set, set for a while, set for the next tick.
const SILENT: u32 = 0;
const FAR: u32 = 1;
const NEAR: u32 = 2;

/// The word of the state.
struct Word(Atomic<u32>);

impl StateWord for Word {
    #[inline]
    fn exchange(&self, value: u32) -> u32 {
        self.0.xchg(value, Full)
    }

    #[inline]
    fn replace(&self, from: u32, to: u32) -> bool {
        self.0.cmpxchg(from, to, Full).is_ok()
    }

    #[inline]
    fn load(&self) -> u32 {
        self.0.load(Relaxed)
    }

    #[inline]
    fn store_then_barrier(&self, value: u32) {
        self.0.store(value, Relaxed);
        versions::smp_mb();
    }
}

/// Work that a thread lends while it waits. It uses nothing that belongs to a processor or to the thread as a task.
pub(crate) trait WaitingWork {
    /// Does what has come since, in place of the thread. Returns true if the thread has to look itself. Its work has a bound.
    /// Work that is lent to tasks may sleep here; work that is lent to all runs in any context, interrupts included.
    fn work(&mut self) -> bool;
}

/// A place where one thread sleeps.
///
/// # Invariants
///
/// While `state` is lent or borrowed, `work` is what the thread lends, which nothing else uses until then. Only the thread
/// changes `work`, while `state` is neither.
#[pin_data(PinnedDrop)]
pub(crate) struct WakeEvent {
    state: WakeState<Word>,
    work: UnsafeCell<Option<NonNull<dyn WaitingWork>>>,
    /// Whether wakers record the time, and the time of the last wake-up that found a sleeper.
    is_timed: AtomicFlag,
    woken_ns: Atomic<u64>,
    /// State of the alarm. Only the sleeper sets it.
    alarmed: Atomic<u32>,
    #[pin]
    alarm: Opaque<bindings::timer_list>,
    #[pin]
    done: Opaque<bindings::completion>,
}

// SAFETY: The state is atomic and a completion may be used from any context. `work` is used by the thread, or by one borrower
// while the thread waits: what a thread lends is at rest then, and used by nothing else, as if the borrower were that thread.
unsafe impl Send for WakeEvent {}
// SAFETY: As above.
unsafe impl Sync for WakeEvent {}

impl WakeEvent {
    /// Makes an event without a sleeper. May sleep.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                state: WakeState::new(Word(Atomic::new(0))),
                work: UnsafeCell::new(None),
                is_timed: AtomicFlag::new(false),
                woken_ns: Atomic::new(0),
                alarmed: Atomic::new(SILENT),
                // SAFETY: `slot` is valid for writes and stays pinned in the `Arc`.
                alarm <- Opaque::ffi_init(|slot| unsafe { sys::xbr_timer_setup(slot, ring_alarm) }),
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
        let sleeper = self.state.wake();
        self.wake_as(sleeper);
    }

    /// Does the sleeper's work in its place if it waits and lends that, or wakes it. Callable from any context, interrupts
    /// included.
    #[inline]
    pub(crate) fn wake_or_work(&self) {
        match self.state.is_lent() {
            true => self.work_or_wake(),
            false => self.wake(),
        }
    }

    #[inline(never)]
    fn work_or_wake(&self) {
        // SAFETY: Unpinned below.
        let processor = unsafe { sys::xbr_pin() };
        let loan = self.state.borrow(processor);
        self.work_on(loan);
        // SAFETY: Pinned above.
        unsafe { sys::xbr_unpin() };
    }

    /// Does the sleeper's work in its place if it sleeps and lends that to tasks, or wakes it. May sleep if the work does.
    pub(crate) fn wake_or_work_as_task(&self) {
        self.work_on(self.state.borrow_as_task());
    }

    /// Does the sleeper's work with a loan, or wakes the sleeper.
    fn work_on(&self, loan: Option<Loan>) {
        let sleeper = match loan {
            None => self.state.wake(),
            Some(loan) => {
                // SAFETY: By the type invariant `work` is valid, and ours alone until it is given back.
                let work = unsafe { (*self.work.get()).map(|mut work| work.as_mut()) };
                let notify = work.is_none_or(|work| work.work());
                self.state.give_back(loan, notify)
            }
        };
        self.wake_as(sleeper);
    }

    /// Wakes a sleeper that was in this state.
    fn wake_as(&self, sleeper: Sleeper) {
        if sleeper == Sleeper::Awake {
            return;
        }
        if self.is_timed.load(Relaxed) {
            // A sleeper does not continue before the next line; one that has halted may, and then has an older time.
            self.woken_ns.store(monotonic_ns(), Relaxed);
        }
        match sleeper {
            Sleeper::Awake => {}
            // SAFETY: `done` was initialised by the constructor; `complete` is callable from any
            // context.
            Sleeper::Asleep => unsafe { bindings::complete(self.done.get()) },
            // SAFETY: Callable from any context, with any number.
            Sleeper::Halted(processor) => unsafe { sys::xbr_end_halt(processor) },
        }
    }

    /// Runs `wait`, which waits here, while `work` is lent as `lending` says. Only the sleeper calls this.
    pub(crate) fn lending<'w, R>(
        &self,
        work: &'w mut (dyn WaitingWork + 'w),
        lending: Lending,
        wait: impl FnOnce(LentEvent<'_>) -> R,
    ) -> R {
        let work: NonNull<dyn WaitingWork + 'w> = work.into();
        // SAFETY: Only the lifetime changes. The state is neither lent nor borrowed after this function, and `work` is borrowed
        // as long as this runs.
        let work: NonNull<dyn WaitingWork> = unsafe { core::mem::transmute(work) };
        // SAFETY: We are the sleeper, and awake: by the type invariant no other thread looks.
        // INVARIANT: Nothing is lent yet.
        unsafe { *self.work.get() = Some(work) };
        let event = self;
        wait(LentEvent { event, lending })
    }

    /// Switches the recording of the time of wake-ups on or off.
    pub(crate) fn time(&self, wanted: bool) {
        self.is_timed.store(wanted, Relaxed);
    }

    /// Returns when the sleeper was last woken while [recording](Self::time) was on, in nanoseconds of the monotonic
    /// clock.
    pub(crate) fn woken_ns(&self) -> u64 {
        self.woken_ns.load(Relaxed)
    }

    /// Forgets earlier wake-ups, as [`WakeState::rearm`] says.
    pub(crate) fn rearm(&self) {
        self.state.rearm();
    }

    /// Returns true if a wake-up came since [`rearm`](Self::rearm).
    pub(crate) fn is_notified(&self) -> bool {
        self.state.is_notified()
    }

    /// Sleeps until woken; returns at once if a wake-up came since [`rearm`](Self::rearm).
    ///
    /// Only one thread may wait here. May sleep.
    pub(crate) fn wait(&self) {
        let lent = LentEvent {
            event: self,
            lending: Lending::Nothing,
        };
        lent.wait();
    }
}

#[pinned_drop]
impl PinnedDrop for WakeEvent {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Set up by the constructor. Its function takes no lock of ours, and the last reference is dropped by a task.
        unsafe { bindings::timer_shutdown_sync(self.alarm.get()) };
    }
}

/// Wakes the sleeper whose alarm this is. Runs in a soft interrupt.
extern "C" fn ring_alarm(timer: *mut bindings::timer_list) {
    // SAFETY: The timer is that of a `WakeEvent`, whose drop waits for this function.
    let event = unsafe { &*container_of!(Opaque::cast_from(timer), WakeEvent, alarm) };
    event.alarmed.store(SILENT, Relaxed);
    event.wake();
}

/// A sleeper that is about to wait, and what it lends meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct LentEvent<'a> {
    event: &'a WakeEvent,
    lending: Lending,
}

impl LentEvent<'_> {
    /// Waits as [`wait`](Self::wait) does, for a few seconds at most: see [`IDLE_SECONDS`].
    ///
    /// A sleep with a limit of its own would start and stop a timer each time, which costs more than a small request. The
    /// alarm stays set when the thread is woken, and counts for its next sleeps.
    pub(crate) fn wait_for_a_while(&self) {
        if self.event.alarmed.load(Relaxed) == SILENT {
            // All sleepers of the host wake up in the same tick.
            // SAFETY: Plain arithmetic on the current time.
            let ticks =
                unsafe { bindings::round_jiffies_relative((IDLE_SECONDS * bindings::HZ) as usize) };
            self.set_alarm(FAR, ticks);
        }
        self.wait();
    }

    /// Waits as [`wait`](Self::wait) does, until the next tick at most. The alarm stays set as that of
    /// [`wait_for_a_while`](Self::wait_for_a_while) does.
    pub(crate) fn wait_briefly(&self) {
        if self.event.alarmed.load(Relaxed) != NEAR {
            self.set_alarm(NEAR, 1);
        }
        self.wait();
    }

    /// Sets the alarm to ring after this number of ticks, whether it is set already or not.
    fn set_alarm(&self, state: u32, ticks: usize) {
        let WakeEvent { alarmed, alarm, .. } = self.event;
        // If the alarm rings at this moment, it wakes the sleeper, which sets it again later.
        alarmed.store(state, Relaxed);
        // SAFETY: Set up by the constructor, and shut down by the drop only.
        unsafe { sys::xbr_timer_start(alarm.get(), ticks) };
    }

    /// Waits as [`wait`](Self::wait) does, for at most `nanoseconds`, rounded up to whole ticks.
    pub(crate) fn wait_for(&self, nanoseconds: u64) {
        // SAFETY: Plain arithmetic.
        let ticks = unsafe { bindings::nsecs_to_jiffies(nanoseconds) };
        self.wait_ticks(ticks.saturating_add(1));
    }

    fn wait_ticks(&self, ticks: usize) {
        let WakeEvent { state, done, .. } = self.event;
        if state.fall_asleep(self.lending) {
            // SAFETY: `done` was initialised by the constructor.
            let left =
                unsafe { bindings::wait_for_completion_interruptible_timeout(done.get(), ticks) };
            if left <= 0 && !state.give_up_sleep() {
                // A waker has taken the state since, or a borrower gives it back: it completes, or already has.
                // SAFETY: As above.
                unsafe { bindings::wait_for_completion_state(done.get(), sys::TASK_IDLE) };
            }
        }
        self.event.rearm();
    }

    /// Halts the processor as the running task, until an interrupt of any kind. Returns at once if a wake-up came since
    /// [`WakeEvent::rearm`], or if another task could run on this processor. Returns whether a wake-up came; if so, it is
    /// forgotten as [`wait`](Self::wait) does.
    ///
    /// The scheduler sees a task that runs all this time.
    pub(crate) fn halt(&self) -> bool {
        let state = &self.event.state;
        // SAFETY: Unpinned below.
        let processor = unsafe { sys::xbr_pin() };
        if state.begin_halt(processor, self.lending) {
            let halted = halted(processor, self.lending);
            // SAFETY: The word lives as long as the event. Interrupts are on, because only threads call this.
            unsafe { sys::xbr_halt_while(state.word().0.as_ptr(), halted) };
        }
        let is_woken = state.end_halt(processor, self.lending);
        // SAFETY: Pinned above. The state is not lent any more, so no interrupt here works in our place.
        unsafe { sys::xbr_unpin() };
        if is_woken {
            self.event.rearm();
        }
        is_woken
    }

    /// Sleeps until woken; returns at once if a wake-up came since [`WakeEvent::rearm`]. May sleep.
    pub(crate) fn wait(&self) {
        if self.event.state.fall_asleep(self.lending) {
            // SAFETY: `done` was initialised by the constructor. The waker that finds the sleeper asleep
            // completes exactly once, so no completion is left over.
            unsafe { bindings::wait_for_completion_state(self.event.done.get(), sys::TASK_IDLE) };
        }
        self.event.rearm();
    }
}
