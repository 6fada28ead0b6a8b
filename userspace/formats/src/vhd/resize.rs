// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VHD becomes larger. After each step it is a whole image, of the old size or of the new one.

use super::batmap;
use super::footer::{self, Footer, VhdKind};
use super::header::{table_len, VhdHeader, MOST_BLOCKS};
use super::image::VhdImage;
use super::MOST;
use crate::field::{failed, put};
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
                move_table(storage, &footer, header, count)
                    .await
                    .map_err(failed)?;
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

/// Puts a copy of the table that has `count` entries behind everything else.
async fn move_table(
    storage: &impl Storage,
    footer: &Footer,
    mut header: VhdHeader,
    count: u32,
) -> Result<(), Errno> {
    if storage.is_fixed() {
        // There is no end to put it behind.
        return Err(Errno::NOSPC);
    }
    // CAST: a table of at most 2^22 blocks.
    let old = storage::bytes(storage, header.table, table_len(header.blocks) as usize).await?;
    let mut bytes = super::create::empty_table(count);
    put(&mut bytes, 0, &old[..header.blocks as usize * 4]);
    let at = storage.size()?.next_multiple_of(4096);
    let map = at + bytes.len() as u64;
    bytes.extend(batmap::empty(map, count));
    bytes.extend(footer.bytes());
    storage.write(at, Bytes::copied(&bytes)?).await?;
    storage.flush().await?;
    header.place_table(at, count);
    storage
        .write(footer.header, Bytes::copied(header.bytes())?)
        .await?;
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
