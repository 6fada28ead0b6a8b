// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Time: when the engine reads the clock, and what it counts of the time that requests take.

pub(in crate::engine) mod clock;
pub mod latency;
mod measure;
mod spans;
pub mod times;
