// SPDX-License-Identifier: MIT OR Apache-2.0
//! The header of a VHD whose blocks are allocated on the first write.

use super::blocks::Item;
use super::footer::{self, checksum, timestamp, Footer, VhdKind};
use super::locator;
use crate::field::{array, be32, be64, put, refused, round_up};
use control::Failure;
use std::time::SystemTime;

/// Bytes of a header.
pub(crate) const LEN: usize = 1024;
const COOKIE: &[u8; 8] = b"cxsparse";
const VERSION: u32 = 0x0001_0000;
const CHECKSUM: usize = 36;
/// Offset of the first locator, bytes of a locator, and number of locators.
const LOCATORS: (usize, usize, usize) = (576, 24, 8);
/// Bytes of the parent's name.
const NAME: (usize, usize) = (64, 512);
/// Bytes of a block that everybody uses, and that are accepted.
pub(crate) const BLOCK: u32 = 2 << 20;
const BLOCKS: std::ops::RangeInclusive<u32> = 64 << 10..=256 << 20;
/// Blocks that a table may have: 16 MiB of it are kept in memory.
pub(crate) const MOST_BLOCKS: u32 = 4 << 20;
/// Bytes that a path may have, and its room.
const PATH: u32 = 8192;
const ROOM: u64 = 64 << 10;
/// Largest offset of anything: larger files cannot be.
const LAST: u64 = 1 << 62;

/// Header with the places of all other structures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VhdHeader {
    bytes: Vec<u8>,
    /// Offset of the table of blocks, in bytes.
    pub(crate) table: u64,
    /// Blocks that it has an entry for.
    pub(crate) blocks: u32,
    /// Bytes of a block.
    pub(crate) block: u32,
    /// Locators of the parent's paths.
    pub(crate) locators: Vec<Locator>,
}

/// Place of a path of the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Locator {
    pub(crate) code: u32,
    /// Bytes of the room it has.
    pub(crate) room: u64,
    /// Bytes of the path.
    pub(crate) len: u32,
    pub(crate) at: u64,
}

/// Room of a name of the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NameRoom {
    /// Number of the locator.
    pub(crate) number: usize,
    /// Offset and length in bytes.
    pub(crate) at: u64,
    pub(crate) len: u64,
}

impl NameRoom {
    /// The first byte behind it.
    pub(crate) fn end(&self) -> u64 {
        self.at.saturating_add(self.len)
    }
}

impl VhdHeader {
    /// Parses and checks the header of an image of `length` bytes.
    pub(crate) fn parse(bytes: Vec<u8>, footer: &Footer, length: u64) -> Result<Self, Failure> {
        if bytes.len() != LEN || bytes[..8] != *COOKIE {
            return Err(refused(format!(
                "there is no header at byte {}, where the VHD's footer says it is",
                footer.header
            )));
        }
        if be32(&bytes, CHECKSUM) != checksum(&bytes, CHECKSUM) {
            return Err(refused(
                "the checksum of the VHD's header is wrong: it is damaged",
            ));
        }
        if be32(&bytes, 24) != VERSION {
            return Err(refused(
                "the VHD's header has a version that this program does not support",
            ));
        }
        let (table, blocks, block) = (be64(&bytes, 16), be32(&bytes, 28), be32(&bytes, 32));
        if !block.is_power_of_two() || !BLOCKS.contains(&block) {
            return Err(refused(format!(
                "the VHD has blocks of {block} bytes: powers of two from 64 KiB to 256 MiB can be served; convert it"
            )));
        }
        if u64::from(blocks) * u64::from(block) < footer.size || blocks > MOST_BLOCKS {
            return Err(refused(format!(
                "the VHD's table has {blocks} entries for blocks of {block} bytes, which does not go with a disk of {}",
                footer.size
            )));
        }
        let end = table.checked_add(table_len(blocks));
        let begin = footer.header.saturating_add(LEN as u64);
        if table % 512 != 0 || table < begin || end.is_none_or(|end| end > length) {
            return Err(refused(format!(
                "the VHD's table of {blocks} blocks cannot be at byte {table} of {length}"
            )));
        }
        let locators = match footer.kind {
            VhdKind::Differencing => locators(&bytes, length)?,
            _ => Vec::new(),
        };
        Ok(Self {
            bytes,
            table,
            blocks,
            block,
            locators,
        })
    }

    /// A new one.
    pub(crate) fn new(table: u64, blocks: u32) -> Self {
        let mut bytes = vec![0; LEN];
        put(&mut bytes, 0, COOKIE);
        put(&mut bytes, 8, &u64::MAX.to_be_bytes());
        put(&mut bytes, 24, &VERSION.to_be_bytes());
        put(&mut bytes, 32, &BLOCK.to_be_bytes());
        let mut header = Self {
            bytes,
            table,
            blocks,
            block: BLOCK,
            locators: Vec::new(),
        };
        header.place_table(table, blocks);
        header
    }

    /// Says where the table is.
    pub(crate) fn place_table(&mut self, table: u64, blocks: u32) {
        (self.table, self.blocks) = (table, blocks);
        put(&mut self.bytes, 16, &table.to_be_bytes());
        put(&mut self.bytes, 28, &blocks.to_be_bytes());
        self.seal();
    }

