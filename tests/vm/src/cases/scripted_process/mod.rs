// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Cases that play the process themselves, so that it dies or misbehaves at exactly the moment that a case is about;
//! `tap` has the cases with a real one.

mod poison;
mod refused;
mod replay;

use super::{Case, Context};
use crate::guest::{AttachedVbd, Guest, COMMAND};
use crate::hotplug;
use crate::process::{DeliveredRequest, Played, TestProcess};
use crate::{seed, sh};
use anyhow::{ensure, Result};
use ring::tap::abi;

const VDEV: &str = "xvdb";
const DEVICE: &str = "/dev/xvdb";
const MIB: u32 = 16;
/// Sectors of a block of 4 KiB.
const BLOCK: u64 = 8;

/// The cases of this folder.
pub(super) fn cases() -> Vec<Case> {
    let groups = [replay::cases(), refused::cases(), poison::cases()];
    groups.into_iter().flatten().collect()
}

/// The command that runs the history in a guest.
pub(super) fn history(device: &str, rest: &str) -> String {
    format!("/agent history {device} --seed {} {rest}", seed::get())
}

/// A disk that is removed with the case.
pub(super) fn played(context: &mut Context, fail_after_s: u32) -> Result<Played> {
    let disk = Played::create(MIB, fail_after_s)?;
    let theirs = disk.clone();
    context.at_end(format!("remove tap disk {}", disk.minor), move || {
        theirs.remove()
    });
    Ok(disk)
}

/// Attaches the disk to the guest, with the process serving. The first open waits for the end of the
/// guest's search for partitions: afterwards it asks for nothing that a case does not make it ask for.
pub(super) fn attach(guest: &Guest, disk: &Played, process: &TestProcess) -> Result<AttachedVbd> {
    let specification = hotplug::played(disk.minor, VDEV)?;
    process.serve_while(|| {
        let vbd = guest.attach(&specification)?;
        guest.run(&read(0))?;
        Ok(vbd)
    })
}

pub(super) fn detach(guest: &Guest, vbd: &AttachedVbd, process: &TestProcess) -> Result<()> {
    process.serve_while(|| guest.detach(vbd))
}

/// A shell command that writes one letter all over a block of 4 KiB.
fn write(block: u64, letter: char) -> String {
    format!("head -c 4096 /dev/zero | tr '\\000' {letter} | dd of={DEVICE} bs=4k count=1 seek={block} iflag=fullblock oflag=direct")
}

/// Returns a shell command that writes the block with fio and its options.
fn write_by_fio(block: u64, letter: char, options: &str) -> String {
    format!(
        "fio --name=w --filename={DEVICE} --rw=write --bs=4k --size=4k --offset={}k --direct=1 --buffer_pattern={:#x} {options} --output-format=terse",
        block * 4,
        u32::from(letter)
    )
}

/// A shell command that shows which letters a block holds.
fn read(block: u64) -> String {
    format!("dd if={DEVICE} bs=4k count=1 skip={block} iflag=direct 2>/dev/null | fold -w 1 | sort -u | tr -d '\\n'")
}

/// Starts writes and waits until the process has each of them.
pub(super) fn deliver(
    guest: &Guest,
    process: &TestProcess,
    writes: &[(u64, char)],
) -> Result<Vec<HeldCommand>> {
    let mut held = Vec::new();
    for (block, letter) in writes {
        let job = guest.start(&write(*block, *letter))?;
        let request = process.fetch(1)?.remove(0);
        ensure!(
            request.desc.op == abi::OP_WRITE && request.desc.sector == block * BLOCK,
            "the guest wrote block {block}, the kernel delivered {:?}",
            request.desc
        );
        ensure!(
            !request.is_replay(),
            "a request that is new is said to be executed again"
        );
        held.push(HeldCommand { job, request });
    }
    Ok(held)
}

/// A command of the guest that waits for a request.
pub(super) struct HeldCommand {
    pub(super) job: crate::console::GuestJob,
    pub(super) request: DeliveredRequest,
}

/// Checks that the next process gets exactly the requests of the last one, in the order of their arrival.
fn check_replay(again: &[DeliveredRequest], held: &[HeldCommand]) -> Result<()> {
    let pairs = again.iter().zip(held);
    for (again, before) in pairs {
        let (now, then) = (&again.desc, &before.request.desc);
        ensure!(
            again.is_replay(),
            "{now:?} is executed again and does not say so"
        );
        ensure!(
            now.sequence == then.sequence && now.sector == then.sector && now.op == then.op,
            "executed again is {now:?}, expected {then:?}"
        );
        ensure!(
            now.generation != then.generation,
            "two deliveries have the same generation"
        );
    }
    Ok(())
}

pub(super) fn finish(guest: &Guest, held: Vec<HeldCommand>) -> Result<()> {
    held.into_iter()
        .try_for_each(|one| succeeded(guest, one.job))
}

pub(super) fn succeeded(guest: &Guest, job: crate::console::GuestJob) -> Result<()> {
    let done = guest.wait(job, COMMAND)?;
    ensure!(
        done.rc == 0,
        "a command of the guest failed with status {}: {}",
        done.rc,
        sh::tail(&done.text, 300)
    );
    Ok(())
}

/// Checks that nothing is delivered although `waiting` requests wait.
fn check_held_back(disk: &Played, process: &TestProcess, waiting: u32) -> Result<()> {
    disk.wait_waiting(waiting)?;
    let early = process.fetch_now()?;
    ensure!(early.is_empty(), "delivered too early: {early:?}");
    Ok(())
}

/// Checks the content of a block, as the guest reads it and as the image holds it.
pub(super) fn check_block(
    guest: &Guest,
    disk: &Played,
    process: &TestProcess,
    block: u64,
    letter: char,
) -> Result<()> {
    let seen = process.serve_while(|| guest.run(&read(block)))?;
    ensure!(
        seen.trim() == letter.to_string(),
        "the guest reads `{}` from block {block}, not {letter}",
        seen.trim()
    );
    let held = disk.block(block)?;
    ensure!(
        held.iter().all(|byte| char::from(*byte) == letter),
        "the image does not hold {letter} in block {block}"
    );
    Ok(())
}

/// Writes one block while the process serves.
fn process_writes(guest: &Guest, process: &TestProcess, block: u64, letter: char) -> Result<()> {
    process
        .serve_while(|| guest.run(&write(block, letter)))
        .map(drop)
}
