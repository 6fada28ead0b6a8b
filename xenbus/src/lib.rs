//! The pure half of talking to Xen.
#![no_std]
#![forbid(unsafe_code)]
pub mod proto;
pub use ring;
