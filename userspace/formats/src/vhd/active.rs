// SPDX-License-Identifier: MIT OR Apache-2.0
//! The body of a VHD whose blocks are allocated on the first write.

use super::batmap::Batmap;
use super::block_alloc::{BlockAllocator, PAGE};
use super::blocks::{check, BlockTable, Item, UNUSED};
use super::footer::Footer;
use super::header::VhdHeader;
use crate::base::{self, Base, ExtentRun};
use crate::field::{counters, failed, part, pieces, refused};
use crate::locks::RangeLocks;
use crate::metadata::Metadata;
use crate::tables::{CachedTable, TableCache};
use crate::{storage, Options, Storage};
use control::Failure;
use diskio::{Bytes, Data, Errno};
use drivers::{Content, Extent, Holder, MappedExtent, QueuedIo};
use futures::future::join;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

const SECTOR: u64 = 512;

#[derive(Debug)]
pub(crate) struct Active<S> {
    storage: Rc<S>,
    footer: RefCell<Footer>,
    size: Cell<u64>,
    /// Bytes of a block, and of the bitmap before it.
    block: u64,
    bitmap: u64,
    is_writable: bool,
    blocks: BlockTable,
    batmap: Option<Batmap>,
    bitmaps: TableCache,
    room: BlockAllocator<S>,
    parent: Option<Rc<Base>>,
    locks: RangeLocks,
}

/// Fills the last page of the file, with a footer at its end: a direct write into that page makes the file longer, so
/// that the old footer is not at the end any more.
async fn fill(storage: &impl Storage, footer: &Footer, length: u64) -> Result<(), Errno> {
    let end = length.next_multiple_of(PAGE);
    if storage.is_fixed() || end == length {
        return Ok(());
    }
    let footer = Bytes::copied(footer.bytes())?;
    storage.write(end - footer.len() as u64, footer).await
}

/// A part of a block that exists: its number, where its bitmap is, and which of its bytes.
#[derive(Clone, Copy)]
struct BlockPart {
    block: u32,
    at: u64,
    within: u64,
    len: u64,
}

impl<S: Storage> Active<S> {
    pub(crate) async fn open(
        storage: Rc<S>,
        footer: Footer,
        header: VhdHeader,
        parent: Option<Rc<Base>>,
        options: &Options,
    ) -> Result<Self, Failure> {
        let blocks = BlockTable::read(&*storage, &header, footer.size).await;
        let blocks = blocks.map_err(failed("cannot read the VHD's table"))?;
        // The length is read after the table, because another host may be making the image longer and have new blocks
        // there.
        let length = storage
            .size()
            .map_err(failed("cannot see the image's size"))?;
        let batmap = Batmap::read(&*storage, &footer, &header, &blocks, length).await?;
        let (block, bitmap) = (u64::from(header.block), header.bitmap());
        let len = bitmap + block;
        let mut items: Vec<Item> = blocks.items(len).collect();
        items.extend(header.items(&footer));
        items.extend(batmap.iter().flat_map(Batmap::items));
        let (end, gaps) = check(items, len, length)?;
        let is_writable = options
            .may_write(&*storage)
            .map_err(failed("cannot use the image"))?;
        if is_writable {
            let work = fill(&*storage, &footer, length).await;
            work.map_err(failed("cannot write the VHD's footer"))?;
        }
        let room = BlockAllocator::new(&*storage, (bitmap, block), end, &gaps);
        Ok(Self {
            storage,
            size: Cell::new(footer.size),
            footer: RefCell::new(footer),
            block,
            bitmap,
            is_writable,
            blocks,
            batmap,
            bitmaps: TableCache::new(options.cache),
            room,
            parent,
            locks: RangeLocks::default(),
        })
    }

