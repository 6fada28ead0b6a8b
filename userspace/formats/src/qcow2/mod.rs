// SPDX-License-Identifier: MIT OR Apache-2.0
//! qcow2, versions 2 and 3.

mod alloc;
mod bitmap;
mod bitmap_reader;
mod bitmap_upkeep;
mod census;
mod check;
mod compressed;
mod content;
mod create;
mod drop_backing;
mod entry;
mod facts;
mod geometry;
mod head;
mod header;
mod image;
mod in_flight;
mod pack;
mod places;
mod preallocation;
mod quick;
mod read;
mod rebuild;
mod refcounts;
mod rename;
mod resize;
mod row;
mod slices;
mod snapshot;
mod write;
mod zero;

pub use bitmap::{bitmaps, DiskBitmap};
pub use check::Findings;
pub use compressed::pack;
pub use create::{create, Qcow2Create};
pub use facts::check;
pub use header::{BackingImage, Compression, Qcow2Header};
pub use rename::set_backing;
pub use snapshot::DiskSnapshot;

use crate::barrier::Barrier;
use crate::base::{self, Base};
use crate::field::{counters, refused};
use crate::ExtentFile as Part;
use crate::{luks, storage, ImageNeeds, ImageParts, Options, Parent, Storage};
use alloc::Allocator;
use compressed::UnpackedClusters;
use content::ClusterFile;
use control::Failure;
use diskio::{Bytes, Data, Errno};
use drivers::{
    Attributes, DirtyExtent, Disk, DiskInfo, Driver, DriverLimits, Extent, Fence, MappedExtent,
    QueuedIo,
};
use header::{CORRUPT, DIRTY};
use image::{ByteRun, Qcow2Image};
use slices::Slices;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes of a read or a write at once, and of a discard.
const TRANSFER: u64 = 4 << 20;
const ZEROES: u64 = 1 << 30;

/// An image as a driver.
pub struct Qcow2<S: Storage> {
    file: S,
    /// Backing image that the header names.
    below: RefCell<Option<Rc<Base>>>,
    /// The file with its data, if its header says that there is one.
    data_file: Option<S>,
    /// Number of files that were given for that.
    extents: usize,
    options: Options,
    image: RefCell<Option<Rc<Qcow2Image<S>>>>,
}

/// Returns the header of an image. The caller must have locked it.
pub async fn header<S: Storage>(file: &S) -> Result<Qcow2Header, Failure> {
    let failed = |error: Errno| Failure::system("cannot read the header", &error.into());
    let begin = storage::bytes(file, 0, 512).await.map_err(failed)?;
    let len = header::needed(&begin)?;
    let bytes = storage::bytes(file, 0, len).await.map_err(failed)?;
    Qcow2Header::parse(&bytes)
}

/// Returns the encryption of an image's clusters; `None` if they are not encrypted.
///
/// # Errors
/// The image cannot be read, or not be served.
pub async fn encryption<S: Storage>(file: &S) -> Result<Option<luks::LuksHeader>, Failure> {
    match header(file).await?.crypt {
        Some(place) => Ok(Some(luks::header_at(file, place.at, place.len).await?)),
        None => Ok(None),
    }
}

/// Returns the files that an image needs beside itself; no name in the header is followed.
pub async fn look<S: Storage>(file: &S) -> Result<ImageNeeds, Failure> {
    let header = header(file).await?;
    let parent = header.backing.map(|backing| Parent {
        names: vec![backing.name],
        driver: backing.format,
        ..Parent::default()
    });
    let extents = match (header.geometry.external, header.data_file) {
        (false, _) => Vec::new(),
        (true, Some(name)) => vec![Part {
            name,
            read_only: false,
        }],
        (true, None) => {
            return Err(refused(
                "the image has its data in another file and does not name it: name it with qemu-img amend -o data_file=FILE",
            ))
        }
    };
    Ok(ImageNeeds {
        size: header.size,
        sector: header.sector,
        parent,
        extents,
    })
}

/// The snapshots in an image.
pub async fn snapshots<S: Storage>(file: &S) -> Result<Vec<DiskSnapshot>, Failure> {
    let header = header(file).await?;
    let mut all = Vec::new();
    snapshot::walk(file, &header, |one| all.push(one)).await?;
    Ok(all)
}

impl<S: Storage> Qcow2<S> {
    /// The image in `file`, which is looked at when it is activated.
    pub fn new(file: S, parts: ImageParts<S>, options: Options) -> Self {
        Self {
            file,
            below: RefCell::new(parts.parent.map(|disk| Rc::new(Base::new(disk)))),
            extents: parts.extents.len(),
            data_file: parts.extents.into_iter().next(),
            options,
            image: RefCell::new(None),
        }
    }

