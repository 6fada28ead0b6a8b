// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The wire format: sizes, offsets and the raw structures of both slot layouts.
//!
//! Mirrors Xen's `public/io/blkif.h` and `public/io/ring.h`. Nothing here is checked: a value of these types only means
//! that its bytes were copied.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy_derive as zd;

/// Bytes of one ring page, fixed by the protocol whatever the page size of either domain.
pub const PAGE_SIZE: usize = 4096;
/// Bytes of one sector in every field of the protocol.
pub const SECTOR_SIZE: u32 = 512;
/// Sectors of one granted page.
pub const SECTORS_PER_PAGE: u8 = 8;
/// Bytes of the shared ring header in front of the slots.
pub const RING_HEADER_SIZE: usize = 64;
/// Returns how many words of 8 bytes of a slot of the 64-bit layout its request uses, from the first of them: fewer than the
/// slot has for a read or write with few segments, as most are. More than a slot has for all other requests.
#[inline]
pub const fn used_words(first: u64) -> usize {
    let [operation, segments, ..] = first.to_le_bytes();
    match operation {
        OP_READ | OP_WRITE if segments as usize <= MAX_DIRECT_SEGMENTS => 3 + segments as usize,
        _ => usize::MAX,
    }
}

/// Byte offset of `req_prod` in the header, written by the frontend.
pub const REQ_PROD: usize = 0;
/// Byte offset of `req_event` in the header, written by the backend.
pub const REQ_EVENT: usize = 4;
/// Byte offset of `rsp_prod` in the header, written by the backend.
pub const RSP_PROD: usize = 8;
/// Byte offset of `rsp_event` in the header, written by the frontend.
pub const RSP_EVENT: usize = 12;
/// Segments that a direct request can hold.
pub const MAX_DIRECT_SEGMENTS: usize = 11;
/// Grant references of indirect pages that an indirect request can hold.
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Segments that fit into one indirect page.
pub const SEGMENTS_PER_INDIRECT_PAGE: u16 = 512;
/// The largest ring of the protocol: 2^4 pages.
pub const MAX_RING_ORDER: u8 = 4;
/// Bytes of the larger of both slot layouts: a copied slot always fits.
pub const MAX_SLOT_SIZE: usize = 112;

/// `BLKIF_OP_READ`.
pub const OP_READ: u8 = 0;
/// `BLKIF_OP_WRITE`.
pub const OP_WRITE: u8 = 1;
/// `BLKIF_OP_WRITE_BARRIER`.
pub const OP_WRITE_BARRIER: u8 = 2;
/// `BLKIF_OP_FLUSH_DISKCACHE`.
pub const OP_FLUSH_DISKCACHE: u8 = 3;
/// `BLKIF_OP_DISCARD`.
pub const OP_DISCARD: u8 = 5;
/// `BLKIF_OP_INDIRECT`.
pub const OP_INDIRECT: u8 = 6;

/// `BLKIF_DISCARD_SECURE`: bit 0 of a discard request's flag byte.
pub const DISCARD_SECURE: u8 = 1;

/// The layout of the slots, chosen by the frontend's `protocol` key.
///
/// `x86_64-abi` and `arm-abi` are the native layout of every 64-bit build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 112-byte slots, 8-byte aligned identifiers: x86_64, arm and native.
    Abi64,
    /// 108-byte slots, 4-byte aligned identifiers: 32-bit x86 guests.
    Abi32,
}

impl Protocol {
    /// Bytes from one slot to the next.
    pub const fn slot_size(self) -> usize {
        match self {
            Protocol::Abi64 => 112,
            Protocol::Abi32 => 108,
        }
    }

    /// Slots of a ring of `2^order` pages: the largest power of two that fits.
    ///
    /// Returns `None` for an order above [`MAX_RING_ORDER`].
    pub const fn ring_size(self, order: u8) -> Option<u32> {
        if order > MAX_RING_ORDER {
            return None;
        }
        // Both layouts give 32 slots a page; `layout` in the tests derives it from the sizes.
        Some(32 << order)
    }
}

/// One segment: part of a granted page, in sectors, both ends inclusive.
#[derive(
    zd::FromBytes, zd::IntoBytes, zd::Immutable, zd::KnownLayout, zd::Unaligned, Clone, Copy, Debug,
)]
#[repr(C)]
pub struct RawSegment {
    /// Grant reference of the page.
    pub gref: U32,
    /// First sector of the page that takes part.
    pub first_sect: u8,
    /// Last sector of the page that takes part.
    pub last_sect: u8,
    /// Padding; guests do not clear it.
    pub pad: U16,
}

/// READ, WRITE, WRITE_BARRIER and FLUSH_DISKCACHE in the 64-bit layout.
#[derive(
    zd::FromBytes, zd::IntoBytes, zd::Immutable, zd::KnownLayout, zd::Unaligned, Clone, Copy, Debug,
)]
#[repr(C)]
pub struct RawRw64 {
    /// `BLKIF_OP_*`.
    pub operation: u8,
    /// Number of entries of `seg` in use.
    pub nr_segments: u8,
    /// Virtual device handle; informational.
    pub handle: U16,
    /// Padding.
    pub pad: U32,
    /// Guest's identifier, opaque, echoed in the response.
    pub id: U64,
    /// First sector on the disk.
    pub sector_number: U64,
    /// The segments.
    pub seg: [RawSegment; MAX_DIRECT_SEGMENTS],
}