    /// The pieces of a range: the block, where in it, where in the range, how long.
    fn pieces(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<impl Iterator<Item = (u32, u64, u64, u64)>, Errno> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.size.get()) {
            return Err(Errno::INVAL);
        }
        // CAST: there are at most 2^22 blocks on a disk.
        Ok(pieces(offset, len, self.block).map(|(n, within, at, len)| (n as u32, within, at, len)))
    }

    fn place(&self, block: u32, within: u64, len: u64) -> Option<BlockPart> {
        let at = self.blocks.place(block)?;
        Some(BlockPart {
            block,
            at,
            within,
            len,
        })
    }

    /// Returns the offset of the bytes in the image.
    fn data(&self, place: BlockPart) -> u64 {
        place.at + self.bitmap + place.within
    }

    fn metadata(&self) -> Metadata<S> {
        self.room.metadata(&self.storage)
    }

    /// The bitmap of the block.
    async fn bits(&self, place: BlockPart) -> Result<Rc<CachedTable>, Errno> {
        // CAST: a bitmap is at most 64 KiB.
        let len = self.bitmap as usize;
        self.bitmaps.get(&*self.storage, place.at, len).await
    }

    /// Returns the lengths in bytes of the block's runs of sectors, and whether the image has each.
    async fn runs(&self, place: BlockPart) -> Result<Vec<(u64, bool)>, Errno> {
        if self.blocks.is_full(place.block) {
            return Ok(vec![(place.len, true)]);
        }
        let table = self.bits(place).await?;
        let first = place.within / SECTOR;
        let mut runs: Vec<(u64, bool)> = Vec::new();
        table.see(|bits| {
            for sector in first..first + place.len / SECTOR {
                let is_set = bit(bits, sector);
                match runs.last_mut() {
                    Some((len, last)) if *last == is_set => *len += SECTOR,
                    _ => runs.push((SECTOR, is_set)),
                }
            }
        });
        Ok(runs)
    }

    pub(crate) async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        for (block, within, at, len) in self.pieces(offset, data.len() as u64)? {
            let data = part(&data, at, len);
            match self.place(block, within, len) {
                Some(place) => self.read_block(place, offset + at, data).await?,
                None => base::read(self.parent.as_deref(), offset + at, data).await?,
            }
        }
        Ok(())
    }

    async fn read_block(&self, place: BlockPart, offset: u64, data: Data) -> Result<(), Errno> {
        let mut done = 0;
        for (len, is_written) in self.runs(place).await? {
            let data = part(&data, done, len);
            match is_written {
                true => {
                    self.storage
                        .read_exact(self.data(place) + done, data)
                        .await?
                }
                false => base::read(self.parent.as_deref(), offset + done, data).await?,
            }
            done += len;
        }
        Ok(())
    }

    pub(crate) async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        for (block, within, at, len) in self.pieces(offset, data.len() as u64)? {
            // CAST: they are inside of the data.
            let data = data.part(at as usize, len as usize);
            let found = match self.place(block, within, len) {
                Some(place) => Some(place),
                None => {
                    let _held = self.locks.alone(u64::from(block)).await;
                    match self.place(block, within, len) {
                        Some(place) => Some(place),
                        None => {
                            self.create(block, within, len, Some(data.clone())).await?;
                            None
                        }
                    }
                }
            };
            if let Some(place) = found {
                let errors = self.room.errors();
                self.storage.write(self.data(place), data).await?;
                self.mark(place, offset + at, errors).await?;
            }
        }
        Ok(())
    }

    /// See [`Driver::begin_read`](drivers::Driver::begin_read). The driver frees a block only when a request discards all of
    /// it, and the kernel orders that request behind this one.
    pub(crate) fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo> {
        let (block, within) = self.one_block(offset, data.len() as u64)?;
        match self.place(block, within, data.len() as u64) {
            Some(place) if self.holds(place)? => {
                let io = self.storage.begin_read(self.data(place), data);
                io.map(QueuedIo::from)
            }
            _ => self.parent.as_ref()?.begin_read(offset, data),
        }
    }

    /// See [`Driver::begin_write`](drivers::Driver::begin_write). The image says already that it has all of the sectors.
    pub(crate) fn begin_write(&self, offset: u64, data: &Bytes) -> Option<QueuedIo> {
        let (block, within) = self.one_block(offset, data.len() as u64)?;
        let place = self.place(block, within, data.len() as u64)?;
        let is_known = self.is_writable && self.blocks.is_settled(block) && self.holds(place)?;
        let io = is_known.then(|| self.storage.begin_write(self.data(place), data))?;
        io.map(QueuedIo::from)
    }

    /// Returns the block that has all of a range, and where in it the range begins.
    fn one_block(&self, offset: u64, len: u64) -> Option<(u32, u64)> {
        let (block, within, _, part) = self.pieces(offset, len).ok()?.next()?;
        (part == len).then_some((block, within))
    }

    /// Reports whether the image has all sectors of a part, or none; `None` if it has some, or that is not in memory.
    fn holds(&self, place: BlockPart) -> Option<bool> {
        if self.blocks.is_full(place.block) {
            return Some(true);
        }
        // CAST: a bitmap is at most 64 KiB.
        let table = self.bitmaps.known(place.at, self.bitmap as usize)?;
        let first = place.within / SECTOR;
        let mut sectors = first..first + place.len / SECTOR;
        table.see(|bits| {
            let is_first = bit(bits, first);
            let is_alike = sectors.all(|sector| bit(bits, sector) == is_first);
            (is_alike && table.is_settled()).then_some(is_first)
        })
    }

    /// Flushes a range of the disk if the parent has something else than zeroes there: its bits in the bitmap must not
    /// survive a power cut without the data. `errors` is the number of [errors](Room::errors) before the write.
    async fn settle(&self, offset: u64, len: u64, errors: u64) -> Result<(), Errno> {
        match base::is_hole(self.parent.as_deref(), offset, len).await? {
            true => Ok(()),
            false => self.room.flush(errors).await,
        }
    }

    /// Makes a block that holds `data`, or zeroes, and lets the table point to it. Its lock is held.
    async fn create(
        &self,
        block: u32,
        within: u64,
        len: u64,
        data: Option<Bytes>,
    ) -> Result<(), Errno> {
        let footer = self.footer.borrow().clone();
        let sector = self.room.take(&*self.storage, &footer).await?;
        let at = u64::from(sector) * SECTOR;
        let mut bits = vec![0; self.bitmap as usize];
        match self.parent.is_some() {
            true => set_bits(&mut bits, within / SECTOR, len / SECTOR),
            // The other sectors read as zero there.
            false => set_bits(&mut bits, 0, self.block / SECTOR),
        }
        let is_full = has_all(&bits, self.block / SECTOR);
        let errors = self.room.errors();
        let metadata = self.metadata();
        let bitmap = metadata.write(at, Bytes::copied(&bits)?);
        match data {
            Some(data) => {
                let data = self.storage.write(at + self.bitmap + within, data);
                let (bitmap, data) = join(bitmap, data).await;
                bitmap.and(data)?;
                let begin = u64::from(block) * self.block;
                self.settle(begin + within, len, errors).await?;
            }
            None => bitmap.await?,
        }
        match is_full {
            true => self.bitmaps.forget(at),
            false => self.bitmaps.put(at, bits),
        }
        self.blocks.set_full(block, is_full);
        let set = self.blocks.set(&metadata, block, sector).await;
        if set.is_err() {
            // There is no block: the batmap must not speak of one.
            self.blocks.set_full(block, false);
        }
        set
    }

    /// Sets the bits of sectors from `offset` on, whose data is in the image. `errors` is the number of
    /// [errors](Room::errors) before the write.
    async fn mark(&self, place: BlockPart, offset: u64, errors: u64) -> Result<(), Errno> {
        let metadata = self.metadata();
        self.blocks.settle(&metadata, place.block).await?;
        if self.blocks.is_full(place.block) {
            return Ok(());
        }
        let table = self.bits(place).await?;
        let (first, count) = (place.within / SECTOR, place.len / SECTOR);
        let is_known = table.see(|bits| (first..first + count).all(|sector| bit(bits, sector)));
        if !is_known {
            self.settle(offset, place.len, errors).await?;
            table
                .change(&metadata, |bits| set_bits(bits, first, count))
                .await?;
        }
        if table.see(|bits| has_all(bits, self.block / SECTOR)) {
            self.blocks.set_full(place.block, true);
            self.bitmaps.forget(place.at);
        }
        Ok(())
    }

    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        self.room.flush_and_tell().await
    }

    pub(crate) fn owes(&self) -> bool {
        self.room.owes()
    }

    pub(crate) async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        for (block, within, _, len) in self.pieces(offset, len)? {
            if let Some(place) = self.place(block, within, len) {
                if self.give_up(place).await? {
                    continue;
                }
                storage::give_back(&*self.storage, self.data(place), len).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        for (block, within, at, len) in self.pieces(offset, len)? {
            if self.place(block, within, len).is_none() {
                let parent = self.parent.as_deref();
                if base::is_hole(parent, offset + at, len).await? {
                    continue;
                }
                let _held = self.locks.alone(u64::from(block)).await;
                if self.place(block, within, len).is_none() {
                    self.create(block, within, len, None).await?;
                    continue;
                }
            }
            let Some(place) = self.place(block, within, len) else {
                return Err(Errno::IO);
            };
            if !self.give_up(place).await? {
                let errors = self.room.errors();
                self.storage.write_zeroes(self.data(place), len).await?;
                self.mark(place, offset + at, errors).await?;
            }
        }
        Ok(())
    }

    /// Makes a whole block of a disk without a parent be no more. Says whether it is one.
    async fn give_up(&self, place: BlockPart) -> Result<bool, Errno> {
        if self.parent.is_some() || place.len != self.block {
            return Ok(false);
        }
        let _held = self.locks.alone(u64::from(place.block)).await;
        let metadata = self.metadata();
        self.blocks.set(&metadata, place.block, UNUSED).await?;
        self.blocks.set_full(place.block, false);
        self.bitmaps.forget(place.at);
        let len = self.bitmap + self.block;
        self.storage.clear(place.at, len).await?;
        self.room.give_up(place.at);
        Ok(true)
    }

    /// Returns the content of a range: with the backing images if `whole` is set, else of this image alone.
    pub(crate) async fn extents(
        &self,
        offset: u64,
        len: u64,
        whole: bool,
    ) -> Result<Vec<Extent>, Errno> {
        let mut row = ExtentRun::default();
        for (block, within, at, len) in self.pieces(offset, len)? {
            let mut place = offset + at;
            let runs = match self.place(block, within, len) {
                Some(found) => self.runs(found).await?,
                None => vec![(len, false)],
            };
            for (len, is_written) in runs {
                let parent = self.parent.as_deref();
                match is_written {
                    true => row.push(len, Content::Data),
                    false => row.push_missing(parent, place, len, whole).await?,
                }
                place += len;
            }
            if row.is_full() {
                break;
            }
        }
        Ok(row.finish())
    }

    /// See [`Driver::places`](drivers::Driver::places). A block stays where it is until all of it is discarded, and a
    /// sector of this image never falls back to the parent.
    pub(crate) async fn places(&self, offset: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
        let mut places = Vec::new();
        let parent = self.parent.as_deref();
        for (block, within, at, len) in self.pieces(offset, len)? {
            // To give a block up may have failed halfway.
            if !self.blocks.is_settled(block) {
                continue;
            }
            let Some(found) = self.place(block, within, len) else {
                base::add_places(parent, offset + at, len, &mut places).await?;
                continue;
            };
            let mut done = 0;
            for (len, is_written) in self.runs(found).await? {
                let from = offset + at + done;
                if is_written {
                    let place = MappedExtent {
                        offset: from,
                        len,
                        holder: Holder::Image,
                        at: self.data(found) + done,
                        writable: self.is_writable,
                    };
                    base::add_place(&mut places, place);
                } else {
                    base::add_places(parent, from, len, &mut places).await?;
                }
                done += len;
            }
        }
        Ok(places)
    }

    /// Adopts a new size, for which the table has room.
    pub(crate) fn resize(&self, footer: Footer, header: &VhdHeader) -> Result<u64, Failure> {
        let most = u64::from(self.blocks.count()) * self.block;
        if header.blocks != self.blocks.count()
            || footer.size < self.size.get()
            || footer.size > most
        {
            return Err(refused(format!(
                "the VHD has become one of {} bytes: while it is served it can grow to {most} bytes at most; pause the disk first",
                footer.size
            )));
        }
        self.size.set(footer.size);
        *self.footer.borrow_mut() = footer;
        Ok(self.size.get())
    }

    /// Cuts off unused space, and stores the list of full blocks. No request may follow. The image is valid without it,
    /// so a failure is only reported.
    pub(crate) async fn tidy(&self, name: &str) {
        if !self.is_writable {
            return;
        }
        if let Some(batmap) = &self.batmap {
            if let Err(error) = batmap.write(&*self.storage, &self.blocks).await {
                diskio::say!("{name}: the VHD's batmap is not brought up to date: {error}");
            }
        }
        let footer = self.footer.borrow().clone();
        if let Err(error) = self.room.trim(&*self.storage, &footer).await {
            diskio::say!(
                "{name}: the unused space at the end of the VHD could not be freed: {error}"
            );
        }
    }

    pub(crate) fn stats(&self) -> BTreeMap<String, u64> {
        let count = self.blocks.count();
        let there = (0..count).filter(|block| self.blocks.place(*block).is_some());
        let (cached, hits, misses) = self.bitmaps.counts();
        counters([
            ("blocks", u64::from(count)),
            ("blocks_used", there.count() as u64),
            ("block_bytes", self.block),
            ("room_bytes", self.room.left()),
            ("cache_bytes", cached),
            ("cache_hits", hits),
            ("cache_misses", misses),
        ])
    }
}

