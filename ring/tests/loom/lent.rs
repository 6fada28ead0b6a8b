// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A thread that lends what it works on while it waits: completions borrow it, in interrupts of other processors and of its
//! own, while wakers notify it and its sleep may end by a limit in time.

use loom::cell::Cell;
use loom::sync::atomic::{fence, AtomicU32, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread::{self, JoinHandle};
use ring::wake::{halted, Lending, Loan, Sleeper, StateWord, WakeState};

/// Parts of the protocol that are left out, to show that the model finds the fault.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum PlantedFault {
    #[default]
    None,
    /// A borrower does not wake the sleeper that was notified meanwhile.
    ForgottenNotice,
    /// A sleeper whose time is over does not wait for the borrower.
    EarlyReturn,
    /// A completion that finds the work borrowed leaves it to the borrower, without a notice.
    NoNotice,
    /// A halted processor's work is lent to all processors.
    AnyProcessor,
}

/// The word of the state. All changes are read-modify-writes: loom does not give a plain store and an exchange of two threads
/// one order, as every processor does. The orders that the plain store of `rearm` permits are tried in `wake`.
struct FencedWord(AtomicU32);

impl FencedWord {
    fn fenced<T>(&self, act: impl FnOnce(&AtomicU32) -> T) -> T {
        fence(Ordering::SeqCst);
        let result = act(&self.0);
        fence(Ordering::SeqCst);
        result
    }
}

impl StateWord for FencedWord {
    fn exchange(&self, value: u32) -> u32 {
        self.fenced(|word| word.swap(value, Ordering::AcqRel))
    }

    fn replace(&self, from: u32, to: u32) -> bool {
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        self.fenced(|word| word.compare_exchange(from, to, success, failure))
            .is_ok()
    }

    fn load(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn store_then_barrier(&self, value: u32) {
        self.exchange(value);
    }
}

const OWN: u32 = 3;
const OTHER: u32 = 5;

/// The sleeper's processor.
#[derive(Default)]
struct SleeperProcessor {
    interrupts_off: bool,
    /// An interrupt waits, which completes this number of I/Os.
    waits: Option<u32>,
}

struct LendModel {
    state: WakeState<FencedWord>,
    /// I/Os that are complete, and not collected.
    complete: AtomicU32,
    /// The work that is lent: the number of I/Os that were collected. Two threads that use it at a time fail the test.
    collected: Cell<u32>,
    processor: Mutex<SleeperProcessor>,
    /// A wake-up of the sleeper by the scheduler.
    completed: Mutex<bool>,
    planted: PlantedFault,
}

impl LendModel {
    fn new(planted: PlantedFault) -> Arc<Self> {
        Arc::new(Self {
            state: WakeState::new(FencedWord(AtomicU32::new(0))),
            complete: AtomicU32::new(0),
            collected: Cell::new(0),
            processor: Mutex::default(),
            completed: Mutex::new(false),
            planted,
        })
    }

    /// Collects what is complete; the caller has the right to. Returns the sum.
    fn collect(&self) -> u32 {
        let new = self.complete.swap(0, Ordering::Relaxed);
        let sum = self.collected.get() + new;
        self.collected.set(sum);
        sum
    }

    fn act(&self, sleeper: Sleeper) {
        match sleeper {
            Sleeper::Awake => {}
            Sleeper::Asleep => *self.completed.lock().unwrap() = true,
            Sleeper::Halted(processor) => {
                assert_eq!(processor, OWN);
                self.interrupt(0);
            }
        }
    }

    /// Completes I/Os in an interrupt of `processor`.
    fn complete_on(&self, processor: u32, count: u32) {
        self.complete.fetch_add(count, Ordering::Relaxed);
        let as_if = match self.planted {
            PlantedFault::AnyProcessor => OWN,
            _ => processor,
        };
        self.work_on(self.state.borrow(as_if));
    }

    /// Completes an I/O in a task.
    fn complete_as_task(&self) {
        self.complete.fetch_add(1, Ordering::Relaxed);
        self.work_on(self.state.borrow_as_task());
    }

    /// Does the sleeper's work with a loan, or wakes it.
    fn work_on(&self, loan: Option<Loan>) {
        let sleeper = match loan {
            Some(loan) => {
                self.collect();
                let sleeper = self.state.give_back(loan, false);
                match self.planted {
                    PlantedFault::ForgottenNotice => Sleeper::Awake,
                    _ => sleeper,
                }
            }
            None if self.planted == PlantedFault::NoNotice => Sleeper::Awake,
            None => self.state.wake(),
        };
        self.act(sleeper);
    }

    /// Sends the sleeper's processor an interrupt that completes I/Os. It comes when the sleeper takes it.
    fn interrupt(&self, count: u32) {
        let mut processor = self.processor.lock().unwrap();
        processor.waits = Some(processor.waits.unwrap_or(0) + count);
    }

    /// Takes the interrupt that waits, if interrupts are on. Returns true if there was one.
    fn take_interrupt(&self) -> bool {
        let mut processor = self.processor.lock().unwrap();
        if processor.interrupts_off {
            return false;
        }
        let taken = processor.waits.take();
        drop(processor);
        if let Some(count @ 1..) = taken {
            self.complete_on(OWN, count);
        }
        taken.is_some()
    }

