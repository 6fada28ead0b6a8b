// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control node, `/dev/xentap/control`.

use ring::tap::abi::{
    ioctl as numbers, BackingAdd, BackingRemove, CreateCommand, Destroy, Info, Mapped,
};
use ring::tap::abi::{BACKING_WRITE, VERSION};
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{ioctl, NoArg, Setter, Updater};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
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

    /// Makes a node. Of `create` the version and the number are filled in: that is `minor`, or the
    /// lowest one that is free. Returns the node's number.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn create(&self, minor: Option<u32>, create: CreateCommand) -> io::Result<u32> {
        let mut create = CreateCommand {
            version: VERSION,
            minor: minor.unwrap_or(u32::MAX),
            ..create
        };
        // SAFETY: CREATE reads and writes a `CreateCommand`, as its number encodes, and nothing else.
        let argument = unsafe { Updater::<{ numbers::CREATE }, _>::new(&mut create) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        unsafe { ioctl(&self.fd, argument) }?;
        Ok(create.minor)
    }

    /// Takes a node away.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while its node is open, a frontend is connected, or I/O of
    /// its last process may be running.
    pub fn destroy(&self, minor: u32) -> io::Result<()> {
        let destroy = Destroy { minor, flags: 0 };
        // SAFETY: DESTROY reads a `Destroy`, as its number encodes, and writes nothing.
        let argument = unsafe { Setter::<{ numbers::DESTROY }, _>::new(destroy) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        Ok(unsafe { ioctl(&self.fd, argument) }?)
    }

    /// Gives a disk a block device that the kernel may use without its process, open for writing if it is
    /// to be `writable`. The descriptor is not needed afterwards. A disk that has it already keeps it.
    ///
    /// # Errors
    /// As the kernel says: [`io::ErrorKind::AlreadyExists`] if the disk has another device of this number.
    pub fn add_backing(
        &self,
        minor: u32,
        number: u32,
        device: BorrowedFd<'_>,
        writable: bool,
    ) -> io::Result<()> {
        let add = BackingAdd {
            minor,
            number,
            fd: device.as_raw_fd(),
            flags: if writable { BACKING_WRITE } else { 0 },
            ..BackingAdd::default()
        };
        // SAFETY: BACKING_ADD reads a `BackingAdd`, as its number encodes, and writes nothing; what the
        // descriptor in it names is borrowed for as long.
        let argument = unsafe { Setter::<{ numbers::BACKING_ADD }, _>::new(add) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        Ok(unsafe { ioctl(&self.fd, argument) }?)
    }

    /// Takes a device away from a disk: from now on the kernel begins nothing there.
    ///
    /// # Errors
    /// As the kernel says: [`io::ErrorKind::ResourceBusy`] while I/O of the kernel is running there.
    pub fn remove_backing(&self, minor: u32, number: u32) -> io::Result<()> {
        let remove = BackingRemove {
            minor,
            number,
            reserved: 0,
        };
        // SAFETY: BACKING_REMOVE reads a `BackingRemove`, as its number encodes, and writes nothing.
        let argument = unsafe { Setter::<{ numbers::BACKING_REMOVE }, _>::new(remove) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        Ok(unsafe { ioctl(&self.fd, argument) }?)
    }

    /// How the mappings of a disk serve it; nothing if the driver is of a time before it counted that.
    ///
    /// # Errors
    /// As the kernel says: [`io::ErrorKind::NotFound`] if there is no such node.
    pub fn mapped(&self, minor: u32) -> io::Result<Option<Mapped>> {
        let mut mapped = Mapped {
            minor,
            ..Mapped::default()
        };
        // SAFETY: MAPPED reads and writes a `Mapped`, as its number encodes, and nothing else.
        let argument = unsafe { Updater::<{ numbers::MAPPED }, _>::new(&mut mapped) };
        // SAFETY: whatever file this is, the argument is memory of the size that the number encodes.
        match unsafe { ioctl(&self.fd, argument) } {
            Ok(()) => Ok(Some(mapped)),
            Err(rustix::io::Errno::NOTTY) => Ok(None),
            Err(error) => Err(error.into()),
        }
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

/// Tells a node, which was opened and is not started yet, that the end of the last process is no
/// fault of the requests that it had.
///
/// # Errors
/// As the kernel says.
pub fn excuse(node: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: EXCUSE has no argument.
    let argument = unsafe { NoArg::<{ numbers::EXCUSE }>::new() };
    // SAFETY: whatever file this is, there is no argument.
    Ok(unsafe { ioctl(node, argument) }?)
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
