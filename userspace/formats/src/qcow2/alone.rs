// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image that goes on from another one comes to need it no more, while it is used.

use super::image::Image;
use super::rename::AT_NAME;
use super::{header, Qcow2};
use crate::field::refused;
use crate::Storage;
use control::Failure;
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
    pub(super) async fn forget_below(&self) -> Result<(), Errno> {
        // What makes it possible is durable before.
        self.flush().await?;
        let (header, _) = self.slices.at(0).await?;
        header.set_number(AT_NAME, 0);
        // Its length shares a number with the size of a cluster.
        let rest = header.number(AT_NAME + 8) & u64::from(u32::MAX);
        header.set_number(AT_NAME + 8, rest);
        self.slices.settle(&header).await?;
        self.flush().await?;
        self.below.replace(None);
        Ok(())
    }
}
