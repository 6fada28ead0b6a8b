// SPDX-License-Identifier: GPL-2.0-only

//! The watches on the backends of this driver's device types, and who listens to them.
//!
//! xenstore allows a domain about a hundred watches, of which the bus takes one for each device. So there is one watch
//! for all devices of a type, on `backend/TYPE`. It is registered with the first device, because xenstored may not run
//! yet when the module is loaded, and stays until the module ends.
//!
//! Wraps `register_xenbus_watch` and `unregister_xenbus_watch` (include/xen/xenbus.h). Facts that the safety comments
//! rest on (drivers/xen/xenbus/xenbus_xs.c): `will_handle` is called under a spinlock by the thread that reads answers
//! of xenstore, `callback` by the xenwatch thread, both with a path that is a C string; `unregister_xenbus_watch` waits
//! for a running callback and removes events that wait.

use crate::linux::sys;
use crate::proto::watched::{BackendPath, DirectoryChange, WrittenKey, PATH_MAX, TYPES};
use core::pin::Pin;
use kernel::bindings;
use kernel::error::to_result;
use kernel::ffi::c_char;
use kernel::prelude::*;
use kernel::rbtree::{RBTree, RBTreeNodeReservation};
use kernel::sync::atomic::{ordering::Full, AtomicFlag};
use kernel::sync::Arc;
use kernel::types::Opaque;

/// Shows that its holder runs in the xenwatch thread, in a callback of a watch.
pub(crate) struct InXenwatch(());

/// Receiver of changes of a backend's directory.
pub(crate) trait Listener: Send + Sync + 'static {
    /// The key has changed. Runs in the xenwatch thread, which serves every backend of the host, as `thread` shows:
    /// queue work and return.
    fn changed(self: Arc<Self>, key: WrittenKey, thread: &InXenwatch);
}

/// Paths that are watched, in the order of [`TYPES`].
const PATHS: [&CStr; TYPES.len()] = [c"backend/vbd", c"backend/vbd3"];

/// Several devices can have one place for a while: a former one may not have given everything back yet.
type WatchId = (BackendPath, u64);

/// The listeners, and the number of the next one.
struct Listeners {
    tree: RBTree<WatchId, Arc<dyn Listener>>,
    next: u64,
}

/// The registered watches.
type Registered = [Option<Pin<KBox<RegisteredWatch>>>; TYPES.len()];

kernel::sync::global_lock! {
    // SAFETY: `Watches::new`, which the module calls before it registers its driver, initialises it once.
    unsafe(uninit) static LISTENERS: Mutex<Option<Listeners>> = None;
}

// Not the lock above, which the xenwatch thread takes: a registration waits for xenstore.
kernel::sync::global_lock! {
    // SAFETY: As above.
    unsafe(uninit) static REGISTERED: Mutex<Registered> = [const { None }; TYPES.len()];
}

static INITIALISED: AtomicFlag = AtomicFlag::new(false);

/// The watches; the module holds them while it is loaded. Dropping them waits for running callbacks.
pub(crate) struct Watches(());

impl Watches {
    /// Makes the table of listeners. Works once in the life of the module. May sleep.
    pub(crate) fn new() -> Result<Self> {
        if INITIALISED.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The flag sees to it that this is done once, and nothing uses the lock before.
        unsafe { LISTENERS.init() };
        // SAFETY: As above.
        unsafe { REGISTERED.init() };
        *LISTENERS.lock() = Some(Listeners {
            tree: RBTree::new(),
            next: 0,
        });
        Ok(Self(()))
    }

    /// Watches the devices of a type, if that is not done yet. May sleep.
    fn register(kind: usize) -> Result {
        let path = *PATHS.get(kind).ok_or(EINVAL)?;
        let mut registered = REGISTERED.lock();
        let place = registered.get_mut(kind).ok_or(EINVAL)?;
        if place.is_none() {
            *place = Some(RegisteredWatch::register(path)?);
        }
        Ok(())
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        let watches = core::mem::replace(&mut *REGISTERED.lock(), [const { None }; TYPES.len()]);
        // Not under the lock: this waits for the xenwatch thread.
        drop(watches);
        let listeners = LISTENERS.lock().take();
        drop(listeners);
    }
}

/// The subscription of a listener. Once it is dropped no new call begins; one may still run, and has a reference.
///
/// # Invariants
///
/// The table has an entry of `id`, which belongs to this subscription.
pub(crate) struct Subscription {
    id: WatchId,
}

