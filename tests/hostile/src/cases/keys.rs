// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Lies in the frontend's directory.

use super::{case, keys, states, AttackCase};
use crate::evtchn::EventChannel;
use crate::lab::Lab;
use crate::queue::{HonestRing, ANSWER};
use crate::session::{self, FrontendShape, Session, PLAIN, WIDE};
use crate::vbd::{state, Mode, VirtualDisk};
use crate::wire::{WireRequest, OKAY, UNSUPPORTED};
use anyhow::{ensure, Context, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            keys::h39_bad_keys,
            "each bad key is an error of this device only, until a proper retry"
        ),
        case!(
            keys::h39_refusals_at_full_speed,
            "a guest that is refused again and again does not fill the log"
        ),
        case!(
            keys::h40_number_of_queues,
            "impossible numbers of queues are refused"
        ),
        case!(
            keys::h41_ring_order,
            "impossible orders are refused, stale keys ignored"
        ),
        case!(
            keys::h42_all_that_is_offered,
            "many disks with all queues and pages that are offered"
        ),
        case!(
            keys::h43_half_good_queues,
            "a bad second queue leaves nothing of the first"
        ),
        case!(
            keys::other_disk_is_named,
            "a disk that is open stays, whatever the toolstack names then, and that is told"
        ),
        case!(
            keys::discard_is_switched_off,
            "a disk that can discard does not, if the toolstack does not want it"
        ),
        case!(
            keys::h50_bad_ports,
            "ports that are used, closed, or somebody else's"
        ),
    ]
}

/// A device that never connects, because the backend refuses it again and again.
struct RefusingDevice<'a> {
    vbd: &'a VirtualDisk,
    shape: FrontendShape,
    queues: &'a [HonestRing],
}

impl RefusingDevice<'_> {
    /// Publishes good keys, then the bad ones, and expects an error. `None` removes a key.
    fn refuse(&self, bad: &[(&str, Option<&[u8]>)]) -> Result<()> {
        let VirtualDisk { store, front, .. } = self.vbd;
        let node = self.vbd.error_node();
        store.remove(&node)?;
        for key in ["multi-queue-num-queues", "ring-page-order"] {
            store.remove(&format!("{front}/{key}"))?;
        }
        store.write_all(front, &session::keys(self.shape, self.queues))?;
        for (key, value) in bad {
            let path = format!("{front}/{key}");
            match value {
                Some(value) => store.write(&path, value)?,
                None => store.remove(&path)?,
            }
        }
        self.vbd.set_state(state::INITIALISED)?;
        let shown: Vec<_> = bad
            .iter()
            .map(|(key, value)| {
                (
                    key,
                    value.map(|v| String::from_utf8_lossy(&v[..v.len().min(40)])),
                )
            })
            .collect();
        store
            .wait(&node, "an error", ANSWER, |value| value.is_some())
            .with_context(|| format!("{shown:?} was not refused"))?;
        let state = self.vbd.back_state()?;
        ensure!(
            state != Some(state::CONNECTED),
            "connected in spite of {shown:?}"
        );
        // Reconnect from the beginning, so that the next error is a new one.
        self.vbd.close()?;
        self.vbd.reopen()
    }
}

/// Connects as an honest frontend after refusals.
fn retry(lab: &Lab, vbd: VirtualDisk, shape: FrontendShape, queues: Vec<HonestRing>) -> Result<()> {
    let session = Session::connect(vbd, lab.disk.sectors, shape, queues)
        .context("a proper retry after refusals failed")?;
    lab.finish_healthy(session)
}

fn h39_bad_keys(lab: &mut Lab) -> Result<()> {
    // About the longest value that xenstore allows.
    let long = vec![b'1'; 2000];
    let junk: [Option<&[u8]>; 7] = [
        None,
        Some(b""),
        Some(b"-1"),
        Some(b"4294967296"),
        Some(b"8x"),
        Some(b"8\0\0junk"),
        Some(&long),
    ];
    refuse_all(lab, "ring-ref", &junk)?;
    refuse_all(lab, "event-channel", &junk)?;
    let protocols = [&b""[..], b"sparc-abi", b"x86_64-abi ", &long];
    refuse_all(lab, "protocol", &protocols.map(Some))?;
    // Numbers that are not grant references.
    let grefs = [&b"0"[..], b"65535", b"4294967295"];
    refuse_all(lab, "ring-ref", &grefs.map(Some))
}

