// SPDX-License-Identifier: GPL-2.0-only

//! A device on the xen-backend bus.
//!
//! Wraps `struct xenbus_device` (include/xen/xenbus.h) and the references of its `struct device`
//! (include/linux/device.h).

use super::store;
use super::watch::InXenwatch;
use crate::linux::sys;
use crate::proto::frontend::{Directory, Unread, VALUE_SIZE};
use crate::proto::state::XenbusState;
use crate::proto::text::{without_nul, Name};
use crate::proto::watched::{BackendPath, TYPES};
use core::ptr::NonNull;
use kernel::bindings;
use kernel::ffi::c_char;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::atomic::{ordering::Acquire, ordering::Release, AtomicFlag};

/// A counted reference to a `struct xenbus_device`.
///
/// # Invariants
///
/// `raw` is valid, and we hold a reference to it.
pub(crate) struct XenDevice {
    raw: NonNull<sys::XenbusDevice>,
    nodename: CString,
    place: BackendPath,
    otherend: CString,
    otherend_id: u16,
    /// The bus takes it from its driver.
    unbound: AtomicFlag,
}

// SAFETY: The device is reference counted and its fields that we use do not change.
unsafe impl Send for XenDevice {}
// SAFETY: As above.
unsafe impl Sync for XenDevice {}

impl XenDevice {
    /// Takes a reference.
    ///
    /// # Safety
    ///
    /// `raw` is a device that is being probed: it is valid, and its other end's details are read.
    pub(in crate::linux) unsafe fn from_probe(raw: *mut sys::XenbusDevice) -> Result<Self> {
        // SAFETY: By the requirement of this function.
        let otherend = unsafe { sys::xbr_dev_otherend(raw) };
        if otherend.is_null() {
            return Err(ENOENT);
        }
        // SAFETY: By the requirement of this function; the name lives as long as the device.
        let nodename = unsafe { sys::xbr_dev_nodename(raw) };
        let nodename = CString::try_from_fmt(fmt!("{}", Text(nodename)))?;
        let place = without_nul(&nodename)
            .and_then(BackendPath::of)
            .ok_or(EINVAL)?;
        // The string stays while the device is bound, which may be shorter than our reference.
        let otherend = CString::try_from_fmt(fmt!("{}", Text(otherend)))?;
        // SAFETY: By the requirement of this function.
        let id = unsafe { sys::xbr_dev_otherend_id(raw) };
        let otherend_id = u16::try_from(id).map_err(|_| EINVAL)?;
        // SAFETY: By the requirement of this function.
        unsafe { bindings::get_device(sys::xbr_dev_device(raw)) };
        // INVARIANT: The reference was just taken.
        Ok(Self {
            raw: NonNull::new(raw).ok_or(EINVAL)?,
            nodename,
            place,
            otherend,
            otherend_id,
            unbound: AtomicFlag::new(false),
        })
    }

    pub(in crate::linux) fn as_raw(&self) -> *mut sys::XenbusDevice {
        self.raw.as_ptr()
    }

    fn device(&self) -> *mut bindings::device {
        // SAFETY: By the type invariant.
        unsafe { sys::xbr_dev_device(self.as_raw()) }
    }

    /// The backend's own directory in xenstore.
    pub(crate) fn nodename(&self) -> &CStr {
        &self.nodename
    }

    /// The frontend's directory in xenstore.
    pub(crate) fn otherend(&self) -> &CStr {
        &self.otherend
    }

    /// Number of the frontend's virtual device: the last part of our directory's name.
    pub(crate) fn number(&self) -> u32 {
        self.place.number
    }

    /// Our directory, as events of the watches name it.
    pub(crate) fn place(&self) -> BackendPath {
        self.place
    }

    /// True for a device of this type, which is what comes after `backend/` in our directory's name.
    pub(crate) fn is_of_type(&self, name: &[u8]) -> bool {
        TYPES.get(self.place.kind) == Some(&name)
    }

    /// The frontend's domain.
    pub(crate) fn otherend_id(&self) -> u16 {
        self.otherend_id
    }

    /// True if the backend's directory was removed: the driver must write no more keys there.
    pub(crate) fn is_vanished(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { sys::xbr_dev_vanished(self.as_raw()) != 0 }
    }

    /// Tells the bus the published state: sysfs shows it, and the next driver of the device continues from it. The
    /// caller is the only one to do so.
    pub(crate) fn note_state(&self, state: XenbusState) {
        if self.unbound.load(Acquire) {
            return;
        }
        // SAFETY: By the type invariant; readers of the field expect it to change at any time.
        unsafe { sys::xbr_dev_set_state(self.as_raw(), state.number()) };
    }

