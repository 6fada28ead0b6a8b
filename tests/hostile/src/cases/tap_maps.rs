// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Mappings of a hostile process, and mistakes of its supervisor.

use super::{case, tap_maps, AttackCase};
use crate::lab::Lab;
use crate::rng::Rng;
use crate::session::WIDE;
use crate::tap::maps::{add, flush, give_again, mapped, recall, remove, set, BackedDisk};
use crate::tap::scene::{while_served, TapScene};
use crate::tap::server::DiskData;
use crate::tap::{expect, TapDisk, CLAIMS, SECTORS};
use anyhow::{ensure, Context, Result};
use ring::tap::abi::{
    Claims, MapOp, FEATURE_MAPS, MAP_COLLECT, MAP_NO_BACKING, MAP_READ, MAP_RECALL, MAP_TRACK,
    MAP_WRITE, MAP_ZERO, MAX_BACKINGS, MAX_MAP_OPS,
};
use ring::tap::map::tree::{LEAF, MAX_LEAVES};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_maps::tap_maps_malformed,
            "operations that are malformed, out of range, of no backing, or too many"
        ),
        case!(
            tap_maps::tap_maps_refused,
            "extents that are outside of disk or device, of no backing or stale are counted, and what there is no room for is forgotten"
        ),
        case!(
            tap_maps::tap_maps_unclaimed,
            "who has not claimed mappings, or does not serve the disk any more, changes none"
        ),
        case!(
            tap_maps::tap_backings_wrong,
            "backings that are no storage, of no number, twice, of no disk"
        ),
        case!(
            tap_maps::tap_maps_races,
            "extents come and go, backings too, and processes, while the guest writes and reads"
        ),
    ]
}

const INVALID: &[i32] = &[libc::EINVAL];
/// Errors for values that a later kernel may know.
const MALFORMED: &[i32] = &[libc::EINVAL, libc::EOPNOTSUPP];

fn tap_maps_malformed(lab: &mut Lab) -> Result<()> {
    let backed = BackedDisk::new(lab)?;
    let node = &backed.scene.node;
    let good = set(0, SECTORS, 0);
    let malformed = [
        MapOp { op: 0, ..good },
        MapOp {
            op: MAP_COLLECT,
            ..good
        },
        MapOp {
            op: u8::MAX,
            ..good
        },
        MapOp { flags: 0, ..good },
        MapOp {
            flags: MAP_WRITE,
            ..good
        },
        MapOp {
            flags: MAP_READ | MAP_TRACK,
            ..good
        },
        MapOp {
            flags: MAP_READ | MAP_ZERO,
            ..good
        },
        MapOp {
            flags: MAP_READ | MAP_WRITE | MAP_ZERO,
            backing: MAP_NO_BACKING,
            ..good
        },
        MapOp {
            flags: u8::MAX,
            ..good
        },
        MapOp {
            backing: MAX_BACKINGS,
            ..good
        },
        MapOp {
            backing: MAP_NO_BACKING,
            ..good
        },
        MapOp { sectors: 0, ..good },
        MapOp {
            sector: u64::MAX,
            ..good
        },
        MapOp { offset: 1, ..good },
        MapOp {
            offset: u64::MAX,
            ..good
        },
        MapOp {
            reserved: [1, 0],
            ..good
        },
        MapOp {
            reserved: [0, 1 << 63],
            ..good
        },
        MapOp {
            op: MAP_RECALL,
            ..MapOp::default()
        },
        MapOp {
            op: MAP_RECALL,
            flags: MAP_READ,
            sectors: 1,
            ..MapOp::default()
        },
        MapOp {
            op: MAP_RECALL,
            sectors: 1,
            offset: 512,
            ..MapOp::default()
        },
        MapOp {
            sectors: 8,
            ..flush()
        },
        MapOp {
            generation: 1,
            ..flush()
        },
    ];
    for op in malformed {
        expect(&format!("{op:?}"), node.maps(&[op]), MALFORMED)?;
        // Operations before the malformed one are executed, those behind it are not.
        let before = node.maps(&[])?.refused;
        let beyond = set(SECTORS, 8, 0);
        expect(
            "one in the middle",
            node.maps(&[beyond, op, beyond]),
            MALFORMED,
        )?;
        let refused = node.maps(&[])?.refused - before;
        ensure!(
            refused == 1,
            "{refused} of the others were looked at: {op:?}"
        );
    }
    let many = vec![good; MAX_MAP_OPS as usize + 1];
    expect(
        "too many operations",
        node.maps(&many),
        &[libc::EINVAL, libc::E2BIG],
    )?;
    node.maps(&many[1..]).context("as many as there may be")?;
    backed.finish()
}

