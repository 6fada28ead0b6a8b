// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Hostile frontends, H9 to H22 and H36: contents that a guest can write into a request.

use ring::abi::{self, Protocol, RawSegment};
use ring::request::{Indirect, RawRequest, Reason, Reject, RequestLimits, RingRequest};
use ring::response::ResponseStatus;
use zerocopy::FromBytes;

use crate::encode::{discard, indirect, other, rw, Seg};

const BOTH: [Protocol; 2] = [Protocol::Abi64, Protocol::Abi32];
const SECTORS: u64 = 1 << 20;

/// A disk that offers every feature.
pub(crate) const DISK: RequestLimits = RequestLimits {
    sectors: SECTORS,
    block_sectors: 1,
    read_only: false,
    max_indirect_segments: 256,
    flush: true,
    barrier: true,
    discard: true,
    secure_discard: true,
};

const READ_ONLY: RequestLimits = RequestLimits {
    read_only: true,
    ..DISK
};

const BLOCKS_OF_4096: RequestLimits = RequestLimits {
    block_sectors: 8,
    ..DISK
};

/// The refusal of `raw`, which must echo `id` and `operation`.
fn refused(raw: RawRequest, limits: &RequestLimits, id: u64, operation: u8) -> Reject {
    match raw.check(limits) {
        Err(reject) => {
            assert_eq!(reject.response.id, id, "wrong identifier");
            assert_eq!(reject.response.operation, operation, "wrong operation");
            reject
        }
        Ok(request) => panic!("accepted {request:?}"),
    }
}

/// `raw` must be an error for this reason.
fn error(raw: RawRequest, limits: &RequestLimits, id: u64, operation: u8, reason: Reason) {
    let reject = refused(raw, limits, id, operation);
    assert_eq!(reject.response.status, ResponseStatus::Error);
    assert_eq!(reject.reason, reason);
}

fn accepted(raw: RawRequest, limits: &RequestLimits) -> RingRequest {
    raw.check(limits)
        .unwrap_or_else(|e| panic!("refused: {e:?}"))
}

fn accepted_indirect(raw: RawRequest, limits: &RequestLimits) -> Indirect {
    match accepted(raw, limits) {
        RingRequest::Indirect(request) => request,
        request => panic!("not indirect: {request:?}"),
    }
}

fn raws(segs: &[Seg]) -> impl Iterator<Item = RawSegment> + '_ {
    segs.iter()
        .map(|s| RawSegment::read_from_bytes(&s.bytes()).expect("eight bytes"))
}

#[test]
fn h09_segment_count_out_of_range_is_an_error() {
    for p in BOTH {
        for op in [abi::OP_READ, abi::OP_WRITE] {
            error(rw(p, op, 3, 0, 0, &[]), &DISK, 3, op, Reason::SegmentCount);
        }
        for op in 0..=3 {
            for count in 12..=255 {
                let raw = rw(p, op, 4, 0, count, &[Seg::page(1); 11]);
                error(raw, &DISK, 4, op, Reason::SegmentCount);
            }
            for count in 1..=11 {
                let raw = rw(p, op, 4, 0, count, &[Seg::page(1); 11]);
                match accepted(raw, &DISK) {
                    RingRequest::Direct(d) => assert_eq!(d.segments().count(), usize::from(count)),
                    request => panic!("not direct: {request:?}"),
                }
            }
        }
    }
}

#[test]
fn h10_segment_outside_its_page_is_an_error() {
    for p in BOTH {
        for first in 0..=255 {
            for last in 0..=255 {
                let segs = [Seg::page(1), Seg::new(2, first, last)];
                let raw = rw(p, abi::OP_WRITE, 5, 0, 2, &segs);
                if first <= last && last < 8 {
                    accepted(raw, &DISK);
                } else {
                    error(raw, &DISK, 5, abi::OP_WRITE, Reason::SegmentBounds);
                }
                // The backend must ignore this pair beyond the count.
                accepted(rw(p, abi::OP_WRITE, 5, 0, 1, &segs), &DISK);
            }
        }
    }
}

