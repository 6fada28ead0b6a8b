// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Signs of trouble in the logs of dom0, of the hypervisor and of the guests.

use crate::sh;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

/// Any of these in a kernel's log means that something broke.
const KERNEL: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Oops",
    "KFENCE",
    "UBSAN",
    "blocked for more than",
    "rcu: INFO",
    "soft lockup",
    "Bad page",
    "general protection",
    "slab corruption",
    "list_add corruption",
    "list_del corruption",
    "refcount_t:",
    "kernel BUG at",
    "panicked at",
    "Unable to handle",
    "Call Trace:",
    "sysfs: cannot create duplicate",
    "still allocated",
    "deferring g.e.",
];

/// The same for the hypervisor.
const XEN: &[&str] = &[
    "Xen BUG",
    "Xen WARN",
    "FATAL",
    "Assertion",
    "Xen call trace",
    "Panic on",
];

/// Lines of a kernel's log that mean trouble, each with the name of the machine before it.
pub(crate) fn in_kernel<'a>(whose: &str, lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    matching(whose, KERNEL, lines)
}

/// Lines of the hypervisor's log that mean trouble.
pub(crate) fn in_xen<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    matching("xen", XEN, lines)
}

fn matching<'a>(
    whose: &str,
    signs: &[&str],
    lines: impl IntoIterator<Item = &'a str>,
) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for line in lines {
        if signs.iter().any(|sign| line.contains(sign)) {
            *counts.entry(line).or_default() += 1;
        }
    }
    let text = |(line, count): (&str, usize)| match count {
        1 => format!("{whose}: {line}"),
        _ => format!("{whose}: {line} ({count} times)"),
    };
    counts.into_iter().map(text).collect()
}

/// A position in dom0's kernel log.
pub(crate) struct Kmsg(File);

impl Kmsg {
    /// Starts behind the last message.
    pub(crate) fn from_now() -> Result<Kmsg> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg");
        let file = file
            .as_mut()
            .map_err(|error| anyhow::anyhow!("cannot open /dev/kmsg: {error}"))?;
        file.seek(SeekFrom::End(0))
            .context("cannot go to the end of /dev/kmsg")?;
        Ok(Kmsg(
            file.try_clone().context("cannot duplicate /dev/kmsg")?,
        ))
    }

    /// The messages since the last call.
    pub(crate) fn take(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = [0u8; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(lines),
                Ok(count) => {
                    let text = String::from_utf8_lossy(&record[..count]).into_owned();
                    lines.push(
                        text.split_once(';')
                            .map_or(text.as_str(), |(_, message)| message)
                            .trim_end()
                            .to_owned(),
                    );
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(lines),
                // EPIPE: messages were overwritten before they were read; the next read goes on after them.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                    lines.push("(messages were lost)".to_owned())
                }
                Err(error) => return Err(error).context("cannot read /dev/kmsg"),
            }
        }
    }
}

/// The hypervisor's messages since the last call.
pub(crate) fn take_xen_log() -> Result<Vec<String>> {
    Ok(sh::run(&["xl", "dmesg", "-c"])?
        .lines()
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::{in_kernel, in_xen};

    #[test]
    fn trouble_is_seen_and_calm_is_not() {
        assert_eq!(
            in_kernel("dom0", ["all is well", "WARNING: CPU: 0 PID: 7 at x"]).len(),
            1
        );
        assert_eq!(
            in_kernel("dom0", ["xen-blkback: backend/vbd/1/51712: using 1 queues"]).len(),
            0
        );
        assert_eq!(
            in_xen(["(XEN) Xen BUG at mm.c:1", "(XEN) d1 attempted something"]).len(),
            1
        );
    }
}
