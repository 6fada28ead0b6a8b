// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes that were answered and then could not be made durable.
//!
//! The system tells such an error once to each descriptor, whoever of us made the call: the guest, an NBD
//! client, a pause. The others must learn of it too, each with its next flush, or they would take for
//! durable what is gone.

use diskio::Errno;
use std::cell::Cell;

/// Errors that whoever relies on what was written has to be told of.
#[derive(Debug, Default)]
pub struct Lost {
    count: Cell<u64>,
    last: Cell<Option<Errno>>,
    guest: Seen,
}

/// What one of those who write has been told.
#[derive(Clone, Debug, Default)]
pub struct Seen(Cell<u64>);

impl Lost {
    /// What the guest has been told.
    pub(crate) fn guest(&self) -> &Seen {
        &self.guest
    }

    /// For who begins to write now: what was lost before is not its own.
    pub(crate) fn newcomer(&self) -> Seen {
        Seen(self.count.clone())
    }

    /// The guest has not been told of all that was lost.
    pub(crate) fn is_owed(&self) -> bool {
        self.guest.0.get() != self.count.get()
    }

    /// Something was lost since the process was started.
    pub(crate) fn has_any(&self) -> bool {
        self.last.get().is_some()
    }

    /// Not all could be made durable, and nobody who writes has been told.
    pub(crate) fn add(&self, error: Errno) {
        // Who cannot make anything durable has not lost anything by saying so.
        if error != Errno::OPNOTSUPP {
            self.count.set(self.count.get().wrapping_add(1));
            self.last.set(Some(error));
        }
    }

    /// The same, and `by` is told.
    pub(crate) fn tell(&self, by: &Seen, error: Errno) {
        self.add(error);
        by.0.set(self.count.get());
    }

    /// What `by` has not been told yet, once.
    pub(crate) fn check(&self, by: &Seen) -> Result<(), Errno> {
        let count = self.count.get();
        match (by.0.replace(count) == count, self.last.get()) {
            (false, Some(error)) => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Lost;
    use diskio::Errno;

    #[test]
    fn each_is_told_once() {
        let lost = Lost::default();
        let client = lost.newcomer();
        assert_eq!(lost.check(lost.guest()), Ok(()));
        lost.add(Errno::OPNOTSUPP);
        assert_eq!(lost.check(&client), Ok(()));
        lost.add(Errno::IO);
        assert_eq!(lost.check(lost.guest()), Err(Errno::IO));
        assert_eq!(lost.check(lost.guest()), Ok(()));
        assert_eq!(lost.check(&lost.newcomer()), Ok(()));
        assert_eq!(lost.check(&client), Err(Errno::IO));
        assert_eq!(lost.check(&client), Ok(()));
        // Whose call failed knows already.
        lost.tell(&client, Errno::NOSPC);
        assert_eq!(lost.check(&client), Ok(()));
        assert_eq!(lost.check(lost.guest()), Err(Errno::NOSPC));
    }
}
