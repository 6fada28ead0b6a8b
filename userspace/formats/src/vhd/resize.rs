// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VHD becomes larger. After each step it is a whole image, of the old size or of the new one.

use super::batmap;
use super::footer::{self, Footer, VhdKind};
use super::front;
use super::header::{table_len, NameRoom, VhdHeader, MOST_BLOCKS};
use super::image::VhdImage;
use super::MOST;
use crate::field::failed;
use crate::storage;
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};

/// Makes the disk in `storage` one of `size` bytes. The image must not be in use, unless its table has room
/// ([`reserve`](super::VhdCreate::reserve)): then the program that serves it must read the metadata again.
pub async fn grow(storage: &impl Storage, size: u64) -> Result<(), Failure> {
    let VhdImage { footer, header } = VhdImage::read(storage).await?;
    if size < footer.size || size % 512 != 0 {
        return Err(Failure::invalid(format!(
            "the VHD's disk has {} bytes and cannot become one of {size}: it can grow by whole sectors only",
            footer.size
        )));
    }
    if size > MOST {
        return Err(Failure::invalid(format!(
            "a VHD has at most 2040 GiB, and {size} bytes are more: convert it to another format, such as qcow2"
        )));
    }
    let failed = |error| failed("cannot change the size of the VHD")(error);
    match header {
        None => fixed(storage, footer, size).await.map_err(failed),
        Some(header) => {
            let count = size.div_ceil(u64::from(header.block));
            let count = u32::try_from(count).map_err(|_| failed(Errno::FBIG))?;
            if count > MOST_BLOCKS {
                return Err(Failure::invalid(format!(
                    "with blocks of {} bytes the VHD's table would be too large for {size} bytes: convert it",
                    header.block
                )));
            }
            super::blocks::clean(storage, &header, footer.size)
                .await
                .map_err(failed)?;
            if count > header.blocks {
                extend_table(storage, &footer, header, count).await?;
            }
            say(storage, footer, size).await.map_err(failed)
        }
    }
}

async fn fixed(storage: &impl Storage, mut footer: Footer, size: u64) -> Result<(), Errno> {
    let old = footer.size;
    if storage.is_fixed() {
        if storage.size()? < size.saturating_add(footer::LEN as u64) {
            return Err(Errno::NOSPC);
        }
    } else {
        // A footer at the new end, which still says the old size, and then none at the old one.
        storage.write(size, Bytes::copied(footer.bytes())?).await?;
        storage.flush().await?;
    }
    storage.write_zeroes(old, size - old).await?;
    storage.flush().await?;
    footer.resize(size);
    put_footers(storage, &footer).await
}

/// Gives the table `count` entries where it is, with a new batmap behind it. The names of the parent and the first blocks
/// go out of its way before: all metadata stay in front of the blocks, where blktap's programs want them.
async fn extend_table(
    storage: &impl Storage,
    footer: &Footer,
    mut header: VhdHeader,
    count: u32,
) -> Result<(), Failure> {
    let map = header.table.saturating_add(table_len(count));
    let behind = map
        .saturating_add(batmap::HEADER as u64)
        .saturating_add(batmap::map_len(count));
    let names = header.names()?;
    let (mut end, mut places) = (behind, Vec::new());
    if names.iter().any(|name| name.at < behind) {
        // Behind their old places, which must keep them until the header leads to the new ones.
        let old = names.iter().map(NameRoom::end);
        end = old.fold(behind, u64::max).next_multiple_of(512);
        for name in names {
            places.push((name, end));
            end = end.saturating_add(name.len);
        }
    }
    front::clear(storage, footer, &header, end).await?;
    let work = async {
        move_names(storage, footer, &mut header, &places).await?;
        // The first entry that the table does not have yet.
        let at = header.table + u64::from(header.blocks) * 4;
        let mut bytes = super::create::empty_table(count);
        bytes.drain(..header.blocks as usize * 4);
        bytes.extend(batmap::empty(map, count));
        storage.write(at, Bytes::copied(&bytes)?).await?;
        storage.flush().await?;
        header.place_table(header.table, count);
        put_header(storage, footer, &header).await
    };
    let done: Result<(), Errno> = work.await;
    done.map_err(failed("cannot make the VHD's table larger"))
}

/// Copies the names of the parent to new places, and has the header lead there.
async fn move_names(
    storage: &impl Storage,
    footer: &Footer,
    header: &mut VhdHeader,
    places: &[(NameRoom, u64)],
) -> Result<(), Errno> {
    if places.is_empty() {
        return Ok(());
    }
    for (name, to) in places {
        // CAST: a room is small.
        let bytes = storage::bytes(storage, name.at, name.len as usize).await?;
        storage.write(*to, Bytes::copied(&bytes)?).await?;
    }
    storage.flush().await?;
    let places: Vec<(usize, u64)> = places.iter().map(|(name, to)| (name.number, *to)).collect();
    header.place_names(&places);
    put_header(storage, footer, header).await
}

async fn put_header(
    storage: &impl Storage,
    footer: &Footer,
    header: &VhdHeader,
) -> Result<(), Errno> {
    let bytes = Bytes::copied(header.bytes())?;
    storage.write(footer.header, bytes).await?;
    storage.flush().await
}

/// Changes the size in both footers.
async fn say(storage: &impl Storage, mut footer: Footer, size: u64) -> Result<(), Errno> {
    footer.resize(size);
    put_footers(storage, &footer).await
}

/// Puts a footer into both places, that at the beginning last: it counts. The beginning of a fixed VHD belongs to the
/// guest.
pub(super) async fn put_footers(storage: &impl Storage, footer: &Footer) -> Result<(), Errno> {
    let last = storage.size()?.saturating_sub(footer::LEN as u64);
    storage.write(last, Bytes::copied(footer.bytes())?).await?;
    storage.flush().await?;
    if footer.kind == VhdKind::Fixed {
        return Ok(());
    }
    storage.write(0, Bytes::copied(footer.bytes())?).await?;
    storage.flush().await
}
