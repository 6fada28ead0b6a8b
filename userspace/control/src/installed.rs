// SPDX-License-Identifier: MIT OR Apache-2.0
//! Folder of the installed daemons: users do not run them by hand, so they are not on the PATH, where the programs of
//! xapi have the same names.

/// The supervisor.
pub const SUPERVISOR: &str = "/usr/libexec/xen-blkback-rs/blktapctrl";
/// The program that serves a disk.
pub const TAPDISK: &str = "/usr/libexec/xen-blkback-rs/tapdisk";
