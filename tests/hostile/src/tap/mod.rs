// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The process side of a tap disk, honest or not.

mod disk;
mod map;
pub(crate) mod maps;
mod node;
pub(crate) mod scene;
pub(crate) mod server;
pub(crate) mod signal;
pub(crate) mod uring;

pub(crate) use disk::{control, leave, query, TapDisk, SECTORS};
pub(crate) use map::FileMapping;
pub(crate) use node::{
    call, call_nowhere, expect, records, Address, TapNode, UnmappedAddresses, CLAIMS,
};
