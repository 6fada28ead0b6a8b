// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Recalls of mappings while the device stands still, and processes die or are replaced.

use super::{case, tap_recalls, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::{Session, PLAIN};
use crate::standstill::{Standstill, StoppableDevice};
use crate::tap::maps::{add, change, flush, give_again, mapped, recall, remove, set, BackedDisk};
use crate::tap::scene::{while_served, TapScene};
use crate::tap::server::{DiskData, Pipe, ServerManner, TapServer, UNDER_WAY};
use crate::tap::signal::InterruptibleThread;
use crate::tap::{expect, TapDisk, TapNode, CLAIMS, SECTORS};
use crate::wait;
use crate::wire::{rw, OKAY};
use anyhow::{anyhow, bail, ensure, Context, Result};
use ring::abi::{OP_READ, OP_WRITE};
use ring::tap::abi::{GEOMETRY_WRITE_CACHE, STATE_LIVE};
use ring::tap::shadow::express::STREAK;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_recalls::tap_recall_killed,
            "the process is killed while it takes everything back: the next one goes on, each request is answered once"
        ),
        case!(
            tap_recalls::tap_recall_stands_still,
            "a recall waits for a device that stands still, nobody else does, and a signal ends it"
        ),
        case!(
            tap_recalls::tap_recall_in_express,
            "a process takes parts back while a queue has express and continues: each recall ends"
        ),
        case!(
            tap_recalls::tap_maps_of_before,
            "what the process before has said and found out counts no more"
        ),
    ]
}

/// Name of the device of the attacks here.
const NAME: &str = "hostile-standstill";
/// First sector of a range without requests.
const ELSEWHERE: u64 = 8192;
/// The page for reads; others hold data of writes.
const ASIDE: usize = 40;
/// Reads after which a queue has express.
const READS: u64 = 2 * STREAK as u64;
/// Operations that do not need the device must end in this time.
const PROMPT: Duration = Duration::from_secs(5);

/// Returns the content of a page of the guest.
fn mark(page: usize) -> u32 {
    0x5eca_1100 + page as u32
}

/// Stops the device after the guest has sent `UNDER_WAY` writes of a page, which the kernel is executing.
pub(super) fn stop_under_writes(
    device: &StoppableDevice,
    disk: &TapDisk,
    session: &mut Session,
) -> Result<Standstill> {
    let still = device.stop()?;
    let write = |page: usize| {
        session.data.page(page)[0].store(mark(page), Relaxed);
        rw(OP_WRITE, page as u64, page as u64 * 8, &[session.seg(page)])
    };
    let writes: Vec<_> = (0..UNDER_WAY as usize).map(write).collect();
    session.spread(&writes)?;
    disk.wait("writes that the kernel executes", |info| {
        info.executing == UNDER_WAY
    })?;
    Ok(still)
}

/// Checks that each of these requests has one good answer, and that there is no other.
fn answered_once(session: &mut Session, ids: impl Iterator<Item = u64>) -> Result<()> {
    let mut wanted: Vec<u64> = ids.collect();
    let answers = session.answers(wanted.len())?;
    let bad = answers.iter().find(|answer| answer.status != OKAY);
    ensure!(bad.is_none(), "a good request failed: {bad:?}");
    let mut got: Vec<u64> = answers.iter().map(|answer| answer.id).collect();
    got.sort_unstable();
    wanted.sort_unstable();
    ensure!(got == wanted, "answers of {got:?}, not of {wanted:?}");
    ensure!(session.is_silent()?, "an answer too many");
    Ok(())
}

/// Checks that the disk has the written data.
fn written(session: &mut Session) -> Result<()> {
    for page in 0..UNDER_WAY as usize {
        let read = rw(OP_READ, 100, page as u64 * 8, &[session.seg(ASIDE)]);
        session.expect(&read, OKAY)?;
        let got = session.data.page(ASIDE)[0].load(Relaxed);
        ensure!(got == mark(page), "page {page} holds {got:#x}");
    }
    Ok(())
}

/// Waits until `count` recalls were begun.
fn wait_recalls(disk: &TapDisk, count: u64) -> Result<()> {
    wait::until("a recall", ANSWER, || {
        Ok((mapped(disk)?.recalled == count).then_some(()))
    })
}

