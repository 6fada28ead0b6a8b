// SPDX-License-Identifier: GPL-2.0-only

//! Character devices: nodes, commands through io_uring, shared pages.

pub(crate) mod chardev;
pub(crate) mod shared;
pub(crate) mod uring;
