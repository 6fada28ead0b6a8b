// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The bodies of the fuzz targets, and the code that they share with the tests of the crate `ring`.
//!
//! The tests include the same files by path, so every target also runs with seeded random input
//! in an ordinary `cargo test`.

pub mod encode;
pub mod fake;
pub mod input;
pub mod map_case;
pub mod map_pair;
pub mod oracle;
pub mod request_case;
pub mod ring_case;
pub mod tap_case;
pub mod tap_model;
pub mod tap_oracle;
pub mod tap_pair;