#[test]
fn h11_sector_near_the_end_of_the_number_range_is_an_error() {
    let huge = RequestLimits {
        sectors: u64::MAX,
        ..DISK
    };
    for p in BOTH {
        for back in 0..16 {
            let sector = u64::MAX - back;
            let raw = rw(p, abi::OP_WRITE, 6, sector, 1, &[Seg::page(1)]);
            error(raw, &DISK, 6, abi::OP_WRITE, Reason::OutOfRange);
            if back < 8 {
                error(raw, &huge, 6, abi::OP_WRITE, Reason::OutOfRange);
            } else {
                accepted(raw, &huge);
            }
            let raw = discard(p, 0, 6, sector, 16);
            error(raw, &DISK, 6, abi::OP_DISCARD, Reason::OutOfRange);
            let raw = discard(p, 0, 6, 8, sector);
            error(
                raw,
                &huge,
                6,
                abi::OP_DISCARD,
                if back < 8 {
                    Reason::OutOfRange
                } else {
                    continue;
                },
            );
        }
    }
}

#[test]
fn h12_request_may_end_at_the_last_sector_and_not_behind_it() {
    for p in BOTH {
        for op in 0..=3 {
            let segs = [Seg::page(1), Seg::new(2, 3, 3)];
            accepted(rw(p, op, 7, SECTORS - 9, 2, &segs), &DISK);
            let raw = rw(p, op, 7, SECTORS - 8, 2, &segs);
            error(raw, &DISK, 7, op, Reason::OutOfRange);
        }
        accepted(discard(p, 0, 7, SECTORS - 9, 9), &DISK);
        error(
            discard(p, 0, 7, SECTORS - 8, 9),
            &DISK,
            7,
            abi::OP_DISCARD,
            Reason::OutOfRange,
        );
        for op in 0..=1 {
            let at = |sector| {
                let request = accepted_indirect(indirect(p, op, 7, sector, 2, [1; 8]), &DISK);
                let segs = [Seg::page(1), Seg::new(2, 3, 3)];
                request.check_segments(raws(&segs), &DISK, |_| {})
            };
            assert_eq!(at(SECTORS - 9), Ok(()));
            let reject = at(SECTORS - 8).expect_err("ran over the end");
            assert_eq!(reject.reason, Reason::OutOfRange);
            assert_eq!((reject.response.id, reject.response.operation), (7, op));
        }
    }
}

#[test]
fn h13_only_whole_logical_blocks_are_accepted() {
    for p in BOTH {
        for sector in 0..=16u64 {
            for first in 0..8 {
                for last in first..8 {
                    let whole = sector % 8 == 0 && first == 0 && last == 7;
                    let segs = [Seg::new(1, first, last)];
                    for op in 0..=3 {
                        let raw = rw(p, op, 8, sector, 1, &segs);
                        if whole {
                            accepted(raw, &BLOCKS_OF_4096);
                        } else {
                            error(raw, &BLOCKS_OF_4096, 8, op, Reason::Unaligned);
                        }
                    }
                    let request =
                        accepted_indirect(indirect(p, 1, 8, sector, 1, [1; 8]), &BLOCKS_OF_4096);
                    let got = request.check_segments(raws(&segs), &BLOCKS_OF_4096, |_| {});
                    assert_eq!(got.is_ok(), whole);
                }
            }
            for sectors in 0..=16 {
                let raw = discard(p, 0, 8, sector, sectors);
                if sector % 8 == 0 && sectors % 8 == 0 {
                    accepted(raw, &BLOCKS_OF_4096);
                } else {
                    error(raw, &BLOCKS_OF_4096, 8, abi::OP_DISCARD, Reason::Unaligned);
                }
            }
        }
    }
}

