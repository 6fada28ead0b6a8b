// SPDX-License-Identifier: MIT OR Apache-2.0
//! Asynchronous I/O on images.
//!
//! [`Runtime`] serves one thread: an [`Executor`] polls futures, and an [`Io`] carries out their operations by
//! `io_uring`, Linux AIO or plain calls ([`Engine`]). [`Runtime::turn`] does all of a process's work: it polls ready
//! tasks, submits the operations in one system call, and wakes the tasks whose operations are done.
//!
//! Memory is a [`Region`], and the buffer of an operation is [`Data`]: pieces of a region; [`Bytes`] is read-only data.
//! No function returns a reference to the bytes, because the kernel, and perhaps another process, changes them. The
//! memory of an operation stays until the operation is over, even if the future that waits for it is dropped.
//!
//! [`File`] is an image: it hides short transfers, interrupted calls and alignment.
//!
//! [`say!`] is what a process says on its standard error without waiting or ending for that.
// `eprintln!` panics if the reader of stderr is gone.
#![deny(clippy::print_stderr)]

mod aio;
mod barrier;
mod bytes;
mod data;
mod deadline;
mod entry;
mod exec;
mod file;
mod gate;
mod helpers;
mod inherited_fd;
mod lock;
mod losses;
mod mailbox;
mod op;
mod pool;
mod region;
pub mod reservation;
mod signal;
mod socket;
mod stderr_log;
mod sync;
mod table;
mod uring;

pub use barrier::Barrier;
pub use bytes::Bytes;
pub use data::Data;
pub use deadline::Deadline;
pub use exec::{Executor, Runtime};
pub use file::{is_remote, of_earlier, Align, File};
pub use gate::{Gate, Pass};
pub use inherited_fd::inherited;
pub use lock::{lock_part, lock_whole, LockKind, LockPart, Opened};
pub use losses::{Flushing, Losses, SeenErrors, Writing};
pub use mailbox::{op_result, OpResult, ResultMailbox};
#[cfg(feature = "fake")]
pub use op::OperationFate;
pub use op::{Engine, Io, Op, Pending};
pub use region::{MappingAccess, Region};
pub use signal::signals;
pub use socket::{receive_data, send_parts, MessagePart};
#[doc(hidden)]
pub use stderr_log::say_line;

/// The number of an error, as the kernel says it.
pub use rustix::io::Errno;
