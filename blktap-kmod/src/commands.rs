// SPDX-License-Identifier: GPL-2.0-only

//! The `uring_cmd`s of a process that wait for requests.

use crate::linux::char::uring::{Identity, Parked};
use crate::ring::tap::abi::MAX_COMMANDS;
use kernel::prelude::*;

const PLACES: usize = MAX_COMMANDS as usize;

/// The place of a command, which it keeps until it completes.
#[derive(Clone, Copy)]
pub(crate) struct CommandSlot(u32);

impl CommandSlot {
    /// Returns the number, for the command's data.
    pub(crate) fn number(self) -> u32 {
        self.0
    }

    /// Returns the place of a number from a command's data.
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
    /// One bit for each place that is taken: its command waits, or is on its way here or back.
    taken: u64,
    /// One bit for each place whose command waits.
    waiting: u64,
    /// One entry for each place, in an allocation of its own, because this type is built on a stack.
    parked: KVec<Option<Parked>>,
}

// `taken` and `waiting` have a bit for each place.
const _: () = assert!(PLACES == u64::BITS as usize);

impl Commands {
    /// Makes places for commands, all free. May sleep.
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

    /// Takes a place for a command; `None` if all are taken.
    pub(super) fn reserve(&mut self) -> Option<CommandSlot> {
        let place = CommandSlot(self.taken.trailing_ones());
        if place.index() >= PLACES {
            return None;
        }
        self.taken |= place.bit();
        Some(place)
    }

    /// Puts a command that waits into its place.
    pub(super) fn wait(&mut self, place: CommandSlot, command: Parked) {
        if let Some(parked) = self.parked.get_mut(place.index()) {
            // No other command has this place.
            let _none = parked.replace(command);
            self.waiting |= place.bit();
        }
    }

    /// Frees the place of a command that is over.
    pub(super) fn release(&mut self, place: CommandSlot) {
        self.taken &= !place.bit();
    }

    /// Returns true if a command waits.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting != 0
    }

    /// Takes a waiting command, to be woken. The command keeps its place.
    pub(super) fn next(&mut self) -> Option<Parked> {
        let place = CommandSlot(self.waiting.trailing_zeros());
        let command = self.parked.get_mut(place.index())?.take()?;
        self.waiting &= !place.bit();
        Some(command)
    }

    /// Takes the command that is to be cancelled, if it waits, and frees its place.
    pub(super) fn cancel(&mut self, wanted: &Identity) -> Option<Parked> {
        let found = |parked: &Option<Parked>| parked.as_ref().is_some_and(|one| one.is(wanted));
        let index = self.parked.iter().position(found)?;
        // CAST: below 64.
        let place = CommandSlot(index as u32);
        self.waiting &= !place.bit();
        self.taken &= !place.bit();
        self.parked.get_mut(index)?.take()
    }
}
