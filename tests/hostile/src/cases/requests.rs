// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Malformed requests, one at a time.

use super::{case, requests, AttackCase};
use crate::lab::Lab;
use crate::session::{FrontendShape, Session, WIDE};
use crate::vbd::Mode;
use crate::wire::{flush, rw, Seg, WireRequest, WireResponse, ERROR, OKAY, UNSUPPORTED};
use anyhow::{ensure, Result};
use ring::abi::{
    Protocol, OP_DISCARD, OP_FLUSH_DISKCACHE, OP_INDIRECT, OP_READ, OP_WRITE, OP_WRITE_BARRIER,
};
use std::sync::atomic::Ordering::Relaxed;

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            requests::h09_segment_counts,
            "0, 12 and 255 segments are errors"
        ),
        case!(
            requests::h10_segment_bounds,
            "sectors outside of a page are errors"
        ),
        case!(
            requests::h11_sectors_near_the_end_of_u64,
            "no sum of sectors wraps"
        ),
        case!(
            requests::h12_end_of_the_disk,
            "the last sector can be used, the next one not"
        ),
        case!(
            requests::h13_unaligned_to_the_block,
            "transfers that do not fit 4 KiB blocks"
        ),
        case!(
            requests::h14_read_only_disk,
            "nothing writes to a read-only disk"
        ),
        case!(
            requests::h15_unknown_operations,
            "unknown operations at full rate"
        ),
        case!(
            requests::h16_identifiers,
            "identifiers come back as they are, used twice or not"
        ),
        case!(requests::h17_handle, "the handle is not looked at"),
        case!(requests::h18_flush_with_garbage, "a flush has no sector"),
        case!(
            requests::h19_indirect_header,
            "bad counts and operations of indirect requests"
        ),
        case!(
            requests::r38_padding,
            "no byte of dom0 leaks in the padding of answers"
        ),
    ]
}

fn count_of(request: WireRequest, nr: u8) -> WireRequest {
    match request {
        WireRequest::Rw {
            op,
            handle,
            id,
            sector,
            segs,
            ..
        } => WireRequest::Rw {
            op,
            count: nr,
            handle,
            id,
            sector,
            segs,
        },
        other => other,
    }
}

fn h09_segment_counts(lab: &mut Lab) -> Result<()> {
    for protocol in [Protocol::Abi64, Protocol::Abi32] {
        let shape = FrontendShape { protocol, ..WIDE };
        let mut session = lab.session_on(&lab.disk, Mode::ReadWrite, shape)?;
        let segs = [session.seg(0); 11];
        for op in [OP_READ, OP_WRITE] {
            for nr in [0, 12, 13, 127, 128, 255] {
                let request = count_of(rw(op, u64::from(nr) << 33, 0, &segs), nr);
                session.expect(&request, ERROR)?;
            }
        }
        lab.finish_healthy(session)?;
    }
    Ok(())
}

fn h10_segment_bounds(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let gref = session.seg(0).gref;
    let bad = (8..=255u8)
        .map(|last| (0, last))
        .chain((1..8).map(|first| (first, first - 1)))
        .chain([(8, 8), (255, 255), (7, 0), (255, 7)]);
    for (first, last) in bad {
        for op in [OP_READ, OP_WRITE] {
            let good = session.seg(1);
            let segs = [good, Seg { gref, first, last }];
            session.expect(&rw(op, 1, 0, &segs), ERROR)?;
        }
    }
    lab.finish_healthy(session)
}

fn h11_sectors_near_the_end_of_u64(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let segs = [session.seg(0), session.seg(1)];
    let sectors = [
        u64::MAX,
        u64::MAX - 7,
        u64::MAX - 8,
        u64::MAX - 15,
        u64::MAX - 16,
        1 << 63,
        (1 << 63) - 8,
        1 << 55,
        (1 << 55) - 8,
        1 << 32,
    ];
    for sector in sectors {
        for op in [OP_READ, OP_WRITE] {
            session.expect(&rw(op, sector, sector, &segs), ERROR)?;
        }
        for length in [1, 16, u64::MAX - sector, u64::MAX] {
            let request = WireRequest::Discard {
                flag: 0,
                id: 2,
                sector,
                sectors: length,
            };
            session.expect(&request, ERROR)?;
        }
    }
    lab.finish_healthy(session)
}

