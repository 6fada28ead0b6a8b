// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk in all its states, as the supervisor sees it.

mod counts;
mod cow;
mod dirty_tracking;
mod export;
mod exported_bitmaps;
mod image;
mod inactive;
mod key;
mod mirror;
mod quiesce;
mod shutdown;
mod size;
mod trace;

use crate::describe::{describe, described, fence, node, params, succeeds};
use crate::io_errors::wait;
use crate::jobs::{scrub, stream, Jobs};
use crate::kernel_link::KernelLink;
use crate::passthrough::{self, Direct, PassthroughBan};
use crate::stats_file::PersistentStats;
use crate::tracer::EndedTraces;
use crate::writeback_errors::WritebackErrors;
use crate::{nbd, FdBroker, IoErrorLog, ServeConfig, Server, Throttle};
use control::stats::Stats;
use control::tapdisk::{
    self, Engine, ImageStamp, Open, Process, Reply, Request, Rules, State, Status,
};
use control::{Code, Driver, Failure, LeaseKind, Limits, Target};
use diskio::{Deadline, File, Gate, Runtime};
use drivers::nbd::RetryTimes;
use drivers::{DiskInfo, Fence};
use exported_bitmaps::Marks;
pub(crate) use exported_bitmaps::{ChangedSince, StoredBitmap};
use inactive::Inactive;
use rustix::fs::fstat;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;
use tapdev::{KernelNode, Params, Tap};

/// Turns of the loop after which descriptors are looked at, although there is still work.
const ROUNDS: u32 = 16;

/// Turns of the loop after which the time is looked at, although there is still work.
const KEEP: u64 = 1024;

/// The disk of this process. Questions that change something are answered one after the other.
#[derive(Debug)]
pub struct Session {
    runtime: Runtime,
    /// Serialises changes of the state.
    gate: Gate,
    state: RefCell<Inner>,
    stats: Rc<RefCell<Stats>>,
    troubles: Rc<IoErrorLog>,
    /// WritebackErrors writes. They survive a pause: their clients learn of them afterwards.
    lost: Rc<WritebackErrors>,
    /// Passthrough.
    direct: Rc<Direct>,
    /// Error policy and limits.
    rules: Rc<Cell<Rules>>,
    /// Holds the guest's requests back.
    throttle: Rc<Throttle>,
    /// Suspends passthrough while limits are set, because the kernel does not apply them.
    limited: RefCell<Option<PassthroughBan>>,
    /// Suspends passthrough while the dirty bitmap is kept, because the kernel sets no bits.
    noted: RefCell<Option<PassthroughBan>>,
    /// Suspends passthrough while requests are traced.
    traced: RefCell<Option<PassthroughBan>>,
    /// Marks (dirty bitmaps) that NBD clients know of.
    marks: Marks,
    /// Traces that have ended with an error.
    untraced: Rc<EndedTraces>,
    /// Questions to the supervisor.
    needs: Rc<FdBroker>,
    /// Statistics for the next process.
    kept: RefCell<Option<Rc<PersistentStats>>>,
    jobs: Jobs,
    turns: Cell<u64>,
    /// Number of the image that is served: another one has another, also after a close.
    images: Cell<u64>,
    /// Number of opens for serving: between two of them another process may have changed the image.
    serves: Cell<u64>,
    /// Tasks that wait for the disk to run.
    waiting: RefCell<Vec<Waker>>,
    /// There is an NBD server.
    has_nbd: Cell<bool>,
    /// Limits of [exports](Self::set_exports), if they are not the usual ones.
    exports: Cell<Option<(RetryTimes, usize)>>,
    ended: Cell<bool>,
    /// The image is another host's after that.
    deadline: RefCell<Option<Deadline>>,
}

