// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The calls, and the result that each must have.

use super::ledger::{Ledger, LedgerVerdict};
use super::process::{Effect, FuzzProcess};
use crate::rng::Rng;
use crate::tap::server::{done, DiskData};
use crate::tap::uring::CommandMemory;
use crate::tap::{
    call, call_nowhere, control, expect, query, records, FileMapping, TapDisk, TapNode,
    UnmappedAddresses, CLAIMS, SECTORS,
};
use crate::wait;
use anyhow::{ensure, Context, Result};
use ring::tap::abi::{
    ioctl, Buffer, Completion, CreateCommand, Destroy, COMPLETION_RETURNED, GEOMETRY_MAY_SHRINK,
    GEOMETRY_WRITE_CACHE, MAX_TAGS, MMAP_ARENA, MMAP_DESCRIPTORS, STATE_LIVE,
};
use ring::tap::params::{Params, Unfit};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;
use zerocopy::IntoBytes;

/// Errors for an address that is never valid.
const FAULT: &[i32] = &[libc::EFAULT, libc::EINVAL];
/// Number of completions that the kernel copies at once.
const BATCH: usize = 32;
/// Maximum number of bytes of a description.
const RECORDS: usize = 256;
/// Control calls use disk numbers from this one on, so that they do not name this test's disk.
const FAR: u64 = 1 << 18;
/// Maximum size in KiB of the arena of such a disk, because it is really created.
const SMALL: u32 = 4 << 10;

/// Makes any call of a process that is served.
pub(super) fn any(
    process: &mut FuzzProcess,
    store: &DiskData,
    ledger: &mut Ledger,
    rng: &mut Rng,
) -> Result<()> {
    match rng.below(16) {
        0..=6 => speak(process, store, ledger, rng),
        7 => describe(process, rng),
        8 if rng.below(4) == 0 => control_node(process, rng),
        _ => harmless(process, ledger, rng),
    }
}

/// Makes a call that cannot delay or fail any request of the frontend.
pub(super) fn harmless(
    process: &mut FuzzProcess,
    ledger: &mut Ledger,
    rng: &mut Rng,
) -> Result<()> {
    match rng.below(15) {
        0 => lie(process, ledger, rng),
        1 => false_arrays(process, rng),
        2 => tags_nowhere(process, ledger, rng),
        3 => arguments_nowhere(process, rng),
        4 => unknown_number(&process.node.file, rng),
        5 => mapping(&process.node, rng),
        6 | 7 => read(process, ledger, rng),
        8 => poll(process),
        9 => another_opener(process),
        10 => wrong_command(process, ledger, rng),
        11 => faulty_command(process, ledger, rng),
        12 => {
            let again = process.node.start_unclaimed();
            expect("a second start", again, &[libc::EINVAL])
        }
        13 => claim_again(process),
        _ => waiting_command(process, ledger, rng),
    }
}

/// Claims again: refused while the process has requests; otherwise it gets more as soon as it starts again. A waiting
/// command may bring some at any time.
fn claim_again(process: &mut FuzzProcess) -> Result<()> {
    if process.has_commands() {
        return Ok(());
    }
    let claimed = process.node.claim(&CLAIMS);
    if process.holds() {
        return expect("claims with requests in hand", claimed, &[libc::EINVAL]);
    }
    claimed.context("claims without requests in hand are refused")?;
    let again = process.node.start_unclaimed();
    again.context("a start after claims is refused")
}

/// Makes calls of a process that has not started the disk.
pub(super) fn before_the_start(process: &mut FuzzProcess, rng: &mut Rng) -> Result<()> {
    let invalid = &[libc::EINVAL];
    for _ in 0..rng.below(4) {
        let node = &process.node;
        match rng.below(6) {
            0 => expect("an exchange before the start", node.exchange(&[]), invalid)?,
            1 => expect("a read before the start", node.read(), invalid)?,
            2 => describe(process, rng)?,
            3 => unknown_number(&node.file, rng)?,
            4 => mapping(node, rng)?,
            _ => {
                let said = [process.false_completion(rng)?];
                let early = process.node.commit(&said);
                expect("a commit before the start", early, invalid)?;
            }
        }
    }
    Ok(())
}

