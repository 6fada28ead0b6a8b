// SPDX-License-Identifier: MIT OR Apache-2.0
//! The beginning of a VHDX: its signature, and the two headers, of which one counts.

use super::crc32c::is_right;
use super::guid::Guid;
use crate::field::{failed, le16, le32, le64, refused};
use crate::{storage, Storage};
use control::Failure;
use std::ops::Range;

/// Bytes of the header section, where nothing else may be; also the unit of all other places.
pub(crate) const UNIT: u64 = 1 << 20;
/// Offsets of the headers, and bytes of one that its checksum covers.
const PLACES: [u64; 2] = [64 << 10, 128 << 10];
const LEN: usize = 4096;
/// First byte of the header section that a replayed log may change: the region tables begin here.
pub(crate) const HEADERS_END: u64 = 192 << 10;
const IDENTIFIER: &[u8; 8] = b"vhdxfile";
const SIGNATURE: &[u8; 4] = b"head";

/// The header that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VhdxHeader {
    sequence: u64,
    version: u16,
    /// Identity of the content, which changes in each session that changes the content.
    pub(crate) data: Guid,
    /// Identity of valid log entries; zero if no log needs to be replayed.
    pub(crate) log: Guid,
    pub(crate) log_version: u16,
    /// Offset of the log, in bytes.
    pub(crate) log_at: u64,
    pub(crate) log_len: u64,
}

impl VhdxHeader {
    /// Reads and checks the header that counts.
    ///
    /// # Errors
    /// There is no valid header, or its version is unknown.
    pub(crate) async fn read(storage: &impl Storage) -> Result<Self, Failure> {
        let reading = |error| failed("cannot read the VHDX's header")(error);
        let first = storage::bytes(storage, 0, IDENTIFIER.len());
        if first.await.map_err(reading)? != IDENTIFIER {
            return Err(refused(
                "there is no file identifier of a VHDX at the beginning: it is another kind of file",
            ));
        }
        let mut found = [None; 2];
        for (header, at) in found.iter_mut().zip(PLACES) {
            let bytes = storage::bytes(storage, at, LEN).await.map_err(reading)?;
            *header = Self::parse(&bytes);
        }
        Self::choose(found)?.check()
    }

    /// Returns `None` if it was cut off in a power cut, or is damaged.
    fn parse(bytes: &[u8]) -> Option<Self> {
        (bytes.get(..4) == Some(SIGNATURE) && is_right(bytes)).then(|| Self {
            sequence: le64(bytes, 8),
            data: Guid::at(bytes, 32),
            log: Guid::at(bytes, 48),
            log_version: le16(bytes, 64),
            version: le16(bytes, 66),
            log_len: u64::from(le32(bytes, 68)),
            log_at: le64(bytes, 72),
        })
    }

    fn choose(found: [Option<Self>; 2]) -> Result<Self, Failure> {
        match found {
            [Some(first), Some(second)] if first.sequence > second.sequence => Ok(first),
            [Some(first), Some(second)] if first.sequence < second.sequence => Ok(second),
            // Disk2vhd writes the same header twice.
            [Some(first), Some(second)] if first == second => Ok(first),
            [Some(first), Some(_)] => Err(refused(format!(
                "both headers of the VHDX have the sequence number {} and say different things: it is damaged",
                first.sequence
            ))),
            [Some(one), None] | [None, Some(one)] => Ok(one),
            [None, None] => Err(refused(
                "the checksums of both headers of the VHDX are wrong: it is damaged",
            )),
        }
    }

    fn check(self) -> Result<Self, Failure> {
        if self.version != 1 {
            return Err(refused(format!(
                "the VHDX has version {}, which this program does not support: version 1 can be served",
                self.version
            )));
        }
        let is_placed = |number: u64| number % UNIT == 0;
        let end = self.log_at.checked_add(self.log_len);
        let is_right = is_placed(self.log_at) && is_placed(self.log_len) && end.is_some();
        if self.log_len > 0 && !(is_right && self.log_at >= UNIT) {
            return Err(refused(format!(
                "the VHDX's log cannot have {} bytes at byte {}: both are multiples of 1 MiB, behind the headers",
                self.log_len, self.log_at
            )));
        }
        Ok(self)
    }

    /// The log's bytes.
    pub(crate) fn log_range(&self) -> Range<u64> {
        self.log_at..self.log_at.saturating_add(self.log_len)
    }
}

#[cfg(test)]
mod tests {
    use super::VhdxHeader;
    use crate::vhdx::guid::Guid;

    fn header(sequence: u64) -> VhdxHeader {
        VhdxHeader {
            sequence,
            version: 1,
            data: Guid(sequence.into()),
            log: Guid(0),
            log_version: 0,
            log_at: 1 << 20,
            log_len: 1 << 20,
        }
    }

    #[test]
    fn the_later_header_counts_and_one_is_enough() {
        let (old, new) = (Some(header(7)), Some(header(8)));
        for found in [[old, new], [new, old], [None, new], [new, None], [new, new]] {
            assert_eq!(VhdxHeader::choose(found).unwrap(), header(8));
        }
        let other = VhdxHeader {
            data: Guid(1),
            ..header(8)
        };
        assert!(VhdxHeader::choose([new, Some(other)]).is_err());
        assert!(VhdxHeader::choose([None, None]).is_err());
    }

    #[test]
    fn places_are_checked() {
        assert!(header(1).check().is_ok());
        for (at, len) in [
            (0, 1 << 20),
            (1, 1 << 20),
            (1 << 20, 7),
            (u64::MAX << 20, 1 << 20),
        ] {
            let wrong = VhdxHeader {
                log_at: at,
                log_len: len,
                ..header(1)
            };
            assert!(wrong.check().is_err(), "{at} {len}");
        }
        let wrong = VhdxHeader {
            version: 2,
            ..header(1)
        };
        assert!(wrong.check().is_err());
    }
}