#[derive(Debug, Default)]
struct Inner {
    tap: Option<Rc<Tap>>,
    /// Parameters of the disk that the kernel got.
    params: Option<Params>,
    started: bool,
    /// End of this process's I/O, as the kernel got it.
    fence: Option<tapdev::Fence>,
    /// End of I/O on the served image alone: a mirror target may be on other storage.
    storage: Option<tapdev::Fence>,
    /// True if writes to an image that could not be opened may still happen: their end is unknown.
    unsure: bool,
    open: Option<Open>,
    disk: Option<tapdisk::Disk>,
    server: Option<Rc<Server>>,
    /// Image that was served last.
    image: Option<Identity>,
    /// The image that is served, to see how it is left.
    file: Option<File>,
    /// Its backing images, by path: open for reading, and locked for that.
    parents: Vec<(PathBuf, File)>,
    /// State of the last image when it was closed.
    left: Option<ImageStamp>,
    /// Set if the disk is inactive: no image is served, and the supervisor learns when a request arrives.
    inactive: Option<Inactive>,
    /// The exchange with the kernel, once there was one.
    link: Option<Rc<KernelLink>>,
}

/// Identity of an image: the target, and the file that came with it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    target: Target,
    file: Option<(u64, u64)>,
}

impl Identity {
    fn of(open: &Open, image: Option<&OwnedFd>) -> Self {
        let file = image.and_then(|image| fstat(image).ok());
        Self {
            target: open.target.clone(),
            file: file.map(|file| (file.st_dev, file.st_ino)),
        }
    }
}

impl Session {
    /// Without a node.
    pub fn new(runtime: &Runtime) -> Rc<Self> {
        let stats = Rc::default();
        Rc::new(Self {
            runtime: runtime.clone(),
            gate: Gate::default(),
            state: RefCell::default(),
            untraced: EndedTraces::new(&stats),
            stats,
            troubles: Rc::default(),
            lost: Rc::default(),
            direct: Rc::default(),
            rules: Rc::default(),
            throttle: Rc::default(),
            limited: RefCell::default(),
            noted: RefCell::default(),
            marks: Marks::default(),
            traced: RefCell::default(),
            needs: Rc::default(),
            kept: RefCell::default(),
            jobs: Jobs::default(),
            turns: Cell::new(0),
            images: Cell::new(0),
            serves: Cell::new(0),
            waiting: RefCell::default(),
            has_nbd: Cell::new(false),
            exports: Cell::default(),
            ended: Cell::new(false),
            deadline: RefCell::default(),
        })
    }

    /// Opens exports with these limits from now on, see [`drivers::nbd::Options`]: for tests.
    pub fn set_exports(&self, settle: RetryTimes, unflushed: usize) {
        self.exports.set(Some((settle, unflushed)));
    }

    /// The runtime that everything is done by.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Serves until [`shutdown`](Self::end).
    pub fn run(&self) -> io::Result<()> {
        while !self.ended.get() {
            self.turn()?;
        }
        Ok(())
    }

    /// Runs one turn: all ready tasks, then one wait.
    fn turn(&self) -> io::Result<()> {
        for _ in 0..ROUNDS {
            self.turns.set(self.turns.get() + 1);
            let ran = self.runtime.tasks.run();
            let came = self.exchange()?;
            if self.ended.get() || !(ran || came) {
                break;
            }
        }
        if !self.runtime.tasks.is_ready() || self.turns.get() % KEEP == 0 {
            self.keep(false);
        }
        let wait = !self.ended.get() && !self.runtime.tasks.is_ready();
        if let Some(server) = self.server().filter(|_| wait) {
            server.tracing.settle();
        }
        self.runtime.io.enter(wait)
    }

    /// Exchanges requests and results with the kernel; true if requests came.
    fn exchange(&self) -> io::Result<bool> {
        let (server, link) = {
            let state = self.state.borrow();
            (state.server.clone(), state.link.clone())
        };
        match (server, link) {
            (Some(server), _) => server.turn(),
            // Requests that arrived too late for the server go back to the kernel.
            (None, Some(link)) => link.pump(&mut Vec::new()).map(|()| false),
            (None, None) => Ok(false),
        }
    }

    /// [`run`](Self::run) returns.
    pub fn end(&self) {
        self.ended.set(true);
    }

