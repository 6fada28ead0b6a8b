// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the kernel serves a disk without its process it also reads what is below the image: its process says which parts of the
//! disk are there.
//!
//! A file below has a number with the kernel that no other file of the disk ever gets. So a process can rely on a
//! number for good, even when the image changes: by a snapshot, a commit, or a process that takes the disk over. The
//! kernel does not get a file that is to be read through the page cache, because it reads past that.
//!
//! There are 15 numbers; a disk that had more files below it leaves the rest to its process. The kernel gets a file when
//! the process does, and again with the image; it loses all of them with the image. A disk is served without that,
//! too.

use super::passthrough::{direct_fd, is_locked, lock_data, not_taken};
use super::Lifecycle;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::image::{self, Image};
use crate::kernel::IMAGE;
use crate::record::{parents, DiskPart, LentFile};
use control::supervisor::What;
use control::tapdisk::Open;
use control::Failure;
use diskio::LockKind;
use std::io;
use std::sync::Arc;
use tapdev::abi::MAX_BACKINGS;

/// The first number of a file below: those before it are the image's.
const FIRST: u16 = 1;

impl Lifecycle {
    /// The number by which the kernel knows a file below the image that a process is given; nothing if it is not for
    /// the kernel.
    pub(super) async fn lend(
        &self,
        disk: &Disk,
        open: &Open,
        part: &DiskPart,
        file: &Arc<Image>,
    ) -> Option<u16> {
        let lent = async {
            let node = match may_lend(open) {
                true => self.node_of(disk)?,
                false => None,
            };
            let Some(node) = node.filter(|node| self.is_for_kernel(node, open)) else {
                return Ok(None);
            };
            let Some(number) = self.number(disk, part)? else {
                return Ok(None);
            };
            // A new image is not served yet, and gets what is below it with that.
            let is_next = disk.record.borrow().next.is_some();
            let has_image = node.backings >> IMAGE & 1 != 0;
            if has_image && !is_next && !is_written(disk) {
                self.add_below(disk, number, file).await?;
            }
            Ok(Some(number))
        };
        let lent = lent.await;
        self.or_tell(disk, open, lent).flatten()
    }

    /// The kernel has got the image of a disk: it gets what its process has below that, too.
    pub(super) async fn lend_again(&self, disk: &Disk, open: &Open) {
        if is_written(disk) || !may_lend(open) {
            return;
        }
        let all: Vec<DiskPart> = parents(disk.record.borrow().its_parts()).cloned().collect();
        for part in all {
            let lent = async {
                let Some(number) = self.number(disk, &part)? else {
                    return Ok(());
                };
                let file = image::find(&part.path).await?;
                if !file.is(part.identity, part.born) {
                    return Err(image::not_the_same(&file));
                }
                self.add_below(disk, number, &file).await
            };
            let lent = lent.await;
            self.or_tell(disk, open, lent);
        }
    }

    /// Returns the lent file; a failure is an event only if the disk asked for passthrough (`direct=`).
    fn or_tell<T>(&self, disk: &Disk, open: &Open, lent: Result<T, Failure>) -> Option<T> {
        let told = lent.map_err(|failure| {
            if open.target.direct().is_some() {
                let why = failure.message;
                let what = What::NotDirect { why };
                self.registry.events.add(Some(disk.minor), what);
            }
        });
        told.ok()
    }

    fn number(&self, disk: &Disk, part: &DiskPart) -> Result<Option<u16>, Failure> {
        let Some(identity) = part.identity.filter(|_| part.locked) else {
            return Ok(None);
        };
        let lent = LentFile {
            identity,
            born: part.born,
        };
        let place = |all: &[LentFile]| all.iter().position(|one| *one == lent);
        let known = place(&disk.record.borrow().lent);
        let place = match known {
            Some(place) => place,
            None => {
                let count = disk.record.borrow().lent.len();
                if count >= usize::from(MAX_BACKINGS - FIRST) {
                    return Ok(None);
                }
                self.registry
                    .change(disk, |record| record.lent.push(lent))?;
                count
            }
        };
        // CAST: less than the most.
        Ok(Some(FIRST + place as u16))
    }

    /// Gives the kernel a file below the image, locked so that no other process writes it while the kernel may read it.
    async fn add_below(&self, disk: &Disk, number: u16, file: &Arc<Image>) -> Result<(), Failure> {
        let again = file.clone();
        let opened = blocking_io(file.path(), LIMIT, move || again.open(false, true)).await?;
        let fd = direct_fd(file, &opened)?;
        if !lock_data(file, fd, LockKind::Read)? {
            return Err(is_locked(file));
        }
        let kernel = &self.registry.kernel;
        let mut added = kernel.add_backing(disk.minor, number, fd, false);
        if matches!(&added, Err(error) if error.kind() == io::ErrorKind::AlreadyExists) {
            // A supervisor that knew nothing of numbers has left another file there.
            self.take_numbers(disk, &[number], self.patience.get())
                .await?;
            added = kernel.add_backing(disk.minor, number, fd, false);
        }
        added.map_err(|error| not_taken(file, &error))
    }
}

/// Whether the kernel could read the files below this image.
fn may_lend(open: &Open) -> bool {
    open.target.may_map() && !open.target.caches_below()
}

/// A commit is about to write the files below the disk's image.
fn is_written(disk: &Disk) -> bool {
    let record = disk.record.borrow();
    record.mirror.as_ref().is_some_and(|mirror| mirror.below)
}
