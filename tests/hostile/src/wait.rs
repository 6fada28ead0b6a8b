// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Waiting with a limit.

use anyhow::{bail, Result};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

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

/// Polls until `found` returns something; for changes without an event. The pause is twice as long as the poll was, which
/// took processor time away from what it waits for.
pub(crate) fn until<T>(
    what: &str,
    limit: Duration,
    mut found: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let begun = Instant::now();
        if let Some(value) = found()? {
            return Ok(value);
        }
        let now = Instant::now();
        if now >= deadline {
            bail!("{what} did not come in {limit:?}");
        }
        std::thread::sleep((2 * now.duration_since(begun)).clamp(PAUSE[0], PAUSE[1]));
    }
}
