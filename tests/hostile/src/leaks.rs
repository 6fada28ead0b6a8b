// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Counters that must be equal before and after a case.

use crate::wait;
use anyhow::{bail, Context, Result};
use dom0::{memory, xen};
use std::fs;
use std::time::Duration;

/// Directory of the module below /sys/module.
const MODULE: &str = "/sys/module/xen_blkback_rs";

/// One reading of the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaks {
    kernel: KernelCounters,
    /// Grants that dom0 has mapped, by Xen's own count.
    grants: u64,
    available_kib: u64,
}

/// Counters of the kernel; cheap to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct KernelCounters {
    threads: usize,
    interrupts: usize,
    users: u64,
    devices: usize,
}

impl KernelCounters {
    fn now() -> Result<KernelCounters> {
        let interrupts = fs::read_to_string("/proc/interrupts").context("/proc/interrupts")?;
        let users = fs::read_to_string(format!("{MODULE}/refcnt"))
            .with_context(|| format!("{MODULE} is missing: modprobe xen-blkback-rs"))?;
        Ok(KernelCounters {
            threads: queue_threads()?,
            interrupts: interrupts
                .lines()
                .filter(|line| line.ends_with("blkif-backend"))
                .count(),
            users: users.trim().parse().context("refcnt is a number")?,
            devices: fs::read_dir("/sys/bus/xen-backend/devices")?.count(),
        })
    }
}

impl Leaks {
    /// Reads the counters.
    pub(crate) fn now() -> Result<Leaks> {
        Ok(Leaks {
            kernel: KernelCounters::now()?,
            grants: xen::mapped_grants()?,
            available_kib: memory::field("MemAvailable:")?,
        })
    }

    /// Waits until the counters are equal again, because threads may end a little later.
    pub(crate) fn wait_same(self, limit: Duration) -> Result<()> {
        // Not an error yet, because all leaks are to be reported at once.
        let _differs = wait::until("the end of all that a case made", limit, || {
            Ok((KernelCounters::now()? == self.kernel).then_some(()))
        });
        let mut left = self.differences(&Leaks::now()?);
        if !left.is_empty() {
            // Memory and grants may be released a little later than the threads end.
            let _differs = wait::until("the return of what a case took", limit, || {
                left = self.differences(&Leaks::now()?);
                Ok(left.is_empty().then_some(()))
            });
        }
        if !left.is_empty() {
            bail!("left behind: {}", left.join("; "));
        }
        Ok(())
    }

    fn differences(&self, now: &Leaks) -> Vec<String> {
        let (before, after) = (self.kernel, now.kernel);
        let counted = [
            (
                "threads of queues",
                before.threads as u64,
                after.threads as u64,
            ),
            (
                "event channels",
                before.interrupts as u64,
                after.interrupts as u64,
            ),
            ("users of the module", before.users, after.users),
            (
                "backend devices",
                before.devices as u64,
                after.devices as u64,
            ),
            ("mapped grants", self.grants, now.grants),
        ];
        let changed = counted.iter().filter(|(_, before, after)| before != after);
        let mut left: Vec<String> = changed
            .map(|(what, before, after)| format!("{what}: {before} before, {after} now"))
            .collect();
        let lost = self.available_kib.saturating_sub(now.available_kib);
        if lost > memory::SLACK_KIB {
            left.push(format!("{lost} KiB less memory available"));
        }
        left
    }
}

/// Counts the threads with the name of one of the driver's queues.
fn queue_threads() -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        // A process may end between the listing and the read.
        if let Ok(name) = fs::read_to_string(entry?.path().join("comm")) {
            count += usize::from(name.contains(".hostile"));
        }
    }
    Ok(count)
}
