// SPDX-License-Identifier: MIT OR Apache-2.0
//! VMDK: one file or several, flat or sparse, to read and to write; `streamOptimized` to read, and to write from its
//! beginning to its end; the COWD and seSparse of ESXi's snapshots, to read.
//!
//! The sparse extents of a disk have one budget for their tables. A new grain is appended to its file. The image's
//! `CID`, which shows others that the content has changed, is updated before the first change.

mod active;
mod create;
mod descriptor;
mod esxi;
mod grains;
mod rename;
mod sparse;
mod stream;

pub use create::{create, plan, Form, NewFile, VmdkCreate};
pub use rename::set_parent;
pub use stream::{pack, VmdkStream, GRAIN};

use crate::barrier::Barrier;
use crate::base::{self, Base};
use crate::clusters::Clusters;
use crate::eof_alloc::Tail;
use crate::field::{counters, failed, refused};
use crate::storage;
use crate::{ExtentFile as NeededExtent, ImageNeeds, ImageParts, Options, Parent, Storage};
use active::{Active, ExtentPart, Mark, PartContent};
use control::Failure;
use descriptor::{Descriptor, ExtentBody, NO_PARENT};
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, DiskInfo, Driver, DriverLimits, Extent, Fence, MappedExtent};
use esxi::{EsxiGrains, EsxiHeader};
use grains::ExtentGrains;
use sparse::{GrainMap, SparseHeader, DIRECTORIES};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Sectors of a file at most: entries have 32 bits.
const MOST: u64 = (u32::MAX as u64) * 512;
/// Bytes that are zeroed or discarded at once.
const ZEROES: u64 = 64 << 20;

/// A disk in a VMDK.
#[derive(Debug)]
pub struct Vmdk<S> {
    image: VmdkFile<S>,
    extents: Vec<VmdkFile<S>>,
    parent: Option<Rc<Base>>,
    options: Options,
    active: RefCell<Option<Rc<Active<S>>>>,
}

/// File of a disk.
#[derive(Debug)]
struct VmdkFile<S> {
    file: Rc<S>,
    /// All of its flushes.
    barrier: Barrier<S>,
}

impl<S: Storage> VmdkFile<S> {
    fn new(file: S) -> Self {
        Self {
            barrier: Barrier::new(vec![file.clone()]),
            file: Rc::new(file),
        }
    }
}

/// Memory for extents.
#[derive(Debug)]
struct ExtentMemory {
    /// Bytes for the tables of each.
    cache: usize,
    /// Bytes that are left for what all of them keep whatever happens.
    left: u64,
}

impl ExtentMemory {
    /// Takes the bytes of a directory, which stays in memory.
    fn take(&mut self, bytes: u64) -> Result<(), Failure> {
        let left = self.left.checked_sub(bytes);
        self.left = left.ok_or_else(|| {
            refused(format!(
                "the directories of the VMDK's extents have more than {} MiB together: convert it",
                DIRECTORIES >> 20
            ))
        })?;
        Ok(())
    }
}

/// The descriptor, where in the image it begins, and the header if the image is an extent itself.
async fn read_descriptor(
    image: &impl Storage,
) -> Result<(Descriptor, u64, Option<SparseHeader>), Failure> {
    let length = image
        .size()
        .map_err(failed("cannot see the image's size"))?;
    let reading = |error| failed("cannot read the VMDK's descriptor")(error);
    let first = storage::bytes(image, 0, 512).await.map_err(reading)?;
    let (header, at, len) = match first.get(..4) == Some(sparse::MAGIC) {
        true => {
            let header = SparseHeader::read(image, length).await?;
            let (at, len) = header.descriptor;
            if at == 0 {
                return Err(refused(
                    "this is an extent of a VMDK: name the file with the descriptor instead",
                ));
            }
            (Some(header), at * 512, len * 512)
        }
        false => (None, 0, length.min(descriptor::MOST)),
    };
    if len == 0 {
        return Err(refused(
            "there is no descriptor of a VMDK: the file is empty, or damaged",
        ));
    }
    // CAST: it was checked to be small.
    let bytes = storage::bytes(image, at, len as usize)
        .await
        .map_err(reading)?;
    if header.is_none() && !Descriptor::is_one(&bytes) {
        return Err(refused(
            "there is neither the header nor the descriptor of a VMDK",
        ));
    }
    Ok((Descriptor::parse(&bytes)?, at, header))
}