/// Fetches tags, and completes some of its requests.
fn speak(
    process: &mut FuzzProcess,
    store: &DiskData,
    ledger: &mut Ledger,
    rng: &mut Rng,
) -> Result<()> {
    if rng.below(2) == 0 {
        let tags = process.node.exchange(&[])?;
        process.got(&tags, ledger)?;
    }
    let said = statements(process, store, rng)?;
    if rng.below(3) == 0 && process.may_send() {
        return process.send(&said, false, ledger);
    }
    let completions: Vec<Completion> = said.iter().map(|(said, _)| *said).collect();
    let result = process.node.exchange(&completions);
    if process.said(&said, ledger) {
        return expect("a malformed completion", result, &[libc::EINVAL]);
    }
    process.got(&result.context("an exchange")?, ledger)
}

/// Makes completions that are valid, false or malformed. Those behind a malformed one have no effect.
fn statements(
    process: &FuzzProcess,
    store: &DiskData,
    rng: &mut Rng,
) -> Result<Vec<(Completion, Effect)>> {
    let mut said = Vec::new();
    let mut used = Vec::new();
    let mut broken = false;
    for _ in 0..1 + rng.below(40) {
        if rng.below(30) == 0 {
            said.push((malformed(rng), Effect::Malformed));
            broken = true;
        }
        let held = process.any_held(rng, &used).filter(|_| rng.below(4) == 0);
        let Some(desc) = held else {
            said.push((process.false_completion(rng)?, Effect::Refused));
            continue;
        };
        used.push(desc.tag);
        let right = done(&desc);
        let failed = |errno: i32| {
            let result = -errno;
            let verdict = LedgerVerdict::Failed(errno);
            (Completion { result, ..right }, Effect::Ended(desc, verdict))
        };
        let statement = match rng.below(8) {
            0 => failed(1 + rng.below(4095) as i32),
            1 => failed(libc::EOPNOTSUPP),
            2 => (right, Effect::Ended(desc, LedgerVerdict::Lie)),
            // If the completion has no effect the process must not execute the request, which may fail later.
            3 | 4 if !broken => {
                store.execute(&process.node, &desc)?;
                (right, Effect::Ended(desc, LedgerVerdict::Right))
            }
            _ => {
                let flags = COMPLETION_RETURNED;
                (Completion { flags, ..right }, Effect::Returned(desc))
            }
        };
        said.push(statement);
        if rng.below(3) == 0 {
            // Repeat it: that delivery does not exist any longer.
            said.push((statement.0, Effect::Refused));
        }
    }
    Ok(said)
}

fn malformed(rng: &mut Rng) -> Completion {
    let right = Completion {
        tag: rng.next() as u16,
        generation: rng.next() as u32,
        ..Completion::default()
    };
    let result = rng.pick(&[1, 4096, -4096, i32::MAX, i32::MIN]);
    match rng.below(4) {
        0 => Completion {
            flags: 2 + rng.below(65534) as u16,
            ..right
        },
        1 => Completion { result, ..right },
        2 => Completion {
            flags: COMPLETION_RETURNED,
            result: -1 - rng.below(100) as i32,
            ..right
        },
        _ => Completion {
            reserved: 1 << rng.below(32),
            ..right
        },
    }
}

/// Sends only false completions.
fn lie(process: &mut FuzzProcess, ledger: &mut Ledger, rng: &mut Rng) -> Result<()> {
    let mut said = Vec::new();
    for _ in 0..1 + rng.below(80) {
        said.push((process.false_completion(rng)?, Effect::Refused));
    }
    if rng.below(2) == 0 && process.may_send() {
        return process.send(&said, false, ledger);
    }
    let completions: Vec<Completion> = said.iter().map(|(said, _)| *said).collect();
    process.node.commit(&completions)?;
    process.said(&said, ledger);
    Ok(())
}

