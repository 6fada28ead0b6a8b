// SPDX-License-Identifier: GPL-2.0-only

//! Watches on xenstore keys.
//!
//! Wraps `register_xenbus_watch` and `unregister_xenbus_watch` (include/xen/xenbus.h).

use crate::linux::sys;
use core::pin::Pin;
use kernel::bindings;
use kernel::error::to_result;
use kernel::ffi::c_char;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;
use kernel::types::Opaque;

/// Shows that its holder runs in the xenwatch thread, in a callback of a watch.
pub(crate) struct InXenwatch(());

/// Who is told when a watched key changes.
pub(crate) trait Watcher: Send + Sync + 'static {
    /// Names the watch if there are several.
    type Which: core::marker::Copy + Send + Sync + 'static;

    /// The key was written, or the watch was just registered. Runs in the xenwatch thread, which
    /// serves every backend of the host, as `thread` shows: queue work and return.
    fn changed(this: Arc<Self>, which: Self::Which, thread: &InXenwatch);
}

/// A registered watch; dropping it unregisters it. At most one event is pending at a time.
///
/// Dropping sleeps, and waits for a running callback unless it is called from one.
#[pin_data(PinnedDrop)]
pub(crate) struct Watch<T: Watcher> {
    #[pin]
    raw: Opaque<sys::XenbusWatch>,
    // The path that `raw` points to.
    path: CString,
    target: Arc<T>,
    which: T::Which,
}

// SAFETY: The C side serialises registration and callbacks; the target is `Send` and `Sync`.
unsafe impl<T: Watcher> Send for Watch<T> {}
// SAFETY: As above.
unsafe impl<T: Watcher> Sync for Watch<T> {}

impl<T: Watcher> Watch<T> {
    /// Watches `path`. The callback runs once at once. May sleep.
    pub(crate) fn register(
        path: CString,
        target: Arc<T>,
        which: T::Which,
    ) -> Result<Pin<KBox<Self>>> {
        KBox::try_pin_init(
            try_pin_init!(&this in Self {
                path,
                target,
                which,
                // Last, because the callback uses the other fields.
                raw <- Opaque::try_ffi_init(|slot: *mut sys::XenbusWatch| {
                    // SAFETY: `this` is valid, and `path` is initialised.
                    let node = unsafe { (*this.as_ptr()).path.as_char_ptr() };
                    // SAFETY: `slot` is valid for writes.
                    unsafe {
                        slot.write(sys::XenbusWatch {
                            list: bindings::list_head::default(),
                            node,
                            nr_pending: 0,
                            will_handle: Some(will_handle),
                            callback: Some(callback::<T>),
                        })
                    };
                    // SAFETY: The watch is initialised and stays pinned until it is unregistered.
                    to_result(unsafe { sys::register_xenbus_watch(slot) })
                }),
            }? Error),
            GFP_KERNEL,
        )
    }
}

#[pinned_drop]
impl<T: Watcher> PinnedDrop for Watch<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: A `Watch` exists only if its registration succeeded.
        unsafe { sys::unregister_xenbus_watch(self.raw.get()) };
    }
}

/// One pending event is enough: the callback looks at the state of the world, not at the event.
/// A guest that writes faster than we look cannot fill the queue (XSA-349).
extern "C" fn will_handle(
    watch: *mut sys::XenbusWatch,
    _path: *const c_char,
    _token: *const c_char,
) -> bool {
    // SAFETY: The C side passes the registered watch and holds its lock.
    unsafe { (*watch).nr_pending == 0 }
}

extern "C" fn callback<T: Watcher>(
    watch: *mut sys::XenbusWatch,
    _path: *const c_char,
    _token: *const c_char,
) {
    // SAFETY: The C side passes the registered watch, which is the field `raw` of a `Watch<T>`;
    // `Opaque` is transparent.
    let this = unsafe { kernel::container_of!(watch.cast::<Opaque<_>>(), Watch<T>, raw) };
    // SAFETY: The watch is registered, so it is valid now.
    let (target, which) = unsafe { ((*this).target.clone(), (*this).which) };
    // From here on the watch may be gone: the callee may unregister the device that owns it.
    T::changed(target, which, &InXenwatch(()));
}
