// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk is handed to a new process while its guest works, as in a package upgrade.

use super::formats;
use super::tap::{end_load, image, same, start_load, start_load_with, wait_progress, VDEV};
use super::{Case, Context, SharedGuest};
use crate::sh;
use crate::tap::{self, ServedDisk};
use anyhow::{ensure, Context as _, Result};
use control::installed::TAPDISK;
use serde_json::Value;
use std::time::Duration;

/// Hand-offs under load.
const TIMES: u32 = 6;
/// A hand-off takes as long as a process takes to start, on a machine that is emulated.
const LIMIT: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pv};
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run).supervised().no_leaks()
    };
    vec![
        case(
            "handoff.s29_load",
            "a disk goes from process to process under load that is judged: nothing is lost",
            Pv,
            |context| s29_load(context, TIMES),
        ),
        case(
            "handoff.s29_many",
            "the same so often that a request comes at each moment of it",
            Pv,
            |context| s29_load(context, 300),
        )
        .nightly(),
        case(
            "handoff.s29_qcow2",
            "the same for a qcow2 image, whose tables are right afterwards",
            Pv,
            s29_qcow2,
        )
        .nightly(),
        case(
            "handoff.s30_fails",
            "a new process that does not start, dies, or hangs loses: the old one serves on",
            Pv,
            s30_fails,
        )
        .nightly(),
        case(
            "handoff.s33_all",
            "all disks of the host at once, one of which cannot be handed over",
            Nothing,
            |context| s33_all(context, 8),
        )
        .nightly(),
        case(
            "handoff.s33_many",
            "the same with 64 disks",
            Nothing,
            |context| s33_all(context, 64),
        )
        .nightly(),
    ]
}

/// Another file with the same program, as after an upgrade.
fn upgrade(context: &mut Context, name: &str) -> Result<String> {
    // Makes the folder, and takes the file away afterwards.
    let path = image(context, name, 1)?;
    sh::run(&["cp", TAPDISK, &path])?;
    sh::run(&["chmod", "755", &path])?;
    Ok(path)
}

/// A program that does something else, with the one that is installed as `$tapdisk`.
fn script(context: &mut Context, name: &str, text: &str) -> Result<String> {
    let path = image(context, name, 1)?;
    sh::program(&path, &format!("#!/bin/sh\ntapdisk={TAPDISK}\n{text}\n"))?;
    Ok(path)
}

/// Hands a disk over; returns the number of microseconds in which no process served it.
pub(super) fn handoff(disk: &ServedDisk, arguments: &[&str]) -> Result<u64> {
    let (old, minor) = (disk.pid()?, disk.minor.to_string());
    let told = tap::ctl_json(&[&["handoff", &minor], arguments].concat())?;
    let number = |name: &str| {
        let number = told[name].as_u64();
        number.with_context(|| format!("tap-ctl handoff does not say {name}: {told}"))
    };
    ensure!(
        number("from")? == u64::from(old) && number("to")? == u64::from(disk.pid()?),
        "tapdisk {old} served, {} does, and tap-ctl says {told}",
        disk.pid()?
    );
    number("pause_us")
}

/// Hands a disk from one program to another and back, while its guest works; returns the pauses, sorted.
fn back_and_forth(disk: &ServedDisk, program: &str, times: u32) -> Result<Vec<u64>> {
    let mut pauses = Vec::new();
    for number in 0..times {
        wait_progress(disk, 40)?;
        let to = ["--to", program];
        pauses.push(handoff(disk, if number % 2 == 0 { &to } else { &[] })?);
    }
    wait_progress(disk, 40)?;
    pauses.sort_unstable();
    Ok(pauses)
}

/// A process that ends in order has finished its requests, has given back the others, and sends no results for requests
/// that belong to the next process.
fn nothing_twice(disk: &ServedDisk) -> Result<()> {
    let info = disk.info()?;
    ensure!(
        info.replayed == 0 && info.refused == 0,
        "requests were left to the next process, or results were refused: {info:?}"
    );
    Ok(())
}

fn note(context: &mut Context, pauses: &[u64], told: &str) -> Result<()> {
    context.note(&format!(
        "{} hand-offs, nobody served for {} us at half of them, {} us at most; {told}",
        pauses.len(),
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    ))
}

fn s29_load(context: &mut Context, times: u32) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let program = upgrade(context, "tapdisk-2")?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    let load = start_load(guest)?;
    let pauses = back_and_forth(&disk, &program, times)?;
    let told = end_load(guest, load)?;
    same(guest, &image, 16)?;
    nothing_twice(&disk)?;
    note(context, &pauses, &told)?;
    disk.detach(context.pv()?)
}

