// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening the disk in an image that the supervisor has sent. An image may name others, and this process asks the
//! supervisor for them.

use super::cow::MEMORY;
use super::Session;
use control::tapdisk::{Open, Reply, RequestedFile, State};
use control::{Code, Driver, Failure, Target};
use diskio::{Errno, File, LockKind, LockPart};
use drivers::{Disk, DiskInfo, Fence, Raw};
use formats::{Base, Below, ImageFormat, Options, OverlayPlan};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The format of a driver's images, if they have one: that of the driver's name.
pub(super) fn kind(driver: Driver) -> Option<ImageFormat> {
    // Its image is the memory.
    if driver == Driver::Cow {
        return Some(ImageFormat::Qcow2);
    }
    let mut formats = ImageFormat::ALL.into_iter();
    formats.find(|format| driver.has_format() && format.name() == driver.name())
}

/// Returns the type of a driver's images as backing images.
pub(super) fn below(driver: Driver) -> Result<Below, Failure> {
    match kind(driver).filter(|_| driver.has_image()) {
        Some(kind) => Ok(Below::Format(kind)),
        // The image of another driver is not the disk byte for byte.
        None if driver.has_image() && !driver.has_one_writer() => Ok(Below::Raw),
        None => Err(Failure::invalid(format!(
            "{driver} has no images that could be parents: use aio for a raw one"
        ))),
    }
}

/// Makes sure that a write does not round up the size of a file.
fn keep_size(file: &mut File, name: &str) -> Result<(), Failure> {
    file.keep_size()
        .map(drop)
        .map_err(|error| Failure::system(format!("cannot look at {name}"), &error))
}

/// Flushes a file of an image with tables.
pub(super) async fn flush_tables(open: &Open, file: &File) -> Result<(), Errno> {
    let driver = open.target.driver();
    // A driver with a header of its own may have more than that. LUKS has no tables that tapdisk writes.
    let has_own = driver.has_image() && driver.has_one_writer() && driver != Driver::Luks;
    let has_tables = driver.has_tables() || has_own;
    match has_tables && !open.read_only {
        true => file.flush().await,
        false => Ok(()),
    }
}

/// Drops a file from the page cache, which may hold what the storage could not write back as if it were durable.
pub(super) fn forget_lost(file: &File) -> Result<(), Failure> {
    let forgotten = file.forget();
    forgotten.map_err(|error| {
        let what = "cannot drop from the page cache what the storage may have lost";
        Failure::system(what, &error.into())
    })
}

/// The failure for an image that the disk cannot be copied to, because a flush of it has failed.
pub(super) fn may_be_lost(open: &Open, error: Errno) -> Failure {
    let what = format!("earlier writes to {} may be lost", open.target);
    Failure::system(what, &error.into())
}

impl Session {
    /// Checks that an image can be opened while another process serves it. It reads only the header of an image with
    /// tables, because the rest may be changing.
    pub(super) async fn prepare(
        &self,
        open: Open,
        image: Option<OwnedFd>,
    ) -> Result<Reply, Failure> {
        if self.status().state != State::Idle {
            return Err(Failure::new(Code::State, "this tapdisk has a node already"));
        }
        self.select(&open)?;
        let open = Open {
            read_only: true,
            shared: true,
            ..open
        };
        let io = &self.runtime.io;
        let Some(kind) = kind(open.target.driver()) else {
            if open.target.export().is_some() {
                // Its server may take one client only.
                return Ok(Reply::Fit { size: None });
            }
            let (disk, shape) = drivers::open(io, &open, image).await?;
            let closed = disk.close().await;
            closed.map_err(|error| Failure::system("cannot let go of the image", &error.into()))?;
            let size = Some(shape.size);
            return Ok(Reply::Fit { size });
        };
        let file = drivers::image(io, &open, image).await?;
        formats::look(kind, &file).await?;
        Ok(Reply::Fit { size: None })
    }

    /// Returns the image that the supervisor has sent, locked after the I/O of the previous process is over: from now
    /// on its content must not change. Before that, the kernel has learned when the I/O of this process will be over.
    pub(super) async fn locked(
        &self,
        open: &Open,
        image: Option<OwnedFd>,
    ) -> Result<Option<File>, Failure> {
        let Some(image) = image else {
            if open.target.export().is_some() {
                self.reach(open, Fence::NETWORK).await?;
            }
            return Ok(None);
        };
        self.reach(open, Fence::of_descriptor(&image)).await?;
        let file = drivers::image(&self.runtime.io, open, Some(image)).await?;
        Ok(Some(file))
    }

