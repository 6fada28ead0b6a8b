// SPDX-License-Identifier: GPL-2.0-only

//! Files that are read and written past the page cache.
//!
//! Wraps the fields of `struct file`, `i_size_read` (include/linux/fs.h) and `vfs_fsync`.

use crate::linux::sys;
use crate::linux::task::workqueue::OwnQueue;
use crate::linux::versions::not_supported;
use kernel::bindings;
use kernel::error::to_result;
use kernel::fs::File;
use kernel::prelude::*;
use kernel::sync::aref::ARef;

/// Calls of one file that may wait for its file system at the same time.
const CALLS: u16 = 16;

/// A regular file that is open for direct I/O.
///
/// # Invariants
///
/// The file was opened for direct I/O and for reading, and for writing if `writable`; its file system has
/// the operations for that.
pub(crate) struct ImageFile {
    // First: its work uses the file.
    queue: OwnQueue,
    file: ARef<File>,
    block: u32,
    most: Option<TransferLimits>,
    can_refuse_to_wait: bool,
    writable: bool,
}

/// Limits of one transfer.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransferLimits {
    /// Ranges of memory.
    pub(super) ranges: u16,
    /// Bytes.
    pub(super) bytes: u32,
}

impl ImageFile {
    /// Takes a file if direct I/O with it is possible. May sleep.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` if it is not.
    pub(super) fn new(file: ARef<File>, writable: bool) -> Result<Self> {
        let mut limits = sys::FileLimits::default();
        // SAFETY: The file is open; `limits` is valid for writes.
        unsafe { sys::xbr_file_limits(file.as_ptr(), &mut limits) };
        let fits = limits.regular != 0
            && limits.local != 0
            && limits.direct != 0
            && limits.readable != 0
            && (limits.writable != 0 || !writable);
        if !fits {
            return Err(not_supported());
        }
        // INVARIANT: Just checked; none of it changes while the file is open.
        Ok(Self {
            // A queue for this file alone, so that work on it waits for no other file.
            queue: OwnQueue::for_files(c"xen-blkback-rs-file", CALLS)?,
            file,
            block: limits.block / 512,
            most: match (limits.segments, limits.sectors) {
                (0, _) | (_, 0) => None,
                (ranges, sectors) => Some(TransferLimits {
                    ranges,
                    bytes: sectors.saturating_mul(512),
                }),
            },
            can_refuse_to_wait: limits.nowait != 0,
            writable,
        })
    }

    pub(super) fn as_raw(&self) -> *mut bindings::file {
        self.file.as_ptr()
    }

    /// Returns the queue for calls that may wait.
    pub(super) fn queue(&self) -> &OwnQueue {
        &self.queue
    }

    /// Returns true if a call with the order not to wait (`IOCB_NOWAIT`) is possible.
    pub(super) fn can_refuse_to_wait(&self) -> bool {
        self.can_refuse_to_wait
    }

    /// Returns true if the file was opened for writing.
    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Returns the number of 512-byte sectors of which each transfer is a multiple.
    pub(super) fn block(&self) -> u32 {
        self.block
    }

    /// Returns the device's limits for one transfer, if it has any. A larger transfer would have to be divided, but a
    /// device with the order not to wait does not divide: the whole transfer would fail.
    pub(super) fn most(&self) -> Option<TransferLimits> {
        self.most
    }

    /// Returns the present size in whole sectors of 512 bytes.
    pub(super) fn sectors(&self) -> u64 {
        // SAFETY: The file is open.
        let size = unsafe { sys::xbr_file_size(self.file.as_ptr()) };
        u64::try_from(size).unwrap_or(0) / 512
    }

    /// Returns true if both are the same file, whatever its name was when it was opened.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        // SAFETY: Both files are open, so both inodes live.
        unsafe { (*self.as_raw()).f_inode == (*other.as_raw()).f_inode }
    }

    /// Returns true if the data of a write must not change while it is under way.
    pub(super) fn wants_stable_pages(&self) -> bool {
        // SAFETY: The file is open.
        unsafe { sys::xbr_file_stable_writes(self.file.as_ptr()) != 0 }
    }

    /// Makes all completed writes durable. May sleep for as long as the storage takes.
    pub(super) fn sync(&self) -> Result {
        // SAFETY: The file is open.
        to_result(unsafe { bindings::vfs_fsync(self.as_raw(), 1) })
    }
}
