// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image that goes on from another one comes to need it no more, while it is used.

use super::header::AT_NAME;
use super::image::Image;
use super::{header, Qcow2};
use crate::field::refused;
use crate::Storage;
use control::{Code, Failure};
use diskio::Errno;

impl<S: Storage> Qcow2<S> {
    /// There is an image below, and this one could do without it; false if there is none.
    pub(super) async fn may_stand_alone(&self) -> Result<bool, Failure> {
        if self.below.borrow().is_none() {
            return Ok(false);
        }
        let name = &self.options.name;
        if !self.options.writable {
            return Err(refused(format!(
                "{name} is read-only, and must be written to need no other image"
            )));
        }
        match header(&self.file).await?.snapshots {
            0 => Ok(true),
            count => Err(refused(format!(
                "{name} has {count} snapshots, which have the image below for themselves: delete them with \
                 qemu-img snapshot -d when the disk is detached"
            ))),
        }
    }
}

impl<S: Storage> Image<S> {
    /// The header names no image below from now on, which takes one write of one sector. A format that it names
    /// stays, and means nothing without a name.
    pub(super) async fn forget_below(&self) -> Result<(), Failure> {
        let failed = |error: Errno| {
            let what = format!("{}: cannot forget the image below", self.name);
            Failure::system(what, &error.into())
        };
        self.can_be_trusted()?;
        self.hide_rest().await.map_err(failed)?;
        // What the tables in memory say must be in the image: the write of one may have failed before.
        self.slices.settle_all().await.map_err(failed)?;
        self.flush().await.map_err(failed)?;
        self.can_be_trusted()?;
        // Where the name is, and its length.
        self.change_header(AT_NAME, &[0; 12])
            .await
            .map_err(failed)?;
        self.below.replace(None);
        Ok(())
    }

    /// What is in memory may be more than the image has if a flush has failed since it was opened.
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

    /// What is below and behind the end of the disk, and was copied with its last cluster, is not seen when that
    /// grows.
    async fn hide_rest(&self) -> Result<(), Errno> {
        let size = self.size.get();
        let end = size.next_multiple_of(self.geometry.cluster());
        self.hide_below(size, end).await
    }
}
