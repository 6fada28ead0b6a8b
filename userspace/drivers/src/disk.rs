// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk, whatever its driver.

use crate::{
    Attributes, Content, DirtyExtent, DiskInfo, Driver, DriverLimits, Extent, Fence, Holder,
    MappedExtent, QueuedIo,
};
use control::{Code, Failure};
use diskio::{of_earlier, Bytes, Data, Errno};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

type Later<'a, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + 'a>>;

/// [`Driver`] in a form that can be pointed to.
trait Any {
    fn activate(&self) -> Later<'_, DiskInfo, Failure>;
    fn fence(&self) -> Fence;
    fn is_verbatim(&self) -> bool;
    fn has_places(&self) -> bool;
    fn places(&self, offset: u64, len: u64) -> Later<'_, Vec<MappedExtent>, Errno>;
    fn read(&self, offset: u64, data: Data) -> Later<'_, (), Errno>;
    fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Later<'_, (), Errno>;
    fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo>;
    fn begin_write(&self, offset: u64, data: &Bytes) -> Option<QueuedIo>;
    fn flush(&self) -> Later<'_, (), Errno>;
    fn owes(&self) -> bool;
    fn discard(&self, offset: u64, len: u64, how: Attributes) -> Later<'_, (), Errno>;
    fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Later<'_, (), Errno>;
    fn extents(&self, offset: u64, len: u64) -> Later<'_, Vec<Extent>, Errno>;
    fn layer(&self, offset: u64, len: u64) -> Later<'_, Vec<Extent>, Errno>;
    fn bitmaps(&self) -> Later<'_, Vec<String>, Failure>;
    fn dirty<'a>(
        &'a self,
        bitmap: &'a str,
        offset: u64,
        len: u64,
        most: usize,
    ) -> Later<'a, Vec<DirtyExtent>, Failure>;
    fn passed(&self, offset: u64, len: u64) -> Option<Disk>;
    fn inactivate(&self) -> Later<'_, (), Errno>;
    fn resize(&self) -> Later<'_, u64, Failure>;
    fn grow(&self, size: u64) -> Later<'_, (), Failure>;
    fn goes_on(&self) -> Later<'_, bool, Failure>;
    fn stand_alone(&self) -> Later<'_, (), Failure>;
    fn stats(&self) -> BTreeMap<String, u64>;
    fn close(&self) -> Later<'_, (), Errno>;
}

impl<D: Driver> Any for D {
    fn activate(&self) -> Later<'_, DiskInfo, Failure> {
        Box::pin(Driver::activate(self))
    }
    fn fence(&self) -> Fence {
        Driver::fence(self)
    }
    fn is_verbatim(&self) -> bool {
        Driver::is_verbatim(self)
    }
    fn has_places(&self) -> bool {
        Driver::has_places(self)
    }
    fn places(&self, offset: u64, len: u64) -> Later<'_, Vec<MappedExtent>, Errno> {
        Box::pin(Driver::places(self, offset, len))
    }
    fn read(&self, offset: u64, data: Data) -> Later<'_, (), Errno> {
        Box::pin(Driver::read(self, offset, data))
    }
    fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Later<'_, (), Errno> {
        Box::pin(Driver::write(self, offset, data, how))
    }
    fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo> {
        Driver::begin_read(self, offset, data)
    }
    fn begin_write(&self, offset: u64, data: &Bytes) -> Option<QueuedIo> {
        Driver::begin_write(self, offset, data)
    }
    fn flush(&self) -> Later<'_, (), Errno> {
        Box::pin(Driver::flush(self))
    }
    fn owes(&self) -> bool {
        Driver::owes(self)
    }
    fn discard(&self, offset: u64, len: u64, how: Attributes) -> Later<'_, (), Errno> {
        Box::pin(Driver::discard(self, offset, len, how))
    }
    fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Later<'_, (), Errno> {
        Box::pin(Driver::write_zeroes(self, offset, len, how))
    }
    fn extents(&self, offset: u64, len: u64) -> Later<'_, Vec<Extent>, Errno> {
        Box::pin(Driver::extents(self, offset, len))
    }
    fn layer(&self, offset: u64, len: u64) -> Later<'_, Vec<Extent>, Errno> {
        Box::pin(Driver::layer(self, offset, len))
    }
    fn bitmaps(&self) -> Later<'_, Vec<String>, Failure> {
        Box::pin(Driver::bitmaps(self))
    }
    fn dirty<'a>(
        &'a self,
        bitmap: &'a str,
        offset: u64,
        len: u64,
        most: usize,
    ) -> Later<'a, Vec<DirtyExtent>, Failure> {
        Box::pin(Driver::dirty(self, bitmap, offset, len, most))
    }
    fn passed(&self, offset: u64, len: u64) -> Option<Disk> {
        Driver::passed(self, offset, len)
    }
    fn inactivate(&self) -> Later<'_, (), Errno> {
        Box::pin(Driver::inactivate(self))
    }
    fn resize(&self) -> Later<'_, u64, Failure> {
        Box::pin(Driver::resize(self))
    }
    fn grow(&self, size: u64) -> Later<'_, (), Failure> {
        Box::pin(Driver::grow(self, size))
    }
    fn goes_on(&self) -> Later<'_, bool, Failure> {
        Box::pin(Driver::goes_on(self))
    }
    fn stand_alone(&self) -> Later<'_, (), Failure> {
        Box::pin(Driver::stand_alone(self))
    }
    fn stats(&self) -> BTreeMap<String, u64> {
        Driver::stats(self)
    }
    fn close(&self) -> Later<'_, (), Errno> {
        Box::pin(Driver::close(self))
    }
}

