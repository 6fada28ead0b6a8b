// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Processes of tap disks that die, hang or never start, and frontends that disconnect in between.

use super::{case, tap_life, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::{Session, WIDE};
use crate::tap::scene::wait_status;
use crate::tap::server::{answer, DiskData, Pipe, ServerManner, TapServer};
use crate::tap::{expect, query, TapDisk, TapNode};
use crate::vbd::{state, Mode, VirtualDisk};
use crate::wait;
use crate::wire::{flush, rw, ERROR, OKAY};
use anyhow::{ensure, Context, Result};
use ring::abi::{OP_READ, OP_WRITE, PAGE_SIZE};
use ring::tap::abi::{GEOMETRY_READ_ONLY, STATE_FENCING, STATE_IDLE, STATE_LIVE};
use std::fs;
use std::io::Read;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Time from the frontend's wish to close until the backend has closed: 10 s, twice that in an emulated machine.
const CLOSED: Duration = Duration::from_secs(20);

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_life::tap_killed_again_and_again,
            "the process is killed at any moment; the guest sees no error and right data"
        ),
        case!(
            tap_life::tap_killed_before_and_after,
            "killed before it executes and before it tells: each request is answered once"
        ),
        case!(
            tap_life::tap_fenced_by_pins,
            "pages that somebody still holds keep the next process out"
        ),
        case!(
            tap_life::tap_closed_in_every_state,
            "a frontend closes while the process hangs, is dead, or never came"
        ),
        case!(
            tap_life::tap_orphans,
            "a connection waits for what the process has of the last one"
        ),
        case!(
            tap_life::tap_destroyed_guest,
            "the guest is destroyed while the process holds its requests"
        ),
        case!(
            tap_life::tap_bound_once,
            "a disk that is attached twice, and freed"
        ),
        case!(
            tap_life::tap_described_late,
            "a frontend connects before the process has described the disk"
        ),
        case!(
            tap_life::tap_read_only,
            "a read-only disk under a device that may write"
        ),
        case!(
            tap_life::tap_fails_when_told_to,
            "requests fail after the time that the disk's policy says, not before"
        ),
        case!(
            tap_life::tap_fails_while_fenced,
            "the same while a dead process is fenced: only what it never had"
        ),
        case!(
            tap_life::tap_stopped,
            "a process that is stopped for a while loses nothing"
        ),
        case!(
            tap_life::tap_module_stays,
            "the module cannot be removed while a node is open"
        ),
        case!(
            tap_life::tap_opened_and_closed,
            "a node is opened and closed as fast as it goes under requests"
        ),
    ]
}

/// A disk and a frontend; its process may be absent.
struct LifeScene {
    session: Session,
    store: DiskData,
    pipe: Pipe,
    disk: TapDisk,
}

impl LifeScene {
    /// Connects while a process serves the disk, then kills that.
    fn new(lab: &Lab) -> Result<LifeScene> {
        let disk = TapDisk::make()?;
        let (store, pipe) = (DiskData::new()?, Pipe::new()?);
        let server = TapServer::start(&disk, &store, &pipe, ServerManner::Honest)?;
        let session = lab.session_on_tap(&disk, WIDE)?;
        server.kill()?;
        Ok(LifeScene {
            session,
            store,
            pipe,
            disk,
        })
    }

    fn serve(&self, manner: ServerManner) -> Result<TapServer> {
        TapServer::start(&self.disk, &self.store, &self.pipe, manner)
    }

    /// Sends one-page writes from sector 0 on, whose pages hold `mark`.
    fn send(&mut self, count: usize, mark: u32) -> Result<()> {
        let write = |page: usize| {
            self.session.data.page(page)[0].store(mark + page as u32, Relaxed);
            let seg = self.session.seg(page);
            rw(OP_WRITE, page as u64, page as u64 * 8, &[seg])
        };
        let requests: Vec<_> = (0..count).map(write).collect();
        self.session.spread(&requests)
    }

