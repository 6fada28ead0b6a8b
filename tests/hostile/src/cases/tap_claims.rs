// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Claims of a process, and a process that predates claims.

use super::{case, tap_claims, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::WIDE;
use crate::tap::scene::{wait_status, TapScene};
use crate::tap::server::{answer, done, DiskData, Pipe};
use crate::tap::uring::{CommandMemory, Ring};
use crate::tap::{expect, TapDisk, TapNode, CLAIMS, SECTORS};
use crate::wait;
use crate::wire::{rw, ERROR};
use anyhow::{ensure, Context, Result};
use ring::abi::OP_WRITE;
use ring::tap::abi::{
    Claims, Desc, CLAIMS_MAX_SIZE, DESC_REPLAY, FEATURE_URING_CMD, FENCE_LOCAL, FENCE_NONE,
    FENCE_SESSION, GEOMETRY_WRITE_CACHE, MAX_SETTLE_MS, OP_DISCARD, OP_FLUSH, STATE_FENCING,
    STATE_LIVE, STATE_OPEN,
};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};
use zerocopy::{FromZeros, IntoBytes};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_claims::tap_claims,
            "claims of wrong sizes, with junk, too late, too few"
        ),
        case!(
            tap_claims::tap_before_claims,
            "a process of the time before there were claims serves and is replaced"
        ),
        case!(
            tap_claims::tap_fence_classes,
            "the end of a process decides what becomes of what it had, as it claimed"
        ),
        case!(
            tap_claims::tap_starts_again,
            "a process that claims and starts again gets each request once"
        ),
    ]
}

/// Returns claims of `size` bytes, with the byte at `junk` set.
fn sized(size: u32, junk: Option<usize>) -> Vec<u8> {
    let mut bytes = CLAIMS.as_bytes().to_vec();
    bytes.resize(size as usize, 0);
    bytes[..4].copy_from_slice(&size.to_ne_bytes());
    if let Some(at) = junk {
        bytes[at] = 1;
    }
    bytes
}

fn tap_claims(lab: &mut Lab) -> Result<()> {
    let disk = TapDisk::make()?;
    let node = disk.open()?;
    node.describe(SECTORS, GEOMETRY_WRITE_CACHE)?;
    let ours = CLAIMS.size;
    for size in [4, 8, ours - 1] {
        expect(
            "small claims",
            node.claim_bytes(&sized(size, None)),
            &[libc::EINVAL],
        )?;
    }
    let larger = CLAIMS_MAX_SIZE + 8;
    expect(
        "huge claims",
        node.claim_bytes(&sized(larger, None)),
        &[libc::E2BIG],
    )?;
    for size in [ours + 1, ours + 64, ours + 65, CLAIMS_MAX_SIZE] {
        node.claim_bytes(&sized(size, None))
            .with_context(|| format!("claims of {size} bytes of which the rest is zero"))?;
        for at in [ours, size - 1] {
            let junk = sized(size, Some(at as usize));
            expect(
                "claims that we do not know",
                node.claim_bytes(&junk),
                &[libc::E2BIG],
            )?;
        }
    }
    let unknown = [libc::EOPNOTSUPP];
    for bit in [4, 7, 32, 63] {
        let operations = Claims {
            operations: 1 << bit,
            ..CLAIMS
        };
        expect("an unknown operation", node.claim(&operations), &unknown)?;
    }
    for bit in [32, 63] {
        let features = Claims {
            features: 1 << bit,
            ..CLAIMS
        };
        expect("an unknown feature", node.claim(&features), &unknown)?;
    }
    for (fence, settle_ms) in [
        (0, 0),
        (FENCE_LOCAL, 1),
        (FENCE_SESSION, 0),
        (FENCE_SESSION, MAX_SETTLE_MS + 1),
        (FENCE_NONE, 1),
    ] {
        let fence = Claims {
            fence,
            settle_ms,
            ..CLAIMS
        };
        expect("no fence", node.claim(&fence), &[libc::EINVAL])?;
    }
    for later in [4, u32::MAX] {
        let fence = Claims {
            fence: later,
            settle_ms: later,
            ..CLAIMS
        };
        expect("a fence of later", node.claim(&fence), &unknown)?;
    }
    // A disk that offers guests more operations than the process understands.
    let few = Claims {
        operations: CLAIMS.operations & !(1 << OP_DISCARD | 1 << OP_FLUSH),
        ..CLAIMS
    };
    node.claim(&few)?;
    for _ in 0..3 {
        expect("a start without claims", node.start_unclaimed(), &unknown)?;
        let info = node.ask()?;
        ensure!(
            info.lacking == 1 << OP_DISCARD | 1 << OP_FLUSH && info.state == STATE_OPEN,
            "after a start that was refused: {info:?}"
        );
    }
    // Threads claim both in turn while another one starts: one of the two must count as a whole.
    let over = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        for claims in [few, CLAIMS] {
            let node = &node;
            let over = &over;
            scope.spawn(move || while !over.load(Relaxed) && node.claim(&claims).is_ok() {});
        }
        let started = wait::until("a start", Duration::from_secs(20), || {
            Ok(node.start_unclaimed().ok())
        });
        over.store(true, Relaxed);
        started
    })?;
    // A process without requests may claim again, and is then as before its start.
    node.claim(&CLAIMS)?;
    ensure!(node.ask()?.state == STATE_OPEN, "{:?}", node.ask()?);
    expect("a read before the start", node.read(), &[libc::EINVAL])?;
    node.start_unclaimed()?;
    ensure!(node.ask()?.state == STATE_LIVE, "{:?}", node.ask()?);
    drop(node);
    // The feature for commands was not claimed.
    let node = disk.open()?;
    node.describe(SECTORS, GEOMETRY_WRITE_CACHE)?;
    let features = CLAIMS.features & !FEATURE_URING_CMD;
    node.claim(&Claims { features, ..CLAIMS })?;
    node.start_unclaimed()?;
    let mut ring = Ring::new()?;
    ring.exchange(&node, &CommandMemory::new(&[]), 1)?;
    let refused = ring.next(Duration::from_secs(20))?;
    ensure!(refused == Some((1, -libc::EOPNOTSUPP)), "{refused:?}");
    drop((ring, node));
    lab.bystander()?;
    disk.destroy()
}

