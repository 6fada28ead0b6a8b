// SPDX-License-Identifier: MIT OR Apache-2.0
//! qcow, the first version, as QEMU and blktap have it: with compressed clusters (to read), a backing
//! file, and blktap's extended header.

mod header;

use crate::barrier::Barrier;
use crate::base::{self, Base};
use crate::clusters::{ClusterMap, Clusters, Found, Packed};
use crate::eof_alloc::Tail;
use crate::field::{be64, counters, failed, no_extents, put, refused};
use crate::locks::RangeLocks;
use crate::storage;
use crate::tables::{CachedTable, Pinned, TableCache};
use crate::{ImageNeeds, ImageParts, Options, Parent, Storage};
use control::Failure;
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, DiskInfo, Driver, DriverLimits, Extent, Fence, MappedExtent};
use header::{repaired, QcowHeader, LEN, XEN_BIG_ENDIAN, XEN_FLAGS};
use miniz_oxide::inflate::decompress_to_vec_with_limit;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bit of an entry whose cluster is compressed.
const COMPRESSED: u64 = 1 << 63;
/// Largest image in bytes: an entry for the smallest clusters cannot address more.
const MOST: u64 = 1 << 46;
/// Bytes that are zeroed or discarded at once.
const ZEROES: u64 = 64 << 20;

/// A disk in a qcow image.
#[derive(Debug)]
pub struct Qcow<S> {
    storage: Rc<S>,
    parent: Option<Rc<Base>>,
    /// Other files that were given: there must be none.
    extents: usize,
    options: Options,
    active: RefCell<Option<Rc<Clusters<S, Entries>>>>,
}

/// The two levels of tables.
#[derive(Debug)]
struct Entries {
    cluster_bits: u32,
    table_bits: u32,
    begin: u64,
    first: Pinned,
    tables: TableCache,
    /// A lock for each table that does not exist.
    locks: RangeLocks,
}

async fn read_header(storage: &impl Storage) -> Result<(QcowHeader, u64), Failure> {
    let length = storage
        .size()
        .map_err(failed("cannot see the image's size"))?;
    let bytes = storage::bytes(storage, 0, 64).await;
    let bytes = bytes.map_err(failed("cannot read the image's header"))?;
    Ok((QcowHeader::parse(&bytes, length)?, length))
}

/// Returns the files that an image needs; no name in the header is followed.
pub async fn look(storage: &impl Storage) -> Result<ImageNeeds, Failure> {
    let (header, _) = read_header(storage).await?;
    let mut needs = ImageNeeds {
        size: header.size,
        ..ImageNeeds::default()
    };
    if let Some((at, len)) = header.name {
        let name = storage::bytes(storage, at, len as usize).await;
        let name = name.map_err(failed("cannot read the name of the backing file"))?;
        let name = String::from_utf8(name)
            .ok()
            .filter(|name| !name.contains('\0'));
        let name = name.ok_or_else(|| refused("the name of the backing file is no text"))?;
        needs.parent = Some(Parent {
            names: vec![name],
            ..Parent::default()
        });
    }
    Ok(needs)
}

/// Changes the name of the backing file in the header. The image must not be in use. The new name is durable behind all
/// that there is before the header, which is one write of one sector, leads to it.
///
/// # Errors
/// The image has no backing file, the name is too long, or the storage fails.
pub async fn set_parent(storage: &impl Storage, name: &str) -> Result<(), Failure> {
    let (header, length) = read_header(storage).await?;
    if header.name.is_none() || name.is_empty() || name.len() > header::NAME as usize {
        return Err(refused(
            "the image has no backing file, or the new name is longer than 1023 bytes: make a new image",
        ));
    }
    let work = async {
        let at = length.next_multiple_of(1 << header.cluster_bits);
        storage.write(at, Bytes::copied(name.as_bytes())?).await?;
        storage.flush().await?;
        let mut place = at.to_be_bytes().to_vec();
        // CAST: at most 1023.
        place.extend((name.len() as u32).to_be_bytes());
        storage.write(8, Bytes::copied(&place)?).await?;
        storage.flush().await
    };
    work.await.map_err(failed("cannot name the backing file"))
}

