// SPDX-License-Identifier: MIT OR Apache-2.0
//! Logical sectors of new images. A guest's partition table counts in them, so a copy of a disk that shows sectors of
//! another size has no partitions for its guest.

use crate::cli::Layout;
use crate::create::Parent;
use crate::image_spec::{kind_name, ImageSpec};
use crate::open::{identity, ImageOpener, Use};
use control::Failure;
use formats::{Below, ImageFormat, SECTOR};

/// Returns the bytes of a logical sector that the disk in the new image `image` has: those of the command line, or of
/// the disk that is copied, `source`, or of the parent.
///
/// # Errors
/// The new image would show others, or the disk is no whole number of them.
pub(crate) async fn of_new(
    opener: &ImageOpener,
    image: &ImageSpec,
    layout: &Layout,
    size: u64,
    source: Option<u32>,
    parent: Option<&Parent>,
) -> Result<u32, Failure> {
    let inherited = parent.map_or(SECTOR, |parent| parent.sector);
    let own = match image.kind {
        Below::Raw => of_storage(opener, image).await?,
        Below::Format(_) => inherited,
    };
    let stores = image.kind == Below::Format(ImageFormat::Qcow2);
    // A device that is no copy of anything is what it is.
    let usual = source.or(parent.map(|parent| parent.sector)).unwrap_or(own);
    let wanted = layout.sector_size.unwrap_or(usual);
    if !stores && own != wanted {
        return Err(Failure::invalid(format!(
            "{image}: the disk has logical sectors of {wanted} bytes, and a guest would see sectors of {own} and find \
             no partitions, because {} stores no size of sectors: use qcow2, which does, or say --sector-size {own} \
             and write sector-size={wanted}, in front of the image in the guest's configuration",
            match image.kind {
                Below::Raw => "a raw image".into(),
                kind => format!("a {} image", kind_name(kind)),
            }
        )));
    }
    match size % u64::from(wanted) {
        0 => Ok(wanted),
        _ => Err(Failure::invalid(format!(
            "{image}: {size} bytes are no whole number of logical sectors of {wanted}: give another size, or say \
             --sector-size 512 if the disk has such sectors"
        ))),
    }
}

/// Returns the bytes of a logical sector of a raw image: those of the device, if it is one.
async fn of_storage(opener: &ImageOpener, image: &ImageSpec) -> Result<u32, Failure> {
    let looking = |error| Failure::system(format!("cannot look at {image}"), &error);
    if identity(&image.path).map_err(looking)?.is_none() {
        return Ok(SECTOR);
    }
    let file = opener.file(&image.path, Use::Look).await?;
    Ok(file.blocks().map_err(looking)?.0)
}

/// Returns the size of sectors that the header of a new qcow2 image stores; nothing if the disk has it anyway.
pub(crate) fn stored(sector: u32, parent: Option<&Parent>) -> Option<u32> {
    let is_plain = sector == SECTOR && parent.is_none_or(|parent| parent.sector == SECTOR);
    (!is_plain).then_some(sector)
}

/// Refuses to bring the disk of one image into another one that shows sectors of another size.
pub(crate) fn same(
    (image, sector): (&ImageSpec, u32),
    (other, its): (&ImageSpec, u32),
) -> Result<(), Failure> {
    match sector == its {
        true => Ok(()),
        false => Err(Failure::new(
            control::Code::Image,
            format!(
                "{image} has logical sectors of {sector} bytes and {other} of {its}, and the guest would find no \
                 partitions: make a new image: `tapimg convert {image} NEW`"
            ),
        )),
    }
}
