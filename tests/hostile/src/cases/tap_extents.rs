// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Mappings of a hostile process to storage that it must not use so, to one place twice, and their recalls.

use super::{case, tap_extents, AttackCase};
use crate::lab::Lab;
use crate::session::WIDE;
use crate::tap::maps::{add, flush, recall, remove, set, BackedDisk};
use crate::tap::scene::{while_served, TapScene};
use crate::tap::server::DiskData;
use crate::tap::{TapDisk, SECTORS};
use crate::wire::OKAY;
use anyhow::{anyhow, ensure, Context, Result};
use ring::tap::abi::{MapOp, MAP_READ};
use std::thread;

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_extents::tap_extents_forbidden,
            "extents in what may only be read, was taken away, is another disk's, or has larger blocks are counted"
        ),
        case!(
            tap_extents::tap_extents_aliased,
            "two ranges of the disk at one place: its own content suffers, and nothing else"
        ),
        case!(
            tap_extents::tap_extents_recalled_by_many,
            "many threads take everything back while slow I/O is under way: each waits for all of it"
        ),
    ]
}

/// Number of threads that recall everything while requests run.
const RECALLERS: usize = 17;

/// Moves a range to another backing.
fn within(backing: u16, op: MapOp) -> MapOp {
    MapOp { backing, ..op }
}

fn tap_extents_forbidden(lab: &mut Lab) -> Result<()> {
    let backed = BackedDisk::new(lab)?;
    let (disk, node) = (&backed.scene.disk, &backed.scene.node);
    let device = lab.disk.open()?;
    add(disk, 1, &device, false)?;
    add(disk, 2, &lab.coarse.open()?, true)?;
    add(disk, 3, &device, true)?;
    remove(disk, 3)?;
    let other = TapDisk::make()?;
    add(&other, 4, &device, true)?;
    let generation = node.maps(&[set(1024, 8, 0)])?.generation;
    node.maps(&[set(1024, 8, generation)])?;
    let mut refused = node.maps(&[])?.refused;
    let good = set(0, 8, generation);
    for (what, op) in [
        ("to be written in what may only be read", within(1, good)),
        (
            "beside the blocks of its backing",
            MapOp {
                offset: 512,
                ..within(2, good)
            },
        ),
        ("in what was taken away", within(3, good)),
        ("in what another disk has", within(4, good)),
        (
            "elsewhere than what may be written",
            MapOp {
                offset: 0,
                ..set(1024, 8, generation)
            },
        ),
        (
            "of a generation that was not yet",
            set(0, 8, generation.wrapping_add(1)),
        ),
    ] {
        let maps = node.maps(&[op]).with_context(|| what.to_owned())?;
        ensure!(maps.refused == refused + 1, "{what} was taken: {maps:?}");
        refused = maps.refused;
    }
    let read = MapOp {
        flags: MAP_READ,
        ..within(1, good)
    };
    let maps = node.maps(&[read])?;
    ensure!(maps.refused == refused, "to be only read: {maps:?}");
    other.destroy()?;
    // The kernel executes flushes if there is one backing.
    remove(disk, 1)?;
    remove(disk, 2)?;
    backed.finish()
}

fn tap_extents_aliased(lab: &mut Lab) -> Result<()> {
    let mut backed = BackedDisk::new(lab)?;
    let scene = &mut backed.scene;
    let before = scene.node.maps(&[])?;
    let half = SECTORS / 2;
    let again = MapOp {
        offset: 0,
        ..set(half, half, before.generation)
    };
    let ops = [set(0, half, before.generation), again, flush()];
    let maps = scene.node.maps(&ops)?;
    ensure!(maps.refused == before.refused, "it is legal: {maps:?}");
    // Each half is correct while the other one gets no writes.
    for (round, sector) in [0, half, 64, half + 64].into_iter().enumerate() {
        scene.session.exercise(sector, 0xa1 + round as u32)?;
    }
    backed.finish()
}

fn tap_extents_recalled_by_many(lab: &mut Lab) -> Result<()> {
    let disk = TapDisk::make()?;
    add(&disk, 0, &lab.slow.open()?, true)?;
    let (node, store) = (disk.start()?, DiskData::on(lab.slow.path())?);
    let session = lab.session_on_tap(&disk, WIDE)?;
    let mut scene = TapScene {
        session,
        store,
        node,
        disk,
    };
    for round in 0..4 {
        let before = scene.node.maps(&[])?;
        let maps = scene.node.maps(&[set(0, SECTORS, before.generation)])?;
        ensure!(maps.refused == before.refused, "not taken: {maps:?}");
        scene.send(RECALLERS as u64)?;
        recall_by_many(&scene).with_context(|| format!("round {round}"))?;
        // The process gets the request that the kernel did not begin.
        let TapScene {
            session,
            store,
            node,
            ..
        } = &mut scene;
        let answers = while_served(node, store, || session.answers(RECALLERS))?;
        let failed = answers.iter().find(|answer| answer.status != OKAY);
        ensure!(failed.is_none(), "a good request failed: {failed:?}");
    }
    let info = scene.disk.info()?;
    ensure!(info.direct > 0, "the kernel has executed nothing: {info:?}");
    scene.finish()
}

fn recall_by_many(scene: &TapScene) -> Result<()> {
    let node = &scene.node;
    thread::scope(|scope| -> Result<()> {
        let recall = || node.maps(&[recall(0, u64::MAX)]);
        let all: Vec<_> = (0..RECALLERS).map(|_| scope.spawn(recall)).collect();
        for one in all {
            one.join().map_err(|_| anyhow!("a thread died"))??;
        }
        Ok(())
    })?;
    let info = scene.disk.info()?;
    ensure!(
        info.executing == 0,
        "a recall has returned too early: {info:?}"
    );
    Ok(())
}
