// SPDX-License-Identifier: GPL-2.0-only

//! The disk of a device: which one the hotplug script names, and opening it.

use crate::backing::{Attachment, TapStatus, Unavailable};
use crate::connection::Connect;
use crate::events::DeviceEvents;
use crate::linux::block::bdev::BlockDevice;
use crate::linux::local_clock;
use crate::linux::xen::device::XenDevice;
use crate::linux::xen::store;
use crate::proto::text::{parse_device, parse_u32};
use crate::proto::watched::{BLOCK_KEY, SERVER_KEY, SHARED_TYPE, TAP_KEY};
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::Arc;

/// The value of [`SERVER_KEY`] for this driver's supervisor.
const SERVER: &[u8] = b"blktapctrl";

/// The disk that the hotplug script's keys name.
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

/// Context for opening the disk of a device.
pub(crate) struct DiskOpener {
    /// The device.
    pub(crate) device: Arc<XenDevice>,
    /// Receiver of changes of the disk.
    pub(crate) events: Arc<dyn DeviceEvents>,
    /// Attaches a disk that a process serves.
    pub(crate) attach_tap: AttachTap,
}

/// The open disk of a device, and what was published about it.
pub(crate) struct AttachedDisk {
    pub(crate) name: Name,
    pub(crate) backing: Arc<dyn Connect>,
    /// Size in sectors of 512 bytes.
    pub(crate) sectors: u64,
    /// The device below the disk was seen to be gone.
    pub(crate) is_gone: bool,
    pub(crate) status: Option<TapStatus>,
    /// Time of the last publication about the disk, in nanoseconds of the local clock.
    published_at: Option<u64>,
}

/// Nanoseconds from one publication to the next.
const PAUSE_NS: u64 = 100_000_000;

/// Reason that the disk that the script names cannot be opened.
pub(crate) struct NameError {
    pub(crate) name: Name,
    pub(crate) error: Error,
    pub(crate) text: Result<CString>,
    /// The disk may open later without any change by the administrator: there was no memory, xenstore did not answer,
    /// or an earlier connection of the device still has I/O under way.
    pub(crate) passes: bool,
}

impl NameError {
    fn new(name: Name, error: Error, text: kernel::fmt::Arguments<'_>) -> Self {
        Self {
            name,
            error,
            text: CString::try_from_fmt(text),
            passes: error == ENOMEM,
        }
    }

    /// Makes the reason of a failure of xenstore, which says nothing about the disk.
    fn unread(name: Name, error: Error, text: kernel::fmt::Arguments<'_>) -> Self {
        Self {
            passes: true,
            ..Self::new(name, error, text)
        }
    }
}

impl AttachedDisk {
    /// Opens the disk of this name. May sleep for as long as its storage does not answer.
    pub(crate) fn open(opener: &DiskOpener, name: Name) -> Result<Self, NameError> {
        let device = &*opener.device;
        let mut mode = [0; 8];
        let len = store::read(device.nodename(), c"mode", &mut mode)
            .map_err(|error| NameError::unread(name, error, fmt!("the key mode cannot be read")))?
            .ok_or_else(|| NameError::new(name, ENOENT, fmt!("the key mode is missing")))?;
        let writable = mode.get(..len).unwrap_or(&mode).contains(&b'w');
        let backing = match name {
            Name::Nonsense => {
                return Err(NameError::new(name, EINVAL, fmt!("no disk is named")));
            }
            Name::Block(major, minor) => open_block(major, minor, writable).map_err(|error| {
                let text = fmt!("the device that physical-device names cannot be opened");
                NameError::new(name, error, text)
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

    /// Returns the milliseconds until the disk's state may be published again. If it is 0, this counts as the next
    /// publication.
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

fn unavailable(to: &XenDevice, minor: u32, why: &Unavailable) -> NameError {
    let name = Name::Tap(minor);
    match why {
        Unavailable::Missing => NameError::new(
            name,
            ENOENT,
            fmt!("there is no tap disk {minor}: tap-minor names one before it is made"),
        ),
        // The frontend has done nothing wrong, and must not be closed for that.
        Unavailable::Attached { domain, device }
            if (*domain, *device) == (to.otherend_id(), to.number()) =>
        {
            NameError {
                passes: true,
                ..NameError::new(
                    name,
                    EBUSY,
                    fmt!("tap disk {minor} has I/O under way of an earlier connection of this device"),
                )
            }
        }
        Unavailable::Attached { domain, device } => NameError::new(
            name,
            EBUSY,
            fmt!(
                "tap disk {minor} is bound to device {device} of domain {domain}: detach it there"
            ),
        ),
        Unavailable::Failed(error) => {
            NameError::new(name, *error, fmt!("tap disk {minor} cannot be bound"))
        }
    }
}

/// Returns true if this driver serves the device. A device of the shared type is, if its directory names our supervisor
/// or a tap disk. The supervisor writes `tap-server` before any key names the disk, because Xen's script, which does
/// that, runs only when this driver offers the device. May sleep.
///
/// # Errors
/// Xenstore does not answer.
pub(crate) fn is_ours(device: &XenDevice) -> Result<bool> {
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

/// Returns the disk that the script names; `None` if it has named none. May sleep.
pub(crate) fn named(device: &XenDevice) -> Result<Option<Name>, NameError> {
    let nonsense = |text| NameError::new(Name::Nonsense, EINVAL, text);
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
    device: &XenDevice,
    key: &CStr,
    value: &'value mut [u8],
) -> Result<Option<&'value [u8]>, NameError> {
    let len = store::read(device.nodename(), key, value).map_err(|error| {
        let text = fmt!("the key that names the disk cannot be read");
        NameError::unread(Name::Nonsense, error, text)
    })?;
    Ok(len.map(|len| value.get(..len).unwrap_or_default()))
}
