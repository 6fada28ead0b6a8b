// SPDX-License-Identifier: MIT OR Apache-2.0
//! Flushes that requests share.

use crate::bell::Bell;
use crate::Storage;
use diskio::Errno;
use std::cell::Cell;

/// Makes an image durable; who asks while a flush is under way waits for the next one, which serves all
/// who wait.
#[derive(Debug)]
pub(crate) struct Barrier<S> {
    /// The data first, so that no metadata is durable much before it.
    storages: Vec<S>,
    begun: Cell<u64>,
    done: Cell<u64>,
    /// The last flush that failed. It may have lost what was written before it, so nobody who waited
    /// for it may take the next one for his own.
    failed: Cell<Option<(u64, Errno)>>,
    running: Cell<bool>,
    bell: Bell,
    owed: Owed,
}

/// An error of a flush that the guest has not heard of as one of a flush: who wanted it for a write has failed that,
/// and what others have written and was answered may be lost with it. The storage tells it once.
#[derive(Debug, Default)]
pub(crate) struct Owed(Cell<Option<Errno>>);

impl Owed {
    /// How a flush has ended.
    pub(crate) fn note(&self, flushed: Result<(), Errno>) -> Result<(), Errno> {
        flushed.inspect_err(|error| self.0.set(Some(*error)))
    }

    /// What the guest's flush has to say beside its own result.
    pub(crate) fn pay(&self) -> Result<(), Errno> {
        self.0.take().map_or(Ok(()), Err)
    }
}

/// The flush is over, even if it was dropped.
struct Running<'b, S>(&'b Barrier<S>);

impl<S> Drop for Running<'_, S> {
    fn drop(&mut self) {
        self.0.running.set(false);
        self.0.bell.ring();
    }
}

impl<S: Storage> Barrier<S> {
    pub(crate) fn new(storages: Vec<S>) -> Self {
        Self {
            storages,
            begun: Cell::new(0),
            done: Cell::new(0),
            failed: Cell::new(None),
            running: Cell::new(false),
            bell: Bell::default(),
            owed: Owed::default(),
        }
    }

    /// What the guest's flush has to say beside its own result.
    pub(crate) fn pay(&self) -> Result<(), Errno> {
        self.owed.pay()
    }

    /// The number of the next flush to begin: when it is [`done`](Self::done), what is written by now is
    /// durable.
    pub(crate) fn next(&self) -> u64 {
        self.begun.get() + 1
    }

    /// The last flush that succeeded.
    pub(crate) fn done(&self) -> u64 {
        self.done.get()
    }

    /// Whoever waited for this one, or for an earlier one that is not known to have succeeded, may have
    /// lost what was written.
    pub(crate) fn lost(&self) -> u64 {
        self.failed.get().map_or(0, |(number, _)| number)
    }

    /// What was written before this call is durable when it returns.
    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        let wanted = self.next();
        loop {
            if let Some((_, error)) = self.failed.get().filter(|(number, _)| *number >= wanted) {
                return Err(error);
            }
            if self.done.get() >= wanted {
                return Ok(());
            }
            if self.running.get() {
                self.bell
                    .until(|| (!self.running.get()).then_some(()))
                    .await;
                continue;
            }
            self.running.set(true);
            let running = Running(self);
            let number = self.next();
            self.begun.set(number);
            match self.owed.note(self.flush_all().await) {
                Ok(()) => self.done.set(number),
                Err(error) => {
                    // What was written while it ran may be lost too, and the storage tells that once: who
                    // asked meanwhile for the next one must not take it for his own either.
                    let last = self.next();
                    self.begun.set(last);
                    self.failed.set(Some((last, error)));
                }
            }
            drop(running);
        }
    }

    async fn flush_all(&self) -> Result<(), Errno> {
        for storage in &self.storages {
            storage.flush().await?;
        }
        Ok(())
    }
}