#[test]
fn h13_first_sect_in_part_of_a_block_is_accepted() {
    // Only the length of a segment must suit the block size. Direct I/O of a guest's process begins at any 512 bytes of
    // its memory, and blkfront sends it as it is.
    for (block_sectors, first) in [(2, 1), (2, 5), (4, 1), (4, 2), (4, 3)] {
        let limits = RequestLimits {
            block_sectors,
            ..DISK
        };
        let last = first + block_sectors as u8 - 1;
        for p in BOTH {
            for op in [abi::OP_READ, abi::OP_WRITE] {
                accepted(rw(p, op, 8, 0, 1, &[Seg::new(1, first, last)]), &limits);
                let short = rw(p, op, 8, 0, 1, &[Seg::new(1, first, last - 1)]);
                error(short, &limits, 8, op, Reason::Unaligned);
            }
        }
    }
}

#[test]
fn h14_read_only_disk_refuses_all_that_writes() {
    for p in BOTH {
        for op in [
            abi::OP_WRITE,
            abi::OP_WRITE_BARRIER,
            abi::OP_FLUSH_DISKCACHE,
        ] {
            let raw = rw(p, op, 9, 0, 1, &[Seg::page(1)]);
            error(raw, &READ_ONLY, 9, op, Reason::ReadOnly);
        }
        error(
            discard(p, 0, 9, 0, 8),
            &READ_ONLY,
            9,
            abi::OP_DISCARD,
            Reason::ReadOnly,
        );
        let raw = indirect(p, abi::OP_WRITE, 9, 0, 1, [1; 8]);
        error(raw, &READ_ONLY, 9, abi::OP_WRITE, Reason::ReadOnly);
        accepted(rw(p, abi::OP_READ, 9, 0, 1, &[Seg::page(1)]), &READ_ONLY);
        accepted_indirect(indirect(p, abi::OP_READ, 9, 0, 1, [1; 8]), &READ_ONLY);
        // A flush without data changes nothing and must not fail.
        let flush = rw(p, abi::OP_FLUSH_DISKCACHE, 9, 0, 0, &[]);
        assert!(matches!(accepted(flush, &READ_ONLY), RingRequest::Flush(9)));
    }
}

#[test]
fn h15_unknown_and_unoffered_operations_are_not_supported() {
    let plain = RequestLimits {
        barrier: false,
        discard: false,
        ..DISK
    };
    for p in BOTH {
        for op in (4..=255).filter(|op| ![5, 6].contains(op)) {
            let reject = refused(other(p, op, 10), &DISK, 10, op);
            assert_eq!(reject.response.status, ResponseStatus::NotSupported);
            assert_eq!(reject.reason, Reason::UnknownOperation);
        }
        for raw in [rw(p, 2, 10, 0, 1, &[Seg::page(1)]), discard(p, 0, 10, 0, 8)] {
            let reject = refused(raw, &plain, 10, raw.operation());
            assert_eq!(reject.response.status, ResponseStatus::NotSupported);
            assert_eq!(reject.reason, Reason::NotOffered);
        }
    }
}

#[test]
fn h16_identifier_is_echoed_verbatim() {
    for p in BOTH {
        for id in [0, 1, 0x0123_4567_89ab_cdef, u64::MAX - 1, u64::MAX] {
            refused(other(p, 200, id), &DISK, id, 200);
            refused(rw(p, 0, id, 0, 0, &[]), &DISK, id, 0);
            refused(discard(p, 0, id, u64::MAX, 1), &DISK, id, abi::OP_DISCARD);
            refused(indirect(p, 1, id, 0, 0, [0; 8]), &DISK, id, 1);
            let ids = [
                accepted(rw(p, 1, id, 0, 1, &[Seg::page(1)]), &DISK),
                accepted(rw(p, 3, id, 0, 0, &[]), &DISK),
                accepted(discard(p, 0, id, 0, 8), &DISK),
                accepted(indirect(p, 1, id, 0, 1, [0; 8]), &DISK),
            ]
            .map(|request| match request {
                RingRequest::Direct(d) => d.id,
                RingRequest::Flush(id) => id,
                RingRequest::Discard(d) => d.id,
                RingRequest::Indirect(i) => i.id,
            });
            assert_eq!(ids, [id; 4]);
        }
    }
}