/// Tries these values of a key, and then a good one, on a device of its own, because the backend delays a frontend
/// longer with each refusal.
fn refuse_all(lab: &Lab, key: &str, values: &[Option<&[u8]>]) -> Result<()> {
    let vbd = lab.attach()?;
    let queues = session::queues(PLAIN)?;
    let refusing = RefusingDevice {
        vbd: &vbd,
        shape: PLAIN,
        queues: &queues,
    };
    for value in values {
        refusing.refuse(&[(key, *value)])?;
    }
    retry(lab, vbd, PLAIN, queues)
}

fn h39_refusals_at_full_speed(lab: &mut Lab) -> Result<()> {
    let vbd = lab.attach()?;
    let queues = session::queues(PLAIN)?;
    let mut bad = session::keys(PLAIN, &queues);
    for (key, value) in &mut bad {
        if key == "ring-ref" {
            *value = "65535".to_owned();
        }
    }
    vbd.store.write_all(&vbd.front, &bad)?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(8) {
        for _ in 0..10 {
            vbd.set_state(state::INITIALISED)?;
        }
    }
    vbd.close()?;
    vbd.reopen()?;
    retry(lab, vbd, PLAIN, queues)
}

fn h40_number_of_queues(lab: &mut Lab) -> Result<()> {
    let vbd = lab.attach()?;
    let queues = session::queues(PLAIN)?;
    let max = vbd.offered("multi-queue-max-queues")?.unwrap_or(1);
    let refusing = RefusingDevice {
        vbd: &vbd,
        shape: PLAIN,
        queues: &queues,
    };
    let more = (max + 1).to_string();
    for value in [
        &b"0"[..],
        more.as_bytes(),
        b"4294967295",
        b"4294967297",
        b"-1",
    ] {
        refusing.refuse(&[("multi-queue-num-queues", Some(value))])?;
    }
    retry(lab, vbd, PLAIN, queues)
}

fn h41_ring_order(lab: &mut Lab) -> Result<()> {
    let vbd = lab.attach()?;
    let queues = session::queues(PLAIN)?;
    let max = vbd.offered("max-ring-page-order")?.unwrap_or(0);
    let more = (max + 1).to_string();
    {
        let refusing = RefusingDevice {
            vbd: &vbd,
            shape: PLAIN,
            queues: &queues,
        };
        for value in [more.as_bytes(), b"31", b"32", b"2147483648", b"4294967295"] {
            refusing.refuse(&[("ring-page-order", Some(value))])?;
        }
        // Two pages, but references that were never granted.
        refusing.refuse(&[
            ("ring-page-order", Some(b"1")),
            ("ring-ref0", Some(b"60000")),
            ("ring-ref1", Some(b"60001")),
        ])?;
    }
    // `ring-ref0` is stale now, and ignored without an order.
    let mut session = Session::connect(vbd, lab.disk.sectors, PLAIN, queues)?;
    session.exercise(0, 41)?;
    // Order 0 with only ring-ref.
    session.vbd.close()?;
    session.vbd.reopen()?;
    session.queues = session::queues(PLAIN)?;
    let VirtualDisk { store, front, .. } = &session.vbd;
    store.remove(&format!("{front}/ring-ref0"))?;
    let mut keys = session::keys(PLAIN, &session.queues);
    keys.push(("ring-page-order".into(), "0".into()));
    store.write_all(front, &keys)?;
    session.vbd.set_state(state::INITIALISED)?;
    session.vbd.wait_back("Connected", &[state::CONNECTED])?;
    session.vbd.set_state(state::CONNECTED)?;
    lab.finish_healthy(session)
}

