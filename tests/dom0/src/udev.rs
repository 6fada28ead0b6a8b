// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Udev, which opens new disks for a moment, and holds memory for pending events.

use anyhow::{bail, Context, Result};
use std::process::Command;

/// Time limit in seconds (emulation is slow).
const LIMIT: &str = "300";
/// Number of attempts.
const ASKED: usize = 3;

/// Waits until udev has handled all events. Its daemon sometimes closes the connection without an answer; the function
/// then tries again.
///
/// # Errors Udev has not settled in five minutes, or its program does not exist.
pub fn settle() -> Result<()> {
    let mut said = String::new();
    for _ in 0..ASKED {
        let output = Command::new("timeout")
            .args(["-k", "5", LIMIT, "udevadm", "settle"])
            .output()
            .context("cannot start `udevadm settle`: is udev installed in dom0?")?;
        if output.status.success() {
            return Ok(());
        }
        said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if !said.contains("Broken pipe") {
            bail!("`udevadm settle` failed ({}): {said}", output.status);
        }
    }
    bail!("`udevadm settle` failed {ASKED} times: {said}")
}
