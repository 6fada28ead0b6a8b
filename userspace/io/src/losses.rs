// SPDX-License-Identifier: MIT OR Apache-2.0
//! Errors of flushes, and which flushes report them: what `errseq_t` is in Linux.
//!
//! A storage reports that it could not make something durable once, to one flush, and forgets it: a later flush
//! succeeds although writes are lost. That one flush may be any: the guest's, a flush that a driver needs before it may
//! change a table, one at a pause. The promise of a driver is:
//!
//! **An error of any flush of its storage fails the calls of [`flush`](crate::Barrier::flush) that are under way, or
//! else the next one, or the end of the disk that comes instead.** It fails no later call.
//!
//! Each driver keeps it by one [`Barrier`](crate::Barrier) for each storage that it flushes.

use crate::Errno;
use std::cell::Cell;

/// Errors of flushes, counted.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    count: Cell<u64>,
    last: Cell<Option<Errno>>,
    /// Errors that were told.
    told: Cell<u64>,
}

/// A flush that is under way: the errors that were told when it began.
#[derive(Clone, Copy, Debug)]
#[must_use = "the flush has to be ended"]
pub(crate) struct Flushing(u64);

impl Losses {
    /// Not everything was told.
    pub(crate) fn owes(&self) -> bool {
        self.told.get() != self.count.get()
    }

    /// Something may be lost. [`Errno::OPNOTSUPP`] is no loss: it says that nothing can be made durable at all.
    pub(crate) fn add(&self, error: Errno) {
        if error != Errno::OPNOTSUPP {
            self.count.set(self.count.get().wrapping_add(1));
            self.last.set(Some(error));
        }
    }

    /// A flush begins.
    pub(crate) fn begin(&self) -> Flushing {
        Flushing(self.told.get())
    }

    /// A flush ends.
    ///
    /// # Errors
    /// Something was lost that was not told when it began.
    pub(crate) fn end(&self, flushing: Flushing) -> Result<(), Errno> {
        let count = self.count.get();
        self.told.set(count);
        match (flushing.0 == count, self.last.get()) {
            (false, Some(error)) => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Losses;
    use crate::Errno;

    #[test]
    fn each_is_told_once_to_all_that_are_under_way() {
        let losses = Losses::default();
        let flush = || losses.end(losses.begin());
        losses.add(Errno::OPNOTSUPP);
        assert_eq!((flush(), losses.owes()), (Ok(()), false));
        let (first, beside) = (losses.begin(), losses.begin());
        losses.add(Errno::IO);
        assert!(losses.owes());
        assert_eq!(losses.end(first), Err(Errno::IO));
        assert_eq!(losses.end(beside), Err(Errno::IO));
        assert_eq!((flush(), losses.owes()), (Ok(()), false));
        losses.add(Errno::NOSPC);
        assert_eq!((flush(), flush()), (Err(Errno::NOSPC), Ok(())));
    }
}
