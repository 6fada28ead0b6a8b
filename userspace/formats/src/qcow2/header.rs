// SPDX-License-Identifier: MIT OR Apache-2.0
//! The header of an image: read once, checked, and only then used.

use super::geometry::{Geometry, CLUSTER_BITS, EXTENDED_BITS, MAX_OFFSET};
use crate::field::{be32_at, be64_at, refused};
use control::Failure;

pub(crate) const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a header of version 2, and of the shortest of version 3.
pub(crate) const V2: usize = 72;
pub(crate) const V3: usize = 104;

/// Offsets of the fields that change. The length of the name of the image below is behind its place. The place of the L1 table is behind its number of entries, and the refcount
/// table's number of clusters behind its place.
pub(super) const AT_NAME: usize = 8;
pub(crate) const AT_SIZE: usize = 24;
pub(crate) const AT_L1_ENTRIES: usize = 36;
const AT_L1: usize = 40;
pub(crate) const AT_REFTABLE: usize = 48;
const AT_REFTABLE_CLUSTERS: usize = 56;
pub(crate) const AT_INCOMPATIBLE: usize = 72;
pub(crate) const AT_AUTOCLEAR: usize = 88;
pub(crate) const AT_HEADER_LEN: usize = 100;

/// Incompatible features.
pub(crate) const DIRTY: u64 = 1;
pub(crate) const CORRUPT: u64 = 1 << 1;
pub(crate) const EXTERNAL: u64 = 1 << 2;
pub(crate) const COMPRESSION: u64 = 1 << 3;
pub(crate) const EXTENDED: u64 = 1 << 4;
/// Autoclear feature: the bitmaps have all changes.
pub(crate) const BITMAPS: u64 = 1;
/// Autoclear feature: the data file is the disk, byte for byte.
pub(crate) const RAW_EXTERNAL: u64 = 1 << 1;

/// Header extensions.
pub(crate) const EXT_BACKING: u32 = 0xe279_2aca;
pub(crate) const EXT_FEATURES: u32 = 0x6803_f857;
pub(crate) const EXT_DATA_FILE: u32 = 0x4441_5441;
pub(crate) const EXT_BITMAPS: u32 = 0x2385_2875;
pub(crate) const EXT_CRYPT: u32 = 0x0537_be77;
/// Bytes of a logical sector, as 32 bits: of this program ("xbls"). Others keep it, and do not know it.
pub(crate) const EXT_SECTOR: u32 = 0x7862_6c73;

/// The method of encryption that is known.
pub(crate) const LUKS: u32 = 2;

/// Limits, those of QEMU.
const MAX_L1: u64 = 32 << 20;
const MAX_REFTABLE: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_NAME: u32 = 1023;
/// Bytes of a header of LUKS with its keys: those of today have two MiB.
const MAX_CRYPT: u64 = 16 << 20;

/// Compression of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Deflate, without a header.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A backing image as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingImage {
    /// Path as it is in the header, relative to the image's folder if it does not begin with `/`.
    pub name: String,
    /// Format; `None` if the header does not name it. The format is never guessed from the content.
    pub format: Option<String>,
}

/// Place of the LUKS header, with its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LuksPlace {
    pub(crate) at: u64,
    pub(crate) len: u64,
}

/// Fields of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    pub(crate) geometry: Geometry,
    /// 2 or 3.
    pub version: u32,
    /// Bytes of the disk.
    pub size: u64,
    /// The image below.
    pub backing: Option<BackingImage>,
    /// Bytes of a logical sector, if the header stores them. Otherwise they are those of the backing image, or 512.
    pub sector: Option<u32>,
    /// Name of the file with the data, if that is not in the image and the header says it.
    pub data_file: Option<String>,
    /// Compression of clusters.
    pub compression: Compression,
    /// Internal snapshots.
    pub snapshots: u32,
    pub(crate) snapshots_at: u64,
    pub(crate) l1: u64,
    pub(crate) l1_entries: u64,
    pub(crate) reftable: u64,
    pub(crate) reftable_clusters: u64,
    pub(crate) incompatible: u64,
    pub(crate) autoclear: u64,
    /// The directory of bitmaps: offset and bytes.
    pub(crate) bitmaps: Option<(u64, u64)>,
    /// Place of the key with which the clusters of the disk are encrypted, if they are.
    pub(crate) crypt: Option<LuksPlace>,
}

