// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Closing and reconnecting at bad times.

use super::{case, closing, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::{Session, MAPPED, WIDE};
use crate::vbd::{state, Mode, SOON};
use crate::wire::{flush, rw, OKAY};
use anyhow::{anyhow, ensure, Context, Result};
use ring::abi::{OP_READ, OP_WRITE, REQ_PROD};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::Release};
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            closing::h45_destroyed_in_flight,
            "the guest is destroyed with a full ring on slow storage"
        ),
        case!(
            closing::h46_close_and_reconnect,
            "500 connections, or as many as a quarter of a minute holds"
        ),
        case!(
            closing::h47_closing_under_requests,
            "requests keep arriving while the frontend closes"
        ),
        case!(
            closing::h52_driver_taken_away,
            "the driver is unbound and bound again under requests; none is lost or served twice"
        ),
        case!(
            closing::h51_statistics_during_connects,
            "sysfs is read while connections come and go"
        ),
        case!(
            closing::h53_lets_go_late,
            "a frontend refuses for 12 seconds to close its disk, is served, and lets go"
        ),
    ]
}

/// Fills the ring with large and small requests that take a while.
fn fill(session: &mut Session) -> Result<()> {
    let segs = session.segs(MAPPED);
    for id in 0..session.queue().size() {
        let op = if id % 2 == 0 { OP_READ } else { OP_WRITE };
        let request = match id % 4 {
            0 | 1 => session.indirect(op, 1024, &segs),
            2 => rw(op, u64::from(id), 2048, &segs[..3]),
            _ => flush(u64::from(id)),
        };
        session.queue().push(&request);
    }
    session.queue().publish()
}

fn h45_destroyed_in_flight(lab: &mut Lab) -> Result<()> {
    for round in 0..6 {
        let mut session = lab.session_on(&lab.slow, Mode::ReadWrite, WIDE)?;
        fill(&mut session)?;
        let start = Instant::now();
        if round % 2 == 0 {
            session.vbd.destroy()?;
        } else {
            session.finish()?;
        }
        ensure!(start.elapsed() < SOON, "the end took {:?}", start.elapsed());
    }
    Ok(())
}

fn h46_close_and_reconnect(lab: &mut Lab) -> Result<()> {
    const TIMES: u32 = 500;
    const AT_LEAST: u32 = 20;
    let start = Instant::now();
    let mut session = lab.session()?;
    let mut times = 0;
    while times < TIMES && (times < AT_LEAST || start.elapsed() < Duration::from_secs(15)) {
        if times % 3 == 0 {
            fill(&mut session)?;
        }
        session.reconnect(WIDE)?;
        times += 1;
    }
    lab.finish_healthy(session)
}

fn h47_closing_under_requests(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    for _ in 0..8 {
        let stop = AtomicBool::new(false);
        for id in 0..session.queue().size() {
            session.queue().push(&flush(u64::from(id)));
        }
        let (pages, channel) = (
            session.queue().pages.clone(),
            session.queue().channel.clone(),
        );
        thread::scope(|scope| -> Result<()> {
            let stop = &stop;
            let pusher = scope.spawn(move || {
                let words = pages.words();
                let mut prod = words[REQ_PROD / 4].load(Relaxed);
                while !stop.load(Relaxed) {
                    // Never more than fits: the ring must not break.
                    let answered = words[ring::abi::RSP_PROD / 4].load(Relaxed);
                    if prod.wrapping_sub(answered) < 16 {
                        prod = prod.wrapping_add(1);
                        words[REQ_PROD / 4].store(prod, Release);
                    }
                    // Once the backend has closed, the channel has no peer, so an error here is expected.
                    let _nobody = channel.notify();
                }
            });
            let closed = session.vbd.close();
            stop.store(true, Relaxed);
            pusher.join().map_err(|_| anyhow!("the pusher died"))?;
            closed
        })?;
        session.queues = crate::session::queues(WIDE)?;
        session.vbd.reopen()?;
        session.publish_keys(WIDE)?;
    }
    lab.finish_healthy(session)
}