/// The bit of a sector: the first is the highest of its byte.
fn bit(bits: &[u8], sector: u64) -> bool {
    // CAST: a sector of a block.
    let byte = bits.get((sector / 8) as usize).copied().unwrap_or(0);
    byte << (sector % 8) & 0x80 != 0
}

fn set_bits(bits: &mut [u8], first: u64, count: u64) {
    for sector in first..first.saturating_add(count) {
        // CAST: a sector of a block.
        if let Some(byte) = bits.get_mut((sector / 8) as usize) {
            *byte |= 0x80 >> (sector % 8);
        }
    }
}

fn has_all(bits: &[u8], count: u64) -> bool {
    // CAST: sectors of a block; there are eight at least.
    let whole = (count / 8) as usize;
    bits.get(..whole)
        .is_some_and(|bits| bits.iter().all(|byte| *byte == 0xff))
}

#[cfg(test)]
mod tests {
    use super::{bit, has_all, set_bits};

    #[test]
    fn first_sector_is_the_highest_bit() {
        let mut bits = vec![0; 2];
        set_bits(&mut bits, 0, 1);
        set_bits(&mut bits, 7, 2);
        assert_eq!(bits, [0x81, 0x80]);
        assert!(bit(&bits, 8) && !bit(&bits, 9) && !bit(&bits, 100));
        set_bits(&mut bits, 0, 100);
        assert!(has_all(&bits, 16) && !has_all(&bits, 24));
    }
}
