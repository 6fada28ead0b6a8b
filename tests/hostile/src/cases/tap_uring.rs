// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Commands of io_uring that wait, are malformed, or are cancelled.

use super::{case, tap_uring, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::WIDE;
use crate::tap::scene::TapScene;
use crate::tap::server::{answer, done, DiskData, Pipe, ServerManner, TapServer};
use crate::tap::uring::{CommandMemory, Ring};
use crate::tap::{TapDisk, UnmappedAddresses};
use crate::wait;
use crate::wire::{rw, OKAY};
use anyhow::{bail, ensure, Context, Result};
use ring::abi::OP_WRITE;
use ring::tap::abi::{ioctl, Buffer, MAX_COMMANDS};
use std::collections::HashMap;
use std::time::Duration;

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_uring::tap_ring_serves,
            "a process that only uses io_uring is killed again and again"
        ),
        case!(
            tap_uring::tap_rings_serve,
            "the same of a process with several threads, each with a ring"
        ),
        case!(
            tap_uring::tap_ring_commands,
            "commands that wait, a wrong one, one that is given up"
        ),
        case!(
            tap_uring::tap_ring_many,
            "a thousand commands of two rings, of which as many wait as may"
        ),
        case!(
            tap_uring::tap_ring_faults,
            "a command that waits gets requests and has no place for them"
        ),
        case!(
            tap_uring::tap_ring_thrown_away,
            "rings go away with commands that wait, while requests come"
        ),
    ]
}

const NONE_YET: Duration = Duration::from_millis(50);

fn result(ring: &mut Ring, id: u64) -> Result<i32> {
    let (got, result) = ring.next(ANSWER)?.context("no completion")?;
    ensure!(got == id, "command {got} completed, not {id}");
    Ok(result)
}

fn tap_ring_serves(lab: &mut Lab) -> Result<()> {
    killed_again_and_again(lab, ServerManner::Ring)
}

fn tap_rings_serve(lab: &mut Lab) -> Result<()> {
    killed_again_and_again(lab, ServerManner::Rings)
}

fn killed_again_and_again(lab: &mut Lab, manner: ServerManner) -> Result<()> {
    let (disk, store, pipe) = (TapDisk::make()?, DiskData::new()?, Pipe::new()?);
    let server = TapServer::start(&disk, &store, &pipe, manner)?;
    let mut session = lab.session_on_tap(&disk, WIDE)?;
    session.exercise(0, 1)?;
    let mut server = Some(server);
    for round in 0..12u32 {
        // Its command waits, or is being issued.
        if let Some(server) = server.take() {
            server.kill()?;
        }
        let segs = session.segs(1);
        let write = |id| rw(OP_WRITE, id, id * 8, &segs);
        let writes: Vec<_> = (0..16).map(write).collect();
        session.spread(&writes)?;
        if round % 2 == 0 {
            drop(TapServer::start(&disk, &store, &pipe, manner)?);
        }
        server = Some(TapServer::start(&disk, &store, &pipe, manner)?);
        let answers = session.answers(16)?;
        ensure!(answers.iter().all(|a| a.status == OKAY), "{answers:?}");
        session.exercise(200, round)?;
    }
    session.finish()?;
    drop(server);
    disk.destroy()
}

