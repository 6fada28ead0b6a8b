// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image below that of a disk takes over what that has itself, while the guest works, and the disk goes on there:
//! the other end of a snapshot.
//!
//! It is a [mirror](super::mirror) to an image that shows most of the disk already, and of which the disk knows nothing
//! else by the time that it is changed: whatever is written there the image above has, too. So whenever it ends, the
//! disk is the same in the image that it has. What was below is another disk from the first byte on, so no other disk
//! may have it, and it is marked again as one that nobody writes if it does not become the disk.

use super::handoff::check_served;
use super::Lifecycle;
use crate::apart::{apart, LIMIT};
use crate::disk::Disk;
use crate::image::{self, Image};
use crate::link::unexpected;
use crate::overlay;
use crate::process::SOON;
use crate::record::Mirrored;
use control::stats::Mirror;
use control::tapdisk::{Reply, Request};
use control::Failure;
use std::rc::Rc;
use std::sync::Arc;

impl Lifecycle {
    /// Has the image below that of a disk take over what that has itself, with `rate` bytes in a second, and the disk
    /// then served from that one.
    ///
    /// # Errors
    /// It cannot be.
    pub async fn commit_image(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        rate: u64,
    ) -> Result<Mirror, Failure> {
        let _turn = disk.turn().await?;
        self.end_pending(disk).await?;
        check_served(disk)?;
        let runs = |mirror: &Mirrored| mirror.below;
        if disk.record.borrow().mirror.as_ref().is_some_and(runs) {
            return self.mirrored(disk);
        }
        let asked = disk.serving()?.ask(&Request::Below, &[], SOON).await?;
        let Reply::Below { target } = asked else {
            return Err(unexpected(&asked));
        };
        self.copy_to(disk, target, rate, true).await
    }
}

/// An image below a disk, which may be written from now on.
pub(super) async fn writable(image: Arc<Image>) -> Result<Arc<Image>, Failure> {
    if !image.is_unwritable() {
        return Ok(image);
    }
    let path = image.path().to_path_buf();
    let theirs = image.clone();
    apart(&path, LIMIT, move || overlay::unmark(&theirs)).await?;
    let found = image::find(&path).await?;
    match found.is(Some(image.identity()), image.born()) {
        true => Ok(found),
        false => Err(image::not_the_same(&image)),
    }
}

/// It stays what the disk goes on from, and nobody is to write it.
pub(super) async fn mark_again(disk: &Disk, mirror: &Mirrored) {
    let Some(path) = mirror.open.target.path().filter(|_| mirror.marked) else {
        return;
    };
    let marked = async {
        let image = image::find(path).await?;
        apart(path, LIMIT, move || overlay::mark(&image)).await
    };
    if let Err(failure) = marked.await {
        tracing::warn!("disk {}: {failure}", disk.minor);
    }
}
