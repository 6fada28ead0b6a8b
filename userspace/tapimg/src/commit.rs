// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg commit`: the image below gets what an image has itself, and is the same disk then.

use crate::chain::{below, refuse_damage};
use crate::cli::Commit;
use crate::follow::NamedFiles;
use crate::image_spec::ImageSpec;
use crate::open::{failed, ImageOpener, Use};
use crate::progress::{bytes, Progress};
use crate::sector;
use crate::signals::Stop;
use crate::walk::{self, Piece, Side, Walk};
use control::{Code, Failure, FrozenDevices};
use diskio::{Bytes, File, Io};
use drivers::{Content, Disk};
use formats::{look, qcow2, Below, ImageFormat, Options};
use serde::Serialize;
use std::cell::Cell;
use std::fs;
use std::path::PathBuf;

/// Result of a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct CommitResult {
    /// The image, as the command line names it.
    image: String,
    /// The image below, which is the disk now.
    parent: String,
    /// Bytes of the image's own that the one below got, zeroes among them.
    written: u64,
    /// The image below is marked as one that is not written.
    marked: bool,
    /// The record that marks a device: without it blktapctrl gives the device to a disk for writing.
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<PathBuf>,
}

impl CommitResult {
    /// Bytes that the image below got.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    pub(crate) fn text(&self) -> String {
        let Self { image, parent, .. } = self;
        let end = "if it is no longer a backing image";
        let mark = match (&self.record, self.marked) {
            (Some(record), _) => format!(", after `rm {}`, {end}", record.display()),
            (None, true) => format!(", after chmod u+w, {end}"),
            (None, false) => String::new(),
        };
        format!(
            "{parent} got {} and holds the disk of {image}: name it in the configuration{mark}, and remove {image}\n",
            bytes(self.written)
        )
    }
}

