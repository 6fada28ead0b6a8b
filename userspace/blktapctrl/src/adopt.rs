// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an earlier supervisor left: disks, and the processes that serve them. What is not understood
//! is left alone (`unknown`): nothing that lives is ended because of what could not be read.

use crate::disk::Disk;
use crate::folder;
use crate::host::{Host, OPEN, SOON};
use crate::kernel;
use crate::life::status;
use crate::process::Process;
use crate::record::{Peek, Record, Unread, Want};
use control::supervisor::{Doing, What};
use control::tapdisk::State;
use control::Failure;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// Takes over all disks that are written down, before anybody can ask for anything.
pub async fn disks(host: &Rc<Host>) {
    match host.records.all() {
        Ok(records) => {
            let one = |record: Result<Record, Unread>| async move {
                match record {
                    Ok(record) => disk(host, record).await,
                    Err(unread) => host.leave_alone(unread).await,
                }
            };
            // At once: some may not answer.
            futures::future::join_all(records.into_iter().map(one)).await;
        }
        Err(error) => {
            let folder = host.folder.disks();
            let why = format!("cannot read {}: {error}", folder.display());
            host.events.add(None, What::Unknown { why });
        }
    }
    strays(host).await;
}

/// Takes over one disk.
pub async fn disk(host: &Rc<Host>, record: Record) {
    let minor = record.minor;
    let known = record.process;
    let process = match process_of(host, &record).await {
        Ok(process) => process.map(Rc::new),
        // It may live.
        Err(failure) => {
            let unread = Unread {
                minor: Some(minor),
                why: format!("its process cannot be recognised: {failure}"),
                peek: Box::new(peek(record)),
            };
            return host.leave_alone(unread).await;
        }
    };
    let disk = Disk::new(record);
    host.disks.borrow_mut().insert(minor, disk.clone());
    disk.record.borrow_mut().process = process.as_ref().map(|process| process.known());
    disk.process.replace(process.clone());
    let recognised = match &process {
        Some(process) => {
            host.watch(process.clone());
            recognise(&disk, process).await
        }
        None => Ok(State::Idle),
    };
    let node = kernel::node(&*host.kernel, minor);
    if matches!((&node, &recognised), (Ok(None), Ok(State::Idle))) {
        tracing::warn!("disk {minor}: its node is gone, as after a restart of the host");
        host.destroy_later(&disk);
        return;
    }
    if let Err(error) = node {
        let why = format!("cannot ask the kernel about it: {error}");
        host.events.add(Some(minor), What::Unknown { why });
    }
    // The process goes on with what it has open.
    if let Err(failure) = host.image(&disk).await {
        tracing::error!("disk {minor}: {failure}");
    }
    host.note(&disk);
    match recognised {
        Ok(state) => go_on(host, &disk, state, known.map_or(0, |known| known.pid)),
        // It may only be slow: its storage does not answer. It has the node, and is not replaced
        // while it lives.
        Err(failure) => {
            disk.attached.set(true);
            let why = format!("its process does not say what it does: {failure}");
            host.events.add(Some(minor), What::Unknown { why });
        }
    }
}

fn peek(record: Record) -> Peek {
    Peek {
        open: record.open,
        identity: record.identity,
        mode: Some(record.mode),
        policy: Some(record.policy),
        vbd: record.vbd,
        process: record.process,
    }
}

/// The process of a disk: the one that is written down or, where that could not be written any more,
/// the one that listens.
async fn process_of(host: &Host, record: &Record) -> Result<Option<Process>, Failure> {
    let socket = host.folder.tapdisk(record.minor);
    if let Some(known) = record.process {
        if let Some(process) = Process::adopt(known, &socket)? {
            return Ok(Some(process));
        }
    }
    Process::find(&socket, SOON).await
}

