// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Storage below the disks.

use crate::backends::DiskStore;
use crate::booted::SYSTEM_MIB;
use crate::jobs::Medium;
use crate::sample::MKFS;
use crate::snapshots::{self, CloneLayout};
use crate::{booted, images, sh};
use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Room for the file of bonnie++ and the file system.
const SIZE_MIB: u32 = 256;
/// Room for these, and for the tables of an image or the journal of a file system.
const IMAGE_MIB: u32 = SIZE_MIB + 128;
const SMALL_MIB: u32 = 8;
/// MiB of a disk that has clones: room for a small system and its file system. The rest of the device of images is for
/// writes to the clones, at least 30 MiB each for 8 clones, of which a boot needs about 10.
const GOLDEN_MIB: u32 = 64;
const NULL_BLK: &str = "/sys/kernel/config/nullb";
const FILE: &str = "/dev/shm/bench.img";
/// Mount point of a file system, and its file.
const MOUNT: &str = "/run/bench";
const MOUNTED: &str = "/run/bench/bench.img";
/// Backing file of an image there.
const BELOW: &str = "/run/bench/below.img";

/// The stores, fully written, because pages that were never written would be cheaper to read.
#[derive(Debug)]
pub(crate) struct Stores {
    memory: String,
    of_loop: Option<String>,
    image: Option<String>,
    small: Vec<String>,
    media: BTreeMap<Medium, Vec<String>>,
}

impl Stores {
    /// Makes the stores in `wanted`, and `small` small disks, the first `used` of them to be read; prepares clones if
    /// `cloned`; and makes these devices.
    pub(crate) fn create(
        wanted: &[DiskStore],
        small: u32,
        used: u32,
        cloned: bool,
        media: &BTreeMap<Medium, u32>,
    ) -> Result<Stores> {
        sh::run(&["modprobe", "null_blk", "nr_devices=0"])?;
        if !Path::new(NULL_BLK).exists() {
            sh::run(&["mount", "-t", "configfs", "none", "/sys/kernel/config"])?;
        }
        let memory = null_blk("bench", SIZE_MIB)?;
        fill(&memory, SIZE_MIB)?;
        let of_loop = if wanted.contains(&DiskStore::Loop) {
            Some(loop_device()?)
        } else {
            None
        };
        let needs_none = |store: &DiskStore| {
            matches!(
                store,
                DiskStore::Memory | DiskStore::Loop | DiskStore::Export
            )
        };
        if cloned {
            // Load it now, because the addresses of modules are read before a job begins.
            sh::run(&["modprobe", "dm-snapshot"])?;
        }
        let image = match cloned || !wanted.iter().all(needs_none) {
            true => Some(null_blk("image", IMAGE_MIB)?),
            false => None,
        };
        let small = (0..small).map(|index| {
            let disk = null_blk(&format!("small{index}"), SMALL_MIB)?;
            if index < used {
                fill(&disk, SMALL_MIB)?;
            }
            Ok(disk)
        });
        Ok(Stores {
            memory,
            of_loop,
            image,
            small: small.collect::<Result<_>>()?,
            media: media
                .iter()
                .map(|(medium, count)| {
                    let devices = (0..*count).map(|index| medium_device(*medium, index));
                    Ok((*medium, devices.collect::<Result<_>>()?))
                })
                .collect::<Result<_>>()?,
        })
    }

    /// Returns the nodes of `count` devices of this kind.
    pub(crate) fn media(&self, medium: Medium, count: u32) -> Result<&[String]> {
        let nodes = self.media.get(&medium);
        let nodes = nodes.and_then(|nodes| nodes.get(..count as usize));
        nodes.with_context(|| format!("there are no {count} devices {medium:?}"))
    }