/// A disk, whatever serves its content. Copies are the same disk. Its functions are those of [`Driver`]; it does the
/// work that a driver does not do itself.
#[derive(Clone)]
pub struct Disk(Rc<DiskCore<dyn Any>>);

struct DiskCore<D: ?Sized> {
    /// Properties that the driver reported.
    shape: Cell<Option<DiskInfo>>,
    /// Bytes of a logical sector, if they are not those of the driver.
    sector: Cell<Option<u32>>,
    /// The kernel has the image by this number.
    backing: Cell<Option<u16>>,
    driver: D,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").finish_non_exhaustive()
    }
}

impl Disk {
    /// The disk that `driver` serves.
    pub fn new(driver: impl Driver) -> Self {
        Self(Rc::new(DiskCore {
            shape: Cell::new(None),
            sector: Cell::new(None),
            backing: Cell::new(None),
            driver,
        }))
    }

    /// The kernel has the image by this number, and will have no other one by it.
    pub fn set_backing(&self, backing: Option<u16>) {
        self.0.backing.set(backing);
    }

    /// Gives the active disk logical sectors of `size` bytes, a power of two from 512 to 4096, and returns its new
    /// properties, which it has after later activations, too. To write a part of a block of the storage, this
    /// process reads and writes the whole block, and writes no other part of that file meanwhile.
    ///
    /// # Errors
    /// The disk is not active, or is no whole number of such sectors.
    pub fn set_sector(&self, size: u32) -> Result<DiskInfo, Failure> {
        let shape = self.0.shape.get();
        let shape = shape.ok_or_else(|| Failure::new(Code::State, "the disk is not active"))?;
        self.0.sector.set(Some(size));
        self.keep(shape)
    }

    /// See [`Driver::activate`].
    pub async fn activate(&self) -> Result<DiskInfo, Failure> {
        self.keep(self.0.driver.activate().await?)
    }

    /// Keeps the properties that the driver reported, with logical sectors of the size that was set.
    fn keep(&self, its: DiskInfo) -> Result<DiskInfo, Failure> {
        let sector = self.0.sector.get().unwrap_or(its.logical_block);
        let shape = DiskInfo {
            size: self.in_sectors(its.size)?,
            logical_block: sector,
            physical_block: its.physical_block.max(sector),
            discard: its.discard.map(|unit| unit.max(sector)),
            ..its
        };
        self.0.shape.set(Some(shape));
        Ok(shape)
    }

    /// Returns the size in bytes, if it is whole sectors. Of those that a driver reports itself, it makes sure.
    fn in_sectors(&self, size: u64) -> Result<u64, Failure> {
        match self.0.sector.get() {
            Some(sector) => in_sectors(size, sector),
            None => Ok(size),
        }
    }

