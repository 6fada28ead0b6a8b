// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hand-off: a disk passes from the process that serves it to another one, such as one of a newer program, while its
//! guest works.
//!
//! *Prepared*: the new process is started, says which version it is, and looks at the image, while the old
//! one serves. *Switched*: the old one finishes what it has, makes it durable, and gives node and image
//! back; the new one gets them. Requests wait in the kernel meanwhile. *Committed*: the new one serves,
//! takes the name of the old one's socket, and the old one ends.
//!
//! Until the commit the disk is the old process', which lives. If the new one fails at anything it is
//! killed, and the old one gets back what it gave. Nothing is fenced for that unless a process died: who
//! gives a node back has no I/O any more.

use super::serve::Given;
use super::{of_a_process, Lifecycle};
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::log::tell;
use crate::process::{Process, SOON};
use crate::record::{DesiredState, PendingHandoff};
use crate::rpc_client::{unexpected, EVER};
use control::supervisor::{HandedOff, PendingOperation, What};
use control::tapdisk::{self, Open, Reply, Request, State};
use control::{Code, Failure};
use std::fs;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A new process that could serve a disk.
struct PreparedProcess {
    process: Rc<Process>,
    version: String,
    open: Open,
    /// Opened before the guest waits for it.
    given: Given,
}

/// Adds the step that failed to a failure.
fn at(step: &str, failure: Failure) -> Failure {
    Failure::new(failure.code, format!("{step}: {}", failure.message))
}

/// Does what the new process gets so much time for. If the process died, the failure reports that rather than the lost
/// connection.
async fn within<T>(
    limit: Duration,
    new: &Process,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, work).await {
        Err(_) => {
            let seconds = limit.as_secs();
            let why = format!("it did not do that within {seconds} s");
            Err(Failure::new(Code::Timeout, why))
        }
        Ok(Err(failure)) if new.has_died(&failure).await => {
            let how = new.ended().await;
            Err(Failure::new(
                Code::Gone,
                format!("tapdisk {} {how}", new.pid()),
            ))
        }
        Ok(result) => result,
    }
}

impl Lifecycle {
    /// Has a disk served by a new process, of another program or of the one that is started by default. It
    /// gets `limit` for each of its steps.
    ///
    /// # Errors
    /// The new one cannot serve it: the old one serves on.
    pub async fn handoff(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        program: Option<PathBuf>,
        limit: Duration,
    ) -> Result<HandedOff, Failure> {
        check_program(program.as_deref()).await?;
        let _turn = disk.turn().await?;
        self.finish_before(disk).await?;
        check_served(disk)?;
        self.registry.change(disk, |record| {
            record.doing = Some(PendingOperation::Handoff);
            record.handoff = Some(PendingHandoff {
                program: program.clone(),
                process: None,
            });
        })?;
        let path = program.unwrap_or_else(|| self.program.path.clone());
        let handed = disk.unless_doomed(self.hand_over(disk, path, limit));
        match handed.await {
            Ok(handed) => Ok(handed),
            Err(failure) => {
                disk.unless_doomed(self.take_back(disk, &failure)).await?;
                let why = format!("disk {} is not handed over: {failure}", disk.minor);
                Err(of_a_process(Failure::new(failure.code, why)))
            }
        }
    }

    /// Finishes a hand-off that an earlier supervisor has begun, or undoes it.
    pub(super) async fn finish_handoff(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let successor = disk.successor.borrow().clone();
        if let Some(new) = successor {
            let status = new.status().await;
            if let Ok((State::Running, Some(serves))) =
                status.map(|status| (status.state, status.disk))
            {
                return self.commit(disk, &new, serves).await;
            }
        }
        let why = "the supervisor ended while it was handed over";
        let failure = Failure::new(Code::Gone, why);
        self.take_back(disk, &failure).await
    }

    async fn hand_over(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        program: PathBuf,
        limit: Duration,
    ) -> Result<HandedOff, Failure> {
        let prepared = self.prepare(disk, limit).await?;
        let new = &prepared.process;
        let before = disk.serves.borrow().clone();
        let from = disk.serving().ok().map(|old| old.pid());
        let begun = Instant::now();
        self.let_go(disk).await?;
        let serves = within(limit, new, self.give(disk, &prepared)).await;
        let serves = serves.map_err(|failure| at("the new process cannot serve it", failure))?;
        let pause = begun.elapsed();
        if before.is_some_and(|before| before.size != serves.size) {
            let why = format!("to the new process it has {} bytes", serves.size);
            return Err(Failure::new(Code::Image, why));
        }
        self.commit(disk, new, serves).await?;
        let handed = HandedOff {
            minor: disk.minor,
            from,
            to: new.pid(),
            program,
            version: prepared.version,
            pause_us: pause.as_micros().try_into().unwrap_or(u64::MAX),
        };
        let what = What::HandedOff(handed.clone());
        self.registry.events.add(Some(disk.minor), what);
        Ok(handed)
    }

