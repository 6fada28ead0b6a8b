// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hotplug script of disks on Ceph and DRBD, on hosts that are folders.
//!
//! The script is the one that is installed. Xenstore, `rbd`, `drbdadm` and the kernel's part of sysfs are programs and
//! files of the test; two hosts share one cluster, so a migration is two scripts.

mod drbd;
mod host;
mod kills;
mod lease;
mod moves;
mod rbd;
mod targets;
