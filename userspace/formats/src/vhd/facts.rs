// SPDX-License-Identifier: MIT OR Apache-2.0
//! Facts about a VHD that Xen's tools ask for, and their mark "hidden".

use super::blocks::BlockTable;
use super::footer::VhdKind;
use super::image::VhdImage;
use super::resize::put_footers;
use crate::field::failed;
use crate::Storage;
use control::Failure;

/// Facts about one image without its parents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Kind of the VHD.
    pub kind: VhdKind,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that the disk can have before its table has to move.
    pub most: u64,
    /// Blocks that exist.
    pub blocks: u32,
    /// True if the image is hidden: it only serves as a parent, and no guest has it.
    pub is_hidden: bool,
}

/// Returns the facts about an image. The caller must have locked it, or the answer may be out of date.
///
/// # Errors
/// The image is no VHD, or cannot be read.
pub async fn facts(storage: &impl Storage) -> Result<Facts, Failure> {
    let VhdImage { footer, header } = VhdImage::read(storage).await?;
    let (mut most, mut used) = (footer.size, 0);
    if let Some(header) = &header {
        let blocks = BlockTable::read(storage, header, footer.size).await;
        let blocks = blocks.map_err(failed("cannot read the VHD's table"))?;
        most = u64::from(header.blocks) * u64::from(header.block);
        used = (0..blocks.count())
            .filter(|block| blocks.place(*block).is_some())
            .count();
    }
    Ok(Facts {
        kind: footer.kind,
        size: footer.size,
        most,
        // CAST: there are at most 2^22.
        blocks: used as u32,
        is_hidden: footer.is_hidden(),
    })
}

/// Marks an image as hidden, or removes the mark. The image must not be in use.
///
/// # Errors
/// It is no VHD, or its storage fails.
pub async fn hide(storage: &impl Storage, hidden: bool) -> Result<(), Failure> {
    let VhdImage { mut footer, .. } = VhdImage::read(storage).await?;
    footer.hide(hidden);
    let done = put_footers(storage, &footer).await;
    done.map_err(failed("cannot mark the VHD"))
}
