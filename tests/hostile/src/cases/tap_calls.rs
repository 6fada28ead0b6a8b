// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Calls of a hostile process of a tap disk.

use super::{case, tap_calls, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::tap::scene::{serve_until, while_served, TapScene};
use crate::tap::server::{answer, done};
use crate::tap::{expect, FileMapping, TapDisk, TapNode, UnmappedAddresses, SECTORS};
use crate::wire::{flush, rw, OKAY};
use anyhow::{ensure, Result};
use ring::abi::{OP_READ, OP_WRITE};
use ring::tap::abi::{
    ioctl, kept, Completion, COMPLETION_RETURNED, GEOMETRY_MAY_SHRINK, GEOMETRY_WRITE_CACHE,
    MMAP_ARENA, MMAP_DESCRIPTORS, NO_TAG, STATE_LIVE,
};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_calls::tap_serve,
            "an honest process: right data, flushes, discards, a resize"
        ),
        case!(
            tap_calls::tap_false_completions,
            "completions that name no delivered request are counted and do nothing"
        ),
        case!(
            tap_calls::tap_bad_arguments,
            "arrays and structures that lie nowhere, are too long, or hold junk"
        ),
        case!(
            tap_calls::tap_bad_descriptions,
            "descriptions of impossible disks"
        ),
        case!(
            tap_calls::tap_mappings,
            "areas mapped with the wrong size, place or protection"
        ),
        case!(
            tap_calls::tap_returned_requests,
            "requests that are returned are delivered again, never lost"
        ),
        case!(
            tap_calls::tap_racing_threads,
            "threads exchange at once, and another one opens and describes"
        ),
        case!(
            tap_calls::tap_wild_arena,
            "the process scribbles over the arena while the guest writes and reads"
        ),
    ]
}

fn tap_serve(lab: &mut Lab) -> Result<()> {
    let TapScene {
        mut session,
        store,
        node,
        disk,
    } = TapScene::new(lab)?;
    while_served(&node, &store, || {
        for round in 0..16 {
            session.exercise(round * 64, round as u32)?;
        }
        let start = session.vbd.offered("sectors")?;
        ensure!(start == Some(SECTORS), "{start:?} sectors are offered");
        expect(
            "a smaller disk that does not say so",
            node.describe(SECTORS / 2, GEOMETRY_WRITE_CACHE),
            &[libc::ERANGE],
        )?;
        node.describe(SECTORS / 2, GEOMETRY_WRITE_CACHE | GEOMETRY_MAY_SHRINK)?;
        crate::wait::until("the new size", crate::vbd::SOON, || {
            Ok((session.vbd.offered("sectors")? == Some(SECTORS / 2)).then_some(()))
        })?;
        let beyond = rw(OP_READ, 1, SECTORS / 2, &session.segs(1));
        session.expect(&beyond, crate::wire::ERROR)?;
        session.exercise(0, 99)?;
        let status = session
            .vbd
            .store
            .read(&format!("{}/tap-status", session.vbd.back))?;
        ensure!(status.as_deref() == Some("live"), "tap-status {status:?}");
        session.finish()
    })?;
    drop(node);
    disk.destroy()
}

fn tap_false_completions(lab: &mut Lab) -> Result<()> {
    let mut scene = TapScene::new(lab)?;
    let tags = scene.take(4)?;
    let good: Vec<Completion> = tags
        .iter()
        .map(|tag| Ok(done(&scene.node.desc(*tag)?)))
        .collect::<Result<_>>()?;
    let before = scene.node.ask()?;
    let mut bad = Vec::new();
    for tag in [0, 1, 31, 511, 512, 4095, 4096, NO_TAG] {
        for generation in [0, 1, 2, u32::MAX] {
            let wrong = Completion {
                tag,
                generation,
                ..Completion::default()
            };
            if !good.contains(&wrong) {
                bad.push(wrong);
            }
        }
    }
    for chunk in bad.chunks(7) {
        scene.node.commit(chunk)?;
    }
    let after = scene.node.ask()?;
    ensure!(
        after.refused - before.refused == bad.len() as u64 && after.delivered == 4,
        "of {} false completions {} were refused: {after:?}",
        bad.len(),
        after.refused - before.refused
    );
    // Valid completions twice, in one call and in the next one.
    scene.node.commit(&[good[0], good[0], good[1]])?;
    scene.node.commit(&[good[1], good[2], good[3]])?;
    let end = scene.node.ask()?;
    ensure!(
        end.refused - after.refused == 2 && end.delivered == 0 && end.state == STATE_LIVE,
        "after double completions: {end:?}"
    );
    scene.answered(4)?;
    scene.finish()
}

