// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Discards and flushes with bad numbers.

use super::{case, ranges, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::{FrontendShape, WIDE};
use crate::vbd::Mode;
use crate::wire::{flush, rw, WireRequest, ERROR, OKAY};
use anyhow::{ensure, Result};
use ring::abi::{OP_DISCARD, OP_READ};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            ranges::h33_huge_discards,
            "discards of the whole disk do not starve reads or the end"
        ),
        case!(
            ranges::h34_bad_discards,
            "bad discards in numbers are errors without a word"
        ),
        case!(
            ranges::h35_flush_storm,
            "flushes on all queues leave the neighbour its share"
        ),
        case!(
            ranges::h36_secure_discard,
            "an unadvertised secure discard is a plain one"
        ),
    ]
}

fn discard(id: u64, sector: u64, sectors: u64) -> WireRequest {
    WireRequest::Discard {
        flag: 0,
        id,
        sector,
        sectors,
    }
}

fn h33_huge_discards(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session_on(&lab.slow, Mode::ReadWrite, WIDE)?;
    let (sectors, seg) = (session.sectors, session.seg(0));
    let queue = session.queue();
    for id in 0..32 {
        let huge = discard(id, 0, sectors);
        let request = if id % 2 == 0 {
            huge
        } else {
            rw(OP_READ, id, 0, &[seg])
        };
        queue.push(&request);
    }
    queue.publish()?;
    let answers = queue.wait(32, ANSWER)?;
    ensure!(
        answers.iter().all(|answer| answer.status == OKAY),
        "good requests failed: {answers:?}"
    );
    for id in 0..32 {
        queue.push(&discard(id, 0, sectors));
    }
    queue.publish()?;
    // `finish` has its own time limit.
    session.finish()
}

fn h34_bad_discards(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session_on(&lab.coarse, Mode::ReadWrite, WIDE)?;
    let end = session.sectors;
    let bad = [
        (1, 8),
        (0, 1),
        (7, 9),
        (0, end + 8),
        (end, 8),
        (end + 8, 8),
        (u64::MAX - 7, 8),
        (8, u64::MAX),
    ];
    for round in 0..100 {
        let requests: Vec<WireRequest> = (0..32)
            .map(|id| {
                let (sector, sectors) = bad[id % bad.len()];
                discard(round << 8 | id as u64, sector, sectors)
            })
            .collect();
        for answer in session.queue().batch(&requests)? {
            ensure!(
                answer.op == OP_DISCARD && answer.status == ERROR,
                "a bad discard got {answer:?}"
            );
        }
    }
    // A request without sectors is not an error.
    session.expect(&discard(1, 8, 0), OKAY)?;
    session.exercise(0, 3)?;
    session.finish()
}

fn h35_flush_storm(lab: &mut Lab) -> Result<()> {
    let vbd = lab.attach()?;
    let queues = vbd.offered("multi-queue-max-queues")?.unwrap_or(1).min(4) as usize;
    let shape = FrontendShape { queues, ..WIDE };
    let made = crate::session::queues(shape)?;
    let mut session = crate::session::Session::connect(vbd, lab.disk.sectors, shape, made)?;
    for round in 0..60 {
        for queue in &mut session.queues {
            for id in 0..32 {
                queue.push(&flush(id));
            }
            queue.publish()?;
        }
        if round % 20 == 0 {
            lab.bystander()?;
        }
        for queue in &mut session.queues {
            queue.wait(32, ANSWER)?;
        }
    }
    lab.finish_healthy(session)
}

fn h36_secure_discard(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let secure = session.vbd.offered("discard-secure")?;
    ensure!(
        secure.unwrap_or(0) == 0,
        "null_blk has no secure discard: {secure:?}"
    );
    for flag in [1, 2, 0x80, 0xff] {
        let request = WireRequest::Discard {
            flag,
            id: 1,
            sector: 0,
            sectors: 64,
        };
        session.expect(&request, OKAY)?;
    }
    lab.finish_healthy(session)
}
