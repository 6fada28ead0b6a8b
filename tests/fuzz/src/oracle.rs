// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A second, independent reading of the protocol: the meaning of a slot, and whether it is allowed.
//!
//! Written from the field offsets in wide integers and without any code of the crate, so that a
//! mistake has to be made twice to go unseen.

use ring::abi::{Protocol, RawSegment};
use ring::request::{
    Direction, Indirect, Ordering, RawRequest, Reject, RequestLimits, RingRequest,
};
use zerocopy::FromBytes;

/// Kind of the verdict on a request; the callers count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum VerdictKind {
    /// Refused with `BLKIF_RSP_ERROR`.
    Error,
    /// Refused with `BLKIF_RSP_EOPNOTSUPP`.
    NotSupported,
    /// A direct transfer.
    Direct,
    /// A flush without data.
    Flush,
    /// A discard.
    Discard,
    /// An indirect transfer.
    Indirect,
}

/// The slot's fields as this file reads them.
#[derive(Debug)]
struct Fields {
    operation: u8,
    byte1: u8,
    half2: u16,
    id: u64,
    sector: u64,
    /// Everything behind the sector number.
    rest: Vec<u8>,
}

fn fields(raw: &RawRequest) -> Fields {
    let (id_at, end) = match raw.protocol {
        Protocol::Abi64 => (8, 112),
        Protocol::Abi32 => (4, 108),
    };
    let b = &raw.bytes;
    Fields {
        operation: b[0],
        byte1: b[1],
        half2: u16::from_le_bytes([b[2], b[3]]),
        id: u64_at(b, id_at),
        sector: u64_at(b, id_at + 8),
        rest: b[id_at + 16..end].to_vec(),
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Returns true if the segments, each `(first, last)`, may be transferred at `sector`.
fn allowed(sector: u64, segs: &[(u8, u8)], write: bool, limits: &RequestLimits) -> bool {
    let block = u128::from(limits.block_sectors);
    let mut end = u128::from(sector);
    for &(first, last) in segs {
        if last > 7 || first > last {
            return false;
        }
        // The guest may begin a whole block at any sector of the page.
        let sectors = u128::from(last) + 1 - u128::from(first);
        if sectors % block != 0 {
            return false;
        }
        end += sectors;
    }
    let placed =
        segs.is_empty() || (u128::from(sector) % block == 0 && end <= u128::from(limits.sectors));
    placed && !(write && limits.read_only)
}

fn expected(f: &Fields, limits: &RequestLimits) -> VerdictKind {
    let verdict = |ok: bool, kind| if ok { kind } else { VerdictKind::Error };
    match f.operation {
        2 if !limits.barrier => VerdictKind::NotSupported,
        0..=3 => {
            let count = usize::from(f.byte1);
            if count > 11 || (count == 0 && f.operation < 2) {
                return VerdictKind::Error;
            }
            if count == 0 && f.operation == 3 {
                return VerdictKind::Flush;
            }
            let segs: Vec<(u8, u8)> = (0..count)
                .map(|n| (f.rest[n * 8 + 4], f.rest[n * 8 + 5]))
                .collect();
            let ok = allowed(f.sector, &segs, f.operation != 0, limits);
            verdict(ok, VerdictKind::Direct)
        }
        5 if !limits.discard => VerdictKind::NotSupported,
        5 => {
            let sectors = u64_at(&f.rest, 0);
            let block = u64::from(limits.block_sectors);
            let end = u128::from(f.sector) + u128::from(sectors);
            let inside = end <= u128::from(limits.sectors);
            let whole = f.sector % block == 0 && sectors % block == 0;
            verdict(inside && whole && !limits.read_only, VerdictKind::Discard)
        }
        6 => {
            let most = limits.max_indirect_segments.min(4096);
            let ok = (1..=most).contains(&f.half2)
                && (f.byte1 == 0 || (f.byte1 == 1 && !limits.read_only));
            verdict(ok, VerdictKind::Indirect)
        }
        _ => VerdictKind::NotSupported,
    }
}

/// Checks `raw` with the crate and compares all of the outcome with this file's own reading.
///
/// # Panics
///
/// Panics if they differ.
pub fn check(
    raw: &RawRequest,
    limits: &RequestLimits,
) -> (VerdictKind, Result<RingRequest, Reject>) {
    let f = fields(raw);
    let kind = expected(&f, limits);
    let got = raw.check(limits);
    match &got {
        Err(reject) => {
            let status = reject.response.status.to_wire();
            let echo = if f.operation == 6 {
                f.byte1
            } else {
                f.operation
            };
            assert_eq!(reject.response.id, f.id, "identifier of {f:?}");
            assert_eq!(reject.response.operation, echo, "operation of {f:?}");
            let want = match kind {
                VerdictKind::Error => -1,
                VerdictKind::NotSupported => -2,
                other => panic!("refused, expected {other:?}: {reject:?} {f:?} {limits:?}"),
            };
            assert_eq!(status, want, "status of {reject:?} for {f:?} {limits:?}");
        }
        Ok(request) => accepted(&f, kind, request, limits),
    }
    (kind, got)
}

fn accepted(f: &Fields, kind: VerdictKind, request: &RingRequest, limits: &RequestLimits) {
    match (kind, request) {
        (VerdictKind::Direct, RingRequest::Direct(d)) => {
            assert_eq!((d.id, d.operation), (f.id, f.operation));
            assert_eq!(d.direction == Direction::Write, f.operation != 0);
            let ordering = match f.operation {
                2 => Ordering::Barrier,
                3 => Ordering::PreFlush,
                _ => Ordering::Plain,
            };
            assert_eq!(d.ordering, ordering);
            assert_eq!(d.count(), u16::from(f.byte1));
            assert_eq!(
                d.segments().count(),
                usize::from(f.byte1),
                "segments dropped"
            );
            // A barrier without data must not hand the guest's sector to anyone.
            assert_eq!(d.sector, if f.byte1 == 0 { 0 } else { f.sector });
            for (n, s) in d.segments().enumerate() {
                let (first, last) = (u32::from(f.rest[n * 8 + 4]), u32::from(f.rest[n * 8 + 5]));
                assert_eq!(s.gref(), u32_at(&f.rest, n * 8));
                assert_eq!(
                    (s.offset(), s.len()),
                    (first * 512, (last + 1 - first) * 512)
                );
                assert_eq!(s.sectors() * 512, s.len());
                assert!(s.offset() + s.len() <= 4096 && !s.is_empty());
            }
        }
        (VerdictKind::Flush, RingRequest::Flush(id)) => assert_eq!(*id, f.id),
        (VerdictKind::Discard, RingRequest::Discard(d)) => {
            assert_eq!((d.id, d.sector), (f.id, f.sector));
            assert_eq!(d.sectors, u64_at(&f.rest, 0));
            assert_eq!(d.secure, f.byte1 & 1 == 1 && limits.secure_discard);
        }
        (VerdictKind::Indirect, RingRequest::Indirect(i)) => accepted_indirect(f, i),
        _ => panic!("expected {kind:?}, got {request:?} for {f:?} {limits:?}"),
    }
}

fn accepted_indirect(f: &Fields, i: &Indirect) {
    assert_eq!((i.id, i.operation, i.sector), (f.id, f.byte1, f.sector));
    assert_eq!(i.direction == Direction::Write, f.byte1 == 1);
    assert_eq!(i.count(), f.half2);
    let bytes = u32::from(f.half2) * 8;
    let descriptors: Vec<(u32, u32)> = i.descriptors().collect();
    assert_eq!(descriptors.len(), i.pages());
    assert_eq!(descriptors.len(), bytes.div_ceil(4096) as usize);
    assert_eq!(descriptors.iter().map(|d| d.1).sum::<u32>(), bytes);
    for (n, &(gref, len)) in descriptors.iter().enumerate() {
        // The segments' grants follow the handle and its padding.
        assert_eq!(gref, u32_at(&f.rest, 4 + n * 4));
        let full = n + 1 < descriptors.len();
        assert!(len <= 4096 && len > 0 && (!full || len == 4096));
    }
}

/// Checks the descriptors of an accepted indirect request and compares the outcome with this
/// file's own reading. Returns whether they were accepted.
///
/// # Panics
///
/// Panics if they differ.
pub fn check_segments(request: &Indirect, descriptors: &[[u8; 8]], limits: &RequestLimits) -> bool {
    let count = usize::from(request.count());
    let write = request.direction == Direction::Write;
    let used: Vec<(u8, u8)> = descriptors
        .iter()
        .take(count)
        .map(|d| (d[4], d[5]))
        .collect();
    let want = used.len() == count && allowed(request.sector, &used, write, limits);
    let raws = descriptors
        .iter()
        .map(|d| RawSegment::read_from_bytes(d).expect("eight bytes"));
    let mut seen = Vec::new();
    let got = request.check_segments(raws, limits, |segment| seen.push(segment));
    assert!(seen.len() <= count, "more segments than the request has");
    match got {
        Ok(()) => {
            assert_eq!(seen.len(), count, "segments were dropped");
            for (segment, raw) in seen.iter().zip(descriptors) {
                assert_eq!(segment.gref(), u32_at(raw, 0));
                assert_eq!(segment.offset(), u32::from(raw[4]) * 512);
            }
        }
        Err(reject) => {
            assert_eq!(reject.response.id, request.id);
            assert_eq!(reject.response.operation, request.operation);
            assert_eq!(reject.response.status.to_wire(), -1);
        }
    }
    assert_eq!(
        got.is_ok(),
        want,
        "{request:?} {used:?} {limits:?}: {got:?}"
    );
    want
}
