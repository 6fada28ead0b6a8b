// SPDX-License-Identifier: MIT OR Apache-2.0
//! The header of a qcow image, and what blktap put behind it.

use crate::field::{be32, be64, put, refused};
use control::Failure;

/// Bytes of the header, and with blktap's.
pub(crate) const LEN: u64 = 48;
const WITH_XEN: u64 = 64;
pub(crate) const MAGIC: &[u8; 4] = b"QFI\xfb";
const XEN: &[u8; 4] = b"XEN\xfb";
/// Offset of blktap's flags, and the flag of a first table in the format's own byte order.
pub(crate) const XEN_FLAGS: u64 = 60;
pub(crate) const XEN_BIG_ENDIAN: u32 = 2;
/// Bytes of a name at most.
pub(crate) const NAME: u32 = 1023;
/// Bytes of the first table, which is kept in memory.
const FIRST: u64 = 16 << 20;

/// A header that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QcowHeader {
    /// Bytes of the disk.
    pub(crate) size: u64,
    pub(crate) cluster_bits: u32,
    /// Bits of the number of entries that a second table has.
    pub(crate) table_bits: u32,
    pub(crate) first: u64,
    /// Offset of the backing file's name, and its length, in bytes.
    pub(crate) name: Option<(u64, u32)>,
    /// blktap's flags.
    pub(crate) xen: Option<u32>,
}

impl QcowHeader {
    /// Parses and checks the header of an image of `length` bytes.
    pub(crate) fn parse(bytes: &[u8], length: u64) -> Result<Self, Failure> {
        if bytes.get(..4) != Some(MAGIC) {
            return Err(refused(
                "the image does not begin as a qcow image does: it is another one",
            ));
        }
        if be32(bytes, 4) != 1 {
            return Err(refused(format!(
                "the image is of version {} of the format: use the driver qcow2",
                be32(bytes, 4)
            )));
        }
        if be32(bytes, 36) != 0 {
            return Err(refused(
                "the image is encrypted with AES, which is not secure: decrypt it with qemu-img convert",
            ));
        }
        let size = be64(bytes, 24);
        let (cluster_bits, table_bits) = match bytes.get(32..34) {
            Some([cluster, table]) => (u32::from(*cluster), u32::from(*table)),
            _ => (0, 0),
        };
        if !(9..=16).contains(&cluster_bits) || !(6..=13).contains(&table_bits) {
            return Err(refused(format!(
                "the image has clusters of 2^{cluster_bits} bytes and tables of 2^{table_bits} entries, which cannot be"
            )));
        }
        if size < 512 || i64::try_from(size).is_err() {
            return Err(refused(format!(
                "the image says that its disk has {size} bytes"
            )));
        }
        let header = Self {
            // A partial sector at the end cannot be reached.
            size: size - size % 512,
            cluster_bits,
            table_bits,
            first: be64(bytes, 40),
            name: name(bytes, length)?,
            xen: None,
        };
        let end = header.first.checked_add(header.first_len());
        let is_inside = header.first >= LEN && end.is_some_and(|end| end <= length);
        if header.first_len() > FIRST || header.first % 8 != 0 || !is_inside {
            return Err(refused(format!(
                "the first table of the image cannot have {} bytes at {}, and the image {length}: it is damaged or cut off",
                header.first_len(),
                header.first
            )));
        }
        let has_room = header.first % 4096 == 0 && header.name.is_none_or(|(at, _)| at >= WITH_XEN);
        let xen =
            (has_room && bytes.get(48..52) == Some(XEN)).then(|| be32(bytes, XEN_FLAGS as usize));
        Ok(Self { xen, ..header })
    }

    /// Bytes of the first table.
    pub(crate) fn first_len(&self) -> u64 {
        self.size
            .div_ceil(1 << (self.cluster_bits + self.table_bits))
            * 8
    }

    /// Bytes of a second table.
    pub(crate) fn table_len(&self) -> u64 {
        8 << self.table_bits
    }

    /// As it is in the image.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN as usize];
        let (at, len) = self.name.unwrap_or_default();
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 4, &1_u32.to_be_bytes());
        put(&mut bytes, 8, &at.to_be_bytes());
        put(&mut bytes, 16, &len.to_be_bytes());
        put(&mut bytes, 24, &self.size.to_be_bytes());
        // CAST: they are below 17.
        put(
            &mut bytes,
            32,
            &[self.cluster_bits as u8, self.table_bits as u8],
        );
        put(&mut bytes, 40, &self.first.to_be_bytes());
        bytes
    }
}

fn name(bytes: &[u8], length: u64) -> Result<Option<(u64, u32)>, Failure> {
    let (at, len) = (be64(bytes, 8), be32(bytes, 16));
    if at == 0 {
        return Ok(None);
    }
    let end = at.checked_add(u64::from(len));
    if len == 0 || len > NAME || at < LEN || end.is_none_or(|end| end > length) {
        return Err(refused(format!(
            "the name of the backing file cannot have {len} bytes at {at}: the image is damaged"
        )));
    }
    Ok(Some((at, len)))
}

/// Corrects the byte order of the first table. Early versions of blktap wrote its numbers with the lowest byte first,
/// and later ones turn them when they open such an image. Each number is judged alone, because the process that turned
/// them may have died in between: only one of both orders of a number's bytes leads into the image. Returns the
/// corrected bytes of the table, or `None` if none is wrong.
pub(crate) fn repaired(
    bytes: &[u8],
    header: &QcowHeader,
    length: u64,
) -> Result<Option<Vec<u8>>, Failure> {
    if header.xen.is_none_or(|flags| flags & XEN_BIG_ENDIAN != 0) {
        return Ok(None);
    }
    let is_right = |number: u64| {
        let end = number.checked_add(header.table_len());
        number == 0 || number % 512 == 0 && end.is_some_and(|end| end <= length)
    };
    let mut fixed = Vec::with_capacity(bytes.len());
    for entry in bytes.chunks_exact(8) {
        let (big, little) = (be64(entry, 0), be64(entry, 0).swap_bytes());
        let number = match (is_right(little), is_right(big)) {
            (true, _) => little,
            (false, true) => big,
            (false, false) => {
                return Err(refused(
                    "the first table of the image has numbers that lead out of it in either order of their bytes: it is damaged",
                ))
            }
        };
        fixed.extend(number.to_be_bytes());
    }
    Ok(Some(fixed))
}
