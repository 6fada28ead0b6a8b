// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that I/O is done on.

use crate::pool::Pool;
use rustix::mm::{mmap, mmap_anonymous, munmap, MapFlags, ProtFlags};
use static_assertions::assert_not_impl_any;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::rc::Rc;

/// Accesses that a mapping of a file allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingAccess {
    /// Only reading.
    Read,
    /// Reading and writing.
    Write,
}

/// Page-aligned memory. Others may change it at any time (the kernel, a device, a process that maps
/// the same file), so its bytes are copied in and out and never referred to.
///
/// # Invariants
///
/// `base` points to `len` bytes (more than 0, at most `isize::MAX`) that are mapped readable until
/// this is dropped, and writable if `writable`.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    /// Pool that gets the memory when this is dropped.
    home: Option<Rc<Pool>>,
}

// Copies within a region rely on being alone: no other thread of this process may have it. A copy would unmap it twice.
assert_not_impl_any!(Region: Send, Sync, Clone);

impl Region {
    /// Zeroed memory of `len` bytes, which are rounded up to pages.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let len = whole_pages(len)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is requested, so no existing mapping changes.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), len, prot, MapFlags::PRIVATE) }?;
        Self::new(base, len, true)
    }

    /// Maps `len` bytes of a file or device from `offset` on, shared with all other mappings.
    pub fn map(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: MappingAccess,
    ) -> io::Result<Self> {
        let len = whole_pages(len)?;
        let writable = access == MappingAccess::Write;
        let prot = match access {
            MappingAccess::Read => ProtFlags::READ,
            MappingAccess::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: no address is requested, so no existing mapping changes.
        let base = unsafe { mmap(ptr::null_mut(), len, prot, MapFlags::SHARED, fd, offset) }?;
        Self::new(base, len, writable)
    }

    fn new(base: *mut std::ffi::c_void, len: usize, writable: bool) -> io::Result<Self> {
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            base,
            len,
            writable,
            home: None,
        })
    }

    /// Returns this region, whose memory goes back to `home` when it is dropped.
    pub(crate) fn of(mut self, home: Rc<Pool>) -> Self {
        self.home = Some(home);
        self
    }

    /// Bytes, whole pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// False: there is always a page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns true if the memory is writable.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// True if the `len` bytes from `at` on are inside.
    pub fn holds(&self, at: usize, len: usize) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Copies bytes out, from `at` on.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn read(&self, at: usize, to: &mut [u8]) {
        let from = self.place(at, to.len());
        // SAFETY: `place` checked that the source is inside the mapping, which is readable; the
        // target is a slice of Rust's, which the mapping is not a part of.
        unsafe { ptr::copy_nonoverlapping(from.cast_const(), to.as_mut_ptr(), to.len()) }
    }

    /// Copies bytes in, from `at` on.
    ///
    /// # Panics
    ///
    /// If they are not inside, or the region is read-only.
    pub fn write(&self, at: usize, from: &[u8]) {
        assert!(self.writable, "a region is read-only");
        let to = self.place(at, from.len());
        // SAFETY: `place` checked that the target is inside the mapping, which is writable; the
        // source is a slice of Rust's, which the mapping is not a part of.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// Sets `len` bytes from `at` on to `byte`.
    ///
    /// # Panics
    ///
    /// If they are not inside, or the region is read-only.
    pub fn fill(&self, at: usize, len: usize, byte: u8) {
        assert!(self.writable, "a region is read-only");
        let to = self.place(at, len);
        // SAFETY: `place` checked that the target is inside the mapping, which is writable.
        unsafe { ptr::write_bytes(to, byte, len) }
    }

    /// Copies `len` bytes from `from_at` of `from` to `at`.
    ///
    /// # Panics
    ///
    /// If they are not inside, or the region is read-only.
    pub fn copy(&self, at: usize, from: &Self, from_at: usize, len: usize) {
        assert!(self.writable, "a region is read-only");
        let source = from.place(from_at, len);
        let to = self.place(at, len);
        // SAFETY: `place` checked that both are inside of their mappings; this one is writable;
        // `copy` allows that they overlap.
        unsafe { ptr::copy(source.cast_const(), to, len) }
    }

    /// Returns the address of the `len` bytes from `at` on, for the kernel.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn place(&self, at: usize, len: usize) -> *mut u8 {
        assert!(
            self.holds(at, len),
            "{len} bytes at {at} are not inside a region of {}",
            self.len
        );
        // SAFETY: `holds` says that it is inside the mapping or at its end.
        unsafe { self.base.as_ptr().add(at) }
    }

    /// The address as a number, for structures that the kernel reads.
    pub fn address(&self, at: usize) -> u64 {
        self.place(at, 0) as u64
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            // From here on the mapping is that of the new object.
            return home.give(Self {
                base: self.base,
                len: self.len,
                writable: self.writable,
                home: None,
            });
        }
        // SAFETY: by the invariant it is mapped, and no reference into it exists.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

fn whole_pages(len: usize) -> io::Result<usize> {
    let page = rustix::param::page_size();
    len.max(1)
        .checked_next_multiple_of(page)
        .filter(|len| isize::try_from(*len).is_ok())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
