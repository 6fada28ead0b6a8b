// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg rebase`: the same disk over another image.

use crate::chain::{refuse_damage, refuse_loop};
use crate::cli::Rebase;
use crate::create::Parent;
use crate::dirty_runs::{runs, Run};
use crate::image_spec::{kind_name, parse_kind, ImageSpec};
use crate::open::{failed, ImageOpener, Use};
use crate::progress::{bytes, Progress};
use crate::sector;
use crate::signals::Stop;
use crate::walk::{self, Piece, Side, Walk};
use control::{Code, Failure};
use diskio::{Bytes, Data, File, Io};
use drivers::{Content, Disk};
use formats::{
    backing, fits, is_meant, look, qcow, qcow2, vhd, vmdk, Base, Below, ImageFormat, Options,
};
use serde::Serialize;
use std::cell::Cell;

/// Result of a rebase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct RebaseResult {
    /// The image, as the command line names it.
    image: String,
    /// The image below from now on, as the header names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    /// Bytes by which the chains differ, and that the image got; nothing if they were not compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    written: Option<u64>,
}

impl RebaseResult {
    pub(crate) fn text(&self) -> String {
        let parent = match &self.parent {
            Some(parent) => format!("has the backing image {parent}"),
            None => "has no backing image".into(),
        };
        let written = match self.written {
            Some(written) => format!("it got {}", bytes(written)),
            None => "whether that holds the same was not looked at".into(),
        };
        format!("{} {parent}; {written}\n", self.image)
    }
}

