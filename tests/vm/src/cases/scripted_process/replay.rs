// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Requests of a process that dies while it serves a disk.

use super::{
    attach, check_block, check_held_back, check_replay, deliver, detach, finish, played,
    process_writes, read, succeeded, write, write_by_fio, BLOCK,
};
use crate::cases::{Case, Context};
use crate::guest::COMMAND;
use crate::xs;
use anyhow::{ensure, Result};
use ring::tap::abi;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use crate::cases::SharedGuest::Pv;
    let case =
        |name, about, run: fn(&mut Context) -> Result<()>| Case::new(name, about, Pv, run).tap();
    vec![
        case(
            "tap.s02_delivered",
            "writes that a dead process had and did not execute are executed once",
            s02_delivered,
        )
        .no_leaks(),
        case(
            "tap.s03_executed",
            "writes that a dead process executed and did not answer are executed again",
            s03_executed,
        ),
        case(
            "tap.s04_overlap",
            "of two overlapping writes the later one wins, across a death",
            s04_overlap,
        ),
        case(
            "tap.s06_new_overlap",
            "a write that comes while nobody serves does not overtake one that is executed again",
            s06_new_overlap,
        )
        .nightly(),
        case(
            "tap.s07_read_behind",
            "a read does not see a write that is not answered, and so not time going backwards",
            s07_read_behind,
        )
        .nightly(),
        case(
            "tap.s08_flush",
            "a flush is executed again after every write before it",
            s08_flush,
        )
        .nightly(),
        case(
            "tap.s09_durable",
            "a write with its flush survives a death in either part",
            s09_durable,
        ),
        case(
            "tap.s10_discard",
            "a discard stays behind the write that it overlaps, through two deaths",
            s10_discard,
        ),
    ]
}

const EIGHT: [(u64, char); 8] = [
    (3, 'a'),
    (9, 'b'),
    (1, 'c'),
    (700, 'd'),
    (5, 'e'),
    (4, 'f'),
    (2, 'g'),
    (6, 'h'),
];

fn s02_delivered(context: &mut Context) -> Result<()> {
    die_with_writes(context, false)
}

fn s03_executed(context: &mut Context) -> Result<()> {
    die_with_writes(context, true)
}

fn die_with_writes(context: &mut Context, execute: bool) -> Result<()> {
    let disk = played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    let held = deliver(guest, &first, &EIGHT)?;
    if execute {
        held.iter()
            .try_for_each(|one| first.execute(&one.request))?;
    }
    drop(first);
    let second = disk.process()?;
    let again = second.fetch(EIGHT.len())?;
    check_replay(&again, &held)?;
    second.serve(&again)?;
    finish(guest, held)?;
    for (block, letter) in EIGHT {
        check_block(guest, &disk, &second, block, letter)?;
    }
    let info = disk.info()?;
    ensure!(
        info.replayed == EIGHT.len() as u64 && info.refused == 0,
        "the kernel counts {} requests that were executed again and {} wrong answers",
        info.replayed,
        info.refused
    );
    detach(guest, &vbd, &second)
}

fn s04_overlap(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    let held = deliver(guest, &first, &[(7, 'a')])?;
    let later = guest.start(&write(7, 'b'))?;
    check_held_back(&disk, &first, 1)?;
    first.execute(&held[0].request)?;
    drop(first);
    let second = disk.process()?;
    let again = second.fetch(1)?;
    check_replay(&again, &held)?;
    check_held_back(&disk, &second, 1)?;
    second.serve(&again)?;
    let last = second.fetch(1)?;
    ensure!(
        !last[0].is_replay(),
        "a write that nobody ever had is said to be executed again"
    );
    second.serve(&last)?;
    finish(guest, held)?;
    succeeded(guest, later)?;
    check_block(guest, &disk, &second, 7, 'b')?;
    detach(guest, &vbd, &second)
}

fn s06_new_overlap(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    let held = deliver(guest, &first, &[(7, 'a'), (20, 'x')])?;
    drop(first);
    // Both of the dead wait again, and the new ones behind them.
    disk.wait_waiting(2)?;
    let later = guest.start(&write(7, 'b'))?;
    disk.wait_waiting(3)?;
    let beside = guest.start(&write(30, 'y'))?;
    disk.wait_waiting(4)?;
    let second = disk.process()?;
    let ready = second.fetch(3)?;
    check_replay(&ready[..2], &held)?;
    ensure!(
        ready[2].desc.sector == 30 * BLOCK && !ready[2].is_replay(),
        "beside what is executed again the kernel delivered {:?}",
        ready[2].desc
    );
    second.serve(&ready[1..])?;
    check_held_back(&disk, &second, 1)?;
    second.serve(&ready[..1])?;
    let last = second.fetch(1)?;
    second.serve(&last)?;
    finish(guest, held)?;
    succeeded(guest, later)?;
    succeeded(guest, beside)?;
    for (block, letter) in [(7, 'b'), (20, 'x'), (30, 'y')] {
        check_block(guest, &disk, &second, block, letter)?;
    }
    detach(guest, &vbd, &second)
}