    /// Returns the device node of a store, or its file.
    pub(crate) fn path(&self, store: DiskStore) -> &str {
        match store {
            DiskStore::Memory => &self.memory,
            DiskStore::Loop => self.of_loop.as_deref().unwrap_or("/dev/loop0"),
            DiskStore::Image(_) | DiskStore::New => self.image(),
            DiskStore::File(_)
            | DiskStore::FileOf(..)
            | DiskStore::Clone(_)
            | DiskStore::Sealed(_)
            | DiskStore::Chain(_) => MOUNTED,
            DiskStore::Export => images::EXPORT,
        }
    }

    /// Returns the block device that has images and clones.
    pub(crate) fn image(&self) -> &str {
        self.image.as_deref().unwrap_or("/dev/image")
    }

    /// Fills a store, before a guest uses it.
    pub(crate) fn prepare(&self, store: DiskStore) -> Result<()> {
        let image = self.image();
        images::end_server()?;
        match store {
            DiskStore::Memory | DiskStore::Loop => Ok(()),
            DiskStore::Export => images::serve(&self.memory),
            DiskStore::Image(format) => {
                release()?;
                images::convert(&self.memory, format, image)
            }
            DiskStore::FileOf(kind, format) => {
                mount(kind, image)?;
                images::convert(&self.memory, format, MOUNTED)
            }
            DiskStore::File(kind) => {
                mount(kind, image)?;
                copy(&self.memory, MOUNTED, SIZE_MIB)
            }
            DiskStore::Clone(kind) => {
                self.put_below(kind, SIZE_MIB)?;
                images::over(BELOW, "raw", MOUNTED)
            }
            DiskStore::New => {
                release()?;
                images::empty(image, SIZE_MIB)
            }
            DiskStore::Sealed(kind) => {
                mount(kind, image)?;
                images::seal(&self.memory, MOUNTED, SIZE_MIB)
            }
            DiskStore::Chain(kind) => {
                mount(kind, image)?;
                images::chain(BELOW, MOUNTED, SIZE_MIB)
            }
        }
    }

    /// Makes `count` clones of a disk with a system of `files` MiB, all on the device of images: new images over one
    /// file, or snapshots of one volume.
    pub(crate) fn clones(&self, store: DiskStore, count: u32, files: u32) -> Result<Vec<String>> {
        release()?;
        images::end_server()?;
        booted::put_system(&self.memory, files, GOLDEN_MIB)?;
        if let DiskStore::Clone(kind) = store {
            self.put_below(kind, GOLDEN_MIB)?;
            let clones = (0..count).map(|index| {
                let clone = format!("{MOUNT}/clone{index}.img");
                images::over(BELOW, "raw", &clone)?;
                Ok(clone)
            });
            return clones.collect();
        }
        copy(&self.memory, self.image(), GOLDEN_MIB)?;
        let layout = CloneLayout {
            count,
            golden: GOLDEN_MIB,
            all: IMAGE_MIB,
        };
        snapshots::create(self.image(), layout)
    }

    /// Makes a backing file from the first MiB of the disk. None of it stays in dom0's page cache, so that a cached
    /// read hits only after an earlier read of the measurement.
    fn put_below(&self, kind: &str, mib: u32) -> Result<()> {
        mount(kind, self.image())?;
        copy(&self.memory, BELOW, mib)?;
        sh::run(&["chmod", "a-w", BELOW])?;
        // This makes dd drop the file from the page cache.
        let from = format!("if={BELOW}");
        sh::run(&["dd", &from, "iflag=nocache", "count=0", "status=none"]).map(drop)
    }

    /// Puts a bootable system on the disk, and on all stores that are prepared after this.
    pub(crate) fn put_system(&self) -> Result<()> {
        release()?;
        booted::put_system(&self.memory, SYSTEM_MIB, SIZE_MIB)?;
        match &self.of_loop {
            Some(_) => copy(&self.memory, FILE, SIZE_MIB),
            None => Ok(()),
        }
    }

    /// Returns the device nodes of the small disks.
    pub(crate) fn small(&self) -> &[String] {
        &self.small
    }
}

/// Makes a block device in memory.
fn null_blk(name: &str, mib: u32) -> Result<String> {
    null_blk_with(name, mib, &[("memory_backed", "1")])
}

