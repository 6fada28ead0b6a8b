// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Data of a disk that changes without the kernel: in the arena by its process, and in a file that another program
//! truncates.

use super::{case, tap_spoiled, AttackCase};
use crate::filesystem::Filesystem;
use crate::lab::Lab;
use crate::session::Session;
use crate::standstill::StoppableDevice;
use crate::tap::maps::{flush, map, recall, scene_on, set, BackedDisk};
use crate::tap::scene::TapScene;
use crate::tap::server::{done, DiskData};
use crate::tap::{FileMapping, TapNode, SECTORS};
use crate::wire::{rw, WireRequest, WireResponse, ERROR, OKAY};
use anyhow::{anyhow, ensure, Context, Result};
use ring::abi::{OP_READ, OP_WRITE, PAGE_SIZE};
use ring::tap::abi::{Completion, DESC_REPLAY};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_spoiled::tap_arena_scribbled,
            "the process scribbles over the arena while the kernel executes: what is written there suffers, and nothing else"
        ),
        case!(
            tap_spoiled::tap_file_shortened,
            "a file is made shorter while the kernel uses it: the process decides, or the guest gets an error"
        ),
    ]
}

/// Number of pages of the disk that the guest writes: the first ones.
const PAGES: usize = 8;
/// Pages of the guest that no request names.
const UNTOUCHED: std::ops::Range<usize> = 32..40;
/// Data of the guest and of the process.
const GUEST: u32 = 0x6e65_6775;
const PROCESS: u8 = 0xee;

/// Returns one request for each of those pages, with pages of the guest from `first` on.
fn each_page(session: &Session, op: u8, first: usize) -> Vec<WireRequest> {
    let request = |page: usize| {
        let seg = session.seg(first + page);
        let id = (u64::from(op) << 32) + page as u64;
        rw(op, id, page as u64 * 8, &[seg])
    };
    (0..PAGES).map(request).collect()
}

/// Checks that every word of the guest in these pages is `word`.
fn holds(session: &Session, pages: std::ops::Range<usize>, word: u32) -> Result<()> {
    for page in pages {
        let bad = session.data.page(page).iter().find_map(|at| {
            let got = at.load(Relaxed);
            (got != word).then_some(got)
        });
        ensure!(
            bad.is_none(),
            "page {page} of the guest holds {bad:x?}, not {word:#x}"
        );
    }
    Ok(())
}

fn all_okay(answers: &[WireResponse]) -> Result<()> {
    let failed = answers.iter().find(|answer| answer.status != OKAY);
    ensure!(failed.is_none(), "a good request failed: {failed:?}");
    Ok(())
}

fn scribble(arena: &FileMapping) {
    for byte in arena.bytes() {
        byte.store(PROCESS, Relaxed);
    }
}

/// Sends as many writes or reads as there are pages while the device stands still, scribbles, and lets the device
/// resume.
fn scribble_under(
    device: &StoppableDevice,
    scene: &mut TapScene,
    op: u8,
    first: usize,
) -> Result<()> {
    let still = device.stop()?;
    let requests = each_page(&scene.session, op, first);
    scene.session.spread(&requests)?;
    scene
        .disk
        .wait("requests that the kernel executes", |info| {
            info.executing == PAGES as u32
        })?;
    scribble(scene.node.arena());
    ensure!(scene.session.is_silent()?, "an answer without I/O");
    still.end()?;
    scene.answered(PAGES)
}

/// The process cannot change where the data of a request goes, because it can only read the descriptors. It can change
/// the data itself, as it could if it executed the request.
fn tap_arena_scribbled(lab: &mut Lab) -> Result<()> {
    let device = StoppableDevice::over(&lab.disk, "hostile-scribbled")?;
    let mut backed = BackedDisk::by(lab, &lab.disk, &device.open()?)?;
    backed.map_all()?;
    let mut neighbour = BackedDisk::on(lab, &lab.coarse)?;
    neighbour.map_all()?;
    let before = backed.scene.store.contents(lab.disk.sectors)?;
    let scene = &mut backed.scene;
    for word in scene.session.data.words() {
        word.store(GUEST, Relaxed);
    }
    scribble_under(&device, scene, OP_WRITE, 0)?;
    holds(&scene.session, 0..UNTOUCHED.end, GUEST).context("after writes")?;
    let after = scene.store.contents(lab.disk.sectors)?;
    let (written, rest) = after.split_at(PAGES * PAGE_SIZE);
    is_unchanged(&before, rest)?;
    // The attack works: the kernel has written the process's data, at the place that the guest chose.
    ensure!(
        written.iter().all(|byte| *byte == PROCESS),
        "what the process has scribbled is not on its disk"
    );
    // Data of a read from the device arrives after the scribble.
    scribble_under(&device, scene, OP_READ, PAGES)?;
    holds(
        &scene.session,
        PAGES..2 * PAGES,
        u32::from_ne_bytes([PROCESS; 4]),
    )?;
    holds(&scene.session, UNTOUCHED, GUEST).context("after reads")?;
    scribble_on(scene, &mut neighbour.scene.session)?;
    holds(&scene.session, UNTOUCHED, GUEST).context("after all that")?;
    let after = scene.store.contents(lab.disk.sectors)?;
    is_unchanged(&before, &after[PAGES * PAGE_SIZE..])?;
    neighbour.finish()?;
    backed.finish()?;
    device.remove()
}