    /// Takes the answers to these writes, and checks that the disk has their data.
    fn verify(&mut self, count: usize, mark: u32) -> Result<()> {
        for answer in self.session.answers(count)? {
            ensure!(answer.status == OKAY, "a good request failed: {answer:?}");
        }
        self.session.data.fill(0xee);
        for page in 0..count {
            let seg = self.session.seg(page);
            self.session
                .expect(&rw(OP_READ, 100, page as u64 * 8, &[seg]), OKAY)?;
            let got = self.session.data.page(page)[0].load(Relaxed);
            ensure!(
                got == mark + page as u32,
                "page {page} holds {got:#x}, not {:#x}",
                mark + page as u32
            );
        }
        Ok(())
    }

    /// Serves honestly and tears everything down.
    fn finish(self) -> Result<()> {
        let server = self.serve(ServerManner::Honest)?;
        let LifeScene {
            mut session, disk, ..
        } = self;
        session
            .exercise(256, 0xfee1)
            .context("after the attack the disk does not serve good requests any more")?;
        session.finish()?;
        server.kill()?;
        disk.destroy()
    }
}

fn tap_killed_again_and_again(lab: &mut Lab) -> Result<()> {
    let mut scene = LifeScene::new(lab)?;
    let mut rng = crate::rng::Rng::new(12);
    for round in 0..24u32 {
        let mark = round << 8;
        scene.send(24, mark)?;
        for _ in 0..rng.below(3) {
            let manner = rng.pick(&[
                ServerManner::Honest,
                ServerManner::Hold,
                ServerManner::Silent,
            ]);
            let server = scene.serve(manner)?;
            // At a random moment of its work.
            let moment = Instant::now() + Duration::from_micros(rng.below(3000));
            while Instant::now() < moment {
                std::hint::spin_loop();
            }
            server.kill()?;
        }
        let server = scene.serve(ServerManner::Honest)?;
        scene
            .verify(24, mark)
            .with_context(|| format!("round {round}"))?;
        server.kill()?;
    }
    scene.finish()
}

fn tap_killed_before_and_after(lab: &mut Lab) -> Result<()> {
    let mut scene = LifeScene::new(lab)?;
    for (manner, mark) in [(ServerManner::Hold, 0x1000), (ServerManner::Silent, 0x2000)] {
        let before = scene.disk.info()?;
        let server = scene.serve(manner)?;
        scene.send(16, mark)?;
        scene
            .disk
            .wait("requests in the process", |info| info.delivered == 16)?;
        server.kill()?;
        // Data that the guest stores in its pages now must not reach the disk.
        for page in 0..16 {
            scene.session.data.page(page)[0].store(0xbad, Relaxed);
        }
        wait_status(&scene.session, "recovering")?;
        ensure!(scene.session.is_silent()?, "answers without a process");
        let server = scene.serve(ServerManner::Honest)?;
        scene.verify(16, mark)?;
        let after = scene.disk.info()?;
        ensure!(
            after.replayed - before.replayed == 16,
            "{} requests were replayed",
            after.replayed - before.replayed
        );
        wait_status(&scene.session, "live")?;
        server.kill()?;
    }
    scene.finish()
}