    /// Makes the tables in a file of the image durable that an earlier process has written, before a driver reads them:
    /// a flush that loses them later would fail, but the driver would not write them again, because it only knows its
    /// own. If they are lost now, the driver reads what the storage has, and a flush of the guest reports the error.
    ///
    /// # Errors
    /// What is lost cannot be dropped from the page cache.
    pub(super) async fn make_durable(&self, open: &Open, file: &File) -> Result<(), Failure> {
        let flushed = flush_tables(open, file).await;
        if let Err(error) = flushed {
            self.lost().add(error);
        }
        if self.lost().is_owed() {
            forget_lost(file)?;
        }
        if flushed.is_err() {
            // The driver reads what the storage has now, a part of which may be in a cache of the storage only.
            if let Err(error) = flush_tables(open, file).await {
                self.lost().add(error);
            }
        }
        Ok(())
    }

    /// The disk that `open` asks for.
    pub(super) async fn disk(
        &self,
        open: &Open,
        file: Option<File>,
    ) -> Result<(Disk, DiskInfo), Failure> {
        let parts = Parts {
            session: self,
            open,
            looks: false,
            is_other: false,
            backings: RefCell::default(),
        };
        parts.disk(file).await
    }

    /// The disk that the served one is copied to.
    ///
    /// # Errors
    /// An earlier process may have lost writes to it. The guest is owed nothing for that.
    pub(super) async fn other_disk(
        &self,
        open: &Open,
        file: Option<File>,
    ) -> Result<(Disk, DiskInfo), Failure> {
        let parts = Parts {
            session: self,
            open,
            looks: false,
            is_other: true,
            backings: RefCell::default(),
        };
        let (disk, shape) = parts.disk(file).await?;
        if !disk.owes() {
            return Ok((disk, shape));
        }
        // The failure says more than that of this.
        let _closed = disk.close().await;
        Err(may_be_lost(open, Errno::IO))
    }

    /// Creates an image on top of the served one, which does not change and stays in use.
    pub(super) async fn overlay(
        &self,
        target: Target,
        image: Option<OwnedFd>,
    ) -> Result<Reply, Failure> {
        let io = &self.runtime.io;
        let (open, disk, unit, served) = {
            let state = self.state.borrow();
            match (&state.open, &state.disk, &state.server, &state.file) {
                (Some(open), Some(disk), Some(server), Some(served)) => {
                    let unit = server.disk().unit();
                    (open.clone(), disk.clone(), unit, served.clone())
                }
                _ => return Err(Failure::new(Code::State, "no image is served")),
            }
        };
        let (from, kind) = (below(open.target.driver())?, kind(target.driver()));
        let paths = open.target.path().zip(target.path());
        let (Some(kind), Some((parent, child))) = (kind, paths) else {
            return Err(Failure::invalid(format!(
                "{target} cannot have a backing image: use qcow2 or vhd"
            )));
        };
        let base = Base::of(from, parent, &served, child).await?;
        let image = image.ok_or_else(|| Failure::invalid("the new image's file is missing"))?;
        let name = format!("the image of {target}");
        // Only the sender knows this file, and it is not locked, because the lock would last until the sender has
        // closed its descriptor, too.
        let image = drivers::file(io, image, LockKind::Write, None, &name).await?;
        let sector = disk.logical_block;
        let said = target.sector_size().or(open.target.sector_size());
        // A VHD has the sectors of the image below.
        if kind == ImageFormat::Vhd && said.is_some() && target.sector_size() != Some(sector) {
            return Err(Failure::invalid(format!(
                "{} has logical sectors of {sector} bytes by sector-size= in front of it, and a VHD stores no size of \
                 sectors: use qcow2",
                open.target
            )));
        }
        let plan = OverlayPlan {
            size: disk.size,
            sector,
            unit,
        };
        formats::overlay(&image, kind, plan, &base).await?;
        Ok(Reply::Done)
    }

    /// Returns the properties of the disk that `open` describes, while another process may be using the image: it
    /// neither locks nor changes the image, and drops all that it has read.
    pub(super) async fn look(
        &self,
        open: &Open,
        image: Option<OwnedFd>,
    ) -> Result<(DiskInfo, Fence), Failure> {
        let unlocked = Open {
            shared: true,
            ..open.clone()
        };
        let file = match image {
            Some(_) => Some(drivers::image(&self.runtime.io, &unlocked, image).await?),
            None => None,
        };
        let parts = Parts {
            session: self,
            open,
            looks: true,
            is_other: false,
            backings: RefCell::default(),
        };
        let (disk, shape) = parts.disk(file).await?;
        let fence = disk.fence();
        let closed = disk.close().await;
        closed.map_err(|error| Failure::system("cannot close the image", &error.into()))?;
        Ok((shape, fence))
    }
}

/// The files that an image names.
pub(super) struct Parts<'s> {
    pub(super) session: &'s Session,
    pub(super) open: &'s Open,
    /// True if another process may be using the image: this one neither locks nor changes it.
    pub(super) looks: bool,
    /// True if it is an image that the disk is copied to, and not the one that is served.
    pub(super) is_other: bool,
    /// The numbers by which the kernel knows files below.
    pub(super) backings: RefCell<BTreeMap<PathBuf, u16>>,
}

