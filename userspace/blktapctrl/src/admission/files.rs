// SPDX-License-Identifier: MIT OR Apache-2.0
//! Decides which files a process may have beside its image: the process names a path.
//!
//! A guest writes what a process reads, so a name alone proves nothing:
//!
//! - The decision comes before any look at the file, so a process does not learn whether a refused file exists.
//! - A new file is only given to a verb that opens an image, because an administrator or a toolstack calls that.
//!   While a disk is served it gets what is on its record, and that must be the same file.
//! - The file is one that the administrator named for the disk, such as the image of `cow:`, or is in a folder that the
//!   administrator named, for the disk or for the supervisor (`--files`). A file to which the disk writes must be named for the disk
//!   itself.
//! - The image's own folder is not enough, because it may contain images of other guests. A file beside the image is
//!   given if its mode has no write permission (`chmod a-w`, so it is no other guest's disk), and if its name shows
//!   that it is a part of this image ([`is_extent_of`]).
//! - An image that is the disk byte for byte names nothing, so who serves one gets nothing.
//! - The rules of sharing hold as for an image, and it counts as used from then on.

use super::views::GLANCE;
use super::{Admission, OtherUsers};
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::image::{self, Identity, Image};
use crate::log::{tell, LogContext};
use crate::record::{parents, DiskPart, PartRole, Record};
use control::supervisor::{Mode, PendingOperation};
use control::tapdisk::Open;
use control::{Code, Failure};
use futures::stream::FuturesUnordered;
use futures::StreamExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files and sockets that a disk may have beside its image.
const MOST: usize = 64;
/// Bytes of a path.
const LONGEST: usize = 4096;
/// Characters of what is no path that are shown.
const SHOWN: usize = 100;

impl Admission {
    /// Decides whether a disk may have a file, and writes it down. Returns the part that is on the record, too.
    ///
    /// # Errors
    /// It may not: names the file, the reason and the remedy.
    pub async fn file(
        &self,
        disk: &Disk,
        role: PartRole,
        path: &Path,
    ) -> Result<(Arc<Image>, DiskPart), Failure> {
        check_path(disk, role, path)?;
        check_driver(disk, role, path)?;
        let known = self.known(disk, role, path);
        if known.is_none() {
            self.check_new(disk, role, path)?;
        }
        let image = image::find(path).await?;
        if let Some(part) = known {
            return match image.is(part.identity, part.born) {
                true => Ok((image, part)),
                false => Err(image::not_the_same(&image)),
            };
        }
        if opened(disk) == Some(image.identity()) {
            return Err(refused(
                disk,
                role,
                path,
                "it is the image itself: see to what the image names",
            ));
        }
        let asked_for = (opened(disk), named(disk));
        if !goes_on(disk, role, &image) {
            self.check_named(disk, role, path, image.clone()).await?;
        }
        let mode = mode(role, disk.record.borrow().mode);
        let vbd = disk.record.borrow().vbd.clone();
        let part = DiskPart {
            role,
            path: path.into(),
            identity: Some(image.identity()),
            born: image.born(),
            mode,
            locked: false,
        };
        let work = |beside: OtherUsers| {
            if beside == OtherUsers::Shared {
                let why = "another disk uses it, and one of the two writes it: detach that";
                return Err(refused(disk, role, path, why));
            }
            let locked = !mode.is_shared();
            let part = DiskPart { locked, ..part };
            // The verb may be over by now, or be another one.
            self.check_new(disk, role, path)?;
            if (opened(disk), named(disk)) != asked_for {
                let why = "another image is being opened by now";
                return Err(refused(disk, role, path, why));
            }
            self.note_part(disk, part.clone())?;
            Ok(part)
        };
        let minor = Some(disk.minor);
        let part = self.admit(Some(&image), mode, vbd.as_deref(), minor, work);
        part.await.map(|part| (image, part))
    }

