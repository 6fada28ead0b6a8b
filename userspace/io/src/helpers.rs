// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads for work that would keep the one that serves requests: a call that may sleep and has no
//! asynchronous form, or a long computation.
//!
//! The threads start before a sandbox closes, which must then be applied to each of them
//! ([`Io::on_helpers`](crate::Io::on_helpers)).

use crate::{Errno, Io};
use rustix::event::{eventfd, EventfdFlags};
use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Bytes of a helper's stack.
const STACK: usize = 256 << 10;

type HelperJob = Box<dyn FnOnce() + Send>;

/// Tells the thread that waits that a job is done.
#[derive(Clone, Debug)]
struct Bell {
    /// For the operation that waits.
    here: Rc<OwnedFd>,
    /// For the helper: the same.
    there: Arc<OwnedFd>,
}

/// The helper threads, which end when this is dropped.
#[derive(Debug)]
pub(crate) struct Helpers {
    jobs: Sender<HelperJob>,
    count: usize,
    /// Unused bells.
    bells: RefCell<Vec<Bell>>,
}

impl Helpers {
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let (jobs, queue) = channel();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..count {
            let queue = queue.clone();
            let builder = thread::Builder::new().name("helper".into());
            builder.stack_size(STACK).spawn(move || work(&queue))?;
        }
        Ok(Self {
            jobs,
            count,
            bells: RefCell::default(),
        })
    }

    /// Has every thread do the same, and waits for that.
    pub(crate) fn on_each(
        &self,
        work: impl Fn() -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<()> {
        let work = Arc::new(work);
        let (sender, results) = channel();
        // No helper gets a second job before each has one.
        let all = Arc::new(Barrier::new(self.count));
        for _ in 0..self.count {
            let (work, sender, all) = (work.clone(), sender.clone(), all.clone());
            self.send(Box::new(move || {
                all.wait();
                // If another helper has failed, the receiver is gone.
                let _ = sender.send(work());
            }))?;
        }
        drop(sender);
        for _ in 0..self.count {
            results
                .recv()
                .map_err(|_| io::Error::other("a helper thread has panicked"))??;
        }
        Ok(())
    }

    /// Returns the result of `work`, which a helper does. The work continues if the caller stops waiting.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        io: &Io,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno> {
        let bell = self.bell()?;
        let result = Arc::new(Mutex::new(None));
        let (place, there) = (result.clone(), bell.there.clone());
        self.send(Box::new(move || {
            let value = catch_unwind(AssertUnwindSafe(work)).ok();
            *locked(&place) = value;
            // A counter at 0 has room for one.
            let _ = rustix::io::write(&there, &1_u64.to_ne_bytes());
        }))
        .map_err(|_| Errno::IO)?;
        io.readable(&bell.here).await?;
        rustix::io::read(&bell.here, &mut [0; 8])?;
        self.bells.borrow_mut().push(bell);
        let value = locked(&result).take();
        // The job has panicked, and has printed the reason.
        value.ok_or(Errno::IO)
    }

    fn send(&self, job: HelperJob) -> io::Result<()> {
        let sent = self.jobs.send(job);
        sent.map_err(|_| io::Error::other("there is no helper thread any more"))
    }

    fn bell(&self) -> Result<Bell, Errno> {
        if let Some(bell) = self.bells.borrow_mut().pop() {
            return Ok(bell);
        }
        let here = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let there = here.try_clone();
        let there = there.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(Bell {
            here: Rc::new(here),
            there: Arc::new(there),
        })
    }
}

/// Does one job after the other.
fn work(queue: &Mutex<Receiver<HelperJob>>) {
    loop {
        let job = locked(queue).recv();
        match job {
            Ok(job) => drop(catch_unwind(AssertUnwindSafe(job))),
            Err(_) => return,
        }
    }
}

/// Data behind this lock is never in an inconsistent state, even if a thread panics.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