/// Sends false completions in an array that is longer than its memory.
fn false_arrays(process: &mut FuzzProcess, rng: &mut Rng) -> Result<()> {
    const SIZE: usize = size_of::<Completion>();
    let there = rng.below(100) as usize;
    let start = 4096 - there * SIZE;
    for index in 0..there {
        let said = process.false_completion(rng)?;
        process.edge.write(start + index * SIZE, said.as_bytes())?;
    }
    let claimed = rng.pick(&[
        there as u32,
        there as u32 + 1,
        MAX_TAGS,
        MAX_TAGS + 1,
        u32::MAX,
    ]);
    let result = process.node.exchange_at(
        (process.edge.address(start), claimed),
        (UnmappedAddresses::Kernel, 0),
    );
    if claimed > MAX_TAGS {
        return expect("too long an array", result, &[libc::EINVAL]);
    }
    if claimed as usize == there {
        process.refused(there);
        return expect("an array before an edge", result, &[0]);
    }
    // Each batch that the kernel copies is taken as a whole or not at all.
    process.refused(there / BATCH * BATCH);
    expect("an array over an edge", result, &[libc::EFAULT])
}

/// Fetches tags to memory that is not writable, or only in part.
fn tags_nowhere(process: &mut FuzzProcess, ledger: &Ledger, rng: &mut Rng) -> Result<()> {
    let len = rng.pick(&[1, 2, 32, 33, MAX_TAGS]);
    let before = process.node.ask()?;
    let (none, place) = (
        (UnmappedAddresses::Null, 0),
        rng.pick(&UnmappedAddresses::ALL),
    );
    let start = 4096 - 2 * rng.below(4) as usize;
    let result = match rng.below(2) {
        0 => process.node.exchange_at(none, (place, len)),
        _ => {
            let address = process.edge.address(start);
            process.node.exchange_at(none, (address, len))
        }
    };
    if let Ok(count @ 1..) = result {
        let mut bytes = vec![0; 2 * count as usize];
        process.edge.read(start, &mut bytes)?;
        let tags = bytes.chunks_exact(2);
        let tags: Vec<u16> = tags.map(|t| u16::from_ne_bytes([t[0], t[1]])).collect();
        return process.got(&tags, ledger);
    }
    // Without requests the kernel writes nothing, so there is no error.
    expect("tags nowhere", result, &[libc::EFAULT, libc::EINVAL, 0])?;
    let after = process.node.ask()?;
    ensure!(
        after.delivered == before.delivered || process.has_commands(),
        "requests are delivered that nobody knows of: {before:?}, then {after:?}"
    );
    Ok(())
}

fn arguments_nowhere(process: &FuzzProcess, rng: &mut Rng) -> Result<()> {
    let place = rng.pick(&UnmappedAddresses::ALL);
    let number = rng.pick(&[
        ioctl::INFO,
        ioctl::SET_PARAMS,
        ioctl::EXCHANGE,
        ioctl::CLAIM,
    ]);
    let nowhere = process.node.call_nowhere(number, place);
    expect("an argument nowhere", nowhere, FAULT)?;
    let len = rng.pick(&[1, 32, 56, 256, 257, 4096, 4097, u32::MAX]);
    let records = process.node.set_params_at(place.address(), len);
    expect("records nowhere", records, FAULT)
}