fn h12_end_of_the_disk(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let end = session.sectors;
    let page = session.seg(0);
    let one = Seg {
        first: 3,
        last: 3,
        ..page
    };
    for op in [OP_WRITE, OP_READ] {
        session.expect(&rw(op, 1, end - 1, &[one]), OKAY)?;
        session.expect(&rw(op, 2, end - 8, &[page]), OKAY)?;
        for sector in [end - 7, end - 1, end, end + 1] {
            session.expect(&rw(op, 3, sector, &[page]), ERROR)?;
        }
        session.expect(&rw(op, 4, end, &[one]), ERROR)?;
    }
    lab.finish_healthy(session)
}

fn h13_unaligned_to_the_block(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session_on(&lab.coarse, Mode::ReadWrite, WIDE)?;
    session.exercise(0, 1)?;
    let gref = session.seg(0).gref;
    for first in 0..8u8 {
        for last in first..8 {
            for sector in 0..8u64 {
                let whole = first == 0 && last == 7 && sector == 0;
                let segs = [Seg { gref, first, last }];
                let status = if whole { OKAY } else { ERROR };
                session.expect(&rw(OP_READ, 1, sector, &segs), status)?;
                if !whole {
                    session.expect(&rw(OP_WRITE, 1, sector, &segs), status)?;
                }
            }
        }
    }
    // Two halves of a block that are not adjacent are not whole blocks.
    let half = |first, last| Seg { gref, first, last };
    session.expect(&rw(OP_WRITE, 2, 8, &[half(0, 3), half(4, 7)]), ERROR)?;
    session.exercise(64, 2)?;
    session.finish()
}

/// An indirect read or write of 16 pages that claims to have `count` segments.
fn indirect(session: &Session, op: u8, claimed: u16, sector: u64) -> WireRequest {
    match session.indirect(op, sector, &session.segs(16)) {
        WireRequest::Indirect {
            op,
            id,
            sector,
            grefs,
            ..
        } => WireRequest::Indirect {
            op,
            count: claimed,
            id,
            sector,
            grefs,
        },
        other => other,
    }
}

fn h14_read_only_disk(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    session.exercise(256, 77)?;
    session.finish()?;
    let mut session = lab.session_on(&lab.disk, Mode::ReadOnly, WIDE)?;
    let seg = session.seg(0);
    let before = read_page(&mut session, 256)?;
    session.data.fill(0xee);
    let mut writes = vec![
        rw(OP_WRITE, 1, 256, &[seg]),
        rw(OP_WRITE_BARRIER, 2, 256, &[seg]),
        rw(OP_FLUSH_DISKCACHE, 3, 256, &[seg]),
        WireRequest::Discard {
            flag: 0,
            id: 4,
            sector: 256,
            sectors: 8,
        },
        WireRequest::Discard {
            flag: 1,
            id: 5,
            sector: 256,
            sectors: 8,
        },
    ];
    writes.push(indirect(&session, OP_WRITE, 16, 256));
    for request in &writes {
        let answer = session.queue().call(request)?;
        ensure!(
            answer.status != OKAY,
            "a read-only disk accepted {request:?}"
        );
    }
    let answer = session.queue().call(&flush(6))?;
    ensure!(
        answer.status == OKAY || answer.status == UNSUPPORTED,
        "a flush of a read-only disk got status {}",
        answer.status
    );
    let after = read_page(&mut session, 256)?;
    ensure!(before == after, "the content of a read-only disk changed");
    session.finish()
}

fn read_page(session: &mut Session, sector: u64) -> Result<Vec<u32>> {
    let seg = session.seg(0);
    session.expect(&rw(OP_READ, 99, sector, &[seg]), OKAY)?;
    let words = session.data.page(0).iter();
    Ok(words.map(|word| word.load(Relaxed)).collect())
}

fn h15_unknown_operations(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    for round in 0..40 {
        let unknown = (0..=255u8).filter(|op| *op == 4 || *op > OP_INDIRECT);
        let requests: Vec<WireRequest> = unknown
            .map(|op| WireRequest::Other {
                op,
                id: round << 40 | u64::from(op),
            })
            .collect();
        let answers = session.queue().batch(&requests)?;
        for (request, answer) in requests.iter().zip(&answers) {
            ensure!(
                (answer.id, answer.op, answer.status)
                    == (request.id(), request.echo(), UNSUPPORTED),
                "{answer:?} answers {request:?}"
            );
        }
    }
    lab.bystander()?;
    lab.finish_healthy(session)
}

