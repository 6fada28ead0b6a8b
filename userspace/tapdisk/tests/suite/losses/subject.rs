// SPDX-License-Identifier: MIT OR Apache-2.0
//! The drivers, each with an image of its own.

use super::chance::Chance;
use super::guest::stamp;
use super::storage::{memory, reopen};
use control::tapdisk::{Engine, Open};
use control::Driver;
use diskio::Runtime;
use drivers::{Disk, Raw};
use formats::luks::{self, ImageKey};
use formats::{qcow, qcow2, vhd, vmdk, ImageFormat, ImageParts, Options};
use std::fs::File;
use std::time::Duration;

/// Bytes of the image below others, of which each sector has its number.
const BASE: u64 = 1 << 20;
/// Number in each sector of the image below.
pub(super) const BELOW: u32 = 1;
pub(super) const SECRET: &[u8] = b"open sesame";

/// Image below, and how the header names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Below {
    Nothing,
    /// A raw image that the header names.
    Named,
    /// A raw image of which the header does not say what it is.
    Unknown,
}

/// A driver with an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject {
    pub(super) name: &'static str,
    target: &'static str,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Bytes that requests like to begin at a multiple of.
    pub(super) unit: u64,
    kind: Option<ImageFormat>,
    pub(super) below: Below,
    /// The disk is copied to other images, and switched to them.
    pub(super) moves: bool,
}

pub(super) const RAW: Subject = Subject {
    name: "raw",
    target: "aio:/image",
    size: 1 << 18,
    unit: 4096,
    kind: None,
    below: Below::Nothing,
    moves: false,
};
/// An export of a server, whose image is raw.
pub(super) const NBD: Subject = Subject {
    name: "nbd",
    target: "nbd:unix:/server:exportname=disk",
    ..RAW
};
pub(super) const QCOW2: Subject = Subject {
    name: "qcow2",
    target: "qcow2:/image",
    size: 1 << 20,
    unit: 4096,
    kind: Some(ImageFormat::Qcow2),
    ..RAW
};
pub(super) const QCOW2_OVER: Subject = Subject {
    name: "qcow2 over raw",
    below: Below::Named,
    ..QCOW2
};
pub(super) const QCOW: Subject = Subject {
    name: "qcow over raw",
    target: "qcow:/image",
    kind: Some(ImageFormat::Qcow),
    below: Below::Unknown,
    ..QCOW2
};
pub(super) const VHD: Subject = Subject {
    name: "vhd",
    target: "vhd:/image",
    size: 8 << 20,
    unit: 2 << 20,
    kind: Some(ImageFormat::Vhd),
    ..RAW
};
pub(super) const VHD_OVER: Subject = Subject {
    name: "vhd over raw",
    below: Below::Named,
    size: 4 << 20,
    ..VHD
};
pub(super) const VMDK: Subject = Subject {
    name: "vmdk",
    target: "vmdk:/image",
    unit: 64 << 10,
    kind: Some(ImageFormat::Vmdk),
    ..QCOW2
};
pub(super) const LUKS: Subject = Subject {
    name: "luks",
    target: "key=/key,luks:/image",
    size: 1 << 18,
    kind: Some(ImageFormat::Luks),
    ..QCOW2
};
pub(super) const COW: Subject = Subject {
    name: "cow over raw",
    target: "cow:aio:/base",
    size: BASE,
    unit: 64 << 10,
    kind: Some(ImageFormat::Qcow2),
    below: Below::Named,
    ..RAW
};
/// A disk of a few pieces of a mirror, which moves between images.
pub(super) const MOVING: Subject = Subject {
    name: "raw image of a mirror",
    size: 3 << 20,
    unit: 512 << 10,
    moves: true,
    ..RAW
};
const MOVING_QCOW2: Subject = Subject {
    name: "qcow2 image of a mirror",
    target: QCOW2.target,
    kind: QCOW2.kind,
    ..MOVING
};
/// A disk stays on a server.
const MOVED: Subject = Subject {
    name: "export of a mirror",
    target: NBD.target,
    moves: false,
    ..MOVING
};

impl Subject {
    /// Returns true for an export of a server.
    pub(super) fn is_export(&self) -> bool {
        self.target == NBD.target
    }