fn tap_fence_classes(lab: &mut Lab) -> Result<()> {
    const SETTLE: Duration = Duration::from_millis(1500);
    const WIDER: Duration = Duration::from_millis(2500);
    const PAGE: usize = 4096;
    let session = |settle: Duration| Claims {
        fence: FENCE_SESSION,
        // CAST: a small number.
        settle_ms: settle.as_millis() as u32,
        ..CLAIMS
    };
    let mut scene = TapScene::new(lab)?;
    scene = restart(scene, &session(SETTLE))?;
    scene.take(4)?;
    expect(
        "claims with requests in hand",
        scene.node.claim(&CLAIMS),
        &[libc::EINVAL],
    )?;
    // Only its fence may become later now: the process is served on.
    scene.node.claim(&session(WIDER))?;
    let info = scene.node.ask()?;
    ensure!(
        info.state == STATE_LIVE && info.delivered == 4,
        "after a claim that widens: {info:?}"
    );
    for other in [
        session(Duration::from_millis(1)),
        Claims {
            fence: FENCE_NONE,
            features: 0,
            ..CLAIMS
        },
    ] {
        expect(
            "a claim of something else",
            scene.node.claim(&other),
            &[libc::EINVAL],
        )?;
    }
    // A page stays in use longer than the I/O needs to settle, like that of a hung transfer.
    let mut pipe = Pipe::new()?;
    let pinned = scene.node.arena().pin_into(pipe.write.as_raw_fd(), PAGE)?;
    ensure!(pinned == PAGE, "only {pinned} bytes were pinned");
    let died = Instant::now();
    drop(scene.node);
    wait::until("the time in which I/O settles", ANSWER, || {
        Ok((died.elapsed() > WIDER).then_some(()))
    })?;
    ensure!(
        scene.disk.info()?.state == STATE_FENCING,
        "a page is in use: {:?}",
        scene.disk.info()?
    );
    pipe.read.read_exact(&mut [0; PAGE])?;
    let free = Instant::now();
    // No page of the arena is in use, but the disk cannot be opened yet.
    let busy = TapNode::file(&scene.disk.path(), libc::O_NONBLOCK);
    expect("an opener while I/O settles", busy, &[libc::EBUSY])?;
    expect(
        "an end while I/O settles",
        scene.disk.try_destroy()?,
        &[libc::EBUSY],
    )?;
    ensure!(
        scene.disk.info()?.state == STATE_FENCING,
        "{:?}",
        scene.disk.info()?
    );
    scene.node = scene.disk.open()?;
    let waited = free.elapsed();
    ensure!(waited >= WIDER, "the fence was over after {waited:?}");
    scene.node.describe(SECTORS, GEOMETRY_WRITE_CACHE)?;
    let none = Claims {
        fence: FENCE_NONE,
        ..CLAIMS
    };
    scene.node.claim(&none)?;
    scene.node.start_unclaimed()?;
    // Replayed by a process whose I/O has no known end.
    let mut tags = Vec::new();
    while tags.len() < 4 {
        tags.extend(scene.node.read()?);
    }
    for tag in &tags {
        let desc = scene.node.desc(*tag)?;
        ensure!(
            desc.flags & DESC_REPLAY != 0 && desc.deliveries == 2,
            "{desc:?} is not the second delivery"
        );
    }
    drop(scene.node);
    for answer in scene.session.answers(4)? {
        ensure!(answer.status == ERROR, "it was not refused: {answer:?}");
    }
    // The next process serves the disk normally.
    scene.node = scene.disk.start()?;
    let info = scene.node.ask()?;
    ensure!(info.waiting == 0 && info.delivered == 0, "{info:?}");
    // All I/O of a process with this claim is over when it ends.
    scene = restart(
        scene,
        &Claims {
            fence: FENCE_SESSION,
            settle_ms: MAX_SETTLE_MS,
            ..CLAIMS
        },
    )?;
    wait_status(&scene.session, "live")?;
    scene.node.claim(&CLAIMS)?;
    // The frontend's side learns at once that no process serves it.
    wait_status(&scene.session, "recovering")?;
    drop(scene.node);
    scene.node = scene.disk.start()?;
    // No other claim has that effect.
    scene = restart(scene, &session(SETTLE))?;
    scene.node.claim(&session(Duration::from_millis(1)))?;
    drop(scene.node);
    let died = Instant::now();
    scene.node = scene.disk.start()?;
    let waited = died.elapsed();
    ensure!(waited >= SETTLE, "the fence was over after {waited:?}");
    drop(scene.node);
    // The process was never started, but may have opened its storage.
    let reached = scene.disk.open()?;
    reached.claim(&session(SETTLE))?;
    drop(reached);
    let died = Instant::now();
    scene.node = scene.disk.start()?;
    let waited = died.elapsed();
    ensure!(waited >= SETTLE, "the fence was over after {waited:?}");
    scene.finish()
}

