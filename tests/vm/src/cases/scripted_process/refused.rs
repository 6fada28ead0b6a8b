// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Forbidden actions of a process, a guest and an administrator on a tap disk, and their consequences.

use super::{
    attach, check_block, deliver, detach, finish, history, played, process_writes, succeeded,
    write, DEVICE,
};
use crate::cases::{basic::FIO, Case, Context};
use crate::guest::{AttachedVbd, Guest, COMMAND};
use crate::hotplug;
use crate::node::{ControlNode, OpenNode};
use crate::process::{DeliveredRequest, ProcessFault};
use crate::{sh, xs};
use anyhow::{bail, ensure, Result};
use ring::tap::abi::{self, Completion};
use std::time::{Duration, Instant};

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use crate::cases::SharedGuest::{Nothing, Pv};
    let case =
        |name, about, run: fn(&mut Context) -> Result<()>| Case::new(name, about, Pv, run).tap();
    vec![
        case(
            "tap.s11_wrong_answers",
            "answers of the dead, to nobody, and twice are refused and counted",
            s11_wrong_answers,
        )
        .no_leaks(),
        case(
            "tap.s15_back_pressure",
            "more requests than fit wait in the ring while nobody serves",
            s15_back_pressure,
        ),
        case(
            "tap.fail_after",
            "with that policy requests fail after their time, and the disk comes back",
            fail_after,
        ),
        case(
            "tap.one_device",
            "a disk serves one device at a time, and the other one is told",
            one_device,
        ),
        case(
            "tap.wrong_node",
            "what a process must not do with its node is refused",
            wrong_node,
        ),
        case(
            "tap.history_finds_faults",
            "the judge of the history finds a lost, a late and a stray write",
            history_finds_faults,
        )
        .no_leaks(),
        Case::new(
            "tap.s17_destroyed_played",
            "a guest is destroyed while a process has its requests",
            Nothing,
            s17_destroyed,
        )
        .tap()
        .no_leaks()
        .nightly(),
    ]
}

fn s11_wrong_answers(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    let held = deliver(guest, &first, &[(7, 'a'), (9, 'b')])?;
    let stale = held[0].request.answer(0);
    drop(first);
    let second = disk.process()?;
    let again = second.fetch(2)?;
    let good = again[0].answer(0);
    let wrong = [
        // Generation of the earlier delivery.
        stale,
        // Generation of a later delivery.
        Completion {
            generation: good.generation.wrapping_add(1),
            ..good
        },
        // A tag without a request, and one that does not exist.
        Completion {
            tag: good.tag ^ 64,
            ..good
        },
        Completion {
            tag: u16::MAX,
            ..good
        },
    ];
    let before = disk.info()?.refused;
    second.node.exchange(&wrong, 0)?;
    let refused = disk.info()?.refused - before;
    ensure!(
        refused == wrong.len() as u64,
        "of {} wrong answers {refused} were refused",
        wrong.len()
    );
    ensure!(
        disk.info()?.delivered == 2,
        "a wrong answer counted as one to a request"
    );
    let later = abi::kept::COMPLETION_RETRY_LATER;
    for (what, malformed, expected) in [
        (
            "an unknown flag",
            Completion { flags: 4, ..good },
            libc::EINVAL,
        ),
        (
            "a flag that is kept for later",
            Completion {
                flags: later,
                ..good
            },
            libc::EOPNOTSUPP,
        ),
        (
            "a reserved field",
            Completion {
                reserved: 1,
                ..good
            },
            libc::EINVAL,
        ),
        (
            "a positive result",
            Completion { result: 1, ..good },
            libc::EINVAL,
        ),
    ] {
        let error = second.node.exchange(&[malformed], 0);
        ensure!(
            error
                .as_ref()
                .is_err_and(|error| error.raw_os_error() == Some(expected)),
            "the end of an answer with {what}: {error:?}"
        );
    }
    second.serve(&again)?;
    let before = disk.info()?.refused;
    second.node.exchange(&[good, good], 0)?;
    ensure!(
        disk.info()?.refused - before == 2,
        "a second answer to a request was taken"
    );
    finish(guest, held)?;
    // Not executed, to be delivered again.
    let job = guest.start(&write(7, 'c'))?;
    let request = second.fetch(1)?;
    let back = Completion {
        flags: abi::COMPLETION_RETURNED,
        ..request[0].answer(0)
    };
    second.node.exchange(&[back], 0)?;
    let request = second.fetch(1)?;
    second.serve(&request)?;
    succeeded(guest, job)?;
    // An error goes to the guest.
    let job = guest.start(&write(7, 'd'))?;
    let request = second.fetch(1)?;
    second
        .node
        .exchange(&[request[0].answer(-libc::ENOSPC)], 0)?;
    let failed = guest.wait(job, COMMAND)?;
    ensure!(
        failed.rc != 0,
        "a write that the process failed succeeded in the guest"
    );
    check_block(guest, &disk, &second, 7, 'c')?;
    detach(guest, &vbd, &second)
}

fn s15_back_pressure(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    drop(first);
    // Far more than the arena holds at once.
    let job = guest.start(&format!(
        "fio --name=p --filename={DEVICE} --size=12m --bs=256k --direct=1 --ioengine=libaio --iodepth=48 --numjobs=1 \
         --rw=write --verify=crc32c --do_verify=1 --verify_fatal=1 --output-format=terse"
    ))?;
    let mut before = 0;
    sh::wait_for("a full disk", Duration::from_secs(30), || {
        let waiting = disk.info()?.waiting;
        Ok(waiting > 0 && std::mem::replace(&mut before, waiting) == waiting)
    })?;
    ensure!(
        disk.info()?.state != abi::STATE_LIVE,
        "the disk is live without a process"
    );
    let second = disk.process()?;
    let done = second.serve_while(|| guest.wait(job, FIO))?;
    ensure!(
        done.rc == 0,
        "fio failed after a pause: {}",
        sh::tail(&done.text, 300)
    );
    detach(guest, &vbd, &second)
}

