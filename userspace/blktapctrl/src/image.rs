// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image of a disk: found once by its path, opened as often as processes need it.

use crate::blocking_io::{blocking_io, let_go, LIMIT};
use control::tapdisk::Open;
use control::{Code, Export, Failure};
use rustix::fs::{statx, AtFlags, FileType, Mode, OFlags, Stat, StatxFlags};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Identity of an image, whatever its name.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// A regular file.
    File {
        /// Device of its file system.
        dev: u64,
        /// Its number there.
        ino: u64,
    },
    /// A block device.
    Device {
        /// Its number.
        rdev: u64,
    },
    /// An export of a server.
    Export {
        /// Of its address: the same for the same one.
        digest: u64,
    },
}

impl Identity {
    fn file(stat: &Stat) -> Identity {
        Identity::File {
            dev: stat.st_dev,
            ino: stat.st_ino,
        }
    }

    /// FNV-1a, which the next supervisor has, too: two exports are taken for one if they have the same, and only
    /// one of them is served then.
    fn export(address: &str) -> Identity {
        let digest = address.bytes().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
            (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Identity::Export { digest }
    }
}

/// An image that exists. It is held by a descriptor that allows no I/O and counts for no lock, so
/// that the next process gets the same image, whatever its path leads to by then.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    /// Nothing for an export, of which only its server has something.
    held: Option<OwnedFd>,
    identity: Identity,
    born: Option<u64>,
    /// The permission bits of the file.
    permissions: u32,
}

/// An image that is open.
#[derive(Debug)]
pub struct Opened {
    /// The descriptor, which is the only one of its open file description until it is sent.
    fd: Option<OwnedFd>,
    /// I/O goes past the page cache.
    pub direct: bool,
}

impl Opened {
    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }
}

/// A file that is no image, through the page cache.
impl From<OwnedFd> for Opened {
    fn from(fd: OwnedFd) -> Self {
        Self {
            fd: Some(fd),
            direct: false,
        }
    }
}

/// Its file system may not answer when it is closed.
impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            let_go(fd);
        }
    }
}

