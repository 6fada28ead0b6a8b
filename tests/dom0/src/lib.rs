// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Functions for test programs in dom0: access to xenstore, udev and the logs of the kernel and of Xen, and counters of
//! resources that a test may leak.

pub mod kmsg;
pub mod memory;
pub mod poll;
pub mod udev;
pub mod xen;
pub mod xenstore;
