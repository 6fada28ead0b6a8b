// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images on the command line, and the disks that are made of them.

use super::{Allocate, Which};
use clap::{Args, ValueEnum};
use control::supervisor::Mode;
use control::tapdisk::Engine;
use control::{Driver, Target};
use std::path::PathBuf;

/// How an image is opened.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// Target to serve: DRIVER:IMAGE or DRIVER:SIZE
    #[arg(short = 'a', long = "args", value_name = "TARGET")]
    pub(crate) target: String,
    /// Guests may not write
    #[arg(short = 'R', long, conflicts_with = "mode")]
    pub(crate) readonly: bool,
    /// Sharing mode of the image: r (beside readers), w (exclusive), r! and w! (beside any other user)
    #[arg(long, value_name = "MODE")]
    pub(crate) mode: Option<Mode>,
    /// How I/O is done
    #[arg(long, value_enum, default_value_t)]
    pub(crate) engine: EngineName,
    /// Guests may not discard, so that the image stays as large as it is
    #[arg(long)]
    pub(crate) no_discard: bool,
    /// A file that the disk may have beside its image, such as a parent or a server's socket, or a folder
    /// of them; may be given more than once
    #[arg(long, value_name = "PATH")]
    pub(crate) files: Vec<PathBuf>,
    /// The driver of a parent whose child does not say it, which qcow: never does: aio for a raw one
    #[arg(long, alias = "parents", value_name = "DRIVER")]
    pub(crate) parent_kind: Option<Driver>,
}

/// The names of engines.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum EngineName {
    /// io_uring, and Linux AIO where that is not allowed
    #[default]
    Auto,
    /// io_uring
    Uring,
    /// Linux AIO
    Aio,
    /// One system call after the other
    Sync,
}

impl From<EngineName> for Engine {
    fn from(name: EngineName) -> Engine {
        match name {
            EngineName::Auto => Engine::Auto,
            EngineName::Uring => Engine::Uring,
            EngineName::Aio => Engine::Aio,
            EngineName::Sync => Engine::Sync,
        }
    }
}

/// Arguments of `open`: a disk that exists, and the image to serve as it.
#[derive(Debug, Args)]
pub(crate) struct Open {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) image: Image,
}

/// A disk that resumes.
#[derive(Debug, Args)]
pub(crate) struct Unpause {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Another image, which the guest can use as the first one
    #[arg(short = 'a', long = "args", value_name = "TARGET")]
    pub(crate) target: Option<Target>,
    /// The image may be smaller than the disk that the guest knows, which loses what it has there
    #[arg(long)]
    pub(crate) shrink: bool,
    /// Files that the disk may have beside its image, instead of those named before; may be given more than once
    #[arg(long, value_name = "PATH")]
    pub(crate) files: Vec<PathBuf>,
}

/// Formats that can have a backing image while that is served.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum OverlayFormat {
    /// qcow2, over any image
    #[default]
    Qcow2,
    /// VHD
    Vhd,
}

impl std::fmt::Display for OverlayFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            OverlayFormat::Qcow2 => "qcow2",
            OverlayFormat::Vhd => "vhd",
        })
    }
}

/// A disk to make.
#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) image: Image,
    #[command(flatten)]
    pub(crate) node: Allocate,
    /// The backend's directory in xenstore for which it is: the disk goes when that goes. The target
    /// may then also be what libxl makes of one, such as a path alone
    #[arg(long, value_name = "PATH")]
    pub(crate) vbd: Option<String>,
    /// Serve NBD clients too, at /run/xentap/nbd/MINOR.sock
    #[arg(long)]
    pub(crate) nbd: bool,
    /// Print the minor number and nothing else
    #[arg(long)]
    pub(crate) minor_only: bool,
    /// Return as soon as the image is this disk's. Repeat the command without this to wait until the disk is served
    #[arg(long, requires = "vbd")]
    pub(crate) no_wait: bool,
}

/// An image to look at.
#[derive(Debug, Args)]
pub(crate) struct Probe {
    /// Target that would be served
    #[arg(short = 'a', long = "args", value_name = "TARGET")]
    pub(crate) target: String,
    /// Sharing mode that it would have
    #[arg(long, value_name = "MODE", default_value_t)]
    pub(crate) mode: Mode,
    /// The backend's directory in xenstore for which it would be
    #[arg(long, value_name = "PATH")]
    pub(crate) vbd: Option<String>,
}