fn tap_maps_refused(lab: &mut Lab) -> Result<()> {
    let backed = BackedDisk::new(lab)?;
    let node = &backed.scene.node;
    let mut refused = node.maps(&[])?.refused;
    let mut is_refused = |what: &str, op: MapOp| -> Result<()> {
        let maps = node.maps(&[op]).with_context(|| what.to_owned())?;
        ensure!(maps.refused == refused + 1, "{what} was taken: {maps:?}");
        refused = maps.refused;
        Ok(())
    };
    let size = backed.sectors() * 512;
    is_refused("behind the end of the disk", set(SECTORS, 8, 0))?;
    is_refused("over the end of the disk", set(SECTORS - 8, 16, 0))?;
    is_refused(
        "behind the end of the device",
        MapOp {
            offset: size,
            ..set(0, 8, 0)
        },
    )?;
    is_refused(
        "over the end of the device",
        MapOp {
            offset: size - 512,
            ..set(0, 8, 0)
        },
    )?;
    is_refused(
        "a backing that is not there",
        MapOp {
            backing: 1,
            ..set(0, 8, 0)
        },
    )?;
    let known = node.maps(&[])?.generation;
    node.maps(&[set(0, SECTORS, known)])?;
    let generation = node.maps(&[recall(8, 8)])?.generation;
    is_refused("what was recalled since", set(8, 8, known))?;
    node.maps(&[set(8, 8, generation)])?;
    expect_bounded(&backed.scene)?;
    backed.finish()
}

/// Sets more extents than the kernel keeps: it must forget others, and its memory is bounded.
fn expect_bounded(scene: &TapScene) -> Result<()> {
    let node = &scene.node;
    let before = mapped(&scene.disk)?;
    let generation = node.maps(&[recall(0, u64::MAX)])?.generation;
    // No two of them can be joined.
    let one = |sector: u64| MapOp {
        flags: if sector % 2 == 0 {
            MAP_READ
        } else {
            MAP_READ | MAP_WRITE
        },
        ..set(sector, 1, generation)
    };
    for _ in 0..2 {
        let all: Vec<MapOp> = (0..SECTORS).map(one).collect();
        for ops in all.chunks(MAX_MAP_OPS as usize) {
            node.maps(ops)?;
        }
    }
    let after = mapped(&scene.disk)?;
    ensure!(after.refused == before.refused, "good ones: {after:?}");
    ensure!(
        after.room as usize <= MAX_LEAVES * LEAF && u64::from(after.room) < SECTORS,
        "there is room for more than there may be: {after:?}"
    );
    let forgotten = after.evicted - before.evicted;
    ensure!(
        forgotten >= SECTORS - u64::from(after.room),
        "only {forgotten} of {SECTORS} were forgotten: {after:?}"
    );
    Ok(())
}

fn tap_maps_unclaimed(lab: &mut Lab) -> Result<()> {
    let disk = TapDisk::make()?;
    add(&disk, 0, &lab.disk.open()?, true)?;
    let node = disk.open()?;
    node.describe(SECTORS, 0)?;
    expect(
        "before claims",
        node.maps(&[set(0, 8, 0)]),
        &[libc::EOPNOTSUPP],
    )?;
    node.claim(&Claims {
        features: CLAIMS.features & !FEATURE_MAPS,
        ..CLAIMS
    })?;
    expect(
        "without the claim",
        node.maps(&[set(0, 8, 0)]),
        &[libc::EOPNOTSUPP],
    )?;
    node.claim(&CLAIMS)?;
    expect("before the start", node.maps(&[set(0, 8, 0)]), INVALID)?;
    let before = mapped(&disk)?;
    node.start_unclaimed()?;
    let generation = node.maps(&[])?.generation;
    let maps = node.maps(&[set(0, 8, generation)])?;
    ensure!(maps.refused == before.refused, "a good one: {maps:?}");
    // A process without requests may claim again, and then does not serve the disk any more.
    node.claim(&CLAIMS)?;
    for op in [set(8, 8, maps.generation), recall(0, 8), flush()] {
        expect("after the claim", node.maps(&[op]), INVALID)?;
    }
    ensure!(
        mapped(&disk)? == before,
        "{:?}, not {before:?}",
        mapped(&disk)?
    );
    drop(node);
    disk.wait("the end of the fence", |info| {
        info.state == ring::tap::abi::STATE_IDLE
    })?;
    disk.destroy()
}