#[test]
fn h17_handle_is_ignored() {
    for (p, behind) in [(Protocol::Abi64, 24), (Protocol::Abi32, 20)] {
        for byte in [0, 1, 0xff] {
            let mut raw = rw(p, abi::OP_READ, 11, 0, 1, &[Seg::page(1)]);
            raw.bytes[2..4].fill(byte);
            accepted(raw, &DISK);
            let mut raw = discard(p, 0, 11, 0, 8);
            raw.bytes[2..4].fill(byte);
            accepted(raw, &DISK);
            let mut raw = indirect(p, abi::OP_READ, 11, 0, 1, [5; 8]);
            raw.bytes[behind..behind + 2].fill(byte);
            let request = accepted_indirect(raw, &DISK);
            assert_eq!(request.descriptors().next(), Some((5, 8)));
        }
    }
}

#[test]
fn h18_sector_of_a_request_without_data_goes_nowhere() {
    for p in BOTH {
        for sector in [0, 1, SECTORS, SECTORS + 1, u64::MAX] {
            let flush = rw(p, abi::OP_FLUSH_DISKCACHE, 12, sector, 0, &[]);
            // `Flush` has no field that could carry it.
            assert!(matches!(accepted(flush, &DISK), RingRequest::Flush(12)));
            let barrier = rw(p, abi::OP_WRITE_BARRIER, 12, sector, 0, &[]);
            match accepted(barrier, &BLOCKS_OF_4096) {
                RingRequest::Direct(d) => assert_eq!((d.sector, d.count()), (0, 0)),
                request => panic!("not direct: {request:?}"),
            }
        }
    }
}

#[test]
fn h19_indirect_count_out_of_range_is_an_error() {
    for p in BOTH {
        for count in [0, 257, 258, 4096, 4097, 32768, 65535] {
            let raw = indirect(p, abi::OP_WRITE, 13, 0, count, [1; 8]);
            error(raw, &DISK, 13, abi::OP_WRITE, Reason::SegmentCount);
        }
        accepted_indirect(indirect(p, 0, 13, 0, 256, [1; 8]), &DISK);
        // Eight pages of descriptors are the end, whatever is advertised.
        let all = RequestLimits {
            max_indirect_segments: u16::MAX,
            ..DISK
        };
        let request = accepted_indirect(indirect(p, 0, 13, 0, 4096, [1; 8]), &all);
        assert_eq!((request.pages(), request.descriptors().count()), (8, 8));
        let raw = indirect(p, 0, 13, 0, 4097, [1; 8]);
        error(raw, &all, 13, 0, Reason::SegmentCount);
        // A disk that does not offer indirect requests accepts none.
        let none = RequestLimits {
            max_indirect_segments: 0,
            ..DISK
        };
        error(
            indirect(p, 0, 13, 0, 1, [1; 8]),
            &none,
            13,
            0,
            Reason::SegmentCount,
        );
    }
}

#[test]
fn h19_indirect_operation_is_read_or_write() {
    for p in BOTH {
        for op in 0..=255 {
            let raw = indirect(p, op, 14, 0, 1, [1; 8]);
            if op < 2 {
                assert_eq!(accepted_indirect(raw, &DISK).operation, op);
            } else {
                // The answer carries the inner operation, even a senseless one.
                error(raw, &DISK, 14, op, Reason::UnknownOperation);
            }
        }
    }
}

#[test]
fn h20_segments_are_read_once_and_in_order() {
    let request = accepted_indirect(indirect(Protocol::Abi64, 0, 15, 0, 3, [1; 8]), &DISK);
    let segs = [
        Seg::new(1, 0, 7),
        Seg::new(2, 1, 2),
        Seg::new(3, 7, 7),
        Seg::new(4, 9, 9),
    ];
    let mut reads = 0;
    let mut got = Vec::new();
    let counted = raws(&segs).inspect(|_| reads += 1);
    let outcome = request.check_segments(counted, &DISK, |s| {
        got.push((s.gref(), s.offset(), s.len()))
    });
    assert_eq!(outcome, Ok(()));
    assert_eq!(reads, 3, "a descriptor was read twice, or one too many");
    assert_eq!(got, [(1, 0, 4096), (2, 512, 1024), (3, 3584, 512)]);
}

