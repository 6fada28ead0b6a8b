// SPDX-License-Identifier: MIT OR Apache-2.0
//! An entry of the log of a VHDX: a header with descriptors, and a sector of data for each that is no zeroes.

use super::crc32c::said;
use super::guid::Guid;
use super::header::VhdxHeader;
use super::log_overlay::SECTOR;
use crate::field::{le32, le64};

/// Bytes of the header of an entry, and of a descriptor. A header has the room of two.
const HEADER: u64 = 64;
const DESCRIPTOR: u64 = 32;

/// Header of an entry; only the checks that need nothing else were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogEntry {
    /// Offset in the log, in bytes.
    pub(crate) at: u64,
    pub(crate) len: u64,
    /// Offset in the log of the next entry, in bytes.
    pub(crate) next: u64,
    /// Offset in the log of the oldest entry whose changes may not be in their places, in bytes.
    pub(crate) tail: u64,
    pub(crate) sequence: u64,
    pub(crate) sum: u32,
    pub(crate) descriptors: u64,
    /// Bytes that the file had for sure, and those that everything in it fits into.
    pub(crate) flushed: u64,
    pub(crate) last: u64,
}

impl LogEntry {
    /// Parses an entry that begins at `at`; `None` if it does not belong to the log of this header.
    pub(crate) fn parse(sector: &[u8], at: u64, header: &VhdxHeader) -> Option<Self> {
        let (len, tail) = (u64::from(le32(sector, 8)), u64::from(le32(sector, 12)));
        let entry = Self {
            at,
            len,
            next: at.checked_add(len)? % header.log_len.max(1),
            tail,
            sequence: le64(sector, 16),
            sum: said(sector),
            descriptors: u64::from(le32(sector, 24)),
            flushed: le64(sector, 48),
            last: le64(sector, 56),
        };
        let is_ours = sector.get(..4) == Some(b"loge") && Guid::at(sector, 32) == header.log;
        let is_placed = len > 0 && len % SECTOR == 0 && len <= header.log_len;
        let has_tail = tail % SECTOR == 0 && tail < header.log_len;
        // Sizes of files have 63 bits.
        let has_size = entry.last <= i64::MAX as u64;
        let fits = entry.descriptor_sectors() * SECTOR <= len;
        let is_right = is_ours && is_placed && has_tail && has_size && fits;
        (is_right && entry.sequence > 0).then_some(entry)
    }

    /// Returns true if this entry directly follows `other`.
    pub(crate) fn follows(&self, other: &Self) -> bool {
        other.sequence.checked_add(1) == Some(self.sequence)
    }

    /// Sectors that its header and its descriptors fill.
    pub(crate) fn descriptor_sectors(&self) -> u64 {
        // The number of descriptors has 32 bits.
        (HEADER + self.descriptors * DESCRIPTOR).div_ceil(SECTOR)
    }

    /// Returns the offset of its data from the beginning of the log; it may be behind the log's end.
    pub(crate) fn data(&self) -> u64 {
        self.at + self.descriptor_sectors() * SECTOR
    }

    /// The descriptors in one of its sectors.
    pub(crate) fn descriptors<'s>(
        &self,
        sector: &'s [u8],
        number: u64,
    ) -> std::slice::ChunksExact<'s, u8> {
        let first = (number * SECTOR).saturating_sub(HEADER) / DESCRIPTOR;
        let begin = if number == 0 { HEADER } else { 0 };
        let room = (SECTOR - begin) / DESCRIPTOR;
        let count = self.descriptors.saturating_sub(first).min(room);
        let end = begin + count * DESCRIPTOR;
        // CAST: inside of a sector.
        let range = begin as usize..end as usize;
        let bytes = sector.get(range).unwrap_or(&[]);
        bytes.chunks_exact(DESCRIPTOR as usize)
    }
}

/// One change of a log entry, in bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Descriptor {
    Zero { at: u64, len: u64 },
    Data { at: u64 },
}

impl Descriptor {
    /// Returns `None` if it is no descriptor, or not one of this entry.
    pub(crate) fn parse(bytes: &[u8], entry: &LogEntry) -> Option<Self> {
        let (len, at) = (le64(bytes, 8), le64(bytes, 16));
        if le64(bytes, 24) != entry.sequence || at % SECTOR != 0 {
            return None;
        }
        match bytes.get(..4)? {
            b"zero" if len % SECTOR == 0 => Some(Self::Zero { at, len }),
            b"desc" => Some(Self::Data { at }),
            _ => None,
        }
    }
}

/// Looks at the sectors of an entry, one after the other.
#[derive(Debug)]
pub(crate) struct Sectors<'e> {
    entry: &'e LogEntry,
    seen: u64,
    /// Sectors of data that the descriptors speak of, and that were seen.
    wanted: u64,
    data: u64,
}

impl<'e> Sectors<'e> {
    pub(crate) fn new(entry: &'e LogEntry) -> Self {
        Self {
            entry,
            seen: 0,
            wanted: 0,
            data: 0,
        }
    }

    /// The next sector is as it must be.
    pub(crate) fn is_next(&mut self, sector: &[u8]) -> bool {
        let number = self.seen;
        self.seen += 1;
        if number < self.entry.descriptor_sectors() {
            for bytes in self.entry.descriptors(sector, number) {
                match Descriptor::parse(bytes, self.entry) {
                    Some(Descriptor::Data { .. }) => self.wanted += 1,
                    Some(Descriptor::Zero { .. }) => {}
                    None => return false,
                }
            }
            return true;
        }
        if self.data == self.wanted {
            // An entry may be longer than its content.
            return true;
        }
        self.data += 1;
        let (high, low) = (le32(sector, 4), le32(sector, SECTOR as usize - 4));
        let sequence = u64::from(high) << 32 | u64::from(low);
        sector.get(..4) == Some(b"data") && sequence == self.entry.sequence
    }

    /// There was a sector for each descriptor.
    pub(crate) fn are_all(&self) -> bool {
        self.data == self.wanted
    }
}
