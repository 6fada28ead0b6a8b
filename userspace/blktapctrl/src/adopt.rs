// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an earlier supervisor left: disks, and the processes that serve them.

use crate::disk::Disk;
use crate::folder;
use crate::host::Host;
use crate::kernel;
use crate::link::Link;
use crate::process::Process;
use crate::record::{Record, Want};
use control::supervisor::What;
use control::tapdisk::{Reply, Request, State};
use control::{Code, Failure};
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// How long a process may take to say what it does.
const SOON: Duration = Duration::from_secs(10);

/// Takes over all disks that are written down, before anybody can ask for anything.
pub async fn disks(host: &Rc<Host>) {
    let one = |path: PathBuf| async move {
        match Record::read(&path) {
            Ok(record) => disk(host, record).await,
            // Not removed: somebody may want to see it.
            Err(error) => tracing::error!("cannot read {}: {error}", path.display()),
        }
    };
    // At once: some may not answer.
    let files = files(&host.folder.disks(), "json").into_iter();
    futures::future::join_all(files.map(one)).await;
    strays(host).await;
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::error!("cannot read {}: {error}", folder.display());
            return Vec::new();
        }
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

async fn disk(host: &Rc<Host>, record: Record) {
    let minor = record.minor;
    let known = record.process;
    let disk = Disk::new(record);
    host.disks.borrow_mut().insert(minor, disk.clone());
    let process = match known {
        Some(known) => Process::adopt(known, &host.folder.tapdisk(minor)).await,
        None => Ok(None),
    };
    match process {
        Ok(Some(process)) => {
            let process = Rc::new(process);
            disk.process.replace(Some(process.clone()));
            host.watch(process);
        }
        Ok(None) => disk.record.borrow_mut().process = None,
        Err(failure) => tracing::error!("disk {minor}: its process cannot be asked: {failure}"),
    }
    if !matches!(kernel::node(&*host.kernel, minor), Ok(Some(_))) {
        tracing::warn!("disk {minor}: its node is gone, as after a restart of the host");
        let host = host.clone();
        tokio::task::spawn_local(async move {
            if let Err(failure) = host.destroy(&disk).await {
                tracing::error!("{failure}");
            }
        });
        return;
    }
    // The process goes on with what it has open.
    if let Err(failure) = host.image(&disk).await {
        tracing::error!("disk {minor}: {failure}");
    }
    if let Err(failure) = recognise(&disk).await {
        tracing::error!("disk {minor}: {failure}");
        host.give_up_process(&disk).await;
    }
    host.note(&disk);
    if disk.process.borrow().is_none() && disk.record.borrow().want == Want::Served {
        let what = What::Died {
            pid: known.map_or(0, |known| known.pid),
            how: "ended while no supervisor ran".into(),
        };
        host.events.add(Some(minor), what);
        let host = host.clone();
        tokio::task::spawn_local(async move { host.revive(&disk, Duration::ZERO).await });
    }
}

/// Asks the process what it does.
async fn recognise(disk: &Disk) -> Result<(), Failure> {
    let Some(process) = disk.process.borrow().clone() else {
        return Ok(());
    };
    match process.ask(&Request::Status, &[], SOON).await {
        Ok(Reply::Status(status)) => {
            disk.attached.set(status.state != State::Idle);
            disk.serves.replace(status.disk);
            let wanted = disk.record.borrow().want == Want::Served;
            if wanted && status.state != State::Running {
                return Err(Failure::new(
                    Code::State,
                    "its process does not serve it: replacing it",
                ));
            }
            tracing::info!(
                "disk {}: taken over with tapdisk {}",
                disk.minor,
                process.pid()
            );
            Ok(())
        }
        Ok(reply) => Err(crate::host::unexpected(&reply)),
        // It may only be slow: its storage does not answer. It has the node, and is not replaced
        // while it lives.
        Err(failure) if failure.code == Code::Timeout => {
            disk.attached.set(true);
            tracing::warn!("disk {}: {failure}", disk.minor);
            Ok(())
        }
        Err(failure) => Err(failure),
    }
}

/// Ends processes that were started and never got a disk.
async fn strays(host: &Host) {
    for socket in files(&host.folder.tapdisks(), "sock") {
        let minor = socket
            .file_stem()
            .and_then(|stem| stem.to_str()?.parse().ok());
        let known = minor.is_some_and(|minor: u32| host.disks.borrow().contains_key(&minor));
        if known {
            continue;
        }
        if let Ok(mut link) = Link::connect(&socket).await {
            if let Err(failure) = link.ask(&Request::Exit, &[], SOON).await {
                tracing::warn!("a process without a disk does not leave: {failure}");
            }
        }
        if let Err(error) = folder::remove(&socket) {
            tracing::warn!("cannot remove {}: {error}", socket.display());
        }
    }
}
