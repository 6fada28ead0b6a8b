// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Hostile values in xenstore, from a frontend that exists only there.
//!
//! The frontend's directory lies where no kernel looks for one, so the case alone plays the guest. The
//! backend must refuse this one device, say why under the name of the key, stay calm, and serve a proper
//! frontend on the same device afterwards.

use super::basic::{attach_own, detach_own};
use super::{Case, Context, SharedGuest};
use crate::{sh, xs, TestedDriver};
use anyhow::{ensure, Context as _, Result};
use std::path::Path;
use std::time::Duration;

const DEVID: &str = "51872";
const FRONT: &str = "/local/domain/0/vmtest/51872";
const BACK: &str = "/local/domain/0/backend/vbd/0/51872";
const ERROR: &str = "/local/domain/0/error/backend/vbd/0/51872";

/// A hostile frontend.
struct Attack {
    name: &'static str,
    /// Key that the error must name.
    key: &'static str,
    /// Values that replace the proper ones.
    values: &'static [(&'static str, &'static str)],
    c_fails: Option<&'static str>,
}

/// The C driver frees rings that it never finished, finds a ring without an interrupt and warns.
const C_WARNS: Option<&str> = Some("the C driver warns when it gives up a half connected ring");

const PROPER: [(&str, &str); 3] = [
    ("ring-ref", "8"),
    ("event-channel", "9"),
    ("protocol", "x86_64-abi"),
];

const fn attack(
    name: &'static str,
    key: &'static str,
    values: &'static [(&'static str, &'static str)],
    c_fails: Option<&'static str>,
) -> Attack {
    Attack {
        name,
        key,
        values,
        c_fails,
    }
}

const ATTACKS: &[Attack] = &[
    attack(
        "ring_order_huge",
        "ring-page-order",
        &[("ring-page-order", "9999")],
        None,
    ),
    attack(
        "ring_order_junk",
        "ring-page-order",
        &[("ring-page-order", "-1")],
        Some("the C driver takes a malformed order for an absent one"),
    ),
    attack("ring_ref_empty", "ring-ref", &[("ring-ref", "")], C_WARNS),
    attack(
        "ring_ref_never_granted",
        "ring",
        &[("ring-ref", "4294967295")],
        C_WARNS,
    ),
    attack(
        "event_channel_junk",
        "event-channel",
        &[("event-channel", "x")],
        C_WARNS,
    ),
    attack(
        "protocol_unknown",
        "protocol",
        &[("protocol", "z80-abi")],
        None,
    ),
    attack(
        "queues_0",
        "multi-queue-num-queues",
        &[("multi-queue-num-queues", "0")],
        None,
    ),
    attack(
        "queues_9999",
        "multi-queue-num-queues",
        &[("multi-queue-num-queues", "9999")],
        None,
    ),
    attack(
        "queue_directory_missing",
        "queue-0",
        &[("multi-queue-num-queues", "2")],
        C_WARNS,
    ),
];

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |attack: &'static Attack| {
        let about = format!("a frontend writes {:?}", attack.values);
        let run = move |context: &mut Context| refuse(context, attack);
        let case = Case::new(
            &format!("xenstore.{}", attack.name),
            &about,
            SharedGuest::Nothing,
            run,
        )
        // The attacks of `h39` have these and more, with every change.
        .nightly()
        .no_leaks();
        Case {
            c_fails: attack.c_fails,
            ..case
        }
    };
    let mut all: Vec<Case> = ATTACKS.iter().map(case).collect();
    all.push(
        Case::new(
            "xenstore.bad_physical_device",
            "the hotplug script names a device that does not exist",
            SharedGuest::Nothing,
            bad_device,
        )
        .no_leaks(),
    );
    all.push(
        Case::new(
            "xenstore.close_and_return",
            "a frontend closes and comes back, again and again",
            SharedGuest::Nothing,
            close_and_return,
        )
        .no_leaks(),
    );
    let about = "a frontend jumps between states as fast as it can";
    let storm = Case::new("xenstore.state_storm", about, SharedGuest::Nothing, storm)
        .nightly()
        .no_leaks();
    all.push(Case {
        c_fails: C_WARNS,
        ..storm
    });
    all
}

/// Makes both directories as the toolstack does, and waits for the backend's answer.
fn create(context: &mut Context, physical: &str) -> Result<()> {
    context.at_end("remove the fake frontend", remove);
    let front = |key: &str| format!("{FRONT}/{key}");
    let back = |key: &str| format!("{BACK}/{key}");
    let pairs = [
        (front("backend"), BACK),
        (front("backend-id"), "0"),
        (front("virtual-device"), DEVID),
        (front("device-type"), "disk"),
        (front("state"), "1"),
        (back("frontend"), FRONT),
        (back("frontend-id"), "0"),
        (back("online"), "1"),
        (back("dev"), "xvdk"),
        (back("type"), "phy"),
        (back("mode"), "w"),
        (back("params"), "vmtest"),
        (back("state"), "1"),
    ];
    let pairs: Vec<(&str, &str)> = pairs
        .iter()
        .map(|(key, value)| (key.as_str(), *value))
        .collect();
    xs::write(&pairs)?;
    xs::wait_value(&back("state"), "2", Duration::from_secs(15))?;
    xs::write(&[(&back("physical-device"), physical)])
}

