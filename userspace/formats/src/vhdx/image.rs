// SPDX-License-Identifier: MIT OR Apache-2.0
//! All of a VHDX that is known before its blocks are looked at.

use super::header::Header;
use super::locator;
use super::log;
use super::metadata::Metadata;
use super::region::Regions;
use super::replayed::Replayed;
use crate::field::failed;
use crate::{Needs, Parent, Storage};
use control::Failure;

/// A VHDX, as it is after its log was replayed.
#[derive(Debug)]
pub(crate) struct Image<S> {
    pub(crate) storage: Replayed<S>,
    pub(crate) regions: Regions,
    pub(crate) metadata: Metadata,
}

impl<S: Storage> Image<S> {
    /// Reads and checks it.
    pub(crate) async fn read(storage: &S) -> Result<Self, Failure> {
        let header = Header::read(storage).await?;
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

    /// What it goes on from.
    pub(crate) async fn parent(&self) -> Result<Option<Parent>, Failure> {
        let locator = self.metadata.locator(&self.storage).await?;
        locator.map(|bytes| locator::parse(&bytes)).transpose()
    }
}

/// What a VHDX needs, of which nothing is followed.
///
/// # Errors
/// It is none, or damaged, or its log cannot be replayed.
pub async fn look<S: Storage>(storage: &S) -> Result<Needs, Failure> {
    let image = Image::read(storage).await?;
    Ok(Needs {
        size: image.metadata.size,
        parent: image.parent().await?,
        extents: Vec::new(),
    })
}

/// What its content calls itself, to be compared with [`Parent::id`] of its children. It is another one after each
/// session in which the content was changed.
///
/// # Errors
/// It has no header that counts.
pub async fn id(storage: &impl Storage) -> Result<String, Failure> {
    Ok(Header::read(storage).await?.data.to_string())
}

/// Changes in the log of a VHDX that are not in their places: it was not closed. They are shown nevertheless.
///
/// # Errors
/// As [`look`].
pub async fn unreplayed(storage: &impl Storage) -> Result<usize, Failure> {
    Ok(Image::read(storage).await?.storage.count())
}
