// SPDX-License-Identifier: MIT OR Apache-2.0
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod barrier;
mod bell;
mod join;
pub mod qcow2;
mod ranges;
mod slices;
mod storage;
mod users;

pub use storage::Storage;
