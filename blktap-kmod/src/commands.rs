// SPDX-License-Identifier: GPL-2.0-only

//! The `uring_cmd`s of a process that wait for requests.

use crate::linux::char::uring::{Identity, Parked};
use crate::ring::tap::abi::MAX_COMMANDS;
use kernel::prelude::*;

const PLACES: usize = MAX_COMMANDS as usize;

/// The place of a command, which it keeps until it completes.
#[derive(Clone, Copy)]
pub(crate) struct Place(u32);

impl Place {
    /// The number, to be noted in the command.
    pub(crate) fn number(self) -> u32 {
        self.0
    }

    /// The place of a number that was noted.
    pub(crate) fn noted(number: u32) -> Self {
        Self(number)
    }

    fn bit(self) -> u64 {
        1_u64.wrapping_shl(self.0)
    }

    fn index(self) -> usize {
        // CAST: below 64 if it is one of ours, and looked up in any case.
        self.0 as usize
    }
}

/// The commands, which the lock of the disk protects.
pub(crate) struct Commands {
    /// A bit for each place that is taken: its command waits, or is on its way here or back.
    taken: u64,
    /// A bit for each place whose command waits.
    waiting: u64,
    /// As long as there are places; not part of this, which is built on a stack.
    parked: KVec<Option<Parked>>,
}

// One bit for each place.
const _: () = assert!(PLACES == u64::BITS as usize);

impl Commands {
    /// Places for commands, all free. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new() -> Result<Self> {
        let mut parked = KVec::with_capacity(PLACES, GFP_KERNEL)?;
        for _ in 0..PLACES {
            parked.push_within_capacity(None).map_err(|_| ENOMEM)?;
        }
        Ok(Self {
            taken: 0,
            waiting: 0,
            parked,
        })
    }

    /// Takes a place for a command, if there is one.
    pub(super) fn reserve(&mut self) -> Option<Place> {
        let place = Place(self.taken.trailing_ones());
        if place.index() >= PLACES {
            return None;
        }
        self.taken |= place.bit();
        Some(place)
    }

    /// A command waits in its place.
    pub(super) fn wait(&mut self, place: Place, command: Parked) {
        if let Some(parked) = self.parked.get_mut(place.index()) {
            // Nobody else has this place.
            let _none = parked.replace(command);
            self.waiting |= place.bit();
        }
    }

    /// A command is over.
    pub(super) fn release(&mut self, place: Place) {
        self.taken &= !place.bit();
    }

    /// True if a command waits.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting != 0
    }

    /// One that waits, to be woken. It keeps its place.
    pub(super) fn next(&mut self) -> Option<Parked> {
        let place = Place(self.waiting.trailing_zeros());
        let command = self.parked.get_mut(place.index())?.take()?;
        self.waiting &= !place.bit();
        Some(command)
    }

    /// The one that is to be given up, if it waits. Its place is free.
    pub(super) fn cancel(&mut self, wanted: &Identity) -> Option<Parked> {
        let found = |parked: &Option<Parked>| parked.as_ref().is_some_and(|one| one.is(wanted));
        let index = self.parked.iter().position(found)?;
        // CAST: below 64.
        let place = Place(index as u32);
        self.waiting &= !place.bit();
        self.taken &= !place.bit();
        self.parked.get_mut(index)?.take()
    }
}
