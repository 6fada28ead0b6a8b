// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The pure engine of the vbd driver, as cargo sees it.
//!
//! Kbuild compiles the same tree below `blkback/src/engine` into the module; this crate exists so
//! that the engine can be driven on the host against fakes (`tests/sim`).

#![no_std]
#![forbid(unsafe_code)]

pub mod connect_retry;
pub mod due;
pub mod engine;
pub mod halt_estimator;
pub mod memory_quota;
pub mod poll_estimator;
pub mod running_mean;
pub use ::ring;
