// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disk is copied to another image, which then takes its place.

use super::image::{below, kind};
use super::Session;
use crate::jobs::mirror;
use crate::told::{params, succeeds};
use crate::twin::Twin;
use control::tapdisk::{Open, Reply};
use control::{Code, Driver, Failure, Target};
use diskio::{File, LockKind};
use drivers::{Disk, Shape};
use formats::{qcow2, vhd, Kind, Parent};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Parts of a cluster of a qcow2 image that has such.
const SUBCLUSTERS: u64 = 32;
/// Bytes of which a VHD says that it has them itself.
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
            return Err(Failure::new(Code::State, "the disk does not run"));
        };
        if server.is_read_only() || open.read_only || rate == 0 {
            return Err(Failure::invalid(
                "a mirror is of a disk that is written, to an image that may be, at some rate",
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
                "{} is not what the image that is served says is below it, by name and format (see tapimg info)",
                open.target
            )));
        };
        let open = Open {
            // Others would have to be asked for, and belong to the image that is served.
            may_ask: is_below || open.target.export().is_some() || open.target.key().is_some(),
            kernel_holds: false,
            // The lock of who reads it is in the way.
            shared: is_below,
            ..open
        };
        let file = self.locked(&open, image).await?;
        if let Some(file) = file.as_ref().filter(|_| is_below) {
            self.take_lock(&open.target, file)?;
        }
        if let Some(file) = file.as_ref().filter(|_| !is_below && open.may_ask) {
            check_alone(&open, file).await?;
        }
        let (disk, shape) = self.disk(&open, file).await?;
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
        let twin = Twin::new(disk, shape.size, is_below, ban);
        mirror::begin(self, &server, twin, rate);
        Ok(Reply::Done)
    }

    /// Bytes of the parts of the disk that the image that is served has itself or not; nothing if that does not go on
    /// from this one, by its header.
    ///
    /// # Errors
    /// It keeps something else that shows what is below, or is of another format.
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
        if kind != Some(Kind::Vhd) && !disk.goes_on().await? {
            return Ok(None);
        }
        let (Some(kind @ (Kind::Qcow2 | Kind::Vhd)), Some(path)) = (kind, open.target.path())
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
        if kind == Kind::Vhd {
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

    /// Where what is below the image at `child` was found when that was opened. It may have several names, of which the
    /// first counts that leads to what is meant: another one may be of something deeper in the chain.
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

    /// Locks for writing what is below, in place of the lock of who reads it there: that others read it would be as
    /// wrong as that they write it.
    fn take_lock(&self, target: &Target, file: &File) -> Result<(), Failure> {
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
            return Ok(());
        };
        view.lock(LockKind::Read).map_err(failed)?;
        match error.kind() {
            io::ErrorKind::WouldBlock => Err(Failure::new(
                Code::Busy,
                format!("somebody else reads {target}, and would see it change: end that, on other hosts too"),
            )),
            _ => Err(failed(error)),
        }
    }

    /// An image may take the place of the one that is served.
    fn may_follow(&self, open: &Open, shape: &Shape, size: u64) -> Result<(), Failure> {
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
        succeeds(open, known, &params(shape, open))
    }
}

/// An image for whose key may be asked names nothing else that would be asked for then.
async fn check_alone(open: &Open, file: &File) -> Result<(), Failure> {
    let Some(kind) = kind(open.target.driver()) else {
        return Ok(());
    };
    match formats::look(kind, file).await?.parent {
        None => Ok(()),
        Some(_) => Err(Failure::unsupported(format!(
            "{} goes on from another image, and a disk is copied to one that stands alone: make that with qemu-img \
             create, without -b",
            open.target
        ))),
    }
}

/// A write of a part of a cluster may move the rest of it, which who reads it there does not learn. Nobody does where
/// the image over it has all of the cluster itself.
fn may_move(below: &Open) -> bool {
    matches!(
        below.target.driver(),
        Driver::Qcow2 | Driver::Qcow | Driver::Vmdk
    )
}

/// It was not used; that it cannot be closed in order harms nobody.
async fn close(disk: Disk) {
    if let Err(error) = disk.close().await {
        diskio::say!("tapdisk: the other image was not closed: {error}");
    }
}
