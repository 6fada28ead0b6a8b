// SPDX-License-Identifier: MIT OR Apache-2.0
//! From the name of a format and an image to a disk, whatever the format.

use crate::luks::{ImageKey, Luks};
use crate::qcow::Qcow;
use crate::qcow2::Qcow2;
use crate::vhd::Vhd;
use crate::vhdx::Vhdx;
use crate::vmdk::Vmdk;
use crate::{luks, qcow, qcow2, vhd, vhdx, vmdk, ImageNeeds, Storage};
use control::Failure;
use drivers::Disk;
use std::fmt;
use std::str::FromStr;

/// The formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
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

impl ImageFormat {
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

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ImageFormat {
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
    Format(ImageFormat),
}

impl Below {
    /// Returns its name in QEMU, which most users know.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Format(ImageFormat::Vhd) => "vpc",
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
            "vpc" => Self::Format(ImageFormat::Vhd),
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
    pub key: Option<ImageKey>,
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
pub struct ImageParts<S> {
    /// Backing disk, which is activated together with the image.
    pub parent: Option<Disk>,
    /// The files with its content, in the order of [`ImageNeeds::extents`].
    pub extents: Vec<S>,
}

impl<S> Default for ImageParts<S> {
    fn default() -> Self {
        Self {
            parent: None,
            extents: Vec::new(),
        }
    }
}

/// Returns the files that an image needs beside itself; no name in the header is followed. The caller must have locked
/// the image.
pub async fn look<S: Storage>(kind: ImageFormat, image: &S) -> Result<ImageNeeds, Failure> {
    match kind {
        ImageFormat::Qcow2 => qcow2::look(image).await,
        ImageFormat::Qcow => qcow::look(image).await,
        ImageFormat::Vhd => Ok(vhd::look(image).await?.1),
        ImageFormat::Vhdx => vhdx::look(image).await,
        ImageFormat::Vmdk => vmdk::look(image).await,
        ImageFormat::Luks => luks::look(image).await,
    }
}

/// Returns the identity of an image's content, as its children have it in [`Parent::id`](crate::Parent::id); `None` if
/// the format has no such identity.
pub(crate) async fn id<S: Storage>(
    kind: ImageFormat,
    image: &S,
) -> Result<Option<String>, Failure> {
    match kind {
        ImageFormat::Qcow2 | ImageFormat::Qcow | ImageFormat::Luks => Ok(None),
        ImageFormat::Vhd => Ok(Some(vhd::spelled(vhd::id(image).await?))),
        ImageFormat::Vhdx => Ok(Some(vhdx::id(image).await?)),
        ImageFormat::Vmdk => Ok(Some(vmdk::id(image).await?)),
    }
}

/// Returns the disk in `image`, with the files that it needs. Nothing is read before its activation.
pub fn open<S: Storage>(
    kind: ImageFormat,
    image: S,
    parts: ImageParts<S>,
    options: Options,
) -> Disk {
    match kind {
        ImageFormat::Qcow2 => Disk::new(Qcow2::new(image, parts, options)),
        ImageFormat::Qcow => Disk::new(Qcow::new(image, parts, options)),
        ImageFormat::Vhd => Disk::new(Vhd::new(image, parts, options)),
        ImageFormat::Vhdx => Disk::new(Vhdx::new(image, parts, options)),
        ImageFormat::Vmdk => Disk::new(Vmdk::new(image, parts, options)),
        ImageFormat::Luks => Disk::new(Luks::new(image, parts, options)),
    }
}