    /// Answers the supervisor.
    pub async fn handle(
        self: &Rc<Self>,
        question: Request,
        mut fds: Vec<OwnedFd>,
    ) -> Result<Reply, Failure> {
        let fd = if fds.len() > 1 {
            return Err(Failure::invalid(
                "one descriptor at most belongs to a question",
            ));
        } else {
            fds.pop()
        };
        match question {
            Request::Ping => Ok(Reply::Process(process())),
            Request::Status => Ok(Reply::Status(Box::new(self.status()))),
            Request::Stats => Ok(Reply::Stats(Box::new(self.stats()))),
            Request::Attach => {
                let fd = fd.ok_or_else(|| Failure::invalid("the node's descriptor is missing"))?;
                let _alone = self.gate.alone().await;
                self.attach(
                    Tap::open(KernelNode::new(fd))
                        .map_err(|error| Failure::system("cannot use the node", &error))?,
                )
            }
            Request::Open(open) => {
                let _alone = self.gate.alone().await;
                self.must_be_attached()?;
                self.open(open, fd, None).await
            }
            Request::OpenInactive(open) => {
                let _alone = self.gate.alone().await;
                self.must_be_attached()?;
                self.open_inactive(open, fd).await
            }
            Request::Inactivate => {
                let _alone = self.gate.alone().await;
                self.inactivate().await
            }
            Request::Activate { open, stamp } => {
                let _alone = self.gate.alone().await;
                match self.status().state {
                    State::Inactive => self.open(open, fd, stamp).await,
                    _ => Err(Failure::new(Code::State, "the disk is not inactive")),
                }
            }
            Request::Wanted => {
                self.wanted().await;
                Ok(Reply::Done)
            }
            Request::Unpause(open) => {
                let _alone = self.gate.alone().await;
                match self.status().state {
                    State::Paused => self.open(open, fd, None).await,
                    _ => Err(Failure::new(Code::State, "the disk is not paused")),
                }
            }
            Request::Pause => {
                let _alone = self.gate.alone().await;
                self.pause().await
            }
            Request::Set(rules) => {
                let _alone = self.gate.alone().await;
                self.set(rules).await.map(|()| Reply::Done)
            }
            Request::Share(share) => self.throttle.change_share(share).map(Reply::Used),
            Request::Busy { came } => {
                self.throttle.came_after(came).await;
                Ok(Reply::Done)
            }
            Request::Note { unit } => {
                let _alone = self.gate.alone().await;
                self.set_notes(unit, fd).await
            }
            Request::Unmarked => {
                self.marks.look_again();
                Ok(Reply::Done)
            }
            Request::Trace { on } => {
                let _alone = self.gate.alone().await;
                self.set_trace(on, fd).await
            }
            Request::Untraced => {
                let why = self.untraced.why().await;
                Ok(Reply::Untraced { why })
            }
            Request::Resize => {
                let _alone = self.gate.alone().await;
                self.resize().await
            }
            Request::Grow { size } => {
                let _alone = self.gate.alone().await;
                self.grow(size).await
            }
            Request::Scrub { rate } => match self.status().state {
                State::Running => {
                    scrub::start(self, rate);
                    Ok(Reply::Done)
                }
                _ => Err(not_running()),
            },
            Request::Mirror { open, rate, below } => {
                let _alone = self.gate.alone().await;
                self.mirror(open, fd, rate, below).await
            }
            Request::Stream { rate, anew } => {
                stream::ask(self, rate, anew).await.map(Reply::Stream)
            }
            Request::Prepare(open) => {
                let _alone = self.gate.alone().await;
                self.prepare(open, fd).await
            }
            Request::Overlay { target } => {
                let _alone = self.gate.alone().await;
                self.overlay(target, fd).await
            }
            Request::Close => {
                let _alone = self.gate.alone().await;
                self.pause_and_close().await
            }
            Request::Exit => {
                let _alone = self.gate.alone().await;
                self.close().await
            }
            Request::Term { until } => self.end_at(until),
            Request::Troubles { after } => Ok(Reply::Troubles(self.troubles.after(after).await)),
            Request::Needs { after } => Ok(Reply::Needs {
                needs: self.needs.after(after).await,
            }),
            Request::Provide {
                number,
                provided,
                backing,
            } => {
                self.needs.provide(number, provided, fd, backing)?;
                Ok(Reply::Done)
            }
            Request::Nbd { export } => {
                let fd = fd.ok_or_else(|| Failure::invalid("the listening socket is missing"))?;
                self.serve_nbd(fd, export)
            }
        }
    }

