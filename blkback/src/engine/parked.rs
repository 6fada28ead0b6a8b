// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The request that was taken from the ring and for which there is no room: nothing is taken behind it.

use crate::ring::request::Request;

/// Why a request has to wait for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// They have the pages.
    Pages,
    /// They have all numbers, or come before it because it is a barrier.
    Turn,
}

/// A request that was checked and has to wait.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) request: Request,
    pub(super) why: NoRoom,
    /// When it was taken, or 0.
    pub(super) since: u64,
}
