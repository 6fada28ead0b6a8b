// SPDX-License-Identifier: GPL-2.0-only

//! A device and its life: from the toolstack's directory to a served disk and back.
//!
//! Watches only queue work. The work looks at the world, asks the pure state machine what to do,
//! does it, and looks again. One mutex makes the life of a device a single thread of events; it
//! is never held while I/O is waited for: what may wait for storage is an errand of its own
//! (`storage`), and queues that drain tell when they are through.
//!
//! A device outlives its binding: the bus takes it away under a lock that xenwatch may want, so that
//! only leaves a note (`unbind`), and the work gives everything back (`part`).

use crate::connect_error::ConnectError;
use crate::connection::{Connection, Peer};
use crate::disk::{self, AttachTap, Disk, Opener};
use crate::events::DeviceEvents;
use crate::offer::{self, Features};
use crate::proto::state::{step_asking, Action, Online, Rings, State, View};
use crate::storage::{Errand, Job, Outcome};
use crate::totals::Totals;
use crate::xen::claims::{Claim, Waiter};
use crate::xen::device::Device;
use crate::xen::driver::Attribute;
use crate::xen::local_clock;
use crate::xen::module::ModuleReference;
use crate::xen::pages::push;
use crate::xen::store;
use crate::xen::watch::{InXenwatch, Watch};
use crate::xen::workqueue;
use core::pin::Pin;
use kernel::prelude::*;
use kernel::sync::atomic::{
    ordering::Acquire, ordering::Full, ordering::Relaxed, ordering::Release, Atomic, AtomicFlag,
};
use kernel::sync::lock::mutex::MutexGuard;
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::workqueue::{
    impl_has_delayed_work, impl_has_work, new_delayed_work, new_work, DelayedWork, Work, WorkItem,
};

/// Steps that one run of the work takes at most before it queues itself again.
const STEPS: u32 = 16;
/// The bus has not told the frontend's state yet; no number of a state.
const UNHEARD: u32 = u32::MAX;
/// Watches of a device.
const WATCHES: usize = 4;
/// Milliseconds until xenstore is asked again that did not say whether a device is ours.
const ASK_AGAIN: u32 = 1000;

// The work items of a device.
const LOOK: u64 = 0;
const LATER: u64 = 1;
const ERRAND: u64 = 2;

/// A device.
#[pin_data]
pub(crate) struct Vbd {
    device: Arc<Device>,
    attach_tap: AttachTap,
    totals: Arc<Totals>,
    /// The number of the disk's device node, for sysfs.
    number: Atomic<u32>,
    /// True if the disk may be written, for sysfs.
    writable: AtomicFlag,
    /// The frontend's state as the bus last read it, or [`UNHEARD`].
    theirs: Atomic<u32>,
    /// The frontend wrote its state since we last looked.
    moved: AtomicFlag,
    /// A key that names the disk was written since we last looked.
    disk_moved: AtomicFlag,
    /// A ring's indices were impossible; not yet reported.
    broken: AtomicFlag,
    /// Everything is given back: the next watch callback takes the device off the bus.
    gone: AtomicFlag,
    /// The bus has taken the device from us: the work gives everything back.
    unbound: AtomicFlag,
    #[pin]
    life: Mutex<Life>,
    #[pin]
    hold: Mutex<Hold>,
    #[pin]
    look: Work<Vbd, LOOK>,
    #[pin]
    later: DelayedWork<Vbd, LATER>,
    #[pin]
    errand: Work<Vbd, ERRAND>,
}

impl_has_work! {
    impl HasWork<Self, LOOK> for Vbd { self.look }
    impl HasWork<Self, ERRAND> for Vbd { self.errand }
}
impl_has_delayed_work! {
    impl HasDelayedWork<Self, LATER> for Vbd { self.later }
}

/// What the life needs to its end and no longer. Its lock is held for a moment only, by nobody who
/// waits for anything.
struct Hold {
    watches: KVec<Pin<KBox<Watch<Vbd>>>>,
    /// The bus has one while the device is bound; this is for what follows.
    module: Option<ModuleReference>,
}

