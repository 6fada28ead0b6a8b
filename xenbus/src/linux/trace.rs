// SPDX-License-Identifier: GPL-2.0-only

//! Trace points. While nobody looks each is one instruction that does nothing, which Linux replaces by a jump when
//! somebody does.

use super::sys;
use kernel::bindings::tracepoint;
use kernel::jump_label::static_branch_unlikely;

/// Whose requests they are.
pub(crate) struct Queue {
    /// The guest's domain.
    pub(crate) domain: u16,
    /// The number of its virtual device.
    pub(crate) device: u32,
    /// The number of the queue.
    pub(crate) index: u32,
}

impl Queue {
    /// A request, or a piece of one, is given to the disk. A sector is 512 bytes.
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

    /// The disk is through with it.
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

    /// A pass over the ring has taken and answered so many requests, and the guest was sent an event or not.
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