fn tap_recall_killed(lab: &mut Lab) -> Result<()> {
    let device = StoppableDevice::over(&lab.disk, NAME)?;
    let disk = TapDisk::make()?;
    add(&disk, 0, &device.open()?, true)?;
    let mut pipe = Pipe::new()?;
    // The only file of the disk that it has is the node.
    let server = TapServer::start(&disk, &DiskData::new()?, &pipe, ServerManner::Recall)?;
    let has_mapped = wait::readable(pipe.read.as_raw_fd(), ANSWER)?;
    ensure!(has_mapped, "the process maps nothing");
    pipe.read.read_exact(&mut [0])?;
    let mut session = lab.session_on_tap(&disk, PLAIN)?;
    let still = stop_under_writes(&device, &disk, &mut session)?;
    wait_recalls(&disk, 1)?;
    let begun = Instant::now();
    server.kill()?;
    ensure!(
        begun.elapsed() < PROMPT,
        "a process that waits for the device died after {:?}",
        begun.elapsed()
    );
    let back = wait::readable(pipe.read.as_raw_fd(), Duration::ZERO)?;
    ensure!(!back, "its recall did not wait for what is under way");
    // The kernel's I/O does not keep the next process from starting.
    let (node, store) = (disk.start()?, DiskData::on(lab.disk.path())?);
    let mut scene = TapScene {
        session,
        store,
        node,
        disk,
    };
    ensure!(scene.session.is_silent()?, "an answer without I/O");
    next_process(&mut scene, still)?;
    // The writes, and the read that waited for one of them.
    let held = u64::from(UNDER_WAY);
    let TapScene {
        session,
        store,
        node,
        ..
    } = &mut scene;
    while_served(node, store, || {
        answered_once(session, (0..held).chain([held]))?;
        let got = session.data.page(ASIDE)[0].load(Relaxed);
        ensure!(got == mark(0), "read before the write: {got:#x}");
        written(session)
    })?;
    let info = scene.disk.info()?;
    ensure!(
        info.direct == held && info.replayed == 0,
        "the kernel was to execute {held}, each once: {info:?}"
    );
    scene.finish()?;
    device.remove()
}

/// Checks that the next process serves requests which do not overlap the running ones, and waits for those like the
/// process before.
fn next_process(scene: &mut TapScene, still: Standstill) -> Result<()> {
    let held = u64::from(UNDER_WAY);
    let TapScene {
        session,
        store,
        node,
        disk,
    } = scene;
    let seg = [session.seg(ASIDE)];
    let requests = [
        rw(OP_READ, held, 0, &seg),
        rw(OP_READ, held + 1, ELSEWHERE, &[session.seg(ASIDE + 1)]),
    ];
    session.spread(&requests)?;
    let first = while_served(node, store, || session.queue().wait(1, ANSWER))?;
    let ids: Vec<u64> = first.iter().map(|answer| answer.id).collect();
    ensure!(ids == [held + 1], "answers of {ids:?}: {first:?}");
    let info = disk.info()?;
    ensure!(
        info.executing == UNDER_WAY && info.waiting == 1 && info.delivered == 0,
        "what overlaps is not held: {info:?}"
    );
    thread::scope(|scope| -> Result<()> {
        let recaller = scope.spawn(|| node.maps(&[recall(0, u64::MAX)]));
        wait_recalls(disk, 2)?;
        ensure!(
            !recaller.is_finished(),
            "the next process does not wait for what is under way"
        );
        still.end()?;
        let ended = recaller.join().map_err(|_| anyhow!("a thread died"))?;
        ended.context("the recall of the next process").map(drop)
    })?;
    let info = disk.info()?;
    ensure!(info.executing == 0, "a recall came back early: {info:?}");
    Ok(())
}