impl Image {
    /// Finds the image at an absolute path.
    ///
    /// # Errors
    /// There is none, or it is neither a regular file nor a block device.
    pub fn find(path: &Path) -> Result<Image, Failure> {
        let (held, stat) = hold(path)?;
        let identity = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Identity::file(&stat),
            FileType::BlockDevice => Identity::Device { rdev: stat.st_rdev },
            _ => return Err(not_a(path, "neither a regular file nor a block device")),
        };
        Ok(Image {
            path: path.into(),
            born: born(&held),
            held: Some(held),
            identity,
            permissions: stat.st_mode & 0o7777,
        })
    }

    /// Finds the socket of a server, which is held as an image is.
    ///
    /// # Errors
    /// There is none.
    pub fn socket(path: &Path) -> Result<Image, Failure> {
        let (held, stat) = hold(path)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket => Ok(Image {
                path: path.into(),
                held: Some(held),
                identity: Identity::file(&stat),
                born: None,
                permissions: stat.st_mode & 0o7777,
            }),
            _ => Err(not_a(path, "no socket")),
        }
    }

    /// An export, whether or not its server is there. A socket has one address, whatever the name of its folder.
    ///
    /// # Errors
    /// There is no such folder.
    pub fn export(export: &Export) -> Result<Image, Failure> {
        let place = PathBuf::from(export.to_string());
        let address = match export.socket() {
            Some(socket) => real(socket)?,
            None => None,
        };
        let address = address.map_or(export.clone(), |socket| export.clone().at(socket));
        Ok(Image {
            identity: Identity::export(&address.to_string()),
            path: place,
            held: None,
            born: None,
            permissions: 0o600,
        })
    }

    /// Returns true if the disk is an export of a server.
    #[must_use]
    pub fn is_export(&self) -> bool {
        self.held.is_none()
    }

    /// Returns true if it is a block device.
    #[must_use]
    pub fn is_device(&self) -> bool {
        matches!(self.identity, Identity::Device { .. })
    }

    /// Returns its identity.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// When it was made, if its file system says: another file that has its number by now was made
    /// at another time.
    #[must_use]
    pub fn born(&self) -> Option<u64> {
        self.born
    }

    /// Whether this is the image of a record: identity and birth agree.
    #[must_use]
    pub fn is(&self, identity: Option<Identity>, born: Option<u64>) -> bool {
        let same_age = self.born.is_none() || born.is_none() || self.born == born;
        identity == Some(self.identity) && same_age
    }

    /// Returns this image for writing although its mode forbids that.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn in_spite_of_its_mark(&self) -> Result<Image, Failure> {
        let again = self.held.as_ref().map(OwnedFd::try_clone).transpose();
        let held = again.map_err(|error| {
            Failure::system(format!("cannot hold {}", self.path.display()), &error)
        })?;
        Ok(Image {
            path: self.path.clone(),
            held,
            permissions: self.permissions | 0o200,
            ..*self
        })
    }

    /// Where it was found.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it really is: its path without links.
    ///
    /// # Errors
    /// The system does not say.
    pub fn place(&self) -> Result<PathBuf, Failure> {
        if self.is_export() {
            return Ok(self.path.clone());
        }
        std::fs::read_link(self.again()).map_err(|error| {
            Failure::system(
                format!("cannot see where {} is", self.path.display()),
                &error,
            )
        })
    }

    /// Whether it is a regular file whose mode has no write permission. It is looked at again each time.
    #[must_use]
    pub fn is_unwritable(&self) -> bool {
        let Some(held) = &self.held else {
            return false;
        };
        let mode = rustix::fs::fstat(held).map(|stat| stat.st_mode);
        matches!(self.identity, Identity::File { .. }) && mode.is_ok_and(|mode| mode & 0o222 == 0)
    }

    /// A path that leads to it and to nothing else, as long as it is held. To an export no path leads.
    #[must_use]
    pub fn again(&self) -> String {
        match &self.held {
            Some(held) => format!("/proc/self/fd/{}", held.as_raw_fd()),
            None => self.path.display().to_string(),
        }
    }

    /// Whether it is a block device that dom0's kernel has claimed for a file system, an array, a volume group or swap.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn is_promised(&self) -> Result<bool, Failure> {
        if !self.is_device() {
            return Ok(false);
        }
        let again = self.again();
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        match rustix::fs::open(&*again, flags, Mode::empty()) {
            Ok(_) => Ok(false),
            Err(rustix::io::Errno::BUSY) => Ok(true),
            Err(error) => Err(refused("cannot open the image", &self.path, error)),
        }
    }

    /// The number of the mount through which it was found.
    #[must_use]
    pub fn mount(&self) -> Option<u64> {
        let info = format!("/proc/self/fdinfo/{}", self.held.as_ref()?.as_raw_fd());
        let text = std::fs::read_to_string(info).ok()?;
        let number = text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
        number.trim().parse().ok()
    }

    /// Opens it once more; without the page cache if `direct` and if its file system can. An export is nothing that
    /// could be opened: its process asks for a connection.
    ///
    /// # Errors
    /// The system refuses to, or the file has no write permission.
    pub fn open(&self, write: bool, direct: bool) -> Result<Opened, Failure> {
        // Root may write it all the same: whoever removed the permission did not want that.
        if write && self.permissions & 0o222 == 0 {
            return Err(Failure::new(
                Code::Denied,
                format!(
                    "{0} is read-only: use the mode r, or, if it is no backing image (after a snapshot the \
                     new image is to be served), allow writing: `chmod u+w {0}`",
                    self.path.display()
                ),
            ));
        }
        if self.is_export() {
            let (fd, direct) = (None, true);
            return Ok(Opened { fd, direct });
        }
        let again = self.again();
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = access | OFlags::CLOEXEC;
        let open = |flags| rustix::fs::open(&*again, flags, Mode::empty());
        let (result, direct) = match open(flags | OFlags::DIRECT) {
            // Such as tmpfs of old kernels, or some network file systems.
            Err(rustix::io::Errno::INVAL) if direct => (open(flags), false),
            _ if !direct => (open(flags), false),
            result => (result, true),
        };
        let fd = result.map_err(|error| refused("cannot open the image", &self.path, error))?;
        let fd = Some(fd);
        Ok(Opened { fd, direct })
    }
}

/// Holds what is at a path.
fn hold(path: &Path) -> Result<(OwnedFd, Stat), Failure> {
    let held = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| refused("cannot find the image", path, error))?;
    let stat = rustix::fs::fstat(&held)
        .map_err(|error| refused("cannot look at the image", path, error))?;
    Ok((held, stat))
}

fn not_a(path: &Path, what: &str) -> Failure {
    Failure::new(Code::Image, format!("{} is {what}", path.display()))
}

/// Finds the image at a path, on a thread of its own, so that no other work waits for its file system.
///
/// # Errors
/// There is none, or the file system does not answer.
pub async fn find(path: &Path) -> Result<Arc<Image>, Failure> {
    let place = path.to_path_buf();
    let image = blocking_io(path, LIMIT, move || Image::find(&place)).await?;
    Ok(Arc::new(image))
}