/// Properties of a new image.
#[derive(Clone, Debug, Default)]
pub struct QcowCreate {
    /// Bytes of the disk, whole sectors.
    pub size: u64,
    /// The backing file's name.
    pub parent: Option<String>,
}

/// Makes an image in `storage`, whose old content is lost, with clusters of 4 KiB as blktap's.
pub async fn create(storage: &impl Storage, what: &QcowCreate) -> Result<(), Failure> {
    let name = what.parent.as_deref().unwrap_or("").as_bytes();
    if what.size == 0 || what.size % 512 != 0 || name.len() > 1023 {
        return Err(Failure::invalid(format!(
            "an image of {} bytes cannot be made: its size must be whole sectors of 512, and the backing file's name have 1023 bytes at most",
            what.size
        )));
    }
    // CAST: at most 1023.
    let place = (!name.is_empty()).then_some((LEN, name.len() as u32));
    let header = QcowHeader {
        size: what.size,
        cluster_bits: 12,
        table_bits: 9,
        first: (LEN + name.len() as u64).next_multiple_of(4096),
        name: place,
        xen: None,
    };
    let end = (header.first + header.first_len()).next_multiple_of(4096);
    let mut bytes = header.bytes();
    bytes.extend(name);
    QcowHeader::parse(&bytes, end)?;
    let work = async {
        if storage.is_fixed() {
            storage.clear(0, end).await?;
        } else {
            storage.set_size(0).await?;
            storage.set_size(end).await?;
        }
        storage.flush().await?;
        storage.write(0, Bytes::copied(&bytes)?).await?;
        storage.flush().await
    };
    work.await.map_err(failed("cannot make the image"))
}

impl<S: Storage> Qcow<S> {
    /// Returns the disk in `storage`, on top of its parent if it names one.
    pub fn new(storage: S, parts: ImageParts<S>, options: Options) -> Self {
        Self {
            storage: Rc::new(storage),
            parent: parts.parent.map(|disk| Rc::new(Base::new(disk))),
            extents: parts.extents.len(),
            options,
            active: RefCell::new(None),
        }
    }

    fn active(&self) -> Result<Rc<Clusters<S, Entries>>, Errno> {
        self.active.borrow().clone().ok_or(Errno::NXIO)
    }

    async fn check_parent(&self, header: &QcowHeader) -> Result<(), Failure> {
        no_extents("qcow", self.extents)?;
        match (&self.parent, header.name) {
            (Some(parent), Some(_)) => parent.activate().await,
            (None, None) => Ok(()),
            (None, Some(_)) => Err(refused(
                "the image has a backing file that was not given: open that too",
            )),
            (Some(_), None) => Err(refused(
                "a backing file was given for an image that has none: leave it out",
            )),
        }
    }

    /// Reads the first table, whose numbers all lead into the image. If an early blktap made the table, its byte order
    /// is corrected.
    async fn first(&self, header: &QcowHeader) -> Result<Pinned, Failure> {
        let reading = failed("cannot read the first table of the image");
        // CAST: it was checked to be small.
        let bytes = storage::bytes(&*self.storage, header.first, header.first_len() as usize).await;
        let mut bytes = bytes.map_err(reading)?;
        // The length is read after the tables, because another host may be making the image longer and have new tables
        // there.
        let length = self
            .storage
            .size()
            .map_err(failed("cannot see the image's size"))?;
        if let Some(fixed) = repaired(&bytes, header, length)? {
            bytes = fixed;
            let is_writable = self
                .options
                .may_write(&*self.storage)
                .map_err(failed("cannot use the image"))?;
            if is_writable {
                let work = self.repair(header, &bytes).await;
                work.map_err(failed("cannot put the first table of the image right"))?;
            }
        }
        for (number, entry) in bytes.chunks_exact(8).enumerate() {
            let at = be64(entry, 0);
            let end = at.checked_add(header.table_len());
            if at != 0 && (at % 512 != 0 || end.is_none_or(|end| end > length)) {
                return Err(refused(format!(
                    "table {number} of the image cannot be at byte {at}, and the image ends at {length}: it is damaged or cut off"
                )));
            }
        }
        Ok(Pinned::with(header.first, bytes))
    }

