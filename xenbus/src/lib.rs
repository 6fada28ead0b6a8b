// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The pure half of talking to Xen, as cargo sees it.
//!
//! Kbuild compiles the same tree below `xenbus/src/proto` into the module; the other half,
//! `xenbus/src/linux`, exists there only.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod proto;
pub use ::ring;
