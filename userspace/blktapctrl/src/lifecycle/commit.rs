// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image below that of a disk takes over what that has itself, while the guest works, and the disk goes on there:
//! the other end of a snapshot.
//!
//! It is a [mirror](super::mirror) to an image that shows most of the disk already, and of which the disk knows nothing
//! else by the time that it is changed: whatever is written there the image above has, too. So whenever it ends, the
//! disk is the same in the image that it has. What was below is another disk from the first byte on, so no other disk
//! may have it, and it is marked again as one that nobody writes if it does not become the disk.

use crate::apart::{apart, LIMIT};
use crate::disk::Disk;
use crate::image::{self, Image};
use crate::overlay;
use crate::record::{Mirrored, Role};
use control::Failure;
use std::sync::Arc;

/// An image may be written that is below a disk: it is on the record as that, whatever the disk's process says. What
/// becomes of it is decided by who has named it.
pub(super) fn check_below(disk: &Disk, image: &Image) -> Result<(), Failure> {
    let record = disk.record.borrow();
    let mut parents = record.parts.iter().filter(|part| part.role == Role::Parent);
    if parents.any(|part| image.is(part.identity, part.born)) {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "disk {} does not go on from {}: name the image below its own, as tap-ctl snapshot said it, or see tapimg \
         info --chain",
        disk.minor,
        image.path().display()
    )))
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
