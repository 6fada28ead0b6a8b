// SPDX-License-Identifier: MIT OR Apache-2.0
//! From the name of a format and an image to a disk, whatever the format.

use crate::luks::{Key, Luks};
use crate::qcow::Qcow;
use crate::qcow2::Qcow2;
use crate::vhd::Vhd;
use crate::vhdx::Vhdx;
use crate::vmdk::Vmdk;
use crate::{luks, qcow, qcow2, vhd, vhdx, vmdk, Needs, Storage};
use control::Failure;
use drivers::Disk;
use std::fmt;
use std::str::FromStr;

/// The formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// qcow2, versions 2 and 3.
    Qcow2,
    /// qcow, the first version.
    Qcow,
    /// VHD.
    Vhd,
    /// VHDX, which is only read.
    Vhdx,
    /// VMDK.
    Vmdk,
    /// LUKS, version 1.
    Luks,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Qcow2,
        Self::Qcow,
        Self::Vhd,
        Self::Vhdx,
        Self::Vmdk,
        Self::Luks,
    ];

    /// The name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
            Self::Luks => "luks",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = Failure;

    fn from_str(name: &str) -> Result<Self, Failure> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Failure::invalid(format!("there is no format {name:?}: use one of {known}"))
        })
    }
}

/// Type of a backing image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// A file or device that is the disk, byte for byte. The driver never looks for a header in it, because a guest may
    /// have stored one.
    Raw,
    /// An image.
    Format(Kind),
}

impl Below {
    /// Returns its name in QEMU, which most users know.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Format(Kind::Vhd) => "vpc",
            Self::Format(kind) => kind.name(),
        }
    }
}

impl FromStr for Below {
    type Err = Failure;

    /// Parses the name of an image's format in a header, including the names of other programs.
    fn from_str(name: &str) -> Result<Self, Failure> {
        Ok(match name {
            "raw" | "aio" | "file" | "host_device" => Self::Raw,
            "vpc" => Self::Format(Kind::Vhd),
            name => Self::Format(name.parse()?),
        })
    }
}

/// Options for serving an image.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name in messages.
    pub name: String,
    /// True if the image may be changed.
    pub writable: bool,
    /// True if freed space is given back to the storage.
    pub discard: bool,
    /// Bytes of tables that are kept in memory at most, beside those that requests are using.
    pub cache: usize,
    /// The id or the name of a snapshot in a qcow2 image that is shown instead of the disk as it is now.
    pub snapshot: Option<String>,
    /// Type of a parent whose child does not name it. Without this such a child is refused.
    pub parents: Option<Below>,
    /// Images over each other at most.
    pub layers: usize,
    /// Key of an encrypted image. A backing image cannot have one.
    pub key: Option<Key>,
}

impl Options {
    /// A writable image.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            writable: true,
            discard: true,
            cache: 32 << 20,
            snapshot: None,
            parents: None,
            layers: crate::LAYERS,
            key: None,
        }
    }

    /// Puts the image's name in front of a failure.
    pub(crate) fn named(&self, failure: Failure) -> Failure {
        named(&self.name, failure)
    }

    /// Returns true if the image in `storage` may be changed.
    pub(crate) fn may_write(&self, storage: &impl Storage) -> Result<bool, diskio::Errno> {
        Ok(self.writable && storage.is_writable()?)
    }
}

/// Puts the name of an image in front of a failure.
pub(crate) fn named(name: impl fmt::Display, failure: Failure) -> Failure {
    Failure::new(failure.code, format!("{name}: {}", failure.message))
}

/// Files and disks that an image needs beside itself, as [`look`] reports them.
#[derive(Clone, Debug)]
pub struct Parts<S> {
    /// Backing disk, which is activated together with the image.
    pub parent: Option<Disk>,
    /// The files with its content, in the order of [`Needs::extents`].
    pub extents: Vec<S>,
}

impl<S> Default for Parts<S> {
    fn default() -> Self {
        Self {
            parent: None,
            extents: Vec::new(),
        }
    }
}

/// Returns the files that an image needs beside itself; no name in the header is followed. The caller must have locked
/// the image.
pub async fn look<S: Storage>(kind: Kind, image: &S) -> Result<Needs, Failure> {
    match kind {
        Kind::Qcow2 => qcow2::look(image).await,
        Kind::Qcow => qcow::look(image).await,
        Kind::Vhd => Ok(vhd::look(image).await?.1),
        Kind::Vhdx => vhdx::look(image).await,
        Kind::Vmdk => vmdk::look(image).await,
        Kind::Luks => luks::look(image).await,
    }
}

/// Returns the identity of an image's content, as its children have it in [`Parent::id`](crate::Parent::id); `None` if
/// the format has no such identity.
pub(crate) async fn id<S: Storage>(kind: Kind, image: &S) -> Result<Option<String>, Failure> {
    match kind {
        Kind::Qcow2 | Kind::Qcow | Kind::Luks => Ok(None),
        Kind::Vhd => Ok(Some(vhd::spelled(vhd::id(image).await?))),
        Kind::Vhdx => Ok(Some(vhdx::id(image).await?)),
        Kind::Vmdk => Ok(Some(vmdk::id(image).await?)),
    }
}

/// Returns the disk in `image`, with the files that it needs. Nothing is read before its activation.
pub fn open<S: Storage>(kind: Kind, image: S, parts: Parts<S>, options: Options) -> Disk {
    match kind {
        Kind::Qcow2 => Disk::new(Qcow2::new(image, parts, options)),
        Kind::Qcow => Disk::new(Qcow::new(image, parts, options)),
        Kind::Vhd => Disk::new(Vhd::new(image, parts, options)),
        Kind::Vhdx => Disk::new(Vhdx::new(image, parts, options)),
        Kind::Vmdk => Disk::new(Vmdk::new(image, parts, options)),
        Kind::Luks => Disk::new(Luks::new(image, parts, options)),
    }
}
