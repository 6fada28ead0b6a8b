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
//!
//! Here is what a device is, and what tells it that it is to look; `reconcile` looks and acts, `connect`
//! gets the disk and the queues, `publish` says what came of it, `stall_watch` warns of requests that are not answered, `debug`
//! shows what it counts.

mod connect;
mod debug;
mod publish;
mod reconcile;
mod stall_watch;

use self::debug::DebugFolder;
use self::publish::OurState;
use self::stall_watch::StallWatch;
use crate::advertise::Offered;
use crate::connect_retry::ConnectRetry;
use crate::connection::Connection;
use crate::disk::{self, AttachTap, AttachedDisk};
use crate::due::DueTime;
use crate::events::DeviceEvents;
use crate::linux::module::ModuleReference;
use crate::linux::monotonic_ns;
use crate::linux::task::workqueue;
use crate::linux::xen::claims::{FrontendClaim, Waiter};
use crate::linux::xen::device::XenDevice;
use crate::linux::xen::driver::Attribute;
use crate::linux::xen::watch::{InXenwatch, Subscription};
use crate::proto::state::XenbusState;
use crate::storage::Errand;
use crate::totals::Totals;
use core::pin::Pin;
use kernel::prelude::*;
use kernel::sync::atomic::{
    ordering::Acquire, ordering::Full, ordering::Relaxed, ordering::Release, Atomic, AtomicFlag,
};
use kernel::sync::{new_mutex, new_spinlock, Arc, Mutex, SpinLock};
use kernel::workqueue::{
    impl_has_delayed_work, impl_has_work, new_delayed_work, new_work, DelayedWork, Work, WorkItem,
};

/// The bus has not read the frontend's state yet; no number of a state.
const UNHEARD: u32 = u32::MAX;
/// Milliseconds until the next read of xenstore after one that failed.
const ASK_AGAIN: u32 = 1000;

// The work items of a device.
const LOOK: u64 = 0;
const LATER: u64 = 1;
const ERRAND: u64 = 2;
const AGES: u64 = 3;

/// A device.
#[pin_data]
pub(crate) struct Vbd {
    device: Arc<XenDevice>,
    attach_tap: AttachTap,
    totals: Arc<Totals>,
    /// The number of the disk's device node, for sysfs.
    number: Atomic<u32>,
    /// True if the guest may write the disk, for sysfs.
    writable: AtomicFlag,
    /// The frontend's state as the bus last read it, or [`UNHEARD`].
    theirs: Atomic<u32>,
    /// The frontend wrote its state since we last looked.
    moved: AtomicFlag,
    /// The toolstack wrote a key that names the disk since we last looked.
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
    /// Time at which `later` runs.
    #[pin]
    due: SpinLock<DueTime>,
    #[pin]
    look: Work<Vbd, LOOK>,
    #[pin]
    later: DelayedWork<Vbd, LATER>,
    #[pin]
    errand: Work<Vbd, ERRAND>,
    #[pin]
    ages: DelayedWork<Vbd, AGES>,
}

impl_has_work! {
    impl HasWork<Self, LOOK> for Vbd { self.look }
    impl HasWork<Self, ERRAND> for Vbd { self.errand }
}
impl_has_delayed_work! {
    impl HasDelayedWork<Self, LATER> for Vbd { self.later }
    impl HasDelayedWork<Self, AGES> for Vbd { self.ages }
}

/// Parts that the life needs to its end and no longer. Its lock is held for a moment only, and no holder waits for
/// anything.
struct Hold {
    subscription: Option<Subscription>,
    /// The device's folder in debugfs.
    debug: Option<Pin<KBox<DebugFolder>>>,
    /// The bus has one while the device is bound; this is for what follows.
    module: Option<ModuleReference>,
}

/// State that changes in the life of a device.
struct Life {
    /// The device is ours to serve. Until that is known, this driver writes nothing and reads no key of the frontend,
    /// because another driver may serve it.
    ours: bool,
    /// The device is being given up: only its disk is still closed.
    leaving: bool,
    /// The device was given up; only its removal is left.
    left: bool,
    /// The device was unbound, and everything is given back.
    over: bool,
    state: OurState,
    disk: Option<AttachedDisk>,
    /// A disk that could not be opened, so that it is reported once.
    bad_disk: Option<disk::Name>,
    errand: Errand,
    /// The disk was got ready for the connect that is to follow.
    prepared: bool,
    /// Offer to the frontend, and the memory for it.
    offer: Option<Offered>,
    /// Disk and frontend are ours alone.
    claim: Option<FrontendClaim>,
    connection: Option<Arc<Connection>>,
    /// State of the reports of unanswered requests.
    stalls: StallWatch,
    draining: bool,
    /// The frontend's rings were refused, and it has not moved since.
    refused: bool,
    /// Time at which a connect may be tried after those that failed.
    retry: ConnectRetry,
    /// The reported reason for which a connect is tried again and again.
    short_of: Option<&'static str>,
}

