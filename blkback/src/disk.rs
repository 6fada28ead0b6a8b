// SPDX-License-Identifier: GPL-2.0-only

//! The disk of a device: which one the hotplug script names, and opening it.

use crate::backing::{Attachment, Status, Unavailable};
use crate::connection::Connect;
use crate::events::DeviceEvents;
use crate::linux::block::bdev::BlockDevice;
use crate::linux::local_clock;
use crate::linux::xen::device::Device;
use crate::linux::xen::store;
use crate::proto::text::{parse_device, parse_u32};
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;

/// Names a block device.
pub(crate) const BLOCK_KEY: &CStr = c"physical-device";
/// Names a disk that a process serves.
pub(crate) const TAP_KEY: &CStr = c"tap-minor";

/// The type of devices that are ours only if that is said: others may serve such disks too.
pub(crate) const SHARED_TYPE: &[u8] = b"vbd3";
/// Says which program serves a device of that type.
pub(crate) const SERVER_KEY: &CStr = c"tap-server";
/// Ours.
const SERVER: &[u8] = b"blktapctrl";

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

/// Attaches a disk that a process serves to a device. May sleep.
pub(crate) type AttachTap = fn(u32, Attachment) -> Result<Arc<dyn Connect>, Unavailable>;

/// Who opens a disk.
pub(crate) struct Opener {
    /// The device.
    pub(crate) device: Arc<Device>,
    /// Who is told what becomes of the disk.
    pub(crate) events: Arc<dyn DeviceEvents>,
    /// Where disks that a process serves are to be had.
    pub(crate) attach_tap: AttachTap,
}

/// The open disk of a device, and what was published of it.
pub(crate) struct Disk {
    pub(crate) name: Name,
    pub(crate) backing: Arc<dyn Connect>,
    /// Size in sectors of 512 bytes.
    pub(crate) sectors: u64,
    /// The device below it was seen to be gone.
    pub(crate) is_gone: bool,
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
    /// It may go well in a while, although nobody does anything: there was no memory, xenstore did not answer, or
    /// the device's own life before is not over.
    pub(crate) passes: bool,
}

impl Bad {
    fn new(name: Name, error: Error, text: kernel::fmt::Arguments<'_>) -> Self {
        Self {
            name,
            error,
            text: CString::try_from_fmt(text),
            passes: error == ENOMEM,
        }
    }

    /// Xenstore does not answer, which says nothing about the disk.
    fn unread(name: Name, error: Error, text: kernel::fmt::Arguments<'_>) -> Self {
        Self {
            passes: true,
            ..Self::new(name, error, text)
        }
    }
}

impl Disk {
    /// Opens the disk of this name. May sleep for as long as its storage does not answer.
    pub(crate) fn open(opener: &Opener, name: Name) -> Result<Self, Bad> {
        let device = &*opener.device;
        let mut mode = [0; 8];
        let len = store::read(device.nodename(), c"mode", &mut mode)
            .map_err(|error| Bad::unread(name, error, fmt!("the key mode cannot be read")))?
            .ok_or_else(|| Bad::new(name, ENOENT, fmt!("the key mode is missing")))?;
        let writable = mode.get(..len).unwrap_or(&mode).contains(&b'w');
        let backing = match name {
            Name::Nonsense => {
                return Err(Bad::new(name, EINVAL, fmt!("no disk is named")));
            }
            Name::Block(major, minor) => open_block(major, minor, writable).map_err(|error| {
                let text = fmt!("the device that physical-device names cannot be opened");
                Bad::new(name, error, text)
            })?,
            Name::Tap(minor) => {
                let attachment = Attachment {
                    events: opener.events.clone(),
                    domain: device.otherend_id(),
                    device: device.number(),
                    writable,
                };
                (opener.attach_tap)(minor, attachment)
                    .map_err(|why| unavailable(device, minor, &why))?
            }
        };
        Ok(Self {
            name,
            sectors: backing.sectors(),
            backing,
            is_gone: false,
            status: None,
            published_at: None,
        })
    }

    /// Milliseconds until something may be published again after the last time. If it is 0, this
    /// counts as done.
    pub(crate) fn must_pause(&mut self) -> u32 {
        let now = local_clock();
        let waited = self
            .published_at
            .map_or(PAUSE_NS, |before| now.saturating_sub(before));
        let left = PAUSE_NS.saturating_sub(waited).div_ceil(1_000_000);
        if left == 0 {
            self.published_at = Some(now);
        }
        u32::try_from(left).unwrap_or(u32::MAX)
    }
}

fn open_block(major: u32, minor: u32, writable: bool) -> Result<Arc<dyn Connect>> {
    let disk: Arc<dyn Connect> = Arc::new(BlockDevice::open(major, minor, writable)?, GFP_KERNEL)?;
    Ok(disk)
}

fn unavailable(to: &Device, minor: u32, why: &Unavailable) -> Bad {
    let name = Name::Tap(minor);
    match why {
        Unavailable::Missing => Bad::new(
            name,
            ENOENT,
            fmt!("there is no tap disk {minor}: tap-minor names one before it is made"),
        ),
        // The frontend has done nothing wrong, and must not be closed for that.
        Unavailable::Attached { domain, device }
            if (*domain, *device) == (to.otherend_id(), to.number()) =>
        {
            Bad {
                passes: true,
                ..Bad::new(
                    name,
                    EBUSY,
                    fmt!("tap disk {minor} has I/O under way of an earlier connection of this device"),
                )
            }
        }
        Unavailable::Attached { domain, device } => Bad::new(
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

/// True if this device is ours to serve. One of the shared type is when its directory names our
/// supervisor, or a disk of it. Nobody has said so before the first is made: Xen's script, which names
/// the disk, runs only when we offer the device. May sleep.
///
/// # Errors
/// Xenstore does not answer.
pub(crate) fn is_ours(device: &Device) -> Result<bool> {
    if !device.is_of_type(SHARED_TYPE) {
        return Ok(true);
    }
    let dir = device.nodename();
    let mut value = [0; 32];
    match store::read(dir, SERVER_KEY, &mut value)? {
        Some(len) => Ok(value.get(..len) == Some(SERVER)),
        None => Ok(store::read(dir, TAP_KEY, &mut value)?.is_some()),
    }
}

/// Which disk the script names; `None` if it has named none. May sleep.
pub(crate) fn named(device: &Device) -> Result<Option<Name>, Bad> {
    let nonsense = |text| Bad::new(Name::Nonsense, EINVAL, text);
    let mut value = [0; 32];
    if let Some(value) = naming(device, TAP_KEY, &mut value)? {
        let minor =
            parse_u32(value).ok_or_else(|| nonsense(fmt!("tap-minor is not a decimal number")))?;
        return Ok(Some(Name::Tap(minor)));
    }
    let Some(value) = naming(device, BLOCK_KEY, &mut value)? else {
        return Ok(None);
    };
    let (major, minor) = parse_device(value)
        .ok_or_else(|| nonsense(fmt!("physical-device is not MAJOR:MINOR in hexadecimal")))?;
    Ok(Some(Name::Block(major, minor)))
}

/// Reads a key that may name the disk. A value that does not fit is no name, and reads as nothing.
fn naming<'value>(
    device: &Device,
    key: &CStr,
    value: &'value mut [u8],
) -> Result<Option<&'value [u8]>, Bad> {
    let len = store::read(device.nodename(), key, value).map_err(|error| {
        let text = fmt!("what names the disk cannot be read");
        Bad::unread(Name::Nonsense, error, text)
    })?;
    Ok(len.map(|len| value.get(..len).unwrap_or_default()))
}