/// Checks that the device behind the guest's range is unchanged.
fn is_unchanged(before: &[u8], rest: &[u8]) -> Result<()> {
    let first = PAGES * PAGE_SIZE;
    let mut pairs = before[first..].iter().zip(rest);
    let at = pairs.position(|(before, after)| before != after);
    ensure!(
        at.is_none(),
        "byte {at:?} behind what the guest has written is another one"
    );
    Ok(())
}

/// The process never stops scribbling, while two guests continue.
fn scribble_on(scene: &mut TapScene, neighbour: &mut Session) -> Result<()> {
    let TapScene { session, node, .. } = scene;
    let over = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                scribble(node.arena());
                rounds.fetch_add(1, Relaxed);
            }
        });
        let mut go_on = || -> Result<()> {
            let mut round = 0;
            while round < 64 || rounds.load(Relaxed) < 8 {
                let mut requests = each_page(session, OP_WRITE, 0);
                requests.extend(each_page(session, OP_READ, PAGES));
                session.spread(&requests)?;
                all_okay(&session.answers(2 * PAGES)?)?;
                ensure!(session.is_silent()?, "an answer too many");
                neighbour
                    .exercise(u64::from(round % 16) * 64, round)
                    .context("the guest of another disk")?;
                round += 1;
            }
            Ok(())
        };
        let result = go_on();
        over.store(true, Relaxed);
        result
    })
}

/// Number of sectors that remain of the file.
const LEFT: u64 = SECTORS / 2;

/// Returns a disk in a file of this name, all of it mapped, and the file.
fn in_file(lab: &Lab, files: &Filesystem, name: &str) -> Result<TapScene> {
    let path = files.file(name);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(SECTORS * 512)?;
    let scene = scene_on(lab, &file, &path)?;
    map(&scene.node, SECTORS, true)?;
    Ok(scene)
}

/// Executes and answers the delivered requests; failures are answered as such. Returns how many of them the kernel had
/// tried.
fn serve_or_fail(node: &TapNode, store: &DiskData) -> Result<u64> {
    let (mut commits, mut tried) = (Vec::new(), 0);
    for tag in node.exchange(&[]).context("an honest fetch is refused")? {
        let desc = node.desc(tag)?;
        tried += u64::from(desc.flags & DESC_REPLAY != 0);
        let result = match store.execute(node, &desc) {
            Ok(()) => 0,
            Err(_) => -libc::EIO,
        };
        commits.push(Completion {
            result,
            ..done(&desc)
        });
    }
    node.commit(&commits).context("a commit is refused")?;
    Ok(tried)
}

/// Serves while `frontend` runs; returns how many requests the kernel had tried before.
fn while_tried<T: Send>(
    node: &TapNode,
    store: &DiskData,
    frontend: impl FnOnce() -> Result<T> + Send,
) -> Result<(T, u64)> {
    thread::scope(|scope| {
        let guest = scope.spawn(frontend);
        let mut tried = 0;
        while !guest.is_finished() {
            tried += serve_or_fail(node, store)?;
            thread::yield_now();
        }
        let result = guest.join().map_err(|_| anyhow!("the frontend died"))?;
        Ok((result?, tried))
    })
}

fn tap_file_shortened(lab: &mut Lab) -> Result<()> {
    let files = Filesystem::make(&lab.disk)?;
    let mut scene = in_file(lab, &files, "a.img")?;
    let mut neighbour = in_file(lab, &files, "b.img")?;
    beyond_the_end(&mut scene)?;
    scene.store.file().set_len(SECTORS * 512)?;
    map(&scene.node, SECTORS, true)?;
    let tried = shorter_and_longer(lab, &mut scene, &mut neighbour.session)?;
    ensure!(tried > 0, "the kernel has never found the file too short");
    // The disk works again when the file has its old length.
    scene.store.file().set_len(SECTORS * 512)?;
    for mut scene in [scene, neighbour] {
        map(&scene.node, SECTORS, true)?;
        let before = scene.disk.info()?.direct;
        scene.session.exercise(LEFT + 64, 0xf11e)?;
        let after = scene.disk.info()?.direct;
        ensure!(after > before, "the kernel has executed nothing: {after}");
        scene.finish()?;
    }
    files.unmount()
}

