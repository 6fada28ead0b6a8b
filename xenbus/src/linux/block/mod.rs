// SPDX-License-Identifier: GPL-2.0-only

//! Block devices and files that store a disk, and I/O on them.

pub(crate) mod bdev;
pub(crate) mod bio;
pub(crate) mod file;
pub(crate) mod storage;
