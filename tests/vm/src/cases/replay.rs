// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What becomes of requests when the process that serves a disk dies. The process is played here, so
//! that it dies at exactly the moment that a case is about; `tap` has the cases with a real one.

use super::basic::FIO;
use super::{Case, Context, Needs};
use crate::guest::{Guest, Vbd, COMMAND};
use crate::hotplug;
use crate::node::{Control, Node};
use crate::process::{Fault, Played, Process, Request};
use crate::{sh, xs};
use anyhow::{bail, ensure, Result};
use ring::tap::abi::{self, Completion};
use std::time::{Duration, Instant};

const VDEV: &str = "xvdb";
const DEVICE: &str = "/dev/xvdb";
const MIB: u32 = 16;
/// Sectors of a block of 4 KiB.
const BLOCK: u64 = 8;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use Needs::{Nothing, Pv};
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
        ),
        case(
            "tap.s07_read_behind",
            "a read does not see a write that is not answered, and so not time going backwards",
            s07_read_behind,
        ),
        case(
            "tap.s08_flush",
            "a flush is executed again after every write before it",
            s08_flush,
        ),
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
        .no_leaks(),
    ]
}

/// A disk that is removed with the case.
fn played(context: &mut Context, fail_after_s: u32) -> Result<Played> {
    let disk = Played::create(MIB, fail_after_s)?;
    let theirs = disk.clone();
    context.at_end(format!("remove tap disk {}", disk.minor), move || {
        theirs.remove()
    });
    Ok(disk)
}

/// Attaches the disk to the guest, with the process serving. The first open waits for the end of the
/// guest's search for partitions: afterwards it asks for nothing that a case does not make it ask for.
fn attach(guest: &Guest, disk: &Played, process: &Process) -> Result<Vbd> {
    let specification = hotplug::played(disk.minor, VDEV)?;
    process.serve_while(|| {
        let vbd = guest.attach(&specification)?;
        guest.run(&read(0))?;
        Ok(vbd)
    })
}

fn detach(guest: &Guest, vbd: &Vbd, process: &Process) -> Result<()> {
    process.serve_while(|| guest.detach(vbd))
}

/// A shell command that writes one letter all over a block of 4 KiB.
fn write(block: u64, letter: char) -> String {
    format!("head -c 4096 /dev/zero | tr '\\000' {letter} | dd of={DEVICE} bs=4k count=1 seek={block} iflag=fullblock oflag=direct")
}

/// The same through fio, with its options.
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
fn deliver(guest: &Guest, process: &Process, writes: &[(u64, char)]) -> Result<Vec<Held>> {
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
        held.push(Held { job, request });
    }
    Ok(held)
}

/// A command of the guest that waits for a request.
struct Held {
    job: crate::console::Job,
    request: Request,
}

/// The next process is given exactly what the last one had, in the order of its arrival.
fn check_replay(again: &[Request], held: &[Held]) -> Result<()> {
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

fn finish(guest: &Guest, held: Vec<Held>) -> Result<()> {
    held.into_iter()
        .try_for_each(|one| succeeded(guest, one.job))
}

fn succeeded(guest: &Guest, job: crate::console::Job) -> Result<()> {
    let done = guest.wait(job, COMMAND)?;
    ensure!(
        done.rc == 0,
        "a command of the guest failed with status {}: {}",
        done.rc,
        sh::tail(&done.text, 300)
    );
    Ok(())
}

/// Nothing may be delivered although so many requests wait.
fn check_held_back(disk: &Played, process: &Process, waiting: u32) -> Result<()> {
    disk.wait_waiting(waiting)?;
    let early = process.fetch_now()?;
    ensure!(early.is_empty(), "delivered too early: {early:?}");
    Ok(())
}

/// What the guest reads from a block, and what the image holds there.
fn check_block(
    guest: &Guest,
    disk: &Played,
    process: &Process,
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
    // It covers what was answered before it, which is nothing: it may be delivered at once.
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
    // Blocks 4 to 19 are discarded. A guest that waits for its write would not discard meanwhile.
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
        // Of the delivery before.
        stale,
        // Of a delivery to come.
        Completion {
            generation: good.generation.wrapping_add(1),
            ..good
        },
        // Of a tag that nobody has, and of one that does not exist.
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
    for (what, malformed) in [
        ("an unknown flag", Completion { flags: 2, ..good }),
        (
            "a reserved field",
            Completion {
                reserved: 1,
                ..good
            },
        ),
        ("a positive result", Completion { result: 1, ..good }),
    ] {
        let error = second.node.exchange(&[malformed], 0);
        ensure!(
            error.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL)),
            "an answer with {what} was taken"
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
    // What failed is over: the next process does not get it.
    let second = disk.process()?;
    ensure!(
        second.fetch_now()?.is_empty(),
        "a request was delivered after it had failed"
    );
    process_writes(guest, &second, 9, 'c')?;
    check_block(guest, &disk, &second, 9, 'c')?;
    detach(guest, &vbd, &second)
}

/// One write with the process serving.
fn process_writes(guest: &Guest, process: &Process, block: u64, letter: char) -> Result<()> {
    process
        .serve_while(|| guest.run(&write(block, letter)))
        .map(drop)
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
    let other = Vbd::of(guest.domid, "xvdc")?;
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
        Control::open()?.destroy(disk.minor).is_err(),
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
    let second = Node::try_open(disk.minor).map(drop);
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
        errno(process.node.start()) == Some(libc::EINVAL),
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

/// The command that runs the history in a guest.
pub(super) fn history(device: &str, rest: &str) -> String {
    format!("/agent history {device} {rest}")
}

fn history_finds_faults(context: &mut Context) -> Result<()> {
    let disk = played(context, 0)?;
    let process = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &process)?;
    let faults = [
        None,
        Some(Fault::Lost(20)),
        Some(Fault::Late(20, 25)),
        Some(Fault::Astray(20)),
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
    let config = crate::guest::Config::new("victim", crate::guest::Kind::Pv, 1);
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
    // What it had may still be executed and answered: it is nobody's.
    let requests: Vec<Request> = held.into_iter().map(|one| one.request).collect();
    process.serve(&requests)?;
    let info = disk.info()?;
    if info.delivered != 0 || info.refused != 0 {
        bail!("the answers to a guest that is gone were not taken: {info:?}");
    }
    Ok(())
}