fn fail_after(context: &mut Context) -> Result<()> {
    const SECONDS: u32 = 3;
    let disk = played(context, SECONDS)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    let held = deliver(guest, &first, &[(7, 'a')])?;
    let died = Instant::now();
    drop(first);
    let new = guest.start(&write(9, 'b'))?;
    for job in [held[0].job, new] {
        let done = guest.wait(job, COMMAND)?;
        ensure!(
            done.rc != 0,
            "a write succeeded although nobody serves the disk"
        );
    }
    let took = died.elapsed();
    ensure!(
        took >= Duration::from_secs(u64::from(SECONDS) - 1),
        "requests failed after {} ms, the policy says {SECONDS} s",
        took.as_millis()
    );
    // A failed request is over: the next process does not get it.
    let second = disk.process()?;
    ensure!(
        second.fetch_now()?.is_empty(),
        "a request was delivered after it had failed"
    );
    process_writes(guest, &second, 9, 'c')?;
    check_block(guest, &disk, &second, 9, 'c')?;
    detach(guest, &vbd, &second)
}

fn one_device(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let process = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &process)?;
    let id = guest.domid.to_string();
    let second = hotplug::played(disk.minor, "xvdc")?;
    // xl does not wait until a frontend is connected, but the backend says why it does not.
    sh::run(&["xl", "block-attach", &id, &second])?;
    let other = AttachedVbd::of(guest.domid, "xvdc")?;
    let place = other
        .backend
        .replace("/local/domain/0/", "/local/domain/0/error/");
    let mut told = None;
    sh::wait_for("a complaint of the backend", COMMAND, || {
        told = xs::read(&format!("{place}/error"))?;
        Ok(told.is_some())
    })?;
    ensure!(
        told.as_deref().is_some_and(|text| text.contains("51728")),
        "the complaint about a disk that another device has is {told:?}"
    );
    ensure!(
        xs::must_read(&format!("{}/state", other.backend))? != "4",
        "two devices have the same tap disk"
    );
    guest.detach(&other)?;
    ensure!(
        ControlNode::open()?.destroy(disk.minor).is_err(),
        "a disk was destroyed below a guest"
    );
    process_writes(guest, &process, 7, 'a')?;
    check_block(guest, &disk, &process, 7, 'a')?;
    detach(guest, &vbd, &process)
}

fn wrong_node(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let process = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &process)?;
    let errno = |result: std::io::Result<()>| result.err().and_then(|error| error.raw_os_error());
    let second = OpenNode::try_open(disk.minor).map(drop);
    ensure!(
        errno(second) == Some(libc::EBUSY),
        "a node can be open twice"
    );
    let smaller = tapdev::Params {
        logical_block: 4096,
        ..disk.params()
    };
    let described = process.node.set_params(&tapdev::records(&smaller));
    ensure!(
        errno(described) == Some(libc::EINVAL),
        "a disk in use changed its blocks"
    );
    ensure!(
        errno(process.node.start_as_claimed()) == Some(libc::EINVAL),
        "a disk was started twice"
    );
    let unload = sh::status(
        &["rmmod", context.driver.sys_module()],
        Duration::from_secs(30),
    )?;
    ensure!(
        unload.rc != 0,
        "the module could be removed below an open node"
    );
    let guest = context.pv()?;
    process_writes(guest, &process, 7, 'a')?;
    detach(guest, &vbd, &process)
}

fn history_finds_faults(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let process = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &process)?;
    let faults = [
        None,
        Some(ProcessFault::Lost(20)),
        Some(ProcessFault::Late(20, 25)),
        Some(ProcessFault::Astray(20)),
    ];
    for fault in faults {
        let line = history(DEVICE, "--rounds 1 --discard --sectors 512 --requests 25");
        let job = guest.start(&line)?;
        let result = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| guest.wait(job, FIO));
            process.serve_with(fault, || Ok(waiter.is_finished()))?;
            waiter
                .join()
                .map_err(|_| anyhow::anyhow!("a thread of the case panicked"))?
        })?;
        let told = sh::tail(&result.text, 300);
        match fault {
            None => ensure!(
                result.rc == 0,
                "the judge complains of a process without fault: {told}"
            ),
            Some(fault) => ensure!(
                result.rc != 0 && result.text.contains("no order of the"),
                "the judge did not find {fault:?}: {told}"
            ),
        }
    }
    detach(guest, &vbd, &process)
}

fn s17_destroyed(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let process = disk.process()?;
    let config = crate::guest::Config::new("victim", crate::guest::GuestKind::Pv, 1);
    let guest = Guest::create(config)?;
    let vbd = attach(&guest, &disk, &process)?;
    let held = deliver(&guest, &process, &[(7, 'a'), (9, 'b')])?;
    guest.destroy()?;
    vbd.wait_gone()?;
    let info = disk.info()?;
    ensure!(
        info.delivered == 2 && info.domain == u32::MAX,
        "after the end of the guest the kernel says {info:?}"
    );
    // The process may still execute and answer its requests, which have no guest any more.
    let requests: Vec<DeliveredRequest> = held.into_iter().map(|one| one.request).collect();
    process.serve(&requests)?;
    let info = disk.info()?;
    if info.delivered != 0 || info.refused != 0 {
        bail!("the answers to a guest that is gone were not taken: {info:?}");
    }
    Ok(())
}