/// READ, WRITE, WRITE_BARRIER and FLUSH_DISKCACHE in the 32-bit layout.
#[derive(
    zd::FromBytes, zd::IntoBytes, zd::Immutable, zd::KnownLayout, zd::Unaligned, Clone, Copy, Debug,
)]
#[repr(C)]
pub struct RawRw32 {
    /// `BLKIF_OP_*`.
    pub operation: u8,
    /// Number of entries of `seg` in use.
    pub nr_segments: u8,
    /// Virtual device handle; informational.
    pub handle: U16,
    /// Guest's identifier.
    pub id: U64,
    /// First sector on the disk.
    pub sector_number: U64,
    /// The segments.
    pub seg: [RawSegment; MAX_DIRECT_SEGMENTS],
}

/// DISCARD in the 64-bit layout.
#[derive(
    zd::FromBytes, zd::IntoBytes, zd::Immutable, zd::KnownLayout, zd::Unaligned, Clone, Copy, Debug,
)]
#[repr(C)]
pub struct RawDiscard64 {
    /// `BLKIF_OP_DISCARD`.
    pub operation: u8,
    /// [`DISCARD_SECURE`] or 0.
    pub flag: u8,
    /// Virtual device handle; informational.
    pub handle: U16,
    /// Padding.
    pub pad: U32,
    /// Guest's identifier.
    pub id: U64,
    /// First sector on the disk.
    pub sector_number: U64,
    /// Number of sectors.
    pub nr_sectors: U64,
}

/// DISCARD in the 32-bit layout.
#[derive(
    zd::FromBytes, zd::IntoBytes, zd::Immutable, zd::KnownLayout, zd::Unaligned, Clone, Copy, Debug,
)]
#[repr(C)]
pub struct RawDiscard32 {
    /// `BLKIF_OP_DISCARD`.
    pub operation: u8,
    /// [`DISCARD_SECURE`] or 0.
    pub flag: u8,
    /// Virtual device handle; informational.
    pub handle: U16,
    /// Guest's identifier.
    pub id: U64,
    /// First sector on the disk.
    pub sector_number: U64,
    /// Number of sectors.
    pub nr_sectors: U64,
}

/// INDIRECT in the 64-bit layout.
#[derive(
    zd::FromBytes, zd::IntoBytes, zd::Immutable, zd::KnownLayout, zd::Unaligned, Clone, Copy, Debug,
)]
#[repr(C)]
pub struct RawIndirect64 {
    /// `BLKIF_OP_INDIRECT`.
    pub operation: u8,
    /// `BLKIF_OP_READ` or `BLKIF_OP_WRITE`.
    pub indirect_op: u8,
    /// Segments in the indirect pages.
    pub nr_segments: U16,
    /// Padding.
    pub pad: U32,
    /// Guest's identifier.
    pub id: U64,
    /// First sector on the disk.
    pub sector_number: U64,
    /// Virtual device handle; informational.
    pub handle: U16,
    /// Padding.
    pub pad2: U16,
    /// Grant references of the indirect pages.
    pub indirect_grefs: [U32; MAX_INDIRECT_PAGES],
}

/// INDIRECT in the 32-bit layout.
#[derive(
    zd::FromBytes, zd::IntoBytes, zd::Immutable, zd::KnownLayout, zd::Unaligned, Clone, Copy, Debug,
)]
#[repr(C)]
pub struct RawIndirect32 {
    /// `BLKIF_OP_INDIRECT`.
    pub operation: u8,
    /// `BLKIF_OP_READ` or `BLKIF_OP_WRITE`.
    pub indirect_op: u8,
    /// Segments in the indirect pages.
    pub nr_segments: U16,
    /// Guest's identifier.
    pub id: U64,
    /// First sector on the disk.
    pub sector_number: U64,
    /// Virtual device handle; informational.
    pub handle: U16,
    /// Padding.
    pub pad2: U16,
    /// Grant references of the indirect pages.
    pub indirect_grefs: [U32; MAX_INDIRECT_PAGES],
}

/// Any other request in the 64-bit layout: only the identifier is known.
#[derive(
    zd::FromBytes, zd::IntoBytes, zd::Immutable, zd::KnownLayout, zd::Unaligned, Clone, Copy, Debug,
)]
#[repr(C)]
pub struct RawOther64 {
    /// The unknown operation.
    pub operation: u8,
    /// Padding.
    pub pad: [u8; 7],
    /// Guest's identifier.
    pub id: U64,
}

/// Any other request in the 32-bit layout: only the identifier is known.
#[derive(
    zd::FromBytes, zd::IntoBytes, zd::Immutable, zd::KnownLayout, zd::Unaligned, Clone, Copy, Debug,
)]
#[repr(C)]
pub struct RawOther32 {
    /// The unknown operation.
    pub operation: u8,
    /// Padding.
    pub pad: [u8; 3],
    /// Guest's identifier.
    pub id: U64,
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<RawSegment>() == 8);
    assert!(size_of::<RawRw64>() == 112 && size_of::<RawRw32>() == 108);
    assert!(offset_of!(RawRw64, id) == 8 && offset_of!(RawRw32, id) == 4);
    assert!(offset_of!(RawRw64, seg) == 24 && offset_of!(RawRw32, seg) == 20);
    assert!(
        offset_of!(RawDiscard64, nr_sectors) == 24 && offset_of!(RawDiscard32, nr_sectors) == 20
    );
    assert!(offset_of!(RawIndirect64, indirect_grefs) == 28);
    assert!(offset_of!(RawIndirect32, indirect_grefs) == 24);
    assert!(offset_of!(RawOther64, id) == 8 && offset_of!(RawOther32, id) == 4);
};
