// SPDX-License-Identifier: MIT OR Apache-2.0
//! Errors of flushes, and which flushes report them: what `errseq_t` is in Linux.
//!
//! A storage reports that it could not make something durable once, to one flush, and forgets it: a later flush
//! succeeds although writes are lost. It may report that to any flush: the guest's, one that a driver needs before it
//! may change a table, or one at a pause. The promise is:
//!
//! **A write that was acknowledged and may be lost fails the next flush of each who writes: the first flush that begins
//! after the acknowledgement.** An error fails no later flush than it has to.
//!
//! `docs/explanation/flush-errors.md` states the promise and its limits. Two parts keep it. A driver has one
//! [`Barrier`](crate::Barrier) for each storage that it flushes, so that an error of any flush fails the next call of its
//! `flush`, or of the `inactivate` or `close` that comes instead. tapdisk counts those, and the writes that it
//! acknowledges, in [`Losses`], which outlive the driver, and hands them to the next process.

use crate::Errno;
use std::cell::Cell;

/// Errors of flushes, and when they happened relative to writes that were acknowledged.
#[derive(Debug, Default)]
pub struct Losses {
    count: Cell<u64>,
    last: Cell<Option<Errno>>,
    /// Acknowledged writes.
    writes: Cell<u64>,
    /// Acknowledged writes when the last error happened.
    writes_at_last: Cell<u64>,
}

/// Number of errors that a client, such as the guest, knows of.
#[derive(Clone, Debug, Default)]
pub struct SeenErrors(Cell<u64>);

/// A flush that is under way.
#[derive(Clone, Copy, Debug)]
#[must_use = "the flush has to be ended"]
pub struct Flushing {
    /// Errors that the client knew of when it began.
    told: u64,
    /// Writes that were acknowledged when it began.
    writes: u64,
}

/// A write that is under way.
#[derive(Clone, Copy, Debug)]
#[must_use = "a write that succeeds is acknowledged"]
pub struct Writing {
    /// Errors that had happened when it began.
    count: u64,
}

impl Losses {
    /// For one that begins to write now: earlier losses are not its own.
    pub fn newcomer(&self) -> SeenErrors {
        SeenErrors(self.count.clone())
    }

    /// Returns true if `by` does not know of all errors.
    pub fn owes(&self, by: &SeenErrors) -> bool {
        by.0.get() != self.count.get()
    }

    /// Something was lost since the process was started.
    pub fn has_any(&self) -> bool {
        self.last.get().is_some()
    }

    /// Number of errors.
    pub fn count(&self) -> u64 {
        self.count.get()
    }

    /// The last error.
    pub fn last(&self) -> Option<Errno> {
        self.last.get()
    }

    /// Acknowledged writes may be lost. [`Errno::OPNOTSUPP`] is no loss: it says that nothing can be made durable at all.
    pub fn add(&self, error: Errno) {
        if error != Errno::OPNOTSUPP {
            self.count.set(self.count.get().wrapping_add(1));
            self.last.set(Some(error));
            self.writes_at_last.set(self.writes.get());
        }
    }

    /// A flush of `by` begins.
    pub fn begin(&self, by: &SeenErrors) -> Flushing {
        Flushing {
            told: by.0.get(),
            writes: self.writes.get(),
        }
    }

    /// Ends a flush of `by` with the result `done`; returns an error if a write was lost of which `by` did not know
    /// when the flush began.
    ///
    /// # Errors
    /// Writes may be lost, or `done` is an error.
    pub fn end(
        &self,
        by: &SeenErrors,
        flushing: Flushing,
        done: Result<(), Errno>,
    ) -> Result<(), Errno> {
        if let Err(error) = done {
            self.add(error);
        }
        if flushing.told == self.count.get() {
            return done;
        }
        // A write that was acknowledged since the flush began, and before the last error, fails the next one.
        if flushing.writes >= self.writes_at_last.get() {
            by.0.set(self.count.get());
        }
        // `done` may say less: that the storage knows no flushes.
        self.last.get().map_or(done, Err)
    }