    /// Decides whether a disk may connect to a server's socket, and writes it down. True if it had been
    /// before.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub async fn socket(&self, disk: &Disk, path: &Path) -> Result<(Arc<Image>, bool), Failure> {
        check_path(disk, PartRole::Socket, path)?;
        let known = self.known(disk, PartRole::Socket, path).is_some();
        if !known {
            self.check_new(disk, PartRole::Socket, path)?;
        }
        let place = path.to_path_buf();
        let socket = blocking_io(path, LIMIT, move || Image::socket(&place)).await?;
        let socket = Arc::new(socket);
        // A server that comes back makes a new socket, so its place is looked at each time.
        self.check_named(disk, PartRole::Socket, path, socket.clone())
            .await?;
        if !known {
            // The verb may be over by now.
            self.check_new(disk, PartRole::Socket, path)?;
            let part = DiskPart {
                role: PartRole::Socket,
                path: path.into(),
                identity: None,
                born: None,
                mode: Mode::WriteShared,
                locked: false,
            };
            self.note_part(disk, part)?;
        }
        Ok((socket, known))
    }

    /// Returns the part of the disk's record for this path and role.
    pub(crate) fn known(&self, disk: &Disk, role: PartRole, path: &Path) -> Option<DiskPart> {
        let record = disk.record.borrow();
        let mut parts = record.its_parts().iter();
        parts
            .find(|part| part.role == role && part.path == path)
            .cloned()
    }

    fn note_part(&self, disk: &Disk, part: DiskPart) -> Result<(), Failure> {
        self.registry.change(disk, |record| match &mut record.next {
            Some(next) => next.parts.push(part),
            None => record.parts.push(part),
        })
    }

    fn check_new(&self, disk: &Disk, role: PartRole, path: &Path) -> Result<(), Failure> {
        let record = disk.record.borrow();
        let opens = match record.doing {
            Some(PendingOperation::Create | PendingOperation::Open | PendingOperation::Unpause) => {
                true
            }
            // Before that, the process still serves the old image.
            Some(PendingOperation::Snapshot | PendingOperation::Mirror) => record.next.is_some(),
            _ => false,
        };
        let parts = record.its_parts();
        if !opens {
            let why = "it is not on the disk's record, and nothing new is given to a disk that is served: pause the disk and unpause it";
            return Err(refused(disk, role, path, why));
        }
        if parts.len() >= MOST {
            let why = format!("it has {MOST} files already: use an image of fewer parts");
            return Err(refused(disk, role, path, &why));
        }
        Ok(())
    }

    /// Returns true if the file is in a folder for all disks. Each folder is checked separately: one that is missing or
    /// does not answer does not delay the files of the others.
    async fn is_in_a_folder(&self, place: &Path) -> bool {
        let asked = self.folders.iter().map(|folder| {
            let (place, folder) = (place.to_path_buf(), folder.clone());
            async move {
                let again = folder.clone();
                blocking_io(&folder, GLANCE, move || Ok(is_below(&place, &again))).await
            }
        });
        let mut asked: FuturesUnordered<_> = asked.collect();
        while let Some(found) = asked.next().await {
            match found {
                Ok(true) => return true,
                Ok(false) => {}
                Err(failure) => tell!(
                    warn,
                    LogContext::default().failed(&failure),
                    "--files: {failure}"
                ),
            }
        }
        false
    }

    /// The administrator has named it, or a folder that it is below. A file to which the disk writes must be named for
    /// the disk itself, because a folder for all disks has the files of other guests.
    async fn check_named(
        &self,
        disk: &Disk,
        role: PartRole,
        path: &Path,
        file: Arc<Image>,
    ) -> Result<(), Failure> {
        let writes = role == PartRole::Extent && !disk.record.borrow().mode.is_read_only();
        let named = named(disk);
        let image = match below(disk) {
            Some(below) => Some(image::find(&below).await?),
            None => image_of(disk),
        };
        let ours = self.registry.folder.root().to_path_buf();
        let (place, is_ours, is_named) = blocking_io(path, LIMIT, move || {
            let place = file.place()?;
            let is_ours = is_below(&place, &ours);
            let is_named = named.iter().any(|named| is_below(&place, named));
            let is_named = is_named || is_beside(image.as_deref(), role, &file, &place)?;
            Ok((place, is_ours, is_named))
        })
        .await?;
        let is_named = is_named || !writes && self.is_in_a_folder(&place).await;
        let place = place.display();
        let why = match (is_ours, is_named, writes) {
            (true, _, _) => format!("it is {place}, which is the supervisor's own"),
            (false, true, _) => return Ok(()),
            (false, false, true) => format!(
                "it is {place}, which this disk may not write: to allow it, give --files {place} when the disk is made or unpaused"
            ),
            (false, false, false) => format!(
                "it is {place}, which --files does not name: to allow it, give --files {place} when the disk is made or unpaused, or start blktapctrl with --files and its folder; a file in the image's own folder is also allowed without write permissions: `chmod a-w {place}`"
            ),
        };
        Err(refused(disk, role, path, &why))
    }
}