/// Calls an ioctl number of this driver's type that no node has.
fn unknown_number(file: &File, rng: &mut Rng) -> Result<()> {
    const KNOWN: [u32; 8] = [
        ioctl::CREATE,
        ioctl::DESTROY,
        ioctl::QUERY,
        ioctl::INFO,
        ioctl::SET_PARAMS,
        ioctl::START,
        ioctl::CLAIM,
        ioctl::EXCHANGE,
    ];
    let any = rng.next() as u32;
    let number = match rng.below(3) {
        0 => any,
        // One bit differs from a valid number.
        _ => rng.pick(&KNOWN) ^ 1 << rng.below(32),
    };
    let number = number & !0xff00 | u32::from(b'x') << 8;
    if KNOWN.contains(&number) {
        return Ok(());
    }
    let result = call_nowhere(file, number, rng.pick(&UnmappedAddresses::ALL));
    let refused = match ioctl::is_kept(number) {
        true => libc::EOPNOTSUPP,
        false => libc::ENOTTY,
    };
    expect("an unknown number", result, &[refused])
}

/// Maps any offset, size and protection: only the two areas can be mapped, as a whole.
fn mapping(node: &TapNode, rng: &mut Rng) -> Result<()> {
    let (small, large) = (node.info.descriptors_len, node.info.arena_len);
    let page = |number: u64| number * 4096;
    let offset = match rng.below(6) {
        0..=1 => MMAP_DESCRIPTORS,
        2..=3 => MMAP_ARENA,
        4 => rng.pick(&[MMAP_ARENA, MMAP_DESCRIPTORS]) + page(1 + rng.below(1024)),
        _ => page(rng.below(1 << 50)),
    };
    let len = match rng.below(5) {
        0..=1 => small,
        2..=3 => large,
        _ => page(1 + rng.below(2 * large / 4096)),
    };
    let protection = rng.pick(&[
        libc::PROT_READ,
        libc::PROT_READ,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::PROT_WRITE,
        libc::PROT_NONE,
        libc::PROT_READ | libc::PROT_EXEC,
    ]);
    let flags = rng.pick(&[libc::MAP_SHARED, libc::MAP_SHARED, libc::MAP_PRIVATE]);
    let map = FileMapping::new(&node.file, offset, len as usize, protection, flags);
    let area = match offset {
        MMAP_DESCRIPTORS => len == small && protection & libc::PROT_WRITE == 0,
        MMAP_ARENA => len == large,
        _ => false,
    };
    let right = area && flags == libc::MAP_SHARED && protection & libc::PROT_EXEC == 0;
    let what = format!("a mapping of {len:#x} at {offset:#x}, {protection} {flags}");
    let refused = &[
        libc::EINVAL,
        libc::EACCES,
        libc::EPERM,
        libc::EOVERFLOW,
        libc::ENOMEM,
    ];
    expect(&what, map, if right { &[0] } else { refused })
}

/// Reads tags into a small buffer.
fn read(process: &mut FuzzProcess, ledger: &Ledger, rng: &mut Rng) -> Result<()> {
    let mut bytes = [0; 9];
    let len = rng.below(10) as usize;
    match process.node.read_into(&mut bytes[..len]) {
        Ok(tags) => {
            ensure!(tags.len() <= len / 2 && !tags.is_empty(), "{tags:?}");
            process.got(&tags, ledger)
        }
        Err(error) if len < 2 => expect("no room", Err::<(), _>(error), &[libc::EINVAL]),
        Err(error) => expect("a read", Err::<(), _>(error), &[libc::EAGAIN]),
    }
}

/// Polls: the node is readable only while requests wait.
fn poll(process: &FuzzProcess) -> Result<()> {
    let ready = wait::readable(process.node.file.as_raw_fd(), Duration::ZERO)?;
    let info = process.node.ask()?;
    ensure!(info.state == STATE_LIVE, "{info:?}");
    // Requests may have arrived since; only a command may have taken them.
    ensure!(
        !ready || info.waiting > 0 || process.has_commands(),
        "readable, but {info:?}"
    );
    Ok(())
}

