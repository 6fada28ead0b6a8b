// SPDX-License-Identifier: MIT OR Apache-2.0
//! The supervisor of tap disks, as a library so that it can be tested without Xen.
#![forbid(unsafe_code)]

pub mod admission;
pub mod adopt;
pub mod apart;
pub mod backoff;
pub mod disk;
pub mod events;
pub mod folder;
pub mod host;
pub mod image;
pub mod kernel;
pub mod life;
pub mod link;
pub mod memory;
pub mod nodes;
pub mod process;
pub mod record;
pub mod server;
pub mod sharing;
pub mod store;
pub mod trouble;
pub mod unknown;
pub mod users;
pub mod verbs;
pub mod watch;
pub mod watchdog;
