// SPDX-License-Identifier: MIT OR Apache-2.0
//! Flushes of one storage, which requests share.

use crate::losses::{Losses, SeenErrors};
use crate::{Errno, Gate};
use std::cell::Cell;

/// All flushes of one storage. One flush is under way at a time; callers during it wait for the next one, which serves
/// all of them. An error fails all callers that waited, and the next [`flush`](Self::flush).
///
/// A storage reports once, to one flush, that it could not make something durable, and forgets it, as Linux does by
/// `errseq_t`. It may report that to any flush: the guest's, or one that a driver needs before it may change a table.
#[derive(Debug, Default)]
pub struct Barrier {
    begun: Cell<u64>,
    done: Cell<u64>,
    /// The last flush that failed. It may have lost writes from before it, so tasks that waited for it must not rely on
    /// the next one, which may succeed.
    failed: Cell<Option<(u64, Errno)>>,
    gate: Gate,
    losses: Losses,
    /// Errors that were reported by [`flush`](Self::flush).
    told: SeenErrors,
}

/// A flush of the storage that is under way.
struct RunningFlush<'b> {
    barrier: &'b Barrier,
    number: u64,
    has_ended: bool,
}

impl RunningFlush<'_> {
    fn end(mut self, done: Result<(), Errno>) {
        self.has_ended = true;
        match done {
            Ok(()) => self.barrier.done.set(self.number),
            Err(error) => self.barrier.lose(error),
        }
    }
}

impl Drop for RunningFlush<'_> {
    fn drop(&mut self) {
        // The flush may fail later, and the storage would report that to a call without a caller.
        if !self.has_ended {
            self.barrier.lose(Errno::IO);
        }
    }
}

impl Barrier {
    /// Returns the number of the next flush to begin: when it is [`done`](Self::done), all writes until now are
    /// durable.
    pub fn next(&self) -> u64 {
        self.begun.get() + 1
    }

    /// The last flush that succeeded.
    pub fn done(&self) -> u64 {
        self.done.get()
    }

    /// Returns the number of the last flush that failed: tasks that waited for it, or for an earlier one that is not
    /// known to have succeeded, may have lost their writes.
    pub fn lost(&self) -> u64 {
        self.failed.get().map_or(0, |(number, _)| number)
    }

    /// Returns true if [`flush`](Self::flush) has not reported an error yet.
    pub fn owes(&self) -> bool {
        self.losses.owes(&self.told)
    }

    /// Records that the storage has reported an error to a flush that is under way. A flush that fails is recorded when
    /// it ends; `work` calls this before, if it has more to do and the process may die meanwhile.
    pub fn lose(&self, error: Errno) {
        // Writes that ended during it may be lost too, and the storage reports that once: tasks that have asked for the
        // next flush during it must not rely on that one either.
        let last = self.next();
        self.begun.set(last);
        self.failed.set(Some((last, error)));
        self.losses.add(error);
    }

    /// For the driver itself: makes all writes durable that ended before this call. `work` flushes the storage.
    ///
    /// # Errors
    /// Writes may be lost. [`flush`](Self::flush) reports that again.
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
        let running = RunningFlush {
            barrier: self,
            number,
            has_ended: false,
        };
        let done = work().await;
        running.end(done);
        done
    }

    /// Flushes that have failed until now, for [`settle_since`](Self::settle_since).
    pub fn errors(&self) -> u64 {
        self.losses.count()
    }

    /// Makes all writes durable that came since there was this number of [`errors`](Self::errors), for the driver
    /// itself. A flush that failed after a write, and before this call, may have lost that, and no later flush says so.
    ///
    /// # Errors
    /// As of [`settle`](Self::settle), or a flush has failed since then.
    pub async fn settle_since(
        &self,
        errors: u64,
        work: impl AsyncFnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        self.settle(work).await?;
        match self.losses.last() {
            Some(error) if self.errors() != errors => Err(error),
            _ => Ok(()),
        }
    }

    /// For those whom the driver serves: as [`settle`](Self::settle), and fails as well if any flush has failed since
    /// the last call.
    ///
    /// # Errors
    /// Earlier writes may be lost.
    pub async fn flush(&self, work: impl AsyncFnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let flushing = self.losses.begin(&self.told);
        let done = self.settle(work).await;
        // An error of `settle` is counted already.
        self.losses.end(&self.told, flushing, Ok(())).and(done)
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
    fn flush_after_one_that_failed_says_nothing_of_what_was_written_before() {
        let runtime = Runtime::new();
        let told = runtime.block_on(async {
            let barrier = Barrier::default();
            let errors = barrier.errors();
            let lost = barrier.flush(async || Err(Errno::NOSPC)).await;
            let first = barrier.settle_since(errors, async || Ok(())).await;
            let later = barrier.errors();
            (
                lost,
                first,
                barrier.settle_since(later, async || Ok(())).await,
            )
        });
        let error = Err(Errno::NOSPC);
        assert_eq!(told.unwrap(), (error, error, Ok(())));
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
