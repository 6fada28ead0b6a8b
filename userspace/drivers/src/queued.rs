// SPDX-License-Identifier: MIT OR Apache-2.0
//! A read or write that is one operation of the storage, and is under way.

use diskio::{Pending, ResultMailbox};
use std::any::Any;

/// A read or write that was queued as one operation of the storage.
#[derive(Debug)]
pub struct QueuedIo {
    io: Pending,
    hold: PlaceHold,
}

/// Keeps an image from using a place for something else until an operation there has ended.
#[derive(Debug, Default)]
#[must_use = "the place is kept as long as this"]
pub struct PlaceHold(#[expect(dead_code, reason = "it is only dropped")] Option<Box<dyn Any>>);

impl QueuedIo {
    /// An operation on a place that stays what it is until `hold` is dropped.
    pub fn holding(io: Pending, hold: impl Any) -> Self {
        let hold = PlaceHold(Some(Box::new(hold)));
        Self { io, hold }
    }

    /// Has the result delivered to a mailbox, with this token. Keep the hold that it returns until the
    /// result is there.
    pub fn deliver_to(self, mailbox: &ResultMailbox, token: u64) -> PlaceHold {
        self.io.deliver_to(mailbox, token);
        self.hold
    }
}

impl From<Pending> for QueuedIo {
    /// An operation on a place that no other request changes.
    fn from(io: Pending) -> Self {
        let hold = PlaceHold::default();
        Self { io, hold }
    }
}
