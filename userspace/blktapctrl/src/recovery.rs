// SPDX-License-Identifier: MIT OR Apache-2.0
//! Takes over the disks of an earlier supervisor, and the processes that serve them. An unreadable record is ignored
//! (`unknown`): the supervisor ends no process because of a record that it could not read.

use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::folder;
use crate::kernel;
use crate::lifecycle::Lifecycle;
use crate::log::tell;
use crate::process::{Process, SOON};
use crate::record::{DesiredState, PeekNext, Record, RecordPeek, UnreadRecord};
use crate::registry::Registry;
use crate::state::{DiskState, StateOwner};
use crate::store::relative;
use control::supervisor::{PendingOperation, What, Which};
use control::tapdisk;
use control::Failure;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// Takes over all recorded disks, before the first request is served.
pub async fn disks(lifecycle: &Rc<Lifecycle>) {
    let _reading = lifecycle.registry.reading();
    match lifecycle.registry.records.all() {
        Ok(records) => {
            let one = |record: Result<Record, UnreadRecord>| async move {
                match record {
                    Ok(record) => disk(lifecycle, record).await,
                    Err(unread) => lifecycle.registry.leave_alone(unread).await,
                }
            };
            // At once: some may not answer.
            futures::future::join_all(records.into_iter().map(one)).await;
        }
        Err(error) => {
            let folder = lifecycle.registry.folder.disks();
            let why = format!("cannot read {}: {error}", folder.display());
            lifecycle.registry.knows_not_all();
            lifecycle.registry.events.add(None, What::Unknown { why });
        }
    }
    strays(lifecycle).await;
}

/// Takes over one disk.
pub async fn disk(lifecycle: &Rc<Lifecycle>, mut record: Record) {
    let minor = record.minor;
    let found = async {
        let successor = successor_of(&lifecycle.registry, &mut record).await?;
        let process = process_of(&lifecycle.registry, &record).await?;
        Ok::<_, Failure>((process, successor))
    };
    let (process, successor) = match found.await {
        Ok((process, successor)) => (process.map(Rc::new), successor.map(Rc::new)),
        // It may live.
        Err(failure) => {
            let unread = UnreadRecord {
                minor: Some(minor),
                why: format!("its process cannot be recognised: {failure}"),
                peek: Box::new(peek(record)),
            };
            return lifecycle.registry.leave_alone(unread).await;
        }
    };
    let known = record.process;
    let disk = Disk::new(record);
    lifecycle.registry.add(&disk);
    disk.successor.replace(successor.clone());
    if let Some(successor) = successor {
        lifecycle.watch(successor);
    }
    disk.record.borrow_mut().process = process.as_ref().map(|process| process.known());
    disk.process.replace(process.clone());
    let recognised = match &process {
        Some(process) => {
            keep_state(&disk, process).await;
            lifecycle.adopt_share(&disk, process);
            lifecycle.watch(process.clone());
            recognise(&disk, process).await
        }
        None => Ok(tapdisk::State::Idle),
    };
    let node = kernel::node(&*lifecycle.registry.kernel, minor);
    let is_parked = lifecycle.found_parked(&disk);
    if !is_parked && matches!((&node, &recognised), (Ok(None), Ok(tapdisk::State::Idle))) {
        tell!(
            warn,
            disk.about(),
            "disk {minor}: its node is gone, as after a restart of the lifecycle"
        );
        lifecycle.destroy_later(&disk);
        return;
    }
    if let Err(error) = node {
        let why = format!("cannot ask the kernel about it: {error}");
        lifecycle
            .registry
            .events
            .add(Some(minor), What::Unknown { why });
    }
    // The process continues with the image that it has open.
    if let Err(failure) = lifecycle.image(&disk).await {
        tell!(
            error,
            disk.about().failed(&failure),
            "disk {minor}: {failure}"
        );
    }
    if let (Some(process), Ok(tapdisk::State::Running)) = (&process, &recognised) {
        lifecycle.lease_again(&disk, process);
        lifecycle.count(&disk);
    } else if recognised.is_ok() && !is_parked {
        // This is a lease that an earlier supervisor was about to give up.
        lifecycle.give_lease_up_later(&disk, Duration::ZERO);
    }
    lifecycle.registry.note(&disk);
    if is_parked {
        return;
    }
    lifecycle.follow_stream(&disk);
    lifecycle.follow_mirror(&disk);
    lifecycle.settle_trace_later(&disk);
    match recognised {
        Ok(state) => go_on(lifecycle, &disk, state, known.map_or(0, |known| known.pid)),
        // It may only be slow: its storage does not answer. It has the node, and is not replaced
        // while it lives.
        Err(failure) => {
            disk.attached.set(true);
            // Its end is watched for.
            if matches!(&process, Some(process) if process.has_died(&failure).await) {
                return;
            }
            let why = format!("its process does not say what it does: {failure}");
            lifecycle
                .registry
                .events
                .add(Some(minor), What::Unknown { why });
        }
    }
}

