// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commit: the backing image of a disk takes over the blocks that the disk's image has allocated, while the guest
//! works, and the disk then switches to it. It ends a snapshot.
//!
//! A commit is a [mirror](super::mirror) to an image that shows most of the disk already. By the time that it is
//! changed, the disk reads nothing of it that would change: the image above has a copy of everything that is put there.
//! Whenever the commit ends, the disk has the same content in its image. The backing image is another disk from the
//! first byte on, so no other disk may have it; its mode has no write permission until it becomes the disk.

use super::key;
use crate::disk::Disk;
use crate::image::Image;
use crate::record::parents;
use control::{Code, Driver, Failure};

/// Checks that the disk's image can be committed to its backing image.
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
                "disk {0} takes over what is below it: end that first: `tap-ctl stream -m {0} --cancel`",
                disk.minor
            ),
        )),
    }
}

/// Checks that an image is recorded as a backing image of the disk, whatever the disk's process reports; only such an
/// image may be changed. Its next use is the decision of the administrator or toolstack that named it.
pub(super) fn check_below(disk: &Disk, image: &Image) -> Result<(), Failure> {
    let record = disk.record.borrow();
    if parents(&record.parts).any(|part| image.is(part.identity, part.born)) {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "{} is no backing image of disk {}: name one as the snapshot named it; `tapimg info --chain IMAGE` of the disk's \
         image shows them",
        image.path().display(),
        disk.minor
    )))
}
