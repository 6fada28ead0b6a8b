// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests as bytes, written as a frontend of either layout writes them.
//!
//! Offsets are spelled out on purpose: the tests must not share the driver's structures.

use ring::abi::Protocol;

/// A segment on the wire: grant reference, first and last sector.
pub type WireSegment = (u32, u8, u8);

/// Fields that follow the common ones.
#[derive(Clone, Debug)]
pub enum Tail {
    /// Read, write, barrier, flush: up to 11 segments.
    Segments(Vec<WireSegment>),
    /// Discard: number of sectors.
    Discard(u64),
    /// Indirect: descriptor pages.
    Indirect([u32; 8]),
}

/// A request on the wire.
#[derive(Clone, Debug)]
pub struct Wire {
    /// Operation.
    pub operation: u8,
    /// `nr_segments`, the discard flag, or `indirect_op`.
    pub second: u8,
    /// `handle`, or an indirect request's `nr_segments`.
    pub third: u16,
    /// Identifier.
    pub id: u64,
    /// First sector.
    pub sector: u64,
    /// The fields behind the common ones.
    pub tail: Tail,
}

/// Content of bytes without a meaning, as a guest leaves them.
const JUNK: u8 = 0xee;

/// Returns the bytes of a segment.
pub fn segment_bytes(segment: WireSegment) -> [u8; 8] {
    let (gref, first, last) = segment;
    let [a, b, c, d] = gref.to_le_bytes();
    [a, b, c, d, first, last, JUNK, JUNK]
}

impl Wire {
    /// Returns the bytes of the slot.
    pub fn bytes(&self, protocol: Protocol) -> Vec<u8> {
        let shift = match protocol {
            Protocol::Abi64 => 4,
            Protocol::Abi32 => 0,
        };
        let mut slot = vec![JUNK; protocol.slot_size()];
        let mut put = |at: usize, bytes: &[u8]| slot[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[self.operation, self.second]);
        put(2, &self.third.to_le_bytes());
        put(4 + shift, &self.id.to_le_bytes());
        put(12 + shift, &self.sector.to_le_bytes());
        match &self.tail {
            Tail::Segments(segments) => {
                for (i, segment) in segments.iter().take(11).enumerate() {
                    put(20 + shift + 8 * i, &segment_bytes(*segment));
                }
            }
            Tail::Discard(sectors) => put(20 + shift, &sectors.to_le_bytes()),
            Tail::Indirect(grefs) => {
                for (i, gref) in grefs.iter().enumerate() {
                    put(24 + shift + 4 * i, &gref.to_le_bytes());
                }
            }
        }
        slot
    }
}
