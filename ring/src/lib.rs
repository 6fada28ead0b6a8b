//! The blkif wire format.
#![no_std]
#![forbid(unsafe_code)]
pub mod ring;
pub use ring::*;