/// What changes in the life of a device.
struct Life {
    /// The device is ours to serve. Until that is known nothing is written, and nothing of the frontend
    /// is looked at: somebody else may serve it.
    ours: bool,
    /// The device is being given up: only its disk is still closed.
    leaving: bool,
    /// It was given up; only its removal is left.
    left: bool,
    /// It was unbound, and everything is given back.
    over: bool,
    /// The state that was published last.
    state: State,
    disk: Option<Disk>,
    /// A disk that could not be opened, so that it is reported once.
    bad_disk: Option<disk::Name>,
    errand: Errand,
    /// The disk was got ready for the connect that is to follow.
    prepared: bool,
    /// Disk and frontend are ours alone.
    claim: Option<Claim>,
    connection: Option<Arc<Connection>>,
    draining: bool,
    /// The frontend's rings were refused, and it has not moved since.
    refused: bool,
    /// Connects that failed, less those that worked.
    failures: u32,
    /// When the last one failed, and how long the next attempt waits, in nanoseconds.
    failed_at: u64,
    pause: u64,
}

impl Life {
    const NEW: Self = Self {
        ours: false,
        leaving: false,
        left: false,
        over: false,
        state: State::Initialising,
        disk: None,
        bad_disk: None,
        errand: Errand::None,
        prepared: false,
        claim: None,
        connection: None,
        draining: false,
        refused: false,
        failures: 0,
        failed_at: 0,
        pause: 0,
    };

    /// A connect failed: the next attempt waits, longer each time, up to half a minute. Each
    /// attempt costs a line in the log, and a guest may try as often as it likes.
    fn note_failure(&mut self) {
        self.failures = self.failures.saturating_add(1);
        let doubled = 1u64.checked_shl(self.failures.min(15)).unwrap_or(1);
        self.pause = doubled.min(30_000).saturating_mul(1_000_000);
        self.failed_at = local_clock();
    }

    /// Milliseconds that the next attempt has to wait; 0 if it may be made now.
    fn must_pause(&self) -> u32 {
        if self.failures == 0 {
            return 0;
        }
        let waited = local_clock().wrapping_sub(self.failed_at);
        let left = self.pause.saturating_sub(waited).div_ceil(1_000_000);
        u32::try_from(left).unwrap_or(u32::MAX)
    }
}

/// What follows a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Look again now.
    Look,
    /// The next event has us look.
    Rest,
}

impl Vbd {
    /// A device that was just found.
    pub(crate) fn new(device: Arc<Device>, attach_tap: AttachTap) -> Result<Arc<Self>> {
        let totals = Totals::new()?;
        let watches = KVec::with_capacity(WATCHES, GFP_KERNEL)?;
        Arc::pin_init(
            pin_init!(Self {
                device,
                attach_tap,
                totals,
                number: Atomic::new(0),
                writable: AtomicFlag::new(false),
                theirs: Atomic::new(UNHEARD),
                moved: AtomicFlag::new(false),
                disk_moved: AtomicFlag::new(true),
                broken: AtomicFlag::new(false),
                gone: AtomicFlag::new(false),
                unbound: AtomicFlag::new(false),
                life <- new_mutex!(Life::NEW, "Vbd::life"),
                hold <- new_mutex!(Hold { watches, module: None }, "Vbd::hold"),
                look <- new_work!("Vbd::look"),
                later <- new_delayed_work!("Vbd::later"),
                errand <- new_work!("Vbd::errand"),
            }),
            GFP_KERNEL,
        )
    }

    /// Keeps a watch of this device until its life is over.
    pub(crate) fn keep_watch(&self, watch: Pin<KBox<Watch<Self>>>) -> Result {
        push(&mut self.hold.lock().watches, watch)
    }

    /// Has the work look at the device again; callable from any context.
    fn kick(self: &Arc<Self>) {
        // If it is queued already, that run looks.
        let _queued = workqueue::enqueue::<_, LOOK>(self.clone());
    }

    /// Has the work look again in so many milliseconds, if nothing has it look before.
    fn kick_after(self: &Arc<Self>, milliseconds: u32) {
        // If it is queued already, that run comes earlier, and looks how long is left.
        let _queued = workqueue::enqueue_after::<_, LATER>(self.clone(), milliseconds);
    }

