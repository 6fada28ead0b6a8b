// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process that serves one disk.
//!
//! Everything happens in one thread, but for calls that may sleep and have no asynchronous form.
//! [`Session`] is the disk in all its states and answers the supervisor; while it serves, a
//! [`Server`] turns requests of the kernel into calls of a driver, and a link exchanges requests and
//! results with the kernel, in batches. [`sandbox`] takes away all that this does not need.
//! [`listen`] takes connections of the supervisor, [`nbd`] those of NBD clients.
//!
//! The guest gets an answer only once its data is in the kernel or on the device, so this process may be killed at any
//! moment, and the next one continues.
#![forbid(unsafe_code)]
// `eprintln!` panics if the reader of stderr is gone, `diskio::say!` does not.
#![deny(clippy::print_stderr)]

mod alone;
mod bitmap;
mod describe;
mod dirty_bitmap;
mod fd_broker;
mod internal_request;
mod io_errors;
mod jobs;
mod kernel_link;
pub mod listen;
mod mirror_target;
pub mod nbd;
mod passthrough;
mod ranges;
pub mod sandbox;
mod server;
mod session;
mod stats_file;
mod throttle;
mod tracer;
mod writeback_errors;

pub use alone::{check_alone, own_memory};
pub use fd_broker::FdBroker;
pub use io_errors::IoErrorLog;
pub use passthrough::Direct;
pub use ranges::RangeClaim;
pub use server::{ServeConfig, Server};
pub use session::Session;
pub use throttle::Throttle;
pub use writeback_errors::WritebackErrors;
