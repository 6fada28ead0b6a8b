// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk whose clusters are found by a map: common code of VMDK and qcow.
//!
//! A new cluster is at the end of the image, in space that was never used. Its bytes come first, then the entry of the
//! map. If the disk had other bytes there before, a flush between the two makes the new bytes durable: otherwise a
//! power cut could leave an entry that points to empty space, and so lose data that was flushed long ago. Concurrent
//! requests share that flush.

use crate::base::{self, Base, ExtentRun};
use crate::eof_alloc::Tail;
use crate::field::{part, pieces, refused};
use crate::locks::RangeLocks;
use crate::{storage, Storage};
use control::Failure;
use diskio::{Bytes, Data, Errno};
use drivers::{Content, Extent, Holder, MappedExtent};
use std::cell::RefCell;
use std::rc::Rc;

/// Number of unpacked clusters that are kept, because a compressed cluster is usually read in parts.
pub(crate) const KEPT: usize = 4;

/// Location of a cluster according to a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The parent has it.
    Missing,
    /// The cluster is zero, whatever the parent has.
    Zeroes,
    /// The cluster is in the image, at this byte.
    At(u64),
    /// The cluster is in the image, and compressed.
    Packed(Packed),
}

/// Place of a compressed cluster, and its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packed {
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) cluster: u64,
}

/// Map of the clusters of a disk.
#[allow(async_fn_in_trait, reason = "everything is in one thread")]
pub(crate) trait ClusterMap<S>: 'static {
    /// Bytes of a cluster.
    fn cluster(&self) -> u64;
    /// Returns the offset in bytes at which clusters may begin; the metadata before it must not be touched.
    fn begin(&self) -> u64;
    async fn find(&self, storage: &S, cluster: u64) -> Result<Found, Errno>;
    /// The image says of a cluster what [`find`](Self::find) does, whatever failed.
    async fn is_settled(&self, storage: &S, cluster: u64) -> Result<bool, Errno>;
    /// Lets the map point to a cluster that is in the image. New tables come from `tail`.
    async fn set(&self, storage: &S, tail: &Tail<S>, cluster: u64, at: u64) -> Result<(), Errno>;
    /// Marks a cluster as zero in the image; returns false if the format cannot express that.
    async fn set_zeroes(&self, storage: &S, tail: &Tail<S>, cluster: u64) -> Result<bool, Errno>;
    /// Returns the bytes of a compressed cluster; bytes that are missing at its end are zero.
    async fn unpack(&self, storage: &S, packed: Packed) -> Result<Vec<u8>, Errno>;
    /// Tables in memory: bytes, hits and misses.
    fn counts(&self) -> (u64, u64, u64);
}

/// A disk, or a part of one.
#[derive(Debug)]
pub(crate) struct Clusters<S, M> {
    pub(crate) storage: Rc<S>,
    pub(crate) map: M,
    /// Bytes, and where on the disk they begin.
    size: u64,
    base: u64,
    pub(crate) tail: Tail<S>,
    parent: Option<Rc<Base>>,
    locks: RangeLocks,
    unpacked: RefCell<Vec<(u64, Rc<Vec<u8>>)>>,
}

impl<S: Storage, M: ClusterMap<S>> Clusters<S, M> {
    pub(crate) fn new(
        storage: Rc<S>,
        map: M,
        (base, size): (u64, u64),
        tail: Tail<S>,
        parent: Option<Rc<Base>>,
    ) -> Self {
        Self {
            storage,
            map,
            size,
            base,
            tail,
            parent,
            locks: RangeLocks::default(),
            unpacked: RefCell::default(),
        }
    }