/// Some requests wait for others when the process starts for the second time.
fn tap_starts_again(lab: &mut Lab) -> Result<()> {
    const WRITES: u64 = 4;
    let mut scene = TapScene::on(lab, TapDisk::make_judging(2)?)?;
    scene.take(WRITES)?;
    drop(scene.node);
    // From now on each of those is delivered alone, and overlapping requests wait.
    let segs = scene.session.segs(1);
    let write = |id| rw(OP_WRITE, id, (id - WRITES) * 8, &segs);
    let writes: Vec<_> = (WRITES..2 * WRITES).map(write).collect();
    scene.session.spread(&writes)?;
    let all = 2 * WRITES as u32;
    scene
        .disk
        .wait("requests that wait", |info| info.waiting == all)?;
    scene.node = scene.disk.start()?;
    for _ in 0..3 {
        // Sorts the requests without a delivery.
        wait::readable(scene.node.file.as_raw_fd(), ANSWER)?;
        scene.node.claim(&CLAIMS)?;
        scene.node.start_unclaimed()?;
    }
    let mut served = 0;
    let start = Instant::now();
    while served < all {
        let tags = scene.node.exchange(&[])?;
        let info = scene.node.ask()?;
        ensure!(
            info.delivered as usize == tags.len() && info.waiting + info.delivered == all - served,
            "{tags:?} were handed out after {served} of {all}: {info:?}"
        );
        answer(&scene.node, &scene.store, &tags)?;
        served += tags.len() as u32;
        ensure!(start.elapsed() < ANSWER, "{served} of {all} requests");
    }
    scene.answered(all as usize)?;
    scene.finish()
}

/// Starts another process with these claims.
fn restart(scene: TapScene, claims: &Claims) -> Result<TapScene> {
    let TapScene {
        session,
        store,
        node,
        disk,
    } = scene;
    drop(node);
    let node = disk.open()?;
    node.describe(SECTORS, GEOMETRY_WRITE_CACHE)?;
    node.claim(claims)?;
    node.start_unclaimed()?;
    Ok(TapScene {
        session,
        store,
        node,
        disk,
    })
}

