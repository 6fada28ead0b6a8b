// SPDX-License-Identifier: MIT OR Apache-2.0
//! Places of the blocks of a VHD: its table in memory, and the blocks whose bitmap need not be read.

use super::header::{table_len, VhdHeader};
use crate::field::{be32, put, refused};
use crate::storage;
use crate::tables::CachedTable;
use crate::Storage;
use control::Failure;
use diskio::Errno;
use std::cell::RefCell;
use std::rc::Rc;

/// The entry of a block that does not exist.
pub(crate) const UNUSED: u32 = u32::MAX;
/// Bytes of the table that are looked after together, and the entries in them.
const CHUNK: usize = 4096;
const ENTRIES: usize = CHUNK / 4;

/// The table.
#[derive(Debug)]
pub(crate) struct BlockTable {
    chunks: Vec<Rc<CachedTable>>,
    count: u32,
    /// The first block behind the end of the disk, as that was when the table was read. Entries from there on may be 0
    /// instead of unused.
    behind: u32,
    /// A bit for each block whose bitmap has all bits set.
    full: RefCell<Vec<u64>>,
}

impl BlockTable {
    /// Reads that of a disk of `size` bytes.
    pub(crate) async fn read(
        storage: &impl Storage,
        header: &VhdHeader,
        size: u64,
    ) -> Result<Self, Errno> {
        let len = table_len(header.blocks);
        let mut chunks = Vec::new();
        let mut at = 0;
        while at < len {
            // CAST: at most a chunk.
            let count = (len - at).min(CHUNK as u64) as usize;
            let bytes = storage::bytes(storage, header.table + at, count).await?;
            chunks.push(CachedTable::with(header.table + at, bytes));
            at += count as u64;
        }
        Ok(Self {
            chunks,
            count: header.blocks,
            behind: first_behind(header, size),
            full: RefCell::new(vec![0; header.blocks.div_ceil(64) as usize]),
        })
    }

    fn chunk(&self, block: u32) -> Option<(&CachedTable, usize)> {
        let block = block as usize;
        let chunk = self.chunks.get(block / ENTRIES)?;
        Some((chunk, block % ENTRIES * 4))
    }

    /// Returns the offset of the bitmap of `block` in bytes, if the block exists.
    pub(crate) fn place(&self, block: u32) -> Option<u64> {
        let (chunk, at) = self.chunk(block)?;
        match chunk.see(|bytes| be32(bytes, at)) {
            UNUSED => None,
            0 if block >= self.behind => None,
            sector => Some(u64::from(sector) * 512),
        }
    }

    /// Lets the table point to a block that is in the image, or to none.
    pub(crate) async fn set(
        &self,
        storage: &impl Storage,
        block: u32,
        sector: u32,
    ) -> Result<(), Errno> {
        let (chunk, at) = self.chunk(block).ok_or(Errno::INVAL)?;
        let edit = |bytes: &mut [u8]| put(bytes, at, &sector.to_be_bytes());
        chunk.change(storage, edit).await
    }

    /// The image says of `block` what [`place`](Self::place) does, whatever failed.
    pub(crate) fn is_settled(&self, block: u32) -> bool {
        self.chunk(block)
            .is_some_and(|(chunk, _)| chunk.is_settled())
    }

    /// Has the image say so, after a change that failed.
    pub(crate) async fn settle(&self, storage: &impl Storage, block: u32) -> Result<(), Errno> {
        match self.chunk(block) {
            Some((chunk, _)) if !chunk.is_settled() => chunk.change(storage, |_| ()).await,
            _ => Ok(()),
        }
    }

    pub(crate) fn is_full(&self, block: u32) -> bool {
        let full = self.full.borrow();
        let word = full.get(block as usize / 64);
        word.is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    pub(crate) fn set_full(&self, block: u32, is_full: bool) {
        let mut full = self.full.borrow_mut();
        if let Some(word) = full.get_mut(block as usize / 64) {
            *word = *word & !(1 << (block % 64)) | u64::from(is_full) << (block % 64);
        }
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Returns the byte ranges of existing blocks, each of which has `len` bytes with its bitmap.
    pub(crate) fn items(&self, len: u64) -> impl Iterator<Item = Item> + '_ {
        (0..self.count).filter_map(move |block| {
            let at = self.place(block)?;
            Some((at, at.saturating_add(len), Some(block)))
        })
    }
}

/// The first block that a disk of `size` bytes does not have.
fn first_behind(header: &VhdHeader, size: u64) -> u32 {
    u32::try_from(size.div_ceil(u64::from(header.block))).unwrap_or(u32::MAX)
}

/// Makes entries unused that are 0 and behind the end of a disk of `size` bytes, before that becomes larger.
pub(crate) async fn clean(
    storage: &impl Storage,
    header: &VhdHeader,
    size: u64,
) -> Result<(), Errno> {
    let blocks = BlockTable::read(storage, header, size).await?;
    for block in blocks.behind..blocks.count {
        let word = blocks
            .chunk(block)
            .map(|(chunk, at)| chunk.see(|bytes| be32(bytes, at)));
        if word == Some(0) {
            blocks.set(storage, block, UNUSED).await?;
        }
    }
    storage.flush().await
}

/// Something in the image: where it begins and ends, and the number of the block if it is one.
pub(crate) type Item = (u64, u64, Option<u32>);

/// Returns the end of the last item, and the gaps of at least `len` bytes between the items. It refuses items that
/// overlap, or that reach behind the end of the image.
pub(crate) fn check(
    mut items: Vec<Item>,
    len: u64,
    length: u64,
) -> Result<(u64, Vec<(u64, u64)>), Failure> {
    items.sort_unstable();
    let mut last = 0;
    let mut gaps = Vec::new();
    for (begin, end, block) in items {
        let name = block.map_or("a header or table".into(), |block| format!("block {block}"));
        if begin < last {
            return Err(refused(format!(
                "{name} of the VHD is at byte {begin}, where something else is that ends at {last}: its table is damaged"
            )));
        }
        if end > length || end < begin {
            return Err(refused(format!(
                "{name} of the VHD is at byte {begin} and the image ends at {length}: it is cut off"
            )));
        }
        if begin - last >= len {
            gaps.push((last, begin));
        }
        last = end;
    }
    Ok((last, gaps))
}

#[cfg(test)]
mod tests {
    use super::{check, Item};

    fn blocks(places: &[u64]) -> Vec<Item> {
        let header = std::iter::once((0, 80, None));
        let blocks = (0..).zip(places);
        header
            .chain(blocks.map(|(number, at)| (*at, at.saturating_add(10), Some(number))))
            .collect()
    }

    #[test]
    fn blocks_that_overlap_or_are_outside_are_refused() {
        let fine = check(blocks(&[130, 140, 100]), 10, 150).unwrap();
        assert_eq!(fine, (150, vec![(80, 100), (110, 130)]));
        for wrong in [&[79][..], &[0], &[100, 109], &[100, 100], &[141]] {
            assert!(check(blocks(wrong), 10, 150).is_err(), "{wrong:?}");
        }
        assert!(check(vec![(u64::MAX, u64::MAX - 1, Some(0))], 10, u64::MAX).is_err());
    }
}
