// SPDX-License-Identifier: MIT OR Apache-2.0
//! Places of the blocks of a VHDX: the block allocation table (BAT), and the bitmaps of a differencing one, which mark
//! the sectors that are in the image.
//!
//! Blocks are in chunks, of as many sectors as a bitmap of 1 MiB has bits. In the table the entry of the bitmap
//! follows those of the blocks of its chunk. The table may have 512 MiB, so it is read in slices, within a budget.

use super::image::VhdxImage;
use super::log_overlay::Replayed;
use super::metadata::Metadata;
use super::region::Regions;
use crate::field::{le64, pieces, refused};
use crate::tables::{CachedTable, TableCache};
use crate::Storage;
use control::Failure;
use diskio::Errno;
use std::rc::Rc;

/// Bytes of a table or a bitmap that are read at once.
const SLICE: u64 = 4096;
/// Sectors of a chunk, a bit for each, and bytes of its bitmap.
const CHUNK: u64 = 1 << 23;
const BITMAP: u64 = CHUNK / 8;
/// Bytes of an entry, the bits of its state, and those of a place, which is a number of MiB.
const ENTRY: u64 = 8;
const STATE: u64 = 7;
const PLACE: u64 = !0xf_ffff;

/// States of a block.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
/// State "unmapped" in a draft of the format, which early images have.
const UNMAPPED_EARLY: u64 = 5;
const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;
/// State of an existing bitmap.
const BITMAP_PRESENT: u64 = 6;

/// State of a block in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockState {
    /// The parent has the block, or it is zero.
    Missing,
    /// The block is zero, whatever the parent has.
    Zeroes,
    /// The block is in the image, at this byte.
    At(u64),
    /// The block is in the image, at this byte, for the sectors that its bitmap marks.
    Partly(u64),
}

/// The table of an image.
#[derive(Debug)]
pub(crate) struct PayloadBlocks<S> {
    storage: Replayed<S>,
    length: u64,
    regions: Regions,
    pub(crate) metadata: Metadata,
    /// Blocks of a chunk.
    ratio: u64,
    tables: TableCache,
}

impl<S: Storage> PayloadBlocks<S> {
    /// Returns the table of `image`, of which at most `cache` bytes are kept in memory.
    pub(crate) fn new(image: VhdxImage<S>, cache: usize) -> Result<Self, Failure> {
        let VhdxImage {
            storage,
            regions,
            metadata,
        } = image;
        let length = storage.size();
        let length = length.map_err(crate::field::failed("cannot see the image's size"))?;
        // Both are powers of two, and a chunk has 4 GiB at least.
        let ratio = CHUNK * u64::from(metadata.logical) / u64::from(metadata.block);
        let blocks = metadata.size.div_ceil(u64::from(metadata.block));
        let entries = match metadata.locator {
            Some(_) => blocks.div_ceil(ratio) * (ratio + 1),
            None => blocks + (blocks - 1) / ratio,
        };
        let room = regions.bat.end - regions.bat.start;
        if entries * ENTRY > room {
            return Err(refused(format!(
                "the VHDX's block allocation table has {room} bytes, which is not enough for {entries} entries: it is damaged"
            )));
        }
        Ok(Self {
            storage,
            length,
            regions,
            metadata,
            ratio,
            tables: TableCache::new(cache),
        })
    }

    /// Returns the image, to read the content of blocks.
    pub(crate) fn storage(&self) -> &Replayed<S> {
        &self.storage
    }

    /// Bytes of tables in memory, hits and misses.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        self.tables.counts()
    }

    /// The pieces of a range: the block, where in it, where in the range, how long.
    pub(crate) fn pieces(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<impl Iterator<Item = (u64, u64, u64, u64)>, Errno> {
        let end = offset.checked_add(len);
        match end.is_some_and(|end| end <= self.metadata.size) {
            true => Ok(pieces(offset, len, self.metadata.block.into())),
            false => Err(Errno::INVAL),
        }
    }

    async fn slice(&self, at: u64) -> Result<Rc<CachedTable>, Errno> {
        // CAST: a small number.
        self.tables.get(&self.storage, at, SLICE as usize).await
    }

    async fn entry(&self, number: u64) -> Result<u64, Errno> {
        let at = number.checked_mul(ENTRY).ok_or(Errno::IO)?;
        let slice = self
            .slice(self.regions.bat.start + at / SLICE * SLICE)
            .await?;
        // CAST: inside of a slice.
        Ok(slice.see(|bytes| le64(bytes, (at % SLICE) as usize)))
    }

    /// Returns the place that an entry leads to; at least `len` bytes from there must be in the image.
    fn place(&self, entry: u64, len: u64) -> Result<u64, Errno> {
        let at = entry & PLACE;
        let is_known = entry & !(PLACE | STATE) == 0;
        let is_inside = at.checked_add(len).is_some_and(|end| end <= self.length);
        match is_known && is_inside && !self.regions.meets(at, len) {
            true => Ok(at),
            false => Err(Errno::IO),
        }
    }

    /// Returns a block's state in the table, or an error if the entry is invalid.
    pub(crate) async fn find(&self, block: u64) -> Result<BlockState, Errno> {
        let entry = self.entry(block + block / self.ratio).await?;
        let size = u64::from(self.metadata.block);
        // The last one reaches beyond the disk, and need not be there as a whole.
        let used = self
            .metadata
            .size
            .saturating_sub(block.saturating_mul(size))
            .min(size);
        match entry & STATE {
            NOT_PRESENT => Ok(BlockState::Missing),
            // An undefined block may read as anything but another guest's data.
            UNDEFINED | ZERO | UNMAPPED | UNMAPPED_EARLY => Ok(BlockState::Zeroes),
            FULLY_PRESENT => Ok(BlockState::At(self.place(entry, used)?)),
            PARTIALLY_PRESENT if self.metadata.locator.is_some() => {
                Ok(BlockState::Partly(self.place(entry, used)?))
            }
            _ => Err(Errno::IO),
        }
    }

    /// The runs of a part of a block that is partly allocated: the bytes of each, and whether the image holds them.
    pub(crate) async fn runs(
        &self,
        block: u64,
        within: u64,
        len: u64,
    ) -> Result<Vec<(u64, bool)>, Errno> {
        let (chunk, number) = (block / self.ratio, block % self.ratio);
        let entry = self.entry((chunk + 1) * self.ratio + chunk).await?;
        if entry & STATE != BITMAP_PRESENT {
            return Err(Errno::IO);
        }
        let bitmap = self.place(entry, BITMAP)?;
        let sector = u64::from(self.metadata.logical);
        let first = number * u64::from(self.metadata.block) / sector;
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let mut held: Option<(u64, Rc<CachedTable>)> = None;
        for (sector, _, _, count) in pieces(within, len, sector) {
            let (byte, bit) = ((first + sector) / 8, (first + sector) % 8);
            let at = bitmap + byte / SLICE * SLICE;
            let slice = match &held {
                Some((begin, slice)) if *begin == at => slice.clone(),
                _ => self.slice(at).await?,
            };
            // CAST: inside of a slice.
            let place = (byte % SLICE) as usize;
            let is_own =
                slice.see(|bytes| bytes.get(place).is_some_and(|byte| byte >> bit & 1 == 1));
            held = Some((at, slice));
            match runs.last_mut() {
                Some((len, last)) if *last == is_own => *len += count,
                _ => runs.push((count, is_own)),
            }
        }
        Ok(runs)
    }
}
