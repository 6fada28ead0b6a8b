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
    most: Option<Most>,
    can_refuse_to_wait: bool,
    writable: bool,
}

/// What is transferred at once at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Most {
    /// Ranges of memory.
    pub(super) ranges: u16,
    /// Bytes.
    pub(super) bytes: u32,
}

impl ImageFile {
    /// Takes a file if it is one for this. May sleep.
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
        // INVARIANT: Just looked at; none of it changes while the file is open.
        Ok(Self {
            // What waits for a file waits for no other one.
            queue: OwnQueue::for_files(c"xen-blkback-rs-file", CALLS)?,
            file,
            block: limits.block / 512,
            most: match (limits.segments, limits.sectors) {
                (0, _) | (_, 0) => None,
                (ranges, sectors) => Some(Most {
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

    /// Where calls are made that may wait.
    pub(super) fn queue(&self) -> &OwnQueue {
        &self.queue
    }

    /// True if a call can be told not to wait.
    pub(super) fn can_refuse_to_wait(&self) -> bool {
        self.can_refuse_to_wait
    }

    /// True if it was opened for writing.
    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Sectors of 512 bytes of which a transfer consists.
    pub(super) fn block(&self) -> u32 {
        self.block
    }

    /// What its device takes at once, if it says so. More would have to be divided, and a device that was told not to wait does
    /// not divide: all of it would fail.
    pub(super) fn most(&self) -> Option<Most> {
        self.most
    }

    /// The size in whole sectors of 512 bytes now.
    pub(super) fn sectors(&self) -> u64 {
        // SAFETY: The file is open.
        let size = unsafe { sys::xbr_file_size(self.file.as_ptr()) };
        u64::try_from(size).unwrap_or(0) / 512
    }

    /// True if both are the same file, whatever its name was when it was opened.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        // SAFETY: Both files are open, so both inodes live.
        unsafe { (*self.as_raw()).f_inode == (*other.as_raw()).f_inode }
    }

    /// True if what is written must not change meanwhile.
    pub(super) fn wants_stable_pages(&self) -> bool {
        // SAFETY: The file is open.
        unsafe { sys::xbr_file_stable_writes(self.file.as_ptr()) != 0 }
    }

    /// Makes what was written durable. May sleep, and long if the storage is slow.
    pub(super) fn sync(&self) -> Result {
        // SAFETY: The file is open.
        to_result(unsafe { bindings::vfs_fsync(self.as_raw(), 1) })
    }
}
