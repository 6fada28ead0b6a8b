// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a new image comes to be. A file has another name until it is whole, so that an interruption leaves no part of
//! an image under its name; a file that it replaces is there until then.

use crate::image_spec::ImageSpec;
use crate::open::{direct, identity, ImageOpener, Use};
use control::{Code, Failure, FrozenDevices};
use diskio::File;
use formats::{Below, ImageFormat};
use rustix::fs::{renameat_with, OFlags, RenameFlags, CWD};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{fchown, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Ending of the name of an image that is not whole.
const ENDING: &str = ".unfinished";
/// Bytes at the beginning and the end of a device that are cleared when what it holds is not whole: more than any
/// format, boot loader or table of partitions needs to be found by.
const CLEARED: u64 = 1 << 20;

/// An image that is being made.
#[derive(Debug)]
pub(crate) struct Target {
    image: ImageSpec,
    file: File,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// A file that gets its name at the end.
    File {
        unfinished: PathBuf,
        path: PathBuf,
        /// The file that has the name until then. No other program uses it.
        old: Option<File>,
    },
    /// A device, which has its name already.
    Device,
    /// The new image was kept or removed.
    Done,
}

impl Target {
    /// Makes room for an image where there is none, or with `force` where there is one that is not in use.
    pub(crate) async fn begin(
        opener: &ImageOpener,
        image: &ImageSpec,
        force: bool,
    ) -> Result<Self, Failure> {
        let path = &image.path;
        let looking = |error| Failure::system(format!("cannot look at {}", path.display()), &error);
        let is_there = identity(path).map_err(looking)?.is_some();
        if is_there && !force {
            return Err(Failure::new(
                Code::Exists,
                format!(
                    "{} is there already: choose another name, or --force, which loses what is in it",
                    path.display()
                ),
            ));
        }
        let image = image.clone();
        if !is_there {
            refuse_devices(path)?;
            let (file, unfinished) = unfinished(opener, path).await?;
            let place = Place::File {
                unfinished,
                path: path.clone(),
                old: None,
            };
            return Ok(Self { image, file, place });
        }
        let old = opener.file(path, Use::Write).await?;
        if old.is_device() {
            if let Some(record) = FrozenDevices::of_host().find(path, path, drop)? {
                return Err(record.refusal(path));
            }
            if let Below::Format(kind @ (ImageFormat::Qcow | ImageFormat::Vmdk)) = image.kind {
                return Err(Failure::invalid(format!(
                    "a {kind} image grows with its file, which {} is not: use aio, qcow2 or vhd there, or a file",
                    path.display()
                )));
            }
            let place = Place::Device;
            return Ok(Self {
                image,
                file: old,
                place,
            });
        }
        // The target of a symbolic link is replaced, not the link.
        let path = fs::canonicalize(path).map_err(looking)?;
        let (file, unfinished) = unfinished(opener, &path).await?;
        let place = Place::File {
            unfinished,
            path,
            old: Some(old),
        };
        let target = Self { image, file, place };
        target.inherit()?;
        Ok(target)
    }

    /// Returns the file or device of the new image.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Its content is not known to be zeroes.
    pub(crate) fn is_device(&self) -> bool {
        matches!(self.place, Place::Device)
    }

    /// The owner and the rights of the file that it replaces.
    fn inherit(&self) -> Result<(), Failure> {
        let Place::File {
            unfinished, path, ..
        } = &self.place
        else {
            return Ok(());
        };
        let work = || {
            let old = fs::metadata(path)?;
            let new = fs::metadata(unfinished)?;
            if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                fchown(&self.file, Some(old.uid()), Some(old.gid()))?;
            }
            fs::set_permissions(unfinished, old.permissions())
        };
        work().map_err(|error: io::Error| {
            let what = format!(
                "cannot give the new {} the owner and the rights of the old",
                path.display()
            );
            Failure::system(what, &error)
        })
    }

    /// The image is whole and durable, and from now on has its name. Returns its file.
    pub(crate) async fn keep(mut self) -> Result<File, Failure> {
        let image = self.image.clone();
        let failed = |error: io::Error| Failure::system(format!("cannot finish {image}"), &error);
        self.file
            .flush()
            .await
            .map_err(|error| failed(error.into()))?;
        if let Place::File {
            unfinished,
            path,
            old,
        } = &self.place
        {
            rename(unfinished, path, old.is_some()).map_err(failed)?;
            let folder = path.parent().unwrap_or(Path::new("/"));
            let folder = fs::File::open(folder).map_err(failed)?;
            folder.sync_all().map_err(failed)?;
        }
        self.place = Place::Done;
        Ok(self.file.clone())
    }

    /// The image will not become whole: takes away what there is. Says why, and what is left.
    pub(crate) async fn give_up(mut self, why: Failure) -> Failure {
        let place = std::mem::replace(&mut self.place, Place::Done);
        let (done, left) = match place {
            Place::File {
                unfinished, old, ..
            } => (
                fs::remove_file(&unfinished),
                match old {
                    None => format!("nothing was made at {}", self.image.path.display()),
                    Some(_) => format!("{} is as it was", self.image.path.display()),
                },
            ),
            Place::Device => (
                self.clear().await,
                format!(
                    "{} holds no disk now: its first and last bytes were cleared",
                    self.image.path.display()
                ),
            ),
            Place::Done => return why,
        };
        match done {
            Ok(()) => Failure::new(why.code, format!("{}; {left}", why.message)),
            Err(error) => Failure::new(
                why.code,
                format!(
                    "{}; the file {} is not whole and could not be taken away ({error}): do not use it",
                    why.message,
                    self.image.path.display()
                ),
            ),
        }
    }

    async fn clear(&self) -> io::Result<()> {
        let size = self.file.size()?;
        self.file.write_zeroes(0, size.min(CLEARED)).await?;
        // The last thing in a fixed VHD is what it is known by.
        let end = size.saturating_sub(CLEARED);
        self.file.write_zeroes(end, size - end).await?;
        Ok(self.file.flush().await?)
    }
}