    fn halt(&self, others: &mut OtherThreads) {
        if self.state.begin_halt(OWN, Lending::ToAll) {
            self.take_interrupt();
            self.processor.lock().unwrap().interrupts_off = true;
            if self.state.word().0.load(Ordering::Relaxed) == halted(OWN, Lending::ToAll) {
                others.block(|| self.processor.lock().unwrap().waits.is_some());
            }
            self.processor.lock().unwrap().interrupts_off = false;
            self.take_interrupt();
        }
        self.state.end_halt(OWN, Lending::ToAll);
    }

    /// Sleeps; the limit in time is over at once if `limited`.
    fn sleep(&self, others: &mut OtherThreads, lending: Lending, limited: bool) {
        if !self.state.fall_asleep(lending) {
            return;
        }
        if limited && self.state.give_up_sleep() {
            return;
        }
        if limited && self.planted == PlantedFault::EarlyReturn {
            return;
        }
        others.block(|| core::mem::take(&mut *self.completed.lock().unwrap()));
    }
}

/// The thread that ends last, which waits for all others, and not for the sleeper.
struct OtherThreads(Option<JoinHandle<()>>);

impl OtherThreads {
    /// Blocks until `is_over`, which only the other threads bring about.
    fn block(&mut self, mut is_over: impl FnMut() -> bool) {
        while !is_over() {
            let last = self.0.take().expect("a wake-up was lost");
            last.join().expect("the others end well");
        }
    }
}

type WaitKind = fn(&LendModel, &mut OtherThreads, first: bool);

fn sleeps(model: &LendModel, others: &mut OtherThreads, _first: bool) {
    model.sleep(others, Lending::ToAll, false);
}

/// The first sleep ends by its limit, whatever the others do.
fn sleeps_once_limited(model: &LendModel, others: &mut OtherThreads, first: bool) {
    model.sleep(others, Lending::ToAll, first);
}

fn sleeps_beside_tasks(model: &LendModel, others: &mut OtherThreads, first: bool) {
    model.sleep(others, Lending::ToTasks, first);
}

fn halts(model: &LendModel, others: &mut OtherThreads, _first: bool) {
    model.halt(others);
}

type CompletionKind = fn(&LendModel);

/// Two completions, `completions` names how they come; then a wake-up that tells the sleeper to end.
fn run(planted: PlantedFault, wait: WaitKind, completions: [CompletionKind; 2]) {
    let mut builder = loom::model::Builder::new();
    // All orders take minutes.
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let model = LendModel::new(planted);
        let ends = Arc::new(AtomicU32::new(0));
        let last = {
            let (model, ends) = (model.clone(), ends.clone());
            thread::spawn(move || {
                let other = {
                    let model = model.clone();
                    thread::spawn(move || completions[0](&model))
                };
                completions[1](&model);
                other.join().unwrap();
                ends.fetch_add(1, Ordering::Relaxed);
                let sleeper = model.state.wake();
                if sleeper == Sleeper::Asleep {
                    let left = model.complete.fetch_add(0, Ordering::Relaxed);
                    assert_eq!(
                        left, 0,
                        "a completion is left to a sleeper without a notice"
                    );
                }
                model.act(sleeper);
            })
        };
        let mut others = OtherThreads(Some(last));
        let mut first = true;
        let collected = loop {
            model.state.rearm();
            let is_over = ends.fetch_add(0, Ordering::Relaxed) == 1;
            // What waits for this processor comes before the thread goes on.
            while model.take_interrupt() {}
            let collected = model.collect();
            if is_over && collected == 2 {
                break collected;
            }
            wait(&model, &mut others, first);
            first = false;
        };
        assert_eq!(collected, 2);
        if let Some(last) = others.0 {
            last.join().unwrap();
        }
    });
}

fn elsewhere(model: &LendModel) {
    model.complete_on(OTHER, 1);
}

fn here(model: &LendModel) {
    model.interrupt(1);
}

#[test]
fn completions_work_in_place_of_a_thread_that_sleeps() {
    run(PlantedFault::None, sleeps, [elsewhere, elsewhere]);
}

#[test]
fn a_sleep_that_ends_by_its_limit_waits_for_the_borrower() {
    run(
        PlantedFault::None,
        sleeps_once_limited,
        [elsewhere, elsewhere],
    );
}

#[test]
fn tasks_work_in_place_of_a_thread_that_sleeps() {
    let task = LendModel::complete_as_task;
    run(PlantedFault::None, sleeps_beside_tasks, [task, task]);
}

#[test]
fn an_interrupt_takes_nothing_that_is_lent_to_tasks() {
    let task = LendModel::complete_as_task;
    run(PlantedFault::None, sleeps_beside_tasks, [elsewhere, task]);
}

#[test]
fn interrupts_work_in_place_of_a_thread_that_has_halted_their_processor() {
    run(PlantedFault::None, halts, [elsewhere, here]);
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn a_borrower_that_forgets_a_notice_is_found() {
    run(
        PlantedFault::ForgottenNotice,
        sleeps,
        [elsewhere, elsewhere],
    );
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_sleeper_that_does_not_wait_for_the_borrower_is_found() {
    run(
        PlantedFault::EarlyReturn,
        sleeps_once_limited,
        [elsewhere, elsewhere],
    );
}

#[test]
#[should_panic(expected = "without a notice")]
fn a_completion_without_a_notice_is_found() {
    run(PlantedFault::NoNotice, sleeps, [elsewhere, elsewhere]);
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn work_that_is_lent_to_other_processors_is_found() {
    run(PlantedFault::AnyProcessor, halts, [elsewhere, elsewhere]);
}
