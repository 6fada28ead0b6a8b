// SPDX-License-Identifier: GPL-2.0-only

//! Where the bytes of a disk are: in a block device, or in a file.

use super::bdev::BlockDevice;
use super::file::ImageFile;
use kernel::fs::{File, LocalFile};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::Arc;

/// A block device or a file. It is released with the last copy.
#[derive(Clone)]
pub(crate) enum Storage {
    /// A device, which is reached by bios.
    Device(Arc<BlockDevice>),
    /// A file, whose file system is asked.
    File(Arc<ImageFile>),
}

impl Storage {
    /// What a descriptor of the calling process leads to. Its open file description is kept with it, and so
    /// are the locks of that. May sleep, and long if the storage is slow.
    ///
    /// # Errors
    ///
    /// `EBADF` if there is no such descriptor, `EOPNOTSUPP` if it leads to something else, to a file that
    /// was not opened for this access without the page cache, or to one whose file system has its blocks elsewhere
    /// than on devices of this host.
    pub(crate) fn of_descriptor(fd: u32, writable: bool) -> Result<Self> {
        let file = LocalFile::fget(fd)?;
        // SAFETY: The calling process is in an ioctl on another descriptor, so it holds no position lock of
        // this one.
        let file = unsafe { LocalFile::assume_no_fdget_pos(file) };
        if is_device(&file) {
            let device = BlockDevice::of_file(file, writable)?;
            return Ok(Storage::Device(Arc::new(device, GFP_KERNEL)?));
        }
        let file = ImageFile::new(file, writable)?;
        Ok(Storage::File(Arc::new(file, GFP_KERNEL)?))
    }

    /// The size in sectors of 512 bytes now.
    pub(crate) fn sectors(&self) -> u64 {
        match self {
            Storage::Device(device) => device.sectors(),
            Storage::File(file) => file.sectors(),
        }
    }

    /// Sectors of 512 bytes of which each transfer is a multiple, and where it begins.
    pub(crate) fn block(&self) -> u32 {
        match self {
            Storage::Device(device) => device.limits().logical_block / 512,
            Storage::File(file) => file.block(),
        }
    }

    /// True if it may be written.
    pub(crate) fn is_writable(&self) -> bool {
        match self {
            Storage::Device(device) => device.is_writable(),
            Storage::File(file) => file.is_writable(),
        }
    }

    /// True if what is written must not change meanwhile: where a checksum that is wrong ends a connection that other
    /// disks have, too, that is more than the loss of whoever changes it.
    pub(crate) fn wants_stable_pages(&self) -> bool {
        match self {
            Storage::Device(device) => device.wants_stable_pages(),
            Storage::File(file) => file.wants_stable_pages(),
        }
    }

    /// True if both are the same device or the same file.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Storage::Device(one), Storage::Device(other)) => one.number() == other.number(),
            (Storage::File(one), Storage::File(other)) => one.is_same(other),
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
