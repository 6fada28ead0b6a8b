// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The state that a thread which serves a ring shares with its wakers.
//!
//! The thread sleeps, or halts its processor itself. A waker that finds it awake does nothing but exchange a word, without
//! a lock. Pure, so that loom tries every order.

/// The word that holds the state. The kernel implements it over its atomics, the tests over those of loom.
pub trait StateWord {
    /// Replaces the value and returns the earlier one, with a full barrier before and after.
    fn exchange(&self, value: u32) -> u32;

    /// Replaces `from` by `to`, with a full barrier. Returns false if the value is another one.
    fn replace(&self, from: u32, to: u32) -> bool;

    /// Reads the value, without order.
    fn load(&self) -> u32;

    /// Writes the value, and orders all later accesses after that with a full barrier.
    fn store_then_barrier(&self, value: u32);
}

const RUNNING: u32 = 0;
const NOTIFIED: u32 = 1;
const SLEEPING: u32 = 2;
/// The sleeper has halted the processor whose number is added to this.
const HALTED: u32 = 4;

/// State in which a waker found the sleeper; it says what the waker has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleeper {
    /// The sleeper is awake, or another waker wakes it. The waker has nothing to do.
    Awake,
    /// The sleeper sleeps. The waker wakes it, exactly once.
    Asleep,
    /// The sleeper has halted this processor. The waker interrupts the processor, unless it runs in an interrupt there.
    Halted(u32),
}

/// State of one sleeper. The sleeper makes any change, wakers only that to notified.
#[derive(Debug)]
pub struct WakeState<W>(W);

impl<W: StateWord> WakeState<W> {
    /// Makes the state of a sleeper that is awake; `word` holds 0.
    pub const fn new(word: W) -> Self {
        Self(word)
    }

    /// Returns the word, for a look at [`halted`].
    pub const fn word(&self) -> &W {
        &self.0
    }

    /// Notifies the sleeper. Callable by any thread and in any interrupt.
    #[inline]
    pub fn wake(&self) -> Sleeper {
        match self.0.exchange(NOTIFIED) {
            RUNNING | NOTIFIED => Sleeper::Awake,
            SLEEPING => Sleeper::Asleep,
            halted => Sleeper::Halted(halted.wrapping_sub(HALTED)),
        }
    }

    /// Returns true if a wake-up came since [`rearm`](Self::rearm).
    #[inline]
    pub fn is_notified(&self) -> bool {
        self.0.load() == NOTIFIED
    }

    /// Forgets earlier wake-ups. The sleeper calls this before it polls for work: a wake-up for work that it finds now
    /// shall not cost another look.
    ///
    /// The full barrier pairs with the exchange in [`wake`](Self::wake): a waker that set the state before has made its
    /// work visible to the sleeper's reads from here on.
    #[inline]
    pub fn rearm(&self) {
        self.0.store_then_barrier(RUNNING);
    }

    /// The sleeper is about to sleep. Returns false if a wake-up came.
    #[inline]
    pub fn fall_asleep(&self) -> bool {
        self.0.replace(RUNNING, SLEEPING)
    }

    /// The sleeper has slept for long enough. Returns false if a waker has found it asleep meanwhile.
    #[inline]
    pub fn give_up_sleep(&self) -> bool {
        self.0.replace(SLEEPING, RUNNING)
    }

    /// The sleeper is about to halt its processor, which it must not leave until [`end_halt`](Self::end_halt). Returns
    /// false if a wake-up came.
    ///
    /// With interrupts off, it looks once more whether the word is still [`halted`], and only then halts: a waker that
    /// found the state interrupts the processor afterwards, and that interrupt waits.
    #[inline]
    pub fn begin_halt(&self, processor: u32) -> bool {
        self.0.replace(RUNNING, halted(processor))
    }

    /// The processor is not halted any more. Returns true if a wake-up came, which is not forgotten yet.
    #[inline]
    pub fn end_halt(&self, processor: u32) -> bool {
        !self.0.replace(halted(processor), RUNNING)
    }
}

/// Returns the value of the word while the sleeper has halted this processor.
#[inline]
pub const fn halted(processor: u32) -> u32 {
    HALTED.wrapping_add(processor)
}
