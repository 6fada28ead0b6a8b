// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Data that a block device of dom0 read and wrote.

use crate::sh;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Sectors of a MiB in the kernel's unit of 512 bytes, whatever the device's block size.
const MIB: f64 = 2048.0;

/// Numbers of sectors read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traffic {
    read: u64,
    written: u64,
}

impl Traffic {
    /// Reads the counters of this block device.
    pub(crate) fn of(device: &str) -> Result<Traffic> {
        let name = Path::new(device).file_name().unwrap_or_default();
        let file = Path::new("/sys/block").join(name).join("stat");
        let text = sh::get(&file)?;
        Traffic::parse(&text).with_context(|| format!("{} says `{}`", file.display(), text.trim()))
    }

    /// `READS MERGED SECTORS MS WRITES MERGED SECTORS ...`
    fn parse(text: &str) -> Option<Traffic> {
        let mut words = text.split_whitespace();
        let read = words.nth(2)?.parse().ok()?;
        let written = words.nth(3)?.parse().ok()?;
        Some(Traffic { read, written })
    }

    /// Returns the traffic since `before`, as further figures of a job.
    pub(crate) fn since(self, before: Traffic) -> BTreeMap<&'static str, f64> {
        let mib = |now: u64, before: u64| now.saturating_sub(before) as f64 / MIB;
        [
            ("MiB the storage read", mib(self.read, before.read)),
            ("MiB the storage wrote", mib(self.written, before.written)),
        ]
        .into()
    }
}

#[cfg(test)]
mod tests {
    use super::Traffic;

    #[test]
    fn sectors_that_were_moved() {
        let text = "     100       2    20480       7       30       1     4096       9        0       12       16 5 6 7 8 9 1\n";
        let before = Traffic::parse(text).unwrap();
        let now = Traffic {
            read: 20_480 + 49_152,
            written: 4_096 + 1_024,
        };
        let moved = now.since(before);
        assert_eq!(moved["MiB the storage read"], 24.0);
        assert_eq!(moved["MiB the storage wrote"], 0.5);
        assert_eq!(Traffic::parse("1 2 3 4 5 6"), None);
        assert_eq!(Traffic::parse("1 2 x 4 5 6 7"), None);
    }
}
