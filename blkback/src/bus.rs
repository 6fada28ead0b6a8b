// SPDX-License-Identifier: GPL-2.0-only

//! A device on its bus: its creation, its events and its removal.
//!
//! Everything here runs in the xenwatch thread, which serves every backend of the host, or under the device lock, which
//! that thread may want. So nothing here waits for I/O, nor for a lock whose holder waits: it records the event, and
//! queues the work.

use crate::disk::AttachTap;
use crate::events::DeviceEvents;
use crate::linux::xen::device::XenDevice;
use crate::linux::xen::driver::{self, Attribute};
use crate::linux::xen::watch::{InXenwatch, Listener};
use crate::proto::state::XenbusState;
use crate::proto::watched::{WrittenKey, TYPES};
use crate::vbd::Vbd;
use core::marker::PhantomData;
use kernel::prelude::*;
use kernel::sync::Arc;

impl Listener for Vbd {
    fn changed(self: Arc<Self>, key: WrittenKey, thread: &InXenwatch) {
        match key {
            WrittenKey::State => self.state_written(thread),
            WrittenKey::Disk => self.disk_available(),
            WrittenKey::Any => {
                self.clone().disk_available();
                self.state_written(thread);
            }
        }
    }
}

/// Source of disks that a process serves. The rest of this folder knows a disk as a `BackingDisk`, whoever serves it.
pub(crate) trait TapDisks: 'static {
    /// Attaches one to a device.
    const ATTACH: AttachTap;
}

/// The driver.
pub(crate) struct VbdDriver<T>(PhantomData<T>);

/// A device while it is bound, and while it is being bound: the work starts before the probe is through.
pub(crate) struct Bound(Arc<Vbd>);

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.unbind();
    }
}

impl<T: TapDisks> driver::XenDriver for VbdDriver<T> {
    type Data = Bound;
    // A toolstack says vbd3 where it expects a process to serve the disk. The driver binds such a device in any case,
    // because a probe that refuses it puts an error into xenstore and into the log; a device that is not ours is
    // ignored (`disk::is_ours`).
    const DEVICE_TYPES: [&'static [u8]; 2] = TYPES;

    fn probe(device: XenDevice) -> Result<Bound> {
        let device = Arc::new(device, GFP_KERNEL)?;
        let bound = Bound(Vbd::new(device, T::ATTACH)?);
        bound.0.listen()?;
        Ok(bound)
    }

    fn otherend_changed(data: &Bound, state: XenbusState) {
        data.0.frontend_moved(state);
    }

    fn unbind(data: &Bound) {
        data.0.unbind();
    }

    fn attribute(data: &Bound, which: Attribute) -> u64 {
        data.0.attribute(which)
    }
}