    /// Has the work try again to open the disk; callable from any context.
    pub(crate) fn disk_is_free(self: &Arc<Self>) {
        self.disk_moved.store(true, Release);
        self.kick();
    }

    /// The bus has read the frontend's state.
    pub(crate) fn frontend_moved(self: &Arc<Self>, state: State) {
        self.theirs.store(state.number(), Release);
        self.moved.store(true, Release);
        self.kick();
    }

    /// Our own state was written, by us or by the toolstack. Only for xenwatch.
    pub(crate) fn state_written(self: &Arc<Self>, thread: &InXenwatch) {
        // A device that was unbound is removed with its directory, by the bus: doing so twice is what
        // must not be.
        if !self.unbound.load(Acquire) && self.gone.xchg(false, Full) {
            self.device.unregister(thread);
            return;
        }
        self.kick();
    }

    /// The bus takes the device away. Only leaves a note, because it may be the xenwatch thread that
    /// does so, and holds a lock that this thread may want if it is somebody else. What is still used of
    /// the device (ring mapping, event channel) holds a reference to it. May be called again.
    pub(crate) fn unbind(self: &Arc<Self>) {
        if self.unbound.load(Acquire) {
            return;
        }
        // That of the bus goes when this returns, and the module must not go before what is left.
        self.hold.lock().module = ModuleReference::get();
        self.unbound.store(true, Release);
        self.kick();
    }

    /// What a reader of sysfs sees.
    pub(crate) fn attribute(&self, which: Attribute) -> u64 {
        match which {
            Attribute::Statistic(index) => self.totals.value(index),
            Attribute::Device => self.number.load(Relaxed).into(),
            Attribute::Writable => self.writable.load(Relaxed).into(),
        }
    }

    /// Looks at the device and does what there is to do.
    fn look_and_act(self: &Arc<Self>) {
        let mut life = self.life.lock();
        for _ in 0..STEPS {
            if life.over {
                return;
            }
            self.end_errand(&mut life);
            if self.unbound.load(Acquire) {
                self.part(life);
                return;
            }
            if life.left || self.take_step(&mut life) == Next::Rest {
                return;
            }
        }
        drop(life);
        self.kick();
    }

    /// Whether the device is ours; asked only when the keys that say so were written.
    fn is_ours(self: &Arc<Self>, life: &mut Life) -> bool {
        if life.ours || !self.disk_moved.xchg(false, Full) {
            return life.ours;
        }
        match disk::is_ours(&self.device) {
            Ok(false) => {}
            Ok(true) => {
                life.ours = true;
                // What names the disk is still to be looked at.
                self.disk_moved.store(true, Release);
            }
            Err(_) => {
                self.disk_moved.store(true, Release);
                self.kick_after(ASK_AGAIN);
            }
        }
        life.ours
    }

    fn take_step(self: &Arc<Self>, life: &mut Life) -> Next {
        if !self.is_ours(life) {
            return Next::Rest;
        }
        if self.broken.xchg(false, Full) {
            self.device.report(
                EIO,
                c"the frontend's request producer index is impossible; the ring is not served any more",
            );
        }
        if self.moved.xchg(false, Full) {
            life.refused = false;
        }
        if life.leaving {
            self.leave(life);
            return Next::Rest;
        }
        self.open_disk(life);
        self.end_draining(life);
        let action = match self.next_action(life) {
            Ok(action) => action,
            Err(error) => {
                // Xenstore does not answer (a shutdown, no memory): nothing is decided now,
                // and the next event looks again.
                self.device
                    .report(error, c"the frontend's state cannot be read");
                return Next::Rest;
            }
        };
        if action != Action::Connect {
            life.prepared = false;
        }
        self.act(life, action)
    }

    fn next_action(&self, life: &Life) -> Result<Action> {
        let theirs = match self.theirs.load(Acquire) {
            // The bus tells it in a moment.
            UNHEARD => return Ok(Action::Wait),
            number => State::from_number(number),
        };
        let view = View {
            ours: life.state,
            theirs: match theirs {
                // The bus does not say why it could not be read.
                State::Unknown => self.frontend_state()?,
                known => known,
            },
            online: Online::Yes,
            disk: life.disk.is_some(),
            ready: life
                .disk
                .as_ref()
                .is_some_and(|disk| disk.backing.is_ready()),
            rings: match (&life.connection, life.draining) {
                (None, _) => Rings::None,
                (Some(_), false) => Rings::Served,
                (Some(_), true) => Rings::Draining,
            },
            refused: life.refused,
        };
        step_asking(view, || self.online())
    }

