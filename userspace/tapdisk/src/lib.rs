// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process that serves one disk.
//!
//! Everything happens in one thread, but for calls that may sleep and have no asynchronous form.
//! [`Session`] is the disk in all its states and answers the supervisor; while it serves, a
//! [`Server`] turns requests of the kernel into calls of a driver, and a link exchanges requests and
//! results with the kernel, in batches. [`sandbox`] takes away all that this does not need.
//! [`listen`] takes connections of the supervisor, [`nbd`] those of NBD clients.
//!
//! What the guest was answered is in the kernel or on the device: this process may be killed at any
//! moment, and the next one goes on.
#![forbid(unsafe_code)]
// It panics if nobody reads: diskio::say! does not.
#![deny(clippy::print_stderr)]

mod bits;
mod direct;
mod inside;
mod jobs;
mod kept;
mod link;
pub mod listen;
mod lost;
pub mod nbd;
mod needs;
mod notes;
mod ranges;
pub mod sandbox;
mod server;
mod session;
mod throttle;
mod told;
mod tracer;
mod troubles;
mod twin;

pub use direct::Direct;
pub use lost::{Lost, Seen};
pub use needs::Needs;
pub use ranges::Claim;
pub use server::{Server, Terms};
pub use session::Session;
pub use throttle::Throttle;
pub use troubles::Troubles;
