// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image below that of a disk takes over what that has itself, while the guest works, and the disk goes on there:
//! the other end of a snapshot.
//!
//! It is a [mirror](super::mirror) to an image that shows most of the disk already, and of which the disk knows nothing
//! else by the time that it is changed: whatever is written there the image above has, too. So whenever it ends, the
//! disk is the same in the image that it has. What was below is another disk from the first byte on, so no other disk
//! may have it; and it keeps its mark as one that nobody writes until it becomes the disk.

use super::Lifecycle;
use crate::apart::{apart, LIMIT};
use crate::disk::Disk;
use crate::image::{self, Image};
use crate::overlay;
use crate::record::{Next, Role};
use control::{Code, Driver, Failure};
use std::sync::Arc;

/// What the disk has may be given to what is below it.
pub(super) fn check_top(disk: &Disk) -> Result<(), Failure> {
    let target = disk.open()?.target;
    if target.driver() != Driver::Qcow2 {
        return Err(Failure::unsupported(format!(
            "{target} is no qcow2 image: of others nothing is committed while they are served"
        )));
    }
    match disk.record.borrow().stream.is_some() {
        false => Ok(()),
        true => Err(Failure::new(
            Code::State,
            format!(
                "disk {} takes over what is below it: end that with tap-ctl stream --cancel",
                disk.minor
            ),
        )),
    }
}

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

impl Lifecycle {
    /// The image below is what the disk goes on in: it may be written. Who finds that on the record does it once more.
    ///
    /// # Errors
    /// The system refuses to.
    pub(super) async fn unmark_below(&self, disk: &Disk) -> Result<(), Failure> {
        let next = disk.record.borrow().next.clone();
        let (Some(next), true) = (next, is_marked(disk)) else {
            return Ok(());
        };
        let image = found(&next).await?;
        if image.is_unwritable() {
            let path = image.path().to_path_buf();
            apart(&path, LIMIT, move || overlay::unmark(&image)).await?;
        }
        disk.next_image.replace(Some(found(&next).await?));
        Ok(())
    }

    /// It stays what is below the disk, and nobody is to write it.
    pub(super) async fn mark_below(&self, disk: &Disk) {
        let next = disk.record.borrow().next.clone();
        let (Some(next), true) = (next, is_marked(disk)) else {
            return;
        };
        let marked = async {
            let image = found(&next).await?;
            let path = image.path().to_path_buf();
            apart(&path, LIMIT, move || overlay::mark(&image)).await
        };
        if let Err(failure) = marked.await {
            tracing::warn!("disk {}: {failure}", disk.minor);
        }
    }
}

/// The image below was marked when its taking over began.
fn is_marked(disk: &Disk) -> bool {
    let record = disk.record.borrow();
    record.mirror.as_ref().is_some_and(|mirror| mirror.marked)
}

/// What the disk goes on in, which is the one that it was.
async fn found(next: &Next) -> Result<Arc<Image>, Failure> {
    let image = image::of(&next.open).await?;
    let image = image.ok_or_else(|| Failure::invalid("there is no image"))?;
    match image.is(next.identity, next.born) {
        true => Ok(image),
        false => Err(image::not_the_same(&image)),
    }
}
