// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's interface for disks that a process serves, as safe calls.
//!
//! [`control`] makes nodes and takes them away, for a supervisor.

pub mod control;

pub use ring::tap::abi;

/// Version of the kernel's interface that this is made for.
pub const ABI_VERSION: u32 = abi::VERSION;