    /// Whether the toolstack wants the device to stay.
    fn online(&self) -> Result<Online> {
        match store::read_number(self.device.nodename(), c"online") {
            Ok(Some(0)) => Ok(Online::No),
            Ok(Some(_)) => Ok(Online::Yes),
            Ok(None) => Ok(Online::Unsaid),
            Err(error) => Err(error),
        }
    }

    /// The frontend's state, read anew; a node that is gone or hidden from us, or that holds no
    /// state, is Unknown. Any other error says nothing about the frontend.
    fn frontend_state(&self) -> Result<State> {
        match store::read_state(self.device.otherend()) {
            Err(error) if error == ENOENT || error == EACCES => Ok(State::Unknown),
            other => other,
        }
    }

    /// Does one step.
    fn act(self: &Arc<Self>, life: &mut Life, action: Action) -> Next {
        match action {
            Action::Wait => {
                if let Some(pause) = self.follow_disk(life) {
                    self.kick_after(pause);
                }
                return Next::Rest;
            }
            Action::Offer => {
                let offered = offer::publish_offer(&self.device, life.state);
                self.published(life, State::InitWait, offered);
                if offered.is_err() {
                    self.publish(life, State::Closing);
                    // Said already. Trying again at once would spin while xenstore goes on failing.
                    return Next::Rest;
                }
            }
            Action::Connect => return self.connect(life),
            Action::StartClosing => self.publish(life, State::Closing),
            Action::Disconnect => {
                if let Some(connection) = &life.connection {
                    connection.drain();
                    life.draining = true;
                }
            }
            Action::Close => self.publish(life, State::Closed),
            Action::Leave => life.leaving = true,
            Action::Refuse => {
                self.device.report(
                    EINVAL,
                    c"the frontend's state is one that no frontend may have",
                );
                self.publish(life, State::Closing);
            }
        }
        Next::Look
    }

    fn publish(&self, life: &mut Life, state: State) {
        if state != life.state {
            let result = offer::publish_state(&self.device, life.state, state);
            self.published(life, state, result);
        }
    }

    fn published(&self, life: &mut Life, state: State, result: Result) {
        life.state = state;
        match result {
            // The toolstack has removed our directory or made a new one: nobody is left to tell.
            Err(error) if error != ENOENT => self
                .device
                .report(error, c"the backend's state cannot be published"),
            _ => {}
        }
    }

    fn end_draining(&self, life: &mut Life) {
        if life.draining {
            self.end_connection(life);
        }
    }

    /// Lets go of a connection that has let go of the guest; `false` if there is one that has not.
    fn end_connection(&self, life: &mut Life) -> bool {
        let Some(connection) = life.connection.take() else {
            return true;
        };
        if !connection.is_detached() {
            life.connection = Some(connection);
            return false;
        }
        life.draining = false;
        self.totals.set_memory(0);
        connection.bury();
        true
    }

    /// Gives a job that may wait for storage to the queue that is there for that.
    fn send(self: &Arc<Self>, life: &mut Life, job: Job) {
        life.errand = Errand::Given(job);
        // There is one at a time, so it is not queued.
        let _queued = workqueue::enqueue_storage::<_, ERRAND>(self.clone());
    }

    fn run_errand(self: &Arc<Self>) {
        let job = self.life.lock().errand.take_job();
        if let Some(job) = job {
            let outcome = job.run();
            self.life.lock().errand = Errand::Done(outcome);
            self.kick();
        }
    }

    /// Takes in what came of the last errand.
    fn end_errand(&self, life: &mut Life) {
        match life.errand.take_outcome() {
            None | Some(Outcome::Closed) => {}
            Some(Outcome::Prepared(Ok(()))) => life.prepared = true,
            Some(Outcome::Prepared(Err(error))) => self.refuse(life, &error),
            Some(Outcome::Opened(Ok(disk))) => {
                self.number.store(disk.backing.number(), Relaxed);
                self.writable.store(disk.backing.is_writable(), Relaxed);
                life.bad_disk = None;
                life.disk = Some(disk);
            }
            Some(Outcome::Opened(Err(bad))) => self.disk_is_bad(life, &bad),
        }
    }

