// SPDX-License-Identifier: GPL-2.0-only

//! A device and its life: from the toolstack's directory to a served disk and back.
//!
//! Watches only queue work. The work looks at the world, asks the pure state machine what to do,
//! does it, and looks again. One mutex makes the life of a device a single thread of events; it
//! is never held while I/O is waited for.

use crate::connection::{ConnectError, Connection};
use crate::disk::{self, Disk};
use crate::medium::Peer;
use crate::offer::{self, Features};
use crate::proto::state::{step_asking, Action, Rings, State, View};
use crate::totals::Totals;
use crate::xen::device::Device;
use crate::xen::driver::{self, Attribute};
use crate::xen::local_clock;
use crate::xen::store;
use crate::xen::watch::{Watch, Watcher};
use crate::xen::workqueue;
use core::pin::Pin;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::atomic::{
    ordering::Acquire, ordering::Full, ordering::Relaxed, ordering::Release, Atomic, AtomicFlag,
};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::{delay::fsleep, Delta};
use kernel::workqueue::{impl_has_work, new_work, Work, WorkItem};

/// Steps that one run of the work takes at most before it queues itself again.
const STEPS: u32 = 16;
/// The bus has not told the frontend's state yet; no number of a state.
const UNHEARD: u32 = u32::MAX;
/// How long the work waits at once for the end of a pause.
const PAUSE_STEP_MS: i64 = 50;

/// A device.
#[pin_data]
pub(crate) struct Vbd {
    device: Arc<Device>,
    totals: Totals,
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
    /// The device is unbound: no work may be queued any more.
    unbound: AtomicFlag,
    #[pin]
    life: Mutex<Life>,
    #[pin]
    work: Work<Vbd>,
}

impl_has_work! {
    impl HasWork<Self> for Vbd { self.work }
}

/// What changes in the life of a device.
struct Life {
    /// The device was given up; only its removal is left.
    left: bool,
    /// The state that was published last.
    state: State,
    disk: Option<Disk>,
    /// A disk that could not be opened, so that it is reported once.
    bad_disk: Option<disk::Name>,
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
    /// A connect failed: the next attempt waits, longer each time, up to half a minute. Each
    /// attempt costs a line in the log, and a guest may try as often as it likes.
    fn note_failure(&mut self) {
        self.failures = self.failures.saturating_add(1);
        let doubled = 1u64.checked_shl(self.failures.min(15)).unwrap_or(1);
        self.pause = doubled.min(30_000).saturating_mul(1_000_000);
        self.failed_at = local_clock();
    }

    /// True while the next attempt has to wait.
    fn must_pause(&self) -> bool {
        self.failures > 0 && local_clock().wrapping_sub(self.failed_at) < self.pause
    }
}

