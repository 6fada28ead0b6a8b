// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! States in an order that no real frontend uses.

use super::{case, states, AttackCase};
use crate::lab::Lab;
use crate::rng::Rng;
use crate::session::{self, Session, WIDE};
use crate::vbd::{state, VirtualDisk, SOON};
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::time::{Duration, Instant};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            states::h37_states_at_full_speed,
            "states toggled at full speed, then an honest start"
        ),
        case!(
            states::h37_junk_states,
            "junk for states ends the device and nothing else"
        ),
        case!(
            states::h37_nobody_asks,
            "whatever state a frontend stays in, xenstore is not asked again and again"
        ),
        case!(
            states::h38_again_without_closing,
            "Initialised again with new keys while connected"
        ),
        case!(
            states::h44_frontend_removed,
            "the frontend's directory goes away"
        ),
    ]
}

/// Duration of the toggling.
const TOGGLING: Duration = Duration::from_secs(5);

/// Writes these states in turn as fast as xenstore accepts them.
fn toggle(vbd: &VirtualDisk, values: &[&[u8]], seed: u64) -> Result<()> {
    let mut rng = Rng::new(seed);
    let start = Instant::now();
    let path = format!("{}/state", vbd.front);
    while start.elapsed() < TOGGLING {
        for _ in 0..16 {
            vbd.store.write(&path, rng.pick(values))?;
        }
    }
    Ok(())
}

fn h37_states_at_full_speed(lab: &mut Lab) -> Result<()> {
    let vbd = lab.attach()?;
    let queues = session::queues(WIDE)?;
    vbd.store
        .write_all(&vbd.front, &session::keys(WIDE, &queues))?;
    toggle(&vbd, &[b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8"], 37)?;
    vbd.close().context("after the toggling")?;
    vbd.reopen().context("after the toggling")?;
    drop(queues);
    let queues = session::queues(WIDE)?;
    let session = Session::connect(vbd, lab.disk.sectors, WIDE, queues)?;
    lab.finish_healthy(session)
}

fn h37_junk_states(lab: &mut Lab) -> Result<()> {
    let session = lab.session()?;
    let junk: [&[u8]; 9] = [
        b"3",
        b"4",
        b"0",
        b"9",
        b"-1",
        b"",
        b"junk",
        b"4294967299",
        b"\0\xff",
    ];
    toggle(&session.vbd, &junk, 38)?;
    lab.bystander()?;
    let Session { vbd, .. } = &session;
    vbd.set_state(state::CLOSED)?;
    session.vbd.destroy()
}

/// One write of a guest must not make dom0 query xenstore for as long as nothing changes. All of these guests do so at
/// once: what the kernel asks for any of them is seen.
fn h37_nobody_asks(lab: &mut Lab) -> Result<()> {
    let states: [&[u8]; 5] = [b"1", b"3", b"4", b"6", b"junk"];
    let mut disks = Vec::new();
    for value in states {
        let before = messages()?;
        let vbd = lab.attach()?;
        vbd.store.write(&format!("{}/state", vbd.front), value)?;
        ensure!(messages()? > before, "an attach cost no message");
        disks.push(vbd);
    }
    // The backend refuses one that has keys.
    let (vbd, queues) = (lab.attach()?, session::queues(WIDE)?);
    let keys = session::keys(WIDE, &queues);
    vbd.store.write_all(&vbd.front, &keys)?;
    let path = format!("{}/queue-1/ring-ref", vbd.front);
    vbd.store.write(&path, b"65535")?;
    vbd.set_state(state::INITIALISED)?;
    vbd.wait_back("a refusal", &[state::CLOSING])?;
    disks.push(vbd);
    quiet().context("after the states 1, 3, 4, 6 and junk without any keys, and a refusal")?;
    disks.into_iter().try_for_each(VirtualDisk::destroy)
}

/// Waits until the kernel sends hardly any queries to xenstore, and checks that this lasts longer than the retry delay
/// of its driver.
fn quiet() -> Result<()> {
    const WINDOW: Duration = Duration::from_secs(4);
    settled()?;
    let before = messages()?;
    std::thread::sleep(WINDOW);
    let count = messages()? - before;
    ensure!(count <= 2, "{count} messages of xenstore in {WINDOW:?}");
    Ok(())
}

/// Waits until the backend has handled the last write: xenstore sends no message for a moment.
pub(super) fn settled() -> Result<()> {
    const WINDOW: Duration = Duration::from_millis(500);
    const WINDOWS: usize = 10;
    let mut counts = Vec::new();
    while counts.len() < WINDOWS {
        let before = messages()?;
        std::thread::sleep(WINDOW);
        let count = messages()? - before;
        if count == 0 {
            return Ok(());
        }
        counts.push(count);
    }
    bail!("messages of xenstore in each half second: {counts:?}")
}

/// Counts the interrupts with which xenstored notifies this kernel of answers and watches. Queries of this program use
/// another path.
fn messages() -> Result<u64> {
    let text = fs::read_to_string("/proc/interrupts")?;
    let line = text.lines().find(|line| line.ends_with(" xenbus"));
    let line = line.context("/proc/interrupts has no line of xenbus")?;
    let columns = line.split_whitespace().skip(1);
    Ok(columns.map_while(|count| count.parse::<u64>().ok()).sum())
}

fn h38_again_without_closing(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    session.exercise(0, 38)?;
    let others = session::queues(WIDE)?;
    session
        .vbd
        .store
        .write_all(&session.vbd.front, &session::keys(WIDE, &others))?;
    for _ in 0..20 {
        session.vbd.set_state(state::INITIALISED)?;
        session.vbd.set_state(state::CONNECTED)?;
    }
    // The first keys still count.
    session.exercise(0, 39)?;
    session.reconnect(WIDE)?;
    lab.finish_healthy(session)
}

fn h44_frontend_removed(lab: &mut Lab) -> Result<()> {
    for path in ["", "/state"] {
        let mut session = lab.session()?;
        session.exercise(0, 44)?;
        let VirtualDisk { store, front, .. } = &session.vbd;
        store.remove(&format!("{front}{path}"))?;
        let sysfs = session.vbd.sysfs();
        crate::wait::until("the end of the device", SOON, || {
            Ok((!sysfs.exists()).then_some(()))
        })?;
        session.vbd.destroy()?;
    }
    Ok(())
}