    /// Replaces the parent: its identity, its file name, and the places of its paths.
    pub(crate) fn set_parent(&mut self, id: [u8; 16], path: &str, locators: Vec<Locator>) {
        put(&mut self.bytes, 40, &id);
        let time = timestamp(SystemTime::now());
        put(&mut self.bytes, 56, &time.to_be_bytes());
        let mut name = locator::encode_name(path);
        name.resize(NAME.1, 0);
        put(&mut self.bytes, NAME.0, &name);
        let (begin, len, most) = LOCATORS;
        put(&mut self.bytes, begin, &vec![0; len * most]);
        for (number, locator) in locators.iter().take(most).enumerate() {
            let at = begin + number * len;
            // Bytes and not sectors, as Windows and tapdisk have it.
            let room = u32::try_from(locator.room).unwrap_or(u32::MAX);
            put(&mut self.bytes, at, &locator.code.to_be_bytes());
            put(&mut self.bytes, at + 4, &room.to_be_bytes());
            put(&mut self.bytes, at + 8, &locator.len.to_be_bytes());
            put(&mut self.bytes, at + 16, &locator.at.to_be_bytes());
        }
        self.locators = locators;
        self.seal();
    }

    fn seal(&mut self) {
        let sum = checksum(&self.bytes, CHECKSUM);
        put(&mut self.bytes, CHECKSUM, &sum.to_be_bytes());
    }

    /// As it is in the image.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the identity of the parent; zeroes for a raw one.
    pub(crate) fn parent_id(&self) -> [u8; 16] {
        array(&self.bytes, 40)
    }

    /// The parent's name in the header.
    pub(crate) fn parent_name(&self) -> Option<String> {
        let (at, len) = NAME;
        locator::decode_name(self.bytes.get(at..at + len)?)
    }

    /// Bytes of the bitmap before each block.
    pub(crate) fn bitmap(&self) -> u64 {
        u64::from(self.block / 512)
            .div_ceil(8)
            .next_multiple_of(512)
    }

    /// Returns the byte ranges of everything in the image but its blocks.
    pub(crate) fn items(&self, footer: &Footer) -> Vec<Item> {
        let paths = self.locators.iter().filter(|locator| locator.len > 0);
        let item = |at: u64, len: u64| (at, at.saturating_add(len), None);
        let mut items: Vec<Item> = paths
            .map(|path| item(path.at, u64::from(path.len)))
            .collect();
        items.push(item(0, footer::LEN as u64));
        items.push(item(footer.header, LEN as u64));
        items.push(item(self.table, table_len(self.blocks)));
        items
    }

    /// Returns the rooms of all names of the parent, also of those that are not read here.
    ///
    /// # Errors
    /// A room is larger than any name, or behind the end of any file.
    pub(crate) fn names(&self) -> Result<Vec<NameRoom>, Failure> {
        let (begin, len, most) = LOCATORS;
        let mut found = Vec::new();
        for number in 0..most {
            let at = begin + number * len;
            let (code, space) = (be32(&self.bytes, at), be32(&self.bytes, at + 4));
            let used = u64::from(be32(&self.bytes, at + 8));
            if code == 0 || used == 0 {
                continue;
            }
            let len = room(space).max(used).next_multiple_of(512);
            let at = be64(&self.bytes, at + 16);
            if len > ROOM || at > LAST {
                return Err(refused(format!(
                    "the VHD's locator {number} of its parent has a room of {len} bytes at {at}, which cannot be: convert it"
                )));
            }
            found.push(NameRoom { number, at, len });
        }
        Ok(found)
    }

    /// Says where the names of the parent are, each by its number.
    pub(crate) fn place_names(&mut self, places: &[(usize, u64)]) {
        let (begin, len, _) = LOCATORS;
        for (number, place) in places {
            let at = begin + number * len + 16;
            let old = be64(&self.bytes, at);
            put(&mut self.bytes, at, &place.to_be_bytes());
            let its = self.locators.iter_mut();
            its.filter(|locator| locator.at == old)
                .for_each(|locator| locator.at = *place);
        }
        self.seal();
    }

    /// The first byte behind the table.
    pub(crate) fn table_end(&self) -> u64 {
        self.table.saturating_add(table_len(self.blocks))
    }
}

/// Bytes of a table, whole sectors.
pub(crate) fn table_len(blocks: u32) -> u64 {
    (u64::from(blocks) * 4).next_multiple_of(512)
}

/// Returns the bytes of a name's room. The specification counts sectors here, and programs that write images count bytes.
fn room(space: u32) -> u64 {
    match space {
        0..512 => u64::from(space) * 512,
        space => round_up(u64::from(space), 512).unwrap_or(u64::MAX),
    }
}

fn locators(bytes: &[u8], length: u64) -> Result<Vec<Locator>, Failure> {
    let (begin, len, most) = LOCATORS;
    let mut found = Vec::new();
    for number in 0..most {
        let at = begin + number * len;
        let (code, space) = (be32(bytes, at), be32(bytes, at + 4));
        if code == 0 || locator::OTHERS.contains(&code) {
            continue;
        }
        let room = room(space);
        let locator = Locator {
            code,
            room,
            len: be32(bytes, at + 8),
            at: be64(bytes, at + 16),
        };
        let end = locator.at.checked_add(u64::from(locator.len));
        let fits = locator.len <= PATH && u64::from(locator.len) <= room;
        if !fits || end.is_none_or(|end| end > length) {
            return Err(refused(format!(
                "the VHD's locator {number} of its parent cannot have {} bytes at {}",
                locator.len, locator.at
            )));
        }
        found.push(locator);
    }
    Ok(found)
}
