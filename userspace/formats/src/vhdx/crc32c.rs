// SPDX-License-Identifier: MIT OR Apache-2.0
//! The checksum of everything in a VHDX: CRC-32C, with zeroes in the place of the checksum itself.

use crate::field::le32;
use crc::{Crc, Digest, Table, CRC_32_ISCSI};

/// Eats sixteen bytes at a time: a log may have some MiB.
static CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);
/// Offset of the checksum, in headers, tables of regions and entries of the log.
const AT: usize = 4;

/// A checksum to which bytes are added.
pub(crate) struct Sum(Digest<'static, u32, Table<16>>);

impl Sum {
    /// Begins with the bytes that contain the checksum.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let mut digest = CRC.digest();
        digest.update(bytes.get(..AT).unwrap_or(&[]));
        digest.update(&[0; 4]);
        digest.update(bytes.get(AT + 4..).unwrap_or(&[]));
        Self(digest)
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(self) -> u32 {
        self.0.finalize()
    }
}

/// Returns the checksum that is stored in `bytes`.
pub(crate) fn said(bytes: &[u8]) -> u32 {
    le32(bytes, AT)
}

/// The checksum in `bytes` is that of all of them.
pub(crate) fn is_right(bytes: &[u8]) -> bool {
    Sum::of(bytes).finish() == said(bytes)
}
