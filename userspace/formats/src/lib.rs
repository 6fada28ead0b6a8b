// SPDX-License-Identifier: MIT OR Apache-2.0
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod backing;
mod clusters;
mod field;
mod join;
mod locks;
mod needs;
pub mod qcow;
pub mod qcow2;
mod storage;
mod store;
mod tables;
mod tail;
pub mod vhd;
pub mod vmdk;

pub use needs::{Extent, Needs, Parent};
pub use storage::Storage;
pub use store::Store;

/// How an image is used.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of tables that are kept in memory at most, beside those that requests are using.
    pub cache: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { cache: 32 << 20 }
    }
}
