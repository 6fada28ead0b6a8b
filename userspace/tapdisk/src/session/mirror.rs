// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disk is copied to another image, which then takes its place.

use super::image::{below, flush_tables, forget_lost, kind, may_be_lost};
use super::{not_running, Session};
use crate::describe::{params, succeeds};
use crate::jobs::mirror;
use crate::mirror_target::{MirrorTarget, WriteLock};
use control::tapdisk::{Open, Reply};
use control::{Code, Driver, Failure, Target};
use diskio::{File, LockKind};
use drivers::{Disk, DiskInfo};
use formats::{qcow2, vhd, ImageFormat, Parent};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Parts of a cluster of a qcow2 image that has such.
const SUBCLUSTERS: u64 = 32;
/// Bytes of a sector, for each of which a VHD has a bit.
const SECTOR: u64 = 512;

impl Session {
    /// Begins to copy the disk to the image that came along.
    pub(super) async fn mirror(
        self: &Rc<Self>,
        open: Open,
        image: Option<OwnedFd>,
        rate: u64,
        is_below: bool,
    ) -> Result<Reply, Failure> {
        let server = self.server();
        let Some(server) = server.filter(|server| server.is_fetching()) else {
            return Err(not_running());
        };
        if server.is_read_only() || open.read_only || rate == 0 {
            return Err(Failure::invalid(
                "a mirror needs a writable disk, a writable image and a rate above 0",
            ));
        }
        if server.twin().is_some_and(|twin| twin.is_active()) {
            let why = "the disk has a mirror already";
            return Err(Failure::new(Code::State, why));
        }
        let parts = match is_below {
            true => self.parts_over(server.disk(), &open.target).await?,
            false => Some(1),
        };
        let Some(parts) = parts else {
            return Err(Failure::invalid(format!(
                "{} is not what the image that is served says is below it, by name and format (see `tapimg info IMAGE`)",
                open.target
            )));
        };
        let open = Open {
            // Other files would need questions to the supervisor, and belong to the served image.
            may_ask: is_below || open.target.export().is_some() || open.target.key().is_some(),
            kernel_holds: false,
            // The reader's own lock would be in the way.
            shared: is_below,
            ..open
        };
        let file = self.locked(&open, image).await?;
        if let Some(file) = &file {
            self.make_other_durable(&open, file).await?;
        }
        let lock = match file.as_ref().filter(|_| is_below) {
            Some(file) => Some(self.take_lock(&open.target, file)?),
            None => None,
        };
        if let Some(file) = file.as_ref().filter(|_| !is_below && open.may_ask) {
            check_alone(&open, file).await?;
        }
        let (disk, shape) = self.other_disk(&open, file).await?;
        let may = self.may_follow(&open, &shape, server.size());
        let may = may.and_then(|()| match is_below && may_move(&open) && parts % disk.unit() != 0 {
            false => Ok(()),
            true => Err(Failure::unsupported(format!(
                "{} has larger clusters than the image over it: commit that with tapimg, while the disk is detached",
                open.target
            ))),
        });
        if let Err(failure) = may {
            close(disk).await;
            return Err(failure);
        }
        let ban = match self.direct.forbid().await {
            Ok(ban) => ban,
            Err(failure) => {
                close(disk).await;
                return Err(failure);
            }
        };
        let twin = MirrorTarget::new(disk, shape.size, lock, is_below, ban);
        mirror::begin(self, &server, twin, rate);
        Ok(Reply::Done)
    }

    /// As [`make_durable`](Self::make_durable), for the other image: the guest's writes are not lost by an error there.
    pub(super) async fn make_other_durable(&self, open: &Open, file: &File) -> Result<(), Failure> {
        let flushed = flush_tables(open, file).await;
        if flushed.is_err() || self.lost().is_owed() {
            forget_lost(file)?;
        }
        flushed.map_err(|error| may_be_lost(open, error))
    }

    /// Returns the length in bytes of the parts of the disk that the served image may hold separately; `None` if
    /// `target` is not its backing image, according to its header.
    ///
    /// # Errors
    /// The image has snapshots that need the backing image, or its format does not support a commit while it
    /// is served.
    async fn parts_over(&self, disk: &Disk, target: &Target) -> Result<Option<u64>, Failure> {
        let (open, file) = {
            let state = self.state.borrow();
            match (&state.open, &state.file) {
                (Some(open), Some(file)) => (open.clone(), file.clone()),
                _ => return Err(Failure::new(Code::State, "no image is served")),
            }
        };
        let kind = kind(open.target.driver());
        // A VHD has nothing inside that could be in the way; a qcow2 image may have snapshots.
        if kind != Some(ImageFormat::Vhd) && !disk.goes_on().await? {
            return Ok(None);
        }
        let (Some(kind @ (ImageFormat::Qcow2 | ImageFormat::Vhd)), Some(path)) =
            (kind, open.target.path())
        else {
            return Err(Failure::unsupported(format!(
                "{} is no qcow2 image and no VHD: of others nothing is committed while they are served",
                open.target
            )));
        };
        let parent = formats::look(kind, &file).await?.parent;
        let parent = parent.unwrap_or_default();
        let place = self.place_of(&parent, path).await?;
        let what = parent.driver.map(|driver| driver.parse());
        if target.path() != place.as_deref() || what != Some(below(target.driver())) {
            return Ok(None);
        }
        if kind == ImageFormat::Vhd {
            return Ok(Some(SECTOR));
        }
        let header = qcow2::header(&file).await?;
        let parts = if header.has_subclusters() {
            SUBCLUSTERS
        } else {
            1
        };
        Ok(Some(header.cluster() / parts))
    }

