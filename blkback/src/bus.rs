// SPDX-License-Identifier: GPL-2.0-only

//! A device on its bus: where it comes from, who tells it of changes, and how it is taken away.
//!
//! Everything here runs in the xenwatch thread, which serves every backend of the host, or under the
//! device lock, which that thread may want. So nothing here waits for I/O, nor for a lock under
//! which anybody else does: it notes what has happened, and queues the work.

use crate::disk::{self, AttachTap};
use crate::events::DeviceEvents;
use crate::linux::xen::device::Device;
use crate::linux::xen::driver::{self, Attribute};
use crate::linux::xen::watch::{InXenwatch, Watch, Watcher};
use crate::proto::state::State;
use crate::vbd::Vbd;
use core::marker::PhantomData;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;

/// The watched keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// What names the disk, or who serves it, in our directory.
    Disk,
    /// `state` in our directory.
    State,
}

impl Watcher for Vbd {
    type Which = Key;

    fn changed(this: Arc<Self>, which: Key, thread: &InXenwatch) {
        match which {
            Key::State => this.state_written(thread),
            Key::Disk => this.disk_available(),
        }
    }
}

/// Where disks that a process serves are to be had. The rest of this folder knows a disk as a
/// `BackingDisk`, whoever serves it.
pub(crate) trait TapDisks: 'static {
    /// Attaches one to a device.
    const ATTACH: AttachTap;
}

/// The driver.
pub(crate) struct VbdDriver<T>(PhantomData<T>);

/// A device while it is bound, and while it is being bound: its first watch starts the work before the
/// probe is through.
pub(crate) struct Bound(Arc<Vbd>);

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.unbind();
    }
}

impl<T: TapDisks> driver::Driver for VbdDriver<T> {
    type Data = Bound;
    // A toolstack says vbd3 where it expects a process to serve the disk. Such a device is bound in any
    // case, because a probe that refuses it puts an error into xenstore and into the log; what is
    // not ours is left alone (`disk::is_ours`).
    const DEVICE_TYPES: [&'static [u8]; 2] = [b"vbd", disk::SHARED_TYPE];

    fn probe(device: Device) -> Result<Bound> {
        let device = Arc::new(device, GFP_KERNEL)?;
        let bound = Bound(Vbd::new(device.clone(), T::ATTACH)?);
        let watch = |key: &CStr, which| {
            let path = CString::try_from_fmt(fmt!("{}/{}", device.nodename(), key))?;
            bound
                .0
                .keep_watch(Watch::register(path, bound.0.clone(), which)?)
        };
        // The first event of each comes at once and starts the work.
        watch(disk::BLOCK_KEY, Key::Disk)?;
        watch(disk::TAP_KEY, Key::Disk)?;
        if device.is_of_type(disk::SHARED_TYPE) {
            watch(disk::SERVER_KEY, Key::Disk)?;
        }
        watch(c"state", Key::State)?;
        Ok(bound)
    }

    fn otherend_changed(data: &Bound, state: State) {
        data.0.frontend_moved(state);
    }

    fn unbind(data: &Bound) {
        data.0.unbind();
    }

    fn attribute(data: &Bound, which: Attribute) -> u64 {
        data.0.attribute(which)
    }
}