#[test]
fn h20_missing_descriptors_are_an_error() {
    let request = accepted_indirect(indirect(Protocol::Abi64, 1, 15, 0, 3, [1; 8]), &DISK);
    let reject = request
        .check_segments(raws(&[Seg::page(1); 2]), &DISK, |_| {})
        .expect_err("accepted two of three segments");
    assert_eq!(reject.reason, Reason::SegmentCount);
    assert_eq!((reject.response.id, reject.response.operation), (15, 1));
}

#[test]
fn h21_only_the_needed_descriptor_pages_are_named() {
    let all = RequestLimits {
        max_indirect_segments: 4096,
        ..DISK
    };
    let grefs = [10, 11, 12, 13, 14, 15, 16, u32::MAX];
    for p in BOTH {
        for (count, want) in [
            (1, vec![(10, 8)]),
            (511, vec![(10, 4088)]),
            (512, vec![(10, 4096)]),
            (513, vec![(10, 4096), (11, 8)]),
            (1024, vec![(10, 4096), (11, 4096)]),
            (1025, vec![(10, 4096), (11, 4096), (12, 8)]),
        ] {
            let request = accepted_indirect(indirect(p, 0, 16, 0, count, grefs), &all);
            assert_eq!(
                request.descriptors().collect::<Vec<_>>(),
                want,
                "{count} segments"
            );
        }
    }
    let request = accepted_indirect(indirect(Protocol::Abi32, 1, 16, 0, 1, grefs), &all);
    let reject = request.reject(Reason::Grant);
    assert_eq!(reject.response.status, ResponseStatus::Error);
    assert_eq!((reject.response.id, reject.response.operation), (16, 1));
}

#[test]
fn h22_descriptor_page_may_be_a_data_page() {
    // Nothing forbids it; the checked segments are values and cannot change under the transfer.
    let request = accepted_indirect(indirect(Protocol::Abi64, 0, 17, 0, 2, [7; 8]), &DISK);
    let mut page: Vec<Seg> = vec![Seg::page(7), Seg::new(8, 0, 0)];
    let mut checked = Vec::new();
    assert_eq!(
        request.check_segments(raws(&page), &DISK, |s| checked.push(s)),
        Ok(())
    );
    page.fill(Seg::new(0, 255, 255));
    let seen: Vec<_> = checked
        .iter()
        .map(|s| (s.gref(), s.offset(), s.len()))
        .collect();
    assert_eq!(seen, [(7, 0, 4096), (8, 0, 512)]);
}

#[test]
fn h36_secure_discard_that_is_not_offered_is_a_plain_one() {
    let plain = RequestLimits {
        secure_discard: false,
        ..DISK
    };
    for p in BOTH {
        for flag in 0..=255 {
            for (limits, offered) in [(&DISK, true), (&plain, false)] {
                match accepted(discard(p, flag, 18, 0, 8), limits) {
                    RingRequest::Discard(d) => assert_eq!(d.secure, offered && flag & 1 == 1),
                    request => panic!("not a discard: {request:?}"),
                }
            }
        }
    }
}

#[test]
fn h10_indirect_segment_outside_its_page_is_an_error() {
    for bad in 0..5 {
        let mut segs = [Seg::page(1); 5];
        segs[bad] = Seg::new(1, 0, 8);
        let request = accepted_indirect(indirect(Protocol::Abi32, 1, 19, 0, 5, [1; 8]), &DISK);
        let mut handed = 0;
        let reject = request
            .check_segments(raws(&segs), &DISK, |_| handed += 1)
            .expect_err("accepted a segment of nine sectors");
        assert_eq!(reject.reason, Reason::SegmentBounds);
        assert_eq!(handed, bad, "an unchecked segment was handed out");
    }
}
