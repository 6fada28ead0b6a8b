// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Creation, inspection and removal of tap disks, as the supervisor does them.

use super::node::{call, TapNode};
use crate::wait;
use anyhow::{Context, Result};
use ring::tap::abi::{self, ioctl, CreateCommand, Destroy, Info};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

const CONTROL: &str = "/dev/xentap/control";

/// Sectors of the disks of the attacks: 16 MiB.
pub(crate) const SECTORS: u64 = 16 << 11;
/// Size of their arenas.
const ARENA_KIB: u32 = 2 << 10;

/// A tap disk. Dropping it destroys it, if its users close it in time.
pub(crate) struct TapDisk {
    pub(crate) minor: u32,
    gone: bool,
}

/// Opens the control node.
pub(crate) fn control() -> Result<File> {
    let file = File::options().read(true).write(true).open(CONTROL);
    file.with_context(|| format!("cannot open {CONTROL}: modprobe xen-blkback-rs"))
}

/// Queries the control node for the first disk from `minor` on.
pub(crate) fn query(minor: u32) -> Result<io::Result<Info>> {
    let mut info = Info {
        minor,
        ..Info::default()
    };
    let result = call(&control()?, ioctl::QUERY, &mut info);
    Ok(result.map(|_| info))
}

impl TapDisk {
    /// Makes a disk that holds requests for ever while no process serves it.
    pub(crate) fn make() -> Result<TapDisk> {
        TapDisk::make_as(0)
    }

    /// Makes a disk that fails requests after this number of seconds without a process.
    pub(crate) fn make_as(fail_after_s: u32) -> Result<TapDisk> {
        TapDisk::ready(TapDisk::try_make(u32::MAX, fail_after_s)?)
    }

    /// Makes a disk that fails a request after this number of deaths at it.
    pub(crate) fn make_judging(max_deaths: u32) -> Result<TapDisk> {
        TapDisk::ready(TapDisk::try_make_of(CreateCommand {
            minor: u32::MAX,
            max_deaths,
            ..CreateCommand::default()
        })?)
    }

    fn ready(made: io::Result<TapDisk>) -> Result<TapDisk> {
        let disk = made.context("a tap disk cannot be made")?;
        let path = disk.path();
        wait::until("the node of a tap disk", Duration::from_secs(10), || {
            Ok(path.exists().then_some(()))
        })?;
        Ok(disk)
    }

    /// Tries to make the disk of a number.
    pub(crate) fn try_make(minor: u32, fail_after_s: u32) -> Result<io::Result<TapDisk>> {
        TapDisk::try_make_of(CreateCommand {
            minor,
            fail_after_s,
            ..CreateCommand::default()
        })
    }

    fn try_make_of(create: CreateCommand) -> Result<io::Result<TapDisk>> {
        let mut create = CreateCommand {
            version: abi::VERSION,
            arena_kib: ARENA_KIB,
            ..create
        };
        let made = call(&control()?, ioctl::CREATE, &mut create);
        Ok(made.map(|_| TapDisk::adopt(create.minor)))
    }

    /// Returns the existing disk of this number.
    pub(crate) fn adopt(minor: u32) -> TapDisk {
        TapDisk { minor, gone: false }
    }

    /// Returns the path of its node.
    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/dev/xentap").join(self.minor.to_string())
    }

    /// Returns the key that names it to the backend.
    pub(crate) fn key(&self) -> (&'static str, String) {
        ("tap-minor", self.minor.to_string())
    }

    /// Opens its node.
    pub(crate) fn open(&self) -> Result<TapNode> {
        let node = TapNode::open(&self.path());
        node.with_context(|| format!("{} cannot be opened", self.path().display()))
    }

    /// Opens, describes and starts it.
    pub(crate) fn start(&self) -> Result<TapNode> {
        let node = self.open()?;
        node.describe(SECTORS, abi::GEOMETRY_WRITE_CACHE)
            .context("an honest description is refused")?;
        node.start().context("an honest start is refused")?;
        Ok(node)
    }

    /// Returns its current state.
    pub(crate) fn info(&self) -> Result<Info> {
        let info = query(self.minor)?.context("a disk cannot be queried")?;
        anyhow::ensure!(info.minor == self.minor, "the disk is gone");
        Ok(info)
    }

    /// Waits until its state is as wanted.
    pub(crate) fn wait(&self, what: &str, wanted: impl Fn(&Info) -> bool) -> Result<Info> {
        let mut last = None;
        let found = wait::until(what, Duration::from_secs(20), || {
            last = Some(self.info()?);
            Ok(last.filter(|info| wanted(info)))
        });
        found.with_context(|| format!("last it was {last:?}"))
    }

    /// Tries to destroy it.
    pub(crate) fn try_destroy(&self) -> Result<io::Result<i32>> {
        let mut destroy = Destroy {
            minor: self.minor,
            flags: 0,
        };
        Ok(call(&control()?, ioctl::DESTROY, &mut destroy))
    }

    /// Destroys it.
    pub(crate) fn destroy(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        self.gone = true;
        wait::until("the end of a tap disk", Duration::from_secs(20), || {
            Ok(self.try_destroy()?.ok())
        })
        .with_context(|| format!("tap disk {}", self.minor))
        .map(drop)
    }
}

/// Makes a disk, starts it, and closes it without destroying it.
pub(crate) fn leave() -> Result<()> {
    let mut disk = TapDisk::make()?;
    drop(disk.start()?);
    disk.gone = true;
    Ok(())
}

impl Drop for TapDisk {
    fn drop(&mut self) {
        if !self.gone {
            if let Err(error) = self.remove() {
                eprintln!("hostile: cannot remove tap disk {}: {error:#}", self.minor);
            }
        }
    }
}