fn another_opener(process: &FuzzProcess) -> Result<()> {
    let path = format!("/dev/xentap/{}", process.node.info.minor);
    for flags in [0, libc::O_NONBLOCK] {
        let other = TapNode::file(path.as_ref(), flags);
        expect("a second opener", other, &[libc::EBUSY])?;
    }
    Ok(())
}

/// Sends a command of io_uring with a wrong number or argument.
fn wrong_command(process: &mut FuzzProcess, ledger: &Ledger, rng: &mut Rng) -> Result<()> {
    const UNKNOWN: &[i32] = &[-libc::EOPNOTSUPP, -libc::ENOTTY];
    const INVALID: &[i32] = &[-libc::EINVAL];
    const NOWHERE: &[i32] = &[-libc::EFAULT, -libc::EINVAL];
    if !process.may_send() {
        return Ok(());
    }
    let good = CommandMemory::new(&[]).payload();
    let (number, payload, wanted) = match rng.below(4) {
        0 => {
            let number = rng.next() as u32;
            if number == ioctl::EXCHANGE {
                return Ok(());
            }
            (number, good, UNKNOWN)
        }
        1 => {
            let len = rng.pick(&[0, 2, 3, 4096, u32::MAX]);
            (ioctl::EXCHANGE, Buffer { len, ..good }, INVALID)
        }
        2 => {
            let reserved = 1 << rng.below(32);
            (ioctl::EXCHANGE, Buffer { reserved, ..good }, INVALID)
        }
        _ => {
            let addr = rng.pick(&UnmappedAddresses::ALL).address();
            (ioctl::EXCHANGE, Buffer { addr, ..good }, NOWHERE)
        }
    };
    let elsewhere = rng.below(2) == 0;
    process.send_wrong((number, payload), wanted, elsewhere, false, ledger)
}

/// Sends a command without memory for its tags; it may wait before it fails.
fn faulty_command(process: &mut FuzzProcess, ledger: &Ledger, rng: &mut Rng) -> Result<()> {
    const RESULTS: &[i32] = &[-libc::EFAULT, -libc::EINVAL, -libc::EBUSY];
    if !process.may_send() {
        return Ok(());
    }
    let place = rng.pick(&UnmappedAddresses::ALL);
    let payload = CommandMemory::with_tags_at(place.address()).payload();
    process.send_wrong((ioctl::EXCHANGE, payload), RESULTS, false, true, ledger)
}

/// Sends a command that may wait, or tries to cancel one.
fn waiting_command(process: &mut FuzzProcess, ledger: &mut Ledger, rng: &mut Rng) -> Result<()> {
    if !process.may_send() {
        return Ok(());
    }
    match rng.below(3) {
        0 => process.cancel(ledger),
        _ => process.send(&[], rng.below(2) == 0, ledger),
    }
}

/// Describes the disk with bytes that are nearly valid, or random. Only the size may change.
fn describe(process: &mut FuzzProcess, rng: &mut Rng) -> Result<()> {
    let size = rng.pick(&[SECTORS, SECTORS, 8, SECTORS * 2, 1 << 54, u64::MAX]);
    let flags = rng.pick(&[GEOMETRY_WRITE_CACHE, GEOMETRY_WRITE_CACHE, 0, 1, 4]);
    let mut bytes = match rng.below(5) {
        0 => (0..rng.below(300)).map(|_| rng.next() as u8).collect(),
        _ => records(size, flags),
    };
    for _ in 0..rng.below(3) {
        if !bytes.is_empty() {
            let at = rng.below(bytes.len() as u64) as usize;
            let any = rng.next() as u8;
            bytes[at] = rng.pick(&[0, 1, 0xff, any]);
        }
    }
    match rng.below(8) {
        0 => bytes.truncate(rng.below(bytes.len() as u64 + 1) as usize),
        1 => bytes.extend_from_within(..),
        _ => {}
    }
    let ours = Params::parse(&records(SECTORS, GEOMETRY_WRITE_CACHE));
    let ours = ours.map_err(|error| anyhow::anyhow!("our description: {error:?}"))?;
    let described = Params::parse(&bytes)
        .ok()
        .filter(|_| bytes.len() <= RECORDS);
    let right = described.map(|params| ours.succeeded_by(&params));
    let result = process.node.set_params(&bytes);
    let wanted = match right {
        Some(Ok(_)) => 0,
        Some(Err(Unfit::Smaller)) => libc::ERANGE,
        Some(Err(Unfit::Shape)) | None => libc::EINVAL,
    };
    expect(&format!("a description {bytes:x?}"), result, &[wanted])?;
    let now = process.node.ask()?.sectors;
    let size = right
        .and_then(Result::ok)
        .map_or(SECTORS, |params| params.sectors);
    ensure!(now == size, "{now} sectors after {bytes:x?}");
    if size != SECTORS {
        process
            .node
            .describe(SECTORS, GEOMETRY_WRITE_CACHE | GEOMETRY_MAY_SHRINK)?;
    }
    Ok(())
}