fn tap_fenced_by_pins(lab: &mut Lab) -> Result<()> {
    let mut scene = LifeScene::new(lab)?;
    let server = scene.serve(ServerManner::Pin)?;
    scene.send(4, 0x77)?;
    scene
        .disk
        .wait("requests in the process", |info| info.delivered == 4)?;
    server.kill()?;
    wait_status(&scene.session, "fencing")?;
    let pinned = scene.disk.info()?;
    ensure!(pinned.state == STATE_FENCING, "{pinned:?}");
    let other = TapNode::file(&scene.disk.path(), libc::O_NONBLOCK);
    let refused = other.err().and_then(|error| error.raw_os_error());
    ensure!(
        refused == Some(libc::EBUSY),
        "the next process: {refused:?}"
    );
    // Another opener sleeps until then, but can be killed.
    let path = scene.disk.path();
    let sleeper = std::thread::spawn(move || TapNode::file(&path, 0).map(drop));
    // The backend still takes requests, and answers none.
    scene.session.queue().push(&flush(99));
    scene.session.queue().publish()?;
    scene
        .disk
        .wait("one more request", |info| info.waiting == 1)?;
    ensure!(!sleeper.is_finished(), "the fence did not hold");
    let mut pages = vec![0u8; 2 * PAGE_SIZE];
    scene.pipe.read.read_exact(&mut pages)?;
    let opened = sleeper.join().map_err(|_| anyhow::anyhow!("it died"))?;
    opened.context("after the pages were let go of")?;
    let server = scene.serve(ServerManner::Honest)?;
    let flushed = scene.session.answers(5)?;
    ensure!(
        flushed.iter().all(|answer| answer.status == OKAY),
        "{flushed:?}"
    );
    server.kill()?;
    scene.finish()
}

/// Closes as an honest frontend does; the backend must follow in time.
fn close_in_time(vbd: &VirtualDisk, what: &str) -> Result<()> {
    let start = Instant::now();
    vbd.close().with_context(|| what.to_owned())?;
    ensure!(
        start.elapsed() < CLOSED,
        "{what}: closing took {:?}",
        start.elapsed()
    );
    Ok(())
}

fn tap_closed_in_every_state(lab: &mut Lab) -> Result<()> {
    for manner in [None, Some(ServerManner::Hold), Some(ServerManner::Pin)] {
        let mut scene = LifeScene::new(lab)?;
        let server = manner.map(|manner| scene.serve(manner)).transpose()?;
        scene.send(8, 0)?;
        let all = |info: &ring::tap::abi::Info| info.delivered + info.waiting == 8;
        scene.disk.wait("the requests", all)?;
        if server.is_some() {
            scene.disk.wait("delivery", |info| info.delivered == 8)?;
        }
        close_in_time(&scene.session.vbd, &format!("with {manner:?}"))?;
        // Undelivered requests are forgotten, delivered ones are remembered.
        let left = scene.disk.info()?;
        let kept = if server.is_some() { 8 } else { 0 };
        ensure!(left.waiting == 0 && left.delivered == kept, "{left:?}");
        if let Some(server) = server {
            server.kill()?;
        }
        let LifeScene {
            session,
            pipe,
            disk,
            ..
        } = scene;
        session.finish()?;
        if manner == Some(ServerManner::Pin) {
            // No process has it, but I/O of the last one could still reach the image.
            expect("an end while fenced", disk.try_destroy()?, &[libc::EBUSY])?;
        }
        drop(pipe);
        disk.wait("the end of the fence", |info| info.state == STATE_IDLE)?;
        disk.destroy()?;
    }
    Ok(())
}

fn tap_orphans(lab: &mut Lab) -> Result<()> {
    let mut scene = LifeScene::new(lab)?;
    // The process is in this program, and slow.
    let node = scene.disk.start()?;
    scene.send(4, 0x99)?;
    let mut tags = Vec::new();
    wait::until("four requests", ANSWER, || {
        tags.extend(node.exchange(&[])?);
        Ok((tags.len() == 4).then_some(()))
    })?;
    close_in_time(&scene.session.vbd, "with four requests in the process")?;
    scene.session.queues = crate::session::queues(WIDE)?;
    scene.session.vbd.reopen()?;
    scene.session.vbd.write_front(&[])?;
    let keys = crate::session::keys(WIDE, &scene.session.queues);
    let vbd = &scene.session.vbd;
    vbd.store.write_all(&vbd.front, &keys)?;
    vbd.set_state(state::INITIALISED)?;
    // The frontend must not connect while the process may write into the arena.
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        ensure!(
            vbd.back_state()? != Some(state::CONNECTED),
            "connected while the process has requests of the last connection"
        );
        std::thread::yield_now();
    }
    answer(&node, &scene.store, &tags)?;
    vbd.wait_back("Connected after the last answer", &[state::CONNECTED])?;
    vbd.set_state(state::CONNECTED)?;
    ensure!(
        scene.session.is_silent()?,
        "an answer to a request of the last connection"
    );
    drop(node);
    scene.finish()
}

