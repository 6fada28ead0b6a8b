// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Everything that crosses a trust boundary, as checked types.
//!
//! This crate is the cargo face of the source tree below `ring/src/ring`, which Kbuild compiles
//! into the kernel module as it is. The tree is pure: `core` and `zerocopy` only, no unsafe, no
//! allocation.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod ring;
pub use ring::*;
