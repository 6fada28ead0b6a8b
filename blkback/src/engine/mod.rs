// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The data path of every disk, without the kernel: one pass over a ring.
//!
//! ```text
//! take --> fetch descriptors --> bring in (copy, map) --> submit      Backend
//!                                                             |          |
//! publish <-- respond <-- bring out (copy, unmap) <--------- reap <------+
//! ```
//!
//! A pass works in batches: all grant copies of a step are one hypercall, all submissions stand
//! under one plug, all responses are published with at most one event. The engine belongs to one
//! thread and holds no lock; what it needs from its surroundings are three ports:
//! [`SharedRing`](crate::ring::ports::SharedRing), [`Grants`](crate::ring::grants::Grants) and
//! [`Backend`](backend::Backend).

mod admit;
pub mod backend;
pub mod blocks;
mod finish;
pub mod pass;
mod room;
pub mod segments;
pub mod slots;
pub mod stats;
mod transfer;

pub use crate::ring::grants::Grants;
pub use backend::{Backend, Io, IoKind};
pub use blocks::Group;
pub use finish::Rest;
pub use pass::{Config, Engine, Fetch, Pass};
pub use segments::{SegmentEntry, Shape, Slice};
pub use slots::Slot;
pub use stats::Stats;
