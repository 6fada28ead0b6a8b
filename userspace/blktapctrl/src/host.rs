// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disks of this host, and what happens to each of them.

use crate::apart::{apart, LIMIT};
use crate::disk::{Disk, Fate};
use crate::events::Events;
use crate::folder::{self, Folder};
use crate::image::{self, Image};
use crate::kernel::{self, Kernel};
use crate::memory;
use crate::process::{self, Process, Program};
use crate::record::{Record, Records, Want};
use crate::store::{relative, Store};
use crate::trouble;
use crate::unknown::Unknown;
use crate::users::Views;
use control::socket::listen_at;
use control::supervisor::{Doing, What, Which};
use control::tapdisk::{self, Open, Reply, Request};
use control::{Code, Failure};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a tapdisk may take to answer what needs no I/O.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// How long it may take to open an image: it may have to wait for the I/O of a dead one.
pub(crate) const OPEN: Duration = Duration::from_secs(60);
/// How long a process may go on finishing what it has when its disk is taken away.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long who asks for the end of a disk waits for it.
const END: Duration = Duration::from_secs(20);

/// Everything that is supervised.
pub struct Host {
    /// Where sockets and records are.
    pub folder: Folder,
    /// What is written down.
    pub records: Box<dyn Records>,
    /// Where the kernel shows who uses what.
    pub views: RefCell<Views>,
    /// The nodes.
    pub kernel: Box<dyn Kernel>,
    /// How tapdisks are started.
    pub program: Program,
    /// What happened.
    pub events: Events,
    /// Xenstore, while there is a connection.
    pub store: RefCell<Option<Rc<dyn Store>>>,
    /// The disks.
    pub disks: RefCell<BTreeMap<u32, Rc<Disk>>>,
    /// What is not understood, and left alone.
    pub unknown: RefCell<BTreeMap<u32, Unknown>>,
    /// Processes without a disk.
    pub idle: RefCell<BTreeMap<u32, Rc<Process>>>,
}

impl Host {
    /// A host without disks.
    #[must_use]
    pub fn new(
        folder: Folder,
        records: Box<dyn Records>,
        kernel: Box<dyn Kernel>,
        program: Program,
    ) -> Rc<Host> {
        Rc::new(Host {
            folder,
            records,
            views: RefCell::default(),
            kernel,
            program,
            events: Events::default(),
            store: RefCell::default(),
            disks: RefCell::default(),
            unknown: RefCell::default(),
            idle: RefCell::default(),
        })
    }

    /// Xenstore, if there is a connection.
    pub fn store(&self) -> Option<Rc<dyn Store>> {
        self.store.borrow().clone()
    }

    /// All disks.
    pub fn all(&self) -> Vec<Rc<Disk>> {
        self.disks.borrow().values().cloned().collect()
    }

