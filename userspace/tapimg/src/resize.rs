// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg resize`: larger and smaller disks.

use crate::chain::{below, refuse_damaged};
use crate::cli::Resize;
use crate::dirty_runs::is_zero;
use crate::follow::{data_file, NamedFiles};
use crate::image_spec::ImageSpec;
use crate::open::{failed, ImageOpener, Use};
use crate::progress::bytes;
use crate::walk::{self, PIECE};
use control::{Code, Failure};
use diskio::File;
use drivers::{Content, Disk, Driver};
use formats::{look, luks, qcow2, vhd, Below, ImageFormat, ImageParts, Options};
use serde::Serialize;
use std::ops::Range;

/// Result of a change of the size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ResizeResult {
    /// The image, as the command line names it.
    image: String,
    /// Bytes of the disk before.
    old_size: u64,
    /// Bytes of the disk now.
    size: u64,
    /// Bytes, but for zeroes, that were cut off.
    lost: u64,
    /// Bytes that it got, and that read as anything until the guest fills them.
    #[serde(skip_serializing_if = "is_nothing")]
    undefined: u64,
}

// By reference, as serde asks.
fn is_nothing(count: &u64) -> bool {
    *count == 0
}

impl ResizeResult {
    pub(crate) fn text(&self) -> String {
        let lost = match self.lost {
            0 => String::new(),
            lost => format!("; {} of data were cut off", bytes(lost)),
        };
        let Self {
            image,
            old_size,
            size,
            ..
        } = self;
        let undefined = match self.undefined {
            0 => "",
            _ => "; the new part reads as anything until the guest fills it",
        };
        format!("{image} had {old_size} bytes and has {size}{lost}{undefined}\n")
    }
}

/// Changes the size.
pub(crate) async fn resize(opener: &ImageOpener, args: &Resize) -> Result<ResizeResult, Failure> {
    let image = &args.image;
    let file = opener.file(&image.path, Use::Write).await?;
    let old_size = match image.kind {
        Below::Raw => file
            .size()
            .map_err(|error| Failure::system(format!("cannot look at {image}"), &error))?,
        Below::Format(kind) => {
            let needs = look(kind, &file).await;
            needs.map_err(|failure| image.said(failure))?.size
        }
    };
    let size = args.size.of(old_size).ok_or_else(|| {
        Failure::invalid(format!(
            "{image}: no disk can be that large: give another size"
        ))
    })?;
    if size == 0 {
        return Err(Failure::invalid(format!(
            "{image}: a disk has at least one sector: give another size"
        )));
    }
    let lost = match size < old_size {
        true => shrink(opener, args, &file, old_size, size).await?,
        false => {
            grow(opener, image, &file, old_size, size).await?;
            0
        }
    };
    Ok(ResizeResult {
        image: image.to_string(),
        old_size,
        size,
        lost,
        undefined: match image.kind {
            Below::Format(ImageFormat::Luks) => size.saturating_sub(old_size),
            _ => 0,
        },
    })
}

async fn grow(
    opener: &ImageOpener,
    image: &ImageSpec,
    file: &File,
    old_size: u64,
    size: u64,
) -> Result<(), Failure> {
    match image.kind {
        Below::Raw => set_size(image, file, size).await,
        Below::Format(ImageFormat::Qcow2) => grow_qcow2(opener, image, file, size)
            .await
            .map_err(|failure| image.said(failure)),
        Below::Format(ImageFormat::Vhd) => {
            check_vhd(opener, image, file, old_size, size).await?;
            let grown = vhd::grow(file, size).await;
            grown.map_err(|failure| image.said(failure))
        }
        Below::Format(ImageFormat::Luks) => {
            if image.key.is_some() {
                // A key that was named is the right one, though this needs none.
                let options = Options::new(image.path.display().to_string());
                opener.disk_of(image, file.clone(), options).await?;
            }
            set_size(image, file, size).await
        }
        Below::Format(kind @ (ImageFormat::Qcow | ImageFormat::Vmdk | ImageFormat::Vhdx)) => {
            Err(Failure::invalid(format!(
                "{image}: a {kind} image keeps its size: convert it to qcow2, which can grow"
            )))
        }
    }
}

/// Of an image that is as long as its disk, but for a header in front.
async fn set_size(image: &ImageSpec, file: &File, size: u64) -> Result<(), Failure> {
    let changed = match image.kind {
        Below::Format(ImageFormat::Luks) => luks::set_size(file, size).await,
        _ => drivers::set_size(file, size).await,
    };
    changed.map_err(|failure| image.said(failure))
}

/// Makes a qcow2 image larger, with its backing image open, because the part of that behind the old end must stay
/// hidden.
async fn grow_qcow2(
    opener: &ImageOpener,
    image: &ImageSpec,
    file: &File,
    size: u64,
) -> Result<(), Failure> {
    let disk = qcow2_of(opener, image, file).await?;
    disk.activate().await?;
    let grown = disk.grow(size).await;
    let last = disk.inactivate().await;
    grown?;
    last.map_err(|error| failed("make durable", image, size, error))
}

/// Makes a qcow2 image smaller.
async fn shrink_qcow2(
    opener: &ImageOpener,
    image: &ImageSpec,
    file: &File,
    size: u64,
) -> Result<(), Failure> {
    let disk = qcow2_of(opener, image, file).await?;
    disk.activate().await?;
    let cut = disk.shrink(size).await;
    let last = disk.inactivate().await;
    cut?;
    last.map_err(|error| failed("make durable", image, size, error))
}

