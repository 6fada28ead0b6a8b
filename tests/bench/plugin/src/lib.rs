// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A plugin for QEMU that counts executed instructions for each processor by place: hypervisor,
//! kernel, user space, and each page of the kernel's modules. Copies are counted in bytes and apart, and
//! so is the time that a domain looks for something to do. Whenever the machine executes the mark
//! (a certain form of `nop`), the counters are appended to a file.
//!
//! It uses the standard library alone, so that it can be compiled with nothing but a compiler, by the
//! tree that QEMU itself comes from.

mod blocks;
mod places;
// The functions of QEMU exist only inside QEMU.
#[cfg(not(test))]
mod qemu;
