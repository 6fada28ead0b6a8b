// SPDX-License-Identifier: MIT OR Apache-2.0
//! qcow2: against QEMU's tools, against a disk in memory, through deaths and power cuts, and against hostile images.

mod crash;
mod device;
mod drop_backing;
mod flush;
mod hostile;
mod memory;
mod oracle;
mod passed;
mod places;
mod rename;
mod sealed;