    /// Has the disk opened once the hotplug script has said which it is.
    fn open_disk(self: &Arc<Self>, life: &mut Life) {
        // Only when the key was written: opening a device that is gone asks for its driver.
        if life.disk.is_some() || life.errand.is_busy() || !self.disk_moved.load(Acquire) {
            return;
        }
        if !self.claim(life) || !self.disk_moved.xchg(false, Full) {
            return;
        }
        match disk::named(&self.device) {
            Ok(None) => {}
            Ok(Some(name)) => {
                let opener = Opener {
                    device: self.device.clone(),
                    events: self.clone(),
                    attach_tap: self.attach_tap,
                };
                self.send(life, Job::Open(opener, name));
            }
            Err(bad) => self.disk_is_bad(life, &bad),
        }
    }

    /// True if disk and frontend are ours alone. Otherwise the device was ours before, and its life then
    /// is not over: it tells when it is.
    fn claim(self: &Arc<Self>, life: &mut Life) -> bool {
        if life.claim.is_none() {
            let frontend = (self.device.otherend_id(), self.device.number());
            match Claim::new(frontend, self.clone()) {
                Ok(claim) => life.claim = claim,
                Err(error) => self.device.report(error, c"the frontend cannot be claimed"),
            }
        }
        life.claim.is_some()
    }

    fn disk_is_bad(&self, life: &mut Life, bad: &disk::Bad) {
        if life.bad_disk == Some(bad.name) || life.leaving || self.unbound.load(Acquire) {
            return;
        }
        life.bad_disk = Some(bad.name);
        let fallback = c"the disk cannot be opened";
        self.device
            .report(bad.error, bad.text.as_deref().unwrap_or(fallback));
        self.publish(life, State::Closing);
    }

    /// Connects, or does what comes before: the pause after a failure, getting the disk ready.
    fn connect(self: &Arc<Self>, life: &mut Life) -> Next {
        let pause = life.must_pause();
        if pause > 0 {
            self.kick_after(pause);
            return Next::Rest;
        }
        if life.errand.is_busy() {
            return Next::Rest;
        }
        if !core::mem::replace(&mut life.prepared, false) {
            if let Some(disk) = &life.disk {
                let job = Job::Prepare(disk.backing.clone());
                self.send(life, job);
            }
            return Next::Rest;
        }
        // Who sees Connected must not find the report of an earlier attempt.
        self.device.clear_report();
        match self.try_connect(life) {
            Ok(()) => {
                life.failures = life.failures.saturating_sub(1);
                life.state = State::Connected;
            }
            Err(error) => self.refuse(life, &error),
        }
        Next::Look
    }

    /// Says why the frontend cannot be connected; it has to move before that is tried again.
    fn refuse(&self, life: &mut Life, error: &ConnectError) {
        let (code, text) = error.describe();
        let fallback = c"the frontend cannot be connected";
        self.device
            .report(code, text.as_deref().unwrap_or(fallback));
        life.note_failure();
        life.refused = true;
        self.publish(life, State::Closing);
    }

    fn try_connect(self: &Arc<Self>, life: &mut Life) -> Result<(), ConnectError> {
        let Some(disk) = &mut life.disk else {
            return Err(ConnectError::Step("the disk is not open", ENODEV));
        };
        let features = Features::read(&self.device, &*disk.backing);
        let limits = features.limits();
        let connection = disk.backing.clone().connect(&Peer {
            events: self.clone(),
            totals: &self.totals,
            device: &self.device,
            limits: &limits,
        })?;
        disk.sectors = limits.sectors;
        self.totals.set_memory(connection.memory_kib());
        let published = features.publish(&self.device, connection.limits(), life.state);
        if published.is_err() {
            connection.drain();
            life.draining = true;
        }
        life.connection = Some(connection);
        published.map_err(|error| ConnectError::Step("the disk cannot be published", error))
    }

