// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Encoding of requests, good and bad, as the bytes of a slot, and decoding of answers.

use ring::abi::{self, Protocol, RawSegment, MAX_DIRECT_SEGMENTS, MAX_SLOT_SIZE};
use zerocopy::IntoBytes;

/// `BLKIF_RSP_OKAY`.
pub(crate) const OKAY: i16 = 0;
/// `BLKIF_RSP_ERROR`.
pub(crate) const ERROR: i16 = -1;
/// `BLKIF_RSP_EOPNOTSUPP`.
pub(crate) const UNSUPPORTED: i16 = -2;

/// Content of padding, as guests leave it.
const PAD: u8 = 0xa5;

/// A segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seg {
    /// Grant reference.
    pub(crate) gref: u32,
    /// First sector of the page.
    pub(crate) first: u8,
    /// Last sector of the page.
    pub(crate) last: u8,
}

impl Seg {
    /// Returns a whole page.
    pub(crate) fn page(gref: u32) -> Seg {
        Seg {
            gref,
            first: 0,
            last: 7,
        }
    }

    /// Returns the segment on the wire.
    pub(crate) fn raw(self) -> RawSegment {
        RawSegment {
            gref: self.gref.into(),
            first_sect: self.first,
            last_sect: self.last,
            pad: u16::from_ne_bytes([PAD; 2]).into(),
        }
    }
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WireRequest {
    /// READ, WRITE, WRITE_BARRIER, FLUSH_DISKCACHE.
    Rw {
        /// The operation.
        op: u8,
        /// The number of segments that it claims to have.
        count: u8,
        /// The handle.
        handle: u16,
        /// The identifier.
        id: u64,
        /// First sector.
        sector: u64,
        /// Up to 11 segments.
        segs: Vec<Seg>,
    },
    /// DISCARD.
    Discard {
        /// The flag byte.
        flag: u8,
        /// The identifier.
        id: u64,
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
    },
    /// INDIRECT.
    Indirect {
        /// The operation inside.
        op: u8,
        /// The number of segments that it claims to have.
        count: u16,
        /// The identifier.
        id: u64,
        /// First sector.
        sector: u64,
        /// The descriptor pages.
        grefs: [u32; 8],
    },
    /// Any other operation.
    Other {
        /// The operation.
        op: u8,
        /// The identifier.
        id: u64,
    },
}

/// Returns a plain transfer.
pub(crate) fn rw(op: u8, id: u64, sector: u64, segs: &[Seg]) -> WireRequest {
    WireRequest::Rw {
        op,
        count: segs.len() as u8,
        handle: 0,
        id,
        sector,
        segs: segs.to_vec(),
    }
}

/// Returns a flush.
pub(crate) fn flush(id: u64) -> WireRequest {
    rw(abi::OP_FLUSH_DISKCACHE, id, 0, &[])
}

impl WireRequest {
    /// Returns the identifier.
    pub(crate) fn id(&self) -> u64 {
        match self {
            WireRequest::Rw { id, .. }
            | WireRequest::Discard { id, .. }
            | WireRequest::Indirect { id, .. }
            | WireRequest::Other { id, .. } => *id,
        }
    }

    /// Returns the operation that its answer must name.
    pub(crate) fn echo(&self) -> u8 {
        match self {
            WireRequest::Rw { op, .. }
            | WireRequest::Indirect { op, .. }
            | WireRequest::Other { op, .. } => *op,
            WireRequest::Discard { .. } => abi::OP_DISCARD,
        }
    }

    /// Returns the bytes of its slot; bytes that the layout leaves unused hold the padding pattern.
    pub(crate) fn encode(&self, protocol: Protocol) -> [u8; MAX_SLOT_SIZE] {
        let mut slot = [PAD; MAX_SLOT_SIZE];
        let mut put = |bytes: &[u8]| slot[..bytes.len()].copy_from_slice(bytes);
        match protocol {
            Protocol::Abi64 => self.encode64(&mut put),
            Protocol::Abi32 => self.encode32(&mut put),
        }
        slot
    }

    fn encode64(&self, put: &mut dyn FnMut(&[u8])) {
        match self {
            WireRequest::Rw {
                op,
                count,
                handle,
                id,
                sector,
                segs,
            } => put(abi::RawRw64 {
                operation: *op,
                nr_segments: *count,
                handle: (*handle).into(),
                pad: u32::from_ne_bytes([PAD; 4]).into(),
                id: (*id).into(),
                sector_number: (*sector).into(),
                seg: raw_segments(segs),
            }
            .as_bytes()),
            WireRequest::Discard {
                flag,
                id,
                sector,
                sectors,
            } => put(abi::RawDiscard64 {
                operation: abi::OP_DISCARD,
                flag: *flag,
                handle: 0.into(),
                pad: u32::from_ne_bytes([PAD; 4]).into(),
                id: (*id).into(),
                sector_number: (*sector).into(),
                nr_sectors: (*sectors).into(),
            }
            .as_bytes()),
            WireRequest::Indirect {
                op,
                count,
                id,
                sector,
                grefs,
            } => put(abi::RawIndirect64 {
                operation: abi::OP_INDIRECT,
                indirect_op: *op,
                nr_segments: (*count).into(),
                pad: u32::from_ne_bytes([PAD; 4]).into(),
                id: (*id).into(),
                sector_number: (*sector).into(),
                handle: 0.into(),
                pad2: u16::from_ne_bytes([PAD; 2]).into(),
                indirect_grefs: grefs.map(Into::into),
            }
            .as_bytes()),
            WireRequest::Other { op, id } => put(abi::RawOther64 {
                operation: *op,
                pad: [PAD; 7],
                id: (*id).into(),
            }
            .as_bytes()),
        }
    }