/// Returns the files that a VMDK needs; no name in it is followed.
pub async fn look(image: &impl Storage) -> Result<ImageNeeds, Failure> {
    let (descriptor, _, header) = read_descriptor(image).await?;
    let parent = (descriptor.parent_cid != NO_PARENT).then(|| Parent {
        names: descriptor.parent.clone().into_iter().collect(),
        driver: Some("vmdk".into()),
        id: Some(format!("{:08x}", descriptor.parent_cid)),
        other_id: None,
    });
    let extents = match header {
        Some(_) => Vec::new(),
        None => named(&descriptor),
    };
    let size = match &header {
        Some(header) => header.capacity * 512,
        None => descriptor.size()?,
    };
    Ok(ImageNeeds {
        size,
        sector: None,
        parent,
        extents,
    })
}

/// Returns the identity of a VMDK's content, for a comparison with [`Parent::id`] of its children.
pub async fn id(image: &impl Storage) -> Result<String, Failure> {
    Ok(format!("{:08x}", read_descriptor(image).await?.0.cid))
}

fn named(descriptor: &Descriptor) -> Vec<NeededExtent> {
    let parts = descriptor.extents.iter();
    parts
        .filter_map(|part| match &part.body {
            ExtentBody::Flat { name, .. } | ExtentBody::Sparse { name } => Some(NeededExtent {
                name: name.clone(),
                read_only: part.read_only,
            }),
            ExtentBody::Zero => None,
        })
        .collect()
}

impl<S: Storage> Vmdk<S> {
    /// The disk that `image` describes.
    pub fn new(image: S, parts: ImageParts<S>, options: Options) -> Self {
        Self {
            image: VmdkFile::new(image),
            extents: parts.extents.into_iter().map(VmdkFile::new).collect(),
            parent: parts.parent.map(|disk| Rc::new(Base::new(disk))),
            options,
            active: RefCell::new(None),
        }
    }

    fn active(&self) -> Result<Rc<Active<S>>, Errno> {
        self.active.borrow().clone().ok_or(Errno::NXIO)
    }

    /// All files.
    fn files(&self) -> impl Iterator<Item = &VmdkFile<S>> {
        std::iter::once(&self.image).chain(&self.extents)
    }

    async fn check_parent(&self, descriptor: &Descriptor) -> Result<(), Failure> {
        match (&self.parent, descriptor.parent_cid != NO_PARENT) {
            (Some(parent), true) => parent.activate().await,
            (None, false) => Ok(()),
            (None, true) => Err(refused(
                "the VMDK has a parent that was not given: open that too",
            )),
            (Some(_), false) => Err(refused(
                "a parent was given for a VMDK that has none: leave it out",
            )),
        }
    }

    /// An extent that is sparse, as large as its line says.
    async fn sparse(
        &self,
        image: &VmdkFile<S>,
        header: SparseHeader,
        place: (u64, u64),
        share: &mut ExtentMemory,
    ) -> Result<PartContent<S>, Failure> {
        let file = &image.file;
        let may_write = self.options.may_write(&**file);
        if header.is_packed() && may_write.map_err(failed("cannot use the image"))? {
            return Err(refused(
                "the grains of the VMDK are compressed (streamOptimized), so it can be read only: serve it read-only, or convert it",
            ));
        }
        share.take(header.kept())?;
        let grains = GrainMap::read(&**file, &header, share.cache).await?;
        let grains = ExtentGrains::Vmware(grains);
        self.clusters(image, grains, header.capacity, place).await
    }

    /// An extent of a snapshot of ESXi.
    async fn esxi(
        &self,
        image: &VmdkFile<S>,
        header: EsxiHeader,
        place: (u64, u64),
        share: &mut ExtentMemory,
    ) -> Result<PartContent<S>, Failure> {
        let may_write = self.options.may_write(&*image.file);
        if may_write.map_err(failed("cannot use the image"))? {
            return Err(refused(
                "the VMDK is a snapshot of ESXi (COWD or seSparse), which can be read only: serve it read-only, convert it, \
                 or put a qcow2 image over it",
            ));
        }
        share.take(header.directory_len())?;
        let capacity = header.capacity;
        let grains = EsxiGrains::read(&*image.file, header, share.cache).await?;
        let grains = ExtentGrains::Esxi(grains);
        self.clusters(image, grains, capacity, place).await
    }

    /// The part of a disk that a map of `capacity` sectors has: where it begins and how many bytes it has.
    async fn clusters(
        &self,
        image: &VmdkFile<S>,
        grains: ExtentGrains,
        capacity: u64,
        place: (u64, u64),
    ) -> Result<PartContent<S>, Failure> {
        if capacity.saturating_mul(512) < place.1 {
            return Err(refused(format!(
                "an extent of the VMDK has {capacity} sectors and its line says {}",
                place.1 / 512
            )));
        }
        let file = &image.file;
        let length = file.size().map_err(failed("cannot see the image's size"))?;
        let tail = Tail::new(length, MOST, image.barrier.clone());
        let clusters = Clusters::new(file.clone(), grains, place, tail, self.parent.clone());
        let may_write = self.options.may_write(&**file);
        if may_write.map_err(failed("cannot use the image"))? {
            clusters.refuse_cut(length).await?;
        }
        Ok(PartContent::Sparse(Box::new(clusters)))
    }