fn h16_identifiers(lab: &mut Lab) -> Result<()> {
    for protocol in [Protocol::Abi64, Protocol::Abi32] {
        let shape = FrontendShape { protocol, ..WIDE };
        let mut session = lab.session_on(&lab.disk, Mode::ReadWrite, shape)?;
        let seg = session.seg(0);
        for id in [0, 1, u64::MAX, 1 << 63, 0x0123_4567_89ab_cdef] {
            let requests = vec![rw(OP_READ, id, 0, &[seg]); 32];
            let answers = session.queue().batch(&requests)?;
            let right = |answer: &&WireResponse| answer.id == id && answer.status == OKAY;
            ensure!(
                answers.iter().filter(right).count() == 32,
                "32 requests with identifier {id:#x} got {answers:?}"
            );
        }
        lab.finish_healthy(session)?;
    }
    Ok(())
}

fn h17_handle(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    for handle in [0, 1, 0x7fff, 0xffff] {
        let request = WireRequest::Rw {
            op: OP_READ,
            count: 1,
            handle,
            id: 1,
            sector: 0,
            segs: vec![session.seg(0)],
        };
        session.expect(&request, OKAY)?;
    }
    lab.finish_healthy(session)
}

fn h18_flush_with_garbage(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    for sector in [0, 1, session.sectors, 1 << 63, u64::MAX] {
        session.expect(&rw(OP_FLUSH_DISKCACHE, 1, sector, &[]), OKAY)?;
        let barrier = session
            .queue()
            .call(&rw(OP_WRITE_BARRIER, 2, sector, &[]))?;
        ensure!(
            barrier.status != ERROR,
            "a barrier without data is no error, whatever its sector"
        );
    }
    let seg = session.seg(0);
    let request = rw(OP_FLUSH_DISKCACHE, 3, u64::MAX, &[seg]);
    session.expect(&request, ERROR)?;
    lab.finish_healthy(session)
}

fn h19_indirect_header(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let max = session.vbd.offered("feature-max-indirect-segments")?;
    let max = u16::try_from(max.unwrap_or(0))?;
    ensure!(max >= 16, "the backend offers only {max} indirect segments");
    let good = indirect(&session, OP_READ, 16, 0);
    session.expect(&good, OKAY)?;
    for count in [0, max + 1, 513, 4096, 4097, 0x8000, u16::MAX] {
        for op in [OP_READ, OP_WRITE] {
            let request = indirect(&session, op, count, 0);
            session.expect(&request, ERROR)?;
        }
    }
    for op in OP_WRITE_BARRIER..=255 {
        let request = indirect(&session, op, 16, 0);
        let answer = session.queue().call(&request)?;
        ensure!(
            answer.status == ERROR || (op != OP_DISCARD && answer.status == UNSUPPORTED),
            "an indirect operation {op} got status {}",
            answer.status
        );
    }
    lab.finish_healthy(session)
}

fn r38_padding(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    session.queue().pages.bytes()[64..]
        .iter()
        .for_each(|byte| byte.store(0xa5, Relaxed));
    let seg = session.seg(0);
    let requests = [
        rw(OP_READ, 1, 0, &[seg]),
        rw(OP_READ, 2, u64::MAX, &[seg]),
        rw(OP_WRITE, 3, 0, &[]),
        flush(4),
        WireRequest::Other { op: 200, id: 5 },
        WireRequest::Discard {
            flag: 0,
            id: 6,
            sector: 1 << 60,
            sectors: 8,
        },
        indirect(&session, OP_READ, 0, 0),
    ];
    for request in &requests {
        let index = session.queue().prod();
        let answer = session.queue().call(request)?;
        ensure!(
            answer.padding == [0; 5],
            "the answer to {request:?} has padding {:x?}",
            answer.padding
        );
        // Behind the answer the slot has the bytes that the frontend wrote, not memory of dom0.
        let sent = request.encode(Protocol::Abi64);
        let slot = session.queue().slot(index);
        let same = slot.iter().zip(sent).skip(16);
        ensure!(
            same.clone().all(|(now, then)| now.load(Relaxed) == then),
            "the backend wrote behind the answer to {request:?}"
        );
    }
    lab.finish_healthy(session)
}