    /// See [`Driver::fence`].
    pub fn fence(&self) -> Fence {
        self.0.driver.fence()
    }

    /// See [`Driver::is_verbatim`].
    pub fn is_verbatim(&self) -> bool {
        self.0.driver.is_verbatim()
    }

    /// Returns where a range is, as a disk on top of this one reports it: no place is in that disk's own image. See
    /// [`Driver::places`].
    pub async fn places_below(&self, offset: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
        let mut places = match self.is_verbatim() {
            true => vec![MappedExtent {
                offset,
                len,
                holder: Holder::Image,
                at: offset,
                writable: false,
            }],
            false => self.places(offset, len).await?,
        };
        let backing = self.0.backing.get();
        places.retain_mut(|place| {
            place.writable = false;
            if place.holder != Holder::Image {
                return true;
            }
            // A place in this image is reported only if the kernel knows the image.
            match backing {
                Some(number) => place.holder = Holder::Below(number),
                None => return false,
            }
            true
        });
        Ok(places)
    }

    /// See [`Driver::has_places`].
    pub fn has_places(&self) -> bool {
        self.0.driver.has_places()
    }

    /// See [`Driver::places`].
    pub async fn places(&self, offset: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
        self.0.driver.places(offset, len).await
    }

    /// See [`Driver::read`].
    pub async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let whole = data.len() as u64;
        for (at, len) in self.pieces(offset, whole, |limits| limits.transfer) {
            // CAST: they are inside of the data.
            let part = data.part(at as usize, len as usize);
            self.0.driver.read(offset + at, part).await?;
        }
        Ok(())
    }

    /// See [`Driver::write`].
    pub async fn write(
        &self,
        offset: u64,
        data: impl Into<Bytes>,
        how: Attributes,
    ) -> Result<(), Errno> {
        let data = data.into();
        let whole = data.len() as u64;
        for (at, len) in self.pieces(offset, whole, |limits| limits.transfer) {
            // CAST: they are inside of the data.
            let part = data.part(at as usize, len as usize);
            self.0.driver.write(offset + at, part, how).await?;
        }
        self.settle(how).await
    }

    /// See [`Driver::begin_read`].
    pub fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo> {
        self.is_one_piece(data.len())
            .then(|| self.0.driver.begin_read(offset, data))?
    }

    /// See [`Driver::begin_write`].
    pub fn begin_write(&self, offset: u64, data: &Bytes) -> Option<QueuedIo> {
        self.is_one_piece(data.len())
            .then(|| self.0.driver.begin_write(offset, data))?
    }

    /// Returns true if the driver takes a transfer of `len` bytes whole.
    fn is_one_piece(&self, len: usize) -> bool {
        let shape = self.0.shape.get();
        shape.is_some_and(|shape| len as u64 <= shape.limits.transfer)
    }

    /// See [`Driver::flush`].
    pub async fn flush(&self) -> Result<(), Errno> {
        self.0.driver.flush().await
    }

    /// See [`Driver::owes`].
    pub fn owes(&self) -> bool {
        self.0.driver.owes()
    }

    /// See [`Driver::discard`].
    pub async fn discard(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        for (at, len) in self.pieces(offset, len, |limits| limits.zeroes) {
            self.0.driver.discard(offset + at, len, how).await?;
        }
        self.settle(how).await
    }

    /// See [`Driver::write_zeroes`].
    pub async fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        for (at, len) in self.pieces(offset, len, |limits| limits.zeroes) {
            self.0.driver.write_zeroes(offset + at, len, how).await?;
        }
        self.settle(how).await
    }

    /// Splits a request into pieces: the offset of each from its beginning and its length, none larger than the
    /// driver's limit.
    fn pieces(
        &self,
        offset: u64,
        len: u64,
        limit: impl Fn(&DriverLimits) -> u64,
    ) -> impl Iterator<Item = (u64, u64)> {
        let limits = self.0.shape.get().map(|shape| shape.limits);
        let limits = limits.unwrap_or_default();
        let (most, align) = (limit(&limits).max(1), u64::from(limits.align.max(1)));
        let mut at = 0;
        std::iter::from_fn(move || {
            let left = len.checked_sub(at).filter(|left| *left > 0)?;
            let from = at;
            let mut count = left.min(most);
            let past = (offset + at + count) % align;
            if count < left && past < count {
                count -= past;
            }
            at += count;
            Some((from, count))
        })
    }

    /// Flushes for a driver that does not support [`Attributes::fua`].
    async fn settle(&self, how: Attributes) -> Result<(), Errno> {
        let heeded = self.0.shape.get().is_some_and(|shape| shape.fua);
        match how.fua && !heeded {
            true => self.flush().await.map_err(of_earlier),
            false => Ok(()),
        }
    }

    /// See [`Driver::extents`]. All extents are inside of the range, which is whole logical blocks, and end at the end
    /// of such a block: a block that is partly data is data.
    pub async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.whole(self.0.driver.extents(offset, len).await?, offset, len)
    }

    /// See [`Driver::layer`]. All extents are inside of the range, and end at the end of a logical block.
    pub async fn layer(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.whole(self.0.driver.layer(offset, len).await?, offset, len)
    }

    fn whole(&self, found: Vec<Extent>, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        whole(&found, offset, len, self.block()).ok_or(Errno::IO)
    }

    /// Returns the bytes of a logical block; 1 before the disk is active.
    fn block(&self) -> u64 {
        let block = self.0.shape.get().map_or(1, |shape| shape.logical_block);
        block.max(1).into()
    }

    /// See [`Driver::bitmaps`].
    pub async fn bitmaps(&self) -> Result<Vec<String>, Failure> {
        self.0.driver.bitmaps().await
    }

    /// See [`Driver::dirty`]. All extents are inside of the range, which is whole logical blocks, and end at the end of
    /// such a block: a block that is partly dirty is dirty.
    pub async fn dirty(
        &self,
        bitmap: &str,
        offset: u64,
        len: u64,
        most: usize,
    ) -> Result<Vec<DirtyExtent>, Failure> {
        const SECTOR: u64 = 512;
        let block = self.block();
        // So many sectors are at least one block. CAST: a block has few sectors.
        let enough = most.saturating_mul(block.div_ceil(SECTOR) as usize);
        let found = self.0.driver.dirty(bitmap, offset, len, enough).await?;
        let content = |is_dirty| {
            if is_dirty {
                Content::Data
            } else {
                Content::Hole
            }
        };
        let parts = found.iter().map(|part| Extent {
            len: part.len,
            content: content(part.is_dirty),
        });
        let parts: Vec<Extent> = parts.collect();
        let whole = whole(&parts, offset, len, block)
            .ok_or_else(|| Failure::system("the dirty bitmap", &Errno::IO.into()))?;
        let extents = whole.into_iter().take(most).map(|part| DirtyExtent {
            len: part.len,
            is_dirty: part.content == Content::Data,
        });
        Ok(extents.collect())
    }

    /// See [`Driver::passed`].
    pub fn passed(&self, offset: u64, len: u64) -> Option<Disk> {
        self.0.driver.passed(offset, len)
    }

    /// See [`Driver::inactivate`].
    pub async fn inactivate(&self) -> Result<(), Errno> {
        self.0.driver.inactivate().await
    }

    /// See [`Driver::resize`].
    pub async fn resize(&self) -> Result<u64, Failure> {
        self.in_sectors(self.0.driver.resize().await?)
    }

    /// See [`Driver::grow`].
    pub async fn grow(&self, size: u64) -> Result<(), Failure> {
        self.in_sectors(size)?;
        self.0.driver.grow(size).await
    }

    /// Returns the bytes of the image's units of allocation, such as clusters; 1 before it is active.
    pub fn unit(&self) -> u64 {
        let shape = self.0.shape.get();
        shape.map_or(1, |shape| shape.limits.align.max(1).into())
    }

    /// See [`Driver::goes_on`].
    pub async fn goes_on(&self) -> Result<bool, Failure> {
        self.0.driver.goes_on().await
    }

    /// See [`Driver::stand_alone`].
    pub async fn stand_alone(&self) -> Result<(), Failure> {
        self.0.driver.stand_alone().await
    }

    /// See [`Driver::stats`].
    pub fn stats(&self) -> BTreeMap<String, u64> {
        self.0.driver.stats()
    }

    /// See [`Driver::close`].
    pub async fn close(&self) -> Result<(), Errno> {
        self.0.driver.close().await
    }
}

