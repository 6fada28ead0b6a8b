// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The driver is unbound from a tap disk whose guest has requests under way, and bound again: each request is answered
//! once.

use super::hung::{bus, hangable, others_are_served, QUICK};
use super::scripted_process;
use super::tap::{end_load, same, start_load_with, wait_progress, VDEV};
use super::{Case, Context, SharedGuest};
use crate::backing::{slow_writes, Dm};
use crate::tap::{self, ServedDisk};
use crate::{sh, xs};
use anyhow::{ensure, Context as _, Result};
use ring::tap::abi::{Info, STATE_LIVE};
use std::time::{Duration, Instant};

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let ours = |name, about, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, SharedGuest::Pv, run).no_leaks()
    };
    vec![
        ours(
            "hung.rebind_tap_answers",
            "a tap disk is unbound and bound between answers that come out of order: none is lost, none comes twice",
            answers,
        )
        .tap(),
        ours(
            "hung.rebind_tap_stopped",
            "a tap disk is unbound and bound under verified load while its process is stopped",
            stopped,
        )
        .supervised()
        .nightly(),
        ours(
            "hung.rebind_tap_killed",
            "the same while nobody serves it, neither process nor supervisor",
            killed,
        )
        .supervised()
        .nightly(),
        ours(
            "hung.rebind_tap_direct",
            "the same while what the kernel executes hangs",
            direct,
        )
        .supervised()
        .nightly(),
    ]
}

/// Checks for longer than any drain takes whether a guest that has closed its disk still has it.
fn is_kept(info: impl Fn() -> Result<Info>) -> Result<bool> {
    const LONG: Duration = Duration::from_secs(9);
    let begun = Instant::now();
    while begun.elapsed() < LONG {
        if info()?.domain == u32::MAX {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(true)
}

/// Unbinds and binds the driver of a disk whose requests do not end. Other disks are served during that.
fn rebind(context: &mut Context, disk: &ServedDisk) -> Result<()> {
    let state = format!("{}/state", disk.vbd.backend);
    bus(context, &disk.vbd, "unbind")?;
    others_are_served(context, "a tap disk was unbound")?;
    let kept = is_kept(|| disk.info())?;
    bus(context, &disk.vbd, "bind")?;
    xs::wait_value(&state, "2", QUICK)?;
    others_are_served(context, "it was bound again")?;
    let now = xs::must_read(&state)?;
    ensure!(
        kept && now == "2",
        "state {now}, kept: {kept}: the guest's rings were given up or served twice while its requests were under way"
    );
    Ok(())
}

/// The requests have ended: the disk is served again, and nothing was lost.
fn goes_on(disk: &ServedDisk) -> Result<()> {
    xs::wait_value(&format!("{}/state", disk.vbd.backend), "4", QUICK)?;
    wait_progress(disk, 50)
}

/// Makes storage whose writes take longer than its reads, so that answers come in another order than requests.
fn uneven(context: &mut Context) -> Result<Dm> {
    let below = context.null_blk(16, &[])?;
    let disk = Dm::create("vmtest-uneven", &slow_writes(&below.path(), 32768, 30)?)?;
    let theirs = disk.clone();
    context.at_end("remove vmtest-uneven", move || theirs.remove());
    Ok(disk)
}

fn stopped(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let storage = uneven(context)?;
    let target = tap::disk(&format!("aio:{}", storage.path()), VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &target)?;
    let load = start_load_with(context.pv()?, "")?;
    for _ in 0..2 {
        wait_progress(&disk, 100)?;
        let pid = disk.pid()?;
        disk.signal(pid, libc::SIGSTOP)?;
        let rebound = rebind(context, &disk);
        disk.signal(pid, libc::SIGCONT)?;
        rebound?;
        goes_on(&disk)?;
    }
    let told = end_load(context.pv()?, load)?;
    same(context.pv()?, &storage.path(), 16)?;
    context.note(&told)?;
    disk.detach(context.pv()?)
}

fn killed(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let storage = uneven(context)?;
    let target = tap::disk(&format!("aio:{}", storage.path()), VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &target)?;
    let load = start_load_with(context.pv()?, "")?;
    for _ in 0..2 {
        wait_progress(&disk, 100)?;
        // No supervisor replaces the process.
        context.take_supervisor()?.kill()?;
        disk.kill()?;
        sh::wait_for("the end of the process", QUICK, || {
            Ok(disk.info()?.state != STATE_LIVE)
        })?;
        rebind(context, &disk)?;
        context.supervise(true)?;
        goes_on(&disk)?;
    }
    let told = end_load(context.pv()?, load)?;
    same(context.pv()?, &storage.path(), 16)?;
    context.note(&told)?;
    disk.detach(context.pv()?)
}

fn direct(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let storage = hangable(context)?;
    let target = tap::disk(&format!("direct=yes,aio:{}", storage.path()), VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &target)?;
    sh::wait_for("a device that the kernel may use", QUICK, || {
        Ok(disk.info()?.backings == 1)
    })?;
    let load = start_load_with(context.pv()?, "")?;
    for _ in 0..2 {
        wait_progress(&disk, 100)?;
        storage.suspend()?;
        sh::wait_for("requests that hang in the kernel", QUICK, || {
            Ok(disk.info()?.executing > 0)
        })?;
        let rebound = rebind(context, &disk);
        storage.resume()?;
        rebound?;
        goes_on(&disk)?;
    }
    let told = end_load(context.pv()?, load)?;
    same(context.pv()?, &storage.path(), 16)?;
    context.note(&told)?;
    disk.detach(context.pv()?)
}

fn answers(context: &mut Context) -> Result<()> {
    sh::modprobe("xen-blkfront", &[])?;
    let disk = scripted_process::played(context, 0)?;
    let first = disk.process()?;
    let vbd = scripted_process::attach(context.pv()?, &disk, &first)?;
    let mut last = Some(first);
    let state = format!("{}/state", vbd.backend);
    let rounds = [
        ([(3, 'a'), (9, 'b'), (1, 'c'), (7, 'd')], false),
        ([(5, 'e'), (2, 'f'), (8, 'g'), (4, 'h')], true),
    ];
    for (writes, dies) in rounds {
        let process = last.take().context("no process")?;
        let mut held = scripted_process::deliver(context.pv()?, &process, &writes)?;
        // Its answer is where the first request was.
        let third = held.remove(2);
        process.serve(&[third.request])?;
        scripted_process::succeeded(context.pv()?, third.job)?;
        let process = (!dies).then_some(process);
        bus(context, &vbd, "unbind")?;
        let kept = is_kept(|| disk.info())?;
        bus(context, &vbd, "bind")?;
        xs::wait_value(&state, "2", QUICK)?;
        others_are_served(context, "a disk was unbound and bound between answers")?;
        let (process, rest) = match process {
            Some(process) => {
                let rest = held.iter().map(|one| one.request.clone()).collect();
                (process, rest)
            }
            None => {
                let process = disk.process()?;
                let rest = process.fetch(held.len())?;
                (process, rest)
            }
        };
        process.serve(&rest)?;
        let guest = context.pv()?;
        process.serve_while(|| {
            xs::wait_value(&state, "4", QUICK)?;
            scripted_process::finish(guest, held)
        })?;
        for (block, letter) in writes {
            scripted_process::check_block(guest, &disk, &process, block, letter)?;
        }
        let info = disk.info()?;
        ensure!(
            kept && info.refused == 0,
            "kept: {kept}, {info:?}: the rings of a guest that waits were given up"
        );
        last = Some(process);
    }
    scripted_process::detach(context.pv()?, &vbd, &last.context("no process")?)
}