impl Vbd {
    fn new(device: Arc<Device>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                device,
                totals: Totals::new(),
                number: Atomic::new(0),
                writable: AtomicFlag::new(false),
                theirs: Atomic::new(UNHEARD),
                moved: AtomicFlag::new(false),
                disk_moved: AtomicFlag::new(true),
                broken: AtomicFlag::new(false),
                gone: AtomicFlag::new(false),
                unbound: AtomicFlag::new(false),
                life <- new_mutex!(Life {
                    left: false,
                    state: State::Initialising,
                    disk: None,
                    bad_disk: None,
                    connection: None,
                    draining: false,
                    refused: false,
                    failures: 0,
                    failed_at: 0,
                    pause: 0,
                }),
                work <- new_work!("Vbd::work"),
            }),
            GFP_KERNEL,
        )
    }

    /// Has the work look at the device again; callable from any context.
    pub(crate) fn kick(self: &Arc<Self>) {
        if !self.unbound.load(Relaxed) {
            // If it is queued already, that run looks.
            let _queued = workqueue::enqueue(self.clone());
        }
    }

    /// Has the work try again to open the disk; callable from any context.
    #[allow(dead_code, reason = "for disks that a process serves")]
    pub(crate) fn disk_is_free(self: &Arc<Self>) {
        self.disk_moved.store(true, Release);
        self.kick();
    }

    /// The statistics.
    pub(crate) fn totals(&self) -> &Totals {
        &self.totals
    }

    /// A queue found impossible indices in its ring.
    pub(crate) fn ring_broken(self: &Arc<Self>) {
        self.broken.store(true, Relaxed);
        self.kick();
    }

    /// Looks at the device and does what there is to do.
    fn look_and_act(self: &Arc<Self>) {
        let mut life = self.life.lock();
        if self.unbound.load(Acquire) {
            self.give_back(&mut life);
            return;
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
        for _ in 0..STEPS {
            if life.left || self.unbound.load(Acquire) {
                // Unbound while this was asleep: the run that unbinding queues gives back.
                return;
            }
            self.open_disk(&mut life);
            self.end_draining(&mut life);
            let action = match self.next_action(&life) {
                Ok(action) => action,
                Err(error) => {
                    // Xenstore does not answer (a shutdown, no memory): nothing is decided now,
                    // and the next event looks again.
                    self.device
                        .report(error, c"the frontend's state cannot be read");
                    return;
                }
            };
            if action == Action::Wait && self.follow_disk(&mut life) {
                return;
            }
            if action == Action::Wait || (action == Action::Connect && life.must_pause()) {
                // Look again soon: the frontend may close meanwhile, and is not kept waiting then.
                drop(life);
                fsleep(Delta::from_millis(PAUSE_STEP_MS));
                life = self.life.lock();
                continue;
            }
            if self.act(&mut life, action).is_err() {
                // Said already. Trying again at once would spin while xenstore goes on failing.
                return;
            }
        }
        drop(life);
        self.kick();
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
            online: true,
            disk: life.disk.is_some(),
            ready: life
                .disk
                .as_ref()
                .is_some_and(|disk| disk.medium.is_ready()),
            rings: match (&life.connection, life.draining) {
                (None, _) => Rings::None,
                (Some(_), false) => Rings::Served,
                (Some(_), true) => Rings::Draining,
            },
            refused: life.refused,
        };
        Ok(step_asking(view, || self.device.is_online()))
    }

    /// The frontend's state, read anew; a node that is gone or hidden from us, or that holds no
    /// state, is Unknown. Any other error says nothing about the frontend.
    fn frontend_state(&self) -> Result<State> {
        match store::read_state(self.device.otherend()) {
            Err(error) if error == ENOENT || error == EACCES => Ok(State::Unknown),
            other => other,
        }
    }

    /// Does one step; fails if the next look should wait for the next event.
    fn act(self: &Arc<Self>, life: &mut Life, action: Action) -> Result {
        match action {
            Action::Wait => {}
            Action::Offer => {
                let offered = offer::publish_offer(&self.device, life.state);
                self.published(life, State::InitWait, offered);
                if offered.is_err() {
                    self.publish(life, State::Closing);
                    return offered;
                }
            }
            Action::Connect => self.connect(life),
            Action::StartClosing => self.publish(life, State::Closing),
            Action::Disconnect => {
                if let Some(connection) = &life.connection {
                    connection.drain();
                    life.draining = true;
                }
            }
            Action::Close => self.publish(life, State::Closed),
            Action::Leave => self.leave(life),
            Action::Refuse => {
                self.device.report(
                    EINVAL,
                    c"the frontend's state is one that no frontend may have",
                );
                self.publish(life, State::Closing);
            }
        }
        Ok(())
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
        if !life.draining {
            return;
        }
        let Some(connection) = life.connection.take() else {
            return;
        };
        if connection.is_detached() {
            life.draining = false;
            self.totals.set_memory(0);
            connection.bury();
        } else {
            life.connection = Some(connection);
        }
    }

    /// Opens the disk once the hotplug script has said which it is.
    fn open_disk(self: &Arc<Self>, life: &mut Life) {
        // Only when the key was written: opening a device that is gone asks for its driver.
        if life.disk.is_some() || !self.disk_moved.xchg(false, Full) {
            return;
        }
        match Disk::open(self, &self.device) {
            Ok(None) => {}
            Ok(Some(disk)) => {
                self.number.store(disk.medium.number(), Relaxed);
                self.writable.store(disk.medium.is_writable(), Relaxed);
                life.bad_disk = None;
                life.disk = Some(disk);
            }
            Err(bad) if life.bad_disk != Some(bad.name) => {
                life.bad_disk = Some(bad.name);
                let fallback = c"the disk cannot be opened";
                self.device
                    .report(bad.error, bad.text.as_deref().unwrap_or(fallback));
                self.publish(life, State::Closing);
            }
            Err(_reported) => {}
        }
    }

    fn connect(self: &Arc<Self>, life: &mut Life) {
        // Who sees Connected must not find the report of an earlier attempt.
        self.device.clear_report();
        match self.try_connect(life) {
            Ok(()) => {
                life.failures = life.failures.saturating_sub(1);
                life.state = State::Connected;
            }
            Err(error) => {
                let (code, text) = error.describe();
                let fallback = c"the frontend cannot be connected";
                self.device
                    .report(code, text.as_deref().unwrap_or(fallback));
                life.note_failure();
                life.refused = true;
                self.publish(life, State::Closing);
            }
        }
    }

    fn try_connect(self: &Arc<Self>, life: &mut Life) -> Result<(), ConnectError> {
        let Some(disk) = &mut life.disk else {
            return Err(ConnectError::Step("the disk is not open", ENODEV));
        };
        disk.medium.prepare()?;
        let features = Features::read(&self.device, &*disk.medium);
        let limits = features.limits();
        let connection = disk.medium.clone().connect(&Peer {
            vbd: self,
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

    /// Publishes how the disk is served, and a size that changed while connected; `false` if that
    /// has to wait, because a process may change both as often as it likes.
    fn follow_disk(&self, life: &mut Life) -> bool {
        let connected = life.state == State::Connected;
        let Some(disk) = &mut life.disk else {
            return true;
        };
        let status = disk.medium.status();
        let sectors = disk.medium.sectors();
        let new_status = status != disk.status;
        let resized = connected && sectors != disk.sectors;
        if !new_status && !resized {
            return true;
        }
        if !disk.may_publish() {
            return false;
        }
        disk.status = status;
        let mut published = match status {
            Some(now) if new_status => offer::publish_status(&self.device, now),
            _ => Ok(()),
        };
        if resized {
            disk.sectors = sectors;
            let state = State::Connected.number();
            let size = offer::publish_size(&self.device, sectors, state);
            published = published.and(size);
        }
        match published {
            // The toolstack has removed our directory: nobody is left to tell.
            Err(error) if error != ENOENT => self
                .device
                .report(error, c"what has become of the disk cannot be published"),
            _ => {}
        }
        true
    }

    /// Gives the disk back, then lets the toolstack and the bus know.
    fn leave(&self, life: &mut Life) {
        life.disk = None;
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

    /// The bus is taking the device away: gives everything back. May be called again.
    ///
    /// Where the toolstack has removed our directory this runs in the xenwatch thread, which serves
    /// every backend of the host, so nothing is waited for: the work does it. What it still uses
    /// of the device (ring mapping, event channel) holds a reference to it.
    fn unbind(self: &Arc<Self>) {
        if self.unbound.xchg(true, Full) {
            return;
        }
        if self.device.is_vanished() {
            // Whether it was queued already or not, it runs once more from here.
            let _queued = workqueue::enqueue(self.clone());
            return;
        }
        let mut life = self.life.lock();
        if let Some(connection) = &life.connection {
            // A frontend that is alive gets its answers before another driver takes over.
            if !matches!(self.frontend_state(), Ok(State::Unknown)) {
                connection.drain();
                connection.wait_detached();
            }
        }
        self.give_back(&mut life);
    }

    /// Lets go of everything, without waiting for I/O.
    fn give_back(&self, life: &mut Life) {
        if let Some(connection) = life.connection.take() {
            connection.abandon();
            connection.bury();
        }
        life.disk = None;
    }
}

impl WorkItem for Vbd {
    type Pointer = Arc<Vbd>;

    fn run(this: Arc<Vbd>) {
        this.look_and_act();
    }
}

/// The watched keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// `physical-device` or `tap-minor` in our directory.
    Disk,
    /// `state` in our directory.
    State,
}

impl Watcher for Vbd {
    type Which = Key;

    fn changed(this: Arc<Self>, which: Key) {
        if which == Key::State && this.gone.xchg(false, Full) {
            this.device.unregister();
            return;
        }
        if which == Key::Disk {
            this.disk_moved.store(true, Release);
        }
        this.kick();
    }
}

/// The driver.
pub(crate) struct VbdDriver;

/// What belongs to a bound device. The watches are dropped, and with them unregistered, after
/// everything is given back.
pub(crate) struct Bound {
    vbd: Unbinder,
    _watches: [Pin<KBox<Watch<Vbd>>>; 3],
}

/// Gives everything of a device back when it is dropped, also if its probe fails half-way: the
/// first watch starts the work before the probe is through.
struct Unbinder(Arc<Vbd>);

impl Drop for Unbinder {
    fn drop(&mut self) {
        self.0.unbind();
    }
}

impl driver::Driver for VbdDriver {
    type Data = Bound;
    // A toolstack says vbd3 where it expects a process to serve the disk.
    const DEVICE_TYPES: [&'static [u8]; 2] = [b"vbd", b"vbd3"];

    fn probe(device: Device) -> Result<Bound> {
        let device = Arc::new(device, GFP_KERNEL)?;
        let vbd = Unbinder(Vbd::new(device.clone())?);
        let watch = |key: &CStr, which| {
            let path = CString::try_from_fmt(fmt!("{}/{}", device.nodename(), key))?;
            Watch::register(path, vbd.0.clone(), which)
        };
        Ok(Bound {
            // The first event of each comes at once and starts the work.
            _watches: [
                watch(disk::BLOCK_KEY, Key::Disk)?,
                watch(disk::TAP_KEY, Key::Disk)?,
                watch(c"state", Key::State)?,
            ],
            vbd,
        })
    }

    fn otherend_changed(data: &Bound, state: State) {
        let vbd = &data.vbd.0;
        vbd.theirs.store(state.number(), Release);
        vbd.moved.store(true, Release);
        vbd.kick();
    }

    fn unbind(data: &Bound) {
        data.vbd.0.unbind();
    }

    fn attribute(data: &Bound, which: Attribute) -> u64 {
        let vbd = &data.vbd.0;
        match which {
            Attribute::Statistic(index) => vbd.totals.value(index),
            Attribute::Device => vbd.number.load(Relaxed).into(),
            Attribute::Writable => vbd.writable.load(Relaxed).into(),
        }
    }
}
