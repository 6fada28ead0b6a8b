// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A plugin for QEMU that counts executed instructions for each processor by place: hypervisor,
//! kernel, user space, and each page of the kernel's modules. Whenever the machine executes the mark
//! (a certain form of `nop`), the counters are appended to a file.
//!
//! It uses the standard library alone, so that it can be compiled with nothing but a compiler, by the
//! tree that QEMU itself comes from.

mod places;
// The functions of QEMU exist only inside QEMU.
#[cfg(not(test))]
mod qemu;
