// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The driver is unbound from a tap disk during requests, and bound again, or the guest disconnects in between.

use super::tap_recalls::stop_under_writes;
use super::{case, tap_unbound, AttackCase};
use crate::lab::Lab;
use crate::queue::ANSWER;
use crate::session::{queues, WIDE};
use crate::standstill::StoppableDevice;
use crate::tap::maps::BackedDisk;
use crate::tap::scene::{while_served, TapScene};
use crate::tap::server::answer;
use crate::vbd::state;
use crate::wait;
use crate::wire::{rw, OKAY};
use anyhow::{ensure, Context, Result};
use ring::abi::{OP_WRITE, REQ_PROD};
use ring::tap::abi::STATE_IDLE;
use std::fs;
use std::sync::atomic::Ordering::Release;
use std::time::{Duration, Instant};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            tap_unbound::tap_driver_taken_away,
            "the driver is unbound between answers, with and without a process: it comes back, or the guest goes"
        ),
        case!(
            tap_unbound::tap_unbound_closing,
            "a disk that is being detached is unbound under requests: Closed is seen when it is given back"
        ),
        case!(
            tap_unbound::tap_rebound_over_standstill,
            "a disk whose device stands still is closed, unbound, bound and opened again: it waits for itself"
        ),
    ]
}

/// Time from the frontend's wish to close until the backend has closed: 10 s, twice that in an emulated machine.
const CLOSED: Duration = Duration::from_secs(20);

fn tap_driver_taken_away(lab: &mut Lab) -> Result<()> {
    [false, true]
        .into_iter()
        .try_for_each(|dies| taken_and_given_back(lab, dies))?;
    taken_and_destroyed(lab)
}

/// Binds the driver to a device, or unbinds it, and checks that the write to sysfs returns in time.
fn driver(file: &str, name: &str) -> Result<()> {
    let path = format!("/sys/bus/xen-backend/drivers/xen-blkback-rs/{file}");
    let start = Instant::now();
    fs::write(&path, name).with_context(|| format!("cannot write {path}"))?;
    let took = start.elapsed();
    ensure!(took < CLOSED, "a writer to `{file}` waited for {took:?}");
    Ok(())
}

/// Sends eight writes of one queue. The process answers the sixth, whose answer takes the slot of the first request.
/// Returns also the tags of the others.
fn answered_out_of_order(lab: &Lab) -> Result<(TapScene, Vec<u16>)> {
    let mut scene = TapScene::new(lab)?;
    let segs = scene.session.segs(1);
    let queue = scene.session.queue();
    (0..8).for_each(|id| queue.push(&rw(OP_WRITE, id, id * 8, &segs)));
    queue.publish()?;
    let mut tags = scene.fetch(8)?;
    answer(&scene.node, &scene.store, &[tags.remove(5)])?;
    let first = scene.session.queue().wait(1, ANSWER)?;
    ensure!(
        first.iter().all(|one| one.id == 5 && one.status == OKAY),
        "{first:?}"
    );
    Ok((scene, tags))
}

/// Checks that each request is answered once: those from before the unbind, during it, and after it.
fn taken_and_given_back(lab: &mut Lab, dies: bool) -> Result<()> {
    let (scene, held) = answered_out_of_order(lab)?;
    let TapScene {
        mut session,
        store,
        node,
        disk,
    } = scene;
    let node = (!dies).then_some(node);
    let name = format!("vbd-0-{}", session.vbd.devid());
    driver("unbind", &name)?;
    let segs = session.segs(1);
    let queue = session.queue();
    (8..12).for_each(|id| queue.push(&rw(OP_WRITE, id, id * 8, &segs)));
    queue.word(REQ_PROD).store(queue.prod(), Release);
    driver("bind", &name)?;
    session
        .vbd
        .wait_back("an offer after the return", &[state::INIT_WAIT])?;
    let info = disk.info()?;
    ensure!(
        info.domain == 0 && info.waiting + info.delivered == 7,
        "requests of a guest that waits were forgotten: {info:?}"
    );
    let node = match node {
        Some(node) => {
            answer(&node, &store, &held)?;
            node
        }
        None => disk.start()?,
    };
    while_served(&node, &store, || {
        session
            .vbd
            .wait_back("Connected after the return", &[state::CONNECTED])?;
        let mut answers = session.queue().wait(11, ANSWER)?;
        answers.sort_unstable_by_key(|answer| answer.id);
        let ids: Vec<u64> = answers.iter().map(|answer| answer.id).collect();
        ensure!(
            ids == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11],
            "the answers are for {ids:?}"
        );
        ensure!(
            answers.iter().all(|answer| answer.status == OKAY),
            "good requests failed: {answers:?}"
        );
        Ok(())
    })?;
    let scene = TapScene {
        session,
        store,
        node,
        disk,
    };
    scene.finish()
}

