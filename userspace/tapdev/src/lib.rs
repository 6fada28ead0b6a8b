// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's interface for disks that a process serves, as safe calls.
//!
//! [`control`] makes nodes and takes them away, for a supervisor. [`Tap`] is the node of one disk as the process sees
//! it that serves the disk: it takes requests, whose data is in memory that is shared with the kernel, and commits
//! them. This crate checks the kernel's data all the same, because a mistake there must not become one in an image.

mod command;
pub mod control;
#[cfg(feature = "fake")]
pub mod fake;
mod guestless;
mod node;
mod params;
mod request;
mod tap;

pub use command::Command;
pub use guestless::GuestlessNode;
pub use node::{KernelNode, Mapper, Node};
pub use params::records;
pub use request::{Kind, Malformed, Request};
pub use ring::tap::checked::Fence;
pub use ring::tap::params::{Discard, Params};
pub use tap::Tap;

pub use ring::tap::abi;

/// Version of the kernel's interface that this is made for.
pub const ABI_VERSION: u32 = abi::VERSION;
