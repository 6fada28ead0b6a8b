// SPDX-License-Identifier: MIT OR Apache-2.0
//! What Xen's tools ask of a VHD, and the mark that they put on one.

use super::blocks::Blocks;
use super::footer::Kind;
use super::image::Image;
use super::resize::put_footers;
use crate::field::failed;
use crate::Storage;
use control::Failure;

/// What there is to say of an image alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Which kind.
    pub kind: Kind,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that the disk can have before its table has to move.
    pub most: u64,
    /// Blocks that exist.
    pub blocks: u32,
    /// No guest has it: others go on from it.
    pub is_hidden: bool,
}

/// Looks at an image. Whoever asks must have locked it, or may be told what is not so any more.
///
/// # Errors
/// It is none, or cannot be read.
pub async fn facts(storage: &impl Storage) -> Result<Facts, Failure> {
    let Image { footer, header } = Image::read(storage).await?;
    let (mut most, mut used) = (footer.size, 0);
    if let Some(header) = &header {
        let blocks = Blocks::read(storage, header, footer.size).await;
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

/// Marks an image as one that no guest has, or takes the mark away. Nobody may use it meanwhile.
///
/// # Errors
/// It is none, or cannot be written.
pub async fn hide(storage: &impl Storage, hidden: bool) -> Result<(), Failure> {
    let Image { mut footer, .. } = Image::read(storage).await?;
    footer.hide(hidden);
    let done = put_footers(storage, &footer).await;
    done.map_err(failed("cannot mark the VHD"))
}
