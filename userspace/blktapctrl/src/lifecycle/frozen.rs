// SPDX-License-Identifier: MIT OR Apache-2.0
//! The mark of an image that is a backing image now, so that no disk writes it: no write permission for a file, a record
//! for a device, which has no permission that lasts.

use super::mirror::image_of;
use super::Lifecycle;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::image::{self, Image};
use crate::log::tell;
use crate::overlay;
use crate::record::{PartRole, PendingMirror};
use control::{Failure, FrozenDevices, Target};
use std::path::PathBuf;
use std::sync::Arc;

/// Path by which calls wait for each other that look at the mark of an image: that of a device is in the folder of the
/// records.
fn place_of_mark(image: &Image, records: &FrozenDevices) -> PathBuf {
    match image.is_device() {
        true => records.folder().into(),
        false => image.path().into(),
    }
}

impl Lifecycle {
    /// Does something with the mark of an image, on a thread of its own.
    async fn with_records<T: Send + 'static>(
        &self,
        image: Arc<Image>,
        work: impl FnOnce(&Image, &FrozenDevices) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let records = self.registry.folder.frozen().clone();
        let place = place_of_mark(&image, &records);
        blocking_io(&place, LIMIT, move || work(&image, &records)).await
    }

    /// Marks an image, because `instead` has the newer writes. True if that was done.
    async fn freeze(&self, image: Arc<Image>, instead: &Target) -> Result<bool, Failure> {
        let instead = instead.to_string();
        let freeze =
            move |image: &Image, records: &FrozenDevices| overlay::freeze(image, records, &instead);
        self.with_records(image, freeze).await
    }

    /// Marks the image that a disk had, because the disk is to be served from its next one. True if that was done.
    pub(super) async fn freeze_old(&self, disk: &Disk) -> bool {
        let next = disk.record.borrow().next.clone();
        let marked = async {
            match (self.image(disk).await?, next) {
                (Some(image), Some(next)) => self.freeze(image, &next.open.target).await,
                _ => Ok(false),
            }
        };
        marked.await.unwrap_or_else(|failure| {
            tell!(
                warn,
                disk.about().failed(&failure),
                "disk {}: {failure}",
                disk.minor
            );
            false
        })
    }

    /// Returns whether an image is marked.
    ///
    /// # Errors
    /// The system does not say.
    pub(super) async fn is_frozen(&self, image: Arc<Image>) -> Result<bool, Failure> {
        self.with_records(image, overlay::is_frozen).await
    }

    /// Removes the mark of a backing image, because the disk is about to switch to it.
    ///
    /// # Errors
    /// The system refuses to, or the image is another one by now.
    pub(super) async fn thaw(
        &self,
        mirror: &PendingMirror,
        image: Arc<Image>,
    ) -> Result<Arc<Image>, Failure> {
        if !mirror.marked {
            return Ok(image);
        }
        self.with_records(image.clone(), overlay::thaw).await?;
        let found = image::find(image.path()).await?;
        match found.is(Some(image.identity()), image.born()) {
            true => Ok(found),
            false => Err(image::not_the_same(&image)),
        }
    }

    /// Marks the backing image again, because it stays one.
    pub(super) async fn freeze_again(&self, disk: &Disk) {
        let (mirror, part) = {
            let record = disk.record.borrow();
            let mut parts = record.parts.iter();
            let part = parts.find(|part| part.role == PartRole::Mirror).cloned();
            let marked = record.mirror.as_ref().filter(|mirror| mirror.marked);
            (marked.cloned(), part)
        };
        let (Some(mirror), Some(part)) = (mirror, part) else {
            return;
        };
        let marked = async {
            let image = image_of(&mirror, &part).await?;
            self.freeze(image, &disk.open()?.target).await
        };
        if let Err(failure) = marked.await {
            tell!(
                warn,
                disk.about().failed(&failure),
                "disk {}: {failure}",
                disk.minor
            );
        }
    }
}
