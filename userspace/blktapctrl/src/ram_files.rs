// SPDX-License-Identifier: MIT OR Apache-2.0
//! The memory of `ram:` and `cow:` disks: a file for each of them, in a file system in memory that is ours. So it
//! outlives every process, the supervisor's too, and goes with the disk, or with the host. Memory with a name is a file of
//! all disks that say the name; which those are the registry knows.

use crate::bitmap_files;
use crate::folder::{self, Folder, NAMED};
use crate::image::Image;
use control::{Code, Failure, MemoryName, Target};
use rustix::mount::{mount, MountFlags};
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The extension of memory with a name that is being made.
const UNFINISHED: &str = "unfinished";

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

/// Makes the memory that a disk of this target needs for itself, if it needs some, or keeps what it has. The memory of
/// a `ram:` disk is the disk, and may grow; that of a `cow:` disk holds the guest's writes, and its process decides
/// how.
///
/// # Errors
/// The system refuses to, or it would lose what is beyond its end.
pub fn prepare(folder: &Folder, minor: u32, target: &Target) -> Result<(), Failure> {
    if !target.has_own_memory() {
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
            format!("disk {minor} has {found} bytes of memory: it cannot continue with {size}"),
        ));
    }
    file.set_len(size).map_err(refused)
}

/// Opens the memory that a disk has for itself.
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

/// Makes memory of this name, of so many zeroes. Memory that had the name before loses it.
///
/// # Errors
/// The system refuses to.
pub fn make_named(folder: &Folder, name: &MemoryName, size: u64) -> Result<(), Failure> {
    let place = folder.memory_named(name);
    let beside = place.with_extension(UNFINISHED);
    let make = || {
        let file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&beside)?;
        file.set_len(size)?;
        // No process finds it with another size.
        fs::rename(&beside, &place)
    };
    make().map_err(|error| Failure::system(format!("cannot make the memory {name}"), &error))
}

/// Finds the memory of this name; nothing if there is none.
///
/// # Errors
/// The system does not say.
pub fn find_named(folder: &Folder, name: &MemoryName) -> Result<Option<Image>, Failure> {
    match Image::find(&folder.memory_named(name)) {
        Err(failure) if failure.code == Code::NotFound => Ok(None),
        found => found.map(Some),
    }
}

/// The names of all memory that there is. Unfinished memory is removed.
///
/// # Errors
/// The folder cannot be read, or that cannot be removed.
pub fn names(folder: &Folder) -> io::Result<Vec<MemoryName>> {
    for unfinished in folder::files(&folder.memory(), UNFINISHED)? {
        folder::remove(&unfinished)?;
    }
    let files = folder::files(&folder.memory(), NAMED)?;
    let name = |path: &PathBuf| path.file_stem()?.to_str()?.parse().ok();
    Ok(files.iter().filter_map(name).collect())
}

/// Failure of a disk whose memory is lost: its guest must not get zeroes instead.
pub fn lost(folder: &Folder, name: &MemoryName) -> Failure {
    let place = folder.memory_named(name);
    Failure::new(
        Code::Image,
        format!(
            "the memory {name} is lost ({} is gone): destroy the disks that have it",
            place.display()
        ),
    )
}

/// Gives the memory that a disk has for itself back.
///
/// # Errors
/// The system refuses to.
pub fn remove(folder: &Folder, minor: u32) -> io::Result<()> {
    folder::remove(&folder.memory_of(minor))?;
    folder::remove(&folder.written_of(minor))?;
    bitmap_files::remove_all(folder, minor)
}

fn place(folder: &Folder, minor: u32, target: &Target) -> PathBuf {
    match target.below() {
        Some(_) => folder.written_of(minor),
        None => folder.memory_of(minor),
    }
}
