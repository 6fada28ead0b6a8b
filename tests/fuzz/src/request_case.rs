// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The body of the fuzz target `request`: any bytes in a slot, any limits, both layouts.

use ring::abi::{Protocol, MAX_SLOT_SIZE};
use ring::request::{RawRequest, RequestLimits, RingRequest};

use crate::oracle::{self, VerdictKind};

/// Bytes of the input in front of the slot.
pub const PREFIX: usize = 14;

/// Runs one input: limits, slot, then descriptors of an indirect request.
///
/// Input too short to hold the limits and a slot is ignored. Returns the verdict on the request and, for an indirect
/// one, whether its descriptors were accepted.
pub fn run(data: &[u8]) -> Option<(VerdictKind, Option<bool>)> {
    let (prefix, rest) = data.split_at_checked(PREFIX)?;
    let (slot, rest) = rest.split_at_checked(MAX_SLOT_SIZE)?;
    let limits = limits(prefix);
    let mut raw = RawRequest {
        bytes: slot.try_into().ok()?,
        protocol: if prefix[0] & 1 == 0 {
            Protocol::Abi64
        } else {
            Protocol::Abi32
        },
    };
    let plausible = prefix[0] & 2 != 0;
    if plausible {
        shape(&mut raw, &limits);
    }
    let (kind, outcome) = oracle::check(&raw, &limits);
    let Ok(RingRequest::Indirect(request)) = outcome else {
        return Some((kind, None));
    };
    let descriptors: Vec<[u8; 8]> = (0..usize::from(request.count()))
        .map_while(|n| descriptor(rest, n, plausible, limits.block_sectors))
        .collect();
    let accepted = oracle::check_segments(&request, &descriptors, &limits);
    Some((kind, Some(accepted)))
}

fn limits(prefix: &[u8]) -> RequestLimits {
    let size = u64::from_le_bytes([
        prefix[4], prefix[5], prefix[6], prefix[7], prefix[8], prefix[9], prefix[10], prefix[11],
    ]);
    let flags = prefix[1];
    RequestLimits {
        // All magnitudes, not only the largest.
        sectors: size >> (prefix[2] % 64),
        block_sectors: 1 << (prefix[3] % 5),
        read_only: flags & 3 == 3,
        max_indirect_segments: u16::from_le_bytes([prefix[12], prefix[13]]),
        flush: flags & 4 != 0,
        barrier: flags & 8 != 0,
        discard: flags & 16 != 0,
        secure_discard: flags & 32 != 0,
    }
}

/// Moves the fields near their valid ranges; otherwise hardly any input passes the first check.
fn shape(raw: &mut RawRequest, limits: &RequestLimits) {
    let id_at = match raw.protocol {
        Protocol::Abi64 => 8,
        Protocol::Abi32 => 4,
    };
    let block = u64::from(limits.block_sectors);
    let b = &mut raw.bytes;
    b[0] %= 8;
    if b[0] == 6 {
        b[1] %= 3;
        let count = u16::from_le_bytes([b[2], b[3]]) % 600;
        b[2..4].copy_from_slice(&count.to_le_bytes());
    } else {
        b[1] %= 13;
    }
    let wide =
        |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().expect("eight bytes"));
    let sector = wide(b, id_at + 8) % limits.sectors.saturating_add(2) / block * block;
    b[id_at + 8..id_at + 16].copy_from_slice(&sector.to_le_bytes());
    let at = id_at + 16;
    if b[0] == 5 {
        let left = limits.sectors.saturating_sub(sector);
        let sectors = wide(b, at) % left.saturating_add(2) / block * block;
        b[at..at + 8].copy_from_slice(&sectors.to_le_bytes());
    } else if b[0] < 4 {
        for n in 0..11 {
            let seg: &mut [u8] = &mut b[at + n * 8..at + n * 8 + 8];
            shape_segment(seg, limits.block_sectors);
        }
    }
}

/// Makes most segments valid and leaves one in 32 unchanged.
fn shape_segment(seg: &mut [u8], block: u32) {
    if seg[6] % 32 == 0 {
        return;
    }
    let block = block.min(8) as u8;
    let first = seg[4] % (9 - block);
    let blocks = 1 + seg[5] % ((8 - first) / block);
    seg[4] = first;
    seg[5] = first + blocks * block - 1;
}

/// Returns the `n`th descriptor, the input repeated as needed; `None` if there is not even one.
fn descriptor(rest: &[u8], n: usize, plausible: bool, block: u32) -> Option<[u8; 8]> {
    let have = rest.len() / 8;
    // An input with the last byte 0xff breaks off early: fewer descriptors than announced.
    if have == 0 || (rest.last() == Some(&0xff) && n >= have) {
        return None;
    }
    let at = n % have * 8;
    let mut seg: [u8; 8] = rest[at..at + 8].try_into().ok()?;
    if plausible {
        shape_segment(&mut seg, block);
    }
    Some(seg)
}