    /// The disk that is named.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, which: &Which) -> Result<Rc<Disk>, Failure> {
        let vbd = which.vbd.as_deref().map(relative);
        let fits = |disk: &Rc<Disk>| {
            let pid = disk.process.borrow().as_ref().map(|process| process.pid());
            // Who names both may name a process that was replaced since.
            which.minor.map_or_else(
                || which.pid.is_none_or(|wanted| pid == Some(wanted)),
                |minor| minor == disk.minor,
            ) && vbd.is_none_or(|vbd| disk.record.borrow().vbd.as_deref() == Some(vbd))
        };
        if which.minor.is_none() && which.pid.is_none() && vbd.is_none() {
            return Err(Failure::invalid(
                "no disk is named: say its minor number, its process or its backend directory",
            ));
        }
        self.all().into_iter().find(fits).ok_or_else(|| {
            let number =
                |name: &str, value: Option<u32>| value.map(|value| format!("{name} {value}"));
            let named = [
                number("the minor number", which.minor),
                number("the process", which.pid),
                vbd.map(|vbd| format!("the directory {vbd}")),
            ];
            let named: Vec<String> = named.into_iter().flatten().collect();
            Failure::new(
                Code::NotFound,
                format!(
                    "there is no disk with {}: see tap-ctl list",
                    named.join(" and ")
                ),
            )
        })
    }

    /// Writes down what is known of a disk. That it cannot be is told: the disk goes on, and the next
    /// supervisor finds out by its process.
    pub fn note(&self, disk: &Disk) {
        if disk.fate() == Fate::Gone {
            return;
        }
        let written = self.records.write(&disk.record.borrow());
        if let Err(error) = written {
            let why = format!("{}", unwritten(disk.minor, &error));
            self.events.add(Some(disk.minor), What::Unknown { why });
        }
    }

    /// Changes what is written down of a disk; if that cannot be written, nothing is changed.
    ///
    /// # Errors
    /// The system refuses to write it.
    pub fn change(&self, disk: &Disk, change: impl FnOnce(&mut Record)) -> Result<(), Failure> {
        let mut record = disk.record.borrow().clone();
        change(&mut record);
        self.records
            .write(&record)
            .map_err(|error| unwritten(disk.minor, &error))?;
        disk.record.replace(record);
        Ok(())
    }

    /// Starts a process that has no disk yet, and watches it from now on.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(self: &Rc<Self>) -> Result<Rc<Process>, Failure> {
        let socket = process::unnamed(&self.folder);
        let process = Rc::new(Process::spawn(&self.program, &socket)?);
        self.idle
            .borrow_mut()
            .insert(process.pid(), process.clone());
        self.watch(process.clone());
        Ok(process)
    }

    /// Watches a process until it has ended.
    pub fn watch(self: &Rc<Self>, process: Rc<Process>) {
        tokio::task::spawn_local(trouble::watch(self.clone(), process.clone()));
        let host = self.clone();
        tokio::task::spawn_local(async move {
            let how = process.ended().await;
            process.tidy();
            let pid = process.pid();
            if host.idle.borrow_mut().remove(&pid).is_some() {
                if !process.is_dismissed() {
                    host.events.add(None, What::Died { pid, how });
                }
                return;
            }
            let disk = host.all().into_iter().find(
                |disk| matches!(&*disk.process.borrow(), Some(its) if Rc::ptr_eq(its, &process)),
            );
            if let Some(disk) = disk {
                host.died(disk, &process, how).await;
            }
        });
    }

    /// The process of a disk has ended.
    async fn died(self: &Rc<Self>, disk: Rc<Disk>, process: &Process, how: String) {
        disk.forget_process();
        self.note(&disk);
        disk.crashed.set(process.has_crashed());
        if process.is_dismissed() {
            return;
        }
        let pid = process.pid();
        self.events.add(Some(disk.minor), What::Died { pid, how });
        let answered = self.answered(&disk) > disk.answered_before.get();
        let pause = disk.backoff.borrow_mut().died(process.age(), answered);
        self.revive(&disk, pause).await;
    }

    /// Requests of a disk that were ever answered; none if the kernel does not say.
    pub fn answered(&self, disk: &Disk) -> u64 {
        let node = kernel::node(&*self.kernel, disk.minor);
        node.ok().flatten().map_or(0, |node| node.status.committed)
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
            let waited = disk
                .unless_doomed(async {
                    tokio::time::sleep(pause).await;
                    Ok(())
                })
                .await;
            let Ok(_turn) = (match waited {
                Ok(()) => disk.turn().await,
                Err(doomed) => Err(doomed),
            }) else {
                return;
            };
            if disk.process.borrow().is_some() {
                return;
            }
            if disk.doing().is_some() {
                // What waited for the process that is dead goes on without it.
                if let Err(failure) = disk.unless_doomed(self.finish(disk, OPEN)).await {
                    tracing::warn!("disk {}: {failure}", disk.minor);
                }
                return;
            }
            if disk.record.borrow().want != Want::Served {
                return;
            }
            let Err(failure) = disk.unless_doomed(self.serve(disk)).await else {
                disk.record.borrow_mut().restarts += 1;
                self.note(disk);
                return;
            };
            self.give_up_process(disk).await;
            if disk.fate() != Fate::Stays {
                return;
            }
            pause = disk.backoff.borrow_mut().died(Duration::ZERO, false);
            let retry_ms = pause.as_millis().try_into().unwrap_or(u64::MAX);
            let what = What::Failed {
                message: failure.message,
                retry_ms,
            };
            self.events.add(Some(disk.minor), what);
        }
    }

    /// Kills the process of a disk; who watches it does nothing about that.
    pub async fn give_up_process(&self, disk: &Disk) {
        let process = disk.process.borrow().clone();
        if let Some(process) = process {
            if let Err(failure) = process.end(Duration::ZERO).await {
                tracing::error!("{failure}");
            }
            disk.forget_process();
            self.note(disk);
        }
    }

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
                let process = self.spawn()?;
                self.assign(disk, &process)?;
                process
            }
        };
        if !disk.attached.get() {
            let node = self.open_node(disk.minor).await?;
            if !disk.crashed.get() {
                // Who was killed, or ended before us, did not die of a request.
                self.kernel.excuse(node.as_fd()).map_err(|error| {
                    Failure::system(format!("cannot set up disk {}", disk.minor), &error)
                })?;
            }
            let reply = process.ask(&Request::Attach, &[node.as_fd()], SOON).await?;
            match reply {
                Reply::Node(node) if node.minor == disk.minor => disk.attached.set(true),
                reply => return Err(unexpected(&reply)),
            }
        }
        Ok(process)
    }

    /// Makes an idle process that of a disk.
    ///
    /// # Errors
    /// Its socket cannot be renamed.
    pub fn assign(&self, disk: &Disk, process: &Rc<Process>) -> Result<(), Failure> {
        process.rename_socket(&self.folder.tapdisk(disk.minor))?;
        self.idle.borrow_mut().remove(&process.pid());
        disk.process.replace(Some(process.clone()));
        disk.record.borrow_mut().process = Some(process.known());
        self.note(disk);
        Ok(())
    }

    /// Opens a node as soon as the I/O of an earlier process is over.
    async fn open_node(&self, minor: u32) -> Result<OwnedFd, Failure> {
        let mut pause = Duration::from_millis(1);
        let attempts = async {
            loop {
                match self.kernel.open(minor) {
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                        // The kernel tells nobody when it is over.
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(Duration::from_millis(50));
                    }
                    result => return result,
                }
            }
        };
        match tokio::time::timeout(OPEN, attempts).await {
            Ok(result) => result.map_err(|error| {
                Failure::system(format!("cannot open the node of disk {minor}"), &error)
            }),
            Err(_) => Err(Failure::new(
                Code::Busy,
                format!(
                    "the node of disk {minor} stays taken: I/O of an earlier process is not over; see whether its storage answers"
                ),
            )),
        }
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
        disk.answered_before.set(self.answered(disk));
        disk.crashed.set(false);
        self.report_poison(disk);
        disk.hung.set(false);
        disk.progress.set((0, Instant::now()));
        let process = disk.process.borrow().clone();
        if let Some(process) = process {
            self.serve_nbd(disk, &process).await;
            let pid = process.pid();
            self.events.add(Some(disk.minor), What::Started { pid });
        }
    }

    /// Tells of a request that failed when the process was started, because earlier ones died of it.
    fn report_poison(&self, disk: &Disk) {
        let status = match kernel::node(&*self.kernel, disk.minor) {
            Ok(Some(node)) => node.status,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!("cannot ask the kernel about disk {}: {error}", disk.minor);
                return;
            }
        };
        let told = std::mem::replace(&mut disk.record.borrow_mut().poisoned, status.poisoned);
        if told != status.poisoned {
            self.note(disk);
            let what = What::Poisoned {
                request: status.poison,
                count: status.poisoned,
            };
            self.events.add(Some(disk.minor), what);
        }
    }

    /// Makes the memory that a disk is to be served from, or keeps what it has, if its driver needs it.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn prepare_memory(&self, disk: &Disk) -> Result<(), Failure> {
        let target = disk.open()?.target;
        match (target.driver(), target.size()) {
            (control::Driver::Ram, Some(size)) => memory::prepare(&self.folder, disk.minor, size),
            _ => Ok(()),
        }
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
        let image = image_of(&open).await?;
        if let Some(image) = image.as_ref().filter(|image| !image.is(identity, born)) {
            return Err(not_the_same(image));
        }
        disk.image.replace(image.clone());
        Ok(image)
    }

    /// Asks a process to open the image of its disk.
    pub async fn open_with(
        &self,
        disk: &Disk,
        process: &Process,
        open: Open,
        image: Option<Arc<Image>>,
        question: impl FnOnce(Open) -> Request,
    ) -> Result<tapdisk::Disk, Failure> {
        let opened = match &image {
            Some(image) => {
                let direct = open.target.driver() != control::Driver::Sync;
                let (again, write) = (image.clone(), !open.read_only);
                let opened = apart(image.path(), LIMIT, move || again.open(write, direct)).await?;
                if direct && !opened.direct {
                    tracing::warn!(
                        "disk {}: the file system of {} has no direct I/O, so dom0's page cache holds its data",
                        disk.minor,
                        image.path().display()
                    );
                }
                Some(opened)
            }
            None => None,
        };
        let memory = match open.target.driver() {
            control::Driver::Ram => Some(memory::open(&self.folder, disk.minor, !open.read_only)?),
            _ => None,
        };
        let fds: Vec<_> = opened
            .iter()
            .map(|opened| opened.fd.as_fd())
            .chain(memory.iter().map(AsFd::as_fd))
            .collect();
        match process.ask(&question(open), &fds, OPEN).await? {
            Reply::Disk(what) => {
                disk.serves.replace(Some(what.clone()));
                Ok(what)
            }
            reply => Err(unexpected(&reply)),
        }
    }

    /// Lets a process serve NBD clients, if that is wanted. That it cannot is no reason not to serve
    /// a guest.
    async fn serve_nbd(&self, disk: &Disk, process: &Process) {
        if !disk.record.borrow().nbd {
            return;
        }
        let path = self.folder.nbd(disk.minor);
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
            tracing::warn!("disk {} is not served by NBD: {failure}", disk.minor);
            if let Err(error) = folder::remove(&path) {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }

    /// Takes a disk away, without waiting for it.
    pub fn destroy_later(self: &Rc<Self>, disk: &Rc<Disk>) {
        if disk.advance(Fate::Doomed) {
            // The next supervisor goes on with it. If it cannot be told, who asked asks again.
            disk.record.borrow_mut().doing = Some(Doing::Destroy);
            self.note(disk);
            let (host, disk) = (self.clone(), disk.clone());
            tokio::task::spawn_local(async move { host.demolish(&disk).await });
        }
    }

    /// Takes a disk away, and waits for that for a while; it goes on if it takes longer.
    ///
    /// # Errors
    /// It takes longer.
    pub async fn destroy(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(), Failure> {
        self.destroy_within(disk, END).await
    }

    /// Takes a disk away, and waits for that until the limit; it goes on if it takes longer.
    ///
    /// # Errors
    /// It takes longer: says what it waits for.
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

    /// What keeps a disk that is to go, in words.
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
        match kernel::node(&*self.kernel, disk.minor) {
            Ok(Some(node)) => busy(&node, &image),
            Ok(None) => "it is being cleared away".into(),
            Err(error) => format!("the kernel does not say why ({error})"),
        }
    }

    /// Takes a node away that is not one of ours.
    ///
    /// # Errors
    /// There is none, or it is used: says by whom.
    pub fn free_unknown(&self, minor: u32) -> Result<(), Failure> {
        let failed = |error| Failure::system(format!("cannot free the node {minor}"), &error);
        let node = kernel::node(&*self.kernel, minor).map_err(failed)?;
        let node =
            node.ok_or_else(|| Failure::new(Code::NotFound, format!("there is no node {minor}")))?;
        match self.kernel.destroy(minor) {
            Ok(()) => {
                self.events.add(Some(minor), What::Destroyed);
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
        let process = disk.process.borrow().clone();
        if let Some(process) = process {
            if let Err(failure) = process.end(PATIENCE).await {
                tracing::error!("disk {}: {failure}", disk.minor);
                process.ended().await;
            }
        }
        disk.forget_process();
        self.free_node(disk.minor).await;
        for path in [
            self.folder.nbd(disk.minor),
            self.folder.memory_of(disk.minor),
        ] {
            if let Err(error) = folder::remove(&path) {
                tracing::error!("cannot remove {}: {error}", path.display());
            }
        }
        if let Err(error) = self.records.remove(disk.minor) {
            tracing::error!("cannot remove the record of disk {}: {error}", disk.minor);
        }
        disk.advance(Fate::Gone);
        self.disks.borrow_mut().remove(&disk.minor);
        self.events.add(Some(disk.minor), What::Destroyed);
    }

    /// Takes a node away as soon as the kernel lets it go.
    async fn free_node(&self, minor: u32) {
        let mut pause = Duration::from_millis(2);
        loop {
            match self.kernel.destroy(minor) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                Err(error) => tracing::error!("cannot take the node {minor} away: {error}"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Takes several disks away at once.
    pub async fn destroy_all(self: &Rc<Self>, disks: Vec<Rc<Disk>>) {
        let ends = disks.iter().map(|disk| async move {
            if let Err(failure) = self.destroy(disk).await {
                tracing::error!("{failure}");
            }
        });
        futures::future::join_all(ends).await;
    }
}

/// Why the kernel does not let go of a node, in words.
fn busy(node: &kernel::Node, image: &str) -> String {
    if let Some((domain, device)) = node.bound {
        return format!(
            "the device {device} of domain {domain} uses it; detach it with xl block-detach {domain} {device}"
        );
    }
    match node.status.state.as_str() {
        "fencing" => format!(
            "I/O of its last process may still reach {image}, so nobody else may have that yet; see whether its storage answers"
        ),
        "open" | "live" => "a process has it open".into(),
        _ => "it is about to be free".into(),
    }
}

/// An answer that does not belong to the question.
pub fn unexpected(reply: &Reply) -> Failure {
    Failure::new(
        Code::Invalid,
        format!("tapdisk answered something else than was asked: {reply:?}"),
    )
}

/// Finds the image of a target, if its driver has one.
///
/// # Errors
/// There is none at the path.
pub async fn image_of(open: &Open) -> Result<Option<Arc<Image>>, Failure> {
    match open.target.path() {
        Some(path) => image::find(path).await.map(Some),
        None => Ok(None),
    }
}

/// Another image is where that of a disk was.
pub fn not_the_same(image: &Image) -> Failure {
    Failure::new(
        Code::Image,
        format!(
            "{} is not the image any more that is served: put that back, or destroy the disk",
            image.path().display()
        ),
    )
}

fn unwritten(minor: u32, error: &io::Error) -> Failure {
    Failure::system(
        format!("cannot write down what disk {minor} is (is /run full?)"),
        error,
    )
}
