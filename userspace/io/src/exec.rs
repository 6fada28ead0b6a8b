// SPDX-License-Identifier: MIT OR Apache-2.0
//! An executor for one thread.

use crate::Io;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

/// Tasks that were woken. Wakers may be called from anywhere.
#[derive(Debug, Default)]
struct WokenTasks(Mutex<Vec<usize>>);

impl WokenTasks {
    fn list(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        // A panic elsewhere leaves a list that is whole.
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Wakes one place of the executor. The waker stays with the place, so it may outlive its task and wake the next one,
/// which does no harm.
struct TaskSlot {
    number: usize,
    queued: AtomicBool,
    woken: Arc<WokenTasks>,
}

impl Wake for TaskSlot {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Pairs with the store in `run`: a task is listed once.
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.woken.list().push(self.number);
        }
    }
}

/// Polls futures. Copies are the same thing.
#[derive(Clone, Default)]
pub struct Executor(Rc<ExecutorState>);

/// A place and its task.
struct Seat {
    task: Option<BoxedTask>,
    place: Arc<TaskSlot>,
    waker: Waker,
}

#[derive(Default)]
struct ExecutorState {
    woken: Arc<WokenTasks>,
    places: RefCell<Vec<Seat>>,
    free: RefCell<Vec<usize>>,
    tasks: Cell<usize>,
    /// Tasks that `run` polls; kept for its memory.
    polling: RefCell<Vec<usize>>,
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Executor")
            .field("tasks", &self.0.tasks.get())
            .finish_non_exhaustive()
    }
}

impl Executor {
    /// Adds a task; it is polled by the next [`run`](Self::run).
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let task: BoxedTask = Box::pin(task);
        let mut places = self.0.places.borrow_mut();
        let free = self.0.free.borrow_mut().pop();
        let number = free.unwrap_or_else(|| {
            let place = Arc::new(TaskSlot {
                number: places.len(),
                queued: AtomicBool::new(false),
                woken: self.0.woken.clone(),
            });
            places.push(Seat {
                task: None,
                waker: Waker::from(place.clone()),
                place,
            });
            places.len() - 1
        });
        let seat = &mut places[number];
        seat.task = Some(task);
        seat.waker.wake_by_ref();
        self.0.tasks.set(self.0.tasks.get() + 1);
    }

    /// Polls every task that was woken, once. True if there were any.
    pub fn run(&self) -> bool {
        let mut woken = self.0.polling.take();
        std::mem::swap(&mut woken, &mut self.0.woken.list());
        let ran = !woken.is_empty();
        for number in woken.drain(..) {
            self.poll(number);
        }
        *self.0.polling.borrow_mut() = woken;
        ran
    }

    fn poll(&self, number: usize) {
        let (task, waker) = {
            let mut places = self.0.places.borrow_mut();
            let seat = &mut places[number];
            seat.place.queued.store(false, Ordering::Release);
            (seat.task.take(), seat.waker.clone())
        };
        // The task may have ended since it was woken. Polling may spawn other tasks.
        let Some(mut task) = task else {
            return;
        };
        match task.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => self.0.places.borrow_mut()[number].task = Some(task),
            Poll::Ready(()) => {
                drop(task);
                self.0.free.borrow_mut().push(number);
                self.0.tasks.set(self.0.tasks.get() - 1);
            }
        }
    }

    /// Drops all tasks in their present state. A task that holds this executor would otherwise keep it, and itself, for
    /// ever. The task that calls this stays.
    pub fn clear(&self) {
        loop {
            let tasks: Vec<BoxedTask> = {
                let mut places = self.0.places.borrow_mut();
                let mut free = self.0.free.borrow_mut();
                let seats = places.iter_mut().filter_map(|seat| {
                    let task = seat.task.take()?;
                    free.push(seat.place.number);
                    Some(task)
                });
                seats.collect()
            };
            // A task that is dropped may spawn another one.
            if tasks.is_empty() {
                return;
            }
            self.0.tasks.set(self.0.tasks.get() - tasks.len());
        }
    }

    /// A task was woken and not polled yet.
    pub fn is_ready(&self) -> bool {
        !self.0.woken.list().is_empty()
    }

    /// Tasks that have not ended.
    pub fn tasks(&self) -> usize {
        self.0.tasks.get()
    }
}

/// Tasks and the operations they wait for. Copies are the same thing.
#[derive(Clone, Debug, Default)]
pub struct Runtime {
    /// The tasks.
    pub tasks: Executor,
    /// Their operations.
    pub io: Io,
}

impl Runtime {
    /// With plain calls at first, see [`Io::select`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Polls all tasks that are ready, submits their operations, and takes the results. With `wait`, sleeps if there
    /// was nothing to poll.
    pub fn turn(&self, wait: bool) -> io::Result<()> {
        self.tasks.run();
        self.io.enter(wait && !self.tasks.is_ready())
    }

    /// Runs until all tasks have ended.
    pub fn finish(&self) -> io::Result<()> {
        loop {
            self.tasks.run();
            if self.tasks.tasks() == 0 {
                return Ok(());
            }
            self.io.enter(!self.tasks.is_ready())?;
        }
    }

    /// Runs until `future` is done: for tests and tools.
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> io::Result<T> {
        let result = Rc::new(RefCell::new(None));
        let place = result.clone();
        self.tasks.spawn(async move {
            let value = future.await;
            *place.borrow_mut() = Some(value);
        });
        loop {
            self.tasks.run();
            if let Some(value) = result.borrow_mut().take() {
                return Ok(value);
            }
            self.io.enter(!self.tasks.is_ready())?;
        }
    }
}