    /// Returns the parts of a disk whose descriptor is a file of its own.
    async fn parts(&self, descriptor: &Descriptor) -> Result<Vec<ExtentPart<S>>, Failure> {
        let wanted = named(descriptor).len();
        if wanted != self.extents.len() {
            return Err(refused(format!(
                "the VMDK names {wanted} files for its extents and {} were given",
                self.extents.len()
            )));
        }
        let mut share = ExtentMemory {
            cache: self.options.cache / wanted.max(1),
            left: DIRECTORIES,
        };
        let mut files = self.extents.iter();
        let mut parts = Vec::new();
        let mut begin = 0;
        for part in &descriptor.extents {
            // The sum was checked.
            let len = part.sectors * 512;
            let body = match &part.body {
                ExtentBody::Flat { first, .. } => {
                    let file = files
                        .next()
                        .ok_or_else(|| refused("an extent is missing"))?;
                    flat(&file.file, *first, len)?
                }
                ExtentBody::Sparse { .. } => {
                    let file = files
                        .next()
                        .ok_or_else(|| refused("an extent is missing"))?;
                    let storage = &*file.file;
                    let length = storage
                        .size()
                        .map_err(failed("cannot see the image's size"))?;
                    let place = (begin, len);
                    match EsxiHeader::read(storage, length).await? {
                        Some(header) => self.esxi(file, header, place, &mut share).await?,
                        None => {
                            let header = SparseHeader::read(storage, length).await?;
                            self.sparse(file, header, place, &mut share).await?
                        }
                    }
                }
                ExtentBody::Zero => PartContent::Zero,
            };
            parts.push(ExtentPart { begin, len, body });
            begin += len;
        }
        Ok(parts)
    }

    async fn start(&self) -> Result<DiskInfo, Failure> {
        let (descriptor, at, header) = read_descriptor(&*self.image.file).await?;
        self.check_parent(&descriptor).await?;
        let parts = match header {
            Some(header) if self.extents.is_empty() => {
                let len = header.capacity * 512;
                let mut share = ExtentMemory {
                    cache: self.options.cache,
                    left: DIRECTORIES,
                };
                let body = self
                    .sparse(&self.image, header, (0, len), &mut share)
                    .await?;
                vec![ExtentPart {
                    begin: 0,
                    len,
                    body,
                }]
            }
            Some(_) => {
                return Err(refused(
                    "the VMDK is one file, and others were given: leave them out",
                ))
            }
            None => {
                descriptor.size()?;
                self.parts(&descriptor).await?
            }
        };
        let size = parts.last().map_or(0, |part| part.begin + part.len);
        let place = descriptor
            .cid_at
            .map(|place| (at + place.start as u64, place.len(), descriptor.cid));
        let active = Active {
            parts,
            size,
            cid: Mark::new(place),
        };
        *self.active.borrow_mut() = Some(Rc::new(active));
        Ok(DiskInfo {
            size,
            logical_block: base::sector(self.parent.as_deref(), size),
            physical_block: 4096,
            discard: Some(4096),
            write_cache: true,
            fua: false,
            limits: DriverLimits {
                zeroes: ZEROES,
                align: 64 << 10,
                ..DriverLimits::default()
            },
        })
    }

    /// Makes all files durable. Each file needs its own flush, because each reports an error once.
    async fn flush_all(&self) -> Result<(), Errno> {
        let mut flushed = Ok(());
        for image in self.files() {
            if image.file.is_writable()? {
                flushed = flushed.and(image.barrier.flush().await);
            }
        }
        flushed
    }

    /// Flushes the content, which alone decides the result, and then gives back the unused space at the ends.
    async fn finish(&self) -> Result<(), Errno> {
        let active = self.active.borrow_mut().take();
        self.flush_all().await?;
        for part in active.iter().flat_map(|active| &active.parts) {
            if let PartContent::Sparse(clusters) = &part.body {
                let storage = &*clusters.storage;
                if self.options.may_write(storage)? {
                    clusters.tail.tidy(storage, &self.options.name).await;
                }
            }
        }
        Ok(())
    }
}

