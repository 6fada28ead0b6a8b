// SPDX-License-Identifier: MIT OR Apache-2.0
//! Space in front of the blocks: blktap's programs refuse a VHD whose table or names of the parent lie behind one.

use super::batmap::Batmap;
use super::block_alloc::PAGE;
use super::blocks::{self, BlockTable, Item, UNUSED};
use super::footer::{self, Footer};
use super::header::VhdHeader;
use crate::field::failed;
use crate::storage;
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// Returns the first byte behind the header, the table and the batmap.
///
/// # Errors
/// The image cannot be read.
pub(crate) async fn tables_end(
    storage: &impl Storage,
    footer: &Footer,
    header: &VhdHeader,
) -> Result<u64, Failure> {
    let (_, batmap) = tables(storage, footer, header).await?;
    let ends = batmap.iter().flat_map(Batmap::items).map(|(_, end, _)| end);
    Ok(ends
        .fold(header.table_end(), u64::max)
        .next_multiple_of(footer::LEN as u64))
}

async fn tables(
    storage: &impl Storage,
    footer: &Footer,
    header: &VhdHeader,
) -> Result<(BlockTable, Option<Batmap>), Failure> {
    let blocks = BlockTable::read(storage, header, footer.size).await;
    let blocks = blocks.map_err(failed("cannot read the VHD's table"))?;
    let length = storage
        .size()
        .map_err(failed("cannot see the image's size"))?;
    let batmap = Batmap::read(storage, footer, header, &blocks, length).await?;
    Ok((blocks, batmap))
}

/// Moves all blocks that begin before the byte `end` behind all others, and the footer at the image's end behind `end`.
/// The image must not be in use. Whenever this ends, the image is whole and has the same content.
///
/// # Errors
/// The image is damaged, or has no room on its device.
pub(crate) async fn clear(
    storage: &impl Storage,
    footer: &Footer,
    header: &VhdHeader,
    end: u64,
) -> Result<(), Failure> {
    let (blocks, batmap) = tables(storage, footer, header).await?;
    let length = storage
        .size()
        .map_err(failed("cannot see the image's size"))?;
    let (bitmap, len) = (header.bitmap(), header.bitmap() + u64::from(header.block));
    let in_front: Vec<(u32, u64)> = blocks
        .items(len)
        .filter_map(|(at, _, block)| block.filter(|_| at < end).map(|block| (block, at)))
        .collect();
    if in_front.is_empty() {
        // Even so the footer at the end may be in the way.
        let room = make_room(storage, footer, end).await;
        return room.map_err(failed("cannot make the VHD longer"));
    }
    let mut items: Vec<Item> = blocks.items(len).collect();
    items.extend(header.items(footer));
    items.extend(batmap.iter().flat_map(Batmap::items));
    // Nothing overlaps, so there are few.
    let (last, _) = blocks::check(items, len, length)?;
    // Its data is aligned, as that of blocks that the driver makes.
    let place = |at: u64| at.saturating_add(bitmap).next_multiple_of(PAGE) - bitmap;
    let mut places = Vec::new();
    let mut at = last.max(end);
    for (block, from) in in_front {
        let to = place(at);
        at = to.saturating_add(len);
        places.push((block, from, to));
    }
    let work = async {
        make_room(storage, footer, at).await?;
        for (_, from, to) in &places {
            copy(storage, *from, *to, len).await?;
        }
        storage.flush().await?;
        for (block, _, to) in &places {
            let sector = u32::try_from(to / 512).ok();
            let sector = sector.filter(|sector| *sector != UNUSED);
            let sector = sector.ok_or(Errno::FBIG)?;
            blocks.set(storage, *block, sector).await?;
        }
        storage.flush().await
    };
    let moved: Result<(), Errno> = work.await;
    moved.map_err(failed("cannot move the first blocks of the VHD"))
}

/// Makes the image long enough for anything up to `end`, with a footer behind that before the old one is overwritten.
async fn make_room(storage: &impl Storage, footer: &Footer, end: u64) -> Result<(), Errno> {
    let (length, len) = (storage.size()?, footer::LEN as u64);
    let needed = end.checked_add(len).ok_or(Errno::FBIG)?;
    if storage.is_fixed() {
        return match needed <= length {
            true => Ok(()),
            false => Err(Errno::NOSPC),
        };
    }
    if needed <= length {
        return Ok(());
    }
    let new = needed.checked_next_multiple_of(PAGE);
    let at = new.ok_or(Errno::FBIG)? - len;
    storage.write(at, Bytes::copied(footer.bytes())?).await?;
    storage.flush().await
}

async fn copy(storage: &impl Storage, from: u64, to: u64, len: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let count = (len - done).min(PIECE);
        // CAST: at most a piece.
        let bytes = storage::bytes(storage, from + done, count as usize).await?;
        storage.write(to + done, Bytes::copied(&bytes)?).await?;
        done += count;
    }
    Ok(())
}
