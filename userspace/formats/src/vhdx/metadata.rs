// SPDX-License-Identifier: MIT OR Apache-2.0
//! The metadata of a VHDX's disk: the metadata table and its items.

use super::guid::Guid;
use crate::field::{failed, le16, le32, le64, refused};
use crate::{storage, Storage};
use control::Failure;
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of the table; items are behind it.
const TABLE: usize = 64 << 10;
const SIGNATURE: &[u8; 8] = b"metadata";
/// Bytes before the entries, of one of them, and how many there are at most.
const ENTRIES: (usize, usize, u16) = (32, 32, 2047);
/// Bytes of an item at most.
const ITEM: u32 = 1 << 20;
/// Flags of an entry: it is the user's, and a reader must know it to open the image.
const USER: u32 = 1;
const REQUIRED: u32 = 4;
/// Flag of the file parameters: it is a differencing one.
const HAS_PARENT: u32 = 2;
/// Bytes of blocks, and of the largest disk.
const BLOCKS: std::ops::RangeInclusive<u32> = 1 << 20..=256 << 20;
const MOST: u64 = 64 << 40;

/// The items that are known, as they are called in messages.
const PARAMETERS: (Guid, &str) = (
    Guid(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b),
    "file parameters",
);
const SIZE: (Guid, &str) = (
    Guid(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8),
    "virtual disk size",
);
/// Also called page 83 data, after where SCSI shows it.
const DISK_ID: (Guid, &str) = (
    Guid(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746),
    "virtual disk id",
);
const LOGICAL: (Guid, &str) = (
    Guid(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f),
    "logical sector size",
);
const PHYSICAL: (Guid, &str) = (
    Guid(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556),
    "physical sector size",
);
const LOCATOR: (Guid, &str) = (
    Guid(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c),
    "parent locator",
);
const KNOWN: [(Guid, &str); 6] = [PARAMETERS, SIZE, DISK_ID, LOGICAL, PHYSICAL, LOCATOR];

/// Metadata that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// Bytes of a block.
    pub(crate) block: u32,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes of a sector: 512 or 4096.
    pub(crate) logical: u32,
    pub(crate) physical: u32,
    /// Byte range of the parent locator in the image, if the image has a parent.
    pub(crate) locator: Option<Range<u64>>,
}

/// Items that were found: where they are in the image.
#[derive(Debug, Default)]
struct Items(BTreeMap<Guid, Range<u64>>);

impl Metadata {
    /// Reads and checks the metadata in `region`.
    ///
    /// # Errors
    /// Something is missing, cannot be, or must be known and is not.
    pub(crate) async fn read(storage: &impl Storage, region: &Range<u64>) -> Result<Self, Failure> {
        let table = bytes(storage, region.start, TABLE).await?;
        let items = Items::parse(&table, region)?;
        let parameters = items.value(storage, PARAMETERS, 8).await?;
        let (block, flags) = (le32(&parameters, 0), le32(&parameters, 4));
        let locator = match flags & HAS_PARENT {
            0 => None,
            _ => Some(items.place(LOCATOR)?),
        };
        items.value(storage, DISK_ID, 16).await?;
        let read = Self {
            block,
            size: le64(&items.value(storage, SIZE, 8).await?, 0),
            logical: le32(&items.value(storage, LOGICAL, 4).await?, 0),
            physical: le32(&items.value(storage, PHYSICAL, 4).await?, 0),
            locator,
        };
        read.check()
    }

    fn check(self) -> Result<Self, Failure> {
        if !self.block.is_power_of_two() || !BLOCKS.contains(&self.block) {
            return Err(refused(format!(
                "the VHDX has blocks of {} bytes, which must be a power of two from 1 MiB to 256 MiB: it is damaged",
                self.block
            )));
        }
        for (size, which) in [(self.logical, LOGICAL.1), (self.physical, PHYSICAL.1)] {
            if !matches!(size, 512 | 4096) {
                return Err(refused(format!(
                    "the {which} of the VHDX is {size}, and only 512 and 4096 can be: it is damaged"
                )));
            }
        }
        if self.size == 0 || self.size > MOST || self.size % u64::from(self.logical) != 0 {
            return Err(refused(format!(
                "the VHDX has a disk of {} bytes, which must be whole sectors of {}, one at least and 64 TiB at most",
                self.size, self.logical
            )));
        }
        Ok(self)
    }

