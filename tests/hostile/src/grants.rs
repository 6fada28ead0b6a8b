// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Pages that another domain may map or copy, from the kernel's gntalloc device.

use anyhow::{bail, Context, Result};
use ring::abi::PAGE_SIZE;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU8, Ordering::Relaxed};

const DEVICE: &str = "/dev/xen/gntalloc";
/// `IOCTL_GNTALLOC_ALLOC_GREF`, for a structure of 24 bytes.
const ALLOC: libc::c_ulong = request(b'G', 5, 24);
/// `IOCTL_GNTALLOC_DEALLOC_GREF`, for a structure of 16 bytes.
const DEALLOC: libc::c_ulong = request(b'G', 6, 16);
/// Words of a page.
pub(crate) const WORDS: usize = PAGE_SIZE / 4;

/// The number of an ioctl without direction.
pub(crate) const fn request(kind: u8, number: u8, size: u32) -> libc::c_ulong {
    ((size << 16) | ((kind as u32) << 8) | number as u32) as libc::c_ulong
}

/// Access of the peer to the pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum GrantAccess {
    /// Read only.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// Granted pages, adjacent in this program's memory. The peer shares the memory, so it is accessed only as atomics.
pub(crate) struct GrantPages {
    base: NonNull<u8>,
    grefs: Vec<u32>,
    index: u64,
    device: File,
}

// SAFETY: The mapping belongs to the value, and all accesses to it are atomic.
unsafe impl Send for GrantPages {}
// SAFETY: As above.
unsafe impl Sync for GrantPages {}

impl GrantPages {
    /// Makes `count` zeroed pages and grants them to domain 0.
    pub(crate) fn new(count: usize, access: GrantAccess) -> Result<GrantPages> {
        let device = File::options().read(true).write(true).open(DEVICE);
        let device =
            device.with_context(|| format!("cannot open {DEVICE}: modprobe xen-gntalloc"))?;
        // domid, flags, count, index, then one reference per page; padded to the structure.
        let mut block = vec![0u32; 4 + count.max(2)];
        block[0] = u32::from(access == GrantAccess::ReadWrite) << 16;
        block[1] = u32::try_from(count).context("too many pages")?;
        // SAFETY: The block has room for the structure with `count` references behind it.
        if unsafe { libc::ioctl(device.as_raw_fd(), ALLOC, block.as_mut_ptr()) } != 0 {
            let error = std::io::Error::last_os_error();
            bail!("cannot grant {count} pages: {error}");
        }
        let index = u64::from(block[2]) | u64::from(block[3]) << 32;
        let offset = libc::off_t::try_from(index).context("impossible place of the pages")?;
        // SAFETY: A new mapping of the pages just made.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                device.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            bail!("cannot map granted pages: {error}");
        }
        Ok(GrantPages {
            base: NonNull::new(base.cast()).context("granted pages mapped at 0")?,
            grefs: block[4..4 + count].to_vec(),
            index,
            device,
        })
    }

    /// Returns the grant references.
    pub(crate) fn grefs(&self) -> &[u32] {
        &self.grefs
    }

    /// Returns all pages as words.
    pub(crate) fn words(&self) -> &[AtomicU32] {
        // SAFETY: The mapping is that large, aligned, and stays as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.grefs.len() * WORDS) }
    }

    /// Returns all pages as bytes.
    pub(crate) fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: The mapping is that large and stays as long as `self`.
        unsafe {
            std::slice::from_raw_parts(self.base.as_ptr().cast(), self.grefs.len() * PAGE_SIZE)
        }
    }

    /// Returns the words of one page.
    pub(crate) fn page(&self, page: usize) -> &[AtomicU32] {
        &self.words()[page * WORDS..(page + 1) * WORDS]
    }

    /// Writes bytes; offset and length are multiples of 4.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        for (word, chunk) in self.words()[offset / 4..].iter().zip(bytes.chunks_exact(4)) {
            let value = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            word.store(value, Relaxed);
        }
    }

    /// Reads bytes.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) {
        for (byte, from) in bytes.iter_mut().zip(&self.bytes()[offset..]) {
            *byte = from.load(Relaxed);
        }
    }

    /// Fills every page with a byte.
    pub(crate) fn fill(&self, byte: u8) {
        for word in self.words() {
            word.store(u32::from_ne_bytes([byte; 4]), Relaxed);
        }
    }

    /// Revokes the grants while the pages stay in this program's memory, whether the peer has them mapped or not.
    pub(crate) fn revoke(&self) -> Result<()> {
        let mut block = [self.index, self.grefs.len() as u64];
        // SAFETY: The block is the structure: index, count.
        if unsafe { libc::ioctl(self.device.as_raw_fd(), DEALLOC, block.as_mut_ptr()) } != 0 {
            let error = std::io::Error::last_os_error();
            bail!("cannot take grants back: {error}");
        }
        Ok(())
    }
}

impl Drop for GrantPages {
    fn drop(&mut self) {
        // SAFETY: The mapping was made by `new`, and no reference to it is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.grefs.len() * PAGE_SIZE) };
    }
}
