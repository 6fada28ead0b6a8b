// SPDX-License-Identifier: MIT OR Apache-2.0
//! From the name of an image to a disk, with all that lies below it, locked.

use crate::follow::NamedFiles;
use crate::image_spec::ImageSpec;
use crate::ova::ArchiveMember;
use crate::walk::BUFFERS;
use control::{Code, Failure};
use diskio::{Engine, Errno, File, Io, LockKind, Runtime};
use drivers::{lock, Disk, DiskInfo, Raw};
use formats::vmdk::Vmdk;
use formats::{open_chain, Below, ImageFormat, ImageParts, Options};
use rustix::fs::{fadvise, Advice, OFlags};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Use of a file, which decides how it is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Others may read it, too.
    Read,
    /// No other program may use it.
    Write,
    /// The image is only read, whatever other processes do with it.
    Look,
}

/// Opens images.
#[derive(Clone, Debug)]
pub(crate) struct ImageOpener {
    pub(crate) io: Io,
    /// How what is only read is opened: [`Use::Read`] or [`Use::Look`].
    pub(crate) reading: Use,
    /// Kind of a parent whose child does not name it.
    pub(crate) parents: Option<Below>,
    /// Images over each other at most.
    pub(crate) layers: usize,
    /// Files and folders with parents that are not where their children say.
    pub(crate) moved: Rc<[PathBuf]>,
    /// Files that images name are opened, whoever could read them.
    pub(crate) follow: bool,
}

/// Images over each other at most: more than a disk that is served may have, because what is too long for that is
/// made shorter here.
pub(crate) const DEEPEST: usize = 256;
/// Threads for what would keep the others waiting, such as to unpack clusters.
const HELPERS: usize = 2;

/// Makes I/O as quick as it can be here.
fn select_engine(io: &Io) {
    for engine in [Engine::Uring, Engine::Aio] {
        if io.select(engine).is_ok() {
            return;
        }
    }
    // One call after the other, which always works.
}

/// An error of a disk.
pub(crate) fn failed(what: &str, image: &ImageSpec, offset: u64, error: Errno) -> Failure {
    let remedy = match error {
        Errno::NOSPC | Errno::DQUOT => ": make room, then begin again",
        _ => "",
    };
    Failure::system(
        format!("cannot {what} {image} at byte {offset}"),
        &error.into(),
    )
    .with(remedy)
}

/// A failure with more words.
pub(crate) trait With {
    fn with(self, words: &str) -> Self;
}

impl With for Failure {
    fn with(self, words: &str) -> Self {
        Failure::new(self.code, self.message + words)
    }
}

impl ImageOpener {
    /// Begins to do I/O on this thread, and with helpers.
    pub(crate) fn start(
        runtime: &Runtime,
        reading: Use,
        parents: Option<Below>,
    ) -> Result<Self, Failure> {
        let io = runtime.io.clone();
        let starting = |error| Failure::system("cannot start", &error);
        io.start_helpers(HELPERS).map_err(starting)?;
        io.keep_buffers(BUFFERS);
        select_engine(&io);
        Ok(Self {
            io,
            reading,
            parents,
            layers: DEEPEST,
            moved: Rc::new([]),
            follow: false,
        })
    }

    /// The file at `path`, locked.
    pub(crate) async fn file(&self, path: &Path, how: Use) -> Result<File, Failure> {
        let file = match how {
            Use::Write => open_file(path, how, true)?,
            Use::Read | Use::Look => open_cached(path, how)?,
        };
        self.locked(file, path, how).await
    }

    /// A file that was opened, locked.
    pub(crate) async fn locked(
        &self,
        file: fs::File,
        path: &Path,
        how: Use,
    ) -> Result<File, Failure> {
        let tried = |what: &str, error: &io::Error| {
            Failure::system(format!("cannot {what} {}", path.display()), error)
        };
        let file = File::new(&self.io, file.into()).map_err(|error| tried("use", &error))?;
        let kind = match how {
            Use::Look => return Ok(file),
            Use::Read => LockKind::Read,
            Use::Write => LockKind::Write,
        };
        match lock(&file, kind).await {
            Ok(true) => Ok(file),
            Ok(false) => Err(busy(path)),
            Err(error) => Err(tried("lock", &error)),
        }
    }

    /// An image as a disk that is only read, with all that lies below it.
    pub(crate) async fn disk(
        &self,
        image: &ImageSpec,
        snapshot: Option<&str>,
    ) -> Result<(Disk, DiskInfo), Failure> {
        let file = self.file(&image.path, self.reading).await?;
        let options = Options {
            writable: false,
            discard: false,
            snapshot: snapshot.map(str::to_string),
            ..Options::new(image.path.display().to_string())
        };
        self.disk_of(image, file, options).await
    }