/// Makes a device without data; `index` tells those of one kind apart. The device and the disks on it have no scheduler.
fn medium_device(medium: Medium, index: u32) -> Result<String> {
    let (name, irqmode, nanoseconds) = match medium {
        Medium::AtOnce => (format!("bare-{index}"), "0", 0),
        // 2: by a timer, whose interrupt ends the request.
        Medium::Interrupt(microseconds) => (
            format!("irq{microseconds}-{index}"),
            "2",
            u64::from(microseconds) * 1000,
        ),
    };
    let nanoseconds = nanoseconds.to_string();
    let attributes = [("irqmode", irqmode), ("completion_nsec", &nanoseconds)];
    let node = null_blk_with(&name, SIZE_MIB, &attributes)?;
    let scheduler = Path::new("/sys/block").join(&name).join("queue/scheduler");
    sh::put(&scheduler, "none")?;
    let chosen = sh::get(&scheduler)?;
    ensure!(
        chosen.contains("[none]") || chosen.trim() == "none",
        "{node} has the scheduler {chosen}"
    );
    Ok(node)
}

/// Makes a device of null_blk with these attributes. Since Linux 6.11 it has the name of its directory.
fn null_blk_with(name: &str, mib: u32, attributes: &[(&str, &str)]) -> Result<String> {
    let dir = Path::new(NULL_BLK).join(name);
    std::fs::create_dir(&dir)?;
    sh::put(dir.join("size"), &mib.to_string())?;
    for (attribute, value) in attributes {
        sh::put(dir.join(attribute), value)?;
    }
    sh::put(dir.join("power"), "1")?;
    let node = format!("/dev/{name}");
    sh::wait_for("the device node of null_blk", || {
        Ok(Path::new(&node).exists())
    })?;
    Ok(node)
}

/// Unmounts and removes the remains of the previous store there.
fn release() -> Result<()> {
    sh::shell(&format!("! mountpoint -q {MOUNT} || umount {MOUNT}"))?;
    snapshots::remove()
}

/// Makes a file system on a device, and mounts it.
fn mount(kind: &str, device: &str) -> Result<()> {
    release()?;
    sh::run(&["wipefs", "--quiet", "--all", device])?;
    sh::shell(&match kind {
        "ext4" => format!("{MKFS} {device}"),
        _ => format!("mkfs.{kind} -q {device}"),
    })?;
    std::fs::create_dir_all(MOUNT)?;
    sh::run(&["mount", device, MOUNT]).map(drop)
}

/// Copies the first `mib` MiB of a disk to a file or device, which allocates all of it. Uses direct I/O, because dom0
/// would otherwise write it back during the measurement, and a direct writer would have to drop it from the cache
/// first.
fn copy(disk: &str, file: &str, mib: u32) -> Result<()> {
    let (from, to, count) = (
        format!("if={disk}"),
        format!("of={file}"),
        format!("count={mib}"),
    );
    let words = [
        "dd",
        &from,
        &to,
        &count,
        "bs=1M",
        "iflag=direct",
        "oflag=direct",
        "conv=notrunc,fsync",
        "status=none",
    ];
    sh::run(&words).map(drop)
}

fn loop_device() -> Result<String> {
    sh::run(&["modprobe", "loop"])?;
    fill_with(FILE, SIZE_MIB, &[])?;
    Ok(sh::run(&["losetup", "--find", "--show", FILE])?
        .trim()
        .to_owned())
}

fn fill(device: &str, mib: u32) -> Result<()> {
    fill_with(device, mib, &["oflag=direct"])
}

fn fill_with(path: &str, mib: u32, more: &[&str]) -> Result<()> {
    let (out, count) = (format!("of={path}"), format!("count={mib}"));
    let mut words = vec!["dd", "if=/dev/zero", &out, "bs=1M", &count, "status=none"];
    words.extend(more);
    sh::run(&words).map(drop)
}
