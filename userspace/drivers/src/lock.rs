// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lock of an image, for which each user of the image waits.

use diskio::{File, LockKind, LockPart};
use std::io;
use std::time::{Duration, Instant};

/// Time for which a process whose I/O is not over may have the image locked.
const WAIT: Duration = Duration::from_secs(5);
/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(5);

/// As [`lock_part`], of all of the image.
pub async fn lock(file: &File, kind: LockKind) -> io::Result<bool> {
    lock_part(file, kind, LockPart::Whole).await
}

/// Locks a part of an image; waits a little for the I/O of a process that died. Returns false if a living process has
/// it.
pub async fn lock_part(file: &File, kind: LockKind, part: LockPart) -> io::Result<bool> {
    let start = Instant::now();
    loop {
        match file.lock_part(kind, part) {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if start.elapsed() > WAIT {
                    return Ok(false);
                }
            }
            Err(error) => return Err(error),
        }
        file.io().sleep(PAUSE).await?;
    }
}
