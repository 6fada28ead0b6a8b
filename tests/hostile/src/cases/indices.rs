// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Attacks on the indices of the ring.

use super::{case, indices, AttackCase};
use crate::lab::Lab;
use crate::queue::{HonestRing, ANSWER};
use crate::session::{self, Session, WIDE};
use crate::vbd::{state, Mode};
use crate::wire::{flush, rw, OKAY};
use anyhow::{ensure, Result};
use ring::abi::{OP_READ, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::Release};
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            indices::h01_req_prod_jumps,
            "a producer index beyond the ring stops the ring, and only that"
        ),
        case!(
            indices::h02_req_prod_wraps,
            "indices pass 2^32, and going backwards takes nothing"
        ),
        case!(
            indices::h03_req_prod_moves_during_the_pass,
            "a producer index that changes all the time makes no request appear twice"
        ),
        case!(
            indices::h04_backend_words_overwritten,
            "rsp_prod and req_event are the guest's memory and never read back"
        ),
        case!(
            indices::h05_rsp_event_extremes,
            "no rsp_event makes the backend send more than one event a push, or lose work"
        ),
        case!(
            indices::h06_answers_never_consumed,
            "answers that nobody takes do not make the backend run over them"
        ),
        case!(
            indices::h07_attach_to_garbage,
            "a ring attached in the middle of its life goes on; an impossible one is refused"
        ),
    ]
}

/// Time in which an answer would have arrived, if there was one.
const SILENCE: Duration = Duration::from_millis(300);

/// Checks that no answer arrives on the ring any more.
fn expect_silence(session: &mut Session) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < SILENCE {
        let produced = session.queue().word(RSP_PROD).load(Relaxed);
        ensure!(
            produced == session.queue().prod().wrapping_sub(1),
            "a stopped ring was answered: rsp_prod is {produced}"
        );
        session.queue().channel.wait(Duration::from_millis(20))?;
    }
    Ok(())
}

fn h01_req_prod_jumps(lab: &mut Lab) -> Result<()> {
    for jump in [33u32, 64, 0x7fff_ffff, 0x8000_0000, 0xffff_0000, u32::MAX] {
        let mut session = lab.session()?;
        session.expect(&flush(1), OKAY)?;
        let queue = session.queue();
        let bad = queue.prod().wrapping_add(jump);
        queue.word(REQ_PROD).store(bad, Release);
        queue.channel.notify()?;
        // The backend reports the error, so wait for that before writing anything else.
        let vbd = &session.vbd;
        let path = vbd.error_node();
        vbd.store
            .wait(&path, "the report", ANSWER, |v| v.is_some())?;
        session.queue().push(&flush(2));
        session.queue().publish()?;
        expect_silence(&mut session)?;
        session.reconnect(WIDE)?;
        lab.finish_healthy(session)?;
    }
    Ok(())
}

fn h02_req_prod_wraps(lab: &mut Lab) -> Result<()> {
    let mut queues = session::queues(WIDE)?;
    queues[0].start_at(0xffff_fff0);
    let mut session = Session::connect(lab.attach()?, lab.disk.sectors, WIDE, queues)?;
    for id in 0..64 {
        session.expect(&flush(id), OKAY)?;
    }
    ensure!(session.queue().prod() < 64, "the indices did not pass 2^32");
    lab.finish_healthy(session)?;
    // A frontend that takes back a request that the backend has taken has no effect, because it is in flight.
    let mut session = lab.session_on(&lab.slow, Mode::ReadWrite, WIDE)?;
    for back in [1u32, 2, 3, 4] {
        let seg = session.seg(0);
        let queue = session.queue();
        for id in 0..4 {
            queue.push(&rw(OP_READ, id, 0, &[seg]));
        }
        queue.publish()?;
        let real = queue.prod();
        queue.word(REQ_PROD).store(real.wrapping_sub(back), Release);
        queue.channel.notify()?;
        queue.word(REQ_PROD).store(real, Release);
        queue.channel.notify()?;
        ensure!(
            queue.wait(4, ANSWER)?.len() == 4,
            "more answers than requests"
        );
    }
    lab.finish_healthy(session)
}

fn h03_req_prod_moves_during_the_pass(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let stop = AtomicBool::new(false);
    for round in 0..200u64 {
        let queue = session.queue();
        let base = queue.prod();
        for id in 0..u64::from(queue.size()) {
            queue.push(&flush(round << 8 | id));
        }
        let full = queue.prod();
        stop.store(false, Relaxed);
        thread::scope(|scope| -> Result<()> {
            let word = queue.word(REQ_PROD);
            let stop = &stop;
            let mover = scope.spawn(move || {
                // Only forwards, because an index behind the published answers is an impossible one.
                let mut index = base;
                while index != full {
                    index = index.wrapping_add(1);
                    word.store(index, Release);
                    if stop.load(Relaxed) {
                        word.store(full, Release);
                        return;
                    }
                    thread::yield_now();
                }
            });
            for _ in 0..20 {
                queue.channel.notify()?;
            }
            stop.store(true, Relaxed);
            mover.join().map_err(|_| anyhow::anyhow!("the mover died"))
        })?;
        queue.publish()?;
        let answers = queue.wait(queue.size() as usize, ANSWER)?;
        let mut ids: Vec<u64> = answers.iter().map(|answer| answer.id & 0xff).collect();
        ids.sort_unstable();
        ensure!(
            ids == (0..u64::from(queue.size())).collect::<Vec<_>>(),
            "round {round}: the answers are {ids:?}"
        );
    }
    lab.finish_healthy(session)
}