/// A process that predates claims. Numbers and offsets are literals, as it was compiled with.
struct Before(TapNode);

impl Before {
    const INFO: u64 = 0x80b8_7810;
    const SET_PARAMS: u64 = 0x4010_7811;
    const START: u64 = 0x7812;
    const EXCHANGE: u64 = 0xc020_7813;

    fn call(&self, number: u64, argument: *mut u64) -> Result<i32> {
        // SAFETY: The kernel reads and writes as many bytes as the number says. The callers have memory for these, and
        // for the arrays that they name.
        let result = unsafe { libc::ioctl(self.0.file.as_raw_fd(), number, argument) };
        ensure!(
            result >= 0,
            "call {number:#x}: {}",
            std::io::Error::last_os_error()
        );
        Ok(result)
    }

    fn start(disk: &TapDisk) -> Result<Before> {
        let before = Before(disk.open()?);
        let mut info = [0u64; 23];
        before.call(Before::INFO, info.as_mut_ptr())?;
        ensure!(info[0] & 0xffff_ffff == 1, "version of {info:x?}");
        // Size, block sizes, a volatile cache; then the discard limits.
        let sectors = SECTORS as u32;
        let mut records: [u32; 14] = [1, 24, sectors, 0, 512, 4096, 2, 0, 2, 16, 4096, 0, 0, 0];
        let mut buffer = [records.as_mut_ptr() as u64, 56];
        before.call(Before::SET_PARAMS, buffer.as_mut_ptr())?;
        before.call(Before::START, std::ptr::null_mut())?;
        Ok(before)
    }

    /// Commits the answers of the last call, and fetches.
    fn exchange(&self, store: &DiskData, answers: &mut Vec<[u32; 4]>) -> Result<()> {
        let (mut tags, commits) = ([0u16; 32], std::mem::take(answers));
        let mut arrays = [
            commits.as_ptr() as u64,
            commits.len() as u64,
            tags.as_mut_ptr() as u64,
            tags.len() as u64,
        ];
        let count = self.call(Before::EXCHANGE, arrays.as_mut_ptr())?;
        for tag in &tags[..count as usize] {
            let mut words = [0u64; 8];
            let at = usize::from(*tag) * 64;
            self.0.descriptors().read(at, words.as_mut_bytes())?;
            let mut desc = Desc::new_zeroed();
            desc.tag = *tag;
            desc.op = words[0] as u8;
            desc.segments = (words[0] >> 16) as u16;
            desc.generation = (words[0] >> 32) as u32;
            (desc.sector, desc.sectors) = (words[1], words[2]);
            if desc.op < 2 {
                store.execute(&self.0, &desc)?;
            }
            let done = done(&desc);
            let mut answer = [0; 4];
            answer.as_mut_bytes().copy_from_slice(done.as_bytes());
            answers.push(answer);
        }
        Ok(())
    }
}

fn tap_before_claims(lab: &mut Lab) -> Result<()> {
    let (disk, store) = (TapDisk::make()?, DiskData::new()?);
    let before = Before::start(&disk)?;
    let mut session = lab.session_on_tap(&disk, WIDE)?;
    let serve = |before: &Before, session: &mut crate::session::Session, seed| -> Result<()> {
        thread::scope(|scope| {
            let guest = scope.spawn(|| session.exercise(u64::from(seed) * 64, seed));
            let mut answers = Vec::new();
            while !guest.is_finished() {
                before.exchange(&store, &mut answers)?;
                thread::yield_now();
            }
            guest
                .join()
                .unwrap_or_else(|_| anyhow::bail!("the frontend's thread died"))
        })
    };
    serve(&before, &mut session, 1)?;
    drop(before);
    // A current process takes over, and an old one replaces it.
    let node = disk.start()?;
    crate::tap::scene::while_served(&node, &store, || session.exercise(640, 2))?;
    drop(node);
    let before = Before::start(&disk)?;
    serve(&before, &mut session, 3)?;
    let info = before.0.ask()?;
    ensure!(info.refused == 0, "{info:?}");
    drop(before);
    let scene = TapScene {
        session,
        store,
        node: disk.start()?,
        disk,
    };
    scene.finish()
}