/// Takes both directories away, the frontend's first, as on the end of a domain.
fn remove() -> Result<()> {
    for path in ["/local/domain/0/vmtest", BACK, ERROR] {
        if xs::read(path)?.is_some() {
            xs::remove(path)?;
            if path == "/local/domain/0/vmtest" {
                let device = format!("/sys/bus/xen-backend/devices/vbd-0-{DEVID}");
                sh::wait_for(
                    "the end of a device without a frontend",
                    Duration::from_secs(15),
                    || Ok(!Path::new(&device).exists()),
                )?;
            }
        }
    }
    Ok(())
}

/// Waits for an error node that holds `wanted`; the device must not connect. The bus may have stored an error of its
/// own before the driver's.
fn wait_refusal(wanted: &str) -> Result<String> {
    let mut last = None;
    let refused = sh::wait_for(
        "an error node for the fake frontend",
        Duration::from_secs(10),
        || {
            last = xs::read(&format!("{ERROR}/error"))?;
            Ok(last.as_ref().is_some_and(|text| text.contains(wanted)))
        },
    );
    let state = xs::must_read(&format!("{BACK}/state"))?;
    ensure!(
        state != "4",
        "the backend connected to a frontend that it should have refused"
    );
    refused.with_context(|| {
        format!("the backend's state is {state}, its error is {last:?} and should name `{wanted}`")
    })?;
    Ok(last.unwrap_or_default())
}

/// Checks that the device works for a proper frontend.
fn check_recovery(context: &mut Context, device: &str) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let vbd = attach_own(context, device, "xvdk")?;
    sh::shell("dd if=/dev/zero of=/dev/xvdk bs=64k count=4 oflag=direct status=none")?;
    detach_own(&vbd)
}

/// MAJOR:MINOR in hexadecimal, as the hotplug script writes it.
fn numbers(device: &str) -> Result<String> {
    Ok(sh::run(&["stat", "-L", "-c", "%t:%T", device])?
        .trim()
        .to_owned())
}

fn refuse(context: &mut Context, attack: &Attack) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    create(context, &numbers(&device.path())?)?;
    let mut values: Vec<(&str, &str)> = PROPER
        .iter()
        .filter(|(key, _)| !attack.values.iter().any(|(other, _)| other == key))
        .copied()
        .collect();
    values.extend(attack.values);
    values.push(("state", "3"));
    let keys: Vec<(String, &str)> = values
        .iter()
        .map(|(key, value)| (format!("{FRONT}/{key}"), *value))
        .collect();
    xs::write(
        &keys
            .iter()
            .map(|(key, value)| (key.as_str(), *value))
            .collect::<Vec<_>>(),
    )?;
    // The C driver does not always name the key; that is no reason to call it broken.
    let text = wait_refusal(if context.driver == TestedDriver::C {
        ""
    } else {
        attack.key
    })?;
    context.note(&format!("error node: {text}"))?;
    remove()?;
    // A refusal because of keys alone leaves nothing behind that a proper frontend could meet.
    match attack.c_fails == C_WARNS {
        true => check_recovery(context, &device.path()),
        false => Ok(()),
    }
}

fn bad_device(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    create(context, "fff:ffff")?;
    let text = wait_refusal("")?;
    context.note(&format!("error node: {text}"))?;
    remove()?;
    check_recovery(context, &device.path())
}

/// Behaves like a boot loader that hands its disk to the kernel that it loads.
fn close_and_return(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    create(context, &numbers(&device.path())?)?;
    for _ in 0..3 {
        for (front, back) in [("5", "5"), ("6", "6"), ("1", "2")] {
            xs::write(&[(&format!("{FRONT}/state"), front)])?;
            xs::wait_value(&format!("{BACK}/state"), back, Duration::from_secs(15))?;
        }
    }
    remove()?;
    check_recovery(context, &device.path())
}

fn storm(context: &mut Context) -> Result<()> {
    let device = context.null_blk(16, &[])?;
    create(context, &numbers(&device.path())?)?;
    let state = format!("{FRONT}/state");
    for _ in 0..30 {
        for value in [
            "3", "5", "6", "1", "4", "2", "6", "1", "9", "0", "7", "3", "6", "1",
        ] {
            xs::write(&[(&state, value)])?;
        }
    }
    remove()?;
    check_recovery(context, &device.path())
}