impl Parts<'_> {
    /// The disk in an image.
    async fn disk(&self, file: Option<File>) -> Result<(Disk, DiskInfo), Failure> {
        let open = self.open;
        if let Some(export) = open.target.export() {
            return self.export(export).await;
        }
        let Some(kind) = kind(open.target.driver()) else {
            return drivers::open_on(open, file).await;
        };
        let mut file = file.ok_or_else(|| drivers::missing(open))?;
        if let Some(below) = open.target.below() {
            file = self.over(below, file).await?;
        }
        let writable = !open.read_only && !self.looks;
        if kind == ImageFormat::Vmdk && writable {
            // The image may be a text, which ends with its last line.
            keep_size(&mut file, &format!("the image of {}", open.target))?;
        }
        let path = open.target.path().unwrap_or(Path::new(MEMORY));
        let mut options = Options {
            writable,
            discard: open.discard && !open.read_only,
            key: self.key().await?,
            ..self.options(path)?
        };
        if let Some(cache) = open.target.cache() {
            options.cache = usize::try_from(cache).unwrap_or(usize::MAX);
        }
        let disk = formats::open_chain(kind, file, path, options, self).await?;
        drivers::activate(disk, open).await
    }

    pub(super) fn options(&self, path: &Path) -> Result<Options, Failure> {
        Ok(Options {
            parents: self.open.parents.map(below).transpose()?,
            ..Options::new(path.display().to_string())
        })
    }
}

impl formats::Files<File> for Parts<'_> {
    async fn open(&self, path: &Path, writable: bool) -> Result<File, Failure> {
        if !self.open.may_ask {
            return Err(Failure::unsupported(format!(
                "the image of {} names {}, which only a supervisor gives: let blktapctrl serve it",
                self.open.target,
                path.display()
            )));
        }
        let (what, kind) = match writable {
            true => (RequestedFile::Extent { path: path.into() }, LockKind::Write),
            false => (RequestedFile::Parent { path: path.into() }, LockKind::Read),
        };
        let given = self.session.needs.ask(what).await?;
        if let Some(backing) = given.backing.filter(|_| !writable) {
            self.backings.borrow_mut().insert(path.into(), backing);
        }
        let locked = (given.lock && !self.looks).then_some(LockPart::Whole);
        // The file may be on other storage than the image. A parent is only read, so late I/O on it does no harm.
        if writable {
            let fence = Fence::of_descriptor(&given.fd);
            self.session.reach(self.open, fence).await?;
        }
        let name = path.display().to_string();
        let io = &self.session.runtime.io;
        let mut file = drivers::file(io, given.fd, kind, locked, &name).await?;
        if !writable && self.open.target.caches_below() {
            file = file.with_shared_cache();
        }
        if writable {
            // The file has as many bytes of the disk as the image claims.
            keep_size(&mut file, &name)?;
            match self.is_other {
                true => self.session.make_other_durable(self.open, &file).await?,
                false => self.session.make_durable(self.open, &file).await?,
            }
        } else if locked.is_some() {
            let mut state = self.session.state.borrow_mut();
            state.parents.push((path.into(), file.clone()));
        }
        Ok(file)
    }

    fn backing(&self, path: &Path) -> Option<u16> {
        self.backings.borrow().get(path).copied()
    }

    fn raw(&self, file: File) -> Disk {
        Disk::new(Raw::new(file, false))
    }
}

#[cfg(test)]
mod tests {
    use super::{below, kind};
    use control::Driver;
    use formats::{Below, ImageFormat};

    #[test]
    fn each_format_has_a_driver_of_its_name() {
        let has_one = |driver: &Driver| driver.has_format();
        for &driver in Driver::ALL.iter().filter(|driver| has_one(driver)) {
            let format = kind(driver).unwrap_or_else(|| panic!("{driver} has no format"));
            assert_eq!(format.name(), driver.name());
        }
        let count = Driver::ALL.iter().filter(|driver| has_one(driver)).count();
        assert_eq!(count, ImageFormat::ALL.len());
        assert_eq!(kind(Driver::Cow), Some(ImageFormat::Qcow2));
        assert_eq!(kind(Driver::Aio), None);
    }

    #[test]
    fn only_images_that_are_the_disk_are_raw_ones() {
        for &driver in Driver::ALL {
            let found = below(driver);
            match driver {
                Driver::Aio | Driver::Sync => assert_eq!(found, Ok(Below::Raw)),
                _ if driver.has_format() => assert_eq!(found.ok(), kind(driver).map(Below::Format)),
                _ => assert!(found.is_err(), "{driver}"),
            }
        }
    }
}