/// Finds the image of a target, if its driver has one, or the export.
///
/// # Errors
/// There is none at the path.
pub async fn of(open: &Open) -> Result<Option<Arc<Image>>, Failure> {
    match (open.target.path(), open.target.export()) {
        (Some(path), _) => find(path).await.map(Some),
        (None, Some(export)) => {
            let wanted = export.clone();
            let place = export.socket().unwrap_or(Path::new("/"));
            let image = blocking_io(place, LIMIT, move || Image::export(&wanted)).await?;
            Ok(Some(Arc::new(image)))
        }
        (None, None) => Ok(None),
    }
}

/// Where a socket is, or would be, without links in the names of its folders.
fn real(socket: &Path) -> Result<Option<PathBuf>, Failure> {
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Ok(None);
    };
    // A link leads to the socket of another name.
    if let Ok(place) = std::fs::canonicalize(socket) {
        return Ok(Some(place));
    }
    let folder = std::fs::canonicalize(folder).map_err(|error| {
        Failure::system(
            format!("cannot find the folder of the socket {}", socket.display()),
            &error,
        )
    })?;
    Ok(Some(folder.join(name)))
}

/// Another image is where that of a disk was.
pub fn not_the_same(image: &Image) -> Failure {
    Failure::new(
        Code::Image,
        format!(
            "{} is not the image any more that is served: put that back, or destroy the disk",
            image.path().display()
        ),
    )
}

/// When a regular file was made, in nanoseconds since 1970.
fn born(file: &OwnedFd) -> Option<u64> {
    let wanted = StatxFlags::BTIME | StatxFlags::TYPE;
    let said = statx(file, "", AtFlags::EMPTY_PATH, wanted).ok()?;
    let is_file = FileType::from_raw_mode(said.stx_mode.into()) == FileType::RegularFile;
    if !is_file || said.stx_mask & StatxFlags::BTIME.bits() == 0 {
        return None;
    }
    let seconds = u64::try_from(said.stx_btime.tv_sec).ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(said.stx_btime.tv_nsec.into())
}

fn refused(what: &str, path: &Path, error: rustix::io::Errno) -> Failure {
    Failure::system(format!("{what} {}", path.display()), &error.into())
}

#[cfg(test)]
mod tests {
    use super::{Image, Opened};
    use control::Code;
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::PathBuf;

    fn folder(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("image-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder");
        dir
    }

    fn file(opened: &Opened) -> fs::File {
        let fd = opened.fd().expect("a descriptor");
        fd.try_clone_to_owned().expect("another one").into()
    }

    #[test]
    fn the_same_image_is_opened_though_another_one_took_its_place() {
        let dir = folder("replaced");
        let path = dir.join("a.img");
        fs::write(&path, b"first").expect("write");
        let image = Image::find(&path).expect("an image");
        fs::rename(&path, dir.join("b.img")).expect("rename");
        fs::write(&path, b"second").expect("write");
        let mut file = file(&image.open(true, false).expect("open"));
        file.write_all(b"FIRST").expect("write");
        assert_eq!(fs::read(dir.join("b.img")).expect("read"), b"FIRST");
        assert_eq!(fs::read(&path).expect("read"), b"second");
        assert_ne!(
            Image::find(&path).expect("an image").identity(),
            image.identity()
        );
        fs::remove_dir_all(dir).expect("remove");
    }

    #[test]
    fn a_file_that_got_the_number_of_another_is_not_taken_for_it() {
        let dir = folder("born");
        let path = dir.join("a.img");
        fs::write(&path, b"x").expect("write");
        let image = Image::find(&path).expect("an image");
        let (identity, born) = (Some(image.identity()), image.born());
        let born = born.expect("the file system of the tests knows when a file was made");
        assert!(image.is(identity, Some(born)));
        assert!(!image.is(identity, Some(born - 1)));
        assert!(!image.is(None, Some(born)));
        // Written by a supervisor that did not look.
        assert!(image.is(identity, None));
        fs::remove_dir_all(dir).expect("remove");
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let dir = folder("kinds");
        assert_eq!(Image::find(&dir).expect_err("a folder").code, Code::Image);
        let null = Image::find("/dev/null".as_ref()).expect_err("a character device");
        assert_eq!(null.code, Code::Image);
        let none = Image::find(&dir.join("none")).expect_err("nothing");
        assert_eq!(none.code, Code::NotFound);
        assert!(none.message.contains("none"), "{none}");
        fs::remove_dir_all(dir).expect("remove");
    }

    #[test]
    fn read_only_file_is_not_written_by_root_either() {
        let dir = folder("read-only");
        let path = dir.join("a.img");
        fs::write(&path, b"x").expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).expect("chmod");
        let image = Image::find(&path).expect("an image");
        assert_eq!(
            image.open(true, false).expect_err("refused").code,
            Code::Denied
        );
        let file = file(&image.open(false, false).expect("open"));
        assert_eq!(file.metadata().expect("stat").size(), 1);
        fs::remove_dir_all(dir).expect("remove");
    }
}
