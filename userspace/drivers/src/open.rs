// SPDX-License-Identifier: MIT OR Apache-2.0
//! From what is asked for to a disk that can be served.

use crate::{Disk, Null, Ram, Raw, Shape};
use control::tapdisk::Open;
use control::{Code, Driver as Name, Failure};
use diskio::{File, Io, LockKind};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long the image may be locked by a process whose I/O is not over.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// Time between two attempts.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Opens what `open` asks for: locks the image, which waits a little for the I/O of a process that
/// died, and only then looks at it.
pub async fn open(io: &Io, open: &Open, image: Option<OwnedFd>) -> Result<(Disk, Shape), Failure> {
    let disk = match (open.target.driver(), open.target.size()) {
        (Name::Aio | Name::Sync, _) => {
            let file = locked(io, open, image).await?;
            Disk::new(raw(open, file)?)
        }
        (Name::Ram, Some(size)) => {
            let memory = locked(io, open, image).await?;
            Disk::new(Ram::new(memory, size))
        }
        (Name::Null, Some(size)) => Disk::new(Null::new(size)),
        (name, None) => {
            return Err(Failure::invalid(format!(
                "the driver {name} needs a size, such as {name}:64M"
            )))
        }
    };
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
        eprintln!(
            "{} goes through dom0's page cache: its size is no whole number of its storage's blocks; \
             make it one with truncate --size=%4096",
            open.target
        );
    }
    Ok(Raw::new(file, discard))
}

/// The image, locked.
async fn locked(io: &Io, open: &Open, image: Option<OwnedFd>) -> Result<File, Failure> {
    let image = image.ok_or_else(|| {
        Failure::invalid(format!(
            "the descriptor of the image of {} is missing",
            open.target
        ))
    })?;
    let system = |what: &str, error: &io::Error| {
        Failure::system(format!("cannot {what} the image of {}", open.target), error)
    };
    let file = File::new(io, image).map_err(|error| system("use", &error))?;
    if !open.read_only && !file.is_writable().map_err(|error| system("use", &error))? {
        return Err(Failure::invalid(format!(
            "the image of {} is open for reading only: open it for writing, or serve it read-only",
            open.target
        )));
    }
    if open.shared {
        return Ok(file);
    }
    let kind = match open.read_only {
        true => LockKind::Read,
        false => LockKind::Write,
    };
    let start = Instant::now();
    loop {
        match file.lock(kind) {
            Ok(()) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if start.elapsed() > LOCK_WAIT {
                    return Err(Failure::new(
                        Code::Busy,
                        format!(
                            "the image of {} is locked by another process: stop it, or use the mode w! if it may be shared",
                            open.target
                        ),
                    ));
                }
            }
            Err(error) => return Err(system("lock", &error)),
        }
        io.sleep(LOCK_PAUSE)
            .await
            .map_err(|error| system("wait for", &error.into()))?;
    }
}
