// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Udev, which opens disks for a moment when they come, and holds memory for what it has still to hear.

use anyhow::{bail, Context, Result};
use std::process::Command;

/// Seconds that it may take (emulation is slow).
const LIMIT: &str = "300";
/// Times that it is asked.
const ASKED: usize = 3;

/// Waits until udev has done what it was told of. Its daemon hangs up now and then instead of answering,
/// which says nothing: it is asked again.
///
/// # Errors
/// It has not settled in five minutes, or its program is not there.
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
