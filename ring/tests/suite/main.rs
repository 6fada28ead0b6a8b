// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The tests of the crate `ring`: layouts, indices, requests, hostile frontends.
//!
//! The oracles, the models and the fake shared page belong to the fuzz targets and are included from there.

#![allow(
    dead_code,
    reason = "each test uses its part of the shared support code"
)]

#[path = "../../../tests/fuzz/src/encode.rs"]
pub mod encode;
#[path = "../../../tests/fuzz/src/fake.rs"]
pub mod fake;
#[path = "../../../tests/fuzz/src/input.rs"]
pub mod input;
#[path = "../../../tests/fuzz/src/map_case.rs"]
pub mod map_case;
#[path = "../../../tests/fuzz/src/map_pair.rs"]
pub mod map_pair;
#[path = "../../../tests/fuzz/src/oracle.rs"]
pub mod oracle;
#[path = "../../../tests/fuzz/src/request_case.rs"]
pub mod request_case;
#[path = "../../../tests/fuzz/src/ring_case.rs"]
pub mod ring_case;
#[path = "../../../tests/fuzz/src/tap_case.rs"]
pub mod tap_case;
#[path = "../../../tests/fuzz/src/tap_model.rs"]
pub mod tap_model;
#[path = "../../../tests/fuzz/src/tap_oracle.rs"]
pub mod tap_oracle;
#[path = "../../../tests/fuzz/src/tap_pair/mod.rs"]
pub mod tap_pair;

mod honest;
mod hostile;
mod hostile_ring;
mod index;
mod layout;
mod props;
mod seeded;
mod tap;
mod types;
