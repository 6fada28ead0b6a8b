// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image below that of a disk takes over what that has itself, while the guest works, and the disk goes on there:
//! the other end of a snapshot.
//!
//! It is a [mirror](super::mirror) to an image that shows most of the disk already, and of which the disk knows nothing
//! else by the time that it is changed: whatever is written there the image above has, too. So whenever it ends, the
//! disk is the same in the image that it has. What was below is another disk from the first byte on, so no other disk
//! may have it; and it keeps its mark as one that nobody writes until it becomes the disk.

use super::key;
use super::mirror::image_of;
use crate::apart::{apart, LIMIT};
use crate::disk::Disk;
use crate::image::{self, Image};
use crate::log::tell;
use crate::overlay;
use crate::record::{parents, Mirrored, Role};
use control::{Code, Driver, Failure};
use std::sync::Arc;

/// What the disk has may be given to what is below it.
pub(super) fn check_top(disk: &Disk) -> Result<(), Failure> {
    let target = disk.open()?.target;
    if !matches!(target.driver(), Driver::Qcow2 | Driver::Vhd) {
        return Err(Failure::unsupported(format!(
            "{target} is no qcow2 image and no VHD: of others nothing is committed while they are served"
        )));
    }
    key::must_stay_secret(&target, "the image below it")?;
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
    if parents(&record.parts).any(|part| image.is(part.identity, part.born)) {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "disk {} does not go on from {}: name the image below its own, as tap-ctl snapshot said it, or see tapimg \
         info --chain",
        disk.minor,
        image.path().display()
    )))
}

/// The image below is to be what the disk goes on in: it may be written.
///
/// # Errors
/// The system refuses to, or it is another one by now.
pub(super) async fn unmark(mirror: &Mirrored, image: Arc<Image>) -> Result<Arc<Image>, Failure> {
    if !mirror.marked {
        return Ok(image);
    }
    let (path, theirs) = (image.path().to_path_buf(), image.clone());
    apart(&path, LIMIT, move || overlay::unmark(&theirs)).await?;
    let found = image::find(&path).await?;
    match found.is(Some(image.identity()), image.born()) {
        true => Ok(found),
        false => Err(image::not_the_same(&image)),
    }
}

/// It stays what is below the disk, and nobody is to write it.
pub(super) async fn mark_again(disk: &Disk) {
    let (mirror, part) = {
        let record = disk.record.borrow();
        let mut parts = record.parts.iter();
        let part = parts.find(|part| part.role == Role::Mirror).cloned();
        let marked = record.mirror.as_ref().filter(|mirror| mirror.marked);
        (marked.cloned(), part)
    };
    let (Some(mirror), Some(part)) = (mirror, part) else {
        return;
    };
    let marked = async {
        let image = image_of(&mirror, &part).await?;
        let path = image.path().to_path_buf();
        apart(&path, LIMIT, move || overlay::mark(&image)).await
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