impl Drop for Target {
    /// After a panic, say.
    fn drop(&mut self) {
        if let Place::File { unfinished, .. } = &self.place {
            if let Err(error) = fs::remove_file(unfinished) {
                diskio::say!("tapimg: cannot remove {}: {error}", unfinished.display());
            }
        }
    }
}

/// A name below /dev is that of a device, and a file there would fill the host's memory; /dev/shm is for files.
fn refuse_devices(path: &Path) -> Result<(), Failure> {
    let folder = path
        .parent()
        .and_then(|folder| fs::canonicalize(folder).ok());
    let is_of_devices =
        folder.is_some_and(|folder| folder.starts_with("/dev") && !folder.starts_with("/dev/shm"));
    match is_of_devices {
        true => Err(Failure::new(
            Code::NotFound,
            format!(
                "there is no device {}: make or attach it first",
                path.display()
            ),
        )),
        false => Ok(()),
    }
}

/// A new, empty file beside `path`, locked. One that was left by a process that was killed is used again.
async fn unfinished(opener: &ImageOpener, path: &Path) -> Result<(File, PathBuf), Failure> {
    let mut name = OsString::from(path);
    name.push(ENDING);
    let name = PathBuf::from(name);
    let failed =
        |error: io::Error| Failure::system(format!("cannot make {}", name.display()), &error);
    loop {
        let file = direct(OFlags::CLOEXEC | OFlags::NOFOLLOW, |flags| {
            fs::File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(flags)
                .open(&name)
        });
        let file = file.map_err(failed)?;
        let own = file.metadata().map_err(failed)?;
        let file = opener.locked(file, &name, Use::Write).await?;
        // The previous holder of the lock may have finished with the file.
        if identity(&name).map_err(failed)? == Some((own.dev(), own.ino())) {
            file.set_size(0)
                .await
                .map_err(|error| failed(error.into()))?;
            return Ok((file, name));
        }
    }
}

/// Renames a file, over another file only if `replaces` is set.
fn rename(from: &Path, to: &Path, replaces: bool) -> io::Result<()> {
    if replaces {
        return fs::rename(from, to);
    }
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system does not know that.
        Err(rustix::io::Errno::INVAL) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        result => Ok(result?),
    }
}
