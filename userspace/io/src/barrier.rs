// SPDX-License-Identifier: MIT OR Apache-2.0
//! Flushes of one storage, which requests share.

use crate::losses::Losses;
use crate::{Errno, Gate};
use std::cell::Cell;

/// All flushes of one storage. One is under way at a time; those who ask meanwhile wait for the next one, which serves
/// them all. An error fails everyone who waited, and the next [`flush`](Self::flush).
///
/// A storage reports once, to one flush, that it could not make something durable, and forgets it, as Linux does by
/// `errseq_t`. That flush may be any: the guest's, or one that a driver needs before it may change a table.
#[derive(Debug, Default)]
pub struct Barrier {
    begun: Cell<u64>,
    done: Cell<u64>,
    /// The last flush that failed. It may have lost what was written before it, so nobody who waited
    /// for it may take the next one for his own.
    failed: Cell<Option<(u64, Errno)>>,
    gate: Gate,
    losses: Losses,
}

/// A flush of the storage that is under way.
struct Running<'b> {
    barrier: &'b Barrier,
    number: u64,
    has_ended: bool,
}

impl Running<'_> {
    fn end(mut self, done: Result<(), Errno>) {
        self.has_ended = true;
        match done {
            Ok(()) => self.barrier.done.set(self.number),
            Err(error) => self.barrier.lose(error),
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // It may fail yet, and the storage would tell that to a call that nobody waits for.
        if !self.has_ended {
            self.barrier.lose(Errno::IO);
        }
    }
}

impl Barrier {
    /// The number of the next flush to begin: when it is [`done`](Self::done), what is written by now is
    /// durable.
    pub fn next(&self) -> u64 {
        self.begun.get() + 1
    }

    /// The last flush that succeeded.
    pub fn done(&self) -> u64 {
        self.done.get()
    }

    /// Whoever waited for this one, or for an earlier one that is not known to have succeeded, may have
    /// lost what was written.
    pub fn lost(&self) -> u64 {
        self.failed.get().map_or(0, |(number, _)| number)
    }

    /// An error was not told by [`flush`](Self::flush) yet.
    pub fn owes(&self) -> bool {
        self.losses.owes()
    }

    fn lose(&self, error: Errno) {
        // What was written while it ran may be lost too, and the storage tells that once: who
        // asked meanwhile for the next one must not take it for his own either.
        let last = self.next();
        self.begun.set(last);
        self.failed.set(Some((last, error)));
        self.losses.add(error);
    }

    /// For the driver itself: what was written before this call is durable when it returns. `work` flushes the storage.
    ///
    /// # Errors
    /// It may be lost. [`flush`](Self::flush) tells that again.
    pub async fn settle(&self, work: impl AsyncFnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let wanted = self.next();
        let _alone = self.gate.alone().await;
        if let Some((_, error)) = self.failed.get().filter(|(number, _)| *number >= wanted) {
            return Err(error);
        }
        if self.done.get() >= wanted {
            return Ok(());
        }
        let number = self.next();
        self.begun.set(number);
        let running = Running {
            barrier: self,
            number,
            has_ended: false,
        };
        let done = work().await;
        running.end(done);
        done
    }

    /// For those whom the driver serves: as [`settle`](Self::settle), and fails as well if any flush has failed since
    /// the last call.
    ///
    /// # Errors
    /// Something that was written may be lost.
    pub async fn flush(&self, work: impl AsyncFnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let flushing = self.losses.begin();
        let done = self.settle(work).await;
        // An error of `settle` is counted already.
        done.and(self.losses.end(flushing))
    }
}

#[cfg(test)]
mod tests {
    use super::Barrier;
    use crate::{Errno, Runtime};
    use std::cell::{Cell, RefCell};
    use std::future::{poll_fn, Future};
    use std::rc::Rc;
    use std::task::Poll;

    type Ends = Rc<RefCell<Vec<(&'static str, Result<(), Errno>)>>>;

    /// Takes a turn.
    async fn turn() {
        let mut is_over = false;
        poll_fn(|cx| match std::mem::replace(&mut is_over, true) {
            true => Poll::Ready(()),
            false => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        })
        .await;
    }

    #[test]
    fn error_of_one_fails_all_who_waited_and_the_next() {
        let runtime = Runtime::new();
        let (barrier, ends) = (Rc::new(Barrier::default()), Ends::default());
        let calls = Rc::new(Cell::new(0));
        for name in ["driver", "first", "second"] {
            let (barrier, ends, calls) = (barrier.clone(), ends.clone(), calls.clone());
            runtime.tasks.spawn(async move {
                let work = async || {
                    calls.set(calls.get() + 1);
                    turn().await;
                    // The first call fails, and no other one does.
                    match calls.get() {
                        1 => Err(Errno::IO),
                        _ => Ok(()),
                    }
                };
                let done = match name {
                    "driver" => barrier.settle(work).await,
                    _ => barrier.flush(work).await,
                };
                ends.borrow_mut().push((name, done));
            });
        }
        runtime.finish().unwrap();
        let failed = Err(Errno::IO);
        let expected = [("driver", failed), ("first", failed), ("second", failed)];
        assert_eq!(ends.take(), expected);
        assert_eq!((calls.get(), barrier.owes(), barrier.done()), (1, false, 0));
        let again = barrier.clone();
        let next = runtime.block_on(async move { again.flush(async || Ok(())).await });
        assert_eq!(
            (next.unwrap(), barrier.done()),
            (Ok(()), barrier.lost() + 1)
        );
    }

    #[test]
    fn error_that_the_driver_met_is_told_once() {
        let runtime = Runtime::new();
        let told = runtime.block_on(async {
            let barrier = Barrier::default();
            let fails = async || Err(Errno::NOSPC);
            let first = barrier.settle(fails).await;
            let owes = barrier.owes();
            let second = barrier.settle(async || Ok(())).await;
            let told = barrier.flush(async || Ok(())).await;
            (
                first,
                owes,
                second,
                told,
                barrier.flush(async || Ok(())).await,
            )
        });
        let error = Err(Errno::NOSPC);
        assert_eq!(told.unwrap(), (error, true, Ok(()), error, Ok(())));
    }

    #[test]
    fn flush_that_nobody_waits_for_any_more_may_have_failed() {
        let runtime = Runtime::new();
        let told = runtime.block_on(async {
            let barrier = Barrier::default();
            {
                let mut dropped = std::pin::pin!(barrier.settle(async || {
                    std::future::pending::<()>().await;
                    Ok(())
                }));
                poll_fn(|cx| Poll::Ready(dropped.as_mut().poll(cx).is_pending())).await;
            }
            (barrier.owes(), barrier.flush(async || Ok(())).await)
        });
        assert_eq!(told.unwrap(), (true, Err(Errno::IO)));
    }
}