    /// Returns the path at which the backing image of the image at `child` was found when it was opened. The header may
    /// have several names, of which the first one counts that leads to the right image: another one may lead to an
    /// image deeper in the chain.
    async fn place_of(&self, parent: &Parent, child: &Path) -> Result<Option<PathBuf>, Failure> {
        for name in &parent.names {
            let place = formats::resolve(name, child)?;
            let file = {
                let state = self.state.borrow();
                let mut parents = state.parents.iter();
                let its = parents.find(|(path, _)| **path == *place);
                its.map(|(_, file)| file.clone())
            };
            let Some(file) = file else {
                continue;
            };
            let is_meant = match &parent.id {
                Some(id) => vhd::spelled(vhd::id(&file).await?) == *id,
                None => true,
            };
            if is_meant {
                return Ok(Some(place));
            }
        }
        Ok(None)
    }

    /// Locks the backing image for writing, in place of the reader's lock: no other process may read it any more,
    /// because its content changes.
    fn take_lock(&self, target: &Target, file: &File) -> Result<WriteLock, Failure> {
        let state = self.state.borrow();
        let mut parents = state.parents.iter();
        let view = parents.find(|(path, _)| Some(&**path) == target.path());
        let (_, view) = view.ok_or_else(|| {
            Failure::new(
                Code::State,
                format!("{target} was not locked by this process"),
            )
        })?;
        let failed = |error| Failure::system(format!("cannot lock {target}"), &error);
        view.unlock().map_err(failed)?;
        let Err(error) = file.lock(LockKind::Write) else {
            return Ok(WriteLock::new(file, view));
        };
        view.lock(LockKind::Read).map_err(failed)?;
        match error.kind() {
            io::ErrorKind::WouldBlock => Err(Failure::new(
                Code::Busy,
                format!("another process reads {target}, and would see it change: end it, on other hosts too"),
            )),
            _ => Err(failed(error)),
        }
    }

    /// An image may take the place of the one that is served.
    fn may_follow(&self, open: &Open, shape: &DiskInfo, size: u64) -> Result<(), Failure> {
        if shape.size < size {
            return Err(Failure::new(
                Code::Image,
                format!(
                    "{} has {} bytes, and the disk {size}: make it larger",
                    open.target, shape.size
                ),
            ));
        }
        let known = self.state.borrow().params;
        if let Some(known) = known.filter(|known| known.logical_block != shape.logical_block) {
            return Err(other_sectors(
                &open.target,
                shape.logical_block,
                known.logical_block,
            ));
        }
        succeeds(open, known, &params(shape, open))
    }
}

/// Returns the failure of an image on which the guest would find no partitions at its next start, because their table
/// counts in sectors of another size.
fn other_sectors(target: &Target, its: u32, wanted: u32) -> Failure {
    let store = match target.driver() {
        Driver::Qcow2 => {
            ", or make the image with `tapimg create IMAGE SIZE --sector-size 4096`, or 512, which it stores"
        }
        _ => "",
    };
    Failure::new(
        Code::Image,
        format!(
            "{target} has logical sectors of {its} bytes, and the disk of {wanted}, in which its guest's partition table \
             counts: write sector-size={wanted}, in front of it, here and in the guest's configuration{store}"
        ),
    )
}

/// Checks that an image for whose key this process asks names no other file, because it would ask for that, too.
async fn check_alone(open: &Open, file: &File) -> Result<(), Failure> {
    let Some(kind) = kind(open.target.driver()) else {
        return Ok(());
    };
    match formats::look(kind, file).await?.parent {
        None => Ok(()),
        Some(_) => Err(Failure::unsupported(format!(
            "{} has a backing image, and a mirror needs an image without one: create it with qemu-img \
             create, without -b",
            open.target
        ))),
    }
}

/// Returns true if a write of a part of a cluster may move the rest of it, which the reader of that image does not
/// learn. No reader needs the moved part if the image on top has all of the cluster.
fn may_move(below: &Open) -> bool {
    matches!(
        below.target.driver(),
        Driver::Qcow2 | Driver::Qcow | Driver::Vmdk
    )
}

/// Closes a disk that was not used, so a failure has no consequence.
async fn close(disk: Disk) {
    if let Err(error) = disk.close().await {
        diskio::say!("tapdisk: the other image was not closed: {error}");
    }
}
