// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A thread that sleeps or halts its processor, its wakers on other processors, and interrupts that come at any time.

use loom::sync::atomic::{fence, AtomicU32, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread::{self, JoinHandle};
use ring::wake::{halted, Lending, Sleeper, StateWord, WakeState};

/// Parts of the protocol that are left out, to show that the model finds the fault.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Planted {
    #[default]
    None,
    /// The sleeper looks at the word before it switches interrupts off.
    EarlyLook,
    /// A waker does not interrupt a halted processor.
    NoInterrupt,
    /// The sleeper does not look for work after it has forgotten a wake-up.
    LateRearm,
}

struct BarrierWord(AtomicU32);

impl StateWord for BarrierWord {
    fn exchange(&self, value: u32) -> u32 {
        // The kernel's exchange is a full barrier, which one of loom alone is not.
        fence(Ordering::SeqCst);
        let before = self.0.swap(value, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        before
    }

    fn replace(&self, from: u32, to: u32) -> bool {
        fence(Ordering::SeqCst);
        let done = self
            .0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        fence(Ordering::SeqCst);
        done.is_ok()
    }

    fn load(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn store_then_barrier(&self, value: u32) {
        self.0.store(value, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// The sleeper's processor. An interrupt does nothing itself; one that comes while interrupts are off waits.
#[derive(Default)]
struct Processor {
    interrupts_off: bool,
    waits: bool,
}

struct WakeModel {
    state: WakeState<BarrierWord>,
    /// Pieces of work that were given, and not looked for.
    work: AtomicU32,
    processor: Mutex<Processor>,
    /// A wake-up of the sleeper by the scheduler.
    completed: Mutex<bool>,
    planted: Planted,
}

/// The other threads, none of which waits for the sleeper.
type OtherWakers = Vec<JoinHandle<()>>;

/// Blocks until `is_over`, which only the other threads bring about: as long as it is not, one of them has to end.
fn block(others: &mut OtherWakers, mut is_over: impl FnMut() -> bool) {
    while !is_over() {
        let other = others.pop().expect("a wake-up was lost");
        other.join().expect("a waker ends well");
    }
}

const PROCESSOR: u32 = 3;

impl WakeModel {
    fn new(planted: Planted) -> Arc<Self> {
        Arc::new(Self {
            state: WakeState::new(BarrierWord(AtomicU32::new(0))),
            work: AtomicU32::new(0),
            processor: Mutex::default(),
            completed: Mutex::new(false),
            planted,
        })
    }

    /// Gives a piece of work and wakes the sleeper.
    fn give(&self) {
        self.work.fetch_add(1, Ordering::Relaxed);
        match self.state.wake() {
            Sleeper::Awake => {}
            Sleeper::Asleep => *self.completed.lock().unwrap() = true,
            Sleeper::Halted(processor) => {
                assert_eq!(processor, PROCESSOR);
                if self.planted != Planted::NoInterrupt {
                    self.interrupt();
                }
            }
        }
    }

    fn interrupt(&self) {
        let mut processor = self.processor.lock().unwrap();
        processor.waits = processor.interrupts_off;
    }

    /// Does as the shim: the last look with interrupts off, and the halt, which switches them on.
    fn halt_while(&self, others: &mut OtherWakers) {
        let is_halted = || self.state.word().load() == halted(PROCESSOR, Lending::Nothing);
        let early = self.planted == Planted::EarlyLook && is_halted();
        self.processor.lock().unwrap().interrupts_off = true;
        if early || is_halted() {
            block(others, || self.processor.lock().unwrap().waits);
        }
        *self.processor.lock().unwrap() = Processor::default();
    }

    fn halt(&self, others: &mut OtherWakers) -> bool {
        if self.state.begin_halt(PROCESSOR, Lending::Nothing) {
            self.halt_while(others);
        }
        self.state.end_halt(PROCESSOR, Lending::Nothing)
    }

    fn sleep(&self, others: &mut OtherWakers) {
        if self.state.fall_asleep(Lending::Nothing) {
            let completed = || core::mem::take(&mut *self.completed.lock().unwrap());
            block(others, completed);
        }
    }

    /// Does `pieces` pieces of work, and waits for them as `wait` says.
    fn serve(&self, pieces: u32, others: &mut OtherWakers, wait: Wait) {
        let mut done = 0;
        loop {
            if self.planted != Planted::LateRearm {
                self.state.rearm();
            }
            done += self.work.swap(0, Ordering::Relaxed);
            if self.planted == Planted::LateRearm {
                self.state.rearm();
            }
            if done == pieces {
                return;
            }
            wait(self, others);
        }
    }
}

type Wait = fn(&WakeModel, &mut OtherWakers);

fn halts(world: &WakeModel, others: &mut OtherWakers) {
    // An interrupt of any kind may end a halt.
    let _woken = world.halt(others);
}

fn sleeps(world: &WakeModel, others: &mut OtherWakers) {
    world.sleep(others);
}

/// A halt that an interrupt ended without work is followed by a sleep.
fn halts_then_sleeps(world: &WakeModel, others: &mut OtherWakers) {
    if !world.halt(others) {
        world.sleep(others);
    }
}

fn run(planted: Planted, wait: Wait, stray: bool) {
    let mut model = loom::model::Builder::new();
    // All orders take minutes.
    model.preemption_bound = Some(3);
    model.check(move || {
        let world = WakeModel::new(planted);
        let pieces = if stray { 1 } else { 2 };
        let start = |act: fn(&WakeModel)| {
            let world = world.clone();
            thread::spawn(move || act(&world))
        };
        let mut others: OtherWakers = (0..pieces).map(|_| start(WakeModel::give)).collect();
        if stray {
            others.push(start(WakeModel::interrupt));
        }
        world.serve(pieces, &mut others, wait);
        for thread in others {
            thread.join().unwrap();
        }
    });
}

#[test]
fn no_wake_up_is_lost_while_the_processor_is_halted() {
    run(Planted::None, halts, false);
}

#[test]
fn no_wake_up_is_lost_in_sleep() {
    run(Planted::None, sleeps, false);
}

#[test]
fn an_interrupt_without_work_loses_no_wake_up() {
    run(Planted::None, halts_then_sleeps, true);
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn a_look_before_interrupts_are_off_is_found() {
    run(Planted::EarlyLook, halts, false);
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn a_waker_without_an_interrupt_is_found() {
    run(Planted::NoInterrupt, halts, false);
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn a_wake_up_that_is_forgotten_late_is_found() {
    run(Planted::LateRearm, sleeps, false);
}
