// SPDX-License-Identifier: MIT OR Apache-2.0
//! The formats against models, QEMU's tools, each prefix of their writes, and images that were made to harm: one
//! program, which is linked once.

mod chain;
#[path = "../common/mod.rs"]
mod common;
mod luks;
mod moves;
mod qcow;
mod qcow2;
mod quick;
mod sectors;
mod size;
mod vhd;
mod vhdx;
mod vmdk;
