// SPDX-License-Identifier: MIT OR Apache-2.0
//! The end of a disk.

use super::io_errors::tell_of_kernel;
use super::Lifecycle;
use crate::disk::{Disk, DiskFate};
use crate::folder;
use crate::kernel;
use crate::log::{tell, LogContext};
use crate::process::SOON;
use crate::ram_files;
use control::supervisor::{PendingOperation, What, Which};
use control::{Code, Failure};
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// Longest time for a process to finish its requests when its disk is removed.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long who asks for the end of a disk waits for it.
const END: Duration = Duration::from_secs(20);

impl Lifecycle {
    /// Takes a disk away, without waiting for it.
    pub fn destroy_later(self: &Rc<Self>, disk: &Rc<Disk>) {
        if disk.advance(DiskFate::Doomed) {
            // The next supervisor continues it. If this change cannot be stored, the caller asks again.
            disk.record.borrow_mut().doing = Some(PendingOperation::Destroy);
            self.registry.note(disk);
            let (lifecycle, disk) = (self.clone(), disk.clone());
            tokio::task::spawn_local(async move { lifecycle.demolish(&disk).await });
        }
    }

    /// Removes a disk, and waits for that for a while; the removal continues if it takes longer.
    ///
    /// # Errors
    /// It takes longer.
    pub async fn destroy(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        self.destroy_within(disk, END).await
    }

    /// Removes a disk, and waits for that until the limit; the removal continues if it takes longer.
    ///
    /// # Errors
    /// It takes longer: names the cause of the delay.
    pub async fn destroy_within(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        limit: Duration,
    ) -> Result<(), Failure> {
        self.destroy_later(disk);
        tokio::time::timeout(limit, disk.gone()).await.map_err(|_| {
            Failure::new(
                Code::Busy,
                format!(
                    "disk {} is not free yet, and goes as soon as it is: {}",
                    disk.minor,
                    self.holds(disk)
                ),
            )
        })
    }

    /// Describes the cause that keeps a disk from being removed.
    fn holds(&self, disk: &Disk) -> String {
        let image = match &disk.record.borrow().open {
            Some(open) => open.target.to_string(),
            None => "its image".into(),
        };
        let process = disk.process.borrow().clone();
        if let Some(process) = process.filter(|process| !process.has_ended()) {
            return format!(
                "tapdisk {} has not ended; see whether the storage of {image} answers",
                process.pid()
            );
        }
        match kernel::node(&*self.registry.kernel, disk.minor) {
            Ok(Some(node)) => busy(&node, &image),
            Ok(None) => self.awaits(disk),
            Err(error) => format!("the kernel does not say why ({error})"),
        }
    }

    /// Describes the event that a disk without a node waits for.
    fn awaits(&self, disk: &Disk) -> String {
        match &*disk.leaves.borrow() {
            Some(failure) => format!(
                "{failure}; if that will never be, `tap-ctl forget -m {}` leaves the lease held; `tap-ctl lease show TARGET` then shows its number, and `tap-ctl lease break TARGET --holder-is-dead NUMBER` ends it",
                disk.minor
            ),
            None => "it is being cleared away".into(),
        }
    }