fn tap_bad_arguments(lab: &mut Lab) -> Result<()> {
    let mut scene = TapScene::new(lab)?;
    let fault = [libc::EFAULT, libc::EINVAL];
    for place in UnmappedAddresses::ALL {
        for number in [
            ioctl::INFO,
            ioctl::SET_PARAMS,
            ioctl::EXCHANGE,
            ioctl::CLAIM,
            ioctl::MAP,
        ] {
            expect(
                "an argument nowhere",
                scene.node.call_nowhere(number, place),
                &fault,
            )?;
        }
        for len in [1, 64, 4096, 4097, u32::MAX] {
            let commits = scene
                .node
                .exchange_at((place, len), (UnmappedAddresses::Null, 0));
            expect("completions nowhere", commits, &fault)?;
            expect(
                "records nowhere",
                scene.node.set_params_at(place.address(), len),
                &fault,
            )?;
        }
    }
    let not_known = [libc::ENOTTY, libc::EINVAL];
    let unknown = scene
        .node
        .call_nowhere(ioctl::EXCHANGE ^ 0x40, UnmappedAddresses::Null);
    expect("an unknown number", unknown, &not_known)?;
    let of_control = [
        ioctl::CREATE,
        ioctl::BACKING_ADD,
        ioctl::BACKING_REMOVE,
        ioctl::MAPPED,
    ];
    for number in of_control {
        let unknown = scene.node.call_nowhere(number, UnmappedAddresses::Null);
        expect("a number of the control node", unknown, &not_known)?;
    }
    let control = crate::tap::control()?;
    for number in [ioctl::BACKING_ADD, ioctl::BACKING_REMOVE, ioctl::MAPPED] {
        for place in UnmappedAddresses::ALL {
            let nowhere = crate::tap::call_nowhere(&control, number, place);
            expect("an argument nowhere", nowhere, &fault)?;
        }
    }
    // The kernel does not lose tags that it could not copy to the process.
    let segs = scene.session.segs(1);
    let writes: Vec<_> = (0..8).map(|id| rw(OP_WRITE, id, id * 8, &segs)).collect();
    scene.session.spread(&writes)?;
    scene
        .disk
        .wait("requests that wait", |info| info.waiting == 8)?;
    for place in UnmappedAddresses::ALL {
        let tags = scene
            .node
            .exchange_at((UnmappedAddresses::Null, 0), (place, 8));
        expect("tags nowhere", tags, &fault)?;
    }
    let later = Completion {
        flags: kept::COMPLETION_RETRY_LATER,
        ..Completion::default()
    };
    expect(
        "a flag of later",
        scene.node.commit(&[later]),
        &[libc::EOPNOTSUPP],
    )?;
    for number in [kept::HANDOFF, kept::SESSION_OVER] {
        let number = 0x7800 | number;
        let later = scene.node.call_nowhere(number, UnmappedAddresses::Null);
        expect("a number of later", later, &[libc::EOPNOTSUPP])?;
        let later = crate::tap::call_nowhere(&control, number, UnmappedAddresses::Null);
        expect("a number of later", later, &[libc::EOPNOTSUPP])?;
    }
    let mapping = [kept::PARAM_MAPPING, 16, 0, 0, 0, 0];
    let later = scene.node.set_params(mapping.as_bytes());
    expect("a record of later", later, &[libc::EOPNOTSUPP])?;
    for flags in [4, u16::MAX] {
        let junk = Completion {
            flags,
            ..Completion::default()
        };
        expect("unknown flags", scene.node.commit(&[junk]), &[libc::EINVAL])?;
    }
    for result in [1, i32::MAX, i32::MIN, -4096] {
        let junk = Completion {
            result,
            ..Completion::default()
        };
        expect(
            "an impossible result",
            scene.node.commit(&[junk]),
            &[libc::EINVAL],
        )?;
    }
    let TapScene { node, store, .. } = &scene;
    let mut left = 8usize;
    let start = Instant::now();
    while left > 0 {
        let tags = node.exchange(&[])?;
        answer(node, store, &tags)?;
        left -= tags.len();
        ensure!(start.elapsed() < ANSWER, "{left} requests are lost");
    }
    scene.answered(8)?;
    scene.finish()
}