    /// Starts a process that is to serve a disk, and finds out whether it could. The old one serves.
    async fn prepare(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        limit: Duration,
    ) -> Result<PreparedProcess, Failure> {
        let program = disk
            .record
            .borrow()
            .handoff
            .as_ref()
            .and_then(|handoff| handoff.program.clone());
        let process = self.spawn_program(program).await?;
        // From now on the disk is responsible for the process.
        self.registry.remove_idle(process.pid());
        disk.successor.replace(Some(process.clone()));
        let version = within(limit, &process, self.compare(disk, &process)).await;
        let version = version.map_err(|failure| at("the new process does not start", failure))?;
        let mut open = disk.open()?;
        open.may_ask = true;
        let image = self.image(disk).await?;
        let given = self.given(disk, &open, image).await?;
        let fits = within(limit, &process, fits(disk, &process, &given, &open)).await;
        fits.map_err(|failure| at("the new process cannot open the image", failure))?;
        process.rename_socket(&self.registry.folder.successor(disk.minor))?;
        Ok(PreparedProcess {
            process,
            version,
            open,
            given,
        })
    }

    /// The new process must speak as we do, and understand the kernel as the old one does.
    async fn compare(&self, disk: &Disk, new: &Process) -> Result<String, Failure> {
        let theirs = new.introduce(EVER).await?;
        if disk.record.borrow().policy.group.is_some() && !theirs.shares {
            return Err(Failure::unsupported(
                "it is older than groups, and would do as much as it likes: take the disk out of its group first",
            ));
        }
        let ours = match disk.serving() {
            Ok(old) => old.introduce(SOON).await.map(|old| old.abi),
            Err(failure) => Err(failure),
        };
        // If no process serves it at the moment, the kernel compares the version when the new process opens the node.
        match ours {
            Ok(ours) if ours != theirs.abi => Err(Failure::new(
                Code::Version,
                format!(
                    "it is made for version {} of the kernel's interface, and the module has version \
                     {ours}: use a tapdisk of the module's release",
                    theirs.abi
                ),
            )),
            _ => Ok(theirs.program),
        }
    }

    /// The old process finishes what it has, and gives node and image back. However long that takes: what
    /// the guest waits for then, it waits for in any case.
    async fn let_go(&self, disk: &Disk) -> Result<(), Failure> {
        let new = disk.successor.borrow().as_ref().map(|new| new.known());
        self.registry.change(disk, |record| {
            if let Some(handoff) = &mut record.handoff {
                handoff.process = new;
            }
        })?;
        let Ok(old) = disk.serving() else {
            return Ok(());
        };
        match old.ask(&Request::Close, &[], EVER).await {
            Ok(_) => {}
            // Then the new one takes its place in any case.
            Err(failure) if old.has_died(&failure).await => {}
            Err(failure) => return Err(at("the process that serves it cannot let go", failure)),
        }
        disk.attached.set(false);
        Ok(())
    }

    /// The new process gets the node and the image.
    async fn give(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        prepared: &PreparedProcess,
    ) -> Result<tapdisk::Disk, Failure> {
        let process = &prepared.process;
        self.give_node(disk, process).await?;
        self.lease(disk, &prepared.open, process).await?;
        let image = self.image(disk).await?;
        self.give_to_kernel(disk, &prepared.open, image.as_ref())
            .await?;
        let mut open = prepared.open.clone();
        self.rule(disk, process, &mut open).await?;
        let question = Request::Open(open);
        match prepared.given.ask(process, &question, EVER).await? {
            Reply::Disk(serves) => {
                self.note_size(disk, process, &serves).await;
                Ok(serves)
            }
            reply => Err(unexpected(&reply)),
        }
    }

    /// The new process serves: the disk is its own.
    async fn commit(
        &self,
        disk: &Rc<Disk>,
        new: &Rc<Process>,
        serves: tapdisk::Disk,
    ) -> Result<(), Failure> {
        // With that it is decided (`adopt`).
        new.rename_socket(&self.registry.folder.tapdisk(disk.minor))?;
        let old = disk.process.replace(Some(new.clone()));
        if let Some(old) = &old {
            self.tell_totals(disk, old.pid());
            old.dismiss();
            old.forget_socket();
        }
        disk.successor.replace(None);
        disk.attached.set(true);
        disk.serves.replace(Some(serves));
        self.started(disk).await;
        // Before it leaves the record, where the next supervisor would find it.
        if let Some(old) = old {
            if let Err(failure) = old.end(SOON).await {
                tell!(
                    error,
                    disk.about().failed(&failure),
                    "disk {}: {failure}",
                    disk.minor
                );
            }
        }
        disk.record.borrow_mut().take_over(new.known());
        self.registry.note(disk);
        Ok(())
    }

