// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The request that was taken from the ring and for which there is no room: nothing is taken behind it.

use crate::ring::request::RingRequest;

/// Reason that a request has to wait for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// Other requests have the pages.
    Pages,
    /// Other requests have all numbers, or the request is a barrier and they must end first.
    Turn,
}

/// A request that was checked and has to wait.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) request: RingRequest,
    pub(super) why: NoRoom,
    /// When it was taken, in nanoseconds while spans are counted, else 0.
    pub(super) since: u64,
}
