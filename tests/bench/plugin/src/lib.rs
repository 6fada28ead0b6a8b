// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A plugin for QEMU that counts executed instructions for each processor by place: hypervisor, kernel, user space, and
//! each page of the kernel's modules. It counts copies separately, in bytes, and also the time that a domain spends
//! polling for work. Whenever the machine executes the mark (a special form of `nop`), the plugin appends the counters
//! to a file.
//!
//! The plugin uses only the standard library, so that the Debian tree with QEMU can compile it with only a compiler.

mod blocks;
mod places;
// The functions of QEMU exist only inside QEMU.
#[cfg(not(test))]
mod qemu;