    fn encode32(&self, put: &mut dyn FnMut(&[u8])) {
        match self {
            WireRequest::Rw {
                op,
                count,
                handle,
                id,
                sector,
                segs,
            } => put(abi::RawRw32 {
                operation: *op,
                nr_segments: *count,
                handle: (*handle).into(),
                id: (*id).into(),
                sector_number: (*sector).into(),
                seg: raw_segments(segs),
            }
            .as_bytes()),
            WireRequest::Discard {
                flag,
                id,
                sector,
                sectors,
            } => put(abi::RawDiscard32 {
                operation: abi::OP_DISCARD,
                flag: *flag,
                handle: 0.into(),
                id: (*id).into(),
                sector_number: (*sector).into(),
                nr_sectors: (*sectors).into(),
            }
            .as_bytes()),
            WireRequest::Indirect {
                op,
                count,
                id,
                sector,
                grefs,
            } => put(abi::RawIndirect32 {
                operation: abi::OP_INDIRECT,
                indirect_op: *op,
                nr_segments: (*count).into(),
                id: (*id).into(),
                sector_number: (*sector).into(),
                handle: 0.into(),
                pad2: u16::from_ne_bytes([PAD; 2]).into(),
                indirect_grefs: grefs.map(Into::into),
            }
            .as_bytes()),
            WireRequest::Other { op, id } => put(abi::RawOther32 {
                operation: *op,
                pad: [PAD; 3],
                id: (*id).into(),
            }
            .as_bytes()),
        }
    }
}

fn raw_segments(segs: &[Seg]) -> [RawSegment; MAX_DIRECT_SEGMENTS] {
    // Segments beyond the count have references that were never granted.
    let unused = Seg {
        gref: u32::from_ne_bytes([PAD; 4]),
        first: PAD,
        last: PAD,
    };
    std::array::from_fn(|index| segs.get(index).copied().unwrap_or(unused).raw())
}

/// An answer, with the padding of its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WireResponse {
    /// The identifier.
    pub(crate) id: u64,
    /// The operation.
    pub(crate) op: u8,
    /// The status.
    pub(crate) status: i16,
    /// The byte between operation and status, and the four behind the status in the 64-bit layout.
    pub(crate) padding: [u8; 5],
}

impl WireResponse {
    /// Reads an answer out of a slot.
    pub(crate) fn decode(slot: &[u8; MAX_SLOT_SIZE], protocol: Protocol) -> WireResponse {
        let tail = match protocol {
            Protocol::Abi64 => [slot[12], slot[13], slot[14], slot[15]],
            // The response of the 32-bit layout ends with its status.
            Protocol::Abi32 => [0; 4],
        };
        WireResponse {
            id: u64::from_le_bytes([
                slot[0], slot[1], slot[2], slot[3], slot[4], slot[5], slot[6], slot[7],
            ]),
            op: slot[8],
            status: i16::from_le_bytes([slot[10], slot[11]]),
            padding: [slot[9], tail[0], tail[1], tail[2], tail[3]],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{flush, rw, Seg, WireResponse};
    use ring::abi::{Protocol, OP_READ};

    #[test]
    fn both_layouts_put_the_identifier_where_the_header_says() {
        let request = rw(OP_READ, 0x0102_0304_0506_0708, 9, &[Seg::page(5)]);
        assert_eq!(request.encode(Protocol::Abi64)[8], 8);
        assert_eq!(request.encode(Protocol::Abi32)[4], 8);
        assert_eq!(flush(7).encode(Protocol::Abi64)[1], 0);
    }

    #[test]
    fn an_answer_is_decoded_with_its_padding() {
        let mut slot = [0xa5; 112];
        slot[..8].copy_from_slice(&3u64.to_le_bytes());
        slot[8..12].copy_from_slice(&[1, 0, 0xff, 0xff]);
        let answer = WireResponse::decode(&slot, Protocol::Abi64);
        assert_eq!((answer.id, answer.op, answer.status), (3, 1, -1));
        assert_eq!(answer.padding, [0, 0xa5, 0xa5, 0xa5, 0xa5]);
    }
}
