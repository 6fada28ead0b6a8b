// SPDX-License-Identifier: MIT OR Apache-2.0
//! The nodes of the kernel, behind a trait so that a test needs none.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The number of the backing that is the image of a disk. Its process knows it by this.
pub const IMAGE: u16 = 0;

/// A node's own description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its number.
    pub minor: u32,
    /// The kernel's part of `tap-ctl list`.
    pub status: control::supervisor::Kernel,
    /// Domain and virtual device of the frontend that is bound, if one is.
    pub bound: Option<(u32, u32)>,
    /// The kernel can serve a disk without its process.
    pub has_maps: bool,
    /// Files that the kernel has for passthrough, one bit for each number.
    pub backings: u32,
}

/// A node to make.
#[derive(Clone, Copy, Debug, Default)]
pub struct Make {
    /// The requested number.
    pub minor: Option<u32>,
    /// KiB of the arena; 0 for the default.
    pub arena_kib: u32,
    /// Seconds without a process after which requests fail; 0 for never.
    pub fail_after_s: u32,
    /// Deaths of processes at one request after which it fails; 0 for never.
    pub max_deaths: u32,
}

/// The supervisor's requests to the kernel.
pub trait Kernel {
    /// Makes a node and returns its number.
    ///
    /// # Errors
    /// As the kernel says.
    fn create(&self, make: Make) -> io::Result<u32>;

    /// Takes a node away.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while it is open, a frontend is connected, or I/O of its
    /// last process may be running.
    fn destroy(&self, minor: u32) -> io::Result<()>;

    /// The lowest node whose number is at least `from`. Nothing means that there is none for certain.
    ///
    /// # Errors
    /// As the kernel says; that there is none is no error.
    fn query(&self, from: u32) -> io::Result<Option<NodeInfo>>;

    /// Opens a node, without waiting.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while it is open, or while the I/O of its last process is
    /// not known to be over.
    fn open(&self, minor: u32) -> io::Result<OwnedFd>;

    /// The end of the last process is no fault of the requests that it had, says who has opened the
    /// node, before it is started.
    ///
    /// # Errors
    /// As the kernel says.
    fn excuse(&self, node: BorrowedFd<'_>) -> io::Result<()>;

    /// Gives a disk its image, by the number [`IMAGE`], or a file below that, which the kernel may use without a process
    /// from then on. It keeps the open file description, and so the locks of that. If the disk has it already, nothing
    /// happens.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if the disk has another one of this number, [`io::ErrorKind::Unsupported`] if
    /// the kernel can serve no disk of this.
    fn add_backing(
        &self,
        minor: u32,
        number: u16,
        file: BorrowedFd<'_>,
        writable: bool,
    ) -> io::Result<()>;

    /// Takes it away: from then on the kernel begins nothing there.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while I/O of the kernel is running there,
    /// [`io::ErrorKind::NotFound`] if the disk has none of this number.
    fn remove_backing(&self, minor: u32, number: u16) -> io::Result<()>;
}

/// One node.
///
/// # Errors
/// As [`Kernel::query`].
pub fn node(kernel: &dyn Kernel, minor: u32) -> io::Result<Option<NodeInfo>> {
    Ok(kernel.query(minor)?.filter(|node| node.minor == minor))
}

/// The lowest number from `from` on that no node has.
///
/// # Errors
/// As [`Kernel::query`].
pub fn free_minor(kernel: &dyn Kernel, from: u32) -> io::Result<u32> {
    let mut minor = from;
    while node(kernel, minor)?.is_some() {
        minor = minor.checked_add(1).ok_or(io::ErrorKind::StorageFull)?;
    }
    Ok(minor)
}
