// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! dom0's kernel log: how much was logged, and whether anything broke.

use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

/// Any of these means that something broke.
const TROUBLE: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Oops",
    "KFENCE",
    "UBSAN",
    "blocked for more than",
    "rcu: INFO",
    "soft lockup",
    "hard LOCKUP",
    "Bad page",
    "bad pte",
    "general protection",
    "corruption",
    "refcount_t:",
    "kernel BUG at",
    "panicked at",
    "Unable to handle",
    "Call Trace:",
    "cannot create duplicate",
    "leaking g.e.",
    "unmapping guest pages failed",
    "nobody cared",
];

/// A position in the log.
pub(crate) struct Kmsg(File);

impl Kmsg {
    /// Starts behind the last message.
    pub(crate) fn from_now() -> Result<Kmsg> {
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
    pub(crate) fn take(&mut self) -> Result<Vec<String>> {
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
                // Messages were overwritten before they were read: too many, whatever they say.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                    lines.extend(std::iter::repeat_n("(lost)".to_owned(), 1000));
                }
                Err(error) => return Err(error).context("cannot read /dev/kmsg"),
            }
        }
    }
}

/// The lines that mean trouble.
pub(crate) fn trouble(lines: &[String]) -> Vec<&String> {
    let bad = lines
        .iter()
        .filter(|line| TROUBLE.iter().any(|sign| line.contains(sign)));
    bad.collect()
}

#[cfg(test)]
mod tests {
    use super::trouble;

    #[test]
    fn trouble_is_seen_and_calm_is_not() {
        let lines = [
            "a WARNING: CPU: 0",
            "vbd-0-7: the frontend's key is missing",
        ];
        assert_eq!(trouble(&lines.map(str::to_owned)).len(), 1);
    }
}
