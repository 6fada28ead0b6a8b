// SPDX-License-Identifier: MIT OR Apache-2.0
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// `eprintln!` panics if the reader of stderr is gone, `diskio::say!` does not.
#![deny(clippy::print_stderr)]

mod barrier;
mod base;
mod bell;
mod chain;
mod clusters;
mod deflate;
mod eof_alloc;
mod field;
mod locks;
pub mod luks;
mod metadata;
mod needs;
mod open;
mod overlay;
pub mod qcow;
pub mod qcow2;
mod storage;
mod tables;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

pub use base::SECTOR;
pub use chain::{is_meant, open_chain, resolve, Files, LAYERS};
pub use needs::{ExtentFile, ImageNeeds, Parent};
pub use open::{look, open, Below, ImageFormat, ImageParts, Options};
pub use overlay::{backing, fits, overlay, random, Base, OverlayPlan};
pub use storage::Storage;
