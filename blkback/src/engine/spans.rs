// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What is remembered to say where requests spend their time beside the backend's: see [`measure`](super::measure).

/// What is remembered from one step of a pass to the next. All is 0 while nothing is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spans {
    /// What is in the ring came after this.
    pub(super) empty: u64,
    /// When the requests are taken that are taken now.
    pub(super) taken: u64,
    /// Requests that are answered and not published, and when the first of them was found to be complete.
    pub(super) held: u32,
    pub(super) held_since: u64,
}

impl Spans {
    /// Nothing.
    pub(super) const NONE: Self = Self {
        empty: 0,
        taken: 0,
        held: 0,
        held_since: 0,
    };
}