    /// The table first, then the flag that says that it is right.
    async fn repair(&self, header: &QcowHeader, bytes: &[u8]) -> Result<(), Errno> {
        let flags = header.xen.unwrap_or(0) | XEN_BIG_ENDIAN;
        self.storage
            .write(header.first, Bytes::copied(bytes)?)
            .await?;
        self.storage.flush().await?;
        self.storage
            .write(XEN_FLAGS, Bytes::copied(&flags.to_be_bytes())?)
            .await?;
        self.storage.flush().await
    }

    async fn start(&self) -> Result<DiskInfo, Failure> {
        let (header, length) = read_header(&*self.storage).await?;
        self.check_parent(&header).await?;
        let entries = Entries {
            cluster_bits: header.cluster_bits,
            table_bits: header.table_bits,
            begin: header.first + header.first_len(),
            first: self.first(&header).await?,
            tables: TableCache::new(self.options.cache),
            locks: RangeLocks::default(),
        };
        let parent = self.parent.clone();
        let barrier = Barrier::new(vec![(*self.storage).clone()]);
        let tail = Tail::new(length, MOST, barrier);
        let clusters = Clusters::new(
            self.storage.clone(),
            entries,
            (0, header.size),
            tail,
            parent,
        );
        let may_write = self.options.may_write(&*self.storage);
        if may_write.map_err(failed("cannot use the image"))? {
            clusters.refuse_cut(length).await?;
        }
        *self.active.borrow_mut() = Some(Rc::new(clusters));
        Ok(DiskInfo {
            size: header.size,
            logical_block: base::sector(self.parent.as_deref(), header.size),
            physical_block: 4096,
            discard: Some(4096),
            write_cache: true,
            fua: false,
            limits: DriverLimits {
                zeroes: ZEROES,
                align: 1 << header.cluster_bits,
                ..DriverLimits::default()
            },
        })
    }

    /// Flushes the content, which alone decides the result, and then gives back the unused space at the end.
    async fn finish(&self) -> Result<(), Errno> {
        let active = self.active.borrow_mut().take();
        if !self.options.may_write(&*self.storage)? {
            return Ok(());
        }
        if let Some(active) = active {
            active.tail.barrier().flush().await?;
            active.tail.tidy(&*self.storage, &self.options.name).await;
        }
        Ok(())
    }
}

impl Entries {
    fn split(&self, cluster: u64) -> Result<(usize, usize), Errno> {
        let number = usize::try_from(cluster >> self.table_bits).map_err(|_| Errno::INVAL)?;
        let at = number
            .checked_mul(8)
            .filter(|at| *at < self.first.len())
            .ok_or(Errno::INVAL)?;
        // CAST: an entry of a table.
        Ok((at, (cluster & ((1 << self.table_bits) - 1)) as usize * 8))
    }

    async fn table(
        &self,
        storage: &impl Storage,
        at: usize,
    ) -> Result<Option<Rc<CachedTable>>, Errno> {
        match self.first.see(at, |bytes| be64(bytes, 0)) {
            0 => Ok(None),
            place => self
                .tables
                .get(storage, place, 8 << self.table_bits)
                .await
                .map(Some),
        }
    }

    /// A table that may not exist yet. Room that was never used reads as one without entries.
    async fn table_made<S: Storage>(
        &self,
        storage: &S,
        tail: &Tail<S>,
        at: usize,
    ) -> Result<Rc<CachedTable>, Errno> {
        if let Some(table) = self.table(storage, at).await? {
            return Ok(table);
        }
        let _held = self.locks.alone(at as u64).await;
        if let Some(table) = self.table(storage, at).await? {
            return Ok(table);
        }
        let place = tail
            .take(storage, 8 << self.table_bits, 1 << self.cluster_bits)
            .await?;
        let metadata = tail.barrier().metadata(storage);
        self.first.put(&metadata, at, &place.to_be_bytes()).await?;
        self.tables.get(storage, place, 8 << self.table_bits).await
    }
}

impl<S: Storage> ClusterMap<S> for Entries {
    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn begin(&self) -> u64 {
        self.begin
    }