    /// Returns an image that the disk may be copied to.
    pub(super) fn copy(&self, chance: &mut Chance) -> Option<Subject> {
        let copy = match chance.below(8) {
            0 => MOVED,
            1..5 => MOVING_QCOW2,
            _ => MOVING,
        };
        self.moves.then_some(copy)
    }

    /// The question that opens it.
    pub(super) fn open(&self) -> Open {
        Open {
            engine: Engine::Sync,
            may_ask: true,
            parents: (self.below == Below::Unknown).then_some(Driver::Aio),
            ..Open::new(self.target.parse().expect("a target"))
        }
    }

    /// The number in a sector that was not written, if that is known.
    pub(super) fn initial(&self, sector: u64) -> Option<u32> {
        match (self.kind, self.below) {
            (Some(ImageFormat::Luks), _) => None,
            (_, Below::Nothing) => Some(0),
            _ if sector * 512 < BASE => Some(BELOW),
            _ => Some(0),
        }
    }

    /// The image below.
    pub(super) fn base() -> File {
        let bytes: Vec<u8> = (0..BASE / 512)
            .flat_map(|sector| stamp(BELOW, sector))
            .collect();
        memory(&bytes)
    }

    /// A new image.
    pub(super) fn image(&self) -> File {
        let file = memory(&[]);
        let Self { size, below, .. } = *self;
        let has_base = below != Below::Nothing;
        // The first process makes that of a `cow:`.
        let Some(kind) = self.kind.filter(|_| self.target != COW.target) else {
            if self.kind.is_none() {
                file.set_len(size).expect("memory");
            }
            return file;
        };
        let runtime = Runtime::new();
        let image = diskio::File::new(&runtime.io, reopen(&file, true)).expect("a file");
        let work = async move {
            match kind {
                ImageFormat::Qcow2 => {
                    let backing = has_base.then(|| qcow2::BackingImage {
                        name: "/base".into(),
                        format: Some("raw".into()),
                    });
                    let plan = qcow2::Qcow2Create {
                        cluster: 4096,
                        backing,
                        ..qcow2::Qcow2Create::new(size)
                    };
                    qcow2::create(&image, &plan).await
                }
                ImageFormat::Qcow => {
                    let parent = has_base.then(|| "/base".into());
                    qcow::create(&image, &qcow::QcowCreate { size, parent }).await
                }
                ImageFormat::Vhd => {
                    let parent = has_base.then(|| vhd::ParentOf {
                        path: "/base".into(),
                        id: [0; 16],
                    });
                    let kind = match has_base {
                        true => vhd::VhdKind::Differencing,
                        false => vhd::VhdKind::Dynamic,
                    };
                    let what = vhd::VhdCreate {
                        kind,
                        size,
                        id: [7; 16],
                        parent,
                        reserve: 0,
                    };
                    vhd::create(&image, &what).await
                }
                ImageFormat::Vmdk => {
                    let what = vmdk::VmdkCreate {
                        form: vmdk::Form::MonolithicSparse,
                        size,
                        name: "image".into(),
                        parent: None,
                        cid: 0x1234_5678,
                    };
                    vmdk::create(&image, &[], &what).await
                }
                ImageFormat::Luks => {
                    let how = luks::Encryption {
                        key: key(),
                        iter_time: Duration::from_millis(1),
                    };
                    luks::create(&image, size, &how).await
                }
                ImageFormat::Vhdx => unreachable!("such an image is only read"),
            }
        };
        let made = runtime.block_on(work).expect("it ends");
        made.unwrap_or_else(|failure| panic!("{}: {failure}", self.name));
        file
    }

    /// The disk in an image that a loss of power has left.
    pub(super) fn disk(&self, runtime: &Runtime, image: &File, base: &File) -> Disk {
        let file = |file: &File| {
            let fd = reopen(file, true);
            diskio::File::new(&runtime.io, fd).expect("a file")
        };
        let Some(kind) = self.kind else {
            return Disk::new(Raw::new(file(image), true));
        };
        let parent = (self.below != Below::Nothing).then(|| Disk::new(Raw::new(file(base), false)));
        let parts = ImageParts {
            parent,
            ..ImageParts::default()
        };
        let options = Options {
            key: (kind == ImageFormat::Luks).then(key),
            ..Options::new(self.name)
        };
        formats::open(kind, file(image), parts, options)
    }
}

fn key() -> ImageKey {
    ImageKey::new(SECRET.to_vec().into())
}
