// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the kernel shows what it does, and what a name leads to there.

use crate::image::Identity;
use rustix::fs::{makedev, stat, FileType};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the kernel shows what it does.
#[derive(Clone, Debug)]
pub(super) struct KernelViews {
    /// `/proc`.
    pub(super) proc: PathBuf,
    /// `/sys`.
    pub(super) sys: PathBuf,
}

impl Default for KernelViews {
    fn default() -> Self {
        KernelViews {
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }
}

impl KernelViews {
    /// The directory of a block device.
    pub(super) fn device(&self, rdev: u64) -> PathBuf {
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        self.sys.join(format!("dev/block/{major}:{minor}"))
    }
}

/// Longest wait for the file system of an image of another user.
pub(super) const GLANCE: Duration = Duration::from_secs(5);

/// Returns the identity of the file at a path, if it can be an image.
pub(super) fn identity(path: &Path) -> Option<Identity> {
    let stat = stat(path).ok()?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Some(Identity::File {
            dev: stat.st_dev,
            ino: stat.st_ino,
        }),
        FileType::BlockDevice => Some(Identity::Device { rdev: stat.st_rdev }),
        _ => None,
    }
}

/// A device node below `/dev`, which is in memory and always answers.
pub(super) fn device_node(path: &Path) -> Option<u64> {
    match identity(path.starts_with("/dev").then_some(path)?)? {
        Identity::Device { rdev } => Some(rdev),
        Identity::File { .. } | Identity::Export { .. } => None,
    }
}

/// The number in the directory of a device.
pub(super) fn number_in(place: &Path) -> Option<u64> {
    device_number(fs::read_to_string(place.join("dev")).ok()?.trim(), 10)
}

/// `MAJOR:MINOR`.
pub(super) fn device_number(text: &str, radix: u32) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let part = |text| u32::from_str_radix(text, radix).ok();
    Some(makedev(part(major)?, part(minor)?))
}

/// The names in a folder; none if there is no such folder.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let name = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
    entries.filter_map(name).collect()
}

/// A path as the kernel's lists write it: white space and backslashes are octal.
pub(super) fn plain(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&bytes))
}

/// A kernel that is a folder, for the tests of who reads what it shows.
#[cfg(test)]
pub(super) mod pretended {
    use super::KernelViews;
    use std::fs;
    use std::os::unix::fs::{symlink, MetadataExt};
    use std::path::PathBuf;

    /// Views of a kernel that is a folder.
    pub(crate) fn views(name: &str) -> (PathBuf, KernelViews) {
        let dir = std::env::temp_dir().join(format!("users-{}-{name}", std::process::id()));
        let views = KernelViews {
            proc: dir.join("proc"),
            sys: dir.join("sys"),
        };
        fs::create_dir_all(views.sys.join("block")).expect("folders");
        fs::create_dir_all(views.sys.join("dev/block")).expect("folders");
        fs::create_dir_all(views.proc.join("self")).expect("folders");
        (dir, views)
    }

    /// A device of that kernel.
    pub(crate) fn device(views: &KernelViews, place: &str, number: &str) -> PathBuf {
        let place = views.sys.join(place);
        fs::create_dir_all(place.join("holders")).expect("folders");
        fs::write(place.join("dev"), format!("{number}\n")).expect("write");
        symlink(&place, views.sys.join("dev/block").join(number)).expect("a link");
        place
    }

    pub(crate) fn some_block_device() -> Option<(PathBuf, u64)> {
        use std::os::unix::fs::FileTypeExt;
        let mut entries = fs::read_dir("/dev").ok()?.filter_map(Result::ok);
        entries.find_map(|entry| {
            let data = entry.metadata().ok()?;
            data.file_type()
                .is_block_device()
                .then(|| (entry.path(), data.rdev()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{device_number, plain};
    use rustix::fs::makedev;
    use std::path::Path;

    #[test]
    fn names_and_numbers_are_read_as_the_kernel_writes_them() {
        assert_eq!(plain("/a\\134\\011b\\x"), Path::new("/a\\\tb\\x"));
        assert_eq!(device_number("fd:1a", 16), Some(makedev(0xfd, 0x1a)));
        assert_eq!(device_number("fd", 16), None);
    }
}
