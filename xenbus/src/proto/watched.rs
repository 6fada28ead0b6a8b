// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Events of the watch on all backends of a device type.
//!
//! A domain has few watches, so one watch serves all devices. It fires for each write below `backend/TYPE`,
//! most of which are our own. An event of a directory, or of one above it, stands for every key below:
//! xenstore sends it where the directory was removed, and when the watch is registered anew after the domain was
//! suspended.

use super::text::{parse_u32, without_nul};
use core::ffi::CStr;
use core::ops::RangeInclusive;

/// The device types, as they stand after `backend/`.
pub const TYPES: [&[u8]; 2] = [b"vbd", SHARED_TYPE];
/// The type of devices that this driver serves only if a key says so, because other drivers may serve such disks too.
pub const SHARED_TYPE: &[u8] = b"vbd3";

/// Key that names a block device.
pub const BLOCK_KEY: &CStr = c"physical-device";
/// Key that names a disk that a process serves.
pub const TAP_KEY: &CStr = c"tap-minor";
/// Key that names the program that serves a device of [`SHARED_TYPE`].
pub const SERVER_KEY: &CStr = c"tap-server";
/// Keys whose change is one of the disk.
const DISK_KEYS: [&CStr; 3] = [BLOCK_KEY, TAP_KEY, SERVER_KEY];

/// Longest path that is of interest, in bytes: `backend/vbd3/DOMID/DEVID/physical-device` fits.
pub const PATH_MAX: usize = 63;

/// A backend's directory, `backend/TYPE/DOMID/DEVID`. A part that is no number counts as `u32::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BackendPath {
    /// Index in [`TYPES`].
    pub kind: usize,
    /// Domain of the frontend.
    pub domain: u32,
    /// Number of the frontend's virtual device.
    pub number: u32,
}

impl BackendPath {
    /// Returns the place of a backend's directory; `None` if the path is none of a backend of these types.
    pub fn of(directory: &[u8]) -> Option<Self> {
        let change = DirectoryChange::of(directory)?;
        let (first, last) = (*change.places.start(), *change.places.end());
        (first == last && change.key == WrittenKey::Any).then_some(first)
    }
}

/// A written key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrittenKey {
    /// The key names the disk, or the program that serves it.
    Disk,
    /// `state`.
    State,
    /// Any key may have changed.
    Any,
}

/// Change of the directories of some backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryChange {
    /// The directories.
    pub places: RangeInclusive<BackendPath>,
    /// The key in each of them.
    pub key: WrittenKey,
}

impl DirectoryChange {
    /// Returns the change for which the watch has fired with this path; `None` if no device has to look. Takes time
    /// for [`PATH_MAX`] bytes at most.
    pub fn of(path: &[u8]) -> Option<Self> {
        if path.len() > PATH_MAX {
            return None;
        }
        let mut parts = path.split(|byte| *byte == b'/');
        if parts.next() != Some(b"backend") {
            return None;
        }
        let kind = parts.next()?;
        let kind = TYPES.iter().position(|name| *name == kind)?;
        let mut number = || parts.next().map(|part| parse_u32(part).unwrap_or(u32::MAX));
        let (domain, device) = (number(), number());
        let place = |domain: Option<u32>, number: Option<u32>, other: u32| BackendPath {
            kind,
            domain: domain.unwrap_or(other),
            number: number.unwrap_or(other),
        };
        let key = match parts.next() {
            None => WrittenKey::Any,
            Some(b"state") => WrittenKey::State,
            Some(name) if DISK_KEYS.iter().any(|key| without_nul(key) == Some(name)) => {
                WrittenKey::Disk
            }
            Some(_) => return None,
        };
        // A key of a key.
        if parts.next().is_some() {
            return None;
        }
        Some(Self {
            places: place(domain, device, 0)..=place(domain, device, u32::MAX),
            key,
        })
    }
}
