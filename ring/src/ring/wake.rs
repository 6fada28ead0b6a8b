// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The state that a thread which serves a ring shares with its wakers.
//!
//! The thread sleeps, or halts its processor itself. A waker that finds it awake does nothing but exchange a word, without
//! a lock. Pure, so that loom tries every order.
//!
//! While it waits, the thread may lend what is its own otherwise: one borrower at a time works on that in its place, so that
//! the thread need not wake up. The word is the lock, and no code ever waits for it: a borrower that finds it taken notifies
//! instead, and then the thread looks.

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
/// The sleeper sleeps, and lends what it has.
const LENDING: u32 = 3;
/// A borrower has it. The sleeper sleeps, or has halted the borrower's own processor.
const BORROWED: u32 = 4;
/// The sleeper sleeps, and lends what it has to tasks only.
const LENDING_TO_TASKS: u32 = 5;
/// The sleeper has halted the processor whose number is added to this, and lends nothing.
const HALTED: u32 = 8;
/// Added if it lends what it has to interrupts of that processor.
const LENDS: u32 = 1 << 31;

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

/// Whether a sleeper lends what is its own while it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lending {
    /// All wake-ups are for the sleeper itself.
    Nothing,
    /// A task may work in its place while it sleeps.
    ToTasks,
    /// Tasks and interrupts may.
    ToAll,
}

/// The right to work in place of a sleeper that waits. Give it back with [`WakeState::give_back`].
#[derive(Debug)]
#[must_use = "the sleeper waits until it is given back"]
pub struct Loan {
    /// The state before, and again afterwards.
    from: u32,
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
            // A borrower finds the notice when it gives back, and wakes the sleeper then.
            RUNNING | NOTIFIED | BORROWED => Sleeper::Awake,
            SLEEPING | LENDING | LENDING_TO_TASKS => Sleeper::Asleep,
            halted => Sleeper::Halted((halted & !LENDS).wrapping_sub(HALTED)),
        }
    }

    /// Reports whether it is worth to try to [borrow](Self::borrow).
    #[inline]
    pub fn is_lent(&self) -> bool {
        let now = self.0.load();
        now == LENDING || now & LENDS != 0
    }

    /// Borrows what the sleeper has, if the sleeper lends it now and no other code has it. The caller runs on `processor` and
    /// must not leave it before [`give_back`](Self::give_back). Otherwise the caller [notifies](Self::wake) the sleeper.
    #[inline]
    pub fn borrow(&self, processor: u32) -> Option<Loan> {
        let from = self.0.load();
        // The sleeper does not leave the processor that it has halted, so the caller is an interrupt there, and the sleeper
        // executes nothing until that has ended.
        let is_lent = from == LENDING || from == halted(processor, Lending::ToAll);
        (is_lent && self.0.replace(from, BORROWED)).then_some(Loan { from })
    }

    /// Borrows what a sleeper lends to tasks. The caller is one, and may itself sleep before it gives that back.
    #[inline]
    pub fn borrow_as_task(&self) -> Option<Loan> {
        let from = self.0.load();
        (from == LENDING_TO_TASKS && self.0.replace(from, BORROWED)).then_some(Loan { from })
    }

    /// Gives a loan back; `notify` is true if the sleeper has to look itself. Returns what the caller has to do, as
    /// [`wake`](Self::wake) does.
    #[inline]
    pub fn give_back(&self, loan: Loan, notify: bool) -> Sleeper {
        if !notify && self.0.replace(BORROWED, loan.from) {
            return Sleeper::Awake;
        }
        // Wakers that have come meanwhile have left the sleeper to the borrower.
        self.0.exchange(NOTIFIED);
        match loan.from {
            LENDING | LENDING_TO_TASKS => Sleeper::Asleep,
            // The interrupt that the borrower is part of has ended the halt.
            _ => Sleeper::Awake,
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
    pub fn fall_asleep(&self, lending: Lending) -> bool {
        let asleep = match lending {
            Lending::Nothing => SLEEPING,
            Lending::ToTasks => LENDING_TO_TASKS,
            Lending::ToAll => LENDING,
        };
        self.0.replace(RUNNING, asleep)
    }

    /// The sleeper has slept for long enough. Returns false if a waker has found it asleep meanwhile, or a borrower works in
    /// its place: then it is woken soon. Counts as a wake-up.
    #[inline]
    pub fn give_up_sleep(&self) -> bool {
        matches!(
            self.0.exchange(NOTIFIED),
            SLEEPING | LENDING | LENDING_TO_TASKS
        )
    }

    /// The sleeper is about to halt its processor, which it must not leave until [`end_halt`](Self::end_halt). Returns
    /// false if a wake-up came.
    ///
    /// With interrupts off, it looks once more whether the word is still [`halted`], and only then halts: a waker that
    /// found the state interrupts the processor afterwards, and that interrupt waits.
    #[inline]
    pub fn begin_halt(&self, processor: u32, lending: Lending) -> bool {
        self.0.replace(RUNNING, halted(processor, lending))
    }

    /// The processor is not halted any more. Returns true if a wake-up came, which is not forgotten yet.
    #[inline]
    pub fn end_halt(&self, processor: u32, lending: Lending) -> bool {
        !self.0.replace(halted(processor, lending), RUNNING)
    }
}

/// Returns the value of the word while the sleeper has halted this processor.
#[inline]
pub const fn halted(processor: u32, lending: Lending) -> u32 {
    let halted = HALTED.wrapping_add(processor);
    match lending {
        // A task on this processor would preempt the sleeper.
        Lending::Nothing | Lending::ToTasks => halted,
        Lending::ToAll => halted | LENDS,
    }
}
