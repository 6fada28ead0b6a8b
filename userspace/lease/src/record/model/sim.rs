// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Time, tasks, and a storage that takes its time, fails, and does late what a dead host had asked for.

use super::super::layout::{Area, Cell, Record};
use super::super::rules::World;
use control::{Code, Failure};
use std::cell::{Cell as Var, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Numbers that a seed decides.
#[derive(Debug)]
pub(super) struct Dice(Var<u64>);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(Var::new(
            seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15),
        ))
    }

    /// Below `end`, which is not 0. (xorshift64*)
    pub(super) fn below(&self, end: u64) -> u64 {
        let mut x = self.0.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.set(x);
        (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % end
    }

    pub(super) fn once_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub(super) fn up_to(&self, time: Duration) -> Duration {
        // CAST: minutes.
        Duration::from_micros(self.below(time.as_micros() as u64 + 1))
    }
}

/// What happens at a time.
type Happening = Box<dyn FnOnce()>;

struct Timed(Reverse<(Duration, u64)>, Happening);

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// The world: true time, what will happen, and who does something.
#[derive(Default)]
pub(super) struct Sim {
    time: Var<Duration>,
    count: Var<u64>,
    queue: RefCell<BinaryHeap<Timed>>,
    tasks: RefCell<Vec<(Rc<Var<bool>>, Task)>>,
    new: RefCell<Vec<(Rc<Var<bool>>, Task)>>,
}

impl Sim {
    pub(super) fn time(&self) -> Duration {
        self.time.get()
    }

    pub(super) fn after(&self, time: Duration, what: impl FnOnce() + 'static) {
        let number = self.count.get();
        self.count.set(number + 1);
        let at = Reverse((self.time() + time, number));
        self.queue.borrow_mut().push(Timed(at, Box::new(what)));
    }

    /// A task that does nothing any more when its life has ended.
    pub(super) fn spawn(&self, life: &Rc<Var<bool>>, task: impl Future<Output = ()> + 'static) {
        self.new.borrow_mut().push((life.clone(), Box::pin(task)));
    }

    /// Waits for a time of the world.
    pub(super) async fn pass(self: &Rc<Self>, time: Duration) {
        let done = Rc::new(Var::new(false));
        let set = done.clone();
        self.after(time, move || set.set(true));
        std::future::poll_fn(|_| match done.get() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    /// Lets everything happen until `end`.
    pub(super) fn run(&self, end: Duration) {
        loop {
            loop {
                self.tasks.borrow_mut().append(&mut self.new.borrow_mut());
                let mut tasks = self.tasks.take();
                tasks.retain_mut(|(life, task)| {
                    life.get()
                        && task
                            .as_mut()
                            .poll(&mut Context::from_waker(Waker::noop()))
                            .is_pending()
                });
                self.tasks.borrow_mut().append(&mut tasks);
                if self.new.borrow().is_empty() {
                    break;
                }
            }
            let next = self.queue.borrow_mut().pop();
            match next {
                Some(Timed(Reverse((at, _)), what)) if at <= end => {
                    self.time.set(at);
                    what();
                }
                _ => break,
            }
        }
        self.tasks.borrow_mut().clear();
    }
}

/// How long something takes: mostly little, sometimes more than any rule allows.
pub(super) fn latency(dice: &Dice) -> Duration {
    match dice.below(40) {
        0 => dice.up_to(Duration::from_secs(20)),
        1..=3 => dice.up_to(Duration::from_millis(700)),
        _ => dice.up_to(Duration::from_millis(15)),
    }
}

/// What hosts are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mood {
    /// Now this, now that.
    Mixed,
    /// They are often stopped for about as long as a break watches.
    Drowsy,
}

/// A host's view of the storage, and its clock.
#[derive(Clone)]
pub(super) struct Host {
    pub(super) sim: Rc<Sim>,
    pub(super) dice: Rc<Dice>,
    pub(super) store: Rc<RefCell<Area>>,
    pub(super) mood: Mood,
    /// Thousandths of a second that its clock counts in a second, and where it began.
    pub(super) rate: u32,
    pub(super) begin: Duration,
}

impl Host {
    /// A host may be stopped at any step.
    async fn pause(&self) {
        let is_drowsy = self.mood == Mood::Drowsy;
        if !self.dice.once_in(if is_drowsy { 10 } else { 60 }) {
            return;
        }
        let time = match is_drowsy {
            true => Duration::from_secs(11) + self.dice.up_to(Duration::from_secs(3)),
            false => self.dice.up_to(Duration::from_secs(15)),
        };
        self.sim.pass(time).await;
    }

    /// The outcome of an operation that takes effect at some time before it ends; what fails may have had its effect.
    async fn operate<T: 'static>(
        &self,
        effect: impl FnOnce() -> T + 'static,
    ) -> Result<T, Failure> {
        self.pause().await;
        let place: Rc<RefCell<Option<T>>> = Rc::default();
        let (takes, fails) = (latency(&self.dice), self.dice.once_in(40));
        let is_done = !fails || self.dice.once_in(2);
        let there = place.clone();
        if is_done {
            // Once asked for it is done, even if the host dies meanwhile.
            self.sim.after(self.dice.up_to(takes), move || {
                there.replace(Some(effect()));
            });
        }
        self.sim.pass(takes).await;
        self.pause().await;
        match place.take() {
            Some(result) if !fails => Ok(result),
            _ => Err(Failure::new(Code::System, "the storage failed")),
        }
    }
}

impl World for Host {
    fn now(&self) -> Duration {
        self.begin + self.sim.time() * self.rate / 1000
    }

    fn date(&self) -> u64 {
        // Clocks of hosts show anything.
        self.dice.below(1 << 40)
    }

    async fn read(&self) -> Result<Area, Failure> {
        let store = self.store.clone();
        self.operate(move || store.borrow().clone()).await
    }

    async fn write(&self, cell: Cell, record: &Record) -> Result<(), Failure> {
        let (store, record) = (self.store.clone(), record.clone());
        self.operate(move || store.borrow_mut().set(cell, record))
            .await
    }

    async fn sleep(&self, time: Duration) {
        self.sim.pass(time * 1000 / self.rate).await;
        self.pause().await;
    }
}
