// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices that became backing images, which no tap disk may write any more.
//!
//! A snapshot removes the write permission of a file that becomes a backing image, because the image over it is useless
//! as soon as it changes. A device has no permission that would outlive a reboot of the host, so a record says it
//! instead, in a folder of the host. `blktapctrl` makes a record and gives no disk a device for writing that has one;
//! it removes the record when the device becomes the disk again. An administrator removes it like any other file.

use crate::{Code, Failure};
use rustix::fs::{major, minor, stat, FileType, Stat};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The folder of the host.
const HOST_FOLDER: &str = "/var/lib/xentap/frozen";
/// Extension of a record.
const EXTENSION: &str = "json";
/// Characters of a record's name that come from the device's path; a path may be longer than a file name.
const LONGEST_STEM: usize = 200;
/// Records of different devices that may have one stem.
const SAME_STEM: u32 = 99;

/// Record of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenDevice {
    /// Its path, as the disk's configuration named it.
    pub path: PathBuf,
    /// UUID of a device-mapper device, such as a logical volume, which stays when the device gets another name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Target that has the newer writes of the guest.
    pub instead: String,
}

/// A record and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenRecord {
    /// Its file.
    pub file: PathBuf,
    /// Its content.
    pub device: FrozenDevice,
}

impl FrozenRecord {
    /// Returns the refusal for a disk that would write the device at `path`.
    #[must_use]
    pub fn refusal(&self, path: &Path) -> Failure {
        Failure::new(
            Code::Denied,
            format!(
                "no tap disk may write {}: the guest's newer writes are in {}, which is useless once this device changes. Name \
                 that in the disk's configuration, use the mode r, or, if nothing needs this content any more, allow \
                 writing: `rm {}`",
                path.display(),
                self.device.instead,
                self.file.display()
            ),
        )
    }
}

/// Reason why no tap disk may write an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageMark {
    /// The image is a file without write permission.
    Permission,
    /// The image is a device with this record.
    Record(FrozenRecord),
}

/// The records of a host. Its methods read and write files, so they may sleep for as long as that file system does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenDevices {
    folder: PathBuf,
}

/// A block device, as the system knows it now.
struct PresentDevice {
    rdev: u64,
    uuid: Option<String>,
}

impl PresentDevice {
    /// Looks at a path. Nothing if it leads to no block device.
    fn at(path: &Path) -> io::Result<Option<PresentDevice>> {
        let stat = stat(path)?;
        if !is_device(&stat) {
            return Ok(None);
        }
        let (major, minor) = (major(stat.st_rdev), minor(stat.st_rdev));
        let uuid = match fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/dm/uuid")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            read => Some(read?.trim().to_owned()).filter(|uuid| !uuid.is_empty()),
        };
        Ok(Some(PresentDevice {
            rdev: stat.st_rdev,
            uuid,
        }))
    }

    /// Whether a record is this device's. One that is made anew under the old name has another UUID.
    fn is(&self, frozen: &FrozenDevice) -> bool {
        match &frozen.uuid {
            Some(uuid) => self.uuid.as_ref() == Some(uuid),
            None => {
                stat(&frozen.path).is_ok_and(|stat| is_device(&stat) && stat.st_rdev == self.rdev)
            }
        }
    }
}

fn is_device(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice
}

impl FrozenDevices {
    /// The records of this host.
    #[must_use]
    pub fn of_host() -> FrozenDevices {
        FrozenDevices::at(HOST_FOLDER)
    }

    /// The records in another folder.
    #[must_use]
    pub fn at(folder: impl Into<PathBuf>) -> FrozenDevices {
        FrozenDevices {
            folder: folder.into(),
        }
    }

    /// The folder, which may be missing.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Finds the record of a device. `path` is its name in a configuration, and `device` leads to it, such as a path in
    /// `/proc/self/fd`. `unread` learns of records of other devices that cannot be read.
    ///
    /// # Errors
    /// The folder or the device cannot be looked at, or a record cannot be read whose name is that of `path`.
    pub fn find(
        &self,
        path: &Path,
        device: &Path,
        mut unread: impl FnMut(Failure),
    ) -> Result<Option<FrozenRecord>, Failure> {
        let Some(present) = PresentDevice::at(device).map_err(|error| unseen(path, &error))? else {
            return Ok(None);
        };
        let stem = stem(path);
        for file in self.files()? {
            match read(&file) {
                Ok(Some(device)) if present.is(&device) => {
                    return Ok(Some(FrozenRecord { file, device }))
                }
                Ok(_) => {}
                Err(failure) if is_named(&file, &stem) => return Err(failure),
                Err(failure) => unread(failure),
            }
        }
        Ok(None)
    }

    /// Returns the mark of an image, a file or a device, if it has one; `place` leads to it.
    ///
    /// # Errors
    /// The image cannot be looked at, or see [`find`](Self::find).
    pub fn mark(&self, path: &Path, place: &Path) -> Result<Option<ImageMark>, Failure> {
        let data = fs::metadata(place).map_err(|error| unseen(path, &error))?;
        if data.file_type().is_block_device() {
            let record = self.find(path, place, drop)?;
            return Ok(record.map(ImageMark::Record));
        }
        let is_marked = data.is_file() && data.permissions().mode() & 0o222 == 0;
        Ok(is_marked.then_some(ImageMark::Permission))
    }