/// Returns the bytes of the cluster with a header, which must be read to parse it.
pub(crate) fn needed(begin: &[u8]) -> Result<usize, Failure> {
    let (magic, version) = (be32_at(begin, 0), be32_at(begin, 4));
    if magic != Some(MAGIC) {
        return Err(refused(
            "the image does not begin as a qcow2 image does: see what it is with qemu-img info, and name its format",
        ));
    }
    if !matches!(version, Some(2 | 3)) {
        return Err(refused(format!(
            "the image has version {} of qcow2, and only 2 and 3 are known",
            version.unwrap_or(0)
        )));
    }
    let bits = be32_at(begin, 20).filter(|bits| CLUSTER_BITS.contains(bits));
    let bits = bits.ok_or_else(|| {
        refused("the header's size of a cluster is neither 512 bytes nor 2 MiB nor in between")
    })?;
    Ok(1 << bits)
}

impl Qcow2Header {
    /// Understands the first cluster of an image.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        needed(bytes)?;
        Self::fields(bytes).ok_or_else(|| refused("the header is cut off"))?
    }

    /// Returns `None` if the header is too short.
    fn fields(bytes: &[u8]) -> Option<Result<Self, Failure>> {
        let (version, bits) = (be32_at(bytes, 4)?, be32_at(bytes, 20)?);
        let v3 = version >= 3;
        let feature = |at| if v3 { be64_at(bytes, at) } else { Some(0) };
        let (incompatible, autoclear) = (feature(AT_INCOMPATIBLE)?, feature(AT_AUTOCLEAR)?);
        let (order, length) = match v3 {
            true => (be32_at(bytes, 96)?, be32_at(bytes, AT_HEADER_LEN)? as usize),
            false => (4, V2),
        };
        let kind = match length > V3 {
            true => *bytes.get(V3)?,
            false => 0,
        };
        let header = Self {
            geometry: Geometry {
                cluster_bits: bits,
                extended: incompatible & EXTENDED != 0,
                refcount_order: order,
                has_zero: v3,
                external: incompatible & EXTERNAL != 0,
            },
            version,
            size: be64_at(bytes, AT_SIZE)?,
            backing: None,
            sector: None,
            data_file: None,
            compression: match kind {
                1 => Compression::Zstd,
                _ => Compression::Zlib,
            },
            snapshots: be32_at(bytes, 60)?,
            snapshots_at: be64_at(bytes, 64)?,
            l1: be64_at(bytes, AT_L1)?,
            l1_entries: u64::from(be32_at(bytes, AT_L1_ENTRIES)?),
            reftable: be64_at(bytes, AT_REFTABLE)?,
            reftable_clusters: u64::from(be32_at(bytes, AT_REFTABLE_CLUSTERS)?),
            incompatible,
            autoclear,
            bitmaps: None,
            crypt: None,
        };
        Some(header.checked(bytes, length, kind))
    }

    fn checked(mut self, bytes: &[u8], length: usize, kind: u8) -> Result<Self, Failure> {
        let known = DIRTY | CORRUPT | EXTERNAL | COMPRESSION | EXTENDED;
        if self.incompatible & !known != 0 {
            return Err(unknown_features(bytes, length, self.incompatible & !known));
        }
        let method = be32_at(bytes, 32).unwrap_or(u32::MAX);
        match method {
            0 | LUKS => {}
            1 => return Err(encrypted("AES in a way that is not secure")),
            _ => return Err(encrypted("a method that is not known here")),
        }
        if (self.version >= 3 && length < V3) || length % 8 != 0 || length > bytes.len() {
            return Err(refused("the header's own length is impossible"));
        }
        if kind > 1 || (kind != 0) != (self.incompatible & COMPRESSION != 0) {
            return Err(refused(format!(
                "the header names the compression {kind}, and only zlib (0) and zstd (1) are known"
            )));
        }
        self.check_sizes()?;
        self.read_extensions(bytes, length)?;
        self.read_backing(bytes)?;
        self.check_crypt(method)?;
        match self.sector {
            Some(sector) if self.size % u64::from(sector) != 0 => Err(refused(format!(
                "the disk has {} bytes, which are no whole number of its sectors of {sector}: make it larger, to a \
                 multiple of them, with qemu-img resize",
                self.size
            ))),
            _ => Ok(self),
        }
    }

    fn check_sizes(&self) -> Result<(), Failure> {
        let geometry = &self.geometry;
        if geometry.refcount_order > 6 {
            return Err(refused("the header's refcounts have more than 64 bits"));
        }
        if geometry.extended && geometry.cluster_bits < EXTENDED_BITS {
            return Err(refused("subclusters need clusters of 16 KiB or more"));
        }
        if self.size == 0 || self.size % 512 != 0 || self.size >= MAX_OFFSET {
            return Err(refused(format!(
                "the disk has {} bytes, which is not a size that can be served: change it with qemu-img resize",
                self.size
            )));
        }
        let table = |name: &str, at: u64, bytes: u64, most: u64| {
            let is_inside = at.checked_add(bytes).is_some_and(|end| end <= MAX_OFFSET);
            match at >= geometry.cluster()
                && at % geometry.cluster() == 0
                && is_inside
                && bytes <= most
            {
                true => Ok(()),
                false => Err(refused(format!(
                    "the {name} of {bytes} bytes at {at} cannot be there: the header is damaged"
                ))),
            }
        };
        if self.l1_entries < geometry.l1_entries(self.size) {
            return Err(refused(
                "the L1 table is too short for the disk: the header is damaged",
            ));
        }
        table("L1 table", self.l1, self.l1_entries * 8, MAX_L1)?;
        let refcounts = self.reftable_clusters.saturating_mul(geometry.cluster());
        if refcounts == 0 {
            return Err(refused("there is no refcount table: the header is damaged"));
        }
        table("refcount table", self.reftable, refcounts, MAX_REFTABLE)?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(refused(format!(
                "there are {} snapshots, more than {MAX_SNAPSHOTS}",
                self.snapshots
            )));
        }
        match self.snapshots {
            0 => Ok(()),
            count => table(
                "snapshot table",
                self.snapshots_at,
                u64::from(count) * 40,
                u64::MAX,
            ),
        }
    }

    fn read_extensions(&mut self, bytes: &[u8], length: usize) -> Result<(), Failure> {
        for extension in Extensions::of(bytes, length) {
            let (kind, data) = extension?;
            match kind {
                EXT_BACKING => {
                    let format = text(data, "format of the backing image")?;
                    let format = (!format.is_empty()).then_some(format);
                    let name = String::new();
                    self.backing = Some(BackingImage { name, format });
                }
                EXT_DATA_FILE => self.data_file = Some(text(data, "name of the data file")?),
                EXT_BITMAPS => {
                    let place = be64_at(data, 16).zip(be64_at(data, 8));
                    self.bitmaps = Some(
                        place.ok_or_else(|| refused("the extension of bitmaps is too short"))?,
                    );
                }
                EXT_SECTOR => self.sector = Some(sector(data)?),
                EXT_CRYPT => {
                    let place = be64_at(data, 0).zip(be64_at(data, 8));
                    let (at, len) = place
                        .ok_or_else(|| refused("the extension of the encryption is too short"))?;
                    self.crypt = Some(LuksPlace { at, len });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// An image is encrypted if it says so and where its keys are, and not otherwise.
    fn check_crypt(&mut self, method: u32) -> Result<(), Failure> {
        if method != LUKS {
            self.crypt = None;
            return Ok(());
        }
        let Some(LuksPlace { at, len }) = self.crypt else {
            return Err(refused(
                "the image is encrypted with LUKS and does not say where its keys are: the header is damaged",
            ));
        };
        let cluster = self.geometry.cluster();
        let is_inside = at.checked_add(len).is_some_and(|end| end <= MAX_OFFSET);
        if at < cluster || at % cluster != 0 || len > MAX_CRYPT || !is_inside {
            return Err(refused(format!(
                "the keys of {len} bytes at {at} cannot be there: the header is damaged"
            )));
        }
        match self.geometry.external {
            true => Err(Failure::unsupported(
                "the image is encrypted and has its data in another file, which is not supported: make one of both \
                 with qemu-img convert",
            )),
            false => Ok(()),
        }
    }

    fn read_backing(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let (at, len) = (be64_at(bytes, 8), be32_at(bytes, 16));
        let (Some(at @ 1..), Some(len)) = (at, len) else {
            // A format without an image means nothing.
            self.backing = None;
            return Ok(());
        };
        let name = usize::try_from(at)
            .ok()
            .filter(|_| len <= MAX_NAME)
            .and_then(|at| bytes.get(at..at.checked_add(len as usize)?))
            .ok_or_else(|| refused("the name of the backing image is not inside the header"))?;
        let name = text(name, "name of the backing image")?;
        let format = self.backing.take().and_then(|backing| backing.format);
        self.backing = (!name.is_empty()).then_some(BackingImage { name, format });
        Ok(())
    }
}

/// Understands the extension with the size of a sector.
fn sector(data: &[u8]) -> Result<u32, Failure> {
    let sector = be32_at(data, 0).filter(|size| is_sector(*size));
    sector.ok_or_else(|| {
        refused(
            "the header's extension with the size of a logical sector has neither 512 nor 4096 nor what is in \
             between: copy the image with qemu-img convert, which does not read it",
        )
    })
}

/// Whether a logical sector may have that many bytes.
pub(crate) fn is_sector(size: u32) -> bool {
    size.is_power_of_two() && (512..=4096).contains(&size)
}

fn encrypted(how: &str) -> Failure {
    Failure::unsupported(format!(
        "the image is encrypted with {how}, which is not supported: copy it with qemu-img convert into one that is \
         encrypted with LUKS, or not at all"
    ))
}

fn text(bytes: &[u8], what: &str) -> Result<String, Failure> {
    // Some have zeroes behind their last byte.
    let len = bytes.iter().rposition(|byte| *byte != 0);
    let bytes = &bytes[..len.map_or(0, |last| last + 1)];
    let text = std::str::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'));
    let text = text.ok_or_else(|| refused(format!("the {what} is no text")))?;
    Ok(text.to_string())
}

/// Names the features by the table that the image brings along.
fn unknown_features(bytes: &[u8], length: usize, unknown: u64) -> Failure {
    let table = Extensions::of(bytes, length)
        .map_while(Result::ok)
        .find(|(kind, _)| *kind == EXT_FEATURES)
        .map_or(&[][..], |(_, data)| data);
    let name = |bit: u8| {
        let row = table
            .chunks_exact(48)
            .find(|row| row[0] == 0 && row[1] == bit);
        let name = row.map(|row| String::from_utf8_lossy(&row[2..]).into_owned());
        let name = name.map(|name| name.trim_end_matches('\0').escape_default().to_string());
        name.unwrap_or_else(|| format!("bit {bit}"))
    };
    let names: Vec<String> = (0..64)
        .filter(|bit| unknown >> bit & 1 != 0)
        .map(name)
        .collect();
    Failure::unsupported(format!(
        "the image needs what is not known here: {}; convert it with qemu-img convert",
        names.join(", ")
    ))
}

/// The extensions behind a header.
pub(crate) struct Extensions<'b> {
    pub(crate) bytes: &'b [u8],
    pub(crate) at: usize,
}

impl<'b> Extensions<'b> {
    /// Iterates over the extensions of a header of `length` bytes. The name of the backing image ends them: old images
    /// of version 2 have it in place of the first one.
    pub(crate) fn of(bytes: &'b [u8], length: usize) -> Self {
        let name = be64_at(bytes, AT_NAME).and_then(|at| usize::try_from(at).ok());
        let end = name.filter(|at| *at >= length && *at <= bytes.len());
        Self {
            bytes: &bytes[..end.unwrap_or(bytes.len())],
            at: length,
        }
    }
}

impl<'b> Iterator for Extensions<'b> {
    type Item = Result<(u32, &'b [u8]), Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        let kind = be32_at(self.bytes, self.at).filter(|kind| *kind != 0)?;
        let from = self.at.checked_add(8)?;
        let data = be32_at(self.bytes, self.at + 4)
            .and_then(|len| self.bytes.get(from..from.checked_add(len as usize)?));
        let Some(data) = data else {
            self.at = usize::MAX;
            return Some(Err(refused(
                "an extension of the header is not inside its cluster",
            )));
        };
        // The data is inside, so this does not overflow.
        self.at = from + data.len().next_multiple_of(8);
        Some(Ok((kind, data)))
    }
}
