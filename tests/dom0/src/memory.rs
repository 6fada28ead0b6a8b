// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The memory of dom0.

use anyhow::{Context, Result};

/// Free memory may vary by this much for reasons unrelated to the driver.
pub const SLACK_KIB: u64 = 24 * 1024;

/// Returns a field of /proc/meminfo, such as `MemAvailable:`, in KiB.
pub fn field(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|rest| rest.split_whitespace().next());
    word.with_context(|| format!("/proc/meminfo has no {name}"))?
        .parse()
        .context("/proc/meminfo holds no number")
}