    /// A write begins.
    pub fn write(&self) -> Writing {
        Writing {
            count: self.count.get(),
        }
    }

    /// The last error, if one has happened while a write was under way: it may concern what that has written already.
    pub fn since(&self, writing: &Writing) -> Option<Errno> {
        self.last
            .get()
            .filter(|_| writing.count != self.count.get())
    }

    /// A write has succeeded, and is acknowledged. A loss while it was under way may concern it.
    pub fn acknowledge(&self, writing: Writing) {
        self.writes.set(self.writes.get().wrapping_add(1));
        if let Some(error) = self.since(&writing) {
            self.add(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Losses, SeenErrors};
    use crate::Errno;

    fn flush(losses: &Losses, by: &SeenErrors) -> Result<(), Errno> {
        losses.end(by, losses.begin(by), Ok(()))
    }

    #[test]
    fn each_is_told_once() {
        let losses = Losses::default();
        let (guest, client) = (SeenErrors::default(), losses.newcomer());
        losses.add(Errno::OPNOTSUPP);
        assert_eq!(flush(&losses, &client), Ok(()));
        losses.add(Errno::IO);
        assert!(losses.owes(&guest) && losses.has_any());
        assert_eq!(flush(&losses, &guest), Err(Errno::IO));
        assert_eq!(flush(&losses, &guest), Ok(()));
        assert_eq!(flush(&losses, &losses.newcomer()), Ok(()));
        assert_eq!(flush(&losses, &client), Err(Errno::IO));
        assert_eq!(flush(&losses, &client), Ok(()));
    }

    #[test]
    fn flush_that_fails_is_told_itself_and_for_all_others() {
        let losses = Losses::default();
        let (guest, client) = (SeenErrors::default(), SeenErrors::default());
        let first = losses.begin(&guest);
        let beside = losses.begin(&guest);
        let failed = losses.end(&guest, first, Err(Errno::NOSPC));
        assert_eq!(failed, Err(Errno::NOSPC));
        // The storage has reported the error to the first flush only.
        let failed = losses.end(&guest, beside, Ok(()));
        assert_eq!(failed, Err(Errno::NOSPC));
        assert_eq!(flush(&losses, &guest), Ok(()));
        assert_eq!(flush(&losses, &client), Err(Errno::NOSPC));
        let unable = losses.end(&guest, losses.begin(&guest), Err(Errno::OPNOTSUPP));
        assert_eq!(unable, Err(Errno::OPNOTSUPP));
        assert_eq!(flush(&losses, &client), Ok(()));
    }

    #[test]
    fn writes_between_an_error_and_the_flush_that_reports_it_change_nothing() {
        let (losses, guest) = (Losses::default(), SeenErrors::default());
        losses.acknowledge(losses.write());
        losses.add(Errno::IO);
        losses.acknowledge(losses.write());
        assert_eq!(flush(&losses, &guest), Err(Errno::IO));
        assert_eq!(flush(&losses, &guest), Ok(()));
    }

    #[test]
    fn flush_does_not_speak_for_writes_behind_its_beginning() {
        for is_acknowledged_first in [true, false] {
            let (losses, guest) = (Losses::default(), SeenErrors::default());
            let flushing = losses.begin(&guest);
            let writing = losses.write();
            if is_acknowledged_first {
                losses.acknowledge(writing);
            }
            assert!(losses.end(&guest, flushing, Err(Errno::IO)).is_err());
            if !is_acknowledged_first {
                losses.acknowledge(writing);
            }
            assert_eq!(flush(&losses, &guest), Err(Errno::IO));
            // Later writes are none of those that were lost.
            losses.acknowledge(losses.write());
            assert_eq!(flush(&losses, &guest), Ok(()));
        }
    }
}
