// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Waiting with a limit.

use anyhow::{bail, Context, Result};
use std::os::fd::RawFd;
use std::time::Duration;

/// Waits until a file can be read; returns whether it can.
pub(crate) fn readable(fd: RawFd, limit: Duration) -> Result<bool> {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let millis = i32::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    // SAFETY: `poll` is one valid entry.
    let count = unsafe { libc::poll(&mut poll, 1, millis) };
    if count < 0 {
        let error = std::io::Error::last_os_error();
        if error.kind() == std::io::ErrorKind::Interrupted {
            return Ok(false);
        }
        bail!("cannot wait for a file: {error}");
    }
    Ok(count > 0)
}

/// Least and most time between two polls.
const PAUSE: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];

/// Polls until `found` returns something; for changes without an event.
pub(crate) fn until<T>(
    what: &str,
    limit: Duration,
    found: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let found = dom0::poll::until(limit, PAUSE, found)?;
    found.with_context(|| format!("{what} did not come in {limit:?}"))
}
