// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Memory that disks need on both sides.

use crate::guest::RunningGuest;
use crate::sh;
use anyhow::{anyhow, Context, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// Drops caches first, so that reclaimable memory does not count as used.
const FREE: &str = "sync; echo 3 >/proc/sys/vm/drop_caches; grep ^MemFree: /proc/meminfo";

/// Interval between readings of memory under load.
const LOOK: Duration = Duration::from_millis(5);

/// Free memory, in KiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FreeMemory {
    dom0: f64,
    guest: f64,
}

impl FreeMemory {
    /// Reads the free memory.
    pub(crate) fn now(guest: &mut RunningGuest) -> Result<FreeMemory> {
        Ok(FreeMemory {
            dom0: free(&sh::shell(FREE)?)?,
            guest: free(&guest.run(FREE)?)?,
        })
    }

    /// Returns the maximum memory of dom0 for each of `disks` disks while `load` uses them. It does not drop caches,
    /// because that makes a driver release the memory that it keeps for the next request.
    pub(crate) fn busy(
        &self,
        disks: u32,
        load: impl FnOnce() -> Result<()>,
    ) -> Result<BTreeMap<String, f64>> {
        let over = AtomicBool::new(false);
        let least = thread::scope(|scope| {
            let looking = scope.spawn(|| -> Result<f64> {
                let mut least = f64::MAX;
                while !over.load(Ordering::Relaxed) {
                    let text = sh::get("/proc/meminfo")?;
                    let line = text.lines().find(|line| line.starts_with("MemFree:"));
                    least = least.min(free(line.unwrap_or_default())?);
                    thread::sleep(LOOK);
                }
                Ok(least)
            });
            let loaded = load();
            over.store(true, Ordering::Relaxed);
            let least = looking
                .join()
                .map_err(|_| anyhow!("looking at memory panicked"))?;
            loaded.and(least)
        })?;
        Ok([(
            "KiB of dom0, busy".to_string(),
            (self.dom0 - least) / f64::from(disks),
        )]
        .into())
    }

    /// Returns the memory of each of `disks` disks, with `before` as the value without them; `when` is part of the
    /// names.
    pub(crate) fn each(self, when: &str, before: &FreeMemory, disks: u32) -> BTreeMap<String, f64> {
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
    use super::FreeMemory;

    #[test]
    fn memory_of_each_disk() {
        let before = FreeMemory {
            dom0: 1000.0,
            guest: 50.0,
        };
        let now = FreeMemory {
            dom0: 200.0,
            guest: 50.0,
        };
        let each = now.each("idle", &before, 4);
        assert_eq!(each["KiB of dom0, idle"], 200.0);
        assert_eq!(each["KiB of the guest, idle"], 0.0);
    }
}
