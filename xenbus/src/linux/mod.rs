// SPDX-License-Identifier: GPL-2.0-only

//! Safe wrappers over the kernel's Xen and block interfaces.
//!
//! The module has no other unsafe code than this folder, whose files are named after what they wrap. Everything above
//! this folder is safe Rust.

use kernel::bindings;
use kernel::error::{code::ENODEV, Result};

pub(crate) mod block;
pub(crate) mod char;
pub(crate) mod debug;
pub(crate) mod memory;
pub(crate) mod module;
mod sys;
pub(crate) mod task;
pub(crate) mod trace;
pub(crate) mod versions;
pub(crate) mod xen;

/// Gives up the CPU if another task needs it. May sleep.
pub(crate) fn cond_resched() {
    // SAFETY: Callable from any context that may sleep; it has no other requirement.
    unsafe { sys::xbr_cond_resched() }
}

/// Returns the nanoseconds of this CPU's scheduler clock. Only differences have a meaning, and a time that was read on
/// another CPU may be a little ahead, so use `saturating_sub`.
pub(crate) fn local_clock() -> u64 {
    // SAFETY: Callable from any context.
    unsafe { sys::local_clock() }
}

/// Returns the nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn monotonic_ns() -> u64 {
    // SAFETY: Callable from any context once time is kept.
    let now = unsafe { bindings::ktime_get() };
    // CAST: it counts up from 0 at boot.
    now as u64
}

/// Returns true if another task could run on this CPU.
pub(crate) fn cpu_is_wanted() -> bool {
    // SAFETY: Reads the state of the current task and of this CPU's run queue.
    unsafe { sys::xbr_need_resched() != 0 || !sys::single_task_running() }
}

/// Offers this physical CPU to another virtual CPU, of any domain. Returns at once if none waits for it, otherwise when
/// this one has its next turn.
pub(crate) fn yield_processor() {
    // SAFETY: `SCHEDOP_yield` has no argument, and may be called from any context.
    unsafe { sys::xbr_yield_processor() }
}

/// Returns the number of pages that the kernel has in all, at present.
pub(crate) fn total_ram_pages() -> u64 {
    // SAFETY: Reads a counter.
    unsafe { sys::xbr_total_ram_pages() as u64 }
}

/// Returns the number of processors of this domain that run now, at least 1.
pub(crate) fn online_processors() -> u32 {
    // SAFETY: Reads a counter.
    unsafe { sys::xbr_num_online_cpus() }
}

/// Barriers between processors of different domains, which are needed also where this domain has only one.
pub(crate) mod barrier {
    use super::sys;

    /// Orders loads before it against loads after it.
    pub(in crate::linux) fn virt_rmb() {
        // SAFETY: A barrier has no requirement.
        unsafe { sys::xbr_virt_rmb() }
    }

    /// Orders stores before it against stores after it.
    pub(in crate::linux) fn virt_wmb() {
        // SAFETY: As above.
        unsafe { sys::xbr_virt_wmb() }
    }

    /// Orders all accesses before it against all accesses after it.
    pub(in crate::linux) fn virt_mb() {
        // SAFETY: As above.
        unsafe { sys::xbr_virt_mb() }
    }
}

/// Writable parameters.
pub(crate) mod bounds {
    use super::sys;

    /// Returns the parameter `domain_memory_mib`.
    pub(crate) fn domain_memory_mib() -> u32 {
        // SAFETY: Reads a variable.
        unsafe { sys::xbr_domain_memory_mib() }
    }

    /// Returns the parameter `host_memory_mib`.
    pub(crate) fn host_memory_mib() -> u32 {
        // SAFETY: Reads a variable.
        unsafe { sys::xbr_host_memory_mib() }
    }

    /// Returns the parameter `feature_persistent`.
    pub(crate) fn feature_persistent() -> bool {
        // SAFETY: Reads a variable.
        unsafe { sys::xbr_feature_persistent() != 0 }
    }

    /// Shows how much memory is held, in `memory_kib`.
    pub(crate) fn set_memory_kib(kib: u32) {
        // SAFETY: Writes a variable.
        unsafe { sys::xbr_set_memory_kib(kib) }
    }
}

/// Returns true if this kernel runs as a PV domain, in which mapping a guest's page changes its own page tables.
/// Otherwise every map and unmap changes the second-stage tables, page by page.
pub(crate) fn is_pv_domain() -> bool {
    // SAFETY: Reads a variable that is fixed since boot.
    unsafe { sys::xbr_xen_pv_domain() != 0 }
}

/// Checks that this kernel runs as a Xen domain, because registration on a machine without Xen would succeed and never
/// find a device.
///
/// # Errors
///
/// `ENODEV` if this kernel does not run as a Xen domain.
pub(crate) fn needs_xen() -> Result {
    // SAFETY: Reads a variable that is fixed since boot.
    match unsafe { sys::xbr_xen_domain() } {
        0 => Err(ENODEV),
        _ => Ok(()),
    }
}
