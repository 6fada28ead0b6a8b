// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening the disk that a request describes.

use crate::{lock_part, Disk, DiskInfo, Null, Ram, Raw};
use control::tapdisk::Open;
use control::{Code, Driver as Name, Failure};
use diskio::{File, Io, LockKind, LockPart};
use std::io;
use std::os::fd::OwnedFd;

/// Opens the disk that `open` describes: locks the image, which waits a little for the I/O of a process that died, and
/// only then reads it. It refuses drivers that [have a format](Name::has_format).
pub async fn open(io: &Io, open: &Open, fd: Option<OwnedFd>) -> Result<(Disk, DiskInfo), Failure> {
    let file = match (open.target.driver(), open.target.size()) {
        (Name::Aio | Name::Sync, _) | (Name::Ram, Some(_)) => Some(image(io, open, fd).await?),
        _ => None,
    };
    open_on(open, file).await
}

/// Opens a disk on an image that [is locked](image) already.
pub async fn open_on(open: &Open, file: Option<File>) -> Result<(Disk, DiskInfo), Failure> {
    let disk = match (open.target.driver(), open.target.size(), file) {
        (Name::Aio | Name::Sync, _, Some(file)) => Disk::new(raw(open, file)?),
        (Name::Ram, Some(size), Some(memory)) => Disk::new(Ram::new(memory, size)),
        (Name::Null, Some(size), _) => Disk::new(Null::new(size)),
        (Name::Aio | Name::Sync, _, None) | (Name::Ram, Some(_), None) => {
            return Err(missing(open))
        }
        (Name::Nbd, _, _) => {
            return Err(Failure::unsupported(
                "an export is opened by who has a connection to its server: use tapdisk",
            ))
        }
        (name @ (Name::Ram | Name::Null), None, _) => {
            return Err(Failure::invalid(format!(
                "the driver {name} needs a size, such as {name}:64M"
            )))
        }
        (
            name @ (Name::Cow
            | Name::Qcow2
            | Name::Qcow
            | Name::Vhd
            | Name::Vhdx
            | Name::Vmdk
            | Name::Luks),
            _,
            _,
        ) => {
            return Err(Failure::unsupported(format!(
                "this program does not know the format {name}: use tapdisk"
            )))
        }
    };
    activate(disk, open).await
}

/// Activates a disk; guests may discard only if `open` allows that.
pub async fn activate(disk: Disk, open: &Open) -> Result<(Disk, DiskInfo), Failure> {
    let mut shape = disk.activate().await?;
    if !open.discard || open.read_only {
        shape.discard = None;
    }
    Ok((disk, shape))
}

/// A file or device, locked, as a disk.
fn raw(open: &Open, mut file: File) -> Result<Raw, Failure> {
    let discard = open.discard && !open.read_only;
    if open.read_only {
        return Ok(Raw::new(file, discard));
    }
    if open.whole_blocks {
        return Ok(Raw::new(file, discard).in_whole_blocks());
    }
    let buffered = file.keep_size().map_err(|error| {
        Failure::system(
            format!("cannot look at the image of {}", open.target),
            &error,
        )
    })?;
    if buffered {
        diskio::say!(
            "{} goes through dom0's page cache: its size is no whole number of its storage's blocks; \
             make it one with truncate --size=%4096",
            open.target
        );
    }
    Ok(Raw::new(file, discard))
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