/// Returns the size in bytes of a disk, which is whole logical sectors.
fn in_sectors(size: u64, sector: u32) -> Result<u64, Failure> {
    match size % u64::from(sector.max(1)) {
        0 => Ok(size),
        _ => Err(Failure::new(
            Code::Image,
            format!(
                "the disk has {size} bytes, which are no whole number of logical sectors of {sector}: give it a size \
                 that is a multiple of them"
            ),
        )),
    }
}

/// Returns extents from `offset` on, in whole blocks and within `len` bytes; `None` if there are none.
fn whole(found: &[Extent], offset: u64, len: u64, block: u64) -> Option<Vec<Extent>> {
    let mut all: Vec<Extent> = Vec::with_capacity(found.len());
    let (mut at, mut said) = (0, 0_u64);
    for extent in found {
        said = said.saturating_add(extent.len).min(len);
        let end = offset.checked_add(said)?;
        let past = end % block;
        let end = match extent.content {
            _ if past == 0 => said,
            Content::Data => said.saturating_add(block - past).min(len),
            Content::Hole | Content::Below => said.saturating_sub(past),
        };
        if end <= at {
            continue;
        }
        let (len, content) = (end - at, extent.content);
        at = end;
        match all.last_mut().filter(|last| last.content == content) {
            Some(last) => last.len += len,
            None => all.push(Extent { len, content }),
        }
    }
    if all.is_empty() && said > 0 {
        // A hole within a block: of the rest nothing is known.
        all.push(Extent {
            len: block.min(len),
            content: Content::Data,
        });
    }
    (!all.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::whole;
    use crate::Content::{Data, Hole};
    use crate::{Content, Extent};

    type ReadParts = Vec<(u64, Content)>;

    fn rounded(found: &[(u64, Content)], len: u64) -> Option<ReadParts> {
        let found: Vec<Extent> = found
            .iter()
            .map(|&(len, content)| Extent { len, content })
            .collect();
        let all = whole(&found, 8192, len, 4096)?;
        Some(all.iter().map(|part| (part.len, part.content)).collect())
    }

    #[test]
    fn block_with_data_anywhere_is_data() {
        for (found, len, expected) in [
            (
                vec![(4096, Hole), (4096, Data)],
                8192,
                Some(vec![(4096, Hole), (4096, Data)]),
            ),
            // No hole has a whole block.
            (
                vec![(1000, Hole), (4000, Data), (3192, Hole)],
                8192,
                Some(vec![(8192, Data)]),
            ),
            (
                vec![(5000, Hole), (100, Data), (7188, Hole)],
                12288,
                Some(vec![(4096, Hole), (4096, Data), (4096, Hole)]),
            ),
            (vec![(512, Data)], 8192, Some(vec![(4096, Data)])),
            (vec![(512, Hole)], 8192, Some(vec![(4096, Data)])),
            (
                vec![(100, Hole), (100, Data), (100, Hole), (7892, Data)],
                8192,
                Some(vec![(8192, Data)]),
            ),
            (
                vec![(u64::MAX, Data), (u64::MAX, Hole)],
                8192,
                Some(vec![(8192, Data)]),
            ),
            (vec![(0, Hole)], 8192, None),
            (vec![], 8192, None),
        ] {
            assert_eq!(rounded(&found, len), expected, "{found:?}");
        }
    }

    /// A file whose block is larger than the guest's returns parts of a block.
    #[test]
    fn range_is_never_exceeded() {
        for end in 1..40 {
            let found = [(end * 300, Data), (20000, Hole)];
            let all = rounded(&found, 12288).unwrap();
            assert_eq!(all.iter().map(|part| part.0).sum::<u64>(), 12288);
            assert!(all.iter().all(|part| part.0 % 4096 == 0), "{all:?}");
        }
    }
}
