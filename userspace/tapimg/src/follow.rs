// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files that an image names: which of them this program opens, and where they are.
//!
//! The creator of an image chose the names in its header. Root can read every file, so without a check a user could
//! get any file of the host by an image that names it. So root follows a name only to a file that the owner of the
//! image could open, or to one that blktapctrl would serve below it, unless the command line says `--follow`.

use crate::image_spec::ImageSpec;
use crate::open::{identity, ImageOpener, Use};
use control::{Code, Failure};
use diskio::File;
use drivers::{Disk, Raw};
use formats::{resolve, Files};
use rustix::fs::fstat;
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Permission bits of a file, as those of its other users.
const READ: u32 = 0o4;
const WRITE: u32 = 0o2;
const SEARCH: u32 = 0o1;

/// Owner of an image, for whom files are opened.
#[derive(Clone, Debug)]
struct ImageOwner {
    /// Path of the image, without links.
    image: PathBuf,
    uid: u32,
    gid: u32,
}

/// Opens the files that an image and its backing images name.
#[derive(Clone, Debug)]
pub(crate) struct NamedFiles<'o> {
    opener: &'o ImageOpener,
    /// `None` if all files may be opened.
    owner: Option<ImageOwner>,
}

impl<'o> NamedFiles<'o> {
    /// For the image in `file`, which the command line names.
    ///
    /// # Errors
    /// The owner of the image cannot be determined.
    pub(crate) fn of(
        opener: &'o ImageOpener,
        image: &ImageSpec,
        file: &File,
    ) -> Result<Self, Failure> {
        if opener.follow || !rustix::process::geteuid().is_root() {
            // The kernel checks what other users may open.
            return Ok(Self {
                opener,
                owner: None,
            });
        }
        let look = || {
            let stat = fstat(file)?;
            let (uid, gid, image) = (stat.st_uid, stat.st_gid, place(file)?);
            Ok((uid != 0).then_some(ImageOwner { image, uid, gid }))
        };
        let owner = look().map_err(|error: io::Error| {
            Failure::system(format!("cannot see who owns {image}"), &error)
        })?;
        Ok(Self { opener, owner })
    }

    /// Opens and locks the file at `path`, an absolute path that the image names.
    ///
    /// # Errors
    /// The file cannot be opened, is in use, or is one that the image's owner could not open.
    pub(crate) async fn file(&self, path: &Path, writable: bool) -> Result<File, Failure> {
        let how = match writable {
            true => Use::Write,
            false => self.opener.reading,
        };
        let file = self.opener.file(path, how).await?;
        // The command line names these.
        let is_given = self.opener.moved.iter().any(|given| given == path);
        let Some(owner) = self.owner.as_ref().filter(|_| !is_given) else {
            return Ok(file);
        };
        let may = owner.may_open(&file, writable);
        let may = may.map_err(|error| {
            Failure::system(
                format!("cannot see who may open {}", path.display()),
                &error,
            )
        })?;
        match may {
            true => Ok(file),
            false => Err(owner.refused(path, writable)),
        }
    }
}

impl Files<File> for NamedFiles<'_> {
    async fn open(&self, path: &Path, writable: bool) -> Result<File, Failure> {
        self.file(path, writable).await
    }

    fn data_file(&self, name: &str, image: &Path) -> Result<PathBuf, Failure> {
        data_file(name, image)
    }

    fn places(&self, names: &[String], child: &Path) -> Vec<Result<PathBuf, Failure>> {
        parents(&self.opener.moved, names, child)
    }

    fn raw(&self, file: File) -> Disk {
        Disk::new(Raw::new(file, false))
    }
}

/// Returns the paths at which the parent of the image at `child` may be, the best first: of the files and folders in
/// `moved`, and of the names in the image.
pub(crate) fn parents(
    moved: &[PathBuf],
    names: &[String],
    child: &Path,
) -> Vec<Result<PathBuf, Failure>> {
    let is_named = |name: &str| names.iter().any(|other| file_name(other) == name);
    let (mut all, mut others) = (Vec::new(), Vec::new());
    for place in moved {
        let name = place.file_name().and_then(|name| name.to_str());
        if place.is_dir() {
            let inside = names.iter().map(|name| place.join(file_name(name)));
            all.extend(inside.filter(|path| path.exists()));
        } else if name.is_some_and(is_named) {
            all.push(place.clone());
        } else if place != child {
            // It was renamed, too, unless it is the parent of another image of the chain.
            others.push(place.clone());
        }
    }
    let named = names.iter().map(|name| resolve(name, child));
    let all = all.into_iter().map(Ok).chain(named);
    all.chain(others.into_iter().map(Ok)).collect()
}

