// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The data path of every disk, without the kernel: one pass over a ring.
//!
//! ```text
//! take --> fetch descriptors --> copy in (or map) --> submit --> Backend
//!                                                                   |
//! publish <-- respond <-- copy out (or unmap) <---- complete <------+
//! ```
//!
//! A request whose pages all stay mapped skips the steps in which nothing would be done for it (`quick`). While the thread
//! waits, the completion of such a request answers it without the thread (`lent`).
//!
//! A pass works in batches: all grant copies of a step are one hypercall, all submissions stand under one plug, all
//! responses are published with at most one event. The engine belongs to one thread and holds no lock; it reaches its
//! surroundings through three ports:

pub mod backend;
mod batch;
pub mod blocks;
mod complete;
mod copy_in;
mod copy_out;
mod detached;
mod fetch;
mod gathering;
mod lent;
pub mod mappings;
mod page_alloc;
mod parked;
pub mod pass;
mod quick;
mod requests;
mod respond;
pub mod segments;
pub mod state;
pub mod stats;
mod submit;
mod take;
pub mod timing;
mod transfers;

pub use crate::ring::grants::Grants;
pub use backend::{Backend, Io, IoKind, ReapContext};
pub use blocks::BlockGroup;
pub use detached::DetachedEngine;
pub use mappings::Mapping;
pub use pass::Pass;
pub use requests::PendingRequest;
pub use segments::{SegmentEntry, Slice, TableShape};
pub use state::{Config, Engine, EngineTables};
pub use stats::{QueueLoad, Stats};
pub use timing::latency::Latencies;
pub use timing::times::Times;
pub use transfers::Fetch;