    /// The bus is taking the device from its driver, which may need long to give everything back. To be called in
    /// `remove`: after that `xenbus_dev_remove` writes Closed where xenstore has Closing, unless the device's own state
    /// is Closed (`__xenbus_switch_state`). So it is made that, and the caller writes Closed when it is true.
    pub(crate) fn mark_unbound(&self) {
        self.unbound.store(true, Release);
        // SAFETY: By the type invariant; readers of the field expect it to change at any time.
        unsafe { sys::xbr_dev_set_state(self.as_raw(), XenbusState::Closed.number()) };
    }

    /// Tells the administrator what is wrong with this device: in xenstore's error directory,
    /// where xl looks, and in the log, at a limited rate because guests can cause it. May sleep.
    pub(crate) fn report(&self, error: Error, text: &CStr) {
        // SAFETY: By the type invariant; the text is a C string.
        unsafe { sys::xbr_dev_err_ratelimited(self.device(), text.as_char_ptr()) };
        if self.is_vanished() {
            return;
        }
        let wrote = CString::try_from_fmt(fmt!("error/{}", self.nodename()))
            .and_then(|dir| {
                let value =
                    CString::try_from_fmt(fmt!("{} {}", error.to_errno().wrapping_neg(), text))?;
                Ok((dir, value))
            })
            .map_err(|_| ENOMEM)
            .and_then(|(dir, value)| store::write(&dir, c"error", &value));
        if wrote.is_err() {
            // SAFETY: As above.
            unsafe {
                sys::xbr_dev_err_ratelimited(
                    self.device(),
                    c"cannot store the error in xenstore".as_char_ptr(),
                )
            };
        }
    }

    /// Warns the administrator in the kernel's log.
    pub(crate) fn warn(&self, text: &CStr) {
        // SAFETY: By the type invariant; the text is a C string.
        unsafe { sys::xbr_dev_warn_ratelimited(self.device(), text.as_char_ptr()) };
    }

    /// Writes into the kernel's log what has become of the device; a guest cannot fill it so.
    pub(crate) fn tell(&self, text: &CStr) {
        // SAFETY: By the type invariant; the text is a C string.
        unsafe { sys::xbr_dev_info_ratelimited(self.device(), text.as_char_ptr()) };
    }

    /// Removes an earlier report from xenstore. May sleep.
    pub(crate) fn clear_report(&self) {
        if let Ok(dir) = CString::try_from_fmt(fmt!("error/{}", self.nodename())) {
            // There is usually no report to remove.
            let _absent = store::remove(&dir, c"error");
        }
    }

    /// Takes the device off the bus, which unbinds it from its driver; does nothing if it is off already.
    ///
    /// For watch callbacks: the xenwatch thread is the one that removes devices whose directory is
    /// gone, so there the two cannot meet.
    pub(crate) fn unregister(&self, _thread: &InXenwatch) {
        // SAFETY: By the type invariant the device is valid. Its registration changes in this
        // thread alone once it is bound, so the bits beside this one do not change meanwhile.
        let is_registered = unsafe { (*self.device()).kobj.state_in_sysfs() } != 0;
        if is_registered {
            // SAFETY: The device is valid, and it stays so because of our reference. It is
            // registered, and whoever takes it off the bus does so in this thread.
            unsafe { bindings::device_unregister(self.device()) };
        }
    }
}

/// The frontend's directory.
impl Directory for XenDevice {
    fn read(&self, key: &Name, value: &mut [u8; VALUE_SIZE]) -> Result<Option<usize>, Unread> {
        let mut name = [0u8; Name::CAPACITY + 1];
        for (to, from) in name.iter_mut().zip(key.as_bytes()) {
            *to = *from;
        }
        let name = CStr::from_bytes_until_nul(&name).map_err(|_| Unread)?;
        match store::read(self.otherend(), name, value) {
            // A frontend can make a key unreadable for us; that is the same as not having it.
            Err(error) if error == EACCES => Ok(None),
            other => other.map_err(|_| Unread),
        }
    }
}

/// A path of xenstore behind a C pointer, for formatting only.
///
/// # Invariants
///
/// The pointer is a C string. (`CStr::from_char_ptr` would do if its length arithmetic had no
/// panicking form.)
struct Text(*const c_char);

/// The longest path that xenstore allows.
const PATH_MAX: usize = 3072;

impl kernel::fmt::Display for Text {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for index in 0..PATH_MAX {
            // SAFETY: By the type invariant; the loop ends at the NUL.
            let byte = unsafe { self.0.add(index).read() };
            if byte == 0 {
                break;
            }
            core::fmt::Write::write_char(f, char::from(byte))?;
        }
        Ok(())
    }
}

impl Drop for XenDevice {
    fn drop(&mut self) {
        // SAFETY: By the type invariant we hold a reference.
        unsafe { bindings::put_device(self.device()) };
    }
}