/// The last part of a path, of Windows or of others.
fn file_name(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

/// Returns the path of the data file that the qcow2 image at `image` names. QEMU looks for a relative name in the
/// folder in which it was started, blktapctrl in that of the image: a file in either of them is found.
///
/// # Errors
/// There is one in both, and they differ.
pub(crate) fn data_file(name: &str, image: &Path) -> Result<PathBuf, Failure> {
    let beside = resolve(name, image)?;
    let plain = Path::new(name.strip_prefix("file:").unwrap_or(name));
    if plain.is_absolute() {
        return Ok(beside);
    }
    let looking =
        |error| Failure::system(format!("cannot look for the data file {name:?}"), &error);
    let here = std::path::absolute(plain).map_err(looking)?;
    match (
        identity(&beside).map_err(looking)?,
        identity(&here).map_err(looking)?,
    ) {
        (Some(one), Some(other)) if one != other => Err(Failure::new(
            Code::Image,
            format!(
                "it has its data in {name:?}, which is {} for QEMU and {} for blktapctrl: go to the folder of the \
                 image, or name one of them there with `qemu-img amend -o data_file=PATH IMAGE`",
                here.display(),
                beside.display()
            ),
        )),
        (None, Some(_)) => Ok(here),
        _ => Ok(beside),
    }
}

impl ImageOwner {
    /// Returns whether the owner, without further groups, could open a file that is open now, or blktapctrl would serve
    /// it below the image.
    fn may_open(&self, file: &File, writable: bool) -> io::Result<bool> {
        let (stat, path) = (fstat(file)?, place(file)?);
        let is_beside = path.parent() == self.image.parent() && !file.is_device();
        if is_beside && !writable && stat.st_mode & 0o222 == 0 {
            return Ok(true);
        }
        let wanted = match writable {
            true => READ | WRITE,
            false => READ,
        };
        if !self.has(stat.st_uid, stat.st_gid, stat.st_mode, wanted) {
            return Ok(false);
        }
        for folder in path.ancestors().skip(1) {
            let its: Metadata = fs::metadata(folder)?;
            if !self.has(its.uid(), its.gid(), its.mode(), SEARCH) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns whether the owner has all of the permissions `wanted`.
    fn has(&self, uid: u32, gid: u32, mode: u32, wanted: u32) -> bool {
        let granted = match (uid == self.uid, gid == self.gid) {
            (true, _) => mode >> 6,
            (false, true) => mode >> 3,
            (false, false) => mode,
        };
        granted & wanted == wanted
    }

    fn refused(&self, path: &Path, writable: bool) -> Failure {
        let what = match writable {
            true => "write",
            false => "read",
        };
        Failure::new(
            Code::Denied,
            format!(
                "the image names {}, which its owner (user {}) cannot {what}, and root would: if the image may have \
                 that file, say --follow",
                path.display(),
                self.uid
            ),
        )
    }
}

/// Path of an open file, without links.
fn place(file: &File) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::{ImageOwner, READ, SEARCH, WRITE};

    #[test]
    fn permissions_are_those_of_the_kernel() {
        let owner = ImageOwner {
            image: "/srv/a".into(),
            uid: 7,
            gid: 9,
        };
        for (uid, gid, mode, wanted, may) in [
            (7, 0, 0o600, READ | WRITE, true),
            (7, 0, 0o400, WRITE, false),
            // The first class that fits decides, as in the kernel.
            (7, 9, 0o077, READ, false),
            (0, 9, 0o640, READ, true),
            (0, 9, 0o604, READ, false),
            (0, 0, 0o640, READ, false),
            (0, 0, 0o644, READ, true),
            (0, 0, 0o644, READ | WRITE, false),
            (0, 0, 0o700, SEARCH, false),
            (0, 0, 0o711, SEARCH, true),
        ] {
            assert_eq!(
                owner.has(uid, gid, mode, wanted),
                may,
                "{uid} {gid} {mode:o}"
            );
        }
    }
}