/// Whether a file is below a folder. May hang as the folder's file system does.
fn is_below(place: &Path, folder: &Path) -> bool {
    std::fs::canonicalize(folder).is_ok_and(|folder| place.starts_with(folder))
}

/// Whether the file is a backing image that the disk had before: its last image, which an administrator named for it,
/// or a backing image of that.
fn goes_on(disk: &Disk, role: PartRole, file: &Image) -> bool {
    let record = disk.record.borrow();
    let had = |part: &DiskPart| file.is(part.identity, part.born);
    role == PartRole::Parent
        && (file.is(record.identity, record.born) || parents(&record.parts).any(had))
}

/// Whether a file in the image's own folder cannot be another guest's disk: a read-only file without write permission,
/// or one that the image's own name leads to.
fn is_beside(
    image: Option<&Image>,
    role: PartRole,
    file: &Image,
    place: &Path,
) -> Result<bool, Failure> {
    let Some(image) = image.filter(|_| role != PartRole::Socket) else {
        return Ok(false);
    };
    let its = image.place()?;
    let is_fixed = role == PartRole::Parent && file.is_unwritable();
    Ok(its.parent() == place.parent() && (is_fixed || is_extent_of(&its, place)))
}

/// The names that a VMDK's files have: `a-flat.vmdk`, `a-s001.vmdk`, `a-f001.vmdk`, `a-delta.vmdk` beside
/// `a.vmdk`.
fn is_extent_of(image: &Path, place: &Path) -> bool {
    let name = |path: &Path| {
        Some(
            path.file_name()?
                .to_str()?
                .strip_suffix(".vmdk")?
                .to_owned(),
        )
    };
    let (Some(image), Some(part)) = (name(image), name(place)) else {
        return false;
    };
    let Some(rest) = part
        .strip_prefix(&image)
        .and_then(|rest| rest.strip_prefix('-'))
    else {
        return false;
    };
    let number = rest.strip_prefix(['s', 'f']).unwrap_or_default();
    let is_numbered = number.len() >= 3 && number.bytes().all(|byte| byte.is_ascii_digit());
    matches!(rest, "flat" | "delta") || is_numbered
}

/// The image that a process is given.
fn image_of(disk: &Disk) -> Option<Arc<Image>> {
    match disk.record.borrow().next {
        Some(_) => disk.next_image.borrow().clone(),
        None => disk.image.borrow().clone(),
    }
}

/// Whether images of the disk's driver name such files at all.
fn check_driver(disk: &Disk, role: PartRole, path: &Path) -> Result<(), Failure> {
    let record = disk.record.borrow();
    let driver = opened_as(&record).map(|open| open.target.driver());
    let may = driver.is_some_and(|driver| match role {
        PartRole::Parent => driver.has_tables(),
        PartRole::Extent => driver.has_extents(),
        PartRole::Socket => true,
        // No process asks for it.
        PartRole::Mirror => false,
    });
    match (may, driver) {
        (true, _) => Ok(()),
        (false, Some(driver)) => {
            let why = format!("an image of the driver {driver} has none");
            Err(refused(disk, role, path, &why))
        }
        (false, None) => Err(refused(disk, role, path, "it has no image")),
    }
}

