// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! dom0's kernel log.

use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

/// Placeholder for messages that were overwritten before they were read.
pub const LOST: &str = "(messages were lost)";

/// A position in the log.
#[derive(Debug)]
pub struct Kmsg(File);

impl Kmsg {
    /// Starts behind the last message.
    pub fn from_now() -> Result<Kmsg> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("cannot open /dev/kmsg: run this as root")?;
        file.seek(SeekFrom::End(0))
            .context("cannot go to the end of /dev/kmsg")?;
        Ok(Kmsg(file))
    }

    /// The messages since the last call.
    pub fn take(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = [0u8; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(lines),
                Ok(count) => {
                    let text = String::from_utf8_lossy(&record[..count]);
                    let message = text.split_once(';').map_or(&*text, |(_, message)| message);
                    lines.push(message.trim_end().to_owned());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(lines),
                // The next read continues behind the gap.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                    lines.push(LOST.to_owned());
                }
                Err(error) => return Err(error).context("cannot read /dev/kmsg"),
            }
        }
    }
}