fn flat<S: Storage>(file: &Rc<S>, first: u64, len: u64) -> Result<PartContent<S>, Failure> {
    let length = file.size().map_err(failed("cannot see the image's size"))?;
    let at = first.checked_mul(512);
    let end = at.and_then(|at| at.checked_add(len));
    match (at, end.is_some_and(|end| end <= length)) {
        (Some(at), true) => Ok(PartContent::Flat(file.clone(), at)),
        _ => Err(refused(format!(
            "a flat extent of the VMDK has {length} bytes, which is not enough for {len} from sector {first} on: it is cut off"
        ))),
    }
}

impl<S: Storage> Driver for Vmdk<S> {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let shape = self.start().await;
        shape.map_err(|failure| self.options.named(failure))
    }

    fn fence(&self) -> Fence {
        storage::fence(self.files().map(|image| &*image.file))
    }

    fn has_places(&self) -> bool {
        // The kernel does not have the other files.
        self.extents.is_empty() && self.image.file.is_direct()
    }

    async fn places(&self, offset: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
        let active = self.active()?;
        // The first write has to say that the content is another one.
        let writable = self.options.may_write(&*self.image.file)? && active.cid.is_said();
        match &active.parts[..] {
            [part] if self.has_places() => match &part.body {
                PartContent::Sparse(clusters) => clusters.places(offset, len, writable).await,
                PartContent::Flat(..) | PartContent::Zero => Ok(Vec::new()),
            },
            _ => Ok(Vec::new()),
        }
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let active = self.active()?;
        for (part, within, at, len) in active.pieces(offset, data.len() as u64)? {
            let data = crate::field::part(&data, at, len);
            match &part.body {
                PartContent::Flat(file, first) => file.read_exact(first + within, data).await?,
                PartContent::Sparse(clusters) => clusters.read(within, data).await?,
                PartContent::Zero => data.fill(0, data.len(), 0),
            }
        }
        Ok(())
    }

    async fn write(&self, offset: u64, data: Bytes, _how: Attributes) -> Result<(), Errno> {
        let active = self.active()?;
        active.mark(&self.image.file).await?;
        for (part, within, at, len) in active.pieces(offset, data.len() as u64)? {
            // CAST: they are inside of the data.
            let data = data.part(at as usize, len as usize);
            match &part.body {
                PartContent::Flat(file, first) => file.write(first + within, data).await?,
                PartContent::Sparse(clusters) => clusters.write(within, data).await?,
                PartContent::Zero => return Err(Errno::ROFS),
            }
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.flush_all().await
    }

    fn owes(&self) -> bool {
        self.files().any(|image| image.barrier.owes())
    }

    async fn discard(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        let active = self.active()?;
        active.mark(&self.image.file).await?;
        for (part, within, _, len) in active.pieces(offset, len)? {
            match &part.body {
                PartContent::Flat(file, first) => {
                    storage::give_back(&**file, first + within, len).await?;
                }
                PartContent::Sparse(clusters) => clusters.discard(within, len).await?,
                PartContent::Zero => {}
            }
        }
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        let active = self.active()?;
        active.mark(&self.image.file).await?;
        for (part, within, _, len) in active.pieces(offset, len)? {
            match &part.body {
                PartContent::Flat(file, first) => file.write_zeroes(first + within, len).await?,
                PartContent::Sparse(clusters) => clusters.write_zeroes(within, len).await?,
                PartContent::Zero => {}
            }
        }
        Ok(())
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.active()?.runs(offset, len, true).await
    }

    async fn layer(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.active()?.runs(offset, len, false).await
    }
    fn stats(&self) -> BTreeMap<String, u64> {
        let Ok(active) = self.active() else {
            return BTreeMap::new();
        };
        let sparse = active.parts.iter().filter_map(|part| match &part.body {
            PartContent::Sparse(clusters) => Some(clusters.counts()),
            _ => None,
        });
        let (bytes, hits, misses) = sparse.fold((0, 0, 0), |all, one| {
            (all.0 + one.0, all.1 + one.1, all.2 + one.2)
        });
        counters([
            ("extents", active.parts.len() as u64),
            ("cache_bytes", bytes),
            ("cache_hits", hits),
            ("cache_misses", misses),
        ])
    }

    async fn goes_on(&self) -> Result<bool, Failure> {
        base::must_stay(self.parent.as_deref(), "a VMDK")
    }

    async fn inactivate(&self) -> Result<(), Errno> {
        let finished = self.finish().await;
        // Cached metadata is dropped even if an earlier step failed.
        let parent = base::inactivate(self.parent.as_deref()).await;
        let mut forgotten = Ok(());
        for image in self.files() {
            forgotten = forgotten.and(image.file.forget());
        }
        finished.and(parent).and(forgotten)
    }

    async fn close(&self) -> Result<(), Errno> {
        let finished = self.finish().await;
        let parent = base::close(self.parent.as_deref()).await;
        finished.and(parent)
    }
}