    /// Tables in memory: bytes, hits and misses.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        self.map.counts()
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let end = offset.checked_add(len);
        match end.is_some_and(|end| end <= self.size) {
            true => Ok(()),
            false => Err(Errno::INVAL),
        }
    }

    /// Returns the map's location of a cluster, or an error if that location is impossible.
    async fn find(&self, cluster: u64) -> Result<Found, Errno> {
        let found = self.map.find(&self.storage, cluster).await?;
        let place = match found {
            Found::At(at) => at,
            Found::Packed(packed) => packed.at,
            _ => return Ok(found),
        };
        match place >= self.map.begin() && place < self.tail.end() {
            true => Ok(found),
            false => Err(Errno::IO),
        }
    }

    /// Returns how many of the `len` bytes from `at` on are in the image. An image that was cut off does not have all
    /// of them, and missing bytes are not zeroes.
    fn inside(&self, at: u64, len: u64) -> u64 {
        self.tail.end().saturating_sub(at).min(len)
    }

    /// Refuses to write to an image that ends inside of a cluster: a write would make it longer, with zeroes in place
    /// of the lost data.
    pub(crate) async fn refuse_cut(&self, length: u64) -> Result<(), Failure> {
        let unit = self.map.cluster();
        if length % unit == 0 {
            return Ok(());
        }
        let mut begin = 0;
        while begin < self.size {
            let len = (self.size - begin).min(unit);
            // A damaged entry is reported by the requests that use it.
            if let Ok(Found::At(at)) = self.find(begin / unit).await {
                if self.inside(at, len) < len {
                    let lost = self.base + begin + self.inside(at, len);
                    return Err(refused(format!(
                        "the file ends inside of a cluster, at byte {lost} of the disk: it was cut off, and what is behind that is lost"
                    )));
                }
            }
            begin += len;
        }
        Ok(())
    }

    /// A compressed cluster.
    async fn unpack(&self, packed: Packed) -> Result<Rc<Vec<u8>>, Errno> {
        let kept = self
            .unpacked
            .borrow()
            .iter()
            .find(|(at, _)| *at == packed.at)
            .cloned();
        if let Some((_, bytes)) = kept {
            return Ok(bytes);
        }
        let mut bytes = self.map.unpack(&self.storage, packed).await?;
        bytes.resize(self.map.cluster() as usize, 0);
        let bytes = Rc::new(bytes);
        let mut kept = self.unpacked.borrow_mut();
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push((packed.at, bytes.clone()));
        Ok(bytes)
    }

    /// Reads a part of a cluster, as it is found.
    async fn read_found(
        &self,
        found: Found,
        offset: u64,
        within: u64,
        data: Data,
    ) -> Result<(), Errno> {
        match found {
            Found::Missing => base::read(self.parent.as_deref(), self.base + offset, data).await,
            Found::Zeroes => {
                data.fill(0, data.len(), 0);
                Ok(())
            }
            // If the file ends inside of the cluster, the missing part is an error and does not read as zeroes.
            Found::At(at) => {
                let at = at.checked_add(within).ok_or(Errno::IO)?;
                self.storage.read_exact(at, data).await
            }
            Found::Packed(packed) => {
                let bytes = self.unpack(packed).await?;
                // CAST: inside of the cluster.
                let from = within as usize;
                let wanted = bytes.get(from..from + data.len()).ok_or(Errno::IO)?;
                data.write(0, wanted);
                Ok(())
            }
        }
    }

    pub(crate) async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.check(offset, data.len() as u64)?;
        for (cluster, within, at, len) in pieces(offset, data.len() as u64, self.map.cluster()) {
            let found = self.find(cluster).await?;
            self.read_found(found, offset + at, within, part(&data, at, len))
                .await?;
        }
        Ok(())
    }

    pub(crate) async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        self.check(offset, data.len() as u64)?;
        for (cluster, within, at, len) in pieces(offset, data.len() as u64, self.map.cluster()) {
            // CAST: they are inside of the data.
            let data = data.part(at as usize, len as usize);
            self.write_cluster(cluster, within, Some(data), len).await?;
        }
        Ok(())
    }

    /// Writes a part of a cluster: bytes, or zeroes.
    async fn write_cluster(
        &self,
        cluster: u64,
        within: u64,
        data: Option<Bytes>,
        len: u64,
    ) -> Result<(), Errno> {
        let mut found = self.find(cluster).await?;
        let mut held = None;
        if !matches!(found, Found::At(_)) {
            held = Some(self.locks.alone(cluster).await);
            found = self.find(cluster).await?;
        }
        if let Found::At(at) = found {
            // The cluster exists, so other requests need not wait.
            drop(held);
            let at = at.checked_add(within).ok_or(Errno::IO)?;
            return match data {
                Some(data) => self.storage.write(at, data).await,
                None => self.storage.write_zeroes(at, len).await,
            };
        }
        self.create(found, cluster, within, data, len).await
    }

    /// Allocates a cluster, and copies its old content around the new data. The caller holds the cluster's lock.
    async fn create(
        &self,
        found: Found,
        cluster: u64,
        within: u64,
        data: Option<Bytes>,
        len: u64,
    ) -> Result<(), Errno> {
        let unit = self.map.cluster();
        let begin = cluster.checked_mul(unit).ok_or(Errno::INVAL)?;
        // The last one reaches beyond the disk.
        let there = self.size.saturating_sub(begin).min(unit);
        let is_zero = match found {
            Found::Missing => {
                base::is_hole(self.parent.as_deref(), self.base + begin, there).await?
            }
            Found::Packed(_) => false,
            _ => true,
        };
        let at = self.tail.take(&*self.storage, unit, unit).await?;
        let barrier = self.tail.barrier();
        let errors = barrier.errors();
        if is_zero || len == there {
            if let Some(data) = data {
                self.storage.write(at + within, data).await?;
                if !is_zero {
                    barrier.settle_since(errors).await?;
                }
            }
        } else {
            let whole = Data::zeroed(there as usize)?;
            self.read_found(found, begin, 0, whole.clone()).await?;
            match data {
                Some(data) => data.copy_to(&whole, within as usize),
                None => whole.fill(within as usize, len as usize, 0),
            }
            self.storage.write(at, whole.into()).await?;
            barrier.settle_since(errors).await?;
        }
        self.map.set(&self.storage, &self.tail, cluster, at).await
    }

    pub(crate) async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.check(offset, len)?;
        for (cluster, within, at, len) in pieces(offset, len, self.map.cluster()) {
            let parent = self.parent.as_deref();
            match self.find(cluster).await? {
                Found::Zeroes => continue,
                Found::Missing if base::is_hole(parent, self.base + offset + at, len).await? => {
                    continue
                }
                Found::Missing | Found::Packed(_) if len == self.map.cluster() => {
                    let _held = self.locks.alone(cluster).await;
                    if self
                        .map
                        .set_zeroes(&self.storage, &self.tail, cluster)
                        .await?
                    {
                        continue;
                    }
                }
                _ => {}
            }
            self.write_cluster(cluster, within, None, len).await?;
        }
        Ok(())
    }

    pub(crate) async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.check(offset, len)?;
        for (cluster, within, _, len) in pieces(offset, len, self.map.cluster()) {
            if let Found::At(at) = self.find(cluster).await? {
                let at = at.checked_add(within).ok_or(Errno::IO)?;
                storage::give_back(&*self.storage, at, len).await?;
            }
        }
        Ok(())
    }

    /// See [`Driver::places`](drivers::Driver::places). A cluster in the image stays in place: an entry that leads
    /// somewhere is never changed, so an entry whose change has failed leads nowhere.
    pub(crate) async fn places(
        &self,
        offset: u64,
        len: u64,
        writable: bool,
    ) -> Result<Vec<MappedExtent>, Errno> {
        self.check(offset, len)?;
        let mut places = Vec::new();
        for (cluster, within, at, len) in pieces(offset, len, self.map.cluster()) {
            let from = self.base + offset + at;
            let found = self.find(cluster).await?;
            let begin = match found {
                Found::At(begin) => begin,
                Found::Packed(_) => continue,
                Found::Zeroes | Found::Missing => {
                    // A cluster that is zero is not looked up in the parent.
                    let parent = self.parent.as_deref().filter(|_| found == Found::Missing);
                    if self.map.is_settled(&self.storage, cluster).await? {
                        base::add_places(parent, from, len, &mut places).await?;
                    }
                    continue;
                }
            };
            let begin = begin.checked_add(within).ok_or(Errno::IO)?;
            let end = begin.checked_add(len);
            // The last cluster may be cut off.
            if end.is_some_and(|end| end <= self.tail.end()) {
                let place = MappedExtent {
                    offset: from,
                    len,
                    holder: Holder::Image,
                    at: begin,
                    writable,
                };
                base::add_place(&mut places, place);
            }
        }
        Ok(places)
    }

    /// Returns the content of a range: with the backing images if `whole` is set, else of this image alone.
    pub(crate) async fn extents(
        &self,
        offset: u64,
        len: u64,
        whole: bool,
    ) -> Result<Vec<Extent>, Errno> {
        self.check(offset, len)?;
        let mut row = ExtentRun::default();
        for (cluster, within, at, len) in pieces(offset, len, self.map.cluster()) {
            match self.find(cluster).await? {
                Found::Missing => {
                    row.push_missing(self.parent.as_deref(), self.base + offset + at, len, whole)
                        .await?;
                }
                Found::Zeroes => row.push(len, Content::Hole),
                Found::At(begin) => {
                    let begin = begin.checked_add(within).ok_or(Errno::IO)?;
                    let inside = match self.inside(begin, len) {
                        inside if inside == len => len,
                        // Only whole sectors, because readers ask for sectors.
                        inside => inside - inside % 512,
                    };
                    row.push(inside, Content::Data);
                    match row.is_empty() {
                        true => return Err(Errno::IO),
                        false if inside < len => break,
                        false => {}
                    }
                }
                Found::Packed(_) => row.push(len, Content::Data),
            }
            if row.is_full() {
                break;
            }
        }
        Ok(row.finish())
    }
}