    /// The process may do I/O until then.
    fn end_at(&self, until: Option<Duration>) -> Result<Reply, Failure> {
        let system = |error: io::Error| Failure::system("cannot set the end of the lease", &error);
        let mut deadline = self.deadline.borrow_mut();
        let deadline = match &mut *deadline {
            Some(deadline) => deadline,
            none => none.insert(Deadline::never().map_err(system)?),
        };
        deadline.set(until).map_err(system)?;
        Ok(Reply::Done)
    }

    fn serve_nbd(self: &Rc<Self>, listener: OwnedFd, export: String) -> Result<Reply, Failure> {
        if self.has_nbd.replace(true) {
            return Err(Failure::new(Code::State, "NBD clients are served already"));
        }
        nbd::listen(self, listener, export)
            .map_err(|error| Failure::system("cannot listen for NBD clients", &error))?;
        Ok(Reply::Done)
    }

    /// The server, as soon as the disk runs.
    pub(crate) async fn running(&self) -> Rc<Server> {
        poll_fn(|cx| {
            // A task that waits for an inactive disk counts as a client that wants to use it.
            if let Some(link) = self.state.borrow().link.as_ref() {
                link.want();
            }
            self.poll_running(cx.waker())
        })
        .await
    }

    /// Returns the server as soon as the disk runs, or `None` if `image` is not served any more.
    pub(crate) async fn running_from(&self, image: u64) -> Option<Rc<Server>> {
        poll_fn(|cx| match self.images.get() == image {
            true => self.poll_running(cx.waker()).map(Some),
            false => Poll::Ready(None),
        })
        .await
    }

    fn poll_running(&self, waker: &Waker) -> Poll<Rc<Server>> {
        match &self.state.borrow().server {
            Some(server) if server.is_fetching() => Poll::Ready(server.clone()),
            _ => {
                wait(&mut self.waiting.borrow_mut(), waker);
                Poll::Pending
            }
        }
    }

    /// Number of the image that is served, see [`running_from`](Self::running_from).
    pub(crate) fn image(&self) -> u64 {
        self.images.get()
    }

    /// Number of the time that it is served.
    pub(crate) fn serves(&self) -> u64 {
        self.serves.get()
    }

