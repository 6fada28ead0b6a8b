// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Storage behind a tap disk that the kernel may use, and the mappings of its process.

use super::node::call;
use super::scene::TapScene;
use super::server::DiskData;
use super::{control, TapDisk, TapNode, SECTORS};
use crate::disk::BackingDevice;
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::PLAIN;
use crate::wait::until;
use anyhow::{ensure, Context, Result};
use ring::tap::abi::{
    ioctl, BackingAdd, BackingRemove, Buffer, MapOp, Mapped, Maps, BACKING_WRITE, MAP_FLUSH,
    MAP_READ, MAP_RECALL, MAP_SET, MAP_WRITE,
};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

/// Maps sectors of the disk to equal places in the first backing.
pub(crate) fn set(sector: u64, sectors: u64, generation: u32) -> MapOp {
    MapOp {
        op: MAP_SET,
        flags: MAP_READ | MAP_WRITE,
        generation,
        sector,
        sectors,
        offset: sector.wrapping_mul(512),
        ..MapOp::default()
    }
}

/// Withdraws the mapping of a range.
pub(crate) fn recall(sector: u64, sectors: u64) -> MapOp {
    MapOp {
        op: MAP_RECALL,
        sector,
        sectors,
        ..MapOp::default()
    }
}

/// Lets the kernel execute flushes.
pub(crate) fn flush() -> MapOp {
    MapOp {
        op: MAP_FLUSH,
        ..MapOp::default()
    }
}

impl TapNode {
    /// Changes mappings, and returns their state.
    pub(crate) fn maps(&self, ops: &[MapOp]) -> io::Result<Maps> {
        change(&self.file, ops)
    }
}

/// Changes mappings through any descriptor of a node.
pub(crate) fn change(node: &File, ops: &[MapOp]) -> io::Result<Maps> {
    let mut maps = Maps {
        ops: Buffer {
            addr: ops.as_ptr().addr() as u64,
            len: ops.len() as u32,
            ..Buffer::default()
        },
        ..Maps::default()
    };
    call(node, ioctl::MAP, &mut maps)?;
    Ok(maps)
}

/// Returns the statistics of a disk's mappings.
pub(crate) fn mapped(disk: &TapDisk) -> Result<Mapped> {
    let mut mapped = Mapped {
        minor: disk.minor,
        ..Mapped::default()
    };
    call(&control()?, ioctl::MAPPED, &mut mapped)
        .context("the kernel tells nothing of mappings")?;
    Ok(mapped)
}

/// Maps the first `sectors` sectors of the disk, and nothing else, and checks whether the kernel takes the mapping.
pub(crate) fn map(node: &TapNode, sectors: u64, is_taken: bool) -> Result<()> {
    let before = node.maps(&[recall(0, u64::MAX)])?;
    let maps = node.maps(&[set(0, sectors, before.generation), flush()])?;
    let refused = maps.refused - before.refused;
    ensure!(
        refused == u64::from(!is_taken),
        "{refused} refused of {sectors} sectors: {maps:?}"
    );
    Ok(())
}

/// Returns a disk with this storage, open as `file`, as its backing and no mapping.
pub(crate) fn scene_on(lab: &Lab, file: &File, path: &Path) -> Result<TapScene> {
    let disk = TapDisk::make()?;
    add(&disk, 0, file, true)?;
    let (node, store) = (disk.start()?, DiskData::on(path)?);
    let session = lab.session_on_tap(&disk, PLAIN)?;
    Ok(TapScene {
        session,
        store,
        node,
        disk,
    })
}

/// Removes a backing, retrying for as long as it is busy, and adds it again.
pub(crate) fn give_again(disk: &TapDisk, file: &File) -> Result<()> {
    until("the end of the kernel's I/O", ANSWER, || {
        match remove(disk, 0) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(None),
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            Ok(()) | Err(_) => Ok(Some(())),
        }
    })?;
    Ok(add(disk, 0, file, true)?)
}

/// Adds a backing, as a supervisor does.
pub(crate) fn add(disk: &TapDisk, number: u32, file: &File, writable: bool) -> io::Result<()> {
    let flags = if writable { BACKING_WRITE } else { 0 };
    add_fd(disk.minor, number, file.as_raw_fd(), flags)
}

/// Adds a backing by any descriptor.
pub(crate) fn add_fd(minor: u32, number: u32, fd: RawFd, flags: u32) -> io::Result<()> {
    let mut argument = BackingAdd {
        minor,
        number,
        fd,
        flags,
        ..BackingAdd::default()
    };
    let control = control().map_err(io::Error::other)?;
    call(&control, ioctl::BACKING_ADD, &mut argument).map(drop)
}

/// Removes a backing.
pub(crate) fn remove(disk: &TapDisk, number: u32) -> io::Result<()> {
    let mut argument = BackingRemove {
        minor: disk.minor,
        number,
        ..BackingRemove::default()
    };
    let control = control().map_err(io::Error::other)?;
    call(&control, ioctl::BACKING_REMOVE, &mut argument).map(drop)
}

/// A disk with a backing, its process in this program, which serves it from the same storage, and a frontend.
pub(crate) struct BackedDisk {
    pub(crate) scene: TapScene,
    sectors: u64,
}

impl BackedDisk {
    pub(crate) fn new(lab: &Lab) -> Result<BackedDisk> {
        BackedDisk::on(lab, &lab.disk)
    }

    /// Returns such a disk with `device` as its backing.
    pub(crate) fn on(lab: &Lab, device: &BackingDevice) -> Result<BackedDisk> {
        BackedDisk::by(lab, device, &device.open()?)
    }

    /// Returns such a disk whose kernel uses the device through this file.
    pub(crate) fn by(lab: &Lab, device: &BackingDevice, file: &File) -> Result<BackedDisk> {
        Ok(BackedDisk {
            scene: scene_on(lab, file, device.path())?,
            sectors: device.sectors,
        })
    }

    /// Returns the number of sectors of the backing.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Maps all of the disk.
    pub(crate) fn map_all(&self) -> Result<()> {
        map(&self.scene.node, SECTORS, true)
    }

    /// Checks the data with all of the disk mapped, then tears everything down.
    pub(crate) fn finish(self) -> Result<()> {
        self.map_all()?;
        let before = self.scene.disk.info()?.direct;
        let mut scene = self.scene;
        scene.session.exercise(0, 0xd1)?;
        let after = scene.disk.info()?.direct;
        anyhow::ensure!(after > before, "the kernel has executed nothing: {after}");
        scene.finish()
    }
}
