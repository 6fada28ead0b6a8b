// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptors that the parent process left open for us.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// A copy of the inherited descriptor `number`, closed on exec. Fails if nothing is open there.
/// The descriptor itself stays open as long as the process.
pub fn inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call changes nothing but that it makes a new descriptor.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