fn h04_backend_words_overwritten(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let stop = AtomicBool::new(false);
    for round in 0..50u64 {
        let queue = session.queue();
        let base = queue.prod();
        for id in 0..u64::from(queue.size()) {
            // The high half of the identifier is where the answer has its padding.
            queue.push(&flush(0xa5a5_a5a5 << 32 | round << 8 | id));
        }
        stop.store(false, Relaxed);
        thread::scope(|scope| -> Result<()> {
            let (stop, queue) = (&stop, &*queue);
            let vandal = scope.spawn(move || {
                let mut junk = 1u32;
                while !stop.load(Relaxed) {
                    junk = junk.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
                    queue.word(RSP_PROD).store(junk, Relaxed);
                    queue.word(REQ_EVENT).store(!junk, Relaxed);
                }
            });
            queue.publish()?;
            // `rsp_prod` is meaningless now, but the slots have the answers.
            let outcome = wait_slots(queue, base);
            stop.store(true, Relaxed);
            vandal
                .join()
                .map_err(|_| anyhow::anyhow!("the vandal died"))?;
            outcome
        })?;
        queue.forget();
        // The next answer publishes the backend's own count.
        queue.push(&flush(round));
        queue.publish()?;
        let right = queue.prod();
        crate::wait::until("the backend's own rsp_prod", ANSWER, || {
            let now = queue.word(RSP_PROD).load(Relaxed);
            Ok((now == right).then_some(()))
        })?;
        queue.forget();
    }
    lab.finish_healthy(session)
}

/// Waits until the slots of a full ring hold answers.
fn wait_slots(queue: &HonestRing, base: u32) -> Result<()> {
    crate::wait::until("answers in all slots", ANSWER, || {
        let answered = (0..queue.size()).all(|index| {
            let slot = queue.slot(base.wrapping_add(index));
            slot[12..16].iter().all(|byte| byte.load(Relaxed) == 0)
        });
        Ok(answered.then_some(()))
    })
}

fn h05_rsp_event_extremes(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    for ahead in [0u32, 1, 2, 31, 32, 33, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
        let mut events = 0;
        const PUSHES: u32 = 40;
        for id in 0..PUSHES {
            let queue = session.queue();
            let event = queue.prod().wrapping_add(ahead);
            queue.word(RSP_EVENT).store(event, Relaxed);
            queue.push(&flush(u64::from(id)));
            queue.publish()?;
            crate::wait::until("an answer that no event told of", ANSWER, || {
                Ok(queue.take()?.pop())
            })?;
            while queue.channel.wait(Duration::ZERO)? {
                events += 1;
            }
        }
        ensure!(
            events <= PUSHES,
            "{events} events for {PUSHES} answers with rsp_event {ahead} ahead"
        );
    }
    lab.finish_healthy(session)
}

fn h06_answers_never_consumed(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let queue = session.queue();
    let size = queue.size();
    for id in 0..u64::from(size) {
        queue.push(&flush(id));
    }
    queue.publish()?;
    let full = queue.prod();
    crate::wait::until("all answers", ANSWER, || {
        Ok((queue.word(RSP_PROD).load(Relaxed) == full).then_some(()))
    })?;
    // The answers themselves are offered as requests now, again and again.
    for round in 1..=100u32 {
        let next = full.wrapping_add(size.wrapping_mul(round));
        queue.word(REQ_PROD).store(next, Release);
        queue.channel.notify()?;
        crate::wait::until("answers to answers", ANSWER, || {
            let produced = queue.word(RSP_PROD).load(Relaxed);
            ensure!(
                next.wrapping_sub(produced) <= size,
                "rsp_prod {produced} ran past req_prod {next}"
            );
            Ok((produced == next).then_some(()))
        })?;
    }
    session.reconnect(WIDE)?;
    lab.finish_healthy(session)
}

fn h07_attach_to_garbage(lab: &mut Lab) -> Result<()> {
    // Behind the published answers are requests that an earlier backend has not taken.
    let mut queues = session::queues(WIDE)?;
    let queue = &mut queues[0];
    queue.start_at(0xffff_fff0);
    queue.push(&flush(7));
    queue.word(REQ_PROD).store(queue.prod(), Release);
    let mut session = Session::connect(lab.attach()?, lab.disk.sectors, WIDE, queues)?;
    let answers = session.queue().wait(1, ANSWER)?;
    ensure!(answers[0].id == 7, "the waiting request was not answered");
    session.vbd.close()?;
    session.vbd.reopen()?;
    for (req_prod, rsp_prod) in [(0x50u32, 0u32), (0, 1), (0, 0xffff_ff00)] {
        let queues = session::queues(WIDE)?;
        queues[0].word(REQ_PROD).store(req_prod, Relaxed);
        queues[0].word(RSP_PROD).store(rsp_prod, Relaxed);
        let keys = session::keys(WIDE, &queues);
        session.vbd.store.write_all(&session.vbd.front, &keys)?;
        session.vbd.set_state(state::INITIALISED)?;
        let reached = session
            .vbd
            .wait_back("a verdict on the ring", &[state::CONNECTED, state::CLOSING])?;
        ensure!(
            reached == state::CLOSING,
            "a ring with req_prod {req_prod:#x} and rsp_prod {rsp_prod:#x} was accepted"
        );
        session.vbd.close()?;
        session.vbd.reopen()?;
    }
    session.queues = session::queues(WIDE)?;
    session.publish_keys(WIDE)?;
    lab.finish_healthy(session)
}
