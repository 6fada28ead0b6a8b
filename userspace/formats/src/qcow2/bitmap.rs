// SPDX-License-Identifier: MIT OR Apache-2.0
//! Persistent dirty bitmaps of QEMU: the directory in which an image lists them.

use super::geometry::{Geometry, MAX_OFFSET};
use super::header::{Qcow2Header, BITMAPS};
use super::image::EntryTable;
use crate::field::{be32, be64, refused};
use crate::{storage, Storage};
use control::Failure;
use diskio::Errno;

/// Bytes of a record without its name.
const RECORD: usize = 24;
/// Offsets in a record: the number of table entries is behind the place of the table.
pub(super) const AT_TABLE: u64 = 0;
pub(super) const AT_ENTRIES: u64 = 8;
pub(super) const AT_FLAGS: u64 = 12;
/// Flags: not stored since the last change of the disk, and set by each write.
pub(super) const IN_USE: u32 = 1;
const AUTO: u32 = 1 << 1;
const EXTRA_IS_FINE: u32 = 1 << 2;
/// Bytes of a name at most, as QEMU has it.
const LONGEST_NAME: usize = 1023;
/// The only type: a bit for each granule that a write has touched.
const TRACKING: u8 = 1;
/// Bytes of a granule, as powers of two.
const GRANULES: std::ops::RangeInclusive<u8> = 9..=31;
/// Bytes of a directory that is read, and entries of a table: QEMU's limit is a bitmap of 512 MiB.
const DIRECTORY: u64 = 1 << 20;
pub(super) const MAX_ENTRIES: u64 = 8 << 20;

/// A dirty bitmap that an image keeps for incremental backups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskBitmap {
    /// Its name, unique in the image.
    pub name: String,
    /// Bytes of the disk for which a bit stands.
    pub granularity: u64,
    /// True if each write sets its bits; false if it stays as it is.
    pub is_recording: bool,
    /// True if its bits can be relied on: the program that wrote the disk last has stored them.
    pub is_consistent: bool,
}

/// A bitmap as the directory has it.
#[derive(Clone, Debug)]
pub(super) struct BitmapRecord {
    /// Offset of the record in the file.
    pub(super) at: u64,
    pub(super) table: EntryTable,
    pub(super) flags: u32,
    /// A granule has `1 << shift` bytes.
    pub(super) shift: u32,
    name: Vec<u8>,
}

impl BitmapRecord {
    /// Returns true if each write has to set its bits.
    pub(super) fn is_recording(&self) -> bool {
        self.flags & AUTO != 0
    }

    /// Returns true if its bits were stored by the program that wrote the disk last.
    pub(super) fn is_consistent(&self) -> bool {
        self.flags & IN_USE == 0
    }

    /// Returns the name by which programs find the bitmap; `None` if it is none that QEMU could give.
    pub(super) fn name(&self) -> Option<&str> {
        let is_possible = (1..=LONGEST_NAME).contains(&self.name.len());
        let name = is_possible.then_some(&self.name)?;
        std::str::from_utf8(name).ok()
    }

    /// Returns the entries of the table of a bitmap for `size` bytes.
    pub(super) fn entries_for(&self, size: u64, geometry: &Geometry) -> u64 {
        let bits = size.div_ceil(1 << self.shift);
        bits.div_ceil(8).div_ceil(geometry.cluster())
    }
}

/// Returns the records of all bitmaps.
pub(super) async fn records<S: Storage>(
    file: &S,
    place: (u64, u64),
    geometry: &Geometry,
) -> Result<Vec<BitmapRecord>, Failure> {
    let (at, len) = place;
    let wrong = || refused("the directory of bitmaps is damaged");
    if len > DIRECTORY || at == 0 || at % geometry.cluster() != 0 || at > MAX_OFFSET {
        return Err(wrong());
    }
    let failed =
        |error: Errno| Failure::system("cannot read the directory of bitmaps", &error.into());
    // CAST: bounded.
    let bytes = storage::bytes(file, at, (len as usize).max(1))
        .await
        .map_err(failed)?;
    let (mut all, mut from) = (Vec::new(), 0);
    while (from as u64) < len {
        let (record, next) = record(&bytes, from, at, geometry).ok_or_else(wrong)?;
        all.push(record);
        from = next;
    }
    Ok(all)
}

/// Returns the record at a byte of the directory, which begins at `begin` in the file, and where the next one is.
fn record(
    bytes: &[u8],
    from: usize,
    begin: u64,
    geometry: &Geometry,
) -> Option<(BitmapRecord, usize)> {
    let fixed = bytes.get(from..from.checked_add(RECORD)?)?;
    let flags = be32(fixed, AT_FLAGS as usize);
    let (kind, shift) = (*fixed.get(16)?, *fixed.get(17)?);
    let name_len = usize::from(u16::from_be_bytes([*fixed.get(18)?, *fixed.get(19)?]));
    let extra = be32(fixed, 20) as usize;
    let name_at = from.checked_add(RECORD)?.checked_add(extra)?;
    let name = bytes.get(name_at..name_at.checked_add(name_len)?)?;
    let table = EntryTable {
        at: be64(fixed, AT_TABLE as usize),
        entries: u64::from(be32(fixed, AT_ENTRIES as usize)),
    };
    let is_known = kind == TRACKING
        && GRANULES.contains(&shift)
        && flags & !(IN_USE | AUTO | EXTRA_IS_FINE) == 0
        && (extra == 0 || flags & EXTRA_IS_FINE != 0);
    let is_inside = table.at % geometry.cluster() == 0
        && table.at > 0
        && table.at <= MAX_OFFSET
        && table.entries <= MAX_ENTRIES;
    (is_known && is_inside).then(|| {
        let record = BitmapRecord {
            at: begin + from as u64,
            table,
            flags,
            shift: u32::from(shift),
            name: name.to_vec(),
        };
        (record, (name_at + name_len).next_multiple_of(8))
    })
}

/// The dirty bitmaps that an image keeps.
///
/// # Errors
/// The image cannot be read, or its directory of bitmaps is damaged.
pub async fn bitmaps<S: Storage>(file: &S) -> Result<Vec<DiskBitmap>, Failure> {
    let header: Qcow2Header = super::header(file).await?;
    let Some(place) = header.bitmaps else {
        return Ok(Vec::new());
    };
    // A program that does not know bitmaps has written the disk if this is false.
    let is_kept = header.autoclear & BITMAPS != 0;
    let all = records(file, place, &header.geometry).await?;
    let each = all.into_iter().map(|record| DiskBitmap {
        granularity: 1 << record.shift,
        is_recording: record.is_recording(),
        is_consistent: is_kept && record.is_consistent(),
        name: String::from_utf8_lossy(&record.name).into_owned(),
    });
    Ok(each.collect())
}