fn h52_driver_taken_away(lab: &mut Lab) -> Result<()> {
    const DRIVER: &str = "/sys/bus/xen-backend/drivers/xen-blkback-rs";
    let mut session = lab.session_on(&lab.slow, Mode::ReadWrite, WIDE)?;
    let sysfs = session.vbd.sysfs();
    let name = sysfs.file_name().context("a device has a name")?;
    let tell = |file: &str| {
        let path = format!("{DRIVER}/{file}");
        fs::write(&path, name.as_encoded_bytes()).with_context(|| format!("cannot write {path}"))
    };
    for round in 0..4u64 {
        let seg = session.seg(0);
        let first = round << 8;
        let queue = session.queue();
        for id in first..first + 8 {
            queue.push(&rw(OP_READ, id, id, &[seg]));
        }
        queue.publish()?;
        tell("unbind")?;
        for id in first + 8..first + 12 {
            queue.push(&rw(OP_READ, id, id, &[seg]));
        }
        queue.word(REQ_PROD).store(queue.prod(), Release);
        tell("bind")?;
        session
            .vbd
            .wait_back("Connected after the return", &[state::CONNECTED])?;
        let mut answers = session.queue().wait(12, ANSWER)?;
        answers.sort_unstable_by_key(|answer| answer.id);
        let ids: Vec<u64> = answers.iter().map(|answer| answer.id).collect();
        ensure!(
            ids == (first..first + 12).collect::<Vec<_>>(),
            "the answers are for {ids:?}"
        );
        ensure!(
            answers.iter().all(|answer| answer.status == OKAY),
            "good requests failed: {answers:?}"
        );
    }
    lab.finish_healthy(session)
}

fn h51_statistics_during_connects(lab: &mut Lab) -> Result<()> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let mut session = lab.session()?;
        let sysfs = session.vbd.sysfs();
        let stop = &stop;
        let reader = scope.spawn(move || {
            let mut reads = 0u64;
            while !stop.load(Relaxed) {
                reads += read_all(&sysfs);
            }
            reads
        });
        let mut outcome = Ok(());
        for seed in 0..10 {
            outcome = outcome
                .and_then(|()| session.exercise(0, seed))
                .and_then(|()| session.reconnect(WIDE));
        }
        let outcome = outcome.and_then(|()| session.finish());
        stop.store(true, Relaxed);
        let reads = reader.join().map_err(|_| anyhow!("the reader died"))?;
        outcome?;
        ensure!(reads > 100, "only {reads} attributes could be read");
        Ok(())
    })
}

/// Time for which a frontend refuses to close. libxl waits for 10 seconds before it gives up, so a backend that gives
/// up with it is found.
const REFUSES: Duration = Duration::from_secs(12);

fn h53_lets_go_late(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    // The toolstack's part of a detach.
    let ask = [("online", "0"), ("state", "5")].map(|(key, value)| (key.into(), value.into()));
    session.vbd.store.write_all(&session.vbd.back, &ask)?;
    let start = Instant::now();
    let mut seed = 0;
    while start.elapsed() < REFUSES {
        // blkfront stays Connected while a file system is mounted, and continues to send requests.
        session
            .exercise(0, seed)
            .with_context(|| format!("{:?} after the request to close", start.elapsed()))?;
        seed += 1;
        let state = session.vbd.back_state()?;
        ensure!(
            state == Some(state::CLOSING),
            "the backend is in state {state:?} while its frontend is Connected"
        );
        ensure!(
            session.vbd.sysfs().exists(),
            "the device went below a connected frontend"
        );
    }
    ensure!(seed > 12, "only {seed} rounds of requests in {REFUSES:?}");
    session.finish()
}

/// Reads every attribute of a device, which may disappear at any moment.
fn read_all(sysfs: &std::path::Path) -> u64 {
    let mut reads = 0;
    for dir in [sysfs.to_owned(), sysfs.join("statistics")] {
        let Ok(entries) = fs::read_dir(dir) else {
            continue;
        };
        for entry in entries.flatten() {
            reads += u64::from(entry.path().is_file() && fs::read(entry.path()).is_ok());
        }
    }
    reads
}