fn tap_destroyed_guest(lab: &mut Lab) -> Result<()> {
    for manner in [None, Some(ServerManner::Hold), Some(ServerManner::Silent)] {
        let mut scene = LifeScene::new(lab)?;
        let server = manner.map(|manner| scene.serve(manner)).transpose()?;
        scene.send(8, 0)?;
        if server.is_some() {
            scene.disk.wait("delivery", |info| info.delivered == 8)?;
        }
        let LifeScene {
            session,
            store,
            pipe,
            disk,
        } = scene;
        session.vbd.destroy()?;
        disk.wait("the end of the bond", |info| info.domain == u32::MAX)?;
        // The next guest gets the disk once the process has answered the requests of the last one.
        let mut session = match server {
            Some(server) => {
                let vbd = VirtualDisk::attach_named(lab.devid(), disk.key(), Mode::ReadWrite)?;
                server.kill()?;
                let server = TapServer::start(&disk, &store, &pipe, ServerManner::Honest)?;
                let queues = crate::session::queues(WIDE)?;
                let mut session = Session::connect(vbd, crate::tap::SECTORS, WIDE, queues)?;
                session.exercise(64, 5)?;
                server.kill()?;
                session
            }
            None => {
                let server = TapServer::start(&disk, &store, &pipe, ServerManner::Honest)?;
                let mut session = lab.session_on_tap(&disk, WIDE)?;
                session.exercise(64, 5)?;
                server.kill()?;
                session
            }
        };
        session
            .queues
            .iter_mut()
            .for_each(crate::queue::HonestRing::forget);
        session.vbd.destroy()?;
        disk.destroy()?;
    }
    Ok(())
}

fn tap_bound_once(lab: &mut Lab) -> Result<()> {
    let scene = LifeScene::new(lab)?;
    let other = VirtualDisk::attach_named(lab.devid(), scene.disk.key(), Mode::ReadWrite)?;
    other.wait_back("a refusal", &[state::CLOSING])?;
    let text = wait::until("the reason", crate::vbd::SOON, || other.error())?;
    let name = format!("device {}", scene.session.vbd.devid());
    ensure!(
        text.contains(&name),
        "the error does not name {name}: {text}"
    );
    let busy = scene.disk.try_destroy()?;
    ensure!(
        busy.err().and_then(|error| error.raw_os_error()) == Some(libc::EBUSY),
        "a bound disk was taken away"
    );
    let LifeScene {
        session,
        store,
        pipe,
        disk,
    } = scene;
    session.finish()?;
    let server = TapServer::start(&disk, &store, &pipe, ServerManner::Honest)?;
    let queues = crate::session::queues(WIDE)?;
    let mut session = Session::connect(other, crate::tap::SECTORS, WIDE, queues)
        .context("the second device after the first one let go")?;
    session.exercise(8, 8)?;
    session.finish()?;
    server.kill()?;
    let minor = disk.minor;
    disk.destroy()?;
    let gone = query(minor)?;
    ensure!(
        gone.map_or(true, |info| info.minor != minor),
        "it is still there"
    );
    let missing = VirtualDisk::attach_named(
        lab.devid(),
        ("tap-minor", minor.to_string()),
        Mode::ReadWrite,
    )?;
    missing.wait_back("a refusal", &[state::CLOSING])?;
    missing.destroy()?;
    let junk = VirtualDisk::attach_named(lab.devid(), ("tap-minor", "-1".into()), Mode::ReadWrite)?;
    junk.wait_back("a refusal", &[state::CLOSING])?;
    junk.destroy()
}