/// The backend releases everything of a guest that is destroyed while its disk has no driver.
fn taken_and_destroyed(lab: &mut Lab) -> Result<()> {
    let (scene, _) = answered_out_of_order(lab)?;
    let TapScene {
        session,
        node,
        disk,
        ..
    } = scene;
    driver("unbind", &format!("vbd-0-{}", session.vbd.devid()))?;
    ensure!(disk.info()?.domain == 0, "{:?}", disk.info());
    session.vbd.destroy()?;
    disk.wait("the end of the connection", |info| {
        info.domain == u32::MAX && info.waiting == 0
    })?;
    drop(node);
    disk.wait("the end of the fence", |info| info.state == STATE_IDLE)?;
    disk.destroy()
}

fn tap_unbound_closing(lab: &mut Lab) -> Result<()> {
    let (scene, held) = answered_out_of_order(lab)?;
    let TapScene {
        mut session,
        store,
        node,
        disk,
    } = scene;
    // As a toolstack does.
    let keys = [("online", "0"), ("state", "5")];
    let keys = keys.map(|(key, value)| (key.to_owned(), value.to_owned()));
    session.vbd.store.write_all(&session.vbd.back, &keys)?;
    driver("unbind", &format!("vbd-0-{}", session.vbd.devid()))?;
    let now = session.vbd.back_state()?;
    let info = disk.info()?;
    ensure!(
        now == Some(state::CLOSING) && info.domain == 0,
        "state {now:?} was published while the rings are mapped: {info:?}"
    );
    answer(&node, &store, &held)?;
    session
        .vbd
        .wait_back("Closed once all is answered", &[state::CLOSED])?;
    let answers = session.queue().wait(held.len(), ANSWER)?;
    ensure!(
        answers.iter().all(|one| one.status == OKAY),
        "good requests failed: {answers:?}"
    );
    let info = disk.info()?;
    ensure!(
        info.domain == u32::MAX,
        "Closed was published before the disk was given back: {info:?}"
    );
    session.vbd.destroy()?;
    drop(node);
    disk.wait("the end of the fence", |info| info.state == STATE_IDLE)?;
    disk.destroy()
}

fn tap_rebound_over_standstill(lab: &mut Lab) -> Result<()> {
    let device = StoppableDevice::over(&lab.disk, "hostile-rebound")?;
    let file = device.open()?;
    let mut backed = BackedDisk::by(lab, &lab.disk, &file)?;
    backed.map_all()?;
    let TapScene { session, disk, .. } = &mut backed.scene;
    let still = stop_under_writes(&device, disk, session)?;
    let name = format!("vbd-0-{}", session.vbd.devid());
    // The frontend gives up its requests.
    session.vbd.close()?;
    driver("unbind", &name)?;
    session.vbd.set_state(state::INITIALISING)?;
    driver("bind", &name)?;
    session
        .vbd
        .wait_back("an offer after the return", &[state::INIT_WAIT])?;
    wait::until("a report of what it waits for", CLOSED, || {
        session.vbd.error()
    })?;
    still.end()?;
    session.queues = queues(WIDE)?;
    session.publish_keys(WIDE)?;
    drop(file);
    backed.finish()?;
    device.remove()
}