fn peek(record: Record) -> RecordPeek {
    RecordPeek {
        lease: record.token().map(str::to_owned),
        reserved: record.is_reserved(),
        leases: record.leases().to_vec(),
        open: record.open,
        identity: record.identity,
        parts: record.parts,
        files: record.files,
        next: record.next.map(PeekNext::from),
        mode: Some(record.mode),
        policy: Some(record.policy),
        vbd: record.vbd,
        process: record.process,
    }
}

/// Returns the process of a disk: the recorded one or, where the record could not be updated, the one that listens.
async fn process_of(registry: &Registry, record: &Record) -> Result<Option<Process>, Failure> {
    let socket = registry.folder.tapdisk(record.minor);
    if let Some(known) = record.process {
        if let Some(process) = Process::adopt(known, &socket)? {
            return Ok(Some(process));
        }
    }
    Process::find(&socket, SOON).await
}

/// The process that was to take a disk over, if it is not known yet whether it has. The new process takes the
/// name of the old one's socket when it serves: from then on the disk is its own, whatever is on record.
async fn successor_of(
    registry: &Registry,
    record: &mut Record,
) -> Result<Option<Process>, Failure> {
    let Some(known) = record.handoff.as_ref().and_then(|handoff| handoff.process) else {
        return Ok(None);
    };
    let (socket, next) = {
        let folder = &registry.folder;
        (folder.tapdisk(record.minor), folder.successor(record.minor))
    };
    let old = record.process;
    let listens = Process::find(&socket, SOON).await?;
    if listens.is_some_and(|process| Some(process.known()) == old) {
        return Process::adopt(known, &next);
    }
    // The old process has ended, or does not answer any more.
    if let Some(old) = old.filter(|old| *old != known) {
        if let Some(old) = Process::adopt(old, &next)? {
            old.end(Duration::ZERO).await?;
        }
    }
    match std::fs::rename(&next, &socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            let what = format!("cannot make {}", socket.display());
            return Err(Failure::system(what, &error));
        }
        _ => {}
    }
    record.take_over(known);
    Ok(None)
}

/// The state of a disk is the process' too, which may be the last one to hold it. The process chose the files that it
/// has open, and looking at one may hang.
async fn keep_state(disk: &Disk, process: &Process) {
    let (served, next) = {
        let record = disk.record.borrow();
        let next = record.next.as_ref();
        let next = next.map(|next| StateOwner::next(disk.minor, next));
        (StateOwner::served(&record), next)
    };
    let all = [
        (Some(served), &disk.state),
        (next.filter(|next| *next != served), &disk.next_state),
    ];
    for (whose, place) in all {
        let Some(whose) = whose else { continue };
        let known = process.known();
        let folder = format!("/proc/{}/fd", known.pid);
        let found = blocking_io(Path::new(&folder), LIMIT, move || {
            DiskState::held_by(known, whose)
        });
        match found.await {
            // By then the number may have been another process'.
            Ok(_) if process.has_ended() => {}
            Ok(state) => drop(place.replace(state)),
            Err(failure) => tell!(warn, disk.about().failed(&failure), "{failure}"),
        }
    }
}

/// Asks the process what it does.
async fn recognise(disk: &Disk, process: &Process) -> Result<tapdisk::State, Failure> {
    let status = process.status().await?;
    disk.attached.set(status.state != tapdisk::State::Idle);
    disk.serves.replace(status.disk);
    tell!(
        info,
        disk.about(),
        "disk {}: taken over with tapdisk {}, which is {:?}",
        disk.minor,
        process.pid(),
        status.state
    );
    Ok(status.state)
}

/// Does what the earlier supervisor would have done.
fn go_on(lifecycle: &Rc<Lifecycle>, disk: &Rc<Disk>, state: tapdisk::State, pid: u32) {
    let (want, doing) = {
        let record = disk.record.borrow();
        (record.want, record.doing)
    };
    if doing == Some(PendingOperation::Destroy) {
        return lifecycle.destroy_later(disk);
    }
    let lives = disk.process.borrow().is_some();
    let serves = lives && is_as_it_should_be(lifecycle, disk, state);
    if doing.is_none() && (want != DesiredState::Served || serves) {
        return;
    }
    if doing.is_none() && !lives {
        let how = "ended while no supervisor ran".into();
        lifecycle
            .registry
            .events
            .add(Some(disk.minor), What::Died { pid, how });
    }
    let (lifecycle, disk) = (lifecycle.clone(), disk.clone());
    tokio::task::spawn_local(async move {
        if !lives && doing.is_none() {
            return lifecycle.revive(&disk, Duration::ZERO).await;
        }
        if let Err(failure) = finish(&lifecycle, &disk).await {
            let retry_ms = 0;
            let message = failure.message;
            lifecycle
                .registry
                .events
                .add(Some(disk.minor), What::Failed { message, retry_ms });
            let serves =
                disk.doing().is_none() && disk.record.borrow().want == DesiredState::Served;
            // A verb that waits for a dead process continues without it.
            if serves || disk.process.borrow().is_none() {
                lifecycle.revive(&disk, Duration::ZERO).await;
            }
        }
    });
}