impl Subscription {
    /// Calls `listener` from now on when a key in this directory changes. The caller looks at the keys afterwards,
    /// because no first event comes. May sleep.
    pub(crate) fn new(place: BackendPath, listener: Arc<dyn Listener>) -> Result<Self> {
        Watches::register(place.kind)?;
        // Not under the lock, for which the xenwatch thread would wait.
        let node = RBTreeNodeReservation::new(GFP_KERNEL)?;
        let mut table = LISTENERS.lock();
        let table = table.as_mut().ok_or(ENODEV)?;
        let id = (place, table.next);
        // No other entry has this number.
        let _none = table.tree.insert(node.into_node(id, listener));
        // It counts devices, which never are so many.
        table.next = table.next.wrapping_add(1);
        // INVARIANT: Just made.
        Ok(Self { id })
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let listener = LISTENERS
            .lock()
            .as_mut()
            .and_then(|table| table.tree.remove(&self.id));
        // Not under the lock: it may be the last reference.
        drop(listener);
    }
}

/// The first listener from `from` on that is not behind `last`.
fn next_listener(from: &WatchId, last: &BackendPath) -> Option<(WatchId, Arc<dyn Listener>)> {
    let table = LISTENERS.lock();
    let cursor = table.as_ref()?.tree.cursor_lower_bound(from)?;
    let (id, listener) = cursor.current();
    (id.0 <= *last).then(|| (*id, listener.clone()))
}

/// Tells all that listen. Most changes are of one device. One of more devices is that of a whole directory, for which
/// the bus goes through its devices, too.
fn tell(change: &DirectoryChange, thread: &InXenwatch) {
    let mut from = (*change.places.start(), 0);
    while let Some((id, listener)) = next_listener(&from, change.places.end()) {
        // The callee may end its subscription, and others may begin: the next one is looked up anew.
        listener.changed(change.key, thread);
        from = (id.0, id.1.wrapping_add(1));
    }
}

/// A registered watch; dropping it unregisters it.
///
/// Dropping sleeps, and waits for a running callback unless it is called from one.
#[pin_data(PinnedDrop)]
struct RegisteredWatch {
    #[pin]
    raw: Opaque<sys::XenbusWatch>,
}

// SAFETY: The C side serialises registration and callbacks.
unsafe impl Send for RegisteredWatch {}
// SAFETY: As above.
unsafe impl Sync for RegisteredWatch {}

impl RegisteredWatch {
    /// Watches `path` and all below it. May sleep.
    fn register(path: &'static CStr) -> Result<Pin<KBox<Self>>> {
        KBox::try_pin_init(
            try_pin_init!(Self {
                raw <- Opaque::try_ffi_init(|slot: *mut sys::XenbusWatch| {
                    // SAFETY: `slot` is valid for writes.
                    unsafe {
                        slot.write(sys::XenbusWatch {
                            list: bindings::list_head::default(),
                            node: path.as_char_ptr(),
                            nr_pending: 0,
                            will_handle: Some(will_handle),
                            callback: Some(callback),
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
impl PinnedDrop for RegisteredWatch {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: A `RegisteredWatch` exists only if its registration succeeded.
        unsafe { sys::unregister_xenbus_watch(self.raw.get()) };
    }
}

/// The change for which a watch has fired.
///
/// # Safety
///
/// `path` is a C string.
unsafe fn change(path: *const c_char) -> Option<DirectoryChange> {
    let mut bytes = [0u8; PATH_MAX];
    let mut len: usize = 0;
    loop {
        // SAFETY: By the requirement of this function; the loop ends at the NUL.
        let byte = unsafe { path.add(len).read() };
        if byte == 0 {
            break;
        }
        // A longer path is none of ours.
        *bytes.get_mut(len)? = byte;
        len = len.wrapping_add(1);
    }
    DirectoryChange::of(bytes.get(..len)?)
}

/// Most events come from our own writes, and no device looks at those keys. A guest can write none.
extern "C" fn will_handle(
    _watch: *mut sys::XenbusWatch,
    path: *const c_char,
    _token: *const c_char,
) -> bool {
    // SAFETY: The C side passes a C string.
    unsafe { change(path) }.is_some()
}

extern "C" fn callback(_watch: *mut sys::XenbusWatch, path: *const c_char, _token: *const c_char) {
    // SAFETY: The C side passes a C string.
    if let Some(change) = unsafe { change(path) } {
        tell(&change, &InXenwatch(()));
    }
}
