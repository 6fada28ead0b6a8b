// SPDX-License-Identifier: GPL-2.0-only

//! The storage of a disk: a block device or a file.

use super::bdev::BlockDevice;
use super::file::ImageFile;
use kernel::fs::{File, LocalFile};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::Arc;

/// A block device or a file. Dropping the last copy releases it.
#[derive(Clone)]
pub(crate) enum DiskStorage {
    /// A device, which gets bios.
    Device(Arc<BlockDevice>),
    /// A file, whose file system is called.
    File(Arc<ImageFile>),
}

impl DiskStorage {
    /// Returns the storage of a descriptor of the calling process. It keeps the open file description and that
    /// description's locks. May sleep for as long as the storage takes.
    ///
    /// # Errors
    ///
    /// `EBADF` if there is no such descriptor. `EOPNOTSUPP` if it is neither a block device nor a regular file, if the
    /// file was not opened for this access without the page cache, or if its file system has its blocks elsewhere than
    /// on devices of this host.
    pub(crate) fn of_descriptor(fd: u32, writable: bool) -> Result<Self> {
        let file = LocalFile::fget(fd)?;
        // SAFETY: The calling process is in an ioctl on another descriptor, so it holds no position lock of
        // this one.
        let file = unsafe { LocalFile::assume_no_fdget_pos(file) };
        if is_device(&file) {
            let device = BlockDevice::of_file(file, writable)?;
            return Ok(DiskStorage::Device(Arc::new(device, GFP_KERNEL)?));
        }
        let file = ImageFile::new(file, writable)?;
        Ok(DiskStorage::File(Arc::new(file, GFP_KERNEL)?))
    }

    /// Returns the present size in sectors of 512 bytes.
    pub(crate) fn sectors(&self) -> u64 {
        match self {
            DiskStorage::Device(device) => device.sectors(),
            DiskStorage::File(file) => file.sectors(),
        }
    }

    /// Returns the number of 512-byte sectors of which the length and the beginning of each transfer are multiples.
    pub(crate) fn block(&self) -> u32 {
        match self {
            DiskStorage::Device(device) => device.limits().logical_block / 512,
            DiskStorage::File(file) => file.block(),
        }
    }

    /// Returns true if it is open for writing.
    pub(crate) fn is_writable(&self) -> bool {
        match self {
            DiskStorage::Device(device) => device.is_writable(),
            DiskStorage::File(file) => file.is_writable(),
        }
    }

    /// Returns true if the data of a write must not change while it is under way, because a wrong checksum ends a
    /// connection that other disks share, so a guest that changes its data would also harm others.
    pub(crate) fn wants_stable_pages(&self) -> bool {
        match self {
            DiskStorage::Device(device) => device.wants_stable_pages(),
            DiskStorage::File(file) => file.wants_stable_pages(),
        }
    }

    /// Returns true if both are the same device or the same file.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (DiskStorage::Device(one), DiskStorage::Device(other)) => {
                one.number() == other.number()
            }
            (DiskStorage::File(one), DiskStorage::File(other)) => one.is_same(other),
            _ => false,
        }
    }
}

fn is_device(file: &ARef<File>) -> bool {
    use kernel::bindings;
    // SAFETY: An open file has an inode, which lives as long as the file; what kind it is does not change.
    let mode = unsafe { (*(*file.as_ptr()).f_inode).i_mode };
    u32::from(mode) & bindings::S_IFMT == bindings::S_IFBLK
}