    /// The old process serves on, and the new one ends.
    async fn take_back(self: &Rc<Self>, disk: &Rc<Disk>, why: &Failure) -> Result<(), Failure> {
        self.end_successor(disk).await;
        let served = self.serve_again(disk).await;
        disk.record.borrow_mut().handoff = None;
        self.end_of_verb(disk, DesiredState::Served);
        let pid = disk.serving().ok().map(|old| old.pid());
        let why = why.message.clone();
        self.registry
            .events
            .add(Some(disk.minor), What::Kept { pid, why });
        self.or_revive(disk, served).await;
        Ok(())
    }

    /// A disk that could not be served again gets another process, as soon as one can.
    pub(super) async fn or_revive(self: &Rc<Self>, disk: &Rc<Disk>, served: Result<(), Failure>) {
        if let Err(failure) = served {
            tell!(
                error,
                disk.about().failed(&failure),
                "disk {}: {failure}",
                disk.minor
            );
            self.give_up_process(disk).await;
            self.revive_later(disk);
        }
    }

    /// The old process serves, whether it has let go or not. If it has died there is another one of its
    /// program.
    pub(super) async fn serve_again(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        let Ok(old) = disk.serving() else {
            return self.serve(disk).await.map(drop);
        };
        let let_go = old.status().await?.state != State::Running;
        let (open, image) = (disk.open()?, self.image(disk).await?);
        self.bring_up(disk, &open, image).await?;
        if let_go {
            let pid = old.pid();
            self.registry
                .events
                .add(Some(disk.minor), What::Started { pid });
        }
        Ok(())
    }

    /// Kills the process that was to take a disk over, and waits until it has ended.
    pub(super) async fn end_successor(&self, disk: &Disk) {
        let successor = disk.successor.borrow().clone();
        let Some(new) = successor else { return };
        if let Err(failure) = new.end(Duration::ZERO).await {
            tell!(
                error,
                disk.about().failed(&failure),
                "disk {}: {failure}",
                disk.minor
            );
            new.ended().await;
        }
        new.tidy();
        disk.successor.replace(None);
    }
}

/// The image, to the new process, is what the old one serves. A process that is older than this question
/// finds out when it opens the image.
async fn fits(disk: &Disk, new: &Process, given: &Given, open: &Open) -> Result<(), Failure> {
    let question = Request::Prepare(open.clone());
    let size = match given.ask(new, &question, EVER).await {
        Ok(Reply::Fit { size }) => size,
        Ok(reply) => return Err(unexpected(&reply)),
        Err(failure) if matches!(failure.code, Code::Invalid | Code::Unsupported) => {
            tell!(
                info,
                disk.about().failed(&failure),
                "disk {}: tapdisk {} does not look at an image in advance: {failure}",
                disk.minor,
                new.pid()
            );
            None
        }
        Err(failure) => return Err(failure),
    };
    let serves = disk.serves.borrow().as_ref().map(|serves| serves.size);
    match (size, serves) {
        (Some(new), Some(old)) if new != old => Err(Failure::new(
            Code::Image,
            format!("the image has {new} bytes, and the guest's disk {old}: resize the disk first"),
        )),
        _ => Ok(()),
    }
}

/// Checks that a disk is served, because no other can be handed over or switch to another image.
pub(super) fn check_served(disk: &Disk) -> Result<(), Failure> {
    let (want, is_inactive) = {
        let record = disk.record.borrow();
        (record.want, record.inactive.is_some())
    };
    let (want, remedy) = match want {
        DesiredState::Served if is_inactive => (
            "is inactive",
            "wait until its guest, which is suspended or has not arrived, resumes",
        ),
        DesiredState::Served => return Ok(()),
        DesiredState::Paused => ("is paused", "unpause it first"),
        DesiredState::Idle => ("has no image", "detach its process and attach another one"),
    };
    let minor = disk.minor;
    let why = format!("disk {minor} {want}, so no process serves it: {remedy}");
    Err(Failure::new(Code::State, why))
}

/// Refuses a file that is no program, and a path that is not absolute.
async fn check_program(program: Option<&Path>) -> Result<(), Failure> {
    let Some(path) = program else {
        return Ok(());
    };
    if !path.is_absolute() {
        return Err(Failure::invalid(format!(
            "{} is no absolute path of a program",
            path.display()
        )));
    }
    let place = path.to_path_buf();
    let found = blocking_io(path, LIMIT, move || {
        fs::metadata(&place)
            .map_err(|error| Failure::system(format!("cannot use {}", place.display()), &error))
    });
    let found = found.await?;
    match found.is_file() && found.permissions().mode() & 0o111 != 0 {
        true => Ok(()),
        false => Err(Failure::invalid(format!(
            "{} is no program: name a tapdisk that can be executed",
            path.display()
        ))),
    }
}
