// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening the disk that a request describes.

use crate::{lock_part, Disk, DiskInfo};
use control::tapdisk::Open;
use control::{Code, Driver as Name, Failure};
use diskio::{Errno, File, Io, LockKind, LockPart};
use std::io;
use std::os::fd::OwnedFd;

macro_rules! by_module {
    ($($module:ident { $($(#[$doc:meta])* $name:ident $text:literal $traits:ident;)* })*) => {
        /// Opens a disk by the module of its driver.
        fn disk(open: &Open, file: Option<File>) -> Result<Disk, Failure> {
            match open.target.driver() {
                $($(Name::$name => crate::$module::open(open, file),)*)*
            }
        }

        /// Makes an image of a driver: the disk has `size` bytes, which are whole blocks, and reads as zeroes. The file
        /// is empty.
        ///
        /// # Errors
        /// Those of the file; [`Errno::OPNOTSUPP`] if the driver has no images, or they are made by another crate.
        pub async fn create(name: Name, file: &File, size: u64) -> Result<(), Errno> {
            match name {
                $($(Name::$name => crate::$module::create(file, size).await,)*)*
            }
        }
    };
}

control::driver_table!(by_module);

/// Opens the disk that `open` describes: locks the image, which waits a little for the I/O of a process that died, and
/// only then reads it. It refuses drivers that [have a format](Name::has_format).
pub async fn open(io: &Io, open: &Open, fd: Option<OwnedFd>) -> Result<(Disk, DiskInfo), Failure> {
    let driver = open.target.driver();
    let file = match driver.has_image() || (driver.has_memory() && open.target.size().is_some()) {
        true => Some(image(io, open, fd).await?),
        false => None,
    };
    open_on(open, file).await
}

/// Opens a disk on an image that [is locked](image) already.
pub async fn open_on(open: &Open, file: Option<File>) -> Result<(Disk, DiskInfo), Failure> {
    activate(disk(open, file)?, open).await
}

/// Returns the size in the target of a disk without an image.
pub(crate) fn size(open: &Open) -> Result<u64, Failure> {
    open.target.size().ok_or_else(|| {
        let name = open.target.driver();
        Failure::invalid(format!(
            "the driver {name} needs a size, such as {name}:64M"
        ))
    })
}

/// Activates a disk; guests may discard only if `open` allows that.
///
/// # Errors
/// The disk cannot be activated, or not with logical sectors of the size that the target names.
pub async fn activate(disk: Disk, open: &Open) -> Result<(Disk, DiskInfo), Failure> {
    let mut shape = disk.activate().await?;
    if let Some(sector) = open.target.sector_size() {
        let fits = check_sector(open, sector, shape.logical_block);
        shape = match fits.and_then(|()| disk.set_sector(sector)) {
            Ok(shape) => shape,
            Err(failure) => {
                // The failure says more than that of this.
                let _closed = disk.close().await;
                return Err(failure);
            }
        };
    }
    if !open.discard || open.read_only {
        shape.discard = None;
    }
    Ok((disk, shape))
}

/// Refuses logical sectors that are smaller than a block of storage of which this process cannot write a part so that
/// no other writer interferes.
fn check_sector(open: &Open, sector: u32, block: u32) -> Result<(), Failure> {
    let whose = match open.target.driver() {
        _ if sector >= block => return Ok(()),
        Name::Nbd => "its server",
        _ if open.whole_blocks => "another host that writes it, too,",
        _ => return Ok(()),
    };
    Err(Failure::unsupported(format!(
        "{} has blocks of {block} bytes, and {whose} would overwrite what is beside a sector of {sector}: leave \
         sector-size= away, or copy it to an image of its own: `tapimg convert IMAGE NEW`",
        open.target
    )))
}

/// Returns the failure for an image whose descriptor is missing.
pub fn missing(open: &Open) -> Failure {
    Failure::invalid(format!(
        "the descriptor of the image of {} is missing",
        open.target
    ))
}

/// The image that came along, which is as it must be, and locked.
pub async fn image(io: &Io, open: &Open, fd: Option<OwnedFd>) -> Result<File, Failure> {
    let name = format!("the image of {}", open.target);
    let fd = fd.ok_or_else(|| missing(open))?;
    let kind = match open.read_only {
        true => LockKind::Read,
        false => LockKind::Write,
    };
    let part = match (open.shared, open.kernel_holds) {
        (true, _) => None,
        (false, true) => Some(LockPart::Fence),
        (false, false) => Some(LockPart::Whole),
    };
    file(io, fd, kind, part, &name).await
}

/// Opens a file for reading or writing, and locks `locked`, or nothing if other programs write to it by agreement.
/// `name` is for messages.
pub async fn file(
    io: &Io,
    fd: OwnedFd,
    kind: LockKind,
    locked: Option<LockPart>,
    name: &str,
) -> Result<File, Failure> {
    let system =
        |what: &str, error: &io::Error| Failure::system(format!("cannot {what} {name}"), error);
    let file = File::new(io, fd).map_err(|error| system("use", &error))?;
    let must_write = kind == LockKind::Write;
    if must_write && !file.is_writable().map_err(|error| system("use", &error))? {
        return Err(Failure::invalid(format!(
            "{name} is open for reading only: open it for writing, or serve it read-only"
        )));
    }
    let Some(part) = locked else {
        return Ok(file);
    };
    match lock_part(&file, kind, part).await {
        Ok(true) => Ok(file),
        Ok(false) => Err(Failure::new(
            Code::Busy,
            format!(
                "{name} is locked by another process: stop it, or use the mode w! if it is a raw image that \
                 may be shared"
            ),
        )),
        Err(error) => Err(system("lock", &error)),
    }
}