    /// The bytes of the parent locator.
    pub(crate) async fn locator(&self, storage: &impl Storage) -> Result<Option<Vec<u8>>, Failure> {
        match &self.locator {
            // CAST: at most 1 MiB.
            Some(place) => {
                let len = (place.end - place.start) as usize;
                Ok(Some(bytes(storage, place.start, len).await?))
            }
            None => Ok(None),
        }
    }
}

impl Items {
    fn parse(table: &[u8], region: &Range<u64>) -> Result<Self, Failure> {
        let (begin, len, most) = ENTRIES;
        if table.get(..8) != Some(SIGNATURE) {
            return Err(refused(
                "there is no table where the VHDX's metadata should be: it is damaged",
            ));
        }
        let count = le16(table, 10);
        if count > most {
            return Err(refused(format!(
                "the VHDX's metadata table has {count} entries, and {most} is the most: it is damaged"
            )));
        }
        let mut items = Self::default();
        let entries = table.get(begin..).unwrap_or(&[]).chunks_exact(len);
        for entry in entries.take(usize::from(count)) {
            items.add(entry, region)?;
        }
        Ok(items)
    }

    fn add(&mut self, entry: &[u8], region: &Range<u64>) -> Result<(), Failure> {
        let (guid, flags) = (Guid::at(entry, 0), le32(entry, 24));
        let known = KNOWN
            .into_iter()
            .find(|(known, _)| *known == guid && flags & USER == 0);
        let Some((_, name)) = known else {
            if flags & REQUIRED != 0 {
                return Err(refused(format!(
                    "the VHDX requires its metadata item {guid}, which this program does not support: convert it with the program that made it"
                )));
            }
            return Ok(());
        };
        let (at, len) = (le32(entry, 16), le32(entry, 20));
        let place = region.start.checked_add(u64::from(at));
        let end = place.and_then(|place| place.checked_add(u64::from(len)));
        match (place, end) {
            (Some(place), Some(end))
                if end <= region.end && at as usize >= TABLE && (1..=ITEM).contains(&len) =>
            {
                match self.0.insert(guid, place..end) {
                    None => Ok(()),
                    Some(_) => Err(refused(format!(
                        "the VHDX's metadata has the {name} twice: it is damaged"
                    ))),
                }
            }
            _ => Err(refused(format!(
                "the VHDX's {name} cannot have {len} bytes at byte {at} of its metadata: it is damaged"
            ))),
        }
    }

    fn place(&self, (guid, name): (Guid, &str)) -> Result<Range<u64>, Failure> {
        self.0.get(&guid).cloned().ok_or_else(|| {
            refused(format!(
                "the VHDX's metadata has no {name}, which every VHDX has: it is damaged"
            ))
        })
    }

    /// The first `len` bytes of an item.
    async fn value(
        &self,
        storage: &impl Storage,
        item: (Guid, &str),
        len: usize,
    ) -> Result<Vec<u8>, Failure> {
        let place = self.place(item)?;
        let there = place.end - place.start;
        if there < len as u64 {
            return Err(refused(format!(
                "the {} of the VHDX has {there} bytes instead of {len}: it is damaged",
                item.1
            )));
        }
        bytes(storage, place.start, len).await
    }
}

async fn bytes(storage: &impl Storage, at: u64, len: usize) -> Result<Vec<u8>, Failure> {
    let bytes = storage::bytes(storage, at, len).await;
    bytes.map_err(failed("cannot read the VHDX's metadata"))
}