/// Sends one request after the other in a file that is shorter than the kernel knows.
fn beyond_the_end(scene: &mut TapScene) -> Result<()> {
    let TapScene {
        session,
        store,
        node,
        disk,
    } = scene;
    // The file has a part of the range, and the rest was never written.
    session.exercise(LEFT - 8, 0xf1)?;
    store.file().set_len(LEFT * 512)?;
    let before = disk.info()?;
    let seg = session.segs(2);
    for (what, sector) in [("behind", LEFT + 800), ("over", LEFT - 8)] {
        let read = rw(OP_READ, 1, sector, &seg);
        let ((), tried) = while_tried(node, store, || session.expect(&read, ERROR))
            .with_context(|| format!("a read {what} the end"))?;
        ensure!(tried == 1, "{tried} replays of a read {what} the end");
    }
    let info = disk.info()?;
    ensure!(
        info.replayed - before.replayed == 2 && info.direct == before.direct,
        "what the kernel could not read is not counted: {before:?}, {info:?}"
    );
    // The rest of the file is unchanged.
    session.exercise(0, 0xf2)?;
    ensure!(disk.info()?.direct > info.direct, "{:?}", disk.info()?);
    // The kernel reads the length of the file when the process maps the disk.
    map(node, SECTORS, false)?;
    map(node, LEFT, true)?;
    session.exercise(0, 0xf3)?;
    let read = rw(OP_READ, 2, LEFT, &seg);
    let ((), tried) = while_tried(node, store, || session.expect(&read, ERROR))?;
    ensure!(tried == 0, "the kernel has read what is not mapped");
    Ok(())
}

/// Changes the length of the file all the time, during reads, writes and recalls of the whole disk. Returns the number
/// of requests that the kernel could not execute.
fn shorter_and_longer(lab: &mut Lab, scene: &mut TapScene, neighbour: &mut Session) -> Result<u64> {
    let TapScene {
        session,
        store,
        node,
        ..
    } = scene;
    let over = AtomicBool::new(false);
    let changing = &over;
    let (node, file) = (&*node, store.file());
    let result = thread::scope(|scope| -> Result<u64> {
        let changes = [
            scope.spawn(move || -> Result<()> {
                while !changing.load(Relaxed) {
                    file.set_len(LEFT * 512)?;
                    thread::yield_now();
                    file.set_len(SECTORS * 512)?;
                }
                Ok(())
            }),
            scope.spawn(move || -> Result<()> {
                while !changing.load(Relaxed) {
                    // The kernel may take or refuse a mapping of the second half.
                    let before = node.maps(&[recall(0, u64::MAX)])?;
                    node.maps(&[set(0, SECTORS, before.generation), flush()])?;
                }
                Ok(())
            }),
        ];
        let tried = while_tried(node, store, || {
            let result = whole_disk(session, neighbour);
            over.store(true, Relaxed);
            result
        });
        over.store(true, Relaxed);
        for change in changes {
            change.join().map_err(|_| anyhow!("a thread died"))??;
        }
        Ok(tried?.1)
    });
    lab.bystander()?;
    result
}

/// Sends requests for the whole disk: those of the first half must be right, the others must be answered.
fn whole_disk(session: &mut Session, neighbour: &mut Session) -> Result<()> {
    let segs = session.segs(4);
    for round in 0..96u32 {
        let at = u64::from(round % 32) * 64;
        let requests: Vec<WireRequest> = (0..16)
            .map(|id| {
                let op = if id % 2 == 0 { OP_READ } else { OP_WRITE };
                rw(op, id, LEFT + at + id * 32, &segs)
            })
            .collect();
        session.spread(&requests)?;
        for answer in session.answers(requests.len())? {
            ensure!(
                matches!(answer.status, OKAY | ERROR),
                "an answer that no file gives: {answer:?}"
            );
        }
        ensure!(session.is_silent()?, "an answer too many");
        session
            .exercise(at, round)
            .context("what is left of the file")?;
        neighbour
            .exercise(at, round)
            .context("another file of the same file system")?;
    }
    Ok(())
}
