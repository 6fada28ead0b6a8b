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

/// Limits of a block device. Sizes in bytes; sectors are 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockLimits {
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
    /// The file description that the giver of the device had opened, so that its locks last as long.
    _opened: Option<ARef<File>>,
}

// SAFETY: A block device may be used from any thread.
unsafe impl Send for BlockDevice {}
// SAFETY: As above.
unsafe impl Sync for BlockDevice {}

impl BlockDevice {
    /// Opens a device by its number. May sleep for as long as the storage takes.
    ///
    /// There is no exclusive claim, because several guests may share a disk if the administrator allows it; the hotplug
    /// script checks that.
    pub(crate) fn open(major: u32, minor: u32, writable: bool) -> Result<Self> {
        // SAFETY: Plain arithmetic.
        let number = unsafe { sys::xbr_mkdev(major, minor) };
        Self::open_number(number, writable, None)
    }

    /// Opens the device that a file is, and keeps the file. May sleep, as [`open`](Self::open) does.
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

    /// Returns the device's number as `dev_t`.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Returns true if the device was opened for writing.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Returns the present size in sectors (512 bytes).
    pub(crate) fn sectors(&self) -> u64 {
        // SAFETY: By the type invariant.
        unsafe { sys::xbr_bdev_nr_sectors(self.as_raw()) }
    }

    /// Returns the present limits of the device.
    pub(crate) fn limits(&self) -> BlockLimits {
        let mut raw = sys::BdevLimits::default();
        // SAFETY: By the type invariant; `raw` is valid for writes.
        unsafe { sys::xbr_bdev_limits(self.as_raw(), &mut raw) };
        BlockLimits {
            sectors: raw.sectors,
            logical_block: raw.logical_block,
            physical_block: raw.physical_block,
            discard_granularity: (raw.discard_sectors != 0).then_some(raw.discard_granularity),
            discard_alignment: raw.discard_alignment,
            secure_erase: raw.secure_erase_sectors != 0,
            // A device without a cache may get one while the guest is connected: a volume moves to another disk, or the
            // administrator turns the cache on. A guest that saw no cache at its connect would send no flush. While
            // there is no cache, the block layer completes flushes without the device.
            write_cache: true,
            read_only: raw.read_only != 0,
            removable: raw.removable != 0,
            cdrom: raw.cdrom != 0,
        }
    }

    /// Returns true if data must not change while it is being written, because the device, or the network behind it,
    /// computes a checksum of it or reads it twice.
    pub(crate) fn wants_stable_pages(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { sys::xbr_bdev_stable_writes(self.as_raw()) != 0 }
    }

    /// Writes back and drops what this domain's page cache holds of the device: a boot loader or
    /// an emulator may have filled it, and the guest goes past it. May sleep.
    pub(crate) fn drop_cache(&self) -> Result {
        // SAFETY: By the type invariant.
        to_result(unsafe { bindings::sync_blockdev(self.as_raw()) })?;
        // Pages that cannot be dropped were dirtied again, or are mapped by another user in this domain, who is
        // responsible for them.
        // SAFETY: By the type invariant.
        let _busy = unsafe { sys::xbr_bdev_invalidate(self.as_raw()) };
        Ok(())
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the file is ours. The drop releases it here and not in a later work item,
        // because the toolstack removes the device as soon as it sees state Closed.
        unsafe { bindings::__fput_sync(self.file.as_ptr()) };
    }
}