fn tap_bad_descriptions(lab: &mut Lab) -> Result<()> {
    let disk = TapDisk::make()?;
    let node = disk.open()?;
    let invalid = [libc::EINVAL];
    expect(
        "a start before a description",
        node.start_unclaimed(),
        &invalid,
    )?;
    expect("an exchange before the start", node.exchange(&[]), &invalid)?;
    for sectors in [0, 1 << 62, u64::MAX] {
        expect("an impossible size", node.describe(sectors, 0), &invalid)?;
    }
    for flags in [8, 0x8000_0000] {
        expect("unknown flags", node.describe(SECTORS, flags), &invalid)?;
    }
    expect("no record", node.set_params(&[]), &invalid)?;
    let mut rng = crate::rng::Rng::new(7);
    for len in 1..200usize {
        let junk: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
        expect("junk", node.set_params(&junk), &invalid)?;
    }
    node.describe(SECTORS, 0)?;
    expect("another kind of disk", node.describe(SECTORS, 1), &invalid)?;
    node.start()?;
    expect("a second start", node.start_unclaimed(), &invalid)?;
    expect("another kind of disk", node.describe(SECTORS, 2), &invalid)?;
    expect(
        "a second opener",
        TapNode::file(&disk.path(), 0),
        &[libc::EBUSY],
    )?;
    expect("an end while open", disk.try_destroy()?, &[libc::EBUSY])?;
    drop(node);
    // The next process cannot change the disk either.
    let node = disk.open()?;
    expect("another kind of disk", node.describe(SECTORS, 2), &invalid)?;
    node.describe(SECTORS * 2, 0)?;
    drop(node);
    lab.bystander()?;
    disk.destroy()
}

fn tap_mappings(lab: &mut Lab) -> Result<()> {
    let scene = TapScene::new(lab)?;
    let node = &scene.node;
    let (read, both) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE);
    let info = node.info;
    let (small, large) = (info.descriptors_len as usize, info.arena_len as usize);
    let refused = [libc::EINVAL, libc::EACCES, libc::EPERM];
    let wrong = [
        (
            "writable descriptors",
            MMAP_DESCRIPTORS,
            small,
            both,
            libc::MAP_SHARED,
        ),
        (
            "private descriptors",
            MMAP_DESCRIPTORS,
            small,
            both,
            libc::MAP_PRIVATE,
        ),
        (
            "too many descriptors",
            MMAP_DESCRIPTORS,
            small + 4096,
            read,
            libc::MAP_SHARED,
        ),
        (
            "a part of the descriptors",
            MMAP_DESCRIPTORS,
            4096,
            read,
            libc::MAP_SHARED,
        ),
        (
            "a page behind",
            MMAP_DESCRIPTORS + 4096,
            small,
            read,
            libc::MAP_SHARED,
        ),
        (
            "a private arena",
            MMAP_ARENA,
            large,
            both,
            libc::MAP_PRIVATE,
        ),
        (
            "too large an arena",
            MMAP_ARENA,
            large + 4096,
            both,
            libc::MAP_SHARED,
        ),
        (
            "half an arena",
            MMAP_ARENA,
            large / 2,
            both,
            libc::MAP_SHARED,
        ),
        (
            "behind the arena",
            MMAP_ARENA + large as u64,
            large,
            both,
            libc::MAP_SHARED,
        ),
        ("far away", 1 << 40, 4096, both, libc::MAP_SHARED),
        (
            "an executable arena",
            MMAP_ARENA,
            large,
            both | libc::PROT_EXEC,
            libc::MAP_SHARED,
        ),
    ];
    for (what, offset, len, protection, flags) in wrong {
        let map = FileMapping::new(&node.file, offset, len, protection, flags);
        expect(what, map, &refused)?;
    }
    expect("writable later", node.descriptors().protect(both), &refused)?;
    expect(
        "executable later",
        node.arena().protect(both | libc::PROT_EXEC),
        &refused,
    )?;
    for map in [node.descriptors(), node.arena()] {
        let grown = map.grow();
        expect(
            "a mapping that grows",
            grown,
            &[libc::EFAULT, libc::EINVAL, libc::ENOMEM],
        )?;
    }
    // More honest mappings than a process needs.
    for _ in 0..64 {
        drop(FileMapping::new(
            &node.file,
            MMAP_ARENA,
            large,
            both,
            libc::MAP_SHARED,
        )?);
        drop(FileMapping::new(
            &node.file,
            MMAP_DESCRIPTORS,
            small,
            read,
            libc::MAP_SHARED,
        )?);
    }
    scene.finish()
}