    fn image(&self) -> Result<Rc<Qcow2Image<S>>, Errno> {
        self.image.borrow().clone().ok_or(Errno::BADFD)
    }

    /// Returns the image for an answer about it.
    fn described(&self) -> Result<Rc<Qcow2Image<S>>, Failure> {
        let failed = |error: Errno| {
            let what = format!("{}: the image is not open", self.options.name);
            Failure::system(what, &error.into())
        };
        self.image().map_err(failed)
    }

    /// Refuses images that cannot be served.
    fn check(&self, header: &Qcow2Header) -> Result<(), Failure> {
        if self.options.writable && header.incompatible & CORRUPT != 0 {
            return Err(refused(
                "the header says that the image is corrupt: repair it with qemu-img check -r all, or serve it read-only",
            ));
        }
        if self.options.writable && self.options.snapshot.is_some() {
            return Err(refused(
                "a snapshot inside of an image is read-only: serve it read-only",
            ));
        }
        let given = self.below.borrow().is_some();
        match &header.backing {
            Some(backing) if !given => {
                let name = &backing.name;
                return Err(refused(format!(
                    "the backing image {name:?} was not given along"
                )));
            }
            None if given => {
                return Err(refused(
                    "the image has no backing image, and one was given along",
                ))
            }
            _ => {}
        }
        match (header.geometry.external, self.extents) {
            (true, 1) | (false, 0) => Ok(()),
            (true, 0) => Err(refused(
                "the image has its data in another file, which was not given along",
            )),
            (true, count) => Err(refused(format!(
                "the image has its data in one file, and {count} were given along"
            ))),
            (false, _) => Err(refused(
                "the image has its data in itself, and a data file was given along",
            )),
        }
    }

    /// Activates the backing image and returns it; `None` if there is none.
    async fn active_below(&self) -> Result<Option<Rc<Base>>, Failure> {
        let below = self.below.borrow().clone();
        if let Some(below) = &below {
            below.activate().await?;
        }
        Ok(below)
    }

    async fn open(&self) -> Result<Qcow2Image<S>, Failure> {
        let header = header(&self.file).await?;
        self.check(&header)?;
        // With a wrong key nothing of the image is changed.
        let (data, key) = (self.data_file.as_ref(), self.options.key.as_ref());
        let content = ClusterFile::of(&self.file, data, &header, key).await?;
        let image = self.image_of(&header, content).await?;
        if let Some(wanted) = &self.options.snapshot {
            image.show(&snapshot::find(&self.file, &header, wanted).await?);
        }
        if self.options.writable && header.incompatible & DIRTY != 0 {
            let others = check::others(&self.file, &header).await?;
            let done = image.repair(&others).await?;
            diskio::say!(
                "{}: it was not closed, its refcounts are repaired: {done:?}",
                self.options.name
            );
        }
        if self.options.writable {
            self.refuse_cut(&image).await?;
        }
        Ok(image)
    }

    /// Refuses to write to an image that ends inside of a cluster with data: a write would make the file longer, with
    /// zeroes in place of the lost data.
    async fn refuse_cut(&self, image: &Qcow2Image<S>) -> Result<(), Failure> {
        let failed = |error: Errno| Failure::system("cannot see what is in it", &error.into());
        let length = self.file.size().map_err(failed)?;
        if length % image.geometry.cluster() == 0 || image.geometry.external {
            return Ok(());
        }
        let (mut at, size) = (0, image.size.get());
        while at < size {
            let Ok((run, len, _)) = image.map(at, size - at).await else {
                // A damaged table is reported by the requests that use it.
                at = (at / image.geometry.span() + 1).saturating_mul(image.geometry.span());
                continue;
            };
            if let ByteRun::Data { at: place, .. } = run {
                let inside = image.inside(at, place, len).map_err(failed)?;
                // A cluster that lies completely behind the end was damaged before.
                if inside < len && place.saturating_add(inside) == length {
                    let lost = at + inside;
                    return Err(refused(format!(
                        "the file ends inside of a cluster, at byte {lost} of the disk: it was cut off, and what is behind that is lost; \
                         copy what is left: `tapimg convert --damaged IMAGE NEW`"
                    )));
                }
            }
            at += len;
        }
        Ok(())
    }

