// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Tap disks with several queues, failed connections, and disks that are created and destroyed.

use super::{case, tap_queues, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::{self, FrontendShape, Session, WIDE};
use crate::tap::server::{DiskData, Pipe, ServerManner, TapServer};
use crate::tap::{query, TapDisk, TapNode, SECTORS};
use crate::vbd::{state, Mode, VirtualDisk};
use crate::wait;
use crate::wire::{rw, OKAY};
use anyhow::{ensure, Context, Result};
use ring::abi::{Protocol, OP_READ, OP_WRITE};
use ring::tap::abi::STATE_IDLE;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_queues::tap_many_queues,
            "several large rings share the tags and the arena of a disk"
        ),
        case!(
            tap_queues::tap_other_type,
            "a device of the type vbd3 is served like one of the type vbd"
        ),
        case!(
            tap_queues::tap_connected_half,
            "a connection that fails at its last queue leaves nothing behind"
        ),
        case!(
            tap_queues::tap_come_and_go,
            "disks are made, opened, bound and destroyed by several threads at once"
        ),
        case!(
            tap_queues::tap_memory_comes_back,
            "disks that are destroyed give all their memory back"
        ),
    ]
}

/// Returns a shape with all offered queues, at most four, with large rings.
fn wide(vbd: &VirtualDisk) -> Result<FrontendShape> {
    let offered = vbd.offered("multi-queue-max-queues")?.unwrap_or(1);
    Ok(FrontendShape {
        queues: offered.min(4) as usize,
        order: 3,
        protocol: Protocol::Abi64,
    })
}

fn tap_many_queues(lab: &mut Lab) -> Result<()> {
    let (disk, store, pipe) = (TapDisk::make()?, DiskData::new()?, Pipe::new()?);
    let mut server = TapServer::start(&disk, &store, &pipe, ServerManner::Honest)?;
    let vbd = VirtualDisk::attach_named(lab.devid(), disk.key(), Mode::ReadWrite)?;
    let shape = wide(&vbd)?;
    let mut session = Session::connect(vbd, SECTORS, shape, session::queues(shape)?)?;
    session.exercise(0, 1)?;
    for round in 0..4u32 {
        // More requests than there are tags, on all queues; they overlap between queues.
        let segs = session.segs(2);
        let mut sent = 0;
        for queue in &mut session.queues {
            for id in 0..queue.size() {
                let op = if id % 3 == 0 { OP_READ } else { OP_WRITE };
                queue.push(&rw(op, id.into(), u64::from(id % 32) * 8, &segs));
                sent += 1;
            }
            queue.publish()?;
        }
        if round % 2 == 1 {
            server.kill()?;
            server = TapServer::start(&disk, &store, &pipe, ServerManner::Honest)?;
        }
        let mut came = 0;
        for queue in &mut session.queues {
            let answers = queue.wait(queue.size() as usize, ANSWER)?;
            ensure!(answers.iter().all(|a| a.status == OKAY), "{answers:?}");
            came += answers.len();
        }
        ensure!(came == sent as usize, "{came} answers to {sent} requests");
        session.exercise(1024, round)?;
    }
    session.finish()?;
    server.kill()?;
    disk.destroy()
}

fn tap_other_type(lab: &mut Lab) -> Result<()> {
    let (disk, store, pipe) = (TapDisk::make()?, DiskData::new()?, Pipe::new()?);
    let server = TapServer::start(&disk, &store, &pipe, ServerManner::Honest)?;
    let vbd = VirtualDisk::attach_as("vbd3", lab.devid(), disk.key(), Mode::ReadWrite)?;
    let mut session = Session::connect(vbd, SECTORS, WIDE, session::queues(WIDE)?)?;
    session.exercise(64, 3)?;
    session.reconnect(WIDE)?;
    session.exercise(128, 4)?;
    session.finish()?;
    server.kill()?;
    disk.destroy()
}

