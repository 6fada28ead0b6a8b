// SPDX-License-Identifier: GPL-2.0-only

//! Event channels with a late end of interrupt.
//!
//! After an event the channel stays masked until the thread has looked at the ring, so a guest
//! cannot raise interrupts faster than its requests are served (XSA-332).
//!
//! Wraps `bind_interdomain_evtchn_to_irqhandler_lateeoi`, `xen_irq_lateeoi`, `notify_remote_via_irq`
//! and `unbind_from_irqhandler` (include/xen/events.h).

use super::device::XenDevice;
use crate::linux::sys;
use crate::linux::task::wake_event::WakeEvent;
use kernel::error::to_result;
use kernel::ffi::{c_int, c_uint, c_void};
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Full, Atomic};
use kernel::sync::Arc;

/// `IRQ_HANDLED`.
const HANDLED: c_uint = 1;

/// Data of the interrupt handler.
struct InterruptLine {
    /// An event came and was not ended. Set by the handler, taken by the thread.
    pending: Atomic<u32>,
    wake_event: Arc<WakeEvent>,
}

/// A bound event channel; dropping it unbinds it and waits for a running handler.
///
/// # Invariants
///
/// `irq` is bound with `line` as its cookie.
pub(crate) struct EventChannel {
    irq: c_uint,
    line: KBox<InterruptLine>,
    // Binding counts events in the device.
    _device: Arc<XenDevice>,
}

/// Result of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activity {
    /// There were requests.
    Real,
    /// There were no requests; many of these in a row delay the next event.
    Spurious,
}

/// An event whose channel is still masked. Call [`end`](Self::end) when its work is done; a dropped one counts as
/// spurious.
#[must_use = "the guest's events stay masked until the event is ended"]
pub(crate) struct Pending<'a> {
    channel: &'a EventChannel,
    activity: Activity,
}

impl EventChannel {
    /// Binds to the frontend's port; events wake the thread. May sleep.
    pub(crate) fn bind(
        device: &Arc<XenDevice>,
        port: u32,
        wake_event: Arc<WakeEvent>,
    ) -> Result<Self> {
        let line = KBox::new(
            InterruptLine {
                pending: Atomic::new(0),
                wake_event,
            },
            GFP_KERNEL,
        )?;
        let cookie = core::ptr::from_ref::<InterruptLine>(&line).cast_mut();
        // SAFETY: The device is valid; the cookie stays valid until it is unbound in `drop`.
        let irq = unsafe {
            sys::bind_interdomain_evtchn_to_irqhandler_lateeoi(
                device.as_raw(),
                port,
                handler,
                0,
                c"blkif-backend".as_char_ptr(),
                cookie.cast(),
            )
        };
        to_result(irq.min(0))?;
        // INVARIANT: Just bound.
        Ok(Self {
            // CAST: not negative.
            irq: irq as c_uint,
            line,
            _device: device.clone(),
        })
    }

    /// Sends an event to the frontend. Callable from any context.
    pub(crate) fn notify(&self) {
        // SAFETY: By the type invariant the interrupt is bound.
        unsafe { sys::notify_remote_via_irq(self.irq as c_int) }
    }

    /// Takes the event that came, if one did.
    pub(crate) fn take_pending(&self) -> Option<Pending<'_>> {
        // Made only if there is an event, because dropping it ends one.
        (self.line.pending.xchg(0, Full) != 0).then(|| Pending {
            channel: self,
            activity: Activity::Spurious,
        })
    }
}

impl Pending<'_> {
    /// Ends the event and permits the next one.
    pub(crate) fn end(mut self, activity: Activity) {
        self.activity = activity;
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let flags = match self.activity {
            Activity::Real => 0,
            Activity::Spurious => sys::EOI_SPURIOUS,
        };
        // SAFETY: The interrupt is bound, and this ends the one event that was taken.
        unsafe { sys::xen_irq_lateeoi(self.channel.irq, flags) }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        let cookie = core::ptr::from_ref::<InterruptLine>(&self.line).cast_mut();
        // SAFETY: By the type invariant; the call waits for a running handler.
        unsafe { sys::unbind_from_irqhandler(self.irq, cookie.cast()) }
    }
}

/// Runs with interrupts off.
extern "C" fn handler(_irq: c_int, cookie: *mut c_void) -> c_uint {
    // SAFETY: The cookie is the `InterruptLine` of a bound channel.
    let line = unsafe { &*cookie.cast::<InterruptLine>() };
    line.pending.xchg(1, Full);
    line.wake_event.wake();
    HANDLED
}