fn tap_returned_requests(lab: &mut Lab) -> Result<()> {
    let mut scene = TapScene::new(lab)?;
    let mut tags = scene.take(12)?;
    for round in 0..50 {
        let returned: Vec<Completion> = tags
            .iter()
            .map(|tag| {
                let desc = scene.node.desc(*tag)?;
                Ok(Completion {
                    flags: COMPLETION_RETURNED,
                    ..done(&desc)
                })
            })
            .collect::<Result<_>>()?;
        scene.node.commit(&returned)?;
        tags.clear();
        let start = Instant::now();
        while tags.len() < 12 {
            tags.extend(scene.node.exchange(&[])?);
            ensure!(
                start.elapsed() < ANSWER,
                "round {round}: only {tags:?} came back"
            );
        }
    }
    answer(&scene.node, &scene.store, &tags)?;
    scene.answered(12)?;
    scene.finish()
}

fn tap_racing_threads(lab: &mut Lab) -> Result<()> {
    let mut scene = TapScene::new(lab)?;
    let TapScene {
        session,
        store,
        node,
        disk,
    } = &mut scene;
    let (node, store, disk) = (&*node, &*store, &*disk);
    let over = AtomicBool::new(false);
    let over = &over;
    let guest = move || -> Result<()> {
        let done = (0..64).try_for_each(|round| session.exercise(round * 32, round as u32));
        over.store(true, Relaxed);
        done
    };
    let pest = move || -> Result<()> {
        let junk = [Completion::default(); 32];
        while !over.load(Relaxed) {
            node.commit(&junk)?;
            expect(
                "a second opener",
                TapNode::file(&disk.path(), 0),
                &[libc::EBUSY],
            )?;
            expect("an end while open", disk.try_destroy()?, &[libc::EBUSY])?;
            node.describe(SECTORS, GEOMETRY_WRITE_CACHE)?;
        }
        Ok(())
    };
    let server = move || serve_until(node, store, || over.load(Relaxed));
    thread::scope(|scope| -> Result<()> {
        let mut threads = vec![scope.spawn(guest), scope.spawn(pest)];
        threads.extend((0..3).map(|_| scope.spawn(server)));
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread died"))??;
        }
        Ok(())
    })?;
    scene.finish()
}

fn tap_wild_arena(lab: &mut Lab) -> Result<()> {
    let mut scene = TapScene::new(lab)?;
    let TapScene {
        session,
        store,
        node,
        ..
    } = &mut scene;
    let (node, store) = (&*node, &*store);
    let size = node.info.arena_len as usize;
    while_served(node, store, || {
        let begun = Instant::now();
        let mut rng = crate::rng::Rng::new(3);
        while begun.elapsed() < Duration::from_secs(2) {
            let junk = rng.next().to_ne_bytes();
            for _ in 0..512 {
                node.arena()
                    .write(rng.next() as usize % (size - 8), &junk)?;
            }
            let segs = session.segs(11);
            // The data may be anything, but the guest must get an answer.
            session.expect(&rw(OP_WRITE, 1, 0, &segs), OKAY)?;
            session.expect(&rw(OP_READ, 2, 0, &segs), OKAY)?;
            session.expect(&flush(3), OKAY)?;
        }
        Ok(())
    })?;
    scene.finish()
}
