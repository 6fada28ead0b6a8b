// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A mapped part of a node. The kernel writes there too, so it is accessed only as atomics.

use super::Address;
use anyhow::{Context, Result};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// A mapping of a file.
pub(crate) struct FileMapping {
    base: NonNull<u8>,
    len: usize,
    /// Number of inaccessible bytes behind the mapping.
    guard: usize,
}

/// Bytes of a page.
const PAGE: usize = 4096;

// SAFETY: The mapping belongs to the value, and all accesses to it are atomic.
unsafe impl Send for FileMapping {}
// SAFETY: As above.
unsafe impl Sync for FileMapping {}

impl FileMapping {
    /// Maps `len` bytes with these `PROT_*` and `MAP_*`.
    pub(crate) fn new(
        file: &File,
        offset: u64,
        len: usize,
        protection: i32,
        flags: i32,
    ) -> io::Result<FileMapping> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: A new mapping; nothing refers to its place.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                flags,
                file.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let guard = 0;
        Ok(FileMapping { base, len, guard })
    }

    /// Returns one page of this program's memory with an inaccessible page behind it.
    pub(crate) fn edge() -> io::Result<FileMapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: A new mapping; nothing refers to its place.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                2 * PAGE,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let map = FileMapping {
            base,
            len: PAGE,
            guard: PAGE,
        };
        map.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(map)
    }

    /// Returns the address of a byte of an [`edge`](FileMapping::edge).
    pub(crate) fn address(&self, offset: usize) -> Address<'_> {
        // A write of the kernel beyond the end must not reach other memory.
        assert!(self.guard > 0, "there is no guard");
        Address::of(&self.bytes()[offset..])
    }

    /// Returns the bytes.
    pub(crate) fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: The mapping is that large and stays as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len) }
    }

    /// Copies bytes out.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let from = self.bytes().get(offset..).context("outside of the map")?;
        let from = from.get(..to.len()).context("outside of the map")?;
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.load(Relaxed);
        }
        Ok(())
    }

    /// Copies bytes in.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        let to = self.bytes().get(offset..).context("outside of the map")?;
        let to = to.get(..from.len()).context("outside of the map")?;
        for (to, from) in to.iter().zip(from) {
            to.store(*from, Relaxed);
        }
        Ok(())
    }

    /// Changes the protection of the whole mapping.
    pub(crate) fn protect(&self, protection: i32) -> io::Result<()> {
        // SAFETY: The mapping belongs to this value; a successful call never makes it less accessible.
        let result = unsafe { libc::mprotect(self.base.as_ptr().cast(), self.len, protection) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Tries to double the size.
    pub(crate) fn grow(&self) -> io::Result<()> {
        // SAFETY: Without `MREMAP_MAYMOVE` the mapping stays where it is.
        let result = unsafe { libc::mremap(self.base.as_ptr().cast(), self.len, self.len * 2, 0) };
        if result == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Puts the first `count` bytes, as pages and not as a copy, into a pipe, which keeps the pages while it is open.
    pub(crate) fn pin_into(&self, pipe: i32, count: usize) -> io::Result<usize> {
        let piece = libc::iovec {
            iov_base: self.base.as_ptr().cast(),
            iov_len: count.min(self.len),
        };
        // SAFETY: The piece lies in the mapping.
        let result = unsafe { libc::vmsplice(pipe, &piece, 1, 0) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: The mapping was made by `new`, and no reference to it is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len + self.guard) };
    }
}
