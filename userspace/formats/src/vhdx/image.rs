// SPDX-License-Identifier: MIT OR Apache-2.0
//! All of a VHDX that is known before its blocks are looked at.

use super::header::VhdxHeader;
use super::locator;
use super::log;
use super::log_overlay::Replayed;
use super::metadata::Metadata;
use super::region::Regions;
use crate::field::failed;
use crate::{ImageNeeds, Parent, Storage};
use control::Failure;

/// A VHDX, as it is after its log was replayed.
#[derive(Debug)]
pub(crate) struct VhdxImage<S> {
    pub(crate) storage: Replayed<S>,
    pub(crate) regions: Regions,
    pub(crate) metadata: Metadata,
}

impl<S: Storage> VhdxImage<S> {
    /// Reads and checks it.
    pub(crate) async fn read(storage: &S) -> Result<Self, Failure> {
        let header = VhdxHeader::read(storage).await?;
        let overlay = log::replay(storage, &header).await?;
        let seeing = |error| failed("cannot see the image's size")(error);
        let storage = Replayed::new(storage.clone(), overlay).map_err(seeing)?;
        let length = storage.size().map_err(seeing)?;
        let regions = Regions::read(&storage, &header, length).await?;
        let metadata = Metadata::read(&storage, &regions.metadata).await?;
        Ok(Self {
            storage,
            regions,
            metadata,
        })
    }

    /// Returns the parent.
    pub(crate) async fn parent(&self) -> Result<Option<Parent>, Failure> {
        let locator = self.metadata.locator(&self.storage).await?;
        locator.map(|bytes| locator::parse(&bytes)).transpose()
    }
}

/// Returns the files that a VHDX needs; no name in it is followed.
///
/// # Errors
/// The image is no VHDX, or damaged, or its log cannot be replayed.
pub async fn look<S: Storage>(storage: &S) -> Result<ImageNeeds, Failure> {
    let image = VhdxImage::read(storage).await?;
    Ok(ImageNeeds {
        size: image.metadata.size,
        sector: Some(image.metadata.logical),
        parent: image.parent().await?,
        extents: Vec::new(),
    })
}

/// Returns the identity of its content, for a comparison with [`Parent::id`] of its children. The identity changes in
/// each session that changes the content.
///
/// # Errors
/// The image has no valid header.
pub async fn id(storage: &impl Storage) -> Result<String, Failure> {
    Ok(VhdxHeader::read(storage).await?.data.to_string())
}

/// Returns the number of changes in the log of a VHDX that are not in their places, because the image was not closed.
/// The disk shows them nevertheless.
///
/// # Errors
/// As [`look`].
pub async fn unreplayed(storage: &impl Storage) -> Result<usize, Failure> {
    Ok(VhdxImage::read(storage).await?.storage.count())
}
