// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control node, `/dev/xentap/control`.

use ring::tap::abi::{ioctl as numbers, Create, Destroy, Info, VERSION};
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{ioctl, Setter, Updater};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// The folder of the nodes.
pub const FOLDER: &str = "/dev/xentap";

/// The control node, open.
#[derive(Debug)]
pub struct Control {
    fd: OwnedFd,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if the driver is not loaded.
    pub fn open() -> io::Result<Control> {
        let fd = rustix::fs::open(
            Path::new(FOLDER).join("control"),
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Control { fd })
    }

    /// Makes a node. `minor` is the number that is wanted, `arena_kib` 0 the default size; requests
    /// fail after `fail_after_s` seconds without a process, and never if that is 0. Returns the
    /// node's number.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn create(&self, minor: Option<u32>, arena_kib: u32, fail_after_s: u32) -> io::Result<u32> {
        let mut create = Create {
            version: VERSION,
            minor: minor.unwrap_or(u32::MAX),
            arena_kib,
            fail_after_s,
            ..Create::default()
        };
        // SAFETY: CREATE reads and writes a `Create`, as its number encodes, and nothing else.
        let argument = unsafe { Updater::<{ numbers::CREATE }, _>::new(&mut create) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        unsafe { ioctl(&self.fd, argument) }?;
        Ok(create.minor)
    }

    /// Takes a node away.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while its node is open or a frontend is connected.
    pub fn destroy(&self, minor: u32) -> io::Result<()> {
        let destroy = Destroy { minor, flags: 0 };
        // SAFETY: DESTROY reads a `Destroy`, as its number encodes, and writes nothing.
        let argument = unsafe { Setter::<{ numbers::DESTROY }, _>::new(destroy) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        Ok(unsafe { ioctl(&self.fd, argument) }?)
    }

    /// The lowest node whose number is at least `from`; nothing if there is none.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn query(&self, from: u32) -> io::Result<Option<Info>> {
        let mut info = Info {
            version: VERSION,
            minor: from,
            ..Info::default()
        };
        // SAFETY: QUERY reads and writes an `Info`, as its number encodes, and nothing else.
        let argument = unsafe { Updater::<{ numbers::QUERY }, _>::new(&mut info) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        match unsafe { ioctl(&self.fd, argument) } {
            Ok(()) => Ok(Some(info)),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Opens the node of a disk for the process that will serve it, without waiting. The descriptor
/// itself waits, as a new one does.
///
/// # Errors
/// [`io::ErrorKind::ResourceBusy`] while it is open, or while the I/O of its last process is not
/// known to be over.
pub fn open_node(minor: u32) -> io::Result<OwnedFd> {
    let fd = rustix::fs::open(
        Path::new(FOLDER).join(minor.to_string()),
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )?;
    let flags = rustix::fs::fcntl_getfl(fd.as_fd())?;
    rustix::fs::fcntl_setfl(fd.as_fd(), flags - OFlags::NONBLOCK)?;
    Ok(fd)
}
