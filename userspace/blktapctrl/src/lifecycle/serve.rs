// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process is given a node and an image, and serves.

use super::{suspend, Lifecycle};
use crate::blocking_io::{blocking_io, LIMIT};
use crate::disk::Disk;
use crate::folder;
use crate::image::{not_the_same, Image, Opened};
use crate::kernel;
use crate::log::tell;
use crate::process::{Process, SOON};
use crate::ram_files;
use crate::rpc_client::unexpected;
use control::socket::listen_at;
use control::supervisor::What;
use control::tapdisk::{self, Open, Reply, Request, State, Status};
use control::{Code, Failure, LeaseKind};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Attempts to open a node with the shortest pause between them: who lets go of it in order has done so
/// within a few milliseconds, for which a guest waits.
const SHORT: u32 = 10;

/// Files that a process gets to open an image.
pub(super) struct Given {
    image: Option<Opened>,
    memory: Option<OwnedFd>,
}

impl Given {
    /// Asks a question that takes the image.
    pub(super) async fn ask(
        &self,
        process: &Process,
        question: &Request,
        limit: Duration,
    ) -> Result<Reply, Failure> {
        let image = self.image.iter().filter_map(Opened::fd);
        let fds: Vec<_> = image.chain(self.memory.iter().map(AsFd::as_fd)).collect();
        process.ask(question, &fds, limit).await
    }
}

