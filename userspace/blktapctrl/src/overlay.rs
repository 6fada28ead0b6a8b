// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file of a new image to which a disk is to switch. The supervisor makes it, empty, because a process can open
//! nothing; the process writes it.

use crate::image::{Identity, Image};
use crate::log::{tell, LogContext};
use control::{Code, Failure, FrozenDevices};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{fchown, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Permission bits of a file that is data.
const RIGHTS: u32 = 0o666;

/// Makes the file, where nothing is, with the owner and the permissions of its future backing image.
///
/// # Errors
/// Something has the name, or the system refuses to.
pub(crate) fn make(path: &Path, parent: &Image) -> Result<Image, Failure> {
    let failed =
        |error: io::Error| Failure::system(format!("cannot make {}", path.display()), &error);
    let made = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let why = format!(
                "{} is there already, and nothing of it is lost: choose another name",
                path.display()
            );
            return Err(Failure::new(Code::Exists, why));
        }
        made => made.map_err(failed)?,
    };
    let dressed = dress(&file, parent)
        .map_err(failed)
        .and_then(|()| Image::find(path));
    if dressed.is_err() {
        // The new image is ours, and no record names it.
        let _ = fs::remove_file(path);
    }
    dressed
}

fn dress(file: &File, parent: &Image) -> io::Result<()> {
    // A device's rights are those of all devices.
    if !matches!(parent.identity(), Identity::File { .. }) {
        return Ok(());
    }
    let (old, new) = (fs::metadata(parent.again())?, file.metadata()?);
    if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
        fchown(file, Some(old.uid()), Some(old.gid()))?;
    }
    let rights = old.permissions().mode() & RIGHTS;
    file.set_permissions(PermissionsExt::from_mode(rights))
}

/// Makes the name of a file durable, as its content is.
///
/// # Errors
/// The system refuses to.
pub(crate) fn keep(path: &Path) -> Result<(), Failure> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let kept = File::open(folder).and_then(|folder| folder.sync_all());
    kept.map_err(|error| {
        Failure::system(format!("cannot make {} durable", folder.display()), &error)
    })
}

/// Removes the file, if it is the one that was made and not another one.
///
/// # Errors
/// The system refuses to.
pub(crate) fn remove(
    path: &Path,
    identity: Option<Identity>,
    born: Option<u64>,
) -> Result<(), Failure> {
    match Image::find(path) {
        Ok(image) if image.is(identity, born) => fs::remove_file(path)
            .map_err(|error| Failure::system(format!("cannot remove {}", path.display()), &error)),
        _ => Ok(()),
    }
}

/// Removes the write permission of an image that is a backing image, because the image above is corrupt as soon as it
/// changes. A device gets a record in its place, with the target `instead` that has the newer writes. True if that was
/// done; it is not for an export.
///
/// # Errors
/// The system refuses to.
pub(crate) fn freeze(
    image: &Image,
    records: &FrozenDevices,
    instead: &str,
) -> Result<bool, Failure> {
    match image.identity() {
        Identity::File { .. } => {}
        Identity::Device { .. } => {
            return records.add(image.path(), image.again().as_ref(), instead)
        }
        Identity::Export { .. } => return Ok(false),
    }
    let mark = || {
        let place = image.again();
        let rights = fs::metadata(&place)?.permissions().mode() & !0o222;
        fs::set_permissions(&place, PermissionsExt::from_mode(rights & 0o7777))
    };
    let marked = mark();
    marked.map_err(|error| {
        let path = image.path().display();
        Failure::system(
            format!("cannot remove the write permission of {path} (chmod a-w)"),
            &error,
        )
    })?;
    Ok(true)
}

/// Returns whether the image is marked.
///
/// # Errors
/// The records of devices cannot be read.
pub(crate) fn is_frozen(image: &Image, records: &FrozenDevices) -> Result<bool, Failure> {
    match image.identity() {
        Identity::Device { .. } => {
            let found = records.find(image.path(), image.again().as_ref(), drop)?;
            Ok(found.is_some())
        }
        _ => Ok(image.is_unwritable()),
    }
}

/// Refuses a device that a disk would write, and that is marked. A file says it itself when it is opened.
///
/// # Errors
/// The device is marked, or its record cannot be read.
pub(crate) fn check_not_frozen(image: &Image, records: &FrozenDevices) -> Result<(), Failure> {
    let unread = |failure: Failure| {
        tell!(warn, LogContext::default().failed(&failure), "{failure}");
    };
    match records.find(image.path(), image.again().as_ref(), unread)? {
        None => Ok(()),
        Some(record) => Err(record.refusal(image.path())),
    }
}

/// Removes the mark again, because the image becomes a disk.
///
/// # Errors
/// The system refuses to.
pub(crate) fn thaw(image: &Image, records: &FrozenDevices) -> Result<(), Failure> {
    if matches!(image.identity(), Identity::Device { .. }) {
        return records.remove(image.path(), image.again().as_ref());
    }
    let unmark = || {
        let place = image.again();
        let rights = fs::metadata(&place)?.permissions().mode() | 0o200;
        fs::set_permissions(&place, PermissionsExt::from_mode(rights & 0o7777))
    };
    let unmarked = unmark();
    unmarked.map_err(|error| {
        let path = image.path().display();
        Failure::system(format!("cannot mark {path} as writable"), &error)
    })
}

#[cfg(test)]
mod tests {
    use super::{freeze, is_frozen, keep, make, remove, thaw};
    use crate::image::Image;
    use control::{Code, FrozenDevices};
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_made_where_nothing_is_and_only_that_is_removed() {
        let dir = std::env::temp_dir().join(format!("overlay-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder");
        let (old, new) = (dir.join("a.img"), dir.join("b.qcow2"));
        fs::write(&old, "A").expect("write");
        fs::set_permissions(&old, fs::Permissions::from_mode(0o640)).expect("chmod");
        let parent = Image::find(&old).expect("an image");
        let made = make(&new, &parent).expect("a file");
        let rights = |path| fs::metadata(path).expect("stat").permissions().mode() & 0o7777;
        assert_eq!(rights(&new), 0o640);
        keep(&new).expect("durable");
        assert_eq!(make(&new, &parent).expect_err("taken").code, Code::Exists);
        std::os::unix::fs::symlink("nowhere", dir.join("link")).expect("a link");
        assert_eq!(
            make(&dir.join("link"), &parent).expect_err("taken").code,
            Code::Exists
        );
        // The image of another owner.
        remove(&old, Some(made.identity()), made.born()).expect("left alone");
        assert!(old.exists());
        remove(&new, Some(made.identity()), made.born()).expect("removed");
        assert!(!new.exists());
        remove(&new, Some(made.identity()), made.born()).expect("twice");
        let records = FrozenDevices::at(dir.join("frozen"));
        assert_eq!(is_frozen(&parent, &records), Ok(false));
        assert_eq!(freeze(&parent, &records, "qcow2:/srv/b.qcow2"), Ok(true));
        assert_eq!(rights(&old), 0o440);
        assert_eq!(is_frozen(&parent, &records), Ok(true));
        assert_eq!(thaw(&parent, &records), Ok(()));
        assert_eq!(rights(&old), 0o640);
        assert!(!records.folder().exists());
        fs::remove_dir_all(dir).expect("remove");
    }
}
