// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A hotplug script for xl that is this program: it does what Xen's own `block` script does for a block device, without
//! the sharing checks, in one process instead of dozens. Cases that are not about the script itself use it, because
//! processes are slow in emulation. It also attaches tap disks that a case serves itself, without the supervisor.

use crate::guest::RUN_DIR;
use crate::xs;
use anyhow::{bail, Context, Result};
use std::os::unix::fs::{symlink, FileTypeExt, MetadataExt};
use std::path::Path;

/// The name under which this program is the script.
pub(crate) const NAME: &str = "block-vmtest";

/// Prefix of a target that is the number of a tap disk.
const MINOR: &str = "minor:";

/// Makes the script and returns its path.
fn install() -> Result<String> {
    std::fs::create_dir_all(RUN_DIR)
        .context("cannot create the directory for the hotplug script")?;
    let path = format!("{RUN_DIR}/{NAME}");
    if !Path::new(&path).exists() {
        let program = std::env::current_exe().context("cannot find this program")?;
        symlink(program, &path).with_context(|| format!("cannot make {path}"))?;
    }
    Ok(path)
}

/// A disk in xl's syntax that is attached with this script.
pub(crate) fn disk(device: &str, vdev: &str, access: &str) -> Result<String> {
    Ok(format!(
        "format=raw, vdev={vdev}, access={access}, script={}, target={device}",
        install()?
    ))
}

/// A tap disk of a case's own, in xl's syntax.
pub(crate) fn played(minor: u32, vdev: &str) -> Result<String> {
    disk(&format!("{MINOR}{minor}"), vdev, "w")
}

/// Script that xl calls: `add` or `remove`, with the backend's directory in the environment.
pub(crate) fn main() -> Result<()> {
    let action = std::env::args().nth(1).unwrap_or_default();
    if action != "add" {
        return Ok(());
    }
    let backend =
        std::env::var("XENBUS_PATH").context("XENBUS_PATH is not set: xl calls this script")?;
    let device = xs::must_read(&format!("{backend}/params"))?;
    if let Some(minor) = device.strip_prefix(MINOR) {
        return xs::write(&[
            (&format!("{backend}/tap-minor"), minor),
            (&format!("{backend}/hotplug-status"), "connected"),
        ]);
    }
    let data = std::fs::metadata(&device).with_context(|| format!("cannot find {device}"))?;
    if !data.file_type().is_block_device() {
        bail!("{device} is no block device");
    }
    let numbers = format!(
        "{:x}:{:x}",
        libc::major(data.rdev()),
        libc::minor(data.rdev())
    );
    xs::write(&[
        (&format!("{backend}/physical-device"), &numbers),
        (&format!("{backend}/hotplug-status"), "connected"),
    ])
}
