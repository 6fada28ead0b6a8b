// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Time, tasks and chance for models of hosts that share a storage.

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
pub(crate) struct Dice(Var<u64>);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Var::new(
            seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15),
        ))
    }

    /// Below `end`, which is not 0. (xorshift64*)
    pub(crate) fn below(&self, end: u64) -> u64 {
        let mut x = self.0.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.set(x);
        (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % end
    }

    pub(crate) fn once_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn up_to(&self, time: Duration) -> Duration {
        // CAST: minutes.
        Duration::from_micros(self.below(time.as_micros() as u64 + 1))
    }
}

/// Action at a time.
type SimEvent = Box<dyn FnOnce()>;

struct TimedEvent(Reverse<(Duration, u64)>, SimEvent);

impl PartialEq for TimedEvent {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}
impl Eq for TimedEvent {}
impl PartialOrd for TimedEvent {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for TimedEvent {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

type SimTask = Pin<Box<dyn Future<Output = ()>>>;

/// The world: true time, what will happen, and who does something.
#[derive(Default)]
pub(crate) struct Sim {
    time: Var<Duration>,
    count: Var<u64>,
    queue: RefCell<BinaryHeap<TimedEvent>>,
    tasks: RefCell<Vec<(Rc<Var<bool>>, SimTask)>>,
    new: RefCell<Vec<(Rc<Var<bool>>, SimTask)>>,
}

impl Sim {
    pub(crate) fn time(&self) -> Duration {
        self.time.get()
    }

    pub(crate) fn after(&self, time: Duration, what: impl FnOnce() + 'static) {
        let number = self.count.get();
        self.count.set(number + 1);
        let at = Reverse((self.time() + time, number));
        self.queue.borrow_mut().push(TimedEvent(at, Box::new(what)));
    }

    /// A task that does nothing any more when its life has ended.
    pub(crate) fn spawn(&self, life: &Rc<Var<bool>>, task: impl Future<Output = ()> + 'static) {
        self.new.borrow_mut().push((life.clone(), Box::pin(task)));
    }

    /// Waits for a time of the world.
    pub(crate) async fn pass(self: &Rc<Self>, time: Duration) {
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
    pub(crate) fn run(&self, end: Duration) {
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
                Some(TimedEvent(Reverse((at, _)), what)) if at <= end => {
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
pub(crate) fn latency(dice: &Dice) -> Duration {
    match dice.below(40) {
        0 => dice.up_to(Duration::from_secs(20)),
        1..=3 => dice.up_to(Duration::from_millis(700)),
        _ => dice.up_to(Duration::from_millis(15)),
    }
}
