// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Block devices of dom0 for disks to stand on.

use crate::sh;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const CONFIGFS: &str = "/sys/kernel/config";
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A null_blk device that keeps its data in memory.
#[derive(Clone)]
pub(crate) struct NullBlk {
    dir: PathBuf,
    name: String,
}

impl NullBlk {
    /// Creates a device of `size_mib` MiB; `options` are more attributes of null_blk.
    pub(crate) fn create(size_mib: u32, options: &[(&str, &str)]) -> Result<NullBlk> {
        prepare()?;
        let dir = Path::new(CONFIGFS)
            .join("nullb")
            .join(format!("vmtest{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let size = size_mib.to_string();
        let fixed = [("size", size.as_str()), ("memory_backed", "1")];
        for (key, value) in fixed.iter().chain(options).chain(&[("power", "1")]) {
            sh::put(dir.join(key), value)?;
        }
        // Since Linux 6.11 the disk bears the name of the directory, before that nullbN.
        let given = dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let numbered = format!("nullb{}", sh::get(dir.join("index"))?);
        let found = [given, numbered]
            .into_iter()
            .find(|name| Path::new("/sys/block").join(name).exists());
        let device = NullBlk {
            name: found.context("null_blk made no disk")?,
            dir,
        };
        sh::wait_for(
            "the device node of null_blk",
            Duration::from_secs(20),
            || Ok(Path::new(&device.path()).exists()),
        )?;
        Ok(device)
    }

    /// The device node.
    pub(crate) fn path(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// Its number as control groups write it, `MAJOR:MINOR`.
    pub(crate) fn number(&self) -> Result<String> {
        sh::get(format!("/sys/block/{}/dev", self.name))
    }

    /// The kernel's name of the disk.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Sets an attribute of a running device, such as `badblocks`.
    pub(crate) fn set(&self, key: &str, value: &str) -> Result<()> {
        sh::put(self.dir.join(key), value)
    }

    /// Flushes that reached the device.
    pub(crate) fn flushes(&self) -> Result<u64> {
        let text = sh::get(format!("/sys/block/{}/stat", self.name))?;
        let field = text
            .split_whitespace()
            .nth(15)
            .context("the kernel counts no flushes")?;
        field
            .parse()
            .context("the kernel's flush counter is no number")
    }

    /// Removes the device.
    pub(crate) fn remove(&self) -> Result<()> {
        sh::put(self.dir.join("power"), "0")?;
        std::fs::remove_dir(&self.dir)
            .with_context(|| format!("cannot remove {}", self.dir.display()))
    }
}

fn prepare() -> Result<()> {
    sh::modprobe("null_blk", &["nr_devices=0"])?;
    if !Path::new(CONFIGFS).join("nullb").exists() {
        sh::run(&["mount", "-t", "configfs", "none", CONFIGFS])?;
    }
    Ok(())
}

/// The sha256 of the first bytes of a device, read past dom0's page cache.
pub(crate) fn sha256(device: &str, mib: u32) -> Result<String> {
    let line = format!(
        "set -o pipefail; dd if={device} bs=1M count={mib} iflag=direct status=none | sha256sum"
    );
    let text = sh::run_for(&["bash", "-c", &line], Duration::from_secs(120))?;
    Ok(text
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

/// The table of a device that is the first sectors (of 512 bytes) of `below`.
pub(crate) fn linear(below: &str, sectors: u64) -> String {
    format!("0 {sectors} linear {below} 0")
}

/// Returns the table of a device that takes that many milliseconds for each write, and reads at once.
pub(crate) fn slow_writes(below: &str, sectors: u64, milliseconds: u32) -> Result<String> {
    sh::modprobe("dm-delay", &[])?;
    Ok(format!(
        "0 {sectors} delay {below} 0 0 {below} 0 {milliseconds}"
    ))
}

/// Returns the table of a device that takes that many milliseconds for each request.
pub(crate) fn delayed(below: &str, sectors: u64, milliseconds: u32) -> Result<String> {
    sh::modprobe("dm-delay", &[])?;
    Ok(format!("0 {sectors} delay {below} 0 {milliseconds}"))
}

/// Returns the table of a device that refuses writes and flushes.
pub(crate) fn unwritable(below: &str, sectors: u64) -> Result<String> {
    sh::modprobe("dm-flakey", &[])?;
    // The device works for zero seconds, and fails for an hour.
    Ok(format!(
        "0 {sectors} flakey {below} 0 0 3600 1 error_writes"
    ))
}

/// A device mapper device.
#[derive(Clone)]
pub(crate) struct Dm {
    name: String,
}

impl Dm {
    /// Creates a device from a table (lines of `start length target arguments`).
    pub(crate) fn create(name: &str, table: &str) -> Result<Dm> {
        sh::run(&["dmsetup", "create", name, "--table", table])?;
        let device = Dm {
            name: name.to_owned(),
        };
        sh::wait_for(
            "the device node of device mapper",
            Duration::from_secs(20),
            || Ok(Path::new(&device.path()).exists()),
        )?;
        Ok(device)
    }

    /// The device node.
    pub(crate) fn path(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }

    /// Stops the device: requests wait until it is resumed. Nothing is flushed.
    pub(crate) fn suspend(&self) -> Result<()> {
        sh::run(&["dmsetup", "suspend", "--noflush", "--nolockfs", &self.name]).map(drop)
    }

    /// Resumes the device.
    pub(crate) fn resume(&self) -> Result<()> {
        sh::run(&["dmsetup", "resume", &self.name]).map(drop)
    }

    /// Replaces the table of the running device.
    pub(crate) fn replace(&self, table: &str) -> Result<()> {
        self.suspend()?;
        sh::run(&["dmsetup", "load", &self.name, "--table", table])?;
        self.resume()
    }

    /// Removes the device.
    pub(crate) fn remove(&self) -> Result<()> {
        sh::run(&["dmsetup", "remove", "--retry", &self.name]).map(drop)
    }
}

/// A device mapper device that holds every write, as slow storage does, until it is released. Reads pass.
///
/// A suspended device holds writes, too, but does not show that a write has arrived.
#[derive(Clone)]
pub(crate) struct HoldingDevice {
    device: Dm,
    /// The table without the delay.
    passing: String,
}

impl HoldingDevice {
    /// Creates the device over the first sectors (of 512 bytes) of `below`.
    pub(crate) fn create(name: &str, below: &str, sectors: u64) -> Result<HoldingDevice> {
        // Milliseconds; longer than any case.
        const LONG: u32 = 3_600_000;
        sh::modprobe("dm-delay", &[])?;
        let table = format!("0 {sectors} delay {below} 0 0 {below} 0 {LONG}");
        Ok(HoldingDevice {
            device: Dm::create(name, &table)?,
            passing: linear(below, sectors),
        })
    }

    /// The device node.
    pub(crate) fn path(&self) -> String {
        self.device.path()
    }

    /// Waits until the device holds exactly one write.
    pub(crate) fn wait_write(&self) -> Result<()> {
        sh::wait_for("a write at the device", Duration::from_secs(30), || {
            // "0 SECTORS delay READS WRITES FLUSHES", those that it holds.
            let status = sh::run(&["dmsetup", "status", &self.device.name])?;
            Ok(status.split_whitespace().nth(4) == Some("1"))
        })
    }

    /// Waits until the device holds at least `count` writes.
    pub(crate) fn wait_writes(&self, count: u32) -> Result<()> {
        sh::wait_for("writes at the device", Duration::from_secs(30), || {
            let status = sh::run(&["dmsetup", "status", &self.device.name])?;
            let held = status.split_whitespace().nth(4);
            Ok(held.and_then(|held| held.parse().ok()).unwrap_or(0_u32) >= count)
        })
    }

    /// Passes on the writes it has and those that come.
    pub(crate) fn let_go(&self) -> Result<()> {
        self.device.replace(&self.passing)
    }

    /// Removes the device; the writes it has are passed on.
    pub(crate) fn remove(&self) -> Result<()> {
        self.device.remove()
    }
}

/// LVM knows neither null_blk nor, without a daemon, what udev has seen.
const LVM: &str = "devices{types=[\"nullb\",16] filter=[\"a|/dev/vmtest.*|\",\"a|/dev/nullb.*|\",\"r|.*|\"] use_devicesfile=0}";

/// A logical volume on a device, in a volume group of its own.
#[derive(Clone)]
pub(crate) struct Lvm {
    group: String,
    physical: String,
}

impl Lvm {
    /// Makes the volume `lv` of `mib` MiB.
    pub(crate) fn create(group: &str, physical: &str, mib: u32) -> Result<Lvm> {
        lvm(&["pvcreate", "--yes", physical])?;
        lvm(&["vgcreate", group, physical])?;
        lvm(&[
            "lvcreate",
            "-n",
            "lv",
            "-L",
            &format!("{mib}M"),
            "-y",
            "-Wn",
            "-Zn",
            group,
        ])?;
        let volume = Lvm {
            group: group.to_owned(),
            physical: physical.to_owned(),
        };
        sh::wait_for(
            "the device node of the volume",
            Duration::from_secs(20),
            || Ok(Path::new(&volume.path()).exists()),
        )?;
        Ok(volume)
    }

    /// The device node.
    pub(crate) fn path(&self) -> String {
        format!("/dev/{}/lv", self.group)
    }

    /// Grows the volume to `mib` MiB.
    pub(crate) fn extend(&self, mib: u32) -> Result<()> {
        lvm(&[
            "lvextend",
            "-L",
            &format!("{mib}M"),
            &format!("{}/lv", self.group),
        ])
    }

    /// Removes the volume and its group.
    pub(crate) fn remove(&self) -> Result<()> {
        sh::wait_for(
            "the end of every user of the volume",
            Duration::from_secs(20),
            || Ok(lvm(&["lvchange", "-an", &format!("{}/lv", self.group)]).is_ok()),
        )?;
        lvm(&["vgremove", "-f", &self.group])?;
        lvm(&["pvremove", &self.physical])
    }
}

fn lvm(argv: &[&str]) -> Result<()> {
    let mut all = vec!["lvm"];
    all.extend(argv);
    all.extend(["--config", LVM]);
    sh::run(&all).map(drop)
}
