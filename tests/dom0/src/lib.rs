// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What the programs of the tests need in dom0: xenstore, udev, the logs of the kernel and of Xen, and
//! counters of what a test may leave behind.

pub mod kmsg;
pub mod memory;
pub mod udev;
pub mod xen;
pub mod xenstore;