/// Asks the process what it does.
async fn recognise(disk: &Disk, process: &Process) -> Result<State, Failure> {
    let status = status(process).await?;
    disk.attached.set(status.state != State::Idle);
    disk.serves.replace(status.disk);
    tracing::info!(
        "disk {}: taken over with tapdisk {}, which is {:?}",
        disk.minor,
        process.pid(),
        status.state
    );
    Ok(status.state)
}

/// Does what the earlier supervisor would have done.
fn go_on(host: &Rc<Host>, disk: &Rc<Disk>, state: State, pid: u32) {
    let (want, doing) = {
        let record = disk.record.borrow();
        (record.want, record.doing)
    };
    if doing == Some(Doing::Destroy) {
        return host.destroy_later(disk);
    }
    let lives = disk.process.borrow().is_some();
    let serves = lives && state == State::Running;
    if doing.is_none() && (want != Want::Served || serves) {
        return;
    }
    if doing.is_none() && !lives {
        let how = "ended while no supervisor ran".into();
        host.events.add(Some(disk.minor), What::Died { pid, how });
    }
    let (host, disk) = (host.clone(), disk.clone());
    tokio::task::spawn_local(async move {
        if !lives && doing.is_none() {
            return host.revive(&disk, Duration::ZERO).await;
        }
        if let Err(failure) = finish(&host, &disk).await {
            let retry_ms = 0;
            let message = failure.message;
            host.events
                .add(Some(disk.minor), What::Failed { message, retry_ms });
            if disk.doing().is_none() && disk.record.borrow().want == Want::Served {
                host.revive(&disk, Duration::ZERO).await;
            }
        }
    });
}

/// Finishes the verb that has begun, or serves a disk whose process does not.
async fn finish(host: &Rc<Host>, disk: &Rc<Disk>) -> Result<(), Failure> {
    let _turn = disk.turn().await?;
    if disk.doing().is_some() {
        return disk.unless_doomed(host.finish(disk, OPEN)).await;
    }
    match disk.unless_doomed(host.serve(disk)).await {
        Ok(_) => Ok(()),
        Err(failure) => {
            // It says itself that it serves nothing.
            host.give_up_process(disk).await;
            Err(failure)
        }
    }
}

/// Looks after processes that listen and belong to no disk.
async fn strays(host: &Rc<Host>) {
    let sockets = match folder::files(&host.folder.tapdisks(), "sock") {
        Ok(sockets) => sockets,
        Err(error) => {
            let why = format!("cannot read {}: {error}", host.folder.tapdisks().display());
            host.events.add(None, What::Unknown { why });
            return;
        }
    };
    for socket in sockets {
        let stem = socket.file_stem().and_then(|stem| stem.to_str());
        let minor: Option<u32> = stem.and_then(|stem| stem.parse().ok());
        let known = |minor| {
            host.disks.borrow().contains_key(minor) || host.unknown.borrow().contains_key(minor)
        };
        if minor.as_ref().is_some_and(known) {
            continue;
        }
        if let Err(failure) = stray(host, minor, &socket).await {
            let why = format!("a process without a disk is not understood: {failure}");
            host.events.add(minor, What::Unknown { why });
        }
    }
}

/// A process that has no node is of no use to anybody, and leaves. Any other one stays.
async fn stray(host: &Rc<Host>, minor: Option<u32>, socket: &Path) -> Result<(), Failure> {
    let Some(process) = Process::find(socket, SOON).await? else {
        return folder::remove(socket).map_err(|error| {
            Failure::system(format!("cannot remove {}", socket.display()), &error)
        });
    };
    let status = status(&process).await?;
    if status.state == State::Idle {
        let left = process.end(SOON).await;
        process.tidy();
        return left;
    }
    let minor = minor.or(status.node.map(|node| node.minor));
    let why = format!(
        "nothing is written down of it; tapdisk {} has it",
        process.pid()
    );
    let unread = Unread {
        minor,
        why,
        peek: Box::new(Peek {
            open: status.open,
            process: Some(process.known()),
            ..Peek::default()
        }),
    };
    host.leave_alone(unread).await;
    Ok(())
}