/// The image that is served, or is about to be instead.
fn opened(disk: &Disk) -> Option<Identity> {
    let record = disk.record.borrow();
    let next = record.next.as_ref();
    next.map_or(record.identity, |next| next.identity)
}

/// Returns the files and folders that the administrator has named for a disk.
fn named(disk: &Disk) -> Vec<PathBuf> {
    let mut named = {
        let record = disk.record.borrow();
        let next = record.next.as_ref();
        next.map_or(&record.files, |next| &next.files).clone()
    };
    named.extend(below(disk));
    named
}

/// Returns the backing image of a disk that keeps its writes in memory (`cow:`).
fn below(disk: &Disk) -> Option<PathBuf> {
    let record = disk.record.borrow();
    let below = opened_as(&record)?.target.below()?;
    Some(below.path.clone())
}

/// How the image is served, or is about to be.
fn opened_as(record: &Record) -> Option<&Open> {
    match &record.next {
        Some(next) => Some(&next.open),
        None => record.open.as_ref(),
    }
}

/// Checks that a name from a process is a path that an image could have, before it is logged or opened, so that no
/// process can write lines of its own into the log.
fn check_path(disk: &Disk, role: PartRole, path: &Path) -> Result<(), Failure> {
    let text = path.to_string_lossy();
    let why = match () {
        () if text.len() > LONGEST => format!("a path has {LONGEST} bytes at most"),
        () if text.contains(char::is_control) => "it has control characters".into(),
        () if !path.is_absolute() => "it is no absolute path".into(),
        () => return Ok(()),
    };
    let shown: String = text.chars().take(SHOWN).collect();
    let message = format!(
        "disk {} may not have {shown:?} as its {role}: {why}; see to what the image names",
        disk.minor
    );
    Err(Failure::new(Code::Denied, message))
}

/// Checks that names from an administrator are clear, whatever the working directory of a program.
///
/// # Errors
/// Says what is wrong with it.
pub(crate) fn check_files(files: &[PathBuf]) -> Result<(), Failure> {
    if files.len() > MOST {
        return Err(Failure::invalid(format!(
            "{} files are named for the disk, and {MOST} are the most: name their folder",
            files.len()
        )));
    }
    match files.iter().find(|file| !file.is_absolute()) {
        Some(file) => Err(Failure::invalid(format!(
            "{file:?} names no file for the disk: its absolute path is needed"
        ))),
        None => Ok(()),
    }
}

/// A parent is read; an extent is as the image is.
fn mode(role: PartRole, disk: Mode) -> Mode {
    match role {
        PartRole::Parent if disk.is_shared() => Mode::ReadShared,
        PartRole::Parent => Mode::Read,
        PartRole::Extent | PartRole::Socket | PartRole::Mirror => disk,
    }
}

fn refused(disk: &Disk, role: PartRole, path: &Path, why: &str) -> Failure {
    let message = format!(
        "disk {} may not have {} as its {role}: {why}",
        disk.minor,
        path.display()
    );
    Failure::new(Code::Denied, message)
}

#[cfg(test)]
mod tests {
    use super::is_extent_of;
    use std::path::Path;

    #[test]
    fn name_of_a_part_says_of_which_image_it_is() {
        let image = Path::new("/srv/web.vmdk");
        for (name, is) in [
            ("web-flat.vmdk", true),
            ("web-s001.vmdk", true),
            ("web-f012.vmdk", true),
            ("web-s1000.vmdk", true),
            ("web-delta.vmdk", true),
            ("web.vmdk", false),
            ("web-db.vmdk", false),
            ("web-db-flat.vmdk", false),
            ("web-s01.vmdk", false),
            ("web-s00x.vmdk", false),
            ("web-s.vmdk", false),
            ("web-.vmdk", false),
            ("web2-flat.vmdk", false),
            ("webflat.vmdk", false),
            ("web-flat.img", false),
        ] {
            assert_eq!(
                is_extent_of(image, &Path::new("/srv").join(name)),
                is,
                "{name}"
            );
        }
        assert!(!is_extent_of(
            Path::new("/srv/web.img"),
            Path::new("/srv/web-flat.vmdk")
        ));
    }
}
