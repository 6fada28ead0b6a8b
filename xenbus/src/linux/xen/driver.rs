// SPDX-License-Identifier: GPL-2.0-only

//! Drivers on the xen-backend bus, registered with the kernel's own `driver::Registration`.
//!
//! Facts that the safety comments rest on (drivers/xen/xenbus/xenbus_probe.c):
//! - `probe` and `remove` run under the device lock; the watch on the other end is registered
//!   after `probe` and freed before `remove`, so `otherend_changed` overlaps neither.
//! - A bound device holds a reference to the module.
//! - The driver core removes the attribute groups, and waits for their readers, before `remove`.
//!
//! Wraps `__xenbus_register_backend` and `xenbus_unregister_driver` (include/xen/xenbus.h).

use super::device::XenDevice;
use crate::linux::sys;
use crate::proto::state::XenbusState;
use core::marker::PhantomData;
use kernel::bindings;
use kernel::device;
use kernel::driver::{DriverLayout, RegistrationOps};
use kernel::error::{from_result, to_result};
use kernel::ffi::{c_int, c_uint};
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Full, ordering::Release, AtomicFlag};
use kernel::types::Opaque;
use kernel::ThisModule;

/// A value that a reader of sysfs asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Attribute {
    /// The counter of this index in the list of statistics.
    Statistic(u32),
    /// The block device's number as `dev_t`.
    Device,
    /// 1 if the disk is writable.
    Writable,
}

/// A backend driver.
pub(crate) trait XenDriver: 'static {
    /// Data of one device.
    type Data: Send + Sync + 'static;
    /// The device types that it drives, such as `vbd`, of at most 31 bytes.
    const DEVICE_TYPES: [&'static [u8]; 2];

    /// Begins to drive a device that was found. Runs under the device lock, often in the xenwatch thread: be quick.
    fn probe(device: XenDevice) -> Result<Self::Data>;

    /// Handles the state that the other end has set; `Unknown` if it could not be read. The kernel calls it at least
    /// once after `probe`. Runs in the xenwatch thread: queue work and return.
    fn otherend_changed(data: &Self::Data, state: XenbusState);

    /// Ends the driving of a device that goes. Runs under the device lock, often in the xenwatch thread: record it,
    /// queue work and return. Waiting here for I/O, for xenwatch, or for a lock under which other code waits, can stop
    /// every backend of the host. Code that still uses the other end's pages or event channels holds a reference to the
    /// device, and one to the module.
    fn unbind(data: &Self::Data);

    /// Returns the value of an attribute, for a reader of sysfs.
    fn attribute(data: &Self::Data, which: Attribute) -> u64;
}

/// True while a driver is registered: all its devices have the same attributes, which the shim
/// reads through one pointer, so there can be one driver at a time.
static ATTRIBUTES_TAKEN: AtomicFlag = AtomicFlag::new(false);

/// Connects a [`XenDriver`] to the kernel's registration.
pub(crate) struct Adapter<T: XenDriver>(PhantomData<T>);

// SAFETY: `XenbusDriver` is `repr(C)` and has its `device_driver` at the offset given (asserted on
// both sides); `T::Data` is what `probe` stores as driver data.
unsafe impl<T: XenDriver> DriverLayout for Adapter<T> {
    type DriverType = sys::XenbusDriver;
    type DriverData<'bound> = T::Data;
    const DEVICE_DRIVER_OFFSET: usize = core::mem::offset_of!(sys::XenbusDriver, driver);
}