fn tap_ring_commands(lab: &mut Lab) -> Result<()> {
    let mut scene = TapScene::new(lab)?;
    let mut ring = Ring::new()?;
    let node = &scene.node;
    let wrong = |ring: &mut Ring, what: &str, number, payload, wanted: &[i32]| -> Result<()> {
        for elsewhere in [false, true] {
            ring.command(node, number, payload, 1, elsewhere)?;
            let got = result(ring, 1)?;
            ensure!(wanted.contains(&got), "{what}: {got}, not {wanted:?}");
        }
        Ok(())
    };
    let good = CommandMemory::new(&[]).payload();
    let fault = [-libc::EFAULT, -libc::EINVAL];
    wrong(
        &mut ring,
        "a number",
        ioctl::INFO,
        good,
        &[-libc::EOPNOTSUPP, -libc::ENOTTY],
    )?;
    for len in [0, 2, u32::MAX] {
        let junk = Buffer { len, ..good };
        wrong(
            &mut ring,
            "a length",
            ioctl::EXCHANGE,
            junk,
            &[-libc::EINVAL],
        )?;
    }
    let junk = Buffer {
        reserved: 1,
        ..good
    };
    wrong(
        &mut ring,
        "a reserved field",
        ioctl::EXCHANGE,
        junk,
        &[-libc::EINVAL],
    )?;
    for place in UnmappedAddresses::ALL {
        let junk = Buffer {
            addr: place.address(),
            ..good
        };
        wrong(&mut ring, "an address", ioctl::EXCHANGE, junk, &fault)?;
    }
    // One command waits, and will be cancelled.
    let first = CommandMemory::new(&[]);
    ring.exchange(&scene.node, &first, 10)?;
    ensure!(ring.next(NONE_YET)?.is_none(), "it did not wait");
    // Only the end of a ring cancels a command; an explicit cancel fails.
    ring.cancel(10, 13)?;
    ensure!(
        result(&mut ring, 13)? != 0,
        "a command that waits was cancelled"
    );
    scene.send(1)?;
    let tags = first.tags(result(&mut ring, 10)?)?;
    answer(&scene.node, &scene.store, &tags)?;
    scene.answered(1)?;
    // Another command in its place gets the requests, wherever it was issued; its commits are taken when it is issued.
    let mut commits = Vec::new();
    for (round, elsewhere) in [false, true, false, true].into_iter().enumerate() {
        let memory = CommandMemory::new(&commits);
        let payload = memory.payload();
        ring.command(&scene.node, ioctl::EXCHANGE, payload, 14, elsewhere)?;
        if round > 0 {
            scene.answered(1)?;
        }
        ensure!(ring.next(NONE_YET)?.is_none(), "it did not wait");
        scene.send(1)?;
        let tags = memory.tags(result(&mut ring, 14)?)?;
        ensure!(tags.len() == 1, "{tags:?} for one request");
        let desc = scene.node.desc(tags[0])?;
        scene.store.execute(&scene.node, &desc)?;
        commits = vec![done(&desc)];
    }
    scene.node.commit(&commits)?;
    scene.answered(1)?;
    scene.finish_dead()
}

/// Each command has room for one tag, so that each gets one request.
fn tap_ring_many(lab: &mut Lab) -> Result<()> {
    const ALL: u64 = MAX_COMMANDS as u64;
    let mut scene = TapScene::new(lab)?;
    let mut rings = [Ring::new()?, Ring::new()?];
    let mut waiting = HashMap::new();
    for id in 0..1000u64 {
        let memory = CommandMemory::with_room(1);
        let ring = &mut rings[(id % 2) as usize];
        ring.exchange(&scene.node, &memory, id)?;
        if id < ALL {
            waiting.insert(id, memory);
        } else {
            let refused = result(ring, id)?;
            ensure!(refused == -libc::EBUSY, "command {id} of {ALL}: {refused}");
        }
    }
    // All wait. As many requests wake them all, although each wakes one at most.
    let mut sent = 0;
    while !waiting.is_empty() {
        let count = (waiting.len() as u64).min(24);
        scene.send(count)?;
        for _ in 0..count {
            let (id, got) = either(&mut rings)?;
            let memory = waiting.remove(&id).context("it is over already")?;
            let tags = memory.tags(got)?;
            ensure!(tags.len() == 1, "command {id} has {tags:?}");
            answer(&scene.node, &scene.store, &tags)?;
        }
        scene.answered(count as usize)?;
        sent += count;
    }
    ensure!(sent == ALL, "{sent} requests for {ALL} commands");
    // A ring ends with half of them, which frees their places.
    let mut memories: Vec<CommandMemory> = (0..ALL).map(|_| CommandMemory::with_room(1)).collect();
    for (id, memory) in (0..).zip(&memories) {
        rings[(id % 2) as usize].exchange(&scene.node, memory, id)?;
    }
    rings[0] = Ring::new()?;
    for id in (0..ALL).step_by(2) {
        memories[id as usize] = wait::until("room for a command", ANSWER, || {
            let memory = CommandMemory::with_room(1);
            rings[0].exchange(&scene.node, &memory, id)?;
            match rings[0].next(Duration::ZERO)? {
                None => Ok(Some(memory)),
                Some((_, busy)) if busy == -libc::EBUSY => Ok(None),
                Some(other) => bail!("a command without requests completed: {other:?}"),
            }
        })?;
    }
    for _ in 0..ALL / 16 {
        scene.send(16)?;
        for _ in 0..16 {
            let (id, got) = either(&mut rings)?;
            answer(&scene.node, &scene.store, &memories[id as usize].tags(got)?)?;
        }
        scene.answered(16)?;
    }
    scene.finish_dead()
}