fn tap_recall_stands_still(lab: &mut Lab) -> Result<()> {
    let device = StoppableDevice::over(&lab.disk, NAME)?;
    let file = device.open()?;
    let mut backed = BackedDisk::by(lab, &lab.disk, &file)?;
    backed.map_all()?;
    let usual = latency(lab)?;
    let scene = &mut backed.scene;
    let recalled = mapped(&scene.disk)?.recalled;
    let still = stop_under_writes(&device, &scene.disk, &mut scene.session)?;
    thread::scope(|scope| -> Result<()> {
        // The device resumes before the threads here are joined, whatever the result.
        let still = still;
        let node = &scene.node;
        let recaller = scope.spawn(|| node.maps(&[recall(0, u64::MAX)]));
        wait_recalls(&scene.disk, recalled + 1)?;
        interrupted(node, &scene.disk, recalled + 2)?;
        let now = latency(lab)?;
        ensure!(
            now <= usual * 4 + Duration::from_millis(50),
            "another disk takes {now:?}, not {usual:?}"
        );
        others_are_prompt(node, &scene.disk)?;
        let info = scene.disk.info()?;
        ensure!(
            !recaller.is_finished() && info.executing == UNDER_WAY,
            "the recall did not wait: {info:?}"
        );
        still.end()?;
        let ended = recaller.join().map_err(|_| anyhow!("a thread died"))?;
        ended.context("a recall that has waited").map(drop)
    })?;
    let info = scene.disk.info()?;
    ensure!(info.executing == 0, "a recall came back early: {info:?}");
    answered_once(&mut scene.session, 0..u64::from(UNDER_WAY))?;
    give_again(&scene.disk, &file)?;
    backed.map_all()?;
    written(&mut backed.scene.session)?;
    drop(file);
    backed.finish()?;
    device.remove()
}

fn tap_recall_in_express(lab: &mut Lab) -> Result<()> {
    const ROUNDS: u32 = 8;
    let mut backed = BackedDisk::new(lab)?;
    backed.scene.session.keep_grants()?;
    backed.map_all()?;
    let TapScene {
        session,
        node,
        disk,
        ..
    } = &mut backed.scene;
    for round in 0..ROUNDS {
        let before = mapped(disk)?.express;
        for id in 0..READS {
            session.expect(&rw(OP_READ, id, 0, &[session.seg(ASIDE)]), OKAY)?;
        }
        let now = mapped(disk)?.express;
        ensure!(
            now > before,
            "round {round}: none of {READS} reads was in express"
        );
        recall_under_reads(session, node)?;
    }
    backed.finish()
}

/// Checks that the recall of a range without requests ends while the guest continues to read another range.
fn recall_under_reads(session: &mut Session, node: &TapNode) -> Result<()> {
    thread::scope(|scope| -> Result<()> {
        let recaller = scope.spawn(|| node.maps(&[recall(ELSEWHERE, 8)]));
        let begun = Instant::now();
        let mut id = READS;
        while !recaller.is_finished() {
            session.expect(&rw(OP_READ, id, 0, &[session.seg(ASIDE)]), OKAY)?;
            id += 1;
            if begun.elapsed() > ANSWER {
                // Without any mapping no queue executes anything, so both recalls end.
                node.maps(&[recall(0, u64::MAX)])?;
                bail!("a recall has waited for {id} reads of another range");
            }
        }
        let ended = recaller.join().map_err(|_| anyhow!("a thread died"))?;
        ended.context("a recall under load").map(drop)
    })
}

/// Returns the typical latency of the bystander's requests.
fn latency(lab: &mut Lab) -> Result<Duration> {
    let mut took = Vec::new();
    for _ in 0..15 {
        let start = Instant::now();
        lab.bystander()?;
        took.push(start.elapsed());
    }
    took.sort_unstable();
    Ok(took[took.len() / 2])
}

/// Checks that a signal ends a waiting recall, and that the requests that it waited for continue.
fn interrupted(node: &TapNode, disk: &TapDisk, recalled: u64) -> Result<()> {
    thread::scope(|scope| -> Result<()> {
        let (tell, told) = mpsc::channel();
        let sleeper = scope.spawn(move || -> Result<_> {
            tell.send(InterruptibleThread::this()?)?;
            Ok(node.maps(&[recall(0, u64::MAX)]))
        });
        let thread = told.recv().context("a thread says nothing")?;
        wait_recalls(disk, recalled)?;
        let begun = Instant::now();
        // A signal before it sleeps may be lost.
        wait::until("the end of a recall with a signal", PROMPT, || {
            if sleeper.is_finished() {
                return Ok(Some(()));
            }
            thread.interrupt()?;
            Ok(None)
        })?;
        let result = sleeper.join().map_err(|_| anyhow!("a thread died"))??;
        expect("a recall that was interrupted", result, &[libc::EINTR])?;
        ensure!(begun.elapsed() < PROMPT, "after {:?}", begun.elapsed());
        Ok(())
    })
}