    /// The disk in a file that is open.
    pub(crate) async fn disk_of(
        &self,
        image: &ImageSpec,
        mut file: File,
        options: Options,
    ) -> Result<(Disk, DiskInfo), Failure> {
        if options.snapshot.is_some() && image.kind != Below::Format(ImageFormat::Qcow2) {
            return Err(Failure::invalid(format!(
                "{image} has no snapshots, only qcow2 images do: leave --snapshot out"
            )));
        }
        let disk = match image.kind {
            Below::Raw => {
                if options.writable {
                    file.keep_size().map_err(|error| {
                        Failure::system(format!("cannot look at {image}"), &error)
                    })?;
                }
                Disk::new(Raw::new(file, false))
            }
            Below::Format(_) if image.ova.is_some() => {
                let name = image.ova.as_ref().and_then(|ova| ova.0.as_deref());
                let member = ArchiveMember::find(image, &file, name).await?;
                Disk::new(Vmdk::new(member, ImageParts::default(), options))
            }
            Below::Format(kind) => {
                let options = Options {
                    parents: self.parents,
                    layers: self.layers,
                    key: image.secret()?,
                    ..options
                };
                let files = NamedFiles::of(self, image, &file)?;
                let chain = open_chain(kind, file, &image.path, options, &files);
                chain
                    .await
                    .map_err(|failure| image.said(of_image(failure)))?
            }
        };
        let shape = disk.activate().await;
        let shape = shape.map_err(|failure| image.said(of_image(failure)))?;
        Ok((disk, shape))
    }
}

/// Opens the image at `path`, without a lock; if `is_direct`, past the page cache where that is possible.
pub(crate) fn open_file(path: &Path, how: Use, is_direct: bool) -> Result<fs::File, Failure> {
    let tried = |error: &io::Error| {
        Failure::system(format!("cannot open the image {}", path.display()), error)
    };
    let kind = fs::metadata(path).map_err(|error| tried(&error))?;
    let kind = kind.file_type();
    // Opening a pipe would wait for its other end.
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Failure::new(
            Code::Image,
            format!(
                "{} is neither a file nor a block device, so it cannot be an image",
                path.display()
            ),
        ));
    }
    let mut flags = OFlags::CLOEXEC;
    if how == Use::Write && kind.is_block_device() {
        // A device that the kernel itself uses, such as for a mounted file system, is refused.
        flags |= OFlags::EXCL;
    }
    let open = |flags| {
        fs::File::options()
            .read(true)
            .write(how == Use::Write)
            .custom_flags(flags)
            .open(path)
    };
    // CAST: flags of open are an int.
    let file = match is_direct {
        true => direct(flags, open),
        false => open(flags.bits() as i32),
    };
    match file {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(busy(path)),
        file => file.map_err(|error| tried(&error)),
    }
}

/// Opens a file that is only read through the page cache, which may have it already, unless another host may write it. A
/// device is read past the cache, because another host may have written it since this one has read it.
fn open_cached(path: &Path, how: Use) -> Result<fs::File, Failure> {
    let seeing = |error| Failure::system(format!("cannot see where {} is", path.display()), &error);
    let file = open_file(path, how, false)?;
    let is_file = file.metadata().map_err(seeing)?.is_file();
    if !is_file || diskio::is_remote(&file).map_err(seeing)? {
        return open_file(path, how, true);
    }
    // What is read once is not to drive out what others use. Not all file systems and kernels know that.
    let _ = fadvise(&file, 0, None, Advice::NoReuse);
    Ok(file)
}

/// Opens past the page cache, or through it where that is not possible.
pub(crate) fn direct(
    flags: OFlags,
    open: impl Fn(i32) -> io::Result<fs::File>,
) -> io::Result<fs::File> {
    // CAST: flags of open are an int.
    let bits = |flags: OFlags| flags.bits() as i32;
    match open(bits(flags | OFlags::DIRECT)) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => open(bits(flags)),
        result => result,
    }
}

/// Converts a failure, because an invalid image is no invalid command line.
fn of_image(failure: Failure) -> Failure {
    match failure.code {
        Code::Invalid => Failure::new(Code::Image, failure.message),
        _ => failure,
    }
}

fn busy(path: &Path) -> Failure {
    Failure::new(
        Code::Busy,
        format!(
            "{} is in use: by a guest's disk (`tap-ctl list --file {0}` shows it; pause it), a child of it that is in \
             use, or another program; try again when that has ended (only `tapimg info -U IMAGE` looks at it before)",
            path.display()
        ),
    )
}

/// The file or device behind a path, whatever its name; nothing if there is none.
pub(crate) fn identity(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match fs::metadata(path) {
        Ok(data) if data.file_type().is_block_device() => Ok(Some((u64::MAX, data.rdev()))),
        Ok(data) => Ok(Some((data.dev(), data.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::{ImageOpener, Use};
    use diskio::Runtime;

    /// Reads may come from the page cache; writes must reach the storage.
    #[test]
    fn files_that_are_only_read_are_read_through_the_cache() {
        let folder =
            tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, [1; 4096]).unwrap();
        let runtime = Runtime::new();
        let opener = ImageOpener::start(&runtime, Use::Read, None).unwrap();
        let work = async move {
            let written = opener.file(&path, Use::Write).await.unwrap();
            let is_direct = written.is_direct().unwrap();
            drop(written);
            let read = opener.file(&path, Use::Read).await.unwrap();
            (is_direct, read.is_direct().unwrap())
        };
        assert_eq!(runtime.block_on(work).unwrap(), (true, false));
    }
}
