// SPDX-License-Identifier: MIT OR Apache-2.0
//! The footer, 512 bytes that identify a VHD: at its end, and a copy at the beginning of all but the fixed ones.

use crate::field::{array, be32, be64, put, refused};
use control::Failure;
use std::time::{Duration, SystemTime};

/// Bytes of a footer.
pub(crate) const LEN: usize = 512;
const COOKIE: &[u8; 8] = b"conectix";
/// In the place of the cookie while `vhd-util` changes the size.
const POISON: &[u8; 8] = b"v_poison";
const CHECKSUM: usize = 64;
const HIDDEN: usize = 85;
const VERSION: u32 = 0x0001_0000;
/// Creator code of tapdisk, whose images may have a batmap; and the version from which all have one.
const TAPDISK: &[u8; 4] = b"tap\0";
const TAPDISK_VERSION: u32 = 0x0001_0003;
/// Seconds from 1970 to 2000.
const EPOCH: u64 = 946_684_800;
/// Largest number of sectors that cylinders, heads and sectors can express.
const MOST_SECTORS: u64 = 65_535 * 16 * 255;

/// Kind of a VHD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VhdKind {
    /// The content as it is, and a footer.
    Fixed,
    /// Blocks are allocated on the first write.
    Dynamic,
    /// Blocks are allocated on the first write, and missing sectors are the parent's.
    Differencing,
}

/// A footer that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    bytes: [u8; LEN],
    pub(crate) kind: VhdKind,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Offset of the header in bytes; without meaning for a fixed VHD.
    pub(crate) header: u64,
}

impl Footer {
    /// Parses and checks a footer. `Ok(None)` if it is no footer at all.
    pub(crate) fn parse(bytes: [u8; LEN]) -> Result<Option<Self>, Failure> {
        if bytes[..8] == *POISON {
            return Err(refused(
                "the size of the VHD was being changed by vhd-util, which was interrupted: let vhd-util revert that",
            ));
        }
        if bytes[..8] != *COOKIE {
            return Ok(None);
        }
        if !has_checksum(&bytes) {
            return Err(refused(
                "the checksum of the VHD's footer is wrong: it is damaged",
            ));
        }
        if be32(&bytes, 12) != VERSION {
            return Err(refused(format!(
                "the VHD has version {:#x}, which this program does not support",
                be32(&bytes, 12)
            )));
        }
        let kind = match be32(&bytes, 60) {
            2 => VhdKind::Fixed,
            3 => VhdKind::Dynamic,
            4 => VhdKind::Differencing,
            other => {
                return Err(refused(format!(
                    "the VHD is of type {other}, which is neither fixed, dynamic nor differencing"
                )))
            }
        };
        let size = be64(&bytes, 48);
        if size == 0 || size % 512 != 0 {
            return Err(refused(format!(
                "the VHD says that its disk has {size} bytes, which are no sectors"
            )));
        }
        if bytes[28..32] == *TAPDISK && be32(&bytes, 32) == 1 && kind != VhdKind::Fixed {
            return Err(refused(
                "the VHD was made by a tapdisk of version 0.1, whose bitmaps are different: convert it with vhd-update",
            ));
        }
        Ok(Some(Self {
            kind,
            size,
            header: be64(&bytes, 16),
            bytes,
        }))
    }

    /// Makes the footer of a new disk.
    pub(crate) fn new(kind: VhdKind, size: u64, id: [u8; 16]) -> Self {
        let mut bytes = [0; LEN];
        let header = match kind {
            VhdKind::Fixed => u64::MAX,
            _ => LEN as u64,
        };
        let number: u32 = match kind {
            VhdKind::Fixed => 2,
            VhdKind::Dynamic => 3,
            VhdKind::Differencing => 4,
        };
        put(&mut bytes, 0, COOKIE);
        // Reserved, and always set.
        put(&mut bytes, 8, &2_u32.to_be_bytes());
        put(&mut bytes, 12, &VERSION.to_be_bytes());
        put(&mut bytes, 16, &header.to_be_bytes());
        put(&mut bytes, 24, &timestamp(SystemTime::now()).to_be_bytes());
        put(&mut bytes, 28, TAPDISK);
        put(&mut bytes, 32, &TAPDISK_VERSION.to_be_bytes());
        put(&mut bytes, 40, &size.to_be_bytes());
        put(&mut bytes, 60, &number.to_be_bytes());
        put(&mut bytes, 68, &id);
        let mut footer = Self {
            bytes,
            kind,
            size,
            header,
        };
        footer.resize(size);
        footer
    }