    /// Makes the record of a device durable; `instead` is the target that has newer writes. False if `device` leads to
    /// no block device.
    ///
    /// # Errors
    /// The system refuses to, or see [`find`](Self::find).
    pub fn add(&self, path: &Path, device: &Path, instead: &str) -> Result<bool, Failure> {
        let Some(present) = PresentDevice::at(device).map_err(|error| unseen(path, &error))? else {
            return Ok(false);
        };
        let frozen = FrozenDevice {
            path: path.into(),
            uuid: present.uuid.clone(),
            instead: instead.into(),
        };
        let file = match self.find(path, device, drop)? {
            Some(known) => known.file,
            None => self.free_name(path)?,
        };
        self.write(&file, &frozen).map_err(|error| {
            Failure::system(
                format!(
                    "cannot write {}, which would protect {}",
                    file.display(),
                    path.display()
                ),
                &error,
            )
        })?;
        Ok(true)
    }

    /// Removes the record of a device, if there is one, and makes that durable.
    ///
    /// # Errors
    /// The system refuses to, or see [`find`](Self::find).
    pub fn remove(&self, path: &Path, device: &Path) -> Result<(), Failure> {
        let Some(known) = self.find(path, device, drop)? else {
            return Ok(());
        };
        let removed = fs::remove_file(&known.file).and_then(|()| sync_folder(&self.folder));
        removed.map_err(|error| {
            Failure::system(format!("cannot remove {}", known.file.display()), &error)
        })
    }

    fn files(&self) -> Result<Vec<PathBuf>, Failure> {
        let found = || -> io::Result<Vec<PathBuf>> {
            let mut files = Vec::new();
            for entry in fs::read_dir(&self.folder)? {
                let path = entry?.path();
                if path.extension().is_some_and(|its| its == EXTENSION) {
                    files.push(path);
                }
            }
            files.sort();
            Ok(files)
        };
        match found() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            found => found.map_err(|error| {
                let folder = self.folder.display();
                Failure::system(
                    format!("cannot see in {folder} which devices no tap disk may write"),
                    &error,
                )
            }),
        }
    }

    /// A name that no record has.
    fn free_name(&self, path: &Path) -> Result<PathBuf, Failure> {
        let stem = stem(path);
        let names = (1..=SAME_STEM).map(|number| match number {
            1 => format!("{stem}.{EXTENSION}"),
            number => format!("{stem}-{number}.{EXTENSION}"),
        });
        let mut files = names.map(|name| self.folder.join(name));
        let free = files.find(|file| matches!(fs::symlink_metadata(file), Err(error) if error.kind() == io::ErrorKind::NotFound));
        free.ok_or_else(|| {
            let folder = self.folder.display();
            Failure::new(
                Code::Exists,
                format!("{folder} has {SAME_STEM} records named {stem}: remove those of devices that are gone"),
            )
        })
    }

    fn write(&self, file: &Path, frozen: &FrozenDevice) -> io::Result<()> {
        // Readable for all, because a user other than root may run tapimg.
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.folder);
        made?;
        let beside = file.with_extension("new");
        let mut new = File::options()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o644)
            .open(&beside)?;
        let mut text = serde_json::to_vec_pretty(frozen)?;
        text.push(b'\n');
        let written = new
            .write_all(&text)
            .and_then(|()| new.sync_all())
            .and_then(|()| fs::rename(&beside, file));
        if let Err(error) = written {
            // A partial file takes room, which may be what is missing; the next attempt writes over it in any case.
            let _ = fs::remove_file(&beside);
            return Err(error);
        }
        sync_folder(&self.folder)?;
        // The folder itself may be new.
        self.folder.parent().map_or(Ok(()), sync_folder)
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn unseen(path: &Path, error: &io::Error) -> Failure {
    Failure::system(format!("cannot look at {}", path.display()), error)
}

/// Reads a record. Nothing if it was removed meanwhile.
fn read(file: &Path) -> Result<Option<FrozenDevice>, Failure> {
    let read = match fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.and_then(|text| Ok(serde_json::from_slice(&text)?)),
    };
    read.map(Some).map_err(|error| {
        let file = file.display();
        Failure::new(
            Code::Denied,
            format!(
                "cannot read {file}, which keeps tap disks from writing a device ({error}): if nothing needs its content \
                 any more, `rm {file}`"
            ),
        )
    })
}

/// Name of the record of a device that is at `path`, without number and extension.
fn stem(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |letter: char| match letter {
        '.' | '_' | '+' => letter,
        letter if letter.is_ascii_alphanumeric() => letter,
        _ => '-',
    };
    let name: String = text.trim_matches('/').chars().map(plain).collect();
    name.chars().take(LONGEST_STEM).collect()
}

/// Whether a record has a name that [`FrozenDevices::free_name`] gives for a stem.
fn is_named(file: &Path, stem: &str) -> bool {
    let name = file.file_stem().and_then(|name| name.to_str());
    let rest = name.and_then(|name| name.strip_prefix(stem));
    rest.is_some_and(|rest| {
        let number = rest.strip_prefix('-').unwrap_or(rest);
        number.is_empty() || number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests;
