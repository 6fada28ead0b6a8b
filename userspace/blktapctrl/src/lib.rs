// SPDX-License-Identifier: MIT OR Apache-2.0
//! The supervisor of tap disks, as a library so that it can be tested without Xen.
//!
//! Three values share the work: [`registry`] (what disks there are), [`admission`] (who may use an image) and
//! [`lifecycle`] (how a tapdisk lives and dies). Each uses those before it. Their callers are above: [`verbs`] handles
//! requests of tap-ctl, [`watch`] events of xenstore, [`adopt`] the disks of an earlier supervisor, and [`watchdog`]
//! processes that do not answer.
#![forbid(unsafe_code)]

pub mod admission;
pub mod adopt;
pub mod apart;
pub mod backoff;
pub mod disk;
pub mod domains;
pub mod events;
pub mod folder;
pub mod groups;
pub mod image;
pub mod kernel;
pub mod lifecycle;
pub mod link;
pub mod log;
pub mod memory;
pub mod nodes;
pub mod notes;
mod overlay;
pub mod process;
pub mod quota;
pub mod record;
pub mod registry;
pub mod server;
pub mod slow;
pub mod state;
pub mod store;
pub mod systemd;
pub mod tally;
pub mod tenure;
pub mod traces;
pub mod verbs;
pub mod watch;
pub mod watchdog;