/// A process serves its disk, or is ready to. It knows which of the two.
fn is_as_it_should_be(lifecycle: &Rc<Lifecycle>, disk: &Rc<Disk>, state: tapdisk::State) -> bool {
    match state {
        tapdisk::State::Running => {
            if disk.record.borrow().want == DesiredState::Served {
                lifecycle.became_active(disk);
            }
            true
        }
        tapdisk::State::Inactive => {
            lifecycle.found_inactive(disk);
            lifecycle.tell_released(disk);
            true
        }
        _ => false,
    }
}

/// Finishes the verb that has begun, or serves a disk whose process does not.
async fn finish(lifecycle: &Rc<Lifecycle>, disk: &Rc<Disk>) -> Result<(), Failure> {
    let _turn = disk.turn().await?;
    if disk.doing().is_some() {
        let patience = lifecycle.patience.get();
        return disk.unless_doomed(lifecycle.finish(disk, patience)).await;
    }
    match disk.unless_doomed(lifecycle.serve(disk)).await {
        Ok(_) => Ok(()),
        Err(failure) => {
            // It says itself that it serves nothing.
            lifecycle.give_up_process(disk).await;
            Err(failure)
        }
    }
}

/// Looks after processes that listen and belong to no disk.
async fn strays(lifecycle: &Rc<Lifecycle>) {
    let sockets = match folder::files(&lifecycle.registry.folder.tapdisks(), "sock") {
        Ok(sockets) => sockets,
        Err(error) => {
            let why = format!(
                "cannot read {}: {error}",
                lifecycle.registry.folder.tapdisks().display()
            );
            lifecycle.registry.knows_not_all();
            lifecycle.registry.events.add(None, What::Unknown { why });
            return;
        }
    };
    let one = |socket: PathBuf| async move {
        let stem = socket.file_stem().and_then(|stem| stem.to_str());
        let minor: Option<u32> = stem.and_then(|stem| stem.parse().ok());
        if minor.is_some_and(|minor| lifecycle.registry.knows(minor)) {
            return;
        }
        let next = stem.and_then(|stem| stem.strip_suffix(".next")?.parse().ok());
        let disk = next.and_then(|minor| lifecycle.registry.get(minor));
        if disk.is_some_and(|disk| disk.successor.borrow().is_some()) {
            return;
        }
        if let Err(failure) = stray(lifecycle, minor, &socket).await {
            let why = format!("a process without a disk is not understood: {failure}");
            lifecycle.registry.knows_not_all();
            lifecycle.registry.events.add(minor, What::Unknown { why });
        }
    };
    // At once: some may not answer.
    futures::future::join_all(sockets.into_iter().map(one)).await;
}

/// Ends a process that has no node, because it serves no disk. A process with a node becomes an ignored disk.
async fn stray(
    lifecycle: &Rc<Lifecycle>,
    minor: Option<u32>,
    socket: &Path,
) -> Result<(), Failure> {
    let Some(process) = Process::find(socket, SOON).await? else {
        return folder::remove(socket).map_err(|error| {
            Failure::system(format!("cannot remove {}", socket.display()), &error)
        });
    };
    let status = process.status().await?;
    if status.state == tapdisk::State::Idle {
        let left = process.end(SOON).await;
        process.tidy();
        return left;
    }
    let minor = minor.or(status.node.map(|node| node.minor));
    let why = format!("it has no record; tapdisk {} has it", process.pid());
    let unread = UnreadRecord {
        minor,
        why,
        peek: Box::new(RecordPeek {
            open: status.open,
            process: Some(process.known()),
            ..RecordPeek::default()
        }),
    };
    lifecycle.registry.leave_alone(unread).await;
    Ok(())
}

/// Takes over a disk that is left alone.
///
/// # Errors
/// Not enough is known about it.
pub async fn unknown(lifecycle: &Rc<Lifecycle>, minor: u32) -> Result<(), Failure> {
    let _reading = lifecycle.registry.reading();
    if let Some(record) = lifecycle.registry.understand(minor).await? {
        disk(lifecycle, record).await;
    }
    Ok(())
}

/// Adopts the ignored disk that a request is about to end, if it names one, because only a supervised disk can be
/// ended.
///
/// # Errors
/// The disk cannot be adopted: it is not removed.
pub async fn to_end(lifecycle: &Rc<Lifecycle>, which: &Which) -> Result<(), Failure> {
    let vbd = which.vbd.as_deref().map(relative);
    let left = lifecycle.registry.left_alone();
    let is_named = which.minor.is_some() || vbd.is_some();
    let named = left.iter().filter(|_| is_named).find(|disk| {
        which.minor.is_none_or(|minor| minor == disk.minor)
            && vbd.is_none_or(|vbd| disk.peek.vbd.as_deref() == Some(vbd))
    });
    match named {
        Some(disk) => unknown(lifecycle, disk.minor).await,
        None => Ok(()),
    }
}