    /// Takes a node away that is not one of ours.
    ///
    /// # Errors
    /// There is none, or it is used: says by whom.
    pub fn free_unknown(&self, minor: u32) -> Result<(), Failure> {
        let failed = |error| Failure::system(format!("cannot free the node {minor}"), &error);
        let node = kernel::node(&*self.registry.kernel, minor).map_err(failed)?;
        let node = node.ok_or_else(|| {
            Failure::new(
                Code::NotFound,
                format!("node {minor} does not exist: see `tap-ctl list`"),
            )
        })?;
        match self.registry.kernel.destroy(minor) {
            Ok(()) => {
                self.registry.events.add(Some(minor), What::Destroyed);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(Failure::new(
                Code::Busy,
                format!("the node {minor} is in use: {}", busy(&node, "its image")),
            )),
            Err(error) => Err(failed(error)),
        }
    }

    async fn demolish(&self, disk: &Disk) {
        let _turn = disk.last_turn().await;
        self.end_successor(disk).await;
        let process = disk.process.borrow().clone();
        if let Some(process) = process {
            if let Err(failure) = process.end(PATIENCE).await {
                tell!(
                    error,
                    disk.about().failed(&failure),
                    "disk {}: {failure}",
                    disk.minor
                );
                process.ended().await;
            }
            self.tell_totals(disk, process.pid());
        }
        disk.forget_process();
        self.take_unserved_away(disk).await;
        // The guest's last flush may have failed.
        if let Some(status) = self.registry.status(disk) {
            tell_of_kernel(&self.registry, disk, &status);
        }
        self.free_node(disk.minor).await;
        // A process that died while no supervisor ran has left its socket, and may have had no successor.
        let files = &self.registry.folder;
        for socket in [files.nbd(disk.minor), files.tapdisk(disk.minor)] {
            if let Err(error) = folder::remove(&socket) {
                tell!(
                    error,
                    disk.about().because(&error),
                    "cannot remove {}: {error}",
                    socket.display()
                );
            }
        }
        if let Err(error) = ram_files::remove(&self.registry.folder, disk.minor) {
            tell!(
                error,
                disk.about().because(&error),
                "cannot remove the memory of disk {}: {error}",
                disk.minor
            );
        }
        // As long as it takes: no later supervisor would know of it without the record.
        self.give_up_at_the_end(disk).await;
        self.registry.remove(disk);
    }

    /// Takes a node away as soon as the kernel lets it go.
    async fn free_node(&self, minor: u32) {
        let mut pause = Duration::from_millis(2);
        loop {
            match self.registry.kernel.destroy(minor) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                Err(error) => tell!(
                    error,
                    LogContext::disk(minor).because(&error),
                    "cannot take the node {minor} away: {error}"
                ),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Takes several disks away at once.
    pub async fn destroy_all(self: &Rc<Self>, disks: Vec<Rc<Disk>>) {
        let ends = disks.iter().map(|disk| async move {
            if let Err(failure) = self.destroy(disk).await {
                tell!(error, disk.about().failed(&failure), "{failure}");
            }
        });
        futures::future::join_all(ends).await;
    }

    /// Removes a disk that has no process, or a node that belongs to no disk.
    ///
    /// # Errors
    /// It has a process, or a process uses its node.
    pub async fn free(self: &Rc<Self>, minor: u32) -> Result<(), Failure> {
        let which = Which {
            minor: Some(minor),
            ..Which::default()
        };
        let disk = match self.registry.find(&which) {
            Err(failure) if failure.code == Code::NotFound => {
                self.registry.check_unknown(minor)?;
                return self.free_unknown(minor);
            }
            disk => disk?,
        };
        if disk.process.borrow().is_some() {
            return Err(Failure::new(
                Code::Busy,
                format!("disk {minor} has a process: close and detach it, or destroy the disk"),
            ));
        }
        self.destroy(&disk).await
    }

    /// Removes a disk by name. A toolstack knows whether a guest uses it; for another caller it stays then. A limit of 0
    /// is the usual one.
    ///
    /// # Errors
    /// A guest uses it, or it takes longer.
    pub async fn end(
        self: &Rc<Self>,
        which: &Which,
        timeout_s: u32,
        is_toolstack: bool,
    ) -> Result<(), Failure> {
        let disk = match self.registry.find(which) {
            Err(failure) if failure.code == Code::NotFound => return self.end_idle(which).await,
            disk => disk?,
        };
        if !is_toolstack && disk.fate() == DiskFate::Stays {
            let node = kernel::node(&*self.registry.kernel, disk.minor)
                .map_err(|error| Failure::system("cannot ask the kernel", &error))?;
            if let Some((domain, device)) = node.and_then(|node| node.bound) {
                return Err(Failure::new(
                    Code::Busy,
                    format!(
                        "disk {} is attached to domain {domain}: detach it with xl block-detach {domain} {device}",
                        disk.minor
                    ),
                ));
            }
        }
        let ended = match timeout_s {
            0 => self.destroy(&disk).await,
            seconds => {
                let limit = Duration::from_secs(seconds.into());
                self.destroy_within(&disk, limit).await
            }
        };
        ended
    }

    /// Handles the removal of an unknown disk, which is a success; ends an idle process of that number.
    async fn end_idle(&self, which: &Which) -> Result<(), Failure> {
        let process = which.pid.and_then(|pid| self.registry.idle(pid));
        if let Some(process) = process {
            process.end(SOON).await?;
        }
        Ok(())
    }
}

/// Why the kernel does not let go of a node, in words.
fn busy(node: &kernel::NodeInfo, image: &str) -> String {
    if let Some((domain, device)) = node.bound {
        return format!(
            "the device {device} of domain {domain} uses it; detach it with xl block-detach {domain} {device}"
        );
    }
    match node.status.state.as_str() {
        "fencing" => format!(
            "I/O of its last process may still reach {image}, so no other disk may have that yet: writes over a network get a minute to settle; if it takes longer, see whether its storage answers"
        ),
        "open" | "live" => "a process has it open".into(),
        _ => "it is about to be free".into(),
    }
}
