// SPDX-License-Identifier: MIT OR Apache-2.0
//! Locks of images, and how they end.
//!
//! A lock belongs to an open file description. If a process dies, its lock ends when the kernel has closed the file,
//! which is later than its last transfer. A process that ends in order releases the lock itself, because the kernel may
//! keep the file for some time after a transfer (in a worker of `io_uring`), and the next user, which was notified that
//! the image is free, would find it locked.

use crate::Errno;
use static_assertions::{assert_impl_all, assert_not_impl_any};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// Accesses that a lock excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Other processes may read the image, and none may change it.
    Read,
    /// No other process may use the image.
    Write,
}

/// Part of an image that is locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockPart {
    /// All that a file can have, as others lock it.
    #[default]
    Whole,
    /// All but [`Fence`](Self::Fence): for a process that leaves that byte to another one.
    Data,
    /// The last byte that a file can have: a process holds it while another one has the data locked for it.
    Fence,
}

impl LockPart {
    /// The first byte, and how many; 0 for all.
    fn range(self) -> (i64, i64) {
        match self {
            LockPart::Whole => (0, 0),
            LockPart::Data => (0, i64::MAX),
            LockPart::Fence => (i64::MAX, 1),
        }
    }
}

/// Locks an image on this open file description: the lock is over when the last copy of the descriptor is closed *and*
/// its last I/O is over, in whatever process they are. So a free lock proves that a dead process writes no more. Fails
/// with `WouldBlock` if another one has it.
pub fn lock_part(fd: BorrowedFd<'_>, kind: LockKind, part: LockPart) -> io::Result<()> {
    let kind = match kind {
        LockKind::Read => libc::F_RDLCK,
        LockKind::Write => libc::F_WRLCK,
    };
    set(fd, kind, part)
}

fn set(fd: BorrowedFd<'_>, kind: libc::c_int, part: LockPart) -> io::Result<()> {
    // SAFETY: zeroes are valid in all fields.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // CAST: the constants are small.
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = part.range();
    let place = &raw const lock;
    // SAFETY: the call reads the structure.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, place) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// As [`lock_part`], of all of the image.
pub fn lock_whole(fd: BorrowedFd<'_>, kind: LockKind) -> io::Result<()> {
    lock_part(fd, kind, LockPart::Whole)
}

/// An open file, which its operations keep open. Dropping it releases its locks, because no operation is under way
/// then.
#[derive(Debug)]
pub struct Opened {
    fd: OwnedFd,
    locked: Cell<Option<LockPart>>,
    /// Others have it as well while there is more than one.
    lent: Arc<()>,
}

// A thread that may hang opens an image and hands it over; two threads must not change its locks.
assert_impl_all!(Opened: Send);
assert_not_impl_any!(Opened: Sync, Clone);

impl Opened {
    /// As [`lock_part`].
    pub(crate) fn lock(&self, kind: LockKind, part: LockPart) -> io::Result<()> {
        lock_part(self.fd.as_fd(), kind, part)?;
        let both = self.locked.get().is_some_and(|locked| locked != part);
        self.locked.set(Some(match both {
            true => LockPart::Whole,
            false => part,
        }));
        Ok(())
    }

    /// Releases its locks, although transfers may be under way.
    pub(crate) fn unlock(&self) -> io::Result<()> {
        match self.locked.take() {
            Some(part) => set(self.fd.as_fd(), libc::F_UNLCK, part),
            None => Ok(()),
        }
    }

    /// A copy for another thread, which may be at work with it when this is dropped.
    pub(crate) fn lend(&self) -> Result<LentFile, Errno> {
        let fd = self.fd.try_clone();
        Ok(LentFile {
            fd: fd.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?,
            _mark: self.lent.clone(),
        })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let Some(part) = self.locked.get() else {
            return;
        };
        // Otherwise it ends with the last copy.
        if Arc::strong_count(&self.lent) == 1 {
            if let Err(error) = set(self.fd.as_fd(), libc::F_UNLCK, part) {
                crate::say!("a lock is given back late, by closing the image: {error}");
            }
        }
    }
}

impl From<OwnedFd> for Opened {
    fn from(fd: OwnedFd) -> Self {
        Self {
            fd,
            locked: Cell::default(),
            lent: Arc::default(),
        }
    }
}

impl AsFd for Opened {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Opened {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// An open file in another thread.
#[derive(Debug)]
pub(crate) struct LentFile {
    // Closed before it is not lent any more.
    fd: OwnedFd,
    _mark: Arc<()>,
}

impl AsFd for LentFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
