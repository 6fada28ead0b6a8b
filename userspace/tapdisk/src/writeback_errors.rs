// SPDX-License-Identifier: MIT OR Apache-2.0
//! Acknowledged writes of a disk that may be lost, and the clients that know of them: [`Losses`], over all images that
//! serve the disk in turn.
//!
//! An error is stored for the next process as soon as it occurs, so before any answer to the guest that depends on it:
//! the guest learns of it even if this process dies.

use diskio::{Errno, Flushing, Losses, SeenErrors, Writing};
use std::cell::{Cell, RefCell};

/// Function that stores the error that the guest must learn of for the next process; `None` if there is none any more.
type ErrorKeeper = Box<dyn Fn(Option<Errno>)>;

/// Turns after which an answer is with the kernel.
const TURNS: u32 = 3;

/// Errors that the guest, and each other client, must learn of.
#[derive(Default)]
pub struct WritebackErrors {
    losses: Losses,
    guest: SeenErrors,
    /// Error that was handed on.
    kept: Cell<Option<Errno>>,
    /// Errors until then.
    kept_count: Cell<u64>,
    /// Turns since the guest was owed nothing any more.
    turns: Cell<u32>,
    keep: RefCell<Option<ErrorKeeper>>,
}

impl std::fmt::Debug for WritebackErrors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.losses.fmt(f)
    }
}

impl WritebackErrors {
    /// Returns the errors that the guest knows of.
    pub(crate) fn guest(&self) -> &SeenErrors {
        &self.guest
    }

    /// As [`Losses::newcomer`].
    pub(crate) fn newcomer(&self) -> SeenErrors {
        self.losses.newcomer()
    }

    /// Returns true if the guest does not know of all lost writes.
    pub(crate) fn is_owed(&self) -> bool {
        self.losses.owes(&self.guest)
    }

    /// As [`Losses::has_any`].
    pub(crate) fn has_any(&self) -> bool {
        self.losses.has_any()
    }

    /// As [`Losses::write`].
    pub(crate) fn write(&self) -> Writing {
        self.losses.write()
    }

    /// As [`Losses::since`].
    pub(crate) fn since(&self, writing: &Writing) -> Option<Errno> {
        self.losses.since(writing)
    }

    /// As [`Losses::acknowledge`].
    pub(crate) fn acknowledge(&self, writing: Writing) {
        self.losses.acknowledge(writing);
        self.hand_on();
    }

    /// As [`Losses::add`].
    pub(crate) fn add(&self, error: Errno) {
        self.losses.add(error);
        self.hand_on();
    }

    /// As [`Losses::begin`].
    pub(crate) fn begin(&self, by: &SeenErrors) -> Flushing {
        self.losses.begin(by)
    }

    /// As [`Losses::end`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn end(
        &self,
        by: &SeenErrors,
        flushing: Flushing,
        done: Result<(), Errno>,
    ) -> Result<(), Errno> {
        let told = self.losses.end(by, flushing, done);
        self.hand_on();
        told
    }

    /// Stores the guest's pending error with `keep` from now on. The previous process left `before`.
    pub(crate) fn keep_by(&self, before: Option<Errno>, keep: ErrorKeeper) {
        if let Some(error) = self.kept.get() {
            keep(Some(error));
        }
        self.keep.replace(Some(keep));
        if let Some(error) = before {
            self.kept.set(Some(error));
            self.add(error);
        }
    }

    /// Stores an error for the next process when it occurs, even if the guest gets it at once, because that answer is
    /// not in the kernel yet.
    fn hand_on(&self) {
        if self.kept_count.replace(self.losses.count()) != self.losses.count() {
            self.turns.set(0);
            self.hand(self.losses.last());
        }
    }

    /// A turn begins, in which answers go to the kernel. Errors that only a driver knows are stored before that; some
    /// turns after the guest has got its error, the stored one is deleted.
    pub(crate) fn turn(&self, driver_owes: bool) {
        match (self.kept.get(), driver_owes || self.is_owed()) {
            (None, true) => self.hand(Some(self.losses.last().unwrap_or(Errno::IO))),
            (Some(_), true) => self.turns.set(0),
            (Some(_), false) if self.turns.get() >= TURNS => self.hand(None),
            (Some(_), false) => self.turns.set(self.turns.get() + 1),
            (None, false) => {}
        }
    }

    fn hand(&self, owed: Option<Errno>) {
        if self.kept.replace(owed) == owed {
            return;
        }
        if let Some(keep) = &*self.keep.borrow() {
            keep(owed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{WritebackErrors, TURNS};
    use diskio::Errno;
    use std::cell::RefCell;
    use std::rc::Rc;

    #[test]
    fn what_the_guest_is_owed_is_handed_on_until_it_is_told() {
        let kept = Rc::new(RefCell::new(Vec::new()));
        let (lost, its) = (WritebackErrors::default(), kept.clone());
        lost.keep_by(None, Box::new(move |owed| its.borrow_mut().push(owed)));
        let turns = |count| (0..count).for_each(|_| lost.turn(false));
        let flush = |done| lost.end(lost.guest(), lost.begin(lost.guest()), done);
        turns(9);
        assert_eq!(flush(Ok(())), Ok(()));
        assert!(kept.borrow().is_empty());
        // A driver knows of it, and then a flush reports it.
        (0..9).for_each(|_| lost.turn(true));
        assert_eq!(kept.take(), [Some(Errno::IO)]);
        assert_eq!(flush(Err(Errno::NOSPC)), Err(Errno::NOSPC));
        assert_eq!(kept.take(), [Some(Errno::NOSPC)], "the answer is to come");
        turns(TURNS);
        assert!(kept.borrow().is_empty(), "the answer may be on its way");
        turns(9);
        assert_eq!(kept.take(), [None]);
        // A flush that fails without that anything was known before.
        assert_eq!(flush(Err(Errno::IO)), Err(Errno::IO));
        assert_eq!(kept.take(), [Some(Errno::IO)]);
        // A write beside it that is answered later, which is owed to the guest.
        let writing = lost.write();
        lost.add(Errno::IO);
        lost.acknowledge(writing);
        turns(9);
        assert!(kept.borrow().is_empty() && lost.is_owed());
    }

    #[test]
    fn next_process_owes_what_the_one_before_left() {
        let lost = WritebackErrors::default();
        lost.keep_by(Some(Errno::NOSPC), Box::new(|_| ()));
        assert!(lost.is_owed());
        let flushing = lost.begin(lost.guest());
        let told = lost.end(lost.guest(), flushing, Ok(()));
        assert_eq!((told, lost.is_owed()), (Err(Errno::NOSPC), false));
    }
}