/// Checks that nothing else of this disk and of others waits for the device.
fn others_are_prompt(node: &TapNode, disk: &TapDisk) -> Result<()> {
    let start = Instant::now();
    let mut last = start;
    let mut took = Vec::new();
    let mut done = |what: &'static str| {
        let now = Instant::now();
        took.push((what, now - last));
        last = now;
    };
    node.ask()?;
    mapped(disk)?;
    done("looks");
    TapDisk::make()?.destroy()?;
    done("another disk");
    let maps = node.maps(&[recall(ELSEWHERE, 8)])?;
    let set = node.maps(&[set(ELSEWHERE, 8, maps.generation), flush()])?;
    ensure!(set.refused == maps.refused, "a good one: {set:?}");
    done("mappings elsewhere");
    let removed = remove(disk, 0);
    expect("a device in use is taken away", removed, &[libc::EBUSY])?;
    done("the device");
    ensure!(start.elapsed() < PROMPT, "somebody has waited: {took:?}");
    Ok(())
}

/// The descriptor of a dead process may have a living copy, and a node is closed only with the last copy. Until then no
/// other process has it, so only the mappings and lookups of the earlier process are old.
fn tap_maps_of_before(lab: &mut Lab) -> Result<()> {
    let backed = BackedDisk::new(lab)?;
    backed.map_all()?;
    let TapScene {
        mut session,
        store,
        node,
        disk,
    } = backed.scene;
    let known = node.maps(&[])?.generation;
    // Like the copy of a child, or of a process to which it was sent.
    let copy = node.file.try_clone()?;
    drop(node);
    let again = Path::new("/proc/self/fd").join(copy.as_raw_fd().to_string());
    for path in [disk.path(), again] {
        let opened = TapNode::file(&path, libc::O_NONBLOCK);
        expect("another opener beside a copy", opened, &[libc::EBUSY])?;
    }
    change(&copy, &[set(0, SECTORS, known)]).context("a copy speaks for the process")?;
    ensure!(disk.info()?.state == STATE_LIVE, "{:?}", disk.info()?);
    drop(copy);
    let node = disk.open()?;
    node.describe(SECTORS, GEOMETRY_WRITE_CACHE)?;
    let all = [set(0, SECTORS, known), recall(0, u64::MAX), flush()];
    for op in all {
        expect("before the claims", node.maps(&[op]), &[libc::EOPNOTSUPP])?;
    }
    node.claim(&CLAIMS)?;
    for op in all {
        expect("before the start", node.maps(&[op]), &[libc::EINVAL])?;
    }
    node.start_unclaimed()?;
    nothing_counts(&node, &store, &disk, &mut session, known)?;
    // A second start of one process clears nothing.
    let known = node.maps(&[])?.generation;
    node.maps(&[set(0, SECTORS, known), flush()])?;
    node.claim(&CLAIMS)?;
    node.start_unclaimed()?;
    nothing_counts(&node, &store, &disk, &mut session, known)?;
    TapScene {
        session,
        store,
        node,
        disk,
    }
    .finish()
}

/// Checks that nothing is mapped, and that mappings from an earlier lookup are refused.
fn nothing_counts(
    node: &TapNode,
    store: &DiskData,
    disk: &TapDisk,
    session: &mut Session,
    known: u32,
) -> Result<()> {
    let mut refused = node.maps(&[])?.refused;
    for op in [set(0, SECTORS, known), set(8, 8, known)] {
        refused += 1;
        let maps = node.maps(&[op])?;
        ensure!(maps.refused == refused, "{op:?} was taken: {maps:?}");
    }
    let before = disk.info()?.direct;
    while_served(node, store, || session.exercise(0, 0xbef0))?;
    let after = disk.info()?.direct;
    ensure!(
        after == before,
        "the kernel has executed {} without having been told",
        after - before
    );
    Ok(())
}
