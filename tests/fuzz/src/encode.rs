// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Writes requests as a frontend does, from the offsets of the protocol and not from the driver's types.

use ring::abi::{self, Protocol, MAX_SLOT_SIZE};
use ring::request::RawRequest;

/// One segment as the guest writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seg {
    /// Grant reference.
    pub gref: u32,
    /// First sector in the page.
    pub first: u8,
    /// Last sector in the page.
    pub last: u8,
}

impl Seg {
    /// Returns a segment of grant `gref`.
    pub fn new(gref: u32, first: u8, last: u8) -> Self {
        Self { gref, first, last }
    }

    /// Returns a whole page.
    pub fn page(gref: u32) -> Self {
        Self::new(gref, 0, 7)
    }

    /// Returns the eight bytes of the descriptor; guests do not clear its padding.
    pub fn bytes(&self) -> [u8; 8] {
        let [a, b, c, d] = self.gref.to_le_bytes();
        [a, b, c, d, self.first, self.last, 0xa5, 0x5a]
    }
}

/// The bytes of a slot under construction.
pub struct EncodedSlot {
    bytes: [u8; MAX_SLOT_SIZE],
    protocol: Protocol,
}

impl EncodedSlot {
    /// Returns an empty slot full of the remains of an earlier request.
    pub fn new(protocol: Protocol, operation: u8) -> Self {
        let mut bytes = [0xcc; MAX_SLOT_SIZE];
        bytes[0] = operation;
        Self { bytes, protocol }
    }

    fn put(mut self, offset: usize, field: &[u8]) -> Self {
        self.bytes[offset..offset + field.len()].copy_from_slice(field);
        self
    }

    /// Returns the offset of the identifier; all later fields follow it.
    fn id_at(&self) -> usize {
        match self.protocol {
            Protocol::Abi64 => 8,
            Protocol::Abi32 => 4,
        }
    }

    fn id(self, id: u64) -> Self {
        let at = self.id_at();
        self.put(at, &id.to_le_bytes())
    }

    fn sector(self, sector: u64) -> Self {
        let at = self.id_at() + 8;
        self.put(at, &sector.to_le_bytes())
    }

    /// Returns the finished request.
    pub fn done(self) -> RawRequest {
        RawRequest {
            bytes: self.bytes,
            protocol: self.protocol,
        }
    }
}

/// Returns READ, WRITE, WRITE_BARRIER or FLUSH_DISKCACHE. `count` is the number of segments that the guest claims.
pub fn rw(p: Protocol, operation: u8, id: u64, sector: u64, count: u8, segs: &[Seg]) -> RawRequest {
    let mut slot = EncodedSlot::new(p, operation)
        .put(1, &[count])
        .id(id)
        .sector(sector);
    for (n, seg) in segs.iter().take(abi::MAX_DIRECT_SEGMENTS).enumerate() {
        let at = slot.id_at() + 16 + n * 8;
        slot = slot.put(at, &seg.bytes());
    }
    slot.done()
}

/// Returns DISCARD.
pub fn discard(p: Protocol, flag: u8, id: u64, sector: u64, sectors: u64) -> RawRequest {
    let slot = EncodedSlot::new(p, abi::OP_DISCARD).put(1, &[flag]);
    let at = slot.id_at() + 16;
    slot.id(id)
        .sector(sector)
        .put(at, &sectors.to_le_bytes())
        .done()
}

/// Returns INDIRECT.
pub fn indirect(
    p: Protocol,
    op: u8,
    id: u64,
    sector: u64,
    count: u16,
    grefs: [u32; 8],
) -> RawRequest {
    let mut slot = EncodedSlot::new(p, abi::OP_INDIRECT)
        .put(1, &[op])
        .put(2, &count.to_le_bytes())
        .id(id)
        .sector(sector);
    for (n, gref) in grefs.iter().enumerate() {
        let at = slot.id_at() + 20 + n * 4;
        slot = slot.put(at, &gref.to_le_bytes());
    }
    slot.done()
}

/// Returns an operation of which only the identifier is known.
pub fn other(p: Protocol, operation: u8, id: u64) -> RawRequest {
    EncodedSlot::new(p, operation).id(id).done()
}