fn s07_read_behind(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    let held = deliver(guest, &first, &[(7, 'a')])?;
    first.execute(&held[0].request)?;
    let reader = guest.start(&read(7))?;
    check_held_back(&disk, &first, 1)?;
    drop(first);
    let second = disk.process()?;
    let again = second.fetch(1)?;
    check_replay(&again, &held)?;
    check_held_back(&disk, &second, 1)?;
    second.serve(&again)?;
    let behind = second.fetch(1)?;
    ensure!(
        behind[0].desc.op == abi::OP_READ,
        "behind the write there was no read: {:?}",
        behind[0].desc
    );
    second.serve(&behind)?;
    finish(guest, held)?;
    let seen = guest.wait(reader, COMMAND)?;
    ensure!(
        seen.text.trim() == "a",
        "the read saw `{}`",
        seen.text.trim()
    );
    detach(guest, &vbd, &second)
}

/// A shell command that only flushes.
const FLUSH: &str = "dd if=/dev/zero of=/dev/xvdb count=0 conv=fsync,notrunc";

fn s08_flush(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    let held = deliver(guest, &first, &[(7, 'a'), (8, 'b')])?;
    let flush = guest.start(FLUSH)?;
    // The flush covers earlier answers, of which there are none, so it may be delivered at once.
    let early = first.fetch(1)?;
    ensure!(
        early[0].desc.op == abi::OP_FLUSH,
        "the guest flushed, the kernel delivered {:?}",
        early[0].desc
    );
    drop(first);
    let second = disk.process()?;
    let again = second.fetch(2)?;
    check_replay(&again, &held)?;
    second.serve(&again[..1])?;
    check_held_back(&disk, &second, 1)?;
    second.serve(&again[1..])?;
    let last = second.fetch(1)?;
    ensure!(
        last[0].desc.op == abi::OP_FLUSH && last[0].is_replay(),
        "behind the writes the kernel delivered {:?}",
        last[0].desc
    );
    second.serve(&last)?;
    finish(guest, held)?;
    succeeded(guest, flush)?;
    detach(guest, &vbd, &second)
}

fn s09_durable(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    let job = guest.start(&write_by_fio(7, 'a', "--sync=dsync"))?;
    let part = first.fetch(1)?;
    ensure!(
        part[0].desc.op == abi::OP_WRITE,
        "a durable write began with {:?}",
        part[0].desc
    );
    first.execute(&part[0])?;
    drop(first);
    let second = disk.process()?;
    let part = second.fetch(1)?;
    ensure!(
        part[0].is_replay(),
        "the write was lost: {:?}",
        part[0].desc
    );
    second.serve(&part)?;
    let part = second.fetch(1)?;
    ensure!(
        part[0].desc.op == abi::OP_FLUSH,
        "no flush came after a durable write, but {:?}",
        part[0].desc
    );
    drop(second);
    let third = disk.process()?;
    let part = third.fetch(1)?;
    ensure!(
        part[0].desc.op == abi::OP_FLUSH && part[0].is_replay(),
        "the flush was lost: {:?}",
        part[0].desc
    );
    third.serve(&part)?;
    // The guest's kernel flushes once more.
    third.serve_while(|| succeeded(guest, job))?;
    check_block(guest, &disk, &third, 7, 'a')?;
    detach(guest, &vbd, &third)
}

fn s10_discard(context: &mut Context) -> Result<()> {
    const DISCARD: &str = "blkdiscard -o 16384 -l 65536 /dev/xvdb";
    let disk = played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    ensure!(
        xs::number(&format!("{}/feature-discard", vbd.backend))? == 1,
        "no discard is offered"
    );
    // Blocks 4 to 19 are discarded. A guest that waits for its write would not discard during that.
    let job = guest.start(&write_by_fio(5, 'a', "--ioengine=libaio"))?;
    let write = first.fetch(1)?;
    let discard = guest.start(DISCARD)?;
    check_held_back(&disk, &first, 1)?;
    first.execute(&write[0])?;
    drop(first);
    let second = disk.process()?;
    let write = second.fetch(1)?;
    ensure!(
        write[0].desc.op == abi::OP_WRITE && write[0].is_replay(),
        "the write was lost: {:?}",
        write[0].desc
    );
    check_held_back(&disk, &second, 1)?;
    second.serve(&write)?;
    let middle = second.fetch(1)?;
    ensure!(
        middle[0].desc.op == abi::OP_DISCARD && middle[0].desc.sectors == 128,
        "behind the write came {:?}",
        middle[0].desc
    );
    second.execute(&middle[0])?;
    drop(second);
    let third = disk.process()?;
    let middle = third.fetch(1)?;
    ensure!(
        middle[0].desc.op == abi::OP_DISCARD && middle[0].is_replay(),
        "the discard was lost: {:?}",
        middle[0].desc
    );
    third.serve(&middle)?;
    third.serve_while(|| succeeded(guest, job).and_then(|()| succeeded(guest, discard)))?;
    ensure!(
        disk.block(5)?.iter().all(|byte| *byte == 0),
        "a discarded block holds what was written before"
    );
    process_writes(guest, &third, 6, 'b')?;
    check_block(guest, &disk, &third, 6, 'b')?;
    detach(guest, &vbd, &third)
}
