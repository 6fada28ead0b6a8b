// SPDX-License-Identifier: MIT OR Apache-2.0
//! The supervisor of tap disks, as a library so that it can be tested without Xen.
//!
//! Three values share the work: [`registry`] (what disks there are), [`admission`] (who may use an image) and
//! [`lifecycle`] (how a tapdisk lives and dies). Each uses those before it. Their callers are above: [`rpc_handlers`] handles
//! requests of tap-ctl, [`watch`] events of xenstore, [`recovery`] the disks of an earlier supervisor, and [`watchdog`]
//! processes that do not answer.
#![forbid(unsafe_code)]

pub mod admission;
pub mod backoff;
pub mod bitmap_files;
pub mod blocking_io;
pub mod disk;
pub mod domains;
pub mod events;
pub mod folder;
pub mod groups;
pub mod held_lease;
pub mod image;
pub mod kernel;
pub mod lifecycle;
pub mod log;
pub mod nodes;
mod overlay;
pub mod process;
pub mod process_stats;
pub mod quota;
pub mod ram_files;
pub mod record;
pub mod recovery;
pub mod registry;
pub mod rpc_client;
pub mod rpc_handlers;
pub mod server;
pub mod slow_request;
pub mod state;
pub mod store;
pub mod systemd;
pub mod traces;
pub mod watch;
pub mod watchdog;