/// Makes calls of the supervisor while the disk is open.
fn control_node(process: &FuzzProcess, rng: &mut Rng) -> Result<()> {
    let ours = process.node.info.minor;
    let file = control()?;
    match rng.below(5) {
        0 => create(&file, ours, rng),
        1 => {
            let flags = rng.pick(&[0, 0, 1, u32::MAX]);
            let far = (FAR + rng.below(1 << 20)) as u32;
            let minor = rng.pick(&[ours, far, u32::MAX]);
            let wanted = match (flags, minor == ours) {
                (0, true) => libc::EBUSY,
                (0, false) => libc::ENOENT,
                _ => libc::EINVAL,
            };
            let result = call(&file, ioctl::DESTROY, &mut Destroy { minor, flags });
            expect("a wrong end", result, &[wanted])
        }
        2 => {
            let any = rng.next() as u32;
            let minor = rng.pick(&[0, ours, ours + 1, u32::MAX, any]);
            match query(minor)? {
                Ok(info) => ensure!(info.minor >= minor, "{info:?} is below {minor}"),
                Err(error) => {
                    ensure!(minor > ours, "our disk is not found from {minor} on");
                    expect("a query", Err::<(), _>(error), &[libc::ENOENT])?;
                }
            }
            Ok(())
        }
        3 => {
            let number = rng.pick(&[ioctl::CREATE, ioctl::DESTROY, ioctl::QUERY]);
            let result = call_nowhere(&file, number, rng.pick(&UnmappedAddresses::ALL));
            expect("an argument nowhere", result, FAULT)
        }
        _ => unknown_number(&file, rng),
    }
}

/// Creates another disk; if the arguments are valid, the disk is created and destroyed again.
fn create(file: &File, ours: u32, rng: &mut Rng) -> Result<()> {
    let mut create = CreateCommand {
        version: rng.pick(&[1, 1, 1, 0, 2, u32::MAX]),
        minor: rng.pick(&[ours, u32::MAX, FAR as u32, (1 << 20) - 1, 1 << 20]),
        arena_kib: rng.pick(&[0, 1024, SMALL, 1, 1025, 65 << 10, u32::MAX]),
        fail_after_s: rng.pick(&[0, 1, u32::MAX]),
        ..CreateCommand::default()
    };
    if rng.below(8) == 0 {
        let at = rng.below(create.reserved.len() as u64);
        create.reserved[at as usize] = 1 << rng.below(64);
    }
    let wanted = match create.check() {
        Err(_) => libc::EINVAL,
        Ok(new) if new.minor == Some(ours) => libc::EEXIST,
        Ok(_) => 0,
    };
    let result = call(file, ioctl::CREATE, &mut create);
    let what = format!("a request for a disk: {create:x?}");
    expect(&what, result, &[wanted])?;
    match wanted {
        0 => TapDisk::adopt(create.minor).destroy(),
        _ => Ok(()),
    }
}
