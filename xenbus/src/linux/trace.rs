// SPDX-License-Identifier: GPL-2.0-only

//! Trace points. A disabled trace point is one instruction that does nothing; Linux replaces it by a jump when a tracer
//! enables it.

use super::sys;
use kernel::bindings::tracepoint;
use kernel::jump_label::static_branch_unlikely;

/// Identity of the queue whose requests are traced.
pub(crate) struct TracedQueue {
    /// The guest's domain.
    pub(crate) domain: u16,
    /// The number of its virtual device.
    pub(crate) device: u32,
    /// The number of the queue.
    pub(crate) index: u32,
}

impl TracedQueue {
    /// Traces that the disk gets a request, or a piece of one. A sector is 512 bytes.
    #[inline(always)]
    pub(crate) fn submit(&self, tag: u16, operation: u8, sector: u64, sectors: u64) {
        // SAFETY: C defines this key, in the trace point.
        if unsafe { static_branch_unlikely!(sys::__tracepoint_xbr_submit, tracepoint, key) } {
            // SAFETY: Callable from any context; all arguments are values.
            unsafe {
                sys::rust_do_trace_xbr_submit(
                    self.domain.into(),
                    self.device,
                    self.index,
                    tag.into(),
                    operation.into(),
                    sector,
                    sectors,
                )
            }
        }
    }

    /// Traces that the disk has ended a request, or a piece of one.
    #[inline(always)]
    pub(crate) fn complete(&self, tag: u16, status: i16) {
        // SAFETY: C defines this key, in the trace point.
        if unsafe { static_branch_unlikely!(sys::__tracepoint_xbr_complete, tracepoint, key) } {
            // SAFETY: Callable from any context; all arguments are values.
            unsafe {
                sys::rust_do_trace_xbr_complete(
                    self.domain.into(),
                    self.device,
                    self.index,
                    tag.into(),
                    status.into(),
                )
            }
        }
    }

    /// Traces that a pass over the ring has taken `taken` requests and answered `answered`, and has sent the guest an
    /// event if `notify`.
    #[inline(always)]
    pub(crate) fn pass(&self, taken: u32, answered: u32, notify: bool) {
        // SAFETY: C defines this key, in the trace point.
        if unsafe { static_branch_unlikely!(sys::__tracepoint_xbr_pass, tracepoint, key) } {
            // SAFETY: Callable from any context; all arguments are values.
            unsafe {
                sys::rust_do_trace_xbr_pass(
                    self.domain.into(),
                    self.device,
                    self.index,
                    taken,
                    answered,
                    notify,
                )
            }
        }
    }
}
