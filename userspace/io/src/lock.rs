// SPDX-License-Identifier: MIT OR Apache-2.0
//! Locks of images, and how they end.
//!
//! A lock is of an open file description. Where a process dies, it is over when the kernel has done with that:
//! later than its last transfer. Where one ends in order it gives the lock back itself, because the
//! kernel may keep a transfer that is over for some time yet (a worker of `io_uring`), and whoever is told that
//! the image is free finds it locked.

use crate::Errno;
use static_assertions::{assert_impl_all, assert_not_impl_any};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// What an image is locked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Others may read it, nobody may write it.
    Read,
    /// Nobody else may use it.
    Write,
}

/// What of an image is locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockPart {
    /// All that a file can have, as others lock it.
    #[default]
    Whole,
    /// All but [`Fence`](Self::Fence): of whoever lets a process have that.
    Data,
    /// The last byte that a file can have: of a process, while somebody else has the data locked for it.
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

/// Locks an image on this open file description: the lock is over when the last copy of
/// the descriptor is closed *and* its last I/O is over, in whatever process they are. That is
/// what proves that a process that died writes no more. `WouldBlock` if somebody has it.
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

/// An open file, which its operations keep open. What is locked of it is free when this is dropped: nothing of
/// them is under way then.
#[derive(Debug)]
pub struct Opened {
    fd: OwnedFd,
    locked: Cell<Option<LockPart>>,
    /// Others have it as well while there is more than one.
    lent: Arc<()>,
}

// A thread that may hang opens an image and hands it over; two threads may not change what is locked.
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

    /// What is locked of it is free, though its transfers may go on.
    pub(crate) fn unlock(&self) -> io::Result<()> {
        match self.locked.take() {
            Some(part) => set(self.fd.as_fd(), libc::F_UNLCK, part),
            None => Ok(()),
        }
    }

    /// A copy for another thread, which may be at work with it when this is dropped.
    pub(crate) fn lend(&self) -> Result<Lent, Errno> {
        let fd = self.fd.try_clone();
        Ok(Lent {
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
pub(crate) struct Lent {
    // Closed before it is not lent any more.
    fd: OwnedFd,
    _mark: Arc<()>,
}

impl AsFd for Lent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