    /// Makes the disk in an active image smaller: `size` bytes, at least one sector of 512 bytes. Bytes behind that are
    /// lost. There may be no other request. It is durable when this returns.
    ///
    /// # Errors
    /// The size is no smaller one, the image has snapshots inside, or the storage fails.
    pub async fn shrink(&self, size: u64) -> Result<(), Failure> {
        let failed = |error: Errno| Failure::system("cannot make the disk smaller", &error.into());
        let image = self.image().map_err(failed)?;
        if header(&self.file).await?.snapshots > 0 {
            return Err(refused(
                "it has snapshots inside, whose disks are larger: delete them with qemu-img snapshot -d",
            ));
        }
        image.shrink(size).await?;
        if let Some(data) = self.data_file.as_ref().filter(|data| !data.is_fixed()) {
            data.set_size(size).await.map_err(failed)?;
            data.flush().await.map_err(failed)?;
        }
        Ok(())
    }

    /// Compares the refcounts of the image, which must be active and not in use, with the users of its clusters.
    pub async fn findings(&self) -> Result<Findings, Failure> {
        let failed = |error: Errno| Failure::system("cannot check the image", &error.into());
        let image = self.image().map_err(failed)?;
        let header = header(&self.file).await?;
        let others = check::others(&self.file, &header).await?;
        image.check(&others).await.map_err(failed)
    }

    async fn image_of(
        &self,
        header: &Qcow2Header,
        content: ClusterFile<S>,
    ) -> Result<Qcow2Image<S>, Failure> {
        let geometry = header.geometry;
        let mut storages = vec![self.file.clone()];
        storages.splice(0..0, self.data_file.clone());
        let barrier = Barrier::new(storages);
        let metadata = barrier.metadata(&self.file);
        let (l1, reftable) = Qcow2Image::tables_of(header);
        let budget = self.options.cache;
        Ok(Qcow2Image {
            name: self.options.name.clone(),
            geometry,
            compression: header.compression,
            size: Cell::new(header.size),
            sector: header.sector,
            writable: self.options.writable,
            discard: self.options.discard,
            file: self.file.clone(),
            data: content,
            crypt: header.crypt,
            below: RefCell::new(self.active_below().await?),
            l1: Cell::new(l1),
            reftable: Cell::new(reftable),
            autoclear: Cell::new(header.autoclear),
            has_begun: Cell::new(header.autoclear & !header::RAW_EXTERNAL == 0),
            // Those of the disk, which a snapshot is not.
            bitmaps: header.bitmaps.filter(|_| self.options.snapshot.is_none()),
            notes: Default::default(),
            packed: Default::default(),
            slices: Slices::new(metadata, geometry.slice(), budget / 8 * 7),
            barrier,
            allocator: Allocator::new(),
            users: Default::default(),
            clusters: Default::default(),
            tables: Default::default(),
            zeroed: Cell::new(0),
            rows: RefCell::default(),
            beginning: Default::default(),
            unpacked: UnpackedClusters::new(geometry.cluster(), budget / 8),
            end: Cell::new(0),
            reported: Cell::new(0),
        })
    }

    /// Flushes the content, which alone decides the result, and then frees unused clusters.
    async fn finish(&self) -> Result<(), Errno> {
        let image = self.image.borrow_mut().take();
        let Some(image) = image.filter(|image| image.writable) else {
            return Ok(());
        };
        image.barrier.flush().await?;
        image.free().await;
        image.give_back().await;
        image.barrier.flush().await?;
        if let Err(error) = image.end_notes().await {
            diskio::say!(
                "{}: its dirty bitmaps were not stored ({error}) and are void: the next backup has to be a full one",
                image.name
            );
        }
        Ok(())
    }

    fn shape(&self, image: &Qcow2Image<S>) -> DiskInfo {
        // CAST: sizes of clusters, at most 2 MiB.
        let (cluster, part) = (
            image.geometry.cluster() as u32,
            image.geometry.part() as u32,
        );
        let logical_block = image.sector();
        DiskInfo {
            size: image.size.get(),
            logical_block,
            physical_block: 4096,
            discard: self.options.discard.then_some(part.max(logical_block)),
            write_cache: true,
            fua: false,
            limits: DriverLimits {
                transfer: TRANSFER,
                zeroes: ZEROES,
                align: cluster,
            },
        }
    }
}

