// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Times from which [`measure`](super::measure) computes how long requests are outside the backend.

/// Times and counts that pass from one step of a pass to the next. All is 0 while nothing is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) struct Spans {
    /// The requests in the ring came after this time, in nanoseconds.
    pub(in crate::engine) empty: u64,
    /// When the pass began to take its requests, in nanoseconds.
    pub(in crate::engine) taken: u64,
    /// Requests that are answered and not published, and when the first of them was found to be complete.
    pub(in crate::engine) held: u32,
    pub(in crate::engine) held_since: u64,
}

impl Spans {
    /// Nothing.
    pub(in crate::engine) const NONE: Self = Self {
        empty: 0,
        taken: 0,
        held: 0,
        held_since: 0,
    };
}
