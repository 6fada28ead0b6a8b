// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes are started, watched, and replaced when they have died.

use super::{fd_broker, group, io_errors, output, trace, Lifecycle};
use crate::disk::{Disk, DiskFate};
use crate::log::tell;
use crate::process::{self, Process, Program, OPEN, SOON};
use crate::record::DesiredState;
use control::supervisor::{PendingOperation, What};
use control::tapdisk::Request;
use control::Failure;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::MutexGuard;

/// Time between two checks whether the I/O of a dead process is over, because the kernel sends no notification.
const LOOK: Duration = Duration::from_millis(20);

impl Lifecycle {
    /// Starts a process that has no disk yet, and watches it from now on.
    ///
    /// # Errors
    /// It cannot be started.
    pub async fn spawn(self: &Rc<Self>) -> Result<Rc<Process>, Failure> {
        self.spawn_program(None).await
    }

    /// Starts a process for a disk.
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) async fn spawn_for(self: &Rc<Self>, disk: &Disk) -> Result<Rc<Process>, Failure> {
        let program = disk.record.borrow().program.clone();
        self.spawn_program(program).await
    }

    /// Starts a process of this program, or of the one that is started by default.
    pub(super) async fn spawn_program(
        self: &Rc<Self>,
        program: Option<PathBuf>,
    ) -> Result<Rc<Process>, Failure> {
        let socket = process::unnamed(&self.registry.folder);
        let program = match program {
            Some(path) => &Program {
                path,
                ..self.program.clone()
            },
            None => &self.program,
        };
        let process = Rc::new(Process::spawn(program, &socket).await?);
        self.registry.add_idle(&process);
        self.watch(process.clone());
        Ok(process)
    }

    /// Watches a process until it has ended.
    pub fn watch(self: &Rc<Self>, process: Rc<Process>) {
        tokio::task::spawn_local(io_errors::watch(self.clone(), process.clone()));
        tokio::task::spawn_local(fd_broker::watch(self.clone(), process.clone()));
        tokio::task::spawn_local(trace::watch(self.clone(), process.clone()));
        tokio::task::spawn_local(group::watch(self.clone(), process.clone()));
        tokio::task::spawn_local(meet(self.clone(), process.clone()));
        let lifecycle = self.clone();
        tokio::task::spawn_local(async move {
            let how = output::log_until_end(&lifecycle.registry, &process).await;
            process.tidy();
            let pid = process.pid();
            if lifecycle.registry.remove_idle(pid) {
                if !process.is_dismissed() {
                    lifecycle.registry.events.add(None, What::Died { pid, how });
                }
                return;
            }
            let disk = lifecycle.registry.of_process(&process);
            match disk {
                // The hand-off notices the end, and reports it.
                Some(disk) if disk.is_successor(&process) => {}
                Some(disk) => lifecycle.died(disk, &process, how).await,
                None => {}
            }
        });
    }

    /// The process of a disk has ended.
    async fn died(self: &Rc<Self>, disk: Rc<Disk>, process: &Process, how: String) {
        self.tell_totals(&disk, process.pid());
        disk.forget_process();
        self.registry.note(&disk);
        disk.crashed.set(process.has_crashed());
        if process.is_dismissed() {
            return;
        }
        let pid = process.pid();
        self.registry
            .events
            .add(Some(disk.minor), What::Died { pid, how });
        let answered = self.registry.answered(&disk) > disk.answered_before.get();
        let pause = disk.backoff.borrow_mut().died(process.age(), answered);
        self.revive(&disk, pause).await;
    }

    /// Gives a disk without a process another one, without waiting for that. The caller has the turn.
    pub(super) fn revive_later(self: &Rc<Self>, disk: &Rc<Disk>) {
        let (lifecycle, disk) = (self.clone(), disk.clone());
        tokio::task::spawn_local(async move {
            if disk.serving().is_err() {
                lifecycle.revive(&disk, Duration::ZERO).await;
            }
        });
    }

    /// Replaces the process of a disk after a pause, as often as it takes.
    pub async fn revive(self: &Rc<Self>, disk: &Rc<Disk>, pause: Duration) {
        if !disk.reviving.replace(true) {
            self.try_to_revive(disk, pause).await;
            disk.reviving.set(false);
        }
    }

    async fn try_to_revive(self: &Rc<Self>, disk: &Rc<Disk>, mut pause: Duration) {
        loop {
            let Ok(_turn) = self.turn_after(disk, pause).await else {
                return;
            };
            if disk.process.borrow().is_some() {
                return;
            }
            if disk.doing() == Some(PendingOperation::Park) {
                return;
            }
            if disk.doing().is_some() {
                // A verb that waited for the dead process continues without it, and the disk after that.
                let finished = self.finish(disk, self.patience.get());
                if let Err(failure) = disk.unless_doomed(finished).await {
                    tell!(
                        warn,
                        disk.about().failed(&failure),
                        "disk {}: {failure}",
                        disk.minor
                    );
                    pause = disk.backoff.borrow_mut().died(Duration::ZERO, false);
                }
                continue;
            }
            if disk.record.borrow().want != DesiredState::Served {
                return;
            }
            let Err(failure) = disk.unless_doomed(self.serve(disk)).await else {
                disk.record.borrow_mut().restarts += 1;
                self.registry.note(disk);
                // It may have been suspended while there was no process.
                self.look_for_suspended();
                return;
            };
            self.give_up_process(disk).await;
            if disk.fate() != DiskFate::Stays {
                return;
            }
            pause = disk.backoff.borrow_mut().died(Duration::ZERO, false);
            let retry_ms = pause.as_millis().try_into().unwrap_or(u64::MAX);
            let what = What::Failed {
                message: failure.message,
                retry_ms,
            };
            self.registry.events.add(Some(disk.minor), what);
        }
    }

    /// Waits for the turn: not before a pause is over, and not while I/O of the last process may be
    /// running, when others may have something to do that goes without a process.
    async fn turn_after<'a>(
        &self,
        disk: &'a Disk,
        pause: Duration,
    ) -> Result<MutexGuard<'a, ()>, Failure> {
        let calm = async {
            tokio::time::sleep(pause).await;
            // If the kernel does not say, who serves finds out why.
            while self.is_fencing(disk.minor).unwrap_or(false) {
                tokio::time::sleep(LOOK).await;
            }
            Ok(())
        };
        disk.unless_doomed(calm).await?;
        disk.turn().await
    }

    /// Ends the process of a disk before the record drops the files that it was given: no other disk may have those
    /// while a process may not have closed them. The guest's requests wait.
    ///
    /// # Errors
    /// It does not end: its storage does not answer the kernel.
    pub(super) async fn end_process(&self, disk: &Disk) -> Result<(), Failure> {
        let process = disk.process.borrow().clone();
        if let Some(process) = process {
            if process.has_ended() && !process.is_dismissed() {
                // The watcher of the process has not come to that yet, and finds no disk of it any more.
                let (pid, how) = (process.pid(), process.ended().await);
                disk.crashed.set(process.has_crashed());
                let died = What::Died { pid, how };
                self.registry.events.add(Some(disk.minor), died);
            }
            self.tell_totals(disk, process.pid());
            process.end(Duration::ZERO).await?;
            disk.forget_process();
            self.registry.note(disk);
        }
        Ok(())
    }

    /// Ends the process of a disk, which is paused. It says before that all its I/O is over, wherever that went: the next
    /// one, and the guest, would wait for what it had sent over a network.
    pub(super) async fn end_paused(&self, disk: &Disk) -> Result<(), Failure> {
        if let Ok(process) = disk.serving() {
            let closed = process.ask(&Request::Close, &[], SOON).await;
            if let Err(failure) = closed {
                // Then it is waited for.
                let about = disk.about().failed(&failure);
                tell!(warn, about, "disk {}: {failure}", disk.minor);
            }
        }
        self.end_process(disk).await
    }

    /// Kills the process of a disk; who watches it does nothing about that.
    pub async fn give_up_process(&self, disk: &Disk) {
        let process = disk.process.borrow().clone();
        if let Some(process) = process {
            self.tell_totals(disk, process.pid());
            if let Err(failure) = process.end(Duration::ZERO).await {
                tell!(error, disk.about().failed(&failure), "{failure}");
            }
            disk.forget_process();
            self.registry.note(disk);
        }
    }
}

/// Learns which version a process is, for who looks at a list.
async fn meet(lifecycle: Rc<Lifecycle>, process: Rc<Process>) {
    if let Err(failure) = process.introduce(OPEN).await {
        if !process.has_died(&failure).await {
            let pid = process.pid();
            let about = lifecycle.registry.about(&process).failed(&failure);
            tell!(
                warn,
                about,
                "tapdisk {pid} does not say which version it is: {failure}"
            );
        }
    }
}
