// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file of a new image to which a disk is to switch. The supervisor makes it, empty, because a process can open
//! nothing; the process writes it.

use crate::image::{Identity, Image};
use control::{Code, Failure};
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
/// changes. True if that was done; it is not for a device.
///
/// # Errors
/// The system refuses to.
pub(crate) fn mark(image: &Image) -> Result<bool, Failure> {
    if !matches!(image.identity(), Identity::File { .. }) {
        return Ok(false);
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

/// Takes the mark away again, for who owns the image.
///
/// # Errors
/// The system refuses to.
pub(crate) fn unmark(image: &Image) -> Result<(), Failure> {
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
    use super::{keep, make, mark, remove, unmark};
    use crate::image::Image;
    use control::Code;
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
        assert_eq!(mark(&parent), Ok(true));
        assert_eq!(rights(&old), 0o440);
        assert!(parent.is_unwritable());
        assert_eq!(unmark(&parent), Ok(()));
        assert_eq!(rights(&old), 0o640);
        fs::remove_dir_all(dir).expect("remove");
    }
}