impl Lifecycle {
    /// Gives a disk a process, unless it has one, and the process the node, unless it has it. The
    /// caller has the turn.
    ///
    /// # Errors
    /// It cannot be started, or the node stays taken.
    pub async fn attach(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<Rc<Process>, Failure> {
        let there = disk.process.borrow().clone();
        let process = match there {
            Some(process) => process,
            None => {
                let process = self.spawn_for(disk).await?;
                self.assign(disk, &process)?;
                process
            }
        };
        if !disk.attached.get() {
            self.give_node(disk, &process).await?;
            disk.attached.set(true);
        }
        Ok(process)
    }

    /// Gives a process the node of a disk as soon as it is free.
    pub(super) async fn give_node(&self, disk: &Disk, process: &Process) -> Result<(), Failure> {
        let node = self.open_node(disk.minor).await?;
        if let (Some(groups), Some(domain)) = (self.groups(), disk.domain()) {
            // When xenstore tells that the disk is served, a process that takes it over may not be the disk's yet.
            groups.join(domain, process.pid());
        }
        if !disk.crashed.get() {
            // A process that was killed, or ended before this supervisor began, did not die of a request.
            self.registry.kernel.excuse(node.as_fd()).map_err(|error| {
                Failure::system(format!("cannot set up disk {}", disk.minor), &error)
            })?;
        }
        match process.ask(&Request::Attach, &[node.as_fd()], SOON).await? {
            Reply::Node(node) if node.minor == disk.minor => Ok(()),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Makes an idle process that of a disk.
    ///
    /// # Errors
    /// Its socket cannot be renamed.
    pub fn assign(&self, disk: &Disk, process: &Rc<Process>) -> Result<(), Failure> {
        process.rename_socket(&self.registry.folder.tapdisk(disk.minor))?;
        self.registry.remove_idle(process.pid());
        disk.process.replace(Some(process.clone()));
        disk.record.borrow_mut().process = Some(process.known());
        self.registry.note(disk);
        Ok(())
    }

    /// Opens a node as soon as the I/O of an earlier process is over. That has no time limit: until then no process can
    /// serve the disk, and its removal ends the wait.
    async fn open_node(&self, minor: u32) -> Result<OwnedFd, Failure> {
        let (mut pause, mut attempts) = (Duration::from_millis(1), 0_u32);
        let mut since = Instant::now();
        loop {
            match self.registry.kernel.open(minor) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                result => {
                    return result.map_err(|error| {
                        Failure::system(format!("cannot open the node of disk {minor}"), &error)
                    })
                }
            }
            if self.is_fencing(minor)? {
                since = Instant::now();
            } else if since.elapsed() >= self.patience.get() {
                let why = format!(
                    "the node of disk {minor} stays taken: see which process has it open with fuser -v /dev/xentap/{minor}, and end that"
                );
                return Err(Failure::new(Code::Busy, why));
            }
            // The kernel sends no event when it is over.
            tokio::time::sleep(pause).await;
            attempts = attempts.saturating_add(1);
            if attempts > SHORT {
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        }
    }

    /// I/O of the last process of a disk may still be running.
    pub(super) fn is_fencing(&self, minor: u32) -> Result<bool, Failure> {
        let node = kernel::node(&*self.registry.kernel, minor)
            .map_err(|error| Failure::system("cannot ask the kernel", &error))?;
        Ok(node.is_some_and(|node| node.status.state == "fencing"))
    }

    /// Serves a disk: the caller has the turn, and its record says what.
    ///
    /// # Errors
    /// It cannot be served. A process may be left, which the caller ends.
    pub async fn serve(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<tapdisk::Disk, Failure> {
        let open = disk.open()?;
        let image = self.image(disk).await?;
        let served = self.bring_up(disk, &open, image).await?;
        self.started(disk).await;
        Ok(served)
    }

    /// A process serves a disk from now on.
    pub async fn started(&self, disk: &Disk) {
        disk.answered_before.set(self.registry.answered(disk));
        disk.crashed.set(false);
        self.report_poison(disk);
        disk.hung.set(false);
        disk.progress.set((0, Instant::now()));
        let process = disk.process.borrow().clone();
        if let Some(process) = process {
            self.serve_nbd(disk, &process).await;
            let pid = process.pid();
            self.registry
                .events
                .add(Some(disk.minor), What::Started { pid });
            self.count(disk);
        }
    }

    /// Tells of a request that failed when the process was started, because earlier ones died of it.
    fn report_poison(&self, disk: &Disk) {
        let Some(status) = self.registry.status(disk) else {
            return;
        };
        let told = std::mem::replace(&mut disk.record.borrow_mut().poisoned, status.poisoned);
        if told != status.poisoned {
            self.registry.note(disk);
            let what = What::Poisoned {
                request: status.poison,
                count: status.poisoned,
            };
            self.registry.events.add(Some(disk.minor), what);
        }
    }

    /// Makes the memory that a disk is to be served from, or keeps what it has, if its driver needs it.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn prepare_memory(&self, disk: &Disk) -> Result<(), Failure> {
        ram_files::prepare(&self.registry.folder, disk.minor, &disk.open()?.target)
    }

    /// The image of a disk, if its driver has one. A supervisor that was started anew finds it by its
    /// name, and it must be the same one.
    ///
    /// # Errors
    /// It is not there any more.
    pub async fn image(&self, disk: &Disk) -> Result<Option<Arc<Image>>, Failure> {
        let known = disk.image.borrow().clone();
        let (open, identity, born) = {
            let record = disk.record.borrow();
            (record.open.clone(), record.identity, record.born)
        };
        let Some(open) = open.filter(|_| known.is_none()) else {
            return Ok(known);
        };
        let image = self.registry.image_of(&open).await?;
        if let Some(image) = image.as_ref().filter(|image| !image.is(identity, born)) {
            return Err(not_the_same(image));
        }
        disk.image.replace(image.clone());
        Ok(image)
    }

    /// Applies the present rules to a process that is about to open the image of its disk, whatever the rules were when
    /// a verb began.
    pub(super) async fn rule(
        &self,
        disk: &Disk,
        process: &Process,
        open: &mut Open,
    ) -> Result<(), Failure> {
        self.check_marks(disk, process).await?;
        self.check_trace(disk, process).await?;
        disk.record.borrow().rule(open);
        if disk.record.borrow().policy.group.is_some() {
            self.check_shares(disk, process).await?;
        }
        open.share = self.share(disk, process);
        open.kernel_holds = self.kernel_holds(disk)?;
        Ok(())
    }

    /// Asks a process to open the image of its disk.
    pub async fn open_with(
        &self,
        disk: &Disk,
        process: &Process,
        mut open: Open,
        image: Option<Arc<Image>>,
        question: impl FnOnce(Open) -> Request,
    ) -> Result<tapdisk::Disk, Failure> {
        self.rule(disk, process, &mut open).await?;
        open.may_ask = true;
        let given = self.given(disk, &open, image).await?;
        let limit = self.patience_to_open.get();
        match given.ask(process, &question(open), limit).await? {
            Reply::Disk(what) => {
                self.note_size(disk, process, &what).await;
                disk.serves.replace(Some(what.clone()));
                Ok(what)
            }
            reply => Err(unexpected(&reply)),
        }
    }

    /// Opens what a process needs to open an image.
    pub(super) async fn given(
        &self,
        disk: &Disk,
        open: &Open,
        image: Option<Arc<Image>>,
    ) -> Result<Given, Failure> {
        let opened = match &image {
            Some(image) => {
                let direct = open.target.driver().is_direct();
                let (again, write) = (image.clone(), !open.read_only);
                let opened =
                    blocking_io(image.path(), LIMIT, move || again.open(write, direct)).await?;
                if !opened.direct && matches!(open.target.lease(), LeaseKind::Sanlock(_)) {
                    return Err(Failure::unsupported(format!(
                        "the file system of {} has no direct I/O, and the kernel writes its page cache when sanlock \
                         has given the lease to another host: use lease=record",
                        image.path().display()
                    )));
                }
                if direct && !opened.direct {
                    tell!(warn, disk.about(), "disk {}: the file system of {} has no direct I/O, so dom0's page cache holds its data",
                        disk.minor,
                        image.path().display());
                }
                Some(opened)
            }
            None => None,
        };
        let folder = &self.registry.folder;
        let memory = match open.target.has_own_memory() {
            true => Some(ram_files::open(
                folder,
                disk.minor,
                &open.target,
                !open.read_only,
            )?),
            false => None,
        };
        Ok(Given {
            image: opened,
            memory,
        })
    }

    /// Lets a process serve NBD clients, if the record asks for it. That it cannot is no reason not to serve a guest.
    async fn serve_nbd(&self, disk: &Disk, process: &Process) {
        if !disk.record.borrow().nbd {
            return;
        }
        let path = self.registry.folder.nbd(disk.minor);
        let bound = folder::remove(&path).and_then(|()| listen_at(&path, 0o600));
        let result = match bound {
            Ok(listener) => {
                let export = String::new();
                let question = Request::Nbd { export };
                process.ask(&question, &[listener.as_fd()], SOON).await
            }
            Err(error) => Err(Failure::system(
                format!("cannot listen at {}", path.display()),
                &error,
            )),
        };
        if let Err(failure) = result {
            tell!(
                warn,
                disk.about().failed(&failure),
                "disk {} is not served by NBD: {failure}",
                disk.minor
            );
            if let Err(error) = folder::remove(&path) {
                tell!(
                    warn,
                    disk.about().because(&error),
                    "cannot remove {}: {error}",
                    path.display()
                );
            }
        }
    }

    /// Makes the process of a disk serve an image, whatever it does now; without one, a new one.
    ///
    /// # Errors
    /// It does not. It may be left without an image.
    pub async fn bring_up(
        self: &Rc<Self>,
        disk: &Rc<Disk>,
        open: &Open,
        image: Option<Arc<Image>>,
    ) -> Result<tapdisk::Disk, Failure> {
        disk.answered_before.set(self.registry.answered(disk));
        suspend::check_not_passed_on(disk)?;
        let there = disk.process.borrow().clone();
        let mut state = match there {
            Some(process) => match process.status().await? {
                status if status.state == State::Running => return running(disk, status, open),
                status if status.state == State::Inactive => {
                    self.found_inactive(disk);
                    self.give_lease_up_later(disk, Duration::ZERO);
                    return running(disk, status, open);
                }
                status => status.state,
            },
            None => State::Idle,
        };
        disk.attached.set(state != State::Idle);
        let process = self.attach(disk).await?;
        if state == State::Idle {
            state = State::Attached;
        }
        let question = match state {
            State::Paused => Request::Unpause,
            _ if disk.record.borrow().inactive.is_some() => {
                self.await_wish(disk, &process);
                Request::OpenInactive
            }
            _ => Request::Open,
        };
        // Where it only looks at the image, another host may have it.
        if disk.record.borrow().inactive.is_none() {
            self.lease(disk, open, &process).await?;
            self.give_to_kernel(disk, open, image.as_ref()).await?;
        } else {
            self.take_from_kernel(disk, self.patience.get()).await?;
            // The process before it may have died with the lease.
            self.give_lease_up(disk).await;
        }
        let opened = self.open_with(disk, &process, open.clone(), image, question);
        match opened.await {
            // A question of an earlier supervisor was still on its way.
            Err(failure) if failure.code == Code::State => match process.status().await? {
                status if status.state == State::Running => running(disk, status, open),
                _ => Err(failure),
            },
            result => result,
        }
    }
}

/// Checks that a process which serves already serves the requested image.
fn running(disk: &Disk, status: Status, open: &Open) -> Result<tapdisk::Disk, Failure> {
    disk.attached.set(true);
    let serves = status.open.map(|open| open.target);
    match status.disk {
        Some(what) if serves.as_ref() == Some(&open.target) => {
            disk.serves.replace(Some(what.clone()));
            Ok(what)
        }
        _ => Err(Failure::new(
            Code::State,
            format!(
                "the process of disk {} serves {}, not {}: pause it first",
                disk.minor,
                serves.map_or("something else".into(), |target| target.to_string()),
                open.target
            ),
        )),
    }
}