fn h42_all_that_is_offered(lab: &mut Lab) -> Result<()> {
    let mut sessions = Vec::new();
    for _ in 0..5 {
        let vbd = lab.attach()?;
        let shape = FrontendShape {
            queues: vbd.offered("multi-queue-max-queues")?.unwrap_or(1) as usize,
            order: vbd.offered("max-ring-page-order")?.unwrap_or(0) as u8,
            ..PLAIN
        };
        let queues = session::queues(shape)?;
        let mut session = Session::connect(vbd, lab.disk.sectors, shape, queues)?;
        session.exercise(32, 42)?;
        sessions.push(session);
    }
    lab.bystander()?;
    sessions.into_iter().try_for_each(Session::finish)
}

fn h43_half_good_queues(lab: &mut Lab) -> Result<()> {
    let (vbd, shape, queues) = (lab.attach()?, WIDE, session::queues(WIDE)?);
    let refusing = RefusingDevice {
        vbd: &vbd,
        shape,
        queues: &queues,
    };
    for key in ["queue-1/ring-ref", "queue-1/event-channel"] {
        for value in [None, Some(&b"junk"[..]), Some(b"60000")] {
            refusing.refuse(&[(key, value)])?;
        }
    }
    retry(lab, vbd, shape, queues)
}

fn h50_bad_ports(lab: &mut Lab) -> Result<()> {
    let (vbd, queues) = (lab.attach()?, session::queues(WIDE)?);
    let refusing = RefusingDevice {
        vbd: &vbd,
        shape: WIDE,
        queues: &queues,
    };
    let closed = EventChannel::new()?;
    closed.close()?;
    let closed = closed.port().to_string();
    for value in ["0", "1", "131071", "4294967295", &closed] {
        refusing.refuse(&[("queue-0/event-channel", Some(value.as_bytes()))])?;
    }
    let same = queues[0].channel.port().to_string();
    refusing.refuse(&[("queue-1/event-channel", Some(same.as_bytes()))])?;
    retry(lab, vbd, WIDE, queues)?;
    // The port goes away under a connected backend.
    let mut session = lab.session_on(&lab.disk, Mode::ReadWrite, WIDE)?;
    let channel = Arc::clone(&session.queue().channel);
    channel.close()?;
    session.reconnect(WIDE)?;
    lab.finish_healthy(session)
}

fn other_disk_is_named(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    session.exercise(0, 38)?;
    let VirtualDisk { store, back, .. } = &session.vbd;
    let node = session.vbd.error_node();
    let (key, value) = lab.disk.key()?;
    let key = format!("{back}/{key}");
    // Writing an equal value is not a change.
    store.write(&key, value.as_bytes())?;
    states::settled()?;
    let (_, other) = lab.slow.key()?;
    for name in [other.as_str(), "nonsense"] {
        ensure!(session.vbd.error()?.is_none(), "an error before {name}");
        store.write(&key, name.as_bytes())?;
        let told = store.wait(&node, "an error", ANSWER, |value| value.is_some())?;
        let told = told.unwrap_or_default();
        ensure!(told.contains("another disk is named"), "{told}");
        states::settled()?;
        store.remove(&node)?;
    }
    store.write(&key, value.as_bytes())?;
    states::settled()?;
    ensure!(session.vbd.error()?.is_none(), "an error at the right name");
    session.exercise(64, 39)?;
    lab.finish_healthy(session)
}

fn discard_is_switched_off(lab: &mut Lab) -> Result<()> {
    for (enable, status) in [("1", OKAY), ("0", UNSUPPORTED)] {
        let (vbd, queues) = (lab.attach()?, session::queues(WIDE)?);
        let key = format!("{}/discard-enable", vbd.back);
        vbd.store.write(&key, enable.as_bytes())?;
        let mut session = Session::connect(vbd, lab.disk.sectors, WIDE, queues)?;
        // A key that is absent says no.
        let offered = session.vbd.offered("feature-discard")?.unwrap_or(0);
        ensure!(
            Ok(offered) == enable.parse(),
            "with discard-enable={enable} it is offered: {offered}"
        );
        let request = WireRequest::Discard {
            flag: 0,
            id: 1,
            sector: 0,
            sectors: 64,
        };
        session.expect(&request, status)?;
        lab.finish_healthy(session)?;
    }
    Ok(())
}
