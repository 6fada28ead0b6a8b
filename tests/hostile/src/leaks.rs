// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Counters that must read the same before and after a case.

use crate::wait;
use anyhow::{bail, Context, Result};
use std::fs;
use std::time::Duration;

/// The module as it is called below /sys/module.
const MODULE: &str = "/sys/module/xen_blkback_rs";

/// One reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaks {
    threads: usize,
    interrupts: usize,
    users: u64,
    devices: usize,
}

impl Leaks {
    /// Reads the counters.
    pub(crate) fn now() -> Result<Leaks> {
        let interrupts = fs::read_to_string("/proc/interrupts").context("/proc/interrupts")?;
        let users = fs::read_to_string(format!("{MODULE}/refcnt"))
            .with_context(|| format!("{MODULE} is missing: modprobe xen-blkback-rs"))?;
        Ok(Leaks {
            threads: queue_threads()?,
            interrupts: interrupts
                .lines()
                .filter(|line| line.ends_with("blkif-backend"))
                .count(),
            users: users.trim().parse().context("refcnt is a number")?,
            devices: fs::read_dir("/sys/bus/xen-backend/devices")?.count(),
        })
    }

    /// Waits until the counters read the same again: threads may end a little later.
    pub(crate) fn wait_same(self, limit: Duration) -> Result<()> {
        let mut now = self;
        let same = wait::until("the end of all that a case made", limit, || {
            now = Leaks::now()?;
            Ok((now == self).then_some(()))
        });
        if same.is_err() {
            bail!("left behind: {self:?} before, {now:?} now");
        }
        Ok(())
    }
}

/// Threads whose name is that of a queue of ours.
fn queue_threads() -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        // A process may end between the listing and the look.
        if let Ok(name) = fs::read_to_string(entry?.path().join("comm")) {
            count += usize::from(name.contains(".hostile"));
        }
    }
    Ok(count)
}
