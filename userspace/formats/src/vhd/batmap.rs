// SPDX-License-Identifier: MIT OR Apache-2.0
//! The batmap of tapdisk: which blocks have all bits of their bitmap set. Tapdisk brings it up to date
//! when it closes an image, and so do we. A bit that is missing costs a look at a bitmap; one that should
//! not be there would show zeroes instead of the parent, so a block of a differencing disk that has its
//! bit is never given up.

use super::blocks::{BlockTable, Item};
use super::footer::{checksum, Footer};
use super::header::{VhdHeader, BLOCK};
use crate::field::{be32, be64, failed, put, refused};
use crate::storage;
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};

/// Bytes of its header, with the padding.
pub(crate) const HEADER: usize = 512;
const COOKIE: &[u8; 8] = b"tdbatmap";
const VERSION: u32 = 0x0001_0002;
/// Versions whose checksum adds signed bytes.
const SIGNED: u32 = 0x0001_0001;
const CHECKSUM: usize = 24;
/// Offset of the field about encryption.
const KEYHASH: usize = 29;

/// A batmap in an image.
#[derive(Debug)]
pub(crate) struct Batmap {
    header: Vec<u8>,
    /// Offsets of the header and of the map, in bytes.
    at: u64,
    map: u64,
    /// Bytes of the map.
    len: usize,
    /// Bytes that its sum is about.
    summed: usize,
}

/// Bytes of a map of `blocks`, whole sectors.
pub(crate) fn map_len(blocks: u32) -> u64 {
    u64::from(blocks).div_ceil(8).max(1).next_multiple_of(512)
}

impl Batmap {
    /// Finds the batmap of an image that has one, and passes its content to `blocks`. A batmap with a wrong checksum is
    /// ignored: a tapdisk may have died during its write.
    pub(crate) async fn read(
        storage: &impl Storage,
        footer: &Footer,
        header: &VhdHeader,
        blocks: &BlockTable,
        length: u64,
    ) -> Result<Option<Self>, Failure> {
        if !footer.may_have_batmap() || header.block != BLOCK {
            return Ok(None);
        }
        let at = header.table_end();
        let reading = failed("cannot read the VHD's batmap");
        let bytes = storage::bytes(storage, at, HEADER).await.map_err(reading)?;
        if bytes[..8] != *COOKIE || be32(&bytes, 20) > VERSION {
            return Ok(None);
        }
        if bytes[KEYHASH] == 1 {
            return Err(refused(
                "the VHD is encrypted by XenServer's key (XTS-AES), which cannot be served: decrypt it with vhd-util copy",
            ));
        }
        // tapdisk's checksum covers this many bytes, whatever the size of the map.
        let summed = map_len(u32::try_from(footer.size / u64::from(BLOCK)).unwrap_or(u32::MAX));
        let (map, len) = (be64(&bytes, 8), u64::from(be32(&bytes, 16)) * 512);
        let end = map.checked_add(len);
        let fits =
            map % 512 == 0 && map >= at + HEADER as u64 && end.is_some_and(|end| end <= length);
        if !fits || len < summed || len > map_len(header.blocks) {
            return Ok(None);
        }
        let batmap = Self {
            header: bytes,
            at,
            map,
            // CAST: a bit for each of at most 2^22 blocks.
            len: len as usize,
            summed: summed as usize,
        };
        batmap.tell(storage, blocks).await?;
        Ok(Some(batmap))
    }

    async fn tell(&self, storage: &impl Storage, blocks: &BlockTable) -> Result<(), Failure> {
        let reading = failed("cannot read the VHD's batmap");
        let bytes = storage::bytes(storage, self.map, self.len)
            .await
            .map_err(reading)?;
        if self.sum(&bytes) != be32(&self.header, CHECKSUM) {
            return Ok(());
        }
        let known = blocks
            .count()
            .min(u32::try_from(self.summed * 8).unwrap_or(u32::MAX));
        for block in 0..known {
            let byte = bytes.get(block as usize / 8).copied().unwrap_or(0);
            if byte << (block % 8) & 0x80 != 0 && blocks.place(block).is_some() {
                blocks.set_full(block, true);
            }
        }
        Ok(())
    }

    fn sum(&self, bytes: &[u8]) -> u32 {
        let summed = &bytes[..self.summed.min(bytes.len())];
        if be32(&self.header, 20) != SIGNED {
            return checksum(summed, usize::MAX);
        }
        // CAST: the sum of bytes with a sign, as that version has it.
        !summed
            .iter()
            .fold(0_u32, |sum, byte| sum.wrapping_add(*byte as i8 as u32))
    }

    /// Returns its byte ranges in the image.
    pub(crate) fn items(&self) -> [Item; 2] {
        let header = (self.at, self.at.saturating_add(HEADER as u64), None);
        [
            header,
            (self.map, self.map.saturating_add(self.len as u64), None),
        ]
    }

    /// Writes what `blocks` knows.
    pub(crate) async fn write(
        &self,
        storage: &impl Storage,
        blocks: &BlockTable,
    ) -> Result<(), Errno> {
        let mut bytes = vec![0_u8; self.len];
        for block in (0..blocks.count()).filter(|block| blocks.is_full(*block)) {
            if let Some(byte) = bytes.get_mut(block as usize / 8) {
                *byte |= 0x80 >> (block % 8);
            }
        }
        let mut header = self.header.clone();
        put(&mut header, CHECKSUM, &self.sum(&bytes).to_be_bytes());
        if self.map == self.at + HEADER as u64 {
            header.extend(bytes);
            return storage.write(self.at, Bytes::copied(&header)?).await;
        }
        storage.write(self.map, Bytes::copied(&bytes)?).await?;
        storage.write(self.at, Bytes::copied(&header)?).await
    }
}

/// An empty one at `at`: the header, and the map behind it.
pub(crate) fn empty(at: u64, blocks: u32) -> Vec<u8> {
    let len = map_len(blocks);
    let mut bytes = vec![0; HEADER];
    put(&mut bytes, 0, COOKIE);
    put(
        &mut bytes,
        8,
        &at.saturating_add(HEADER as u64).to_be_bytes(),
    );
    // CAST: a bit for each of at most 2^22 blocks.
    put(&mut bytes, 16, &((len / 512) as u32).to_be_bytes());
    put(&mut bytes, 20, &VERSION.to_be_bytes());
    put(&mut bytes, CHECKSUM, &u32::MAX.to_be_bytes());
    bytes.resize(HEADER + len as usize, 0);
    bytes
}
