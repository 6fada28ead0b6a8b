// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control protocol of disks that are served by a process.
//!
//! There are two conversations with the same framing ([`wire`]): tap-ctl asks blktapctrl ([`supervisor`]), and
//! blktapctrl asks each tapdisk ([`tapdisk`]). A message is one line of JSON on a unix stream socket; the descriptors
//! that belong to it travel with its first byte. The side that connects sends requests; the side that listens answers
//! each of them once and in order. [`Channel`] is the blocking form of a connection; [`wire::Decoder`] and [`socket`]
//! serve programs with an event loop of their own.
//!
//! ```
//! use control::{tapdisk, Channel, Failure};
//! use std::os::unix::net::UnixStream;
//!
//! let (a, b) = UnixStream::pair()?;
//! let server = std::thread::spawn(move || -> Result<(), Failure> {
//!     let mut server = Channel::new(b);
//!     while let Some((question, _fds)) = server.receive::<tapdisk::Request>()? {
//!         let answer = match question.body {
//!             tapdisk::Request::Exit => Ok(tapdisk::Reply::Done),
//!             _ => Err(Failure::unsupported("this example only knows exit")),
//!         };
//!         server.answer(question.id, answer)?;
//!     }
//!     Ok(())
//! });
//! let mut client = Channel::new(a);
//! let reply: tapdisk::Reply = client.ask(tapdisk::Request::Exit, &[])?;
//! assert_eq!(reply, tapdisk::Reply::Done);
//! # drop(client);
//! # server.join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod amount;
mod changed;
mod channel;
mod exit;
mod export;
mod failure;
mod frozen;
mod group;
pub mod installed;
mod lease;
mod limits;
mod near;
mod secret;
mod shown;
pub mod socket;
pub mod stats;
pub mod supervisor;
pub mod tapdisk;
mod target;
mod text;
mod tls;
mod trace;
mod vdev;
pub mod wire;

pub use amount::{size, typed_mib, typed_rate, typed_requests, typed_size, NewSize};
pub use changed::{Changed, Extent, Mark, MarkName, MAX_MARKS};
pub use channel::Channel;
pub use exit::ExitStatus;
pub use export::{Export, Listener};
pub use failure::{Code, Failure};
pub use frozen::{FrozenDevice, FrozenDevices, FrozenRecord, ImageMark};
pub use group::{GroupName, GroupRate, InGroup, RateShare, ShareUsage, MILLI};
pub use lease::{LeaseKind, SanlockResource};
pub use limits::Limits;
pub use near::is_near;
pub use secret::{open_named, FileSecrecy};
pub use shown::{json_line, shown, shown_json, shown_lines, JSON_VERSION};
pub use target::{yes_or_no, Below, Driver, MemoryName, SaidRules, Target};
pub use tls::{Tls, TlsFile};
pub use trace::{TraceTo, Tracing};
pub use vdev::{is_vdev, vdev};

/// Version of the protocol. A peer that speaks another one is refused with
/// [`Code::Version`].
pub const VERSION: u32 = 1;