impl Life {
    const NEW: Self = Self {
        ours: false,
        leaving: false,
        left: false,
        over: false,
        state: OurState::NEW,
        disk: None,
        bad_disk: None,
        errand: Errand::None,
        prepared: false,
        offer: None,
        claim: None,
        connection: None,
        stalls: StallWatch::NEW,
        draining: false,
        refused: false,
        retry: ConnectRetry::NEW,
        short_of: None,
    };
}

/// Action after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Look again now.
    Look,
    /// The next event has us look.
    Rest,
}

impl Vbd {
    /// A device that was just found.
    pub(crate) fn new(device: Arc<XenDevice>, attach_tap: AttachTap) -> Result<Arc<Self>> {
        let totals = Totals::new()?;
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
                hold <- new_mutex!(Hold { subscription: None, debug: None, module: None }, "Vbd::hold"),
                due <- new_spinlock!(DueTime::NEVER, "Vbd::due"),
                look <- new_work!("Vbd::look"),
                later <- new_delayed_work!("Vbd::later"),
                errand <- new_work!("Vbd::errand"),
                ages <- new_delayed_work!("Vbd::ages"),
            }),
            GFP_KERNEL,
        )
    }

    /// Listens to changes of our directory until the device's life is over, and starts the work. May sleep.
    pub(crate) fn listen(self: &Arc<Self>) -> Result {
        let subscription = Subscription::new(self.device.place(), self.clone())?;
        self.hold.lock().subscription = Some(subscription);
        // Keys that were there before have no event, so this looks at all of them.
        self.kick();
        Ok(())
    }

    /// Shows the device in debugfs. Without that, the device serves as well.
    fn show_in_debugfs(&self) {
        let folder = DebugFolder::new(&self.device, &self.totals);
        if let Ok(folder) = folder {
            self.hold.lock().debug = Some(folder);
        }
    }

    /// Has the work look at the device again; callable from any context.
    fn kick(self: &Arc<Self>) {
        // If it is queued already, that run looks.
        let _queued = workqueue::enqueue::<_, LOOK>(self.clone());
    }

    /// Schedules the work in `milliseconds`, unless it runs earlier.
    fn kick_after(self: &Arc<Self>, milliseconds: u32) {
        let now = monotonic_ns();
        let wanted = now.saturating_add(u64::from(milliseconds).saturating_mul(1_000_000));
        // An earlier run checks how much time is left.
        if self.due.lock().wants(now, wanted) {
            workqueue::put_off::<_, LATER>(self.clone(), milliseconds);
        }
    }

    /// The bus has read the frontend's state.
    pub(crate) fn frontend_moved(self: &Arc<Self>, state: XenbusState) {
        self.theirs.store(state.number(), Release);
        self.moved.store(true, Release);
        self.kick();
    }

    /// Notes that we or the toolstack wrote our own state. Only for xenwatch.
    pub(crate) fn state_written(self: &Arc<Self>, thread: &InXenwatch) {
        // A device that was unbound is removed with its directory, by the bus: doing so twice is what
        // must not be.
        if !self.unbound.load(Acquire) && self.gone.xchg(false, Full) {
            self.device.unregister(thread);
            return;
        }
        self.kick();
    }

    /// The bus takes the device away. Only leaves a note, because the caller may be the xenwatch thread, or hold a lock
    /// that this thread may want. Parts of the device that are still used (ring mapping, event channel) hold a
    /// reference to it. May be called again.
    pub(crate) fn unbind(self: &Arc<Self>) {
        if self.unbound.load(Acquire) {
            return;
        }
        // The bus's reference goes when this returns, and the module must not go before the rest.
        self.hold.lock().module = ModuleReference::get();
        // The bus would publish Closed now, if we are Closing. `part` publishes Closed when that is true.
        self.device.mark_unbound();
        self.unbound.store(true, Release);
        self.kick();
    }

    /// Returns the value of an attribute of sysfs.
    pub(crate) fn attribute(&self, which: Attribute) -> u64 {
        match which {
            Attribute::Statistic(index) => self.totals.value(index),
            Attribute::Device => self.number.load(Relaxed).into(),
            Attribute::Writable => self.writable.load(Relaxed).into(),
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
        this.due.lock().fired();
        this.kick();
    }
}

impl WorkItem<AGES> for Vbd {
    type Pointer = Arc<Vbd>;

    fn run(this: Arc<Vbd>) {
        this.look_for_late();
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
        self.disk_moved.store(true, Release);
        self.kick();
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
