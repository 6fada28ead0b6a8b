// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What the programs of the tests need in dom0: xenstore and the kernel's log.

pub mod kmsg;
pub mod xenstore;