    /// From now on it is another image, or none.
    fn change_image(&self, image: Option<Identity>) {
        self.state.borrow_mut().image = image;
        self.images.set(self.images.get().wrapping_add(1));
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    pub(crate) fn direct(&self) -> &Rc<Direct> {
        &self.direct
    }

    pub(crate) fn lost(&self) -> &WritebackErrors {
        &self.lost
    }

    pub(crate) fn server(&self) -> Option<Rc<Server>> {
        self.state.borrow().server.clone()
    }

    pub(crate) fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    pub(crate) fn count_nbd(&self) {
        self.stats.borrow_mut().nbd += 1;
    }

    /// Takes a node.
    pub fn attach(&self, tap: Tap) -> Result<Reply, Failure> {
        let mut state = self.state.borrow_mut();
        if state.tap.is_some() {
            return Err(Failure::new(Code::State, "this tapdisk has a node already"));
        }
        let info = tap.info();
        let node = node(info);
        *state = Inner {
            tap: Some(Rc::new(tap)),
            ..Inner::default()
        };
        Ok(Reply::Node(node))
    }

    fn must_be_attached(&self) -> Result<(), Failure> {
        match self.status().state {
            State::Attached => Ok(()),
            State::Idle => Err(no_node()),
            _ => Err(Failure::new(
                Code::State,
                "an image is open: close it first",
            )),
        }
    }

    /// Opens an image and serves it, if it is as it was left.
    async fn open(
        &self,
        open: Open,
        image: Option<OwnedFd>,
        stamp: Option<ImageStamp>,
    ) -> Result<Reply, Failure> {
        let tap = self.state.borrow().tap.clone().ok_or_else(no_node)?;
        let engine = self.select(&open)?;
        // Without, every transfer pins its pages itself.
        let arena = tap.arena();
        if let Err(error) = self.runtime.io.register(Some(arena)) {
            self.note("the arena is not registered", &error);
        }
        if open.may_ask {
            self.find_kept().await;
        }
        let identity = Identity::of(&open, image.as_ref());
        let failed = self.runtime.io.failed();
        let mut file = None;
        let served = async {
            file = self.locked(&open, image).await?;
            if let Some(file) = &file {
                self.make_durable(&open, file).await?;
            }
            inactive::check(&open, file.as_ref(), stamp)?;
            let (disk, shape) = self.disk(&open, file.clone()).await?;
            self.serve(&tap, open, engine, identity, disk, shape).await
        };
        let served = served.await;
        match &served {
            Ok(_) => self.state.borrow_mut().file = file,
            // Until then it is locked.
            Err(_) => {
                // A flush of the driver may have failed, after which the page cache holds what the storage has lost.
                if let Some(Err(error)) = file.as_ref().map(File::forget) {
                    self.note(
                        "the page cache keeps what the storage may have lost",
                        &error.into(),
                    );
                }
                self.state.borrow_mut().parents.clear();
                self.retreat(failed).await;
            }
        }
        served
    }

    /// Serves a disk of a driver that [`drivers::open`] does not know, in the same states as a call for
    /// [`Request::Open`]: it is active.
    ///
    /// # Errors
    /// There is no node, or the kernel refuses the disk.
    pub async fn serve_disk(
        &self,
        open: Open,
        disk: drivers::Disk,
        shape: DiskInfo,
    ) -> Result<Reply, Failure> {
        let _alone = self.gate.alone().await;
        if self.status().state != State::Attached {
            return Err(Failure::new(
                Code::State,
                "an image is open, or there is no node",
            ));
        }
        let tap = self.state.borrow().tap.clone().ok_or_else(no_node)?;
        let engine = self.select(&open)?;
        let identity = Identity::of(&open, None);
        self.serve(&tap, open, engine, identity, disk, shape).await
    }

    async fn serve(
        &self,
        tap: &Rc<Tap>,
        open: Open,
        engine: Engine,
        identity: Identity,
        disk: drivers::Disk,
        shape: DiskInfo,
    ) -> Result<Reply, Failure> {
        let notes = self.find_notes(&open).await?;
        let tracer = self.find_tracer(&open, shape.size).await;
        self.tell_kernel(tap, &open, &shape, disk.fence()).await?;
        self.offer(tap, &open, &disk, shape.size);
        self.set(rules(&open)).await?;
        let ban = self.ban_if(notes.is_some()).await?;
        self.noted.replace(ban);
        let ban = self.ban_if(tracer.is_some()).await?;
        self.traced.replace(ban);
        // No task may wait from here until the session has the server, because requests that arrive belong to it.
        let link = self.link(tap);
        let terms = ServeConfig {
            read_only: open.read_only,
            reserved: *open.target.lease() == LeaseKind::Reservation,
            rules: self.rules.clone(),
            throttle: self.throttle.clone(),
            troubles: self.troubles.clone(),
            lost: self.lost.clone(),
            direct: self.direct.clone(),
        };
        self.troubles.go_on();
        self.serves.set(self.serves.get().wrapping_add(1));
        let (runtime, stats) = (&self.runtime, &self.stats);
        let server = Server::on_link(runtime, tap, link, disk, &shape, terms, stats);
        server.set_notes(notes);
        server.tracing.set(tracer);
        let disk = describe(&shape, &open, engine);
        if self.state.borrow().image.as_ref() != Some(&identity) {
            self.change_image(Some(identity));
        }
        let mut state = self.state.borrow_mut();
        state.open = Some(open);
        state.disk = Some(disk.clone());
        state.server = Some(server);
        state.inactive = None;
        for waker in self.waiting.take() {
            waker.wake();
        }
        Ok(Reply::Disk(disk))
    }

    /// Sets the error policy and the limits.
    async fn set(&self, rules: Rules) -> Result<(), Failure> {
        rules.limits.check()?;
        if Throttle::any(&rules) {
            let ban = self.direct.forbid().await?;
            self.limited.replace(Some(ban));
        }
        self.throttle.set(&rules);
        if !Throttle::any(&rules) {
            self.limited.replace(None);
        }
        self.rules.set(rules);
        Ok(())
    }

    /// Allows passthrough if the kernel can serve the disk: not if other hosts write to it, too.
    fn offer(&self, tap: &Tap, open: &Open, disk: &drivers::Disk, size: u64) {
        let in_parts = disk.has_places();
        if open.shared || !(in_parts || disk.is_verbatim()) {
            return;
        }
        match tap.mapper() {
            Ok(Some(mapper)) => self.direct.offer(passthrough::PassthroughImage {
                io: self.runtime.io.clone(),
                mapper,
                size,
                writable: !open.read_only,
                in_parts,
            }),
            Ok(None) => {}
            Err(error) => self.note("the kernel does not serve the disk by itself", &error),
        }
    }

    /// The exchange with the kernel.
    fn link(&self, tap: &Rc<Tap>) -> Rc<KernelLink> {
        let mut state = self.state.borrow_mut();
        let link = state
            .link
            .get_or_insert_with(|| KernelLink::new(&self.runtime, tap));
        link.clone()
    }

    /// Describes a disk to the kernel, and starts the node unless it is.
    async fn tell_kernel(
        &self,
        tap: &Tap,
        open: &Open,
        shape: &DiskInfo,
        storage: Fence,
    ) -> Result<(), Failure> {
        let params = params(shape, open);
        self.reach(open, storage).await?;
        let (known, started, claimed, storage_before) = {
            let state = self.state.borrow();
            (state.params, state.started, state.fence, state.storage)
        };
        let own = fence(storage);
        let fence = claimed.unwrap_or(own);
        // The guest learns nothing of an image that is refused.
        if storage_before.is_some_and(|before| own < before) {
            return Err(other_storage(open));
        }
        self.describe(tap, open, known, params)?;
        if !started {
            tap.start(fence)
                .map_err(|error| Failure::system("cannot start the node", &error))?;
        }
        let mut state = self.state.borrow_mut();
        state.started = true;
        state.fence = Some(fence);
        state.storage = Some(own);
        Ok(())
    }

    /// Must be called before the first I/O on storage: tells the kernel when this process's I/O is over after its end,
    /// which is valid from then on, and waits until the I/O of the previous process is over. For users with a disk of
    /// their own, see [`serve_disk`](Self::serve_disk).
    ///
    /// # Errors
    /// There is no node, or the kernel refuses; or the disk was started on storage where I/O is over sooner, and an
    /// older kernel module accepts no change of that from a process that serves.
    pub async fn reach(&self, open: &Open, storage: Fence) -> Result<(), Failure> {
        let (tap, known, started) = {
            let state = self.state.borrow();
            let tap = state.tap.clone().ok_or_else(no_node)?;
            (tap, state.fence, state.started)
        };
        let widest = fence(storage).max(known.unwrap_or(tapdev::Fence::Local));
        if known == Some(widest) {
            return Ok(());
        }
        if started && !tap.can_widen() {
            return Err(other_storage(open));
        }
        self.settle(&tap, widest).await?;
        tap.uses(widest)
            .map_err(|error| Failure::system("the kernel refuses such storage", &error))?;
        self.state.borrow_mut().fence = Some(widest);
        Ok(())
    }

    /// Waits until I/O of a process that had the node before is over, where the kernel does not.
    async fn settle(&self, tap: &Tap, fence: tapdev::Fence) -> Result<(), Failure> {
        let time = tap.settles(fence);
        if time.is_zero() {
            return Ok(());
        }
        diskio::say!(
            "tapdisk: the kernel module is older and does not wait for what the process before sent over \
             a network: the disk is served {} s later",
            time.as_secs() + 1
        );
        let slept = self.runtime.io.sleep(time).await;
        slept.map_err(|error| Failure::system("cannot wait", &error.into()))
    }

    /// Tells the kernel of the disk, unless it knows all of that.
    fn describe(
        &self,
        tap: &Tap,
        open: &Open,
        known: Option<Params>,
        params: Params,
    ) -> Result<(), Failure> {
        succeeds(open, known, &params)?;
        if known != Some(params) {
            tap.describe(&params)
                .map_err(|error| described(open, &error))?;
            self.state.borrow_mut().params = Some(params);
        }
        Ok(())
    }

    /// Selects the engine that `open` names.
    fn select(&self, open: &Open) -> Result<Engine, Failure> {
        let io = &self.runtime.io;
        let is_parked = self
            .state
            .borrow()
            .link
            .as_ref()
            .is_some_and(|link| link.is_parked());
        let wanted: &[diskio::Engine] = match (open.target.driver(), open.engine) {
            (Driver::Sync, _) | (_, Engine::Sync) => &[diskio::Engine::Sync],
            (_, Engine::Uring) => &[diskio::Engine::Uring],
            (_, Engine::Auto) if is_parked => &[diskio::Engine::Uring],
            (_, Engine::Aio) => &[diskio::Engine::Aio],
            (_, Engine::Auto) => &[diskio::Engine::Uring, diskio::Engine::Aio],
        };
        let mut result = Ok(());
        for engine in wanted {
            result = io.select(*engine);
            match &result {
                Ok(()) => break,
                Err(error) => self.note("an engine is not possible here", error),
            }
        }
        result.map_err(|error| match is_parked {
            true => Failure::new(
                Code::State,
                "the engine cannot change while the node is held: close the disk and open it again",
            ),
            false => Failure::system(
                "the engine is not possible here: use another one, or auto",
                &error,
            ),
        })?;
        Ok(match io.engine() {
            diskio::Engine::Uring => Engine::Uring,
            diskio::Engine::Aio => Engine::Aio,
            diskio::Engine::Sync => Engine::Sync,
        })
    }

    fn status(&self) -> Status {
        let state = self.state.borrow();
        let traces = |server: &Rc<Server>| server.tracing.is_on();
        let driver_owes = |server: &Rc<Server>| server.disk().owes();
        let open = state.open.clone().map(|open| Open {
            trace: state.server.as_ref().is_some_and(traces),
            ..open
        });
        Status {
            state: match (&state.tap, &state.server, state.started) {
                (None, _, _) => State::Idle,
                (_, Some(_), _) => State::Running,
                _ if state.inactive.is_some() => State::Inactive,
                (_, _, true) => State::Paused,
                (_, _, false) => State::Attached,
            },
            node: state.tap.as_ref().map(|tap| node(tap.info())),
            open,
            disk: state.disk.clone(),
            owes: self.lost.is_owed() || state.server.as_ref().is_some_and(driver_owes),
        }
    }

    /// Everything that was counted.
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats.borrow().clone();
        (stats.calls, stats.sleeps) = self.runtime.io.counts();
        stats.version = env!("CARGO_PKG_VERSION").into();
        stats.turns = self.turns.get();
        stats.limits = Some(self.throttle.limits()).filter(Limits::any);
        stats.scrub = self.jobs.scrub.progress().clone();
        stats.stream = self.jobs.stream.progress().clone();
        stats.mirror = self.jobs.mirror.progress().as_ref().map(|twin| twin.told());
        if let Some(server) = &self.state.borrow().server {
            stats.in_flight = server.in_flight();
            stats.driver = server.disk().stats();
        }
        stats
    }

    /// Reports a problem that an administrator may want to know, and that changes nothing.
    fn note(&self, what: &str, error: &io::Error) {
        diskio::say!("tapdisk: {what}: {error}");
    }
}

fn rules(open: &Open) -> Rules {
    Rules {
        on_no_space: open.on_no_space,
        on_error: open.on_error,
        limits: open.limits,
        share: open.share,
    }
}

fn process() -> Process {
    Process {
        pid: std::process::id(),
        program: env!("CARGO_PKG_VERSION").to_string(),
        abi: tapdev::ABI_VERSION,
        notes: true,
        marks: true,
        traces: true,
        shares: true,
    }
}

fn other_storage(open: &Open) -> Failure {
    Failure::new(
        Code::State,
        format!(
            "{} is not on the same kind of storage as the image before, local or over a network: close the \
             disk and open it again",
            open.target
        ),
    )
}

/// Error of a request that needs a disk that is being served.
pub(crate) fn not_running() -> Failure {
    Failure::new(
        Code::State,
        "the disk is paused, or has no open image: resume it with `tap-ctl unpause -m MINOR`",
    )
}

fn no_node() -> Failure {
    Failure::new(Code::State, "this tapdisk has no node: attach one first")
}