/// The driver of a qcow2 image, with its backing image and its data file.
async fn qcow2_of(
    opener: &ImageOpener,
    image: &ImageSpec,
    file: &File,
) -> Result<qcow2::Qcow2<File>, Failure> {
    let needs = look(ImageFormat::Qcow2, file).await?;
    let mut parts = ImageParts::default();
    if let Some(parent) = &needs.parent {
        let found = below(opener, image, &needs).ok_or_else(|| {
            Failure::invalid(format!(
                "it does not say what its parent {:?} is: say it with --parent-kind",
                parent.names.first().map_or("", String::as_str)
            ))
        })?;
        parts.parent = Some(opener.disk(&found, None).await?.0);
    }
    for extent in &needs.extents {
        let path = data_file(&extent.name, &image.path)?;
        let files = NamedFiles::of(opener, image, file)?;
        parts.extents.push(files.file(&path, true).await?);
    }
    let options = Options {
        key: image.secret()?,
        ..Options::new(image.path.display().to_string())
    };
    Ok(qcow2::Qcow2::new(file.clone(), parts, options))
}

/// A VHD has nothing by which it could hide what its parent has behind its own end, and it has its parent's sectors.
async fn check_vhd(
    opener: &ImageOpener,
    image: &ImageSpec,
    file: &File,
    size: u64,
    wanted: u64,
) -> Result<(), Failure> {
    let needs = look(ImageFormat::Vhd, file).await;
    let needs = needs.map_err(|failure| image.said(failure))?;
    let Some(parent) = below(opener, image, &needs) else {
        return Ok(());
    };
    let (_, shape) = opener.disk(&parent, None).await?;
    if wanted % u64::from(shape.logical_block) != 0 {
        return Err(Failure::invalid(format!(
            "{wanted} bytes are no whole number of logical sectors of {}, which {parent} has: give a multiple of them",
            shape.logical_block
        )));
    }
    match shape.size > size {
        true => Err(Failure::new(
            Code::Image,
            format!(
                "{parent} has {} bytes and {image} only {size}, so a larger disk would show what is behind them: \
                 convert it",
                shape.size
            ),
        )),
        false => Ok(()),
    }
}

/// Cuts the end off, and says how many bytes of data that were.
async fn shrink(
    opener: &ImageOpener,
    args: &Resize,
    file: &File,
    old_size: u64,
    size: u64,
) -> Result<u64, Failure> {
    let image = &args.image;
    if !args.shrink {
        return Err(Failure::invalid(format!(
            "{image} has {old_size} bytes, and {size} are fewer: say --shrink if that is meant"
        )));
    }
    if !matches!(
        image.kind,
        Below::Raw | Below::Format(ImageFormat::Luks | ImageFormat::Qcow2)
    ) {
        return Err(Failure::invalid(format!(
            "{image}: only a raw file, a qcow2 and a luks image become smaller: convert it to qcow2, and shrink that"
        )));
    }
    let is_qcow2 = image.kind == Below::Format(ImageFormat::Qcow2);
    if is_qcow2 {
        refuse_damaged(image, file).await?;
    }
    let options = Options {
        writable: false,
        discard: false,
        ..Options::new(image.path.display().to_string())
    };
    let (disk, _) = opener.disk_of(image, file.clone(), options).await?;
    // The disk in an image of LUKS knows no holes: where its file has one, nothing was ever written.
    let (written, begin) = match image.kind {
        Below::Raw | Below::Format(ImageFormat::Qcow2) => (disk.clone(), 0),
        Below::Format(_) => {
            let begin = luks::header(file).await?.begin();
            let raw = ImageSpec::plain(Below::Raw, image.path.clone());
            let options = Options::new(image.path.display().to_string());
            (opener.disk_of(&raw, file.clone(), options).await?.0, begin)
        }
    };
    let places = (&written, begin);
    let (lost, first) = data_behind(opener, image, &disk, places, size..old_size).await?;
    if lost > 0 && !args.lose_data {
        return Err(Failure::new(
            Code::Image,
            format!(
                "{image} has {} of data behind byte {size}, the first at byte {first}: make its file system and \
                 partitions smaller first, or say --lose-data",
                bytes(lost)
            ),
        ));
    }
    // Its files are locked.
    drop((disk, written));
    match is_qcow2 {
        true => shrink_qcow2(opener, image, file, size)
            .await
            .map_err(|failure| image.said(failure))?,
        false => set_size(image, file, size).await?,
    }
    Ok(lost)
}

/// How many bytes of a range are in pieces with other than zeroes, and where the first of those begins. Where there is
/// any content says `written`, from the byte `begin` of it on.
async fn data_behind(
    opener: &ImageOpener,
    image: &ImageSpec,
    disk: &Disk,
    (written, begin): (&Disk, u64),
    range: Range<u64>,
) -> Result<(u64, u64), Failure> {
    const BLOCK: usize = 4096;
    let Range { start: mut at, end } = range;
    let (mut lost, mut first) = (0, end);
    while at < end {
        let found = written.extents(begin + at, end - at).await;
        for extent in found.map_err(|error| failed("find out what is in", image, at, error))? {
            let stop = at + extent.len;
            while at < stop && extent.content == Content::Data {
                let len = (stop - at).min(PIECE);
                let seen = walk::read(&opener.io, image, disk, at, len).await?.to_vec();
                for (number, block) in seen.chunks(BLOCK).enumerate() {
                    if !is_zero(block) {
                        lost += block.len() as u64;
                        first = first.min(at + (number * BLOCK) as u64);
                    }
                }
                at += len;
            }
            at = stop;
        }
    }
    Ok((lost, first))
}