fn tap_described_late(lab: &mut Lab) -> Result<()> {
    let (disk, store, pipe) = (TapDisk::make()?, DiskData::new()?, Pipe::new()?);
    let vbd = VirtualDisk::attach_named(lab.devid(), disk.key(), Mode::ReadWrite)?;
    let queues = crate::session::queues(WIDE)?;
    vbd.store
        .write_all(&vbd.front, &crate::session::keys(WIDE, &queues))?;
    vbd.set_state(state::INITIALISED)?;
    disk.wait("the bond", |info| info.domain == 0)?;
    let node = disk.open()?;
    ensure!(
        vbd.back_state()? == Some(state::INIT_WAIT),
        "it did not wait for the description"
    );
    drop(node);
    let server = TapServer::start(&disk, &store, &pipe, ServerManner::Honest)?;
    vbd.wait_back("Connected", &[state::CONNECTED])?;
    server.kill()?;
    vbd.close()?;
    vbd.detach()?;
    disk.destroy()
}

fn tap_read_only(lab: &mut Lab) -> Result<()> {
    let disk = TapDisk::make()?;
    let node = disk.open()?;
    node.describe(crate::tap::SECTORS, GEOMETRY_READ_ONLY)?;
    node.start()?;
    let vbd = VirtualDisk::attach_named(lab.devid(), disk.key(), Mode::ReadWrite)?;
    let queues = crate::session::queues(WIDE)?;
    let refused = Session::connect(vbd, crate::tap::SECTORS, WIDE, queues);
    ensure!(
        refused.is_err(),
        "a device that may write got a read-only disk"
    );
    drop(refused);
    disk.wait("the end of the bond", |info| info.domain == u32::MAX)?;
    let vbd = VirtualDisk::attach_named(lab.devid(), disk.key(), Mode::ReadOnly)?;
    let queues = crate::session::queues(WIDE)?;
    let mut session = Session::connect(vbd, crate::tap::SECTORS, WIDE, queues)?;
    ensure!(
        session.vbd.offered("info")? == Some(4),
        "not offered as read-only"
    );
    let segs = session.segs(1);
    session.expect(&rw(OP_WRITE, 1, 0, &segs), ERROR)?;
    session.finish()?;
    drop(node);
    disk.destroy()
}

/// Seconds after which an impatient disk fails requests.
const AFTER: u32 = 3;

/// Returns a disk that fails requests after a while without a process, and its process.
fn impatient(lab: &Lab, manner: ServerManner) -> Result<(LifeScene, TapServer)> {
    let (disk, store, pipe) = (TapDisk::make_as(AFTER)?, DiskData::new()?, Pipe::new()?);
    let server = TapServer::start(&disk, &store, &pipe, manner)?;
    let session = lab.session_on_tap(&disk, WIDE)?;
    let scene = LifeScene {
        session,
        store,
        pipe,
        disk,
    };
    Ok((scene, server))
}

fn tap_fails_when_told_to(lab: &mut Lab) -> Result<()> {
    let (mut scene, server) = impatient(lab, ServerManner::Hold)?;
    scene.send(8, 0)?;
    scene.disk.wait("delivery", |info| info.delivered == 8)?;
    let start = Instant::now();
    server.kill()?;
    let failed = scene.session.answers(8)?;
    let took = start.elapsed();
    ensure!(
        failed.iter().all(|answer| answer.status == ERROR),
        "{failed:?}"
    );
    ensure!(
        took + Duration::from_millis(100) >= Duration::from_secs(AFTER.into()),
        "they failed after {took:?}"
    );
    // New requests fail at once, until a process starts.
    let segs = scene.session.segs(1);
    scene.session.expect(&rw(OP_WRITE, 9, 0, &segs), ERROR)?;
    scene.finish()
}