// SAFETY: `unregister` may be called after a successful `register`.
unsafe impl<T: XenDriver> RegistrationOps for Adapter<T> {
    unsafe fn register(
        driver: &Opaque<sys::XenbusDriver>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        let raw = driver.get();
        // SAFETY: The structure was initialised by the caller, and no other code knows it yet.
        unsafe {
            (*raw).name = sys::Pointer(name.as_char_ptr());
            (*raw).ids = sys::Pointer(core::ptr::from_ref(Self::IDS).cast());
            // The device stays attached to its frontend while another driver takes over.
            (*raw).allow_rebind = true;
            (*raw).probe = Some(Self::probe);
            (*raw).otherend_changed = Some(Self::otherend_changed);
            (*raw).remove = Some(Self::remove);
            (*raw).driver.dev_groups = sys::xbr_attr_groups();
        }
        if ATTRIBUTES_TAKEN.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The callback stays valid as long as the module, and so do its callers. No device
        // of another driver has these attributes: they are taken for this one.
        unsafe { sys::xbr_set_attr_fn(Self::attribute) };
        // SAFETY: The driver is initialised and stays pinned until `unregister`.
        to_result(unsafe {
            sys::__xenbus_register_backend(raw, module.as_ptr(), name.as_char_ptr())
        })
        .inspect_err(|_| ATTRIBUTES_TAKEN.store(false, Release))
    }

    unsafe fn unregister(driver: &Opaque<sys::XenbusDriver>) {
        // SAFETY: By the requirement of this function it is registered.
        unsafe { sys::xenbus_unregister_driver(driver.get()) }
        // No device is bound any more, so no reader of an attribute is left.
        ATTRIBUTES_TAKEN.store(false, Release);
    }
}

impl<T: XenDriver> Adapter<T> {
    /// The device types' names, padded with zeroes; an empty one ends the list.
    const IDS: &'static [sys::XenbusDeviceId; 3] = &{
        let mut ids = [const {
            sys::XenbusDeviceId {
                devicetype: [0; 32],
            }
        }; 3];
        let mut which = 0;
        while which < T::DEVICE_TYPES.len() {
            let name = T::DEVICE_TYPES[which];
            assert!(name.len() < 32);
            let mut at = 0;
            while at < name.len() {
                ids[which].devicetype[at] = name[at];
                at += 1;
            }
            which += 1;
        }
        ids
    };

    extern "C" fn probe(raw: *mut sys::XenbusDevice, _id: *const sys::XenbusDeviceId) -> c_int {
        from_result(|| {
            // SAFETY: The bus calls this with a valid device whose other end is known.
            let device = unsafe { XenDevice::from_probe(raw) }?;
            // SAFETY: The device is valid, and this is its driver's probe.
            let core = unsafe {
                device::Device::<device::CoreInternal<'_>>::from_raw(sys::xbr_dev_device(raw))
            };
            core.set_drvdata(T::probe(device))?;
            Ok(0)
        })
    }

    /// Returns the driver data of a bound device.
    ///
    /// # Safety
    ///
    /// `raw` is bound to this driver for the lifetime `'a`.
    unsafe fn data<'a>(raw: *mut bindings::device) -> &'a T::Data {
        // SAFETY: By the requirement of this function `probe` has stored a `T::Data`.
        unsafe {
            device::Device::<device::CoreInternal<'_>>::from_raw(raw)
                .drvdata_borrow::<T::Data>()
                .get_ref()
        }
    }

    extern "C" fn otherend_changed(raw: *mut sys::XenbusDevice, state: c_uint) {
        // SAFETY: The watch exists only while the device is bound.
        let data = unsafe { Self::data(sys::xbr_dev_device(raw)) };
        T::otherend_changed(data, XenbusState::from_number(state));
    }

    extern "C" fn remove(raw: *mut sys::XenbusDevice) {
        // SAFETY: `remove` follows a successful `probe`; the data is dropped after it.
        T::unbind(unsafe { Self::data(sys::xbr_dev_device(raw)) });
    }

    extern "C" fn attribute(raw: *mut bindings::device, which: c_uint) -> u64 {
        // SAFETY: The attributes exist only while the device is bound.
        let data = unsafe { Self::data(raw) };
        let which = match which {
            sys::ATTR_DEVICE => Attribute::Device,
            sys::ATTR_MODE => Attribute::Writable,
            index => Attribute::Statistic(index),
        };
        T::attribute(data, which)
    }
}
