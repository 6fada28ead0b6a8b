// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What disks take of the memory of both sides.

use crate::guest::Guest;
use crate::sh;
use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// Nothing that could be given back at once may count as taken.
const FREE: &str = "sync; echo 3 >/proc/sys/vm/drop_caches; grep ^MemFree: /proc/meminfo";

/// Free memory, in KiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    dom0: f64,
    guest: f64,
}

impl Memory {
    /// What is free now.
    pub(crate) fn now(guest: &mut Guest) -> Result<Memory> {
        Ok(Memory {
            dom0: free(&sh::shell(FREE)?)?,
            guest: free(&guest.run(FREE)?)?,
        })
    }

    /// What each of `disks` disks takes, `before` being without them; `when` is part of the names.
    pub(crate) fn each(self, when: &str, before: &Memory, disks: u32) -> BTreeMap<String, f64> {
        let each = |before: f64, now: f64| (before - now) / f64::from(disks);
        [
            (format!("KiB of dom0, {when}"), each(before.dom0, self.dom0)),
            (
                format!("KiB of the guest, {when}"),
                each(before.guest, self.guest),
            ),
        ]
        .into()
    }
}

/// `MemFree:  12 kB`
fn free(text: &str) -> Result<f64> {
    let number = text.split_whitespace().nth(1);
    number
        .and_then(|word| word.parse().ok())
        .with_context(|| format!("/proc/meminfo says `{text}`"))
}

#[cfg(test)]
mod tests {
    use super::Memory;

    #[test]
    fn memory_of_each_disk() {
        let before = Memory {
            dom0: 1000.0,
            guest: 50.0,
        };
        let now = Memory {
            dom0: 200.0,
            guest: 50.0,
        };
        let each = now.each("idle", &before, 4);
        assert_eq!(each["KiB of dom0, idle"], 200.0);
        assert_eq!(each["KiB of the guest, idle"], 0.0);
    }
}