    /// Changes the size of the disk.
    pub(crate) fn resize(&mut self, size: u64) {
        self.size = size;
        put(&mut self.bytes, 48, &size.to_be_bytes());
        put(&mut self.bytes, 56, &geometry(size));
        self.seal();
    }

    /// Returns true if the image is marked as hidden, which only Xen's tools do.
    pub(crate) fn is_hidden(&self) -> bool {
        self.bytes[HIDDEN] != 0
    }

    /// Marks it so, or not.
    pub(crate) fn hide(&mut self, hidden: bool) {
        self.bytes[HIDDEN] = u8::from(hidden);
        self.seal();
    }

    fn seal(&mut self) {
        let sum = checksum(&self.bytes, CHECKSUM);
        put(&mut self.bytes, CHECKSUM, &sum.to_be_bytes());
    }

    /// As it is in the image.
    pub(crate) fn bytes(&self) -> &[u8; LEN] {
        &self.bytes
    }

    /// Identity of the disk.
    pub(crate) fn id(&self) -> [u8; 16] {
        array(&self.bytes, 68)
    }

    /// Tapdisk made it, and may have given it a batmap.
    pub(crate) fn may_have_batmap(&self) -> bool {
        self.kind != VhdKind::Fixed && self.bytes[28..32] == *TAPDISK && be32(&self.bytes, 32) > 1
    }
}

fn has_checksum(bytes: &[u8; LEN]) -> bool {
    let found = be32(bytes, CHECKSUM);
    if found == checksum(bytes, CHECKSUM) {
        return true;
    }
    // Early versions of tapdisk hid an image without a new checksum.
    let mut shown = *bytes;
    shown[HIDDEN] = 0;
    let is_early = matches!(be32(bytes, 32), 1 | 0x0001_0001) && bytes[28..31] == *b"tap";
    is_early && found == checksum(&shown, CHECKSUM)
}

/// The sum of all bytes but the four of the sum itself, inverted.
pub(crate) fn checksum(bytes: &[u8], except: usize) -> u32 {
    let numbers = bytes.iter().enumerate();
    let others = numbers.filter(|(at, _)| !(except..except.saturating_add(4)).contains(at));
    !others.fold(0_u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

/// Seconds since 2000.
pub(crate) fn timestamp(time: SystemTime) -> u32 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH));
    since.map_or(0, |since| {
        u32::try_from(since.as_secs()).unwrap_or(u32::MAX)
    })
}

/// Returns cylinders (two bytes), heads and sectors of a track, by the rule of the specification. In most cases their
/// product is less than the size.
fn geometry(size: u64) -> [u8; 4] {
    let sectors = (size / 512).min(MOST_SECTORS);
    let (track, heads, rows) = if sectors >= 65_535 * 16 * 63 {
        (255, 16, sectors / 255)
    } else {
        let rows = sectors / 17;
        let heads = rows.div_ceil(1024).max(4);
        if rows < heads * 1024 && heads <= 16 {
            (17, heads, rows)
        } else if sectors / 31 < 16 * 1024 {
            (31, 16, sectors / 31)
        } else {
            (63, 16, sectors / 63)
        }
    };
    let cylinders = u16::try_from(rows / heads)
        .unwrap_or(u16::MAX)
        .to_be_bytes();
    // CAST: the numbers are those above.
    [cylinders[0], cylinders[1], heads as u8, track as u8]
}

#[cfg(test)]
mod tests {
    use super::{geometry, Footer, VhdKind};

    #[test]
    fn what_is_made_is_what_is_read() {
        for kind in [VhdKind::Fixed, VhdKind::Dynamic, VhdKind::Differencing] {
            let footer = Footer::new(kind, 5 << 20, [7; 16]);
            assert_eq!(Footer::parse(*footer.bytes()), Ok(Some(footer)));
        }
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let footer = Footer::new(VhdKind::Dynamic, 5 << 20, [7; 16]);
        for bit in 0..512 * 8 {
            let mut bytes = *footer.bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(Footer::parse(bytes), Ok(Some(footer.clone())));
            assert!(!matches!(Footer::parse(bytes), Ok(Some(_))), "bit {bit}");
        }
    }

    #[test]
    fn geometry_is_that_of_the_specification() {
        // As qemu-img says of images of these sizes.
        assert_eq!(
            geometry(64 << 20),
            [(963_u16 >> 8) as u8, 963_u16 as u8, 8, 17]
        );
        assert_eq!(geometry(u64::MAX), [0xff, 0xff, 16, 255]);
        assert_eq!(geometry(512), [0, 0, 4, 17]);
    }
}