fn either(rings: &mut [Ring]) -> Result<(u64, i32)> {
    wait::until("a command that is over", ANSWER, || {
        for ring in &mut *rings {
            if let Some(over) = ring.next(Duration::ZERO)? {
                return Ok(Some(over));
            }
        }
        Ok(None)
    })
}

fn tap_ring_faults(lab: &mut Lab) -> Result<()> {
    let mut scene = TapScene::new(lab)?;
    let mut ring = Ring::new()?;
    for (id, place) in (20..).zip([
        UnmappedAddresses::Null,
        UnmappedAddresses::NonCanonical,
        UnmappedAddresses::Kernel,
    ]) {
        ring.exchange(
            &scene.node,
            &CommandMemory::with_tags_at(place.address()),
            id,
        )?;
        scene.send(4)?;
        let got = result(&mut ring, id)?;
        ensure!(
            got == -libc::EFAULT || got == -libc::EINVAL,
            "{place:?}: {got}"
        );
        // The requests are not lost.
        scene.serve(4)?;
        scene.answered(4)?;
    }
    scene.finish_dead()
}

fn tap_ring_thrown_away(lab: &mut Lab) -> Result<()> {
    let mut scene = TapScene::new(lab)?;
    for round in 0..40u64 {
        let mut ring = Ring::new()?;
        let waiting = CommandMemory::new(&[]);
        ring.exchange(&scene.node, &waiting, round)?;
        if round % 2 == 0 {
            drop(ring);
            // The kernel ends the ring later; then there is room for another.
            ring = Ring::new()?;
        } else {
            scene.send(1)?;
            let tags = waiting.tags(result(&mut ring, round)?)?;
            ensure!(tags.len() == 1, "{tags:?} for one request");
            // The answer is in a ring that ends right after it.
            let desc = scene.node.desc(tags[0])?;
            scene.store.execute(&scene.node, &desc)?;
            let memory = CommandMemory::new(&[done(&desc)]);
            ring.exchange(&scene.node, &memory, round)?;
            scene.answered(1)?;
            drop(ring);
            ring = Ring::new()?;
        }
        let memory = wait::until("room for a command", ANSWER, || {
            let memory = CommandMemory::new(&[]);
            ring.exchange(&scene.node, &memory, round)?;
            match ring.next(NONE_YET)? {
                None => Ok(Some(memory)),
                Some((_, busy)) if busy == -libc::EBUSY => Ok(None),
                Some(other) => bail!("a command without requests completed: {other:?}"),
            }
        })?;
        scene.send(4)?;
        let tags = memory.tags(result(&mut ring, round)?)?;
        answer(&scene.node, &scene.store, &tags)?;
        scene.serve(4 - tags.len())?;
        scene.answered(4)?;
    }
    scene.finish_dead()
}
