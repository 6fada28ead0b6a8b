// SPDX-License-Identifier: MIT OR Apache-2.0
//! The memory of `ram:` and `cow:` disks: a file for each of them, in a file system in memory that is ours. So it
//! outlives every process, the supervisor's too, and goes with the disk, or with the host.

use crate::folder::{self, Folder};
use crate::notes;
use control::{Code, Failure, Target};
use rustix::mount::{mount, MountFlags};
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Mounts the file systems, unless an earlier supervisor did: one for the memory of disks, and one for where guests have
/// written, so that neither takes the room of the other. The limit of the first one is tmpfs' own, half of dom0's memory:
/// without room a guest waits, and dom0 lives.
///
/// # Errors
/// The system refuses to.
pub fn mount_folders(folder: &Folder) -> io::Result<()> {
    mount_at(&folder.memory(), c"mode=0700")?;
    mount_at(&folder.notes(), c"mode=0700,size=10%")
}

fn mount_at(place: &Path, options: &CStr) -> io::Result<()> {
    let above = place.parent().unwrap_or(place);
    if fs::metadata(place)?.dev() != fs::metadata(above)?.dev() {
        return Ok(());
    }
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    Ok(mount("xentap", place, "tmpfs", flags, options)?)
}

/// Makes the memory that a disk of this target needs, if it needs some, or keeps what it has. That of a `ram:` disk is
/// the disk, and may grow; that of a `cow:` disk holds what is written, and its process decides how.
///
/// # Errors
/// The system refuses to, or it would lose what is beyond its end.
pub fn prepare(folder: &Folder, minor: u32, target: &Target) -> Result<(), Failure> {
    if !target.driver().has_memory() {
        return Ok(());
    }
    let refused =
        |error| Failure::system(format!("cannot make the memory of disk {minor}"), &error);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(place(folder, minor, target))
        .map_err(refused)?;
    let Some(size) = target.size() else {
        return Ok(());
    };
    let found = file.metadata().map_err(refused)?.len();
    if found > size {
        return Err(Failure::new(
            Code::Image,
            format!("disk {minor} has {found} bytes of memory: it cannot go on with {size}"),
        ));
    }
    file.set_len(size).map_err(refused)
}

/// Opens the memory that a disk has.
///
/// # Errors
/// It has none any more: what was in it is lost, which its guest must not take for zeroes.
pub fn open(folder: &Folder, minor: u32, target: &Target, write: bool) -> Result<OwnedFd, Failure> {
    let path = place(folder, minor, target);
    let file = File::options().read(true).write(write).open(&path);
    match file {
        Ok(file) => Ok(file.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Failure::new(
            Code::Image,
            format!(
                "the memory of disk {minor} is lost ({} is gone): destroy the disk",
                path.display()
            ),
        )),
        Err(error) => Err(Failure::system(
            format!("cannot open the memory of disk {minor}"),
            &error,
        )),
    }
}

/// Gives the memory of a disk back.
///
/// # Errors
/// The system refuses to.
pub fn remove(folder: &Folder, minor: u32) -> io::Result<()> {
    folder::remove(&folder.memory_of(minor))?;
    folder::remove(&folder.written_of(minor))?;
    notes::remove_all(folder, minor)
}

fn place(folder: &Folder, minor: u32, target: &Target) -> PathBuf {
    match target.below() {
        Some(_) => folder.written_of(minor),
        None => folder.memory_of(minor),
    }
}
