// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Requests that kill every process, and descriptions that differ from those that the guest knows.

use super::{attach, check_block, deliver, detach, process_writes, succeeded, BLOCK, MIB};
use crate::cases::{Case, Context};
use crate::guest::COMMAND;
use crate::process::{DeliveredRequest, Played, TestProcess};
use crate::{sh, xs};
use anyhow::{ensure, Result};
use ring::tap::abi::{CreateCommand, OP_WRITE};
use std::time::{Duration, Instant};
use tapdev::Params;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use crate::cases::SharedGuest::Pv;
    let case =
        |name, about, run: fn(&mut Context) -> Result<()>| Case::new(name, about, Pv, run).tap();
    vec![
        case(
            "tap.poison",
            "a request of which three processes die fails alone, and all others succeed",
            poison,
        )
        .no_leaks(),
        case(
            "tap.told_once",
            "another image may have other hints, and is not smaller unless that is forced",
            told_once,
        ),
    ]
}

/// Deaths at one request.
const DEATHS: u32 = 3;
/// The block at which processes die, in the middle of the writes that are sent together.
const DEADLY: u64 = 7;
const WRITES: [(u64, char); 8] = [
    (3, 'a'),
    (9, 'b'),
    (1, 'c'),
    (DEADLY, 'd'),
    (5, 'e'),
    (4, 'f'),
    (2, 'g'),
    (6, 'h'),
];

fn is_deadly(request: &DeliveredRequest) -> bool {
    request.desc.op == OP_WRITE && request.desc.sector == DEADLY * BLOCK
}

/// Serves all that there is until the disk has nothing more, or until it is to die: then it says so.
fn live(disk: &Played, process: &TestProcess) -> Result<bool> {
    let deadline = Instant::now() + COMMAND;
    loop {
        let requests = process.fetch_now()?;
        if disk.info()?.isolated > 0 {
            ensure!(
                requests.len() <= 1,
                "{} requests were delivered at once while some are suspected",
                requests.len()
            );
        }
        // The process first gets all requests, and then answers them.
        if requests.iter().any(is_deadly) {
            return Ok(true);
        }
        process.serve(&requests)?;
        let info = disk.info()?;
        if requests.is_empty() && info.waiting + info.delivered == 0 {
            return Ok(false);
        }
        ensure!(
            Instant::now() < deadline,
            "the requests do not come to an end: {info:?}"
        );
    }
}

fn poison(context: &mut Context) -> Result<()> {
    let disk = Played::make(
        MIB,
        CreateCommand {
            max_deaths: DEATHS,
            ..CreateCommand::default()
        },
    )?;
    let theirs = disk.clone();
    context.at_end(format!("remove tap disk {}", disk.minor), move || {
        theirs.remove()
    });
    let mut process = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &process)?;
    // All are in the hand of the first one that dies.
    let held = deliver(guest, &process, &WRITES)?;
    let mut deaths = 0;
    loop {
        drop(process);
        deaths += 1;
        ensure!(deaths <= DEATHS, "{deaths} processes died of one request");
        process = disk.process()?;
        if !live(&disk, &process)? {
            break;
        }
    }
    ensure!(deaths == DEATHS, "a request failed after {deaths} deaths");
    for (one, (block, _)) in held.into_iter().zip(WRITES) {
        if block == DEADLY {
            let done = guest.wait(one.job, COMMAND)?;
            ensure!(done.rc != 0, "the write that was never executed succeeded");
        } else {
            succeeded(guest, one.job)?;
        }
    }
    let info = disk.info()?;
    let told = (
        info.poisoned,
        info.poison_op,
        info.poison_sector,
        info.poison_sectors,
    );
    ensure!(
        told == (1, OP_WRITE.into(), DEADLY * BLOCK, BLOCK) && info.isolated == 0,
        "of the request that failed the kernel says {info:?}"
    );
    for (block, letter) in WRITES.into_iter().filter(|(block, _)| *block != DEADLY) {
        check_block(guest, &disk, &process, block, letter)?;
    }
    // For a process that survives it, a request for that block is like any other.
    process_writes(guest, &process, DEADLY, 'z')?;
    check_block(guest, &disk, &process, DEADLY, 'z')?;
    detach(guest, &vbd, &process)
}

fn told_once(context: &mut Context) -> Result<()> {
    let disk = super::played(context, 0)?;
    let first = disk.process()?;
    let guest = context.pv()?;
    let vbd = attach(guest, &disk, &first)?;
    drop(first);
    let told = disk.params();
    let other = Params {
        physical_block: 8192,
        discard: None,
        ..told
    };
    let second = disk.process_with(&other)?;
    process_writes(guest, &second, 7, 'a')?;
    drop(second);
    let smaller = Params {
        sectors: told.sectors / 2,
        ..told
    };
    let refused = disk.process_with(&smaller).err();
    let errno = refused.and_then(|error| {
        let error = error.downcast_ref::<std::io::Error>()?;
        error.raw_os_error()
    });
    ensure!(
        errno == Some(libc::ERANGE),
        "a disk became smaller below its guest: {errno:?}"
    );
    let forced = Params {
        may_shrink: true,
        ..smaller
    };
    let third = disk.process_with(&forced)?;
    check_block(guest, &disk, &third, 7, 'a')?;
    let sectors = format!("{}/sectors", vbd.backend);
    let halved = smaller.sectors.to_string();
    third.serve_while(|| xs::wait_value(&sectors, &halved, Duration::from_secs(20)))?;
    let size = third.serve_while(|| {
        let mut size = String::new();
        sh::wait_for("the new size in the guest", Duration::from_secs(20), || {
            size = guest.run(&format!("blockdev --getsz {}", super::DEVICE))?;
            Ok(size.trim() == halved)
        })
    });
    size?;
    detach(guest, &vbd, &third)
}