    async fn find(&self, storage: &S, cluster: u64) -> Result<Found, Errno> {
        let (first, at) = self.split(cluster)?;
        let Some(table) = self.table(storage, first).await? else {
            return Ok(Found::Missing);
        };
        let entry = table.see(|bytes| be64(bytes, at));
        if entry == 0 {
            return Ok(Found::Missing);
        }
        if entry & COMPRESSED == 0 {
            return match entry % 512 {
                0 => Ok(Found::At(entry)),
                _ => Err(Errno::IO),
            };
        }
        let bits = 63 - self.cluster_bits;
        Ok(Found::Packed(Packed {
            at: entry & ((1 << bits) - 1),
            len: entry >> bits & ((1 << self.cluster_bits) - 1),
            cluster,
        }))
    }

    async fn is_settled(&self, storage: &S, cluster: u64) -> Result<bool, Errno> {
        let (first, _) = self.split(cluster)?;
        // A table that the first one may have after all has no entries.
        let table = self.table(storage, first).await?;
        Ok(table.is_none_or(|table| table.is_settled()))
    }

    async fn set(&self, storage: &S, tail: &Tail<S>, cluster: u64, at: u64) -> Result<(), Errno> {
        let (first, place) = self.split(cluster)?;
        let table = self.table_made(storage, tail, first).await?;
        let edit = |bytes: &mut [u8]| put(bytes, place, &at.to_be_bytes());
        table.change(&tail.barrier().metadata(storage), edit).await
    }

    async fn set_zeroes(
        &self,
        _storage: &S,
        _tail: &Tail<S>,
        _cluster: u64,
    ) -> Result<bool, Errno> {
        Ok(false)
    }

    async fn unpack(&self, storage: &S, packed: Packed) -> Result<Vec<u8>, Errno> {
        let unit = 1 << self.cluster_bits;
        // CAST: less than a cluster.
        let bytes = storage::bytes(storage, packed.at, packed.len as usize).await?;
        let unpacked = match decompress_to_vec_with_limit(&bytes, unit) {
            Ok(bytes) => bytes,
            // Some streams have no end.
            Err(error) => error.output,
        };
        match unpacked.len() == unit {
            true => Ok(unpacked),
            false => Err(Errno::IO),
        }
    }

    fn counts(&self) -> (u64, u64, u64) {
        self.tables.counts()
    }
}

impl<S: Storage> Driver for Qcow<S> {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let shape = self.start().await;
        shape.map_err(|failure| self.options.named(failure))
    }

    fn fence(&self) -> Fence {
        self.storage.fence()
    }

    fn has_places(&self) -> bool {
        self.storage.is_direct()
    }

    async fn places(&self, offset: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
        let writable = self.options.may_write(&*self.storage)?;
        self.active()?.places(offset, len, writable).await
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.active()?.read(offset, data).await
    }

    async fn write(&self, offset: u64, data: Bytes, _how: Attributes) -> Result<(), Errno> {
        self.active()?.write(offset, data).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.active()?.tail.barrier().flush().await
    }

    fn owes(&self) -> bool {
        let active = self.active.borrow();
        active.as_ref().is_some_and(|it| it.tail.barrier().owes())
    }

    async fn discard(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        self.active()?.discard(offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, _how: Attributes) -> Result<(), Errno> {
        self.active()?.write_zeroes(offset, len).await
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.active()?.extents(offset, len, true).await
    }

    async fn layer(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.active()?.extents(offset, len, false).await
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        let Ok(active) = self.active() else {
            return BTreeMap::new();
        };
        let (bytes, hits, misses) = active.counts();
        counters([
            ("cache_bytes", bytes),
            ("cache_hits", hits),
            ("cache_misses", misses),
        ])
    }

    async fn goes_on(&self) -> Result<bool, Failure> {
        base::must_stay(self.parent.as_deref(), "a qcow image")
    }

    async fn inactivate(&self) -> Result<(), Errno> {
        let finished = self.finish().await;
        // Cached metadata is dropped even if an earlier step failed.
        let parent = base::inactivate(self.parent.as_deref()).await;
        let forgotten = self.storage.forget();
        finished.and(parent).and(forgotten)
    }

    async fn close(&self) -> Result<(), Errno> {
        let finished = self.finish().await;
        let parent = base::close(self.parent.as_deref()).await;
        finished.and(parent)
    }
}