fn tap_connected_half(lab: &mut Lab) -> Result<()> {
    let (disk, store, pipe) = (TapDisk::make()?, DiskData::new()?, Pipe::new()?);
    let server = TapServer::start(&disk, &store, &pipe, ServerManner::Honest)?;
    let vbd = VirtualDisk::attach_named(lab.devid(), disk.key(), Mode::ReadWrite)?;
    let shape = wide(&vbd)?;
    let last = shape.queues - 1;
    let bad = if last == 0 {
        "event-channel".to_owned()
    } else {
        format!("queue-{last}/event-channel")
    };
    for _ in 0..8 {
        let queues = session::queues(shape)?;
        vbd.store
            .write_all(&vbd.front, &session::keys(shape, &queues))?;
        let path = format!("{}/{bad}", vbd.front);
        vbd.store.write(&path, b"4000")?;
        vbd.set_state(state::INITIALISED)?;
        vbd.wait_back("a refusal", &[state::CLOSING])?;
        vbd.close()?;
        vbd.reopen()?;
    }
    let mut session = Session::connect(vbd, SECTORS, shape, session::queues(shape)?)?;
    session.exercise(32, 32)?;
    session.finish()?;
    server.kill()?;
    disk.destroy()
}

/// Accepts some errors of a call, because everything changes during it.
fn tolerate<T>(result: std::io::Result<T>, allowed: &[i32]) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if allowed.contains(&error.raw_os_error().unwrap_or(0)) => Ok(None),
        Err(error) => Err(error).context("while disks come and go"),
    }
}

fn tap_come_and_go(lab: &mut Lab) -> Result<()> {
    const MINOR: u32 = 700;
    let over = AtomicBool::new(false);
    let rounds = AtomicU32::new(0);
    let (over, rounds) = (&over, &rounds);
    let going = move || !over.load(Relaxed);
    let makers = move || -> Result<()> {
        while going() {
            let made = TapDisk::try_make(MINOR, 0)?;
            if let Some(disk) = tolerate(made, &[libc::EEXIST])? {
                thread::yield_now();
                disk.destroy()?;
                rounds.fetch_add(1, Relaxed);
            }
        }
        Ok(())
    };
    let openers = move || -> Result<()> {
        let path = format!("/dev/xentap/{MINOR}");
        while going() {
            let gone = [libc::ENOENT, libc::ENXIO, libc::EBUSY];
            let file = tolerate(TapNode::file(path.as_ref(), libc::O_NONBLOCK), &gone)?;
            drop(file);
            let found = query(MINOR)?;
            tolerate(found, &[libc::ENOENT])?;
        }
        Ok(())
    };
    let devids = [lab.devid(), lab.devid()];
    let binder = move |devid: u32| -> Result<()> {
        while going() {
            let key = ("tap-minor", MINOR.to_string());
            let vbd = VirtualDisk::attach_named(devid, key, Mode::ReadWrite)?;
            vbd.destroy()?;
        }
        Ok(())
    };
    thread::scope(|scope| -> Result<()> {
        let mut threads = vec![
            scope.spawn(makers),
            scope.spawn(makers),
            scope.spawn(openers),
            scope.spawn(openers),
        ];
        threads.extend(devids.map(|devid| scope.spawn(move || binder(devid))));
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(6) {
            thread::sleep(Duration::from_millis(50));
        }
        over.store(true, Relaxed);
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread died"))??;
        }
        Ok(())
    })?;
    let rounds = rounds.load(Relaxed);
    ensure!(rounds >= 5, "only {rounds} disks were made and destroyed");
    // Pending udev events of all the nodes occupy memory.
    dom0::udev::settle()
}

/// Free memory in KiB.
fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemFree:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("/proc/meminfo has no MemFree")?.parse()?)
}

fn tap_memory_comes_back(_lab: &mut Lab) -> Result<()> {
    const DISKS: usize = 24;
    /// Less than the memory of three disks; the kernel's own caches vary.
    const SLACK_KIB: u64 = 7 << 10;
    let used = |count: usize| -> Result<()> {
        let disks: Vec<TapDisk> = (0..count).map(|_| TapDisk::make()).collect::<Result<_>>()?;
        for disk in &disks {
            drop(disk.start()?);
        }
        for disk in disks {
            disk.wait("the end of the fence", |info| info.state == STATE_IDLE)?;
            disk.destroy()?;
        }
        Ok(())
    };
    // Memory that the kernel keeps for the next time is not a leak.
    used(2)?;
    let before = available()?;
    used(DISKS)?;
    wait::until("the memory of disks", ANSWER, || {
        Ok((available()? + SLACK_KIB >= before).then_some(()))
    })
    .with_context(|| format!("{before} KiB were free, now {:?}", available()))
}