fn tap_backings_wrong(lab: &mut Lab) -> Result<()> {
    let disk = TapDisk::make()?;
    let no_storage = [libc::EOPNOTSUPP];
    let (socket, _other) = UnixStream::pair()?;
    let added = crate::tap::maps::add_fd(disk.minor, 0, socket.as_raw_fd(), 0);
    expect("a socket", added, &no_storage)?;
    for path in ["/", "/dev/null", "/proc/self/status", "/sys/kernel/notes"] {
        let file = File::open(path)?;
        expect(path, add(&disk, 0, &file, false), &no_storage)?;
    }
    for fd in [-1, 1 << 20, i32::MAX] {
        let added = crate::tap::maps::add_fd(disk.minor, 0, fd, 0);
        expect("no descriptor", added, &[libc::EBADF, libc::EINVAL])?;
    }
    let (device, other) = (lab.disk.open()?, lab.coarse.open()?);
    let added =
        |number, flags| crate::tap::maps::add_fd(disk.minor, number, device.as_raw_fd(), flags);
    for number in [u32::from(MAX_BACKINGS), u32::MAX] {
        expect("no number", added(number, 0), INVALID)?;
    }
    expect("a flag of later", added(0, 2), INVALID)?;
    let nobody = crate::tap::maps::add_fd(disk.minor + 1000, 0, device.as_raw_fd(), 0);
    expect("no disk", nobody, &[libc::ENOENT])?;
    for number in 0..u32::from(MAX_BACKINGS) {
        expect("none to remove", remove(&disk, number), &[libc::ENOENT])?;
        add(&disk, number, &device, true)?;
        add(&disk, number, &device, true).context("the same once more")?;
        expect(
            "another access",
            add(&disk, number, &device, false),
            &[libc::EEXIST],
        )?;
        expect(
            "another device",
            add(&disk, number, &other, true),
            &[libc::EEXIST],
        )?;
    }
    remove(&disk, 3)?;
    expect("removed twice", remove(&disk, 3), &[libc::ENOENT])?;
    add(&disk, 3, &other, false)?;
    // The destruction of the disk removes the rest.
    disk.destroy()
}

fn tap_maps_races(lab: &mut Lab) -> Result<()> {
    let disk = TapDisk::make()?;
    let device = lab.disk.open()?;
    let mut session = None;
    for round in 0..6 {
        give_again(&disk, &device)?;
        let (node, store) = (disk.start()?, DiskData::on(lab.disk.path())?);
        let mut guest = match session.take() {
            Some(session) => session,
            None => lab.session_on_tap(&disk, WIDE)?,
        };
        let over = AtomicBool::new(false);
        let guest = thread::scope(|scope| -> Result<_> {
            for seed in 0..2 {
                let (node, over) = (&node, &over);
                scope.spawn(move || change_at_random(node, over, round * 2 + seed));
            }
            let (disk, device, over) = (&disk, &device, &over);
            scope.spawn(move || come_and_go(disk, device, over));
            let done = while_served(&node, &store, || -> Result<_> {
                for at in 0..24 {
                    guest.exercise(at * 64, (round * 24 + at) as u32)?;
                }
                Ok(guest)
            });
            over.store(true, Relaxed);
            done
        })?;
        session = Some(guest);
        // The next process begins without mappings, while the kernel may be executing requests.
        drop(node);
        disk.wait("the end of the fence", |info| {
            info.state == ring::tap::abi::STATE_IDLE
        })?;
    }
    let info = disk.info()?;
    ensure!(info.direct > 0, "the kernel has executed nothing: {info:?}");
    give_again(&disk, &device)?;
    let (node, store) = (disk.start()?, DiskData::on(lab.disk.path())?);
    let session = session.context("no session")?;
    TapScene {
        session,
        store,
        node,
        disk,
    }
    .finish()
}

/// Sets random mappings, which are always correct, and recalls them.
fn change_at_random(node: &crate::tap::TapNode, over: &AtomicBool, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut generation = 0;
    while !over.load(Relaxed) {
        let sector = rng.below(SECTORS / 8) * 8;
        let sectors = (1 + rng.below(256)) * 8;
        let op = match rng.below(8) {
            0 => recall(0, u64::MAX),
            1 | 2 => recall(sector, sectors),
            3 => flush(),
            4 => set(0, SECTORS, generation),
            _ => set(sector, sectors, generation),
        };
        // The kernel refuses a mapping that reaches over the end or is stale.
        if let Ok(maps) = node.maps(&[op]) {
            generation = maps.generation;
        }
    }
}

/// Removes the backing and adds it again. At the end the device may be half removed: it is refused as busy, and cannot
/// be used any more.
fn come_and_go(disk: &TapDisk, device: &File, over: &AtomicBool) {
    while !over.load(Relaxed) {
        let _busy = remove(disk, 0);
        let _there = add(disk, 0, device, true);
        thread::yield_now();
    }
}
