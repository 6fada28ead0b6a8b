// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks to offer: memory-backed null_blk devices made for this run, or a block device by path.

use crate::wait;
use anyhow::{bail, Context, Result};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const CONFIG: &str = "/sys/kernel/config/nullb";

/// A block device.
pub(crate) struct BackingDevice {
    device: PathBuf,
    /// Its directory in configfs, if this program made it.
    made: Option<PathBuf>,
    /// 512-byte sectors.
    pub(crate) sectors: u64,
}

/// Properties of a new disk.
pub(crate) struct DiskShape {
    /// Its name in configfs.
    pub(crate) name: &'static str,
    /// Bytes of a logical block.
    pub(crate) block: u32,
    /// Time that each I/O takes.
    pub(crate) latency: Duration,
}

impl BackingDevice {
    /// Makes a disk of 40 MiB, all written, that supports discard and has a volatile cache.
    pub(crate) fn make(shape: &DiskShape) -> Result<BackingDevice> {
        if !Path::new(CONFIG).exists() {
            run(&["modprobe", "null_blk", "nr_devices=0"])?;
        }
        if !Path::new(CONFIG).exists() {
            run(&["mount", "-t", "configfs", "configfs", "/sys/kernel/config"])?;
        }
        let dir = Path::new(CONFIG).join(shape.name);
        fs::create_dir(&dir)
            .with_context(|| format!("cannot make {}: rmdir what is left of it", dir.display()))?;
        let made = Some(dir.clone());
        let slow = !shape.latency.is_zero();
        let attributes: [(&str, u128); 8] = [
            ("size", 40),
            ("memory_backed", 1),
            ("discard", 1),
            ("blocksize", shape.block.into()),
            ("cache_size", 4),
            ("irqmode", if slow { 2 } else { 0 }),
            ("completion_nsec", shape.latency.as_nanos()),
            ("power", 1),
        ];
        for (name, value) in attributes {
            fs::write(dir.join(name), value.to_string())
                .with_context(|| format!("null_blk refuses {name}={value}"))?;
        }
        // Newer kernels name the device after the directory, older ones after a number.
        let index = fs::read_to_string(dir.join("index")).context("null_blk tells no index")?;
        let names = [shape.name.to_owned(), format!("nullb{}", index.trim())];
        let found = wait::until("the device of null_blk", Duration::from_secs(10), || {
            let paths = names.iter().map(|name| Path::new("/dev").join(name));
            Ok(paths.into_iter().find(|path| path.exists()))
        })?;
        let disk = BackingDevice::of(&found, made)?;
        disk.fill()?;
        Ok(disk)
    }

    /// Returns its node.
    pub(crate) fn path(&self) -> &Path {
        &self.device
    }

    /// Opens it for reading and writing.
    pub(crate) fn open(&self) -> Result<fs::File> {
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(&self.device);
        file.with_context(|| format!("cannot open {}", self.device.display()))
    }

    /// Writes all of it, so that it needs no more memory later.
    fn fill(&self) -> Result<()> {
        use std::io::Write;
        let mut file = fs::File::options().write(true).open(&self.device)?;
        let chunk = vec![0x5a; 1 << 20];
        for _ in 0..self.sectors * 512 / (1 << 20) {
            file.write_all(&chunk)
                .with_context(|| format!("cannot fill {}", self.device.display()))?;
        }
        file.sync_all().context("cannot fill a disk")
    }

    /// Returns an existing device.
    pub(crate) fn existing(device: &Path) -> Result<BackingDevice> {
        BackingDevice::of(device, None)
    }

    fn of(device: &Path, made: Option<PathBuf>) -> Result<BackingDevice> {
        let name = device.file_name().context("a device has a name")?;
        let size = Path::new("/sys/class/block").join(name).join("size");
        let text = fs::read_to_string(&size)
            .with_context(|| format!("{} is no block device", device.display()))?;
        let sectors = text.trim().parse().context("a size is a number")?;
        Ok(BackingDevice {
            device: device.to_owned(),
            made,
            sectors,
        })
    }

    /// Returns the key that names it to the backend: `MAJOR:MINOR` in hexadecimal.
    pub(crate) fn key(&self) -> Result<(&'static str, String)> {
        let number = fs::metadata(&self.device)?.rdev();
        let (major, minor) = (libc::major(number), libc::minor(number));
        Ok(("physical-device", format!("{major:x}:{minor:x}")))
    }
}

impl Drop for BackingDevice {
    fn drop(&mut self) {
        if let Some(dir) = &self.made {
            if let Err(error) = fs::remove_dir(dir) {
                eprintln!("hostile: cannot remove {}: {error}", dir.display());
            }
        }
    }
}

/// Runs a program in dom0; its failure is an error.
pub(crate) fn run(command: &[&str]) -> Result<()> {
    let status = Command::new(command[0]).args(&command[1..]).status();
    let status = status.with_context(|| format!("cannot run {}", command[0]))?;
    if !status.success() {
        bail!("`{}` failed ({status})", command.join(" "));
    }
    Ok(())
}