    /// Publishes how the disk is served, and a size that changed while connected. If that has to wait,
    /// because a process may change both as often as it likes, says how many milliseconds.
    fn follow_disk(&self, life: &mut Life) -> Option<u32> {
        let connected = life.state == State::Connected;
        let Some(disk) = &mut life.disk else {
            return None;
        };
        let status = disk.backing.status();
        let sectors = disk.backing.sectors();
        let new_status = status != disk.status;
        let resized = connected && sectors != disk.sectors;
        if !new_status && !resized {
            return None;
        }
        let pause = disk.must_pause();
        if pause > 0 {
            return Some(pause);
        }
        disk.status = status;
        let mut published = match status {
            Some(now) if new_status => offer::publish_status(&self.device, now),
            _ => Ok(()),
        };
        if resized {
            disk.sectors = sectors;
            let size = offer::publish_size(&self.device, sectors);
            published = published.and(size);
        }
        match published {
            // The toolstack has removed our directory: nobody is left to tell.
            Err(error) if error != ENOENT => self
                .device
                .report(error, c"what has become of the disk cannot be published"),
            _ => {}
        }
        None
    }

    /// Gives the disk back, then lets the toolstack and the bus know.
    fn leave(self: &Arc<Self>, life: &mut Life) {
        if life.errand.is_busy() {
            return;
        }
        if let Some(disk) = life.disk.take() {
            self.send(life, Job::Close(disk));
            return;
        }
        life.left = true;
        life.state = State::Closed;
        self.gone.store(true, Release);
        // Not by way of the bus, which writes nothing where it finds Closed or a state that the
        // toolstack has reset: only a write makes the watch fire in whose callback the device is
        // taken off the bus.
        if let Err(error) = offer::touch_state(&self.device) {
            self.device.report(error, c"state Closed cannot be written");
        }
        self.device.note_state(State::Closed);
    }

    /// Gives back everything of a device that is not ours any more, step by step: each look goes on
    /// where the last one had to wait. Our watches stay to the end, to tell us if the guest goes.
    fn part(self: &Arc<Self>, mut life: MutexGuard<'_, Life>) {
        if let Some(connection) = &life.connection {
            if self.frontend_waits() {
                connection.drain();
            } else {
                connection.abandon();
            }
        }
        if !self.end_connection(&mut life) {
            return;
        }
        if life.errand.is_busy() {
            return;
        }
        if let Some(disk) = life.disk.take() {
            self.send(&mut life, Job::Close(disk));
            return;
        }
        life.over = true;
        life.claim = None;
        drop(life);
        let (watches, module) = {
            let mut hold = self.hold.lock();
            (core::mem::take(&mut hold.watches), hold.module.take())
        };
        // This waits for xenwatch, which waits for nothing of ours.
        drop(watches);
        workqueue::hasten::<_, LATER>(self.clone());
        drop(module);
    }

    /// True if the frontend of a device that was taken from us waits for answers. What cannot be
    /// read says nothing about it.
    fn frontend_waits(&self) -> bool {
        let ours = store::read_state(self.device.nodename());
        if self.device.is_vanished() || ours.is_err_and(|error| error == ENOENT) {
            return false;
        }
        match self.frontend_state() {
            Ok(state) => matches!(
                state,
                State::Initialised | State::Connected | State::Closing
            ),
            Err(_) => true,
        }
    }
}

impl WorkItem<LOOK> for Vbd {
    type Pointer = Arc<Vbd>;

    fn run(this: Arc<Vbd>) {
        this.look_and_act();
    }
}

impl WorkItem<LATER> for Vbd {
    type Pointer = Arc<Vbd>;

    fn run(this: Arc<Vbd>) {
        this.kick();
    }
}

impl WorkItem<ERRAND> for Vbd {
    type Pointer = Arc<Vbd>;

    fn run(this: Arc<Vbd>) {
        this.run_errand();
    }
}

impl DeviceEvents for Vbd {
    fn reconcile(self: Arc<Self>) {
        self.kick();
    }

    fn disk_available(self: Arc<Self>) {
        self.disk_is_free();
    }

    fn ring_broken(self: Arc<Self>) {
        self.broken.store(true, Relaxed);
        self.kick();
    }
}

impl Waiter for Vbd {
    fn frontend_is_free(self: Arc<Self>) {
        self.kick();
    }
}
