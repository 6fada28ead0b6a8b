// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A file system for the duration of an attack.

use crate::disk::{run, BackingDevice};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

const MOUNT: &str = "/run/hostile-files";

/// An ext4 file system on a disk. Dropping it unmounts it.
pub(crate) struct Filesystem {
    mounted: bool,
}

impl Filesystem {
    /// Makes and mounts one; fails if another program has the disk open exclusively.
    pub(crate) fn make(disk: &BackingDevice) -> Result<Filesystem> {
        let device = disk.path().to_string_lossy();
        // The disk keeps the memory that it has: a discard would free it, and later writes would look like a leak.
        run(&[
            "mkfs.ext4",
            "-q",
            "-F",
            "-b",
            "4096",
            "-E",
            "nodiscard",
            &device,
        ])?;
        fs::create_dir_all(MOUNT).with_context(|| format!("cannot make {MOUNT}"))?;
        run(&["mount", "-t", "ext4", &device, MOUNT])?;
        Ok(Filesystem { mounted: true })
    }

    /// Returns the path of a file in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        Path::new(MOUNT).join(name)
    }

    /// Unmounts it. No file in it may be in use any more.
    pub(crate) fn unmount(mut self) -> Result<()> {
        self.mounted = false;
        run(&["umount", MOUNT])
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        if self.mounted {
            if let Err(error) = run(&["umount", MOUNT]) {
                eprintln!("hostile: cannot unmount {MOUNT}: {error:#}");
            }
        }
    }
}
