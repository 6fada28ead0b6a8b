// SPDX-License-Identifier: GPL-2.0-only

//! Block devices.
//!
//! Wraps `bdev_file_open_by_dev`, `file_bdev`, `bdev_nr_sectors` and the queue's limits
//! (include/linux/blkdev.h), `sync_blockdev`, `invalidate_inode_pages2` (include/linux/pagemap.h), and
//! `__fput_sync` (include/linux/file.h).

use crate::linux::sys;
use core::ptr::NonNull;
use kernel::bindings;
use kernel::error::{from_err_ptr, to_result};
use kernel::fs::File;
use kernel::prelude::*;
use kernel::sync::aref::ARef;

/// What a block device allows. Sizes in bytes; sectors are 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Size in sectors.
    pub(crate) sectors: u64,
    /// Logical block size.
    pub(crate) logical_block: u32,
    /// Physical block size.
    pub(crate) physical_block: u32,
    /// Discard granularity; `None` if the device cannot discard.
    pub(crate) discard_granularity: Option<u32>,
    /// Offset of the first discardable unit.
    pub(crate) discard_alignment: u32,
    /// True if the device can erase securely.
    pub(crate) secure_erase: bool,
    /// True if the device has a volatile write cache, or may come to have one.
    pub(crate) write_cache: bool,
    /// True if the device refuses writes.
    pub(crate) read_only: bool,
    /// True if its medium can be removed.
    pub(crate) removable: bool,
    /// True if it is a CD-ROM drive.
    pub(crate) cdrom: bool,
}

/// An open block device; dropping it releases it before the drop returns.
///
/// # Invariants
///
/// `file` is an open block device file that we own, and `bdev` its device.
pub(crate) struct BlockDevice {
    file: NonNull<bindings::file>,
    bdev: NonNull<bindings::block_device>,
    number: u32,
    writable: bool,
    /// What whoever gave the device had opened, whose locks last as long.
    _opened: Option<ARef<File>>,
}

// SAFETY: A block device may be used from any thread.
unsafe impl Send for BlockDevice {}
// SAFETY: As above.
unsafe impl Sync for BlockDevice {}

impl BlockDevice {
    /// Opens a device by its number. May sleep, and long if the storage is slow.
    ///
    /// There is no exclusive claim: several guests may share a disk if the administrator says so,
    /// and the hotplug script is what checks that.
    pub(crate) fn open(major: u32, minor: u32, writable: bool) -> Result<Self> {
        // SAFETY: Plain arithmetic.
        let number = unsafe { sys::xbr_mkdev(major, minor) };
        Self::open_number(number, writable, None)
    }

    /// Opens the device that a file is, which is kept with it. May sleep, as [`open`](Self::open).
    pub(super) fn of_file(file: ARef<File>, writable: bool) -> Result<Self> {
        // SAFETY: An open file has an inode, which lives as long as the file; the number of its device does
        // not change.
        let number = unsafe { (*(*file.as_ptr()).f_inode).i_rdev };
        Self::open_number(number, writable, Some(file))
    }

    fn open_number(number: u32, writable: bool, opened: Option<ARef<File>>) -> Result<Self> {
        let mode = if writable {
            sys::BLK_OPEN_READ | sys::BLK_OPEN_WRITE
        } else {
            sys::BLK_OPEN_READ
        };
        // SAFETY: No holder and no holder operations are allowed.
        let file = from_err_ptr(unsafe {
            bindings::bdev_file_open_by_dev(number, mode, core::ptr::null_mut(), core::ptr::null())
        })?;
        // SAFETY: The file was just opened.
        let bdev = unsafe { bindings::file_bdev(file) };
        // INVARIANT: Just opened.
        Ok(Self {
            file: NonNull::new(file).ok_or(ENXIO)?,
            bdev: NonNull::new(bdev).ok_or(ENXIO)?,
            number,
            writable,
            _opened: opened,
        })
    }

    pub(in crate::linux) fn as_raw(&self) -> *mut bindings::block_device {
        self.bdev.as_ptr()
    }

    /// The device's number as `dev_t`.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// True if it was opened for writing.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// The size in sectors now.
    pub(crate) fn sectors(&self) -> u64 {
        // SAFETY: By the type invariant.
        unsafe { sys::xbr_bdev_nr_sectors(self.as_raw()) }
    }

    /// What the device allows now.
    pub(crate) fn limits(&self) -> Limits {
        let mut raw = sys::BdevLimits::default();
        // SAFETY: By the type invariant; `raw` is valid for writes.
        unsafe { sys::xbr_bdev_limits(self.as_raw(), &mut raw) };
        Limits {
            sectors: raw.sectors,
            logical_block: raw.logical_block,
            physical_block: raw.physical_block,
            discard_granularity: (raw.discard_sectors != 0).then_some(raw.discard_granularity),
            discard_alignment: raw.discard_alignment,
            secure_erase: raw.secure_erase_sectors != 0,
            // There may be none now, and one while the guest is connected: a volume moves to another
            // disk, or somebody turns the cache on. A guest that was told of none would not ask for
            // a flush. While there is none, the block layer completes flushes by itself.
            write_cache: true,
            read_only: raw.read_only != 0,
            removable: raw.removable != 0,
            cdrom: raw.cdrom != 0,
        }
    }

    /// True if what is being written must not change: the device, or the network behind it, has a checksum of it, or
    /// reads it twice.
    pub(crate) fn wants_stable_pages(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { sys::xbr_bdev_stable_writes(self.as_raw()) != 0 }
    }

    /// Writes back and drops what this domain's page cache holds of the device: a boot loader or
    /// an emulator may have filled it, and the guest goes past it. May sleep.
    pub(crate) fn drop_cache(&self) -> Result {
        // SAFETY: By the type invariant.
        to_result(unsafe { bindings::sync_blockdev(self.as_raw()) })?;
        // What cannot be dropped was dirtied again or is mapped by somebody in this domain, whose
        // own affair that is.
        // SAFETY: By the type invariant.
        let _busy = unsafe { sys::xbr_bdev_invalidate(self.as_raw()) };
        Ok(())
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the file is ours. It is released here and now, not by a
        // work item later: the toolstack removes the device as soon as it sees state Closed.
        unsafe { bindings::__fput_sync(self.file.as_ptr()) };
    }
}
