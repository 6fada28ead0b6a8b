// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! System calls that the standard library does not have.

use anyhow::{bail, Context, Result};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

/// Calls an ioctl whose argument is a structure, or nothing if that has no bytes.
pub(crate) fn ioctl<T: IntoBytes + FromBytes>(
    file: &File,
    number: u32,
    value: &mut T,
) -> io::Result<i32> {
    let bytes = value.as_mut_bytes();
    // SAFETY: the structure has the size that the number of the ioctl names, or that it carries itself, and
    // may hold any bytes.
    let result = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::c_ulong::from(number),
            bytes.as_mut_ptr(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// `KEXEC_FILE_ON_CRASH` of `linux/kexec.h`.
const ON_CRASH: libc::c_ulong = 2;

/// Loads the kernel that starts when the one that runs has crashed.
pub(crate) fn load_for_crash(kernel: &File, initramfs: &File, words: &CStr) -> io::Result<()> {
    // SAFETY: both files are open, and the words with their end have the given length, across the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            words.to_bytes_with_nul().len(),
            words.as_ptr(),
            ON_CRASH,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Memory that is shared with the kernel and changes at any time. Its bytes are only copied, never borrowed.
pub(crate) struct Area {
    start: *mut u8,
    len: usize,
}

impl Area {
    /// Maps a part of a file.
    pub(crate) fn map(file: &File, offset: u64, len: u64, write: bool) -> Result<Area> {
        let len = usize::try_from(len)?;
        let protection = libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 };
        let start = map(file, offset, len, protection).context("cannot map an area of a node")?;
        Ok(Area { start, len })
    }

    fn place(&self, offset: u64, len: usize) -> Result<*mut u8> {
        let offset = usize::try_from(offset)?;
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.len) {
            bail!("the kernel names bytes behind the end of an area");
        }
        // SAFETY: inside the mapping.
        Ok(unsafe { self.start.add(offset) })
    }

    /// Copies bytes out of it.
    pub(crate) fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        let from = self.place(offset, to.len())?;
        // SAFETY: the bytes are inside the mapping, which lives as long as `self`; `to` is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// Copies bytes into it.
    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let to = self.place(offset, from.len())?;
        // SAFETY: as in `read`; only the arena changes, and its mapping is writable.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    /// Copies a structure out of it.
    pub(crate) fn get<T: FromBytes + IntoBytes>(&self, offset: u64) -> Result<T> {
        let mut value = T::new_zeroed();
        self.read(offset, value.as_mut_bytes())?;
        Ok(value)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers to it any more.
        if unsafe { libc::munmap(self.start.cast(), self.len) } != 0 {
            eprintln!("vmtest: munmap: {}", io::Error::last_os_error());
        }
    }
}

/// Maps a part of a file at a place of the kernel's choice.
fn map(file: &File, offset: u64, len: usize, protection: libc::c_int) -> io::Result<*mut u8> {
    // SAFETY: a new mapping, which replaces none.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            protection,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            // CAST: the offsets of the areas.
            offset as libc::off_t,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(start.cast())
}

/// Sleeps until there is something to read, for so long at most; says whether there is.
pub(crate) fn readable(file: &File, limit: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // CAST: a few seconds.
    let limit = limit.as_millis() as libc::c_int;
    // SAFETY: the structure is ours, and there is one.
    if unsafe { libc::poll(&mut poll, 1, limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(poll.revents & libc::POLLIN != 0)
}

/// Makes a hole in a file: it reads as zeroes.
pub(crate) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // CAST: inside a file.
    let (offset, len) = (offset as libc::off_t, len as libc::off_t);
    // SAFETY: takes no pointer.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Discards a range of a block device.
pub(crate) fn discard(device: &File, offset: u64, len: u64) -> io::Result<()> {
    const BLKDISCARD: u32 = 0x1277;
    ioctl(device, BLKDISCARD, &mut [offset, len]).map(drop)
}

/// Sends a signal to a process that the caller knows to be alive, or not waited for yet.
pub(crate) fn kill(pid: u32, signal: libc::c_int) -> io::Result<()> {
    // CAST: a process number.
    // SAFETY: takes no pointer.
    if unsafe { libc::kill(pid as libc::pid_t, signal) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