impl<S: Storage> Driver for Qcow2<S> {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let image = self
            .open()
            .await
            .map_err(|failure| self.options.named(failure))?;
        let shape = self.shape(&image);
        *self.image.borrow_mut() = Some(Rc::new(image));
        Ok(shape)
    }

    fn fence(&self) -> Fence {
        storage::fence([&self.file].into_iter().chain(&self.data_file))
    }

    fn has_places(&self) -> bool {
        // The kernel has neither the data file nor the key.
        self.data_file.is_none() && self.options.key.is_none() && self.file.is_direct()
    }

    async fn places(&self, offset: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
        match self.has_places() {
            true => self.image()?.places(offset, len).await,
            false => Ok(Vec::new()),
        }
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.image()?.read(offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes, _how: Attributes) -> Result<(), Errno> {
        self.image()?.write(offset, data).await
    }

    fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo> {
        self.image.borrow().as_ref()?.begin_read(offset, data)
    }

    fn begin_write(&self, offset: u64, data: &Bytes) -> Option<QueuedIo> {
        self.image.borrow().as_ref()?.begin_write(offset, data)
    }

    async fn flush(&self) -> Result<(), Errno> {
        let image = self.image()?;
        image.barrier.flush().await?;
        // The flush has succeeded, whether the unused clusters can be freed or not.
        image.free().await;
        Ok(())
    }

    fn owes(&self) -> bool {
        let image = self.image.borrow();
        image.as_ref().is_some_and(|image| image.barrier.owes())
    }

    async fn discard(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        match self.options.discard {
            true => self.image()?.zero(offset, len, true).await,
            false => Err(Errno::OPNOTSUPP),
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        self.image()?.zero(offset, len, false).await
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.image()?.extents(offset, len, true).await
    }

    async fn layer(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.image()?.extents(offset, len, false).await
    }

    async fn bitmaps(&self) -> Result<Vec<String>, Failure> {
        let bitmaps = self.described()?.bitmap_names().await;
        bitmaps.map_err(|failure| self.options.named(failure))
    }

    async fn dirty(
        &self,
        bitmap: &str,
        offset: u64,
        len: u64,
        most: usize,
    ) -> Result<Vec<DirtyExtent>, Failure> {
        let range = offset..offset.saturating_add(len);
        let extents = self.described()?.dirty_extents(bitmap, range, most).await;
        extents.map_err(|failure| self.options.named(failure))
    }

    fn passed(&self, offset: u64, len: u64) -> Option<Disk> {
        self.image.borrow().as_ref()?.passed(offset, len)
    }

    async fn resize(&self) -> Result<u64, Failure> {
        Ok(self.described()?.size.get())
    }

    async fn grow(&self, size: u64) -> Result<(), Failure> {
        let image = self
            .image()
            .map_err(|error| Failure::system("cannot make the disk larger", &error.into()))?;
        let header = header(&self.file).await?;
        if header.version == 2 && header.snapshots > 0 {
            return Err(refused(
                "it is of version 2 and has snapshots, which do not say their size there: change it to version 3 \
                 with qemu-img amend -o compat=1.1",
            ));
        }
        image.grow(size).await?;
        // A program that reads the data file alone finds all of the disk.
        let failed =
            |error: Errno| Failure::system("cannot make the data file larger", &error.into());
        if let Some(data) = self.data_file.as_ref().filter(|data| !data.is_fixed()) {
            if data.size().map_err(failed)? < size {
                data.set_size(size).await.map_err(failed)?;
                data.flush().await.map_err(failed)?;
            }
        }
        Ok(())
    }

    async fn goes_on(&self) -> Result<bool, Failure> {
        self.may_stand_alone().await
    }

    async fn stand_alone(&self) -> Result<(), Failure> {
        // An administrator may have made a snapshot in the image while the disk was paused.
        self.may_stand_alone().await?;
        let image = self.image().map_err(|error| {
            let what = format!("{}: there is no image", self.options.name);
            Failure::system(what, &error.into())
        })?;
        image.forget_below().await?;
        // Requests that read it still hold a reference.
        self.below.replace(None);
        Ok(())
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        let Ok(image) = self.image() else {
            return BTreeMap::new();
        };
        counters([
            (
                "metadata_bytes",
                image.slices.count() as u64 * image.slices.slice_len(),
            ),
            ("metadata_reads", image.slices.misses.get()),
            ("metadata_writes", image.slices.writes.get()),
            ("clusters_prepared", image.allocator.prepared.get()),
            ("clusters_freed", image.allocator.freed.get()),
            ("damage", u64::from(image.reported.get())),
        ])
    }

    async fn inactivate(&self) -> Result<(), Errno> {
        let finished = self.finish().await;
        // Even if that failed: another process may change the backing image before it is active again.
        let below = self.below.borrow().clone();
        let below = base::inactivate(below.as_deref()).await;
        let mut forgotten = Ok(());
        for file in [&self.file].into_iter().chain(&self.data_file) {
            forgotten = forgotten.and(file.forget());
        }
        finished.and(below).and(forgotten)
    }

    async fn close(&self) -> Result<(), Errno> {
        let finished = self.finish().await;
        let below = self.below.borrow().clone();
        let below = base::close(below.as_deref()).await;
        finished.and(below)
    }
}
