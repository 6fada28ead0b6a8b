// SPDX-License-Identifier: GPL-2.0-only

//! The disk of a device: which one the hotplug script names, and opening it.

use crate::medium::{Holder, Medium, Status, Unavailable};
use crate::proto::text::{parse_device, parse_u32};
use crate::vbd::Vbd;
use crate::xen::bdev::BlockDevice;
use crate::xen::device::Device;
use crate::xen::local_clock;
use crate::xen::store;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;

/// Names a block device.
pub(crate) const BLOCK_KEY: &CStr = c"physical-device";
/// Names a disk that a process serves.
pub(crate) const TAP_KEY: &CStr = c"tap-minor";

/// What the script names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    /// A block device.
    Block(u32, u32),
    /// A disk that a process serves.
    Tap(u32),
    /// Nothing: the value of a key is no good.
    Nonsense,
}

/// The open disk of a device, and what was published of it.
pub(crate) struct Disk {
    pub(crate) medium: Arc<dyn Medium>,
    /// Size in sectors of 512 bytes.
    pub(crate) sectors: u64,
    pub(crate) status: Option<Status>,
    /// When something of it was published last.
    published_at: Option<u64>,
}

/// Nanoseconds from one publication to the next.
const PAUSE_NS: u64 = 100_000_000;

/// Why a disk that is named cannot be opened.
pub(crate) struct Bad {
    pub(crate) name: Name,
    pub(crate) error: Error,
    pub(crate) text: Result<CString>,
}

impl Bad {
    fn new(name: Name, error: Error, text: kernel::fmt::Arguments<'_>) -> Self {
        Self {
            name,
            error,
            text: CString::try_from_fmt(text),
        }
    }
}

impl Disk {
    /// Opens the disk that the script names, if it names one. May sleep.
    pub(crate) fn open(vbd: &Arc<Vbd>, device: &Device) -> Result<Option<Self>, Bad> {
        let Some(name) = named(device)? else {
            return Ok(None);
        };
        let mut mode = [0; 8];
        let Ok(len) = store::read(device.nodename(), c"mode", &mut mode) else {
            return Err(Bad::new(name, ENOENT, fmt!("the key mode is missing")));
        };
        let writable = mode.get(..len).unwrap_or(&mode).contains(&b'w');
        let medium = match name {
            Name::Nonsense => return Ok(None),
            Name::Block(major, minor) => open_block(major, minor, writable).map_err(|error| {
                let text = fmt!("the device that physical-device names cannot be opened");
                Bad::new(name, error, text)
            })?,
            Name::Tap(minor) => {
                let holder = Holder {
                    vbd: vbd.clone(),
                    domain: device.otherend_id(),
                    device: device.number(),
                    writable,
                };
                crate::bind_tap(minor, holder).map_err(|why| unavailable(minor, &why))?
            }
        };
        Ok(Some(Self {
            sectors: medium.sectors(),
            medium,
            status: None,
            published_at: None,
        }))
    }

    /// True if something may be published now, and counts that as done; `false` if it is too
    /// early after the last time.
    pub(crate) fn may_publish(&mut self) -> bool {
        let now = local_clock();
        let may = self
            .published_at
            .is_none_or(|before| now.wrapping_sub(before) >= PAUSE_NS);
        if may {
            self.published_at = Some(now);
        }
        may
    }
}

fn open_block(major: u32, minor: u32, writable: bool) -> Result<Arc<dyn Medium>> {
    let medium: Arc<dyn Medium> = Arc::new(BlockDevice::open(major, minor, writable)?, GFP_KERNEL)?;
    Ok(medium)
}

fn unavailable(minor: u32, why: &Unavailable) -> Bad {
    let name = Name::Tap(minor);
    match why {
        Unavailable::Missing => Bad::new(
            name,
            ENOENT,
            fmt!("there is no tap disk {minor}: tap-minor names one before it is made"),
        ),
        Unavailable::Bound { domain, device } => Bad::new(
            name,
            EBUSY,
            fmt!(
                "tap disk {minor} is bound to device {device} of domain {domain}: detach it there"
            ),
        ),
        Unavailable::Failed(error) => {
            Bad::new(name, *error, fmt!("tap disk {minor} cannot be bound"))
        }
    }
}

/// Which disk the script names.
fn named(device: &Device) -> Result<Option<Name>, Bad> {
    let dir = device.nodename();
    let mut value = [0; 32];
    if let Ok(len) = store::read(dir, TAP_KEY, &mut value) {
        return match value.get(..len).and_then(parse_u32) {
            Some(minor) => Ok(Some(Name::Tap(minor))),
            None => Err(Bad::new(
                Name::Nonsense,
                EINVAL,
                fmt!("tap-minor is not a decimal number"),
            )),
        };
    }
    let Ok(len) = store::read(dir, BLOCK_KEY, &mut value) else {
        return Ok(None);
    };
    match value.get(..len).and_then(parse_device) {
        Some((major, minor)) => Ok(Some(Name::Block(major, minor))),
        None => Err(Bad::new(
            Name::Nonsense,
            EINVAL,
            fmt!("physical-device is not MAJOR:MINOR in hexadecimal"),
        )),
    }
}