/// Requests of the dead process must not fail while its I/O may be running; requests that it never had may.
fn tap_fails_while_fenced(lab: &mut Lab) -> Result<()> {
    let (mut scene, server) = impatient(lab, ServerManner::Pin)?;
    scene.send(4, 0x77)?;
    scene.disk.wait("delivery", |info| info.delivered == 4)?;
    server.kill()?;
    wait_status(&scene.session, "fencing")?;
    scene.session.queue().push(&flush(99));
    scene.session.queue().publish()?;
    let failed = scene.session.queue().wait(1, ANSWER)?;
    ensure!(
        failed
            .iter()
            .all(|answer| answer.id == 99 && answer.status == ERROR),
        "{failed:?}"
    );
    let kept = scene.disk.info()?;
    ensure!(
        kept.state == STATE_FENCING && kept.delivered == 4,
        "{kept:?}"
    );
    let mut pages = vec![0u8; 2 * PAGE_SIZE];
    scene.pipe.read.read_exact(&mut pages)?;
    let failed = scene.session.answers(4)?;
    ensure!(
        failed.iter().all(|answer| answer.status == ERROR),
        "{failed:?}"
    );
    scene.finish()
}

fn tap_stopped(lab: &mut Lab) -> Result<()> {
    let mut scene = LifeScene::new(lab)?;
    let server = scene.serve(ServerManner::Honest)?;
    server.pause(true)?;
    scene.send(16, 0x600)?;
    scene
        .disk
        .wait("requests", |info| info.waiting + info.delivered == 16)?;
    ensure!(scene.session.is_silent()?, "who answers?");
    // The status is published a little after the change.
    wait_status(&scene.session, "live")?;
    server.pause(false)?;
    scene.verify(16, 0x600)?;
    server.kill()?;
    scene.finish()
}

fn tap_module_stays(lab: &mut Lab) -> Result<()> {
    let disk = TapDisk::make()?;
    let node = disk.open()?;
    let users = || -> Result<u64> {
        let text = fs::read_to_string("/sys/module/xen_blkback_rs/refcnt")?;
        Ok(text.trim().parse()?)
    };
    let before = users()?;
    let area = node.info.arena_len as usize;
    let map = crate::tap::FileMapping::new(
        &node.file,
        ring::tap::abi::MMAP_ARENA,
        area,
        libc::PROT_READ,
        libc::MAP_SHARED,
    )?;
    // The file is closed, but its mapping keeps it open.
    drop(node);
    ensure!(users()? == before, "a mapping does not hold the module");
    let info = disk.info()?;
    ensure!(info.state != STATE_IDLE, "a mapped disk counts as closed");
    drop(map);
    disk.wait("the end of the fence", |info| info.state == STATE_IDLE)?;
    ensure!(users()? < before, "a closed node holds the module");
    lab.bystander()?;
    disk.destroy()
}

fn tap_opened_and_closed(lab: &mut Lab) -> Result<()> {
    let mut scene = LifeScene::new(lab)?;
    scene.send(16, 0xabc00)?;
    let begun = Instant::now();
    let mut rounds = 0u32;
    while begun.elapsed() < Duration::from_secs(3) {
        let node = scene.disk.open()?;
        match rounds % 4 {
            0 => {}
            1 => node.describe(crate::tap::SECTORS, ring::tap::abi::GEOMETRY_WRITE_CACHE)?,
            step => {
                node.describe(crate::tap::SECTORS, ring::tap::abi::GEOMETRY_WRITE_CACHE)?;
                node.start()?;
                let tags = node.exchange(&[])?;
                if step == 3 && !tags.is_empty() {
                    // One is executed and answered, the others are not.
                    answer(&node, &scene.store, &tags[..1])?;
                }
            }
        }
        rounds += 1;
    }
    ensure!(rounds > 20, "only {rounds} rounds");
    let server = scene.serve(ServerManner::Honest)?;
    scene.verify(16, 0xabc00)?;
    let info = scene.disk.info()?;
    ensure!(info.state == STATE_LIVE && info.delivered == 0, "{info:?}");
    server.kill()?;
    scene.finish()
}