fn s29_qcow2(context: &mut Context) -> Result<()> {
    let (path, specification) = formats::qcow2_disk(context)?;
    let program = upgrade(context, "tapdisk-2")?;
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &specification)?;
    let load = start_load_with(guest, "")?;
    let pauses = back_and_forth(&disk, &program, 4)?;
    let told = end_load(guest, load)?;
    let seen = formats::of_guest(guest)?;
    nothing_twice(&disk)?;
    note(context, &pauses, &told)?;
    disk.detach(context.pv()?)?;
    formats::judge(context, &formats::QCOW2, &path, &seen)
}

/// The programs that fail, and how the command says so.
const FAIL: [(&str, &str, &str); 3] = [
    ("gone", "exit 3", "ended with the exit code 3"),
    (
        "old",
        "exec $tapdisk --no-such-option \"$@\"",
        "ended with the exit code 2",
    ),
    (
        "stuck",
        "exec busybox tail -f /dev/null",
        "did not do that within 3 s",
    ),
];

fn s30_fails(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let mut programs = Vec::new();
    for (name, text, why) in FAIL {
        programs.push((script(context, name, text)?, why));
    }
    let guest = context.pv()?;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    let load = start_load(guest)?;
    let (minor, old) = (disk.minor.to_string(), disk.pid()?);
    for (program, why) in &programs {
        wait_progress(&disk, 40)?;
        let epoch = disk.info()?.epoch;
        let arguments = ["tap-ctl", "handoff", &minor, "--to", program, "-t", "3"];
        let failed = sh::status(&arguments, LIMIT)?;
        ensure!(
            failed.rc == 6 && failed.text.contains(why),
            "tap-ctl ended with {} and did not say `{why}`: {}",
            failed.rc,
            failed.text
        );
        ensure!(disk.pid()? == old, "the old process does not serve on");
        ensure!(
            disk.info()?.epoch == epoch,
            "the guest had to wait for {program}, which never served"
        );
    }
    wait_progress(&disk, 40)?;
    let told = end_load(guest, load)?;
    same(guest, &image, 16)?;
    context.note(&told)?;
    // And one that works, in spite of all that.
    handoff(&disk, &[])?;
    disk.detach(context.pv()?)
}

fn s33_all(context: &mut Context, disks: u32) -> Result<()> {
    let program = upgrade(context, "tapdisk-2")?;
    let mut minors = Vec::new();
    for number in 0..disks {
        let target = match number {
            0 => format!("aio:{}", image(context, "a.img", 1)?),
            _ => "ram:1M".to_owned(),
        };
        let minor = tap::ctl(&["create", "--minor-only", "-a", &target])?;
        let minor = minor.trim().to_owned();
        let theirs = minor.clone();
        context.at_end(format!("remove disk {minor}"), move || {
            tap::ctl(&["destroy", "-m", &theirs]).map(drop)
        });
        minors.push(minor);
    }
    let paused = minors.last().context("there are disks")?;
    tap::ctl(&["pause", "-m", paused])?;
    let all = ["tap-ctl", "--json", "handoff", "--all", &program];
    let told = sh::status(&all, LIMIT * 4)?;
    ensure!(told.rc == 1, "one cannot be handed over: {}", told.text);
    let summary: Value = serde_json::from_str(&told.stdout)?;
    ensure!(
        summary["handed_off"] == disks - 1 && summary["kept"] == 1,
        "not all disks but one were handed over: {summary}"
    );
    let kept = summary["disks"].as_array().into_iter().flatten();
    let kept: Vec<String> = kept.map(|disk| disk["kept"]["minor"].to_string()).collect();
    ensure!(
        kept.contains(paused),
        "disk {paused} is not named: {summary}"
    );
    tap::ctl(&["unpause", "-m", paused])?;
    // The table for people, and the program of each disk.
    let text = tap::ctl(&["handoff", "--all", &program])?;
    let sum = format!("{disks} of {disks} disks are served by new processes");
    ensure!(text.contains(&sum), "the summary is not `{sum}`: {text}");
    let rows = tap::ctl(&["list"])?;
    let new = rows.matches(&format!("program={program}")).count();
    ensure!(new == disks as usize, "not all processes are new: {rows}");
    context.note(text.lines().last().unwrap_or_default())
}
