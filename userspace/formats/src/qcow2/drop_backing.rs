// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dropping the backing image of an image that is in use.

use super::header::AT_NAME;
use super::image::Qcow2Image;
use super::{header, Qcow2};
use crate::base::SECTOR;
use crate::field::refused;
use crate::Storage;
use control::{Code, Failure};
use diskio::Errno;

impl<S: Storage> Qcow2<S> {
    /// Returns true if the image has a backing image that it could drop, and false if it has none.
    pub(super) async fn may_stand_alone(&self) -> Result<bool, Failure> {
        if self.below.borrow().is_none() {
            return Ok(false);
        }
        let name = &self.options.name;
        if !self.options.writable {
            return Err(refused(format!(
                "{name} is read-only, so it cannot drop its backing image: make it writable"
            )));
        }
        let header = header(&self.file).await?;
        let inherited = self
            .image
            .borrow()
            .as_ref()
            .map_or(SECTOR, |image| image.sector());
        if header.sector.is_none() && inherited != SECTOR {
            return Err(refused(format!(
                "{name} has sectors of {inherited} bytes because its backing image has, and its own header does not \
                 store that: detach the disk and have it stored: `tapimg rebase IMAGE --parent BACKING`"
            )));
        }
        match header.snapshots {
            0 => Ok(true),
            count => Err(refused(format!(
                "{name} has {count} snapshots, which need the backing image: delete them with \
                 qemu-img snapshot -d when the disk is detached"
            ))),
        }
    }
}

impl<S: Storage> Qcow2Image<S> {
    /// The header names no image below from now on, which takes one write of one sector. A format that it names
    /// stays, and means nothing without a name.
    pub(super) async fn forget_below(&self) -> Result<(), Failure> {
        let failed = |error: Errno| {
            let what = format!("{}: cannot drop the backing image", self.name);
            Failure::system(what, &error.into())
        };
        self.can_be_trusted()?;
        self.hide_rest().await.map_err(failed)?;
        // The tables in memory must be in the image: an earlier write of one may have failed.
        self.slices.settle_all().await.map_err(failed)?;
        self.flush().await.map_err(failed)?;
        self.can_be_trusted()?;
        // Offset and length of the name.
        self.change_header(AT_NAME, &[0; 12])
            .await
            .map_err(failed)?;
        self.below.replace(None);
        Ok(())
    }

    /// Fails if a flush has failed since the image was opened, because the image may then lack what the tables in
    /// memory have.
    fn can_be_trusted(&self) -> Result<(), Failure> {
        match self.barrier.lost() {
            0 => Ok(()),
            _ => Err(Failure::new(
                Code::System,
                format!(
                    "{}: a flush has failed since it was opened, so it may lack what was copied: see to its storage, \
                     pause the disk and unpause it, and begin again",
                    self.name
                ),
            )),
        }
    }

    /// Hides the content of the backing image behind the end of the disk, which was copied with the last cluster: it
    /// must not appear when the disk grows.
    async fn hide_rest(&self) -> Result<(), Errno> {
        let size = self.size.get();
        let end = size.next_multiple_of(self.geometry.cluster());
        self.hide_below(size, end).await
    }
}
