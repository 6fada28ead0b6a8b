// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The description of a disk: the typed records of `SET_PARAMS`, checked.

use zerocopy::FromBytes;

use crate::ring::tap::abi;

/// Sectors of the largest disk: its bytes fit into an `i64`, as file offsets do.
pub const MAX_SECTORS: u64 = (i64::MAX as u64) >> 9;

const SECTOR: u32 = 512;
const MAX_LOGICAL_BLOCK: u32 = 4096;

/// Limits of discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Bytes, whole logical blocks.
    pub granularity: u32,
    /// Bytes of the first unit, less than the granularity, whole logical blocks.
    pub alignment: u32,
    /// Secure discards are understood.
    pub secure: bool,
}

/// The description of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Size in 512-byte sectors, whole logical blocks, from 1 to [`MAX_SECTORS`].
    pub sectors: u64,
    /// Bytes of a logical block: a power of two from 512 to 4096.
    pub logical_block: u32,
    /// Bytes of a physical block: a power of two, not below the logical one.
    pub physical_block: u32,
    /// Guests may only read.
    pub read_only: bool,
    /// The kernel delivers flushes.
    pub write_cache: bool,
    /// Limits of discards; `None` if the disk has no discard.
    pub discard: Option<Discard>,
    /// The disk may become smaller.
    pub may_shrink: bool,
}

/// Reason that a disk cannot take a new description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Guests know the disk with other properties: its blocks are too large now, its read-only flag changed, or it now
    /// has a volatile cache.
    Shape,
    /// The disk would be smaller than guests know it, without [`abi::GEOMETRY_MAY_SHRINK`].
    Smaller,
}

/// Fault of a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamError {
    /// The bytes end in the middle of a record.
    Truncated,
    /// A record's kind is not known.
    UnknownKind(u32),
    /// A record's kind is reserved for later.
    Kept(u32),
    /// A record has another length than its kind has.
    Length(u32),
    /// A kind of record occurs twice.
    Duplicate(u32),
    /// There is no [`abi::Geometry`].
    NoGeometry,
    /// A flag is not known, or a field that must be zero is not.
    Reserved,
    /// The size is 0, too large, or not whole logical blocks.
    Size,
    /// The logical or the physical block is no power of two in its range.
    Block,
    /// Granularity or alignment is out of range or not whole logical blocks.
    Discard,
}

impl Params {
    /// Reads and checks the records.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParamError> {
        let (mut geometry, mut discard) = (None, None);
        let mut rest = bytes;
        while !rest.is_empty() {
            let (head, behind) =
                abi::ParamHead::read_from_prefix(rest).map_err(|_| ParamError::Truncated)?;
            let len = usize::try_from(head.len).unwrap_or(usize::MAX);
            let (body, behind) = behind.split_at_checked(len).ok_or(ParamError::Truncated)?;
            rest = behind;
            match head.kind {
                abi::PARAM_GEOMETRY => record(head, body, &mut geometry)?,
                abi::PARAM_DISCARD => record(head, body, &mut discard)?,
                kind @ abi::kept::PARAM_MAPPING => return Err(ParamError::Kept(kind)),
                kind => return Err(ParamError::UnknownKind(kind)),
            }
        }
        let geometry: abi::Geometry = geometry.ok_or(ParamError::NoGeometry)?;
        let mut params = check_geometry(&geometry)?;
        if let Some(limits) = discard {
            params.discard = Some(check_discard(&limits, params.logical_block)?);
        }
        Ok(params)
    }

    /// Returns the operations that guests of this disk may ask for: one bit for each `OP_*`.
    pub fn operations(&self) -> u64 {
        let mut all = 1 << abi::OP_READ;
        if self.read_only {
            return all;
        }
        all |= 1 << abi::OP_WRITE;
        if self.write_cache {
            all |= 1 << abi::OP_FLUSH;
        }
        if let Some(discard) = self.discard {
            all |= 1 << abi::OP_DISCARD;
            all |= u64::from(discard.secure) << abi::OP_SECURE_DISCARD;
        }
        all
    }

    /// Returns the description that guests know after the disk changed to `next`, while they use it or between two
    /// processes: the first description, with the new size. Hints, such as the size of a physical block, depend on
    /// where an image lies, so they may differ, and the new ones are ignored.
    pub fn succeeded_by(&self, next: &Self) -> Result<Self, Unfit> {
        let fits = next.logical_block <= self.logical_block
            && whole(next.sectors, self.logical_block / SECTOR)
            && next.read_only == self.read_only
            && (self.write_cache || !next.write_cache);
        if !fits {
            return Err(Unfit::Shape);
        }
        if next.sectors < self.sectors && !next.may_shrink {
            return Err(Unfit::Smaller);
        }
        Ok(Self {
            sectors: next.sectors,
            ..*self
        })
    }
}

fn record<T: FromBytes>(
    head: abi::ParamHead,
    body: &[u8],
    place: &mut Option<T>,
) -> Result<(), ParamError> {
    let value = T::read_from_bytes(body).map_err(|_| ParamError::Length(head.kind))?;
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(ParamError::Duplicate(head.kind)),
    }
}

/// True for whole units; 0 units are whole.
fn whole(value: u64, unit: u32) -> bool {
    value.checked_rem(u64::from(unit)) == Some(0)
}

fn check_geometry(geometry: &abi::Geometry) -> Result<Params, ParamError> {
    let known = abi::GEOMETRY_READ_ONLY | abi::GEOMETRY_WRITE_CACHE | abi::GEOMETRY_MAY_SHRINK;
    if geometry.reserved != 0 || geometry.flags & !known != 0 {
        return Err(ParamError::Reserved);
    }
    let (logical, physical) = (geometry.logical_block, geometry.physical_block);
    let powers = logical.is_power_of_two() && physical.is_power_of_two();
    if !powers || !(SECTOR..=MAX_LOGICAL_BLOCK).contains(&logical) || physical < logical {
        return Err(ParamError::Block);
    }
    let sized = (1..=MAX_SECTORS).contains(&geometry.sectors);
    if !sized || !whole(geometry.sectors, logical / SECTOR) {
        return Err(ParamError::Size);
    }
    Ok(Params {
        sectors: geometry.sectors,
        logical_block: logical,
        physical_block: physical,
        read_only: geometry.flags & abi::GEOMETRY_READ_ONLY != 0,
        write_cache: geometry.flags & abi::GEOMETRY_WRITE_CACHE != 0,
        discard: None,
        may_shrink: geometry.flags & abi::GEOMETRY_MAY_SHRINK != 0,
    })
}

fn check_discard(limits: &abi::DiscardLimits, block: u32) -> Result<Discard, ParamError> {
    if limits.reserved != 0 || limits.secure > 1 {
        return Err(ParamError::Reserved);
    }
    let blocks = |bytes: u32| whole(u64::from(bytes), block);
    let aligned = blocks(limits.granularity) && blocks(limits.alignment);
    if !aligned || limits.alignment >= limits.granularity {
        return Err(ParamError::Discard);
    }
    Ok(Discard {
        granularity: limits.granularity,
        alignment: limits.alignment,
        secure: limits.secure == 1,
    })
}