/// The content of the image as it is, and what will lie below it. The parts that differ become its own.
struct Own<'o> {
    io: &'o Io,
    image: (&'o ImageSpec, Disk),
    below: (&'o ImageSpec, Disk),
    written: Cell<u64>,
}

/// Rebases.
pub(crate) async fn rebase(
    opener: &ImageOpener,
    stop: &Stop,
    args: &Rebase,
) -> Result<RebaseResult, Failure> {
    let image = &args.image;
    let kind = can_be(args)?;
    let parent = args.parent.as_ref();
    if let Some(parent) = parent {
        refuse_loop(opener, image, parent).await?;
    }
    let is_renamed = args.name_only || args.moved;
    if !is_renamed {
        refuse_damage(opener, image).await?;
    }
    let file = opener.file(&image.path, Use::Write).await?;
    if let (true, Some(parent)) = (args.moved, parent) {
        check_moved(opener, image, kind, &file, parent).await?;
    } else if kind == ImageFormat::Qcow2 {
        // The same image in another place has what they need.
        refuse_snapshots(image, &file).await?;
    }
    let (written, sector) = match is_renamed {
        true => (None, None),
        false => {
            let (written, sector) = make_own(opener, stop, args, &file).await?;
            (Some(written), sector)
        }
    };
    // Data that was copied from the old chain by now is durable.
    let named = match kind {
        ImageFormat::Vhd | ImageFormat::Vmdk | ImageFormat::Qcow => {
            name_in_other(opener, image, kind, &file, parent).await
        }
        _ => name_in_qcow2(image, &file, parent, sector).await,
    };
    Ok(RebaseResult {
        image: image.to_string(),
        parent: named.map_err(|failure| image.said(failure))?,
        written,
    })
}

/// The kind of an image that can be put over another one, or over none, where it is.
fn can_be(args: &Rebase) -> Result<ImageFormat, Failure> {
    let image = &args.image;
    match (image.kind, &args.parent) {
        (Below::Format(ImageFormat::Qcow2), _) => Ok(ImageFormat::Qcow2),
        (Below::Format(ImageFormat::Vhd), Some(parent)) => {
            let fits = fits(ImageFormat::Vhd, parent.kind);
            fits.map(|()| ImageFormat::Vhd).map_err(|failure| image.said(failure))
        }
        (Below::Format(kind @ (ImageFormat::Qcow | ImageFormat::Vmdk)), Some(parent))
            if args.moved || args.name_only =>
        {
            let fits = fits(kind, parent.kind);
            fits.map(|()| kind).map_err(|failure| image.said(failure))
        }
        (Below::Format(ImageFormat::Vhd), None) => Err(Failure::invalid(format!(
            "{image}: a differencing VHD stays one: make a new image: `tapimg convert {image} NEW`"
        ))),
        (Below::Format(ImageFormat::Vhdx), Some(parent)) if args.moved => {
            Err(Failure::invalid(format!(
                "{image}: a VHDX is never changed, so it keeps the old place of its parent: name the new one each time \
                 (`tapimg info {image} --parent-at {}`), move the parent back, or make a new image: \
                 `tapimg convert {image} NEW --parent-at {}`",
                parent.path.display(),
                parent.path.display()
            )))
        }
        _ => Err(Failure::invalid(format!(
            "{image}: only qcow2 images and VHDs are put over other ones where they are: make a new image: \
             `tapimg convert {image} NEW --parent OTHER`"
        ))),
    }
}

/// Says how the parent is named from now on, with the size of sectors that the header is to store.
async fn name_in_qcow2(
    image: &ImageSpec,
    file: &File,
    parent: Option<&ImageSpec>,
    sector: Option<u32>,
) -> Result<Option<String>, Failure> {
    let backing = match parent {
        Some(parent) => Some(backing(parent.kind, &parent.path, &image.path)?),
        None => None,
    };
    qcow2::set_backing(file, backing.as_ref(), sector).await?;
    Ok(backing.map(|backing| backing.name))
}

async fn name_in_other(
    opener: &ImageOpener,
    image: &ImageSpec,
    kind: ImageFormat,
    file: &File,
    parent: Option<&ImageSpec>,
) -> Result<Option<String>, Failure> {
    let Some(parent) = parent else {
        return Ok(None);
    };
    let its = opener.file(&parent.path, opener.reading).await?;
    let base = Base::of(parent.kind, &parent.path, &its, &image.path).await?;
    match kind {
        ImageFormat::Vmdk => {
            let (name, id) = base.of_vmdk();
            vmdk::set_parent(file, &name, id).await?;
        }
        ImageFormat::Qcow => qcow::set_parent(file, base.name()).await?,
        _ => vhd::set_parent(file, &base.of_vhd()).await?,
    }
    Ok(Some(base.name().to_owned()))
}

/// Refuses an image that is not the one that `image` has below it, in another place. It is not looked for in the old one.
async fn check_moved(
    opener: &ImageOpener,
    image: &ImageSpec,
    kind: ImageFormat,
    file: &File,
    parent: &ImageSpec,
) -> Result<(), Failure> {
    let needs = look(kind, file).await;
    let needs = needs.map_err(|failure| image.said(failure))?;
    let wrong = |why: String| Err(Failure::invalid(format!("{image}: {why}")));
    let Some(its) = needs.parent else {
        return wrong("it has no backing image that could have been moved".into());
    };
    let said = match &its.driver {
        Some(name) => Some(parse_kind(name)?),
        None => opener.parents,
    };
    if let Some(said) = said.filter(|said| *said != parent.kind) {
        return wrong(format!(
            "its backing image is one of the kind {}, and {parent} is another: say --unsafe if that is meant",
            kind_name(said)
        ));
    }
    let found = opener.file(&parent.path, opener.reading).await?;
    match parent.kind {
        Below::Raw => Ok(()),
        Below::Format(kind) => {
            look(kind, &found)
                .await
                .map_err(|failure| parent.said(failure))?;
            let meant = is_meant(&its, kind, &found, &parent.path).await;
            meant.map_err(|failure| image.said(failure))
        }
    }
}

/// Refuses an image with snapshots inside, because the parts that a snapshot has not allocated would be those of the
/// other image.
async fn refuse_snapshots(image: &ImageSpec, file: &File) -> Result<(), Failure> {
    let header = qcow2::header(file).await;
    let header = header.map_err(|failure| image.said(failure))?;
    match header.snapshots {
        0 => Ok(()),
        count => Err(Failure::new(
            Code::Image,
            format!(
                "{image} has {count} snapshots, whose content would change with the image below: delete them with \
                 qemu-img snapshot -d, or copy one: `tapimg convert --snapshot NAME {image} NEW`"
            ),
        )),
    }
}

/// Writes into the image what it shows of the old chain and the new one does not have. Whenever that ends, the
/// image holds the same disk. Returns how many bytes, and the size of sectors that its header has to store so that the
/// disk keeps it.
async fn make_own(
    opener: &ImageOpener,
    stop: &Stop,
    args: &Rebase,
    file: &File,
) -> Result<(u64, Option<u32>), Failure> {
    let image = &args.image;
    let parent = match &args.parent {
        Some(parent) => Some(Parent::open(opener, parent, image).await?),
        None => None,
    };
    let options = Options::new(image.path.display().to_string());
    let (disk, shape) = opener.disk_of(image, file.clone(), options).await?;
    let sector = shape.logical_block;
    if let (Below::Format(ImageFormat::Vhd), Some(name), Some(parent)) =
        (image.kind, &args.parent, &parent)
    {
        // It has the sectors of its parent.
        sector::same((image, sector), (name, parent.sector))?;
    }
    let stored = sector::stored(sector, parent.as_ref());
    let progress = Progress::new(shape.size, args.progress);
    // Without a parent there is a hole in its place.
    let below = match (&args.parent, &parent) {
        (Some(name), Some(parent)) => (name, parent.disk.clone()),
        _ => (image, disk.clone()),
    };
    let size = parent.as_ref().map_or(0, |parent| parent.size);
    let sides = [
        Side::new(image, &disk, shape.size),
        Side::new(below.0, &below.1, size),
    ];
    let own = Own {
        io: &opener.io,
        image: (image, disk.clone()),
        below,
        written: Cell::new(0),
    };
    let (own_ref, progress_ref) = (&own, &progress);
    let each = move |piece: Piece<2>| async move {
        own_ref.piece(piece).await?;
        progress_ref.add(piece.len);
        Ok(())
    };
    let walk = Walk::new(sides, shape.size);
    let walked = walk.each(|| stop.is_wanted(), each).await;
    progress.end();
    let last = disk.inactivate().await;
    walked?;
    last.map_err(|error| failed("make durable", image, shape.size, error))?;
    stop.check(
        &progress,
        "; the image keeps its old backing image, so begin again",
    )?;
    Ok((own.written.get(), stored))
}

impl Own<'_> {
    async fn piece(&self, piece: Piece<2>) -> Result<(), Failure> {
        if piece.data == [false, false] {
            return Ok(());
        }
        let (image, disk) = &self.image;
        let mut at = piece.offset;
        let end = piece.offset + piece.len;
        while at < end {
            for extent in walk::layer(image, disk, at, end - at).await? {
                if extent.content == Content::Below {
                    self.part(at, extent.len, piece.data).await?;
                }
                at += extent.len;
            }
        }
        Ok(())
    }

    /// A part that is not the image's own.
    async fn part(&self, offset: u64, len: u64, data: [bool; 2]) -> Result<(), Failure> {
        let (image, disk) = &self.image;
        let [is_data, is_below] = data;
        let seen = match is_data {
            true => walk::read(self.io, image, disk, offset, len).await?,
            // CAST: at most a piece.
            false => {
                Data::zeroed(len as usize).map_err(|error| failed("write", image, offset, error))?
            }
        };
        let (below, its) = &self.below;
        let below = match is_below {
            true => Some(walk::read(self.io, below, its, offset, len).await?),
            false => None,
        };
        let runs = runs(&seen, below.as_ref());
        let seen = Bytes::from(seen);
        for run in runs {
            let range = match run {
                Run::Data(range) => {
                    let data = seen.part(range.start, range.len());
                    walk::write(image, disk, offset + range.start as u64, data).await?;
                    range
                }
                Run::Zero(range) => {
                    self.zero(offset + range.start as u64, range.len() as u64)
                        .await?;
                    range
                }
            };
            self.written.set(self.written.get() + range.len() as u64);
        }
        Ok(())
    }

    /// Zeroes of its own. Where the old chain has zeroes the driver need not do anything for a request for them, so
    /// this code writes them.
    async fn zero(&self, mut at: u64, len: u64) -> Result<(), Failure> {
        let (image, disk) = &self.image;
        walk::zero(image, disk, at, len).await?;
        let end = at + len;
        while at < end {
            for extent in walk::layer(image, disk, at, end - at).await? {
                if extent.content == Content::Below {
                    // CAST: at most a piece.
                    let zeroes = Data::zeroed(extent.len as usize)
                        .map_err(|error| failed("write", image, at, error))?;
                    walk::write(image, disk, at, Bytes::from(zeroes)).await?;
                }
                at += extent.len;
            }
        }
        Ok(())
    }
}
