// SPDX-License-Identifier: GPL-2.0-only

//! Block devices, and I/O on them.

pub(crate) mod bdev;
pub(crate) mod bio;
