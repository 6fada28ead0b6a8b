// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Memory that changes while the backend reads it.

use super::{case, races, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::rng::Rng;
use crate::session::{Session, DESCRIPTOR_PAGE, MAPPED};
use crate::wire::{rw, ERROR, OKAY, UNSUPPORTED};
use anyhow::{anyhow, ensure, Result};
use ring::abi::{OP_READ, OP_WRITE, RING_HEADER_SIZE};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            races::h08_operation_and_count_flip,
            "operation and count change during the check"
        ),
        case!(
            races::h08_sector_and_segments_flip,
            "sector and segments change during the check"
        ),
        case!(
            races::h20_descriptors_flip,
            "indirect segments change while they are parsed"
        ),
    ]
}

/// Minimum number of changes, and the time limit for them.
const FLIPS: u64 = 1_000_000;
const LIMIT: Duration = Duration::from_secs(30);
/// Bytes of a slot of the native layout.
const SLOT: usize = 112;

/// Runs `attack` while another thread calls `flip` as fast as it can, until there are enough changes.
fn race(flip: impl Fn(&mut Rng) + Send, mut attack: impl FnMut(u64) -> Result<()>) -> Result<()> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = &stop;
        let flipper = scope.spawn(move || {
            let mut rng = Rng::new(8);
            let mut flips = 0u64;
            while !stop.load(Relaxed) {
                for _ in 0..100 {
                    flip(&mut rng);
                }
                flips += 100;
            }
            flips
        });
        let start = Instant::now();
        let mut outcome = Ok(());
        let mut round = 0;
        while outcome.is_ok() && round < 300 && start.elapsed() < Duration::from_secs(5) {
            outcome = attack(round);
            round += 1;
        }
        while outcome.is_ok() && round < 20 && start.elapsed() < LIMIT {
            outcome = attack(round);
            round += 1;
        }
        stop.store(true, Relaxed);
        let flips = flipper.join().map_err(|_| anyhow!("the flipper died"))?;
        outcome?;
        ensure!(
            flips >= FLIPS / 10 && round >= 20,
            "only {flips} changes in {round} rounds: the machine is too slow for this case"
        );
        Ok(())
    })
}

/// A full ring of reads and writes on two good pages.
fn fill(session: &mut Session, round: u64) -> Result<usize> {
    let segs = [session.seg(0), session.seg(1), session.seg(2)];
    let queue = session.queue();
    for id in 0..u64::from(queue.size()) {
        let op = if id % 2 == 0 { OP_READ } else { OP_WRITE };
        queue.push(&rw(op, round << 8 | id, 1024 + id * 8, &segs));
    }
    queue.publish()?;
    Ok(queue.size() as usize)
}

fn set(bytes: &[AtomicU8], at: usize, values: &[u8], rng: &mut Rng) {
    if let Some(byte) = bytes.get(at) {
        byte.store(rng.pick(values), Relaxed);
    }
}

fn h08_operation_and_count_flip(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let pages = session.queue().pages.clone();
    let flip = move |rng: &mut Rng| {
        let slot = RING_HEADER_SIZE + rng.below(32) as usize * SLOT;
        set(pages.bytes(), slot, &[0, 1, 2, 3, 4, 5, 6, 7, 255], rng);
        set(pages.bytes(), slot + 1, &[0, 1, 2, 11, 12, 255], rng);
    };
    race(flip, |round| {
        // The changes overwrite the answers, so these can only be counted.
        let count = fill(&mut session, round)?;
        let answers = session.queue().wait(count, ANSWER)?;
        ensure!(
            answers.len() == count,
            "{} answers to {count} requests",
            answers.len()
        );
        Ok(())
    })?;
    lab.finish_healthy(session)
}

fn h08_sector_and_segments_flip(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let pages = session.queue().pages.clone();
    let flip = move |rng: &mut Rng| {
        let slot = RING_HEADER_SIZE + rng.below(32) as usize * SLOT;
        let seg = slot + 24 + rng.below(4) as usize * 8;
        set(pages.bytes(), slot + 16, &[0, 8, 255], rng);
        set(
            pages.bytes(),
            slot + 16 + rng.below(8) as usize,
            &[0, 255],
            rng,
        );
        set(
            pages.bytes(),
            seg + rng.below(4) as usize,
            &[0, 1, 255],
            rng,
        );
        set(pages.bytes(), seg + 4, &[0, 7, 8, 255], rng);
        set(pages.bytes(), seg + 5, &[0, 7, 8, 255], rng);
    };
    race(flip, |round| {
        let count = fill(&mut session, round)?;
        let answers = session.queue().wait(count, ANSWER)?;
        let mut ids: Vec<u64> = answers.iter().map(|answer| answer.id).collect();
        ids.sort_unstable();
        let sent: Vec<u64> = (0..count as u64).map(|id| round << 8 | id).collect();
        ensure!(ids == sent, "the answers are for {ids:?}");
        for answer in answers {
            ensure!(
                [OKAY, ERROR].contains(&answer.status) && answer.op <= OP_WRITE,
                "an impossible answer {answer:?}"
            );
        }
        Ok(())
    })?;
    lab.finish_healthy(session)
}

fn h20_descriptors_flip(lab: &mut Lab) -> Result<()> {
    for count in [8, MAPPED] {
        let mut session = lab.session()?;
        let data = session.data.clone();
        let flip = move |rng: &mut Rng| {
            let entry = &data.page(DESCRIPTOR_PAGE)[rng.below(count as u64) as usize * 2..][..2];
            let gref = data.grefs()[rng.below(32) as usize];
            entry[0].store(rng.pick(&[gref, gref, gref, u32::MAX, 0]), Relaxed);
            entry[1].store(rng.pick(&[0x0700, 0x0700, 0x0707, 0xff00, 0x0007]), Relaxed);
        };
        race(flip, |_| {
            let segs = session.segs(count);
            let queue_size = session.queue().size() as usize;
            for index in 0..queue_size {
                let op = if index % 2 == 0 { OP_READ } else { OP_WRITE };
                let request = session.indirect(op, 1024, &segs);
                session.queue().push(&request);
            }
            session.queue().publish()?;
            let answers = session.queue().wait(queue_size, ANSWER)?;
            let known = |status| [OKAY, ERROR, UNSUPPORTED].contains(&status);
            ensure!(
                answers.len() == queue_size && answers.iter().all(|a| known(a.status)),
                "impossible answers {answers:?}"
            );
            Ok(())
        })?;
        lab.finish_healthy(session)?;
    }
    Ok(())
}
