// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Storage behind a tap disk that the kernel may use, and what a process says of it.

use super::node::call;
use super::scene::Scene;
use super::server::Store;
use super::{control, Node, TapDisk, SECTORS};
use crate::disk::Disk;
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

/// So many sectors of the disk are at the same place in the first backing.
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

/// What was said of a range is not true any longer.
pub(crate) fn recall(sector: u64, sectors: u64) -> MapOp {
    MapOp {
        op: MAP_RECALL,
        sector,
        sectors,
        ..MapOp::default()
    }
}

/// Flushes are for the kernel.
pub(crate) fn flush() -> MapOp {
    MapOp {
        op: MAP_FLUSH,
        ..MapOp::default()
    }
}

impl Node {
    /// Changes mappings, and learns how they are.
    pub(crate) fn maps(&self, ops: &[MapOp]) -> io::Result<Maps> {
        change(&self.file, ops)
    }
}

/// The same through any descriptor of a node.
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

/// How the mappings of a disk serve it.
pub(crate) fn mapped(disk: &TapDisk) -> Result<Mapped> {
    let mut mapped = Mapped {
        minor: disk.minor,
        ..Mapped::default()
    };
    call(&control()?, ioctl::MAPPED, &mut mapped)
        .context("the kernel tells nothing of mappings")?;
    Ok(mapped)
}

/// So much of the disk is the kernel's, if it takes that; nothing else is.
pub(crate) fn map(node: &Node, sectors: u64, is_taken: bool) -> Result<()> {
    let before = node.maps(&[recall(0, u64::MAX)])?;
    let maps = node.maps(&[set(0, sectors, before.generation), flush()])?;
    let refused = maps.refused - before.refused;
    ensure!(
        refused == u64::from(!is_taken),
        "{refused} refused of {sectors} sectors: {maps:?}"
    );
    Ok(())
}

/// A disk whose kernel has this storage, open as `file`, of which nothing is mapped.
pub(crate) fn scene_on(lab: &Lab, file: &File, path: &Path) -> Result<Scene> {
    let disk = TapDisk::make()?;
    add(&disk, 0, file, true)?;
    let (node, store) = (disk.start()?, Store::on(path)?);
    let session = lab.session_on_tap(&disk, PLAIN)?;
    Ok(Scene {
        session,
        store,
        node,
        disk,
    })
}

/// Takes a device or a file away, however often that must be asked for, and gives it again.
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

/// Gives a disk storage, as a supervisor does.
pub(crate) fn add(disk: &TapDisk, number: u32, file: &File, writable: bool) -> io::Result<()> {
    let flags = if writable { BACKING_WRITE } else { 0 };
    add_fd(disk.minor, number, file.as_raw_fd(), flags)
}

/// The same, of any descriptor.
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

/// Takes it away.
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
pub(crate) struct Backed {
    pub(crate) scene: Scene,
    sectors: u64,
}

impl Backed {
    pub(crate) fn new(lab: &Lab) -> Result<Backed> {
        Backed::on(lab, &lab.disk)
    }

    /// The same with another device.
    pub(crate) fn on(lab: &Lab, device: &Disk) -> Result<Backed> {
        Backed::by(lab, device, &device.open()?)
    }

    /// The same: the kernel reaches the device by this file.
    pub(crate) fn by(lab: &Lab, device: &Disk, file: &File) -> Result<Backed> {
        Ok(Backed {
            scene: scene_on(lab, file, device.path())?,
            sectors: device.sectors,
        })
    }

    /// Sectors of the backing.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// All of the disk is the kernel's.
    pub(crate) fn map_all(&self) -> Result<()> {
        map(&self.scene.node, SECTORS, true)
    }

    /// Right data with all of the disk mapped, then everything is taken apart.
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