/// The parts that an image has allocated, and their destination.
struct Own<'o> {
    io: &'o Io,
    image: (&'o ImageSpec, Disk),
    parent: (&'o ImageSpec, Disk),
    written: Cell<u64>,
}

/// Commits.
pub(crate) async fn commit(
    opener: &ImageOpener,
    stop: &Stop,
    args: &Commit,
) -> Result<CommitResult, Failure> {
    let image = &args.image;
    refuse_damage(opener, image).await?;
    // It is only read, but whoever used it would see what is below it change.
    let file = opener.file(&image.path, Use::Write).await?;
    let parent = parent_of(opener, image, &file).await?;
    let mode = fs::metadata(&parent.path)
        .map_err(|error| Failure::system(format!("cannot look at {parent}"), &error))?
        .permissions();
    let record = FrozenDevices::of_host().find(&parent.path, &parent.path, drop)?;
    let files = NamedFiles::of(opener, image, &file)?;
    let base = files.file(&parent.path, true).await;
    let base = base.map_err(|failure| image.said(failure))?;
    let options = Options::new(parent.path.display().to_string());
    let (base, its) = opener.disk_of(&parent, base, options).await?;
    // This program has locked the backing image already, and only its metadata is read.
    let look = ImageOpener {
        reading: Use::Look,
        ..opener.clone()
    };
    let options = Options {
        writable: false,
        discard: false,
        ..Options::new(image.path.display().to_string())
    };
    let (top, shape) = look.disk_of(image, file, options).await?;
    let below = (&parent, its.logical_block);
    sector::same((image, shape.logical_block), below)?;
    if shape.size < its.size {
        return Err(Failure::new(
            Code::Image,
            format!(
                "{image} has {} bytes and {parent} {}, which would not be the disk then, with more behind its end: \
                 append zeroes first (`tapimg resize {image} {1}`), or make a new image: `tapimg convert {image} NEW`",
                shape.size, its.size
            ),
        ));
    }
    if shape.size > its.size {
        return Err(Failure::new(
            Code::Image,
            format!(
                "{image} has {} bytes and {parent} only {}: make that larger first: `tapimg resize {parent} {0}`",
                shape.size, its.size
            ),
        ));
    }
    let own = Own {
        io: &opener.io,
        image: (image, top),
        parent: (&parent, base),
        written: Cell::new(0),
    };
    own.all(shape.size, stop, args.progress).await?;
    Ok(CommitResult {
        image: image.to_string(),
        parent: parent.to_string(),
        written: own.written.get(),
        marked: mode.readonly() || record.is_some(),
        record: record.map(|record| record.file),
    })
}

/// The image below, which must be one that may change below `image`.
async fn parent_of(
    opener: &ImageOpener,
    image: &ImageSpec,
    file: &File,
) -> Result<ImageSpec, Failure> {
    if image.key.is_some() {
        return Err(Failure::invalid(format!(
            "{image} is encrypted and what is below it is not: make a new image with qemu-img convert, which may be \
             encrypted, too"
        )));
    }
    let kind = match image.kind {
        // The number of a VMDK's parent changes with the first write, and then it is not its parent any more. That of
        // a VHDX is only read.
        Below::Raw | Below::Format(ImageFormat::Vmdk | ImageFormat::Vhdx | ImageFormat::Luks) => {
            return Err(Failure::invalid(format!(
                "{image}: only qcow2, qcow and VHD images are committed: make a new image: `tapimg convert {image} NEW`"
            )))
        }
        Below::Format(kind) => kind,
    };
    if kind == ImageFormat::Qcow2 {
        let found = qcow2::snapshots(file).await;
        let found = found.map_err(|failure| image.said(failure))?;
        if !found.is_empty() {
            return Err(Failure::invalid(format!(
                "{image} has {} snapshots, which show what is below it as it is now: delete them with qemu-img \
                 snapshot -d, or make a new image of both: `tapimg convert {image} NEW`",
                found.len()
            )));
        }
    }
    let needs = look(kind, file).await;
    let needs = needs.map_err(|failure| image.said(failure))?;
    if needs.parent.is_none() {
        return Err(Failure::invalid(format!(
            "{image} has no backing image: there is nothing to commit it to"
        )));
    }
    below(opener, image, &needs).ok_or_else(|| {
        Failure::invalid(format!(
            "{image} does not say what its parent is: say it with --parent-kind"
        ))
    })
}

impl Own<'_> {
    /// Writes all of it to the image below. Whenever that ends, the image shows the same disk: what it has itself
    /// hides what is below.
    async fn all(&self, size: u64, stop: &Stop, wanted: bool) -> Result<(), Failure> {
        let (parent, base) = &self.parent;
        let progress = Progress::new(size, wanted);
        let (this, progress_ref) = (self, &progress);
        let each = move |piece: Piece<1>| async move {
            this.piece(piece).await?;
            progress_ref.add(piece.len);
            Ok(())
        };
        let (image, top) = &self.image;
        let walk = Walk::new([Side::new(image, top, size)], size);
        let walked = walk.each(|| stop.is_wanted(), each).await;
        progress.end();
        let last = base.inactivate().await;
        walked?;
        last.map_err(|error| failed("make durable", parent, size, error))?;
        stop.check(
            &progress,
            "; the image is the disk still, the one below alone is not any more: begin again",
        )
    }

    async fn piece(&self, piece: Piece<1>) -> Result<(), Failure> {
        let (image, top) = &self.image;
        let (mut at, end) = (piece.offset, piece.offset + piece.len);
        while at < end {
            for extent in walk::layer(image, top, at, end - at).await? {
                match extent.content {
                    Content::Data => self.copy(at, extent.len).await?,
                    Content::Hole => self.zero(at, extent.len).await?,
                    Content::Below => {}
                }
                at += extent.len;
            }
        }
        Ok(())
    }

    async fn copy(&self, mut at: u64, len: u64) -> Result<(), Failure> {
        let (image, top) = &self.image;
        let (parent, base) = &self.parent;
        let end = at + len;
        while at < end {
            let len = (end - at).min(walk::PIECE);
            let data = walk::read(self.io, image, top, at, len).await?;
            walk::write(parent, base, at, Bytes::from(data)).await?;
            self.written.set(self.written.get() + len);
            at += len;
        }
        Ok(())
    }

    async fn zero(&self, at: u64, len: u64) -> Result<(), Failure> {
        let (parent, base) = &self.parent;
        walk::zero(parent, base, at, len).await?;
        self.written.set(self.written.get() + len);
        Ok(())
    }
}
