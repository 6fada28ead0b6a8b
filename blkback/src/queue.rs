// SPDX-License-Identifier: GPL-2.0-only

//! One queue of a disk: a ring, its event channel, and the thread that serves it.
//!
//! The thread owns everything that touches the guest. It ends in one of two ways: *drained*, when
//! every request is answered before the ring is given back; or *abandoned*, when the guest is gone or has given its
//! requests up, and the ring is given back at once, also while the thread sleeps in the block layer. I/O that is
//! still in flight keeps its pages until the disk lets go of them; those of the guest are among these
//! only where requests are mapped instead of copied.

use crate::away::{Away, AwayContext, Detached};
use crate::backing::{Drain, Needs, Part, QueueBackends};
use crate::connect_error::ConnectError;
use crate::engine::{
    Backend, Config, Engine, Fetch, Grants, Group, Latencies, Mapping, Pass, PendingRequest, Rest,
    SegmentEntry, Shape, Stats, Tables,
};
use crate::events::DeviceEvents;
use crate::keeper::Keeper;
use crate::linux::memory::vectors::filled;
use crate::linux::task::kthread::{Runner, Thread};
use crate::linux::task::wake_event::WakeEvent;
use crate::linux::trace;
use crate::linux::xen::device::Device;
use crate::linux::xen::evtchn::{Activity, EventChannel};
use crate::linux::xen::grant::GuestGrants;
use crate::linux::xen::guest_side::{Held, Taker};
use crate::linux::xen::ring_map::RingMap;
use crate::linux::{cond_resched, local_clock};
use crate::params;
use crate::poll::Pollers;
use crate::proto::frontend;
use crate::proto::state::Ending;
use crate::ring::index::BackRing;
use crate::ring::request::Limits;
use crate::totals::{Tally, Totals};
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Acquire, ordering::Release, Atomic};
use kernel::sync::Arc;

/// What the thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Command {
    /// Touch nothing yet.
    Wait = 0,
    /// Serve the ring.
    Serve = 1,
    /// Take nothing more, answer what was taken, and end.
    Drain = 2,
    /// The same, but wait no longer than the disk says.
    Finish = 3,
    /// Let go of the guest now.
    Abandon = 4,
}

impl From<Ending> for Command {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Answered => Self::Drain,
            Ending::Soon => Self::Finish,
            Ending::Now => Self::Abandon,
        }
    }
}

/// Who is told of the end of threads, so that nobody has to wait for them.
pub(crate) trait ThreadEnds: Send + Sync + 'static {
    /// A thread is about to be started.
    fn add_thread(&self);

    /// A thread does nothing more but return, or could not be started.
    fn done(&self);
}

/// What the thread and its owner share.
struct Control {
    wake_event: Arc<WakeEvent>,
    /// A [`Command`]; only ever raised.
    command: Atomic<u32>,
    detached: Detached,
}

impl Control {
    fn command(&self) -> Command {
        match self.command.load(Acquire) {
            0 => Command::Wait,
            1 => Command::Serve,
            2 => Command::Drain,
            3 => Command::Finish,
            _ => Command::Abandon,
        }
    }
}

/// A served queue. Dropping it waits for the end of its thread; tell it to end first.
pub(crate) struct Queue {
    control: Arc<Control>,
    guest: Taker,
    memory_kib: u64,
    _thread: Thread,
}

/// What a queue is made of.
pub(crate) struct Setup<'a, D> {
    /// The device.
    pub(crate) device: &'a Arc<Device>,
    /// Who is told about a broken ring, a new size and the end.
    pub(crate) events: &'a Arc<dyn DeviceEvents>,
    /// Where it counts.
    pub(crate) totals: &'a Arc<Totals>,
    /// What the frontend asked for.
    pub(crate) request: &'a frontend::Request,
    /// The disk.
    pub(crate) disk: &'a Arc<D>,
    /// What the disk allows.
    pub(crate) limits: &'a Limits,
    /// The guest keeps its pages granted, and knows that they stay mapped.
    pub(crate) keeps_grants: bool,
}

/// Passes in a row of which one shows what was counted; so does each before a sleep.
const HIDDEN: u8 = 16;

const NO_MEMORY: &str = "there is not enough memory for the queues";

fn step(what: &'static str, error: Error) -> ConnectError {
    ConnectError::Step(what, error)
}

/// Any error but ENOMEM is the hypervisor's status of the frontend's page, whatever the number is in Linux. The bus has
/// then published Closing already.
fn not_mapped(error: Error) -> ConnectError {
    match error == ENOMEM {
        true => step(NO_MEMORY, error),
        false => ConnectError::Frontend("the frontend's ring-ref cannot be mapped", error),
    }
}

/// A queue with its memory reserved and its ring mapped, but without a thread.
pub(crate) struct Prepared<D: QueueBackends> {
    server: Server<D>,
    control: Arc<Control>,
    guest: Taker,
    memory_kib: u64,
}

impl<D: QueueBackends> Prepared<D> {
    /// Maps the ring, binds the event channel and reserves all memory that the queue will need.
    #[inline(never)]
    pub(crate) fn new(
        setup: &Setup<'_, D>,
        ring: &frontend::Ring,
        index: u32,
    ) -> Result<Self, ConnectError> {
        let request = setup.request;
        let slots = request.slots();
        let depth = u16::try_from(slots).map_err(|_| step("the ring is too large", EINVAL))?;
        // First what the guest can get wrong: it costs no memory to refuse that.
        let wake_event = WakeEvent::new().map_err(|error| step(NO_MEMORY, error))?;
        let map = RingMap::map(setup.device, &ring.refs, request.order, request.protocol)
            .map_err(not_mapped)?;
        let back = BackRing::attach(map, slots)
            .map_err(|_| step("the indices in the frontend's ring are impossible", EIO))?;
        let channel = EventChannel::bind(setup.device, ring.port, wake_event.clone())
            .map_err(|error| step("the frontend's event-channel cannot be bound", error))?;
        let control = Control {
            wake_event,
            command: Atomic::new(Command::Wait as u32),
            detached: Detached::new(setup.events.clone()),
        };
        let control =
            Arc::new(control, GFP_KERNEL).map_err(|error| step(NO_MEMORY, error.into()))?;
        let (ring, map) = back.replace(());
        let traced = trace::Queue {
            domain: setup.device.otherend_id(),
            device: setup.device.number(),
            index,
        };
        let (guest, taker) =
            Held::new(channel, map, traced).map_err(|error| step(NO_MEMORY, error))?;
        let state = State::new(setup, index, depth, &control)?;
        Ok(Self {
            memory_kib: state.memory_kib,
            server: Server { ring, guest, state },
            control,
            guest: taker,
        })
    }

    /// Starts the thread, which does nothing until it is told to serve or to end.
    pub(crate) fn start(self, name: &CStr, ending: &Arc<dyn ThreadEnds>) -> Result<Queue> {
        let body = Body {
            server: self.server,
            ending: ending.clone(),
        };
        let body = KBox::new(body, GFP_KERNEL)?;
        ending.add_thread();
        let thread = Thread::spawn(name, body).inspect_err(|_| ending.done())?;
        Ok(Queue {
            control: self.control,
            guest: self.guest,
            memory_kib: self.memory_kib,
            _thread: thread,
        })
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // The fields follow, and with them the wait for the thread's end.
        self.end(Ending::Now);
    }
}

impl Queue {
    fn tell(&self, command: Command) {
        if self.control.command() < command {
            self.control.command.store(command as u32, Release);
            self.control.wake_event.wake();
        }
    }

    /// Serves the ring from now on.
    pub(crate) fn serve(&self) {
        self.tell(Command::Serve);
    }

    /// Takes nothing more and ends in this way, or in a quicker one that it was told before; does not wait.
    pub(crate) fn end(&self, ending: Ending) {
        self.tell(ending.into());
        if ending == Ending::Now && self.guest.take() {
            self.control.detached.set();
        }
    }

    /// Memory that it always has, in KiB.
    pub(crate) fn memory_kib(&self) -> u64 {
        self.memory_kib
    }

    /// True once nothing of the guest is mapped or bound any more.
    pub(crate) fn is_detached(&self) -> bool {
        self.control.detached.is_set()
    }
}

/// What the thread does.
struct Body<D: QueueBackends> {
    server: Server<D>,
    ending: Arc<dyn ThreadEnds>,
}

impl<D: QueueBackends> Runner for Body<D> {
    fn run(self) {
        // By then all that may wait for I/O is gone.
        self.server.run();
        self.ending.done();
    }
}

/// What the thread owns.
struct Server<D: QueueBackends> {
    ring: BackRing<()>,
    guest: Held,
    state: KBox<State<D>>,
}

/// The part of it that stays in its place, because it is too large for a stack on which a driver of
/// the block layer has yet to run.
struct State<D: QueueBackends> {
    slots: KVec<PendingRequest>,
    entries: KVec<SegmentEntry>,
    groups: KVec<Group>,
    mappings: KVec<Mapping>,
    fetches: KVec<Option<Fetch>>,
    stats: Stats,
    latencies: Latencies,
    shape: Shape,
    /// Memory that the queue always has, in KiB.
    memory_kib: u64,
    config: Config,
    limits: Limits,
    grants: KBox<GuestGrants>,
    backend: D::Backend,
    disk: Arc<D>,
    events: Arc<dyn DeviceEvents>,
    tally: Tally,
    control: Arc<Control>,
    /// True for the first queue of a device.
    leads: bool,
}

impl<D: QueueBackends> Server<D> {
    fn run(self) {
        let Self {
            ring,
            guest,
            mut state,
        } = self;
        let disk = state.disk.clone();
        // This outlasts it.
        let control = state.control.clone();
        while control.command() == Command::Wait {
            control.wake_event.wait();
        }
        let context = AwayContext {
            guest: &guest,
            detached: &control.detached,
            begun: state.tally.begun(),
        };
        let (command, mut rest) = state.serve(ring, &context);
        let may_go = disk.drain() != Drain::MustFinish && !rest.is_bound();
        if command == Command::Drain || may_go {
            // The disk, too, is given back before anybody can see that: the toolstack's script
            // takes it apart as soon as the state is Closed.
            drop(state);
            drop(disk);
            control.detached.set();
            return;
        }
        control.detached.set();
        while rest.drain() {
            control.wake_event.wait();
        }
    }
}

impl<D: QueueBackends> State<D> {
    /// Reserves all memory that a queue with a ring of `slots` slots will need.
    // Not part of its caller, so that each of the two has a small frame.
    #[inline(never)]
    fn new(
        setup: &Setup<'_, D>,
        index: u32,
        slots: u16,
        control: &Arc<Control>,
    ) -> Result<KBox<Self>, ConnectError> {
        let no_memory = |error| step(NO_MEMORY, error);
        let domain = setup.device.otherend_id();
        let Part {
            backend,
            pages,
            own_pages,
            rest,
            memory_kib,
            depth,
        } = setup.disk.queue(&Needs {
            domain,
            index,
            queues: setup.request.queues,
            segments: setup.limits.max_indirect_segments,
            depth: slots,
            keeps_grants: setup.keeps_grants,
            wake_event: &control.wake_event,
        })?;
        let shape = Shape {
            copy: pages.with_memory(),
            own: own_pages,
            map: pages.mappable(),
        };
        let entries = [shape.copy, shape.map, rest]
            .into_iter()
            .fold(0, |sum, part| usize::from(part).wrapping_add(sum));
        let entries = filled(SegmentEntry::EMPTY, entries).map_err(no_memory)?;
        let groups = filled(Group::EMPTY, Group::needed(shape.copy)).map_err(no_memory)?;
        let mappings = filled(Mapping::FREE, usize::from(shape.map)).map_err(no_memory)?;
        let grants = GuestGrants::new(domain, pages).map_err(no_memory)?;
        let buffers = usize::from(grants.descriptor_buffers());
        let tally = Tally::new(setup.totals, slots).map_err(no_memory)?;
        let slots = filled(PendingRequest::FREE, usize::from(depth)).map_err(no_memory)?;
        let fetches = filled(None, buffers).map_err(no_memory)?;
        let config = Config {
            protocol: setup.request.protocol,
            copy_max_segments: params::copy_max_segments(),
            keeps_grants: setup.keeps_grants && shape.map > 0,
        };
        // Made where it stays: it is too large to be moved over the stack.
        let state = init!(Self {
            slots,
            entries,
            fetches,
            groups,
            mappings,
            stats: Stats::default(),
            latencies: Latencies::OFF,
            shape,
            memory_kib,
            config,
            limits: *setup.limits,
            grants,
            backend,
            disk: setup.disk.clone(),
            events: setup.events.clone(),
            tally,
            control: control.clone(),
            leads: index == 0,
        });
        KBox::init(state, GFP_KERNEL).map_err(no_memory)
    }

    /// Serves the ring until told to end, and gives it and the event channel back. Returns how it
    /// was told, and what is left.
    // Not part of its caller, so that its frame is gone when what is left is waited for.
    #[inline(never)]
    fn serve<'a>(
        &'a mut self,
        ring: BackRing<()>,
        context: &'a AwayContext<'a>,
    ) -> (Command, Left<'a, D>) {
        let guest = context.guest;
        let (ring, ()) = ring.replace(guest);
        let server = Serving {
            guest,
            disk: &*self.disk,
            events: &self.events,
            tally: &self.tally,
            control: &self.control,
            known_sectors: self.limits.sectors,
            leads: self.leads,
        };
        let mut engine = Engine::new(
            ring,
            &mut *self.grants,
            Away {
                backend: &mut self.backend,
                context,
            },
            Tables {
                slots: &mut self.slots,
                entries: &mut self.entries,
                groups: &mut self.groups,
                mappings: &mut self.mappings,
                fetches: &mut self.fetches,
                stats: &mut self.stats,
                latencies: &mut self.latencies,
            },
            self.shape,
            self.config,
            self.limits,
        );
        let command = server.serve(&mut engine);
        server.show(&mut engine);
        let left = engine.detach();
        // The owner may publish state Closed only when ring and event channel are gone.
        guest.let_go();
        (command, left)
    }
}

/// What is left of a queue that has let go of its guest.
type Left<'a, D> = Rest<'a, &'a mut GuestGrants, Away<'a, &'a mut <D as QueueBackends>::Backend>>;

/// The thread's view of its surroundings while the engine has the rest.
struct Serving<'a, D> {
    guest: &'a Held,
    disk: &'a D,
    events: &'a Arc<dyn DeviceEvents>,
    tally: &'a Tally,
    control: &'a Control,
    known_sectors: u64,
    leads: bool,
}

impl<D: QueueBackends> Serving<'_, D> {
    /// Serves the ring until told to end; returns how.
    // Not part of its caller, so that each of the two has a small frame.
    #[inline(never)]
    fn serve<G: Grants, B: Backend>(&self, engine: &mut Engine<'_, &Held, G, B>) -> Command {
        let mut sectors = self.known_sectors;
        let mut broken = false;
        let mut active = false;
        let mut hidden = 0u8;
        let mut draining = None;
        let mut pollers = Pollers::new();
        let mut keeper = Keeper::new(self.tally);
        loop {
            let command = self.control.command();
            // Before the pass: the guest may know of a new size already.
            sectors = self.limits_changed(engine, sectors);
            self.measure(engine);
            let pass = match command {
                Command::Wait | Command::Serve => engine.pass(),
                Command::Drain | Command::Finish => engine.drain_pass(),
                Command::Abandon => return Command::Abandon,
            };
            if pass.notify {
                self.guest.notify();
            }
            if params::WASTEFUL {
                (1..pass.answered).for_each(|_| self.guest.notify());
            }
            let traced = self.guest.traced();
            traced.pass(pass.taken, pass.answered, pass.notify);
            keeper.after_pass(engine);
            pollers.passed(pass.taken.max(pass.answered), engine.gathers());
            active |= pass.taken > 0;
            if pass.broken && !broken {
                broken = true;
                self.events.clone().ring_broken();
            }
            if command >= Command::Drain && engine.in_flight() == 0 {
                return Command::Drain;
            }
            let left = self.time_left(command, &mut draining);
            if left == Some(0) {
                return Command::Abandon;
            }
            if self.must_go_on(command, &pass, engine, &mut pollers) {
                hidden = hidden.wrapping_add(1);
                if hidden % HIDDEN == 0 {
                    self.show(engine);
                }
                cond_resched();
                continue;
            }
            let start = local_clock();
            let borrows = keeper.before_sleep(engine, start);
            self.show(engine);
            self.end_event(broken, &mut active);
            if let Some(left) = left {
                self.control.wake_event.wait_for(left);
            } else if self.leads || borrows || command != Command::Serve {
                // Nobody tells us that a device was resized, so one thread looks now and then; what is borrowed and
                // not used is given back; and requests that wait for a process fail when they have waited for too
                // long, also those of a queue that outlives the first one.
                self.control.wake_event.wait_for_a_while();
            } else {
                self.control.wake_event.wait();
            }
            engine.woken(self.control.wake_event.woken_ns());
            pollers.slept(engine.in_flight(), start);
        }
    }

    /// Begins to count how long things take, or ends that.
    fn measure<G: Grants, B: Backend>(&self, engine: &mut Engine<'_, &Held, G, B>) {
        let wanted = self.tally.measures();
        if engine.latencies().is_on() != wanted {
            engine.latencies().switch(wanted);
            self.control.wake_event.time(wanted);
        }
    }

    /// Shows what was counted until now.
    fn show<G: Grants, B: Backend>(&self, engine: &mut Engine<'_, &Held, G, B>) {
        self.tally.show(engine.stats(), engine.flight());
        if engine.latencies().is_on() {
            self.tally.show_latencies(engine.latencies());
        }
    }

    /// Nanoseconds for which I/O in flight may still be waited for; `None` if that has no end, or while the ring is
    /// served. `since` is when this began to count.
    fn time_left(&self, command: Command, since: &mut Option<u64>) -> Option<u64> {
        if command != Command::Finish {
            return None;
        }
        let now = local_clock();
        let waited = now.saturating_sub(*since.get_or_insert(now));
        match self.disk.drain() {
            Drain::MustFinish => None,
            Drain::Detachable { timeout_ns } => Some(timeout_ns.saturating_sub(waited)),
        }
    }

    fn must_go_on<G: Grants, B: Backend>(
        &self,
        command: Command,
        pass: &Pass,
        engine: &mut Engine<'_, &Held, G, B>,
        pollers: &mut Pollers,
    ) -> bool {
        if pass.again || self.control.command() != command {
            return true;
        }
        if command != Command::Serve {
            return false;
        }
        let (wake_event, in_flight) = (&self.control.wake_event, engine.in_flight());
        if pollers.wait(in_flight, || {
            wake_event.is_notified() || engine.has_requests()
        }) {
            return true;
        }
        engine.must_stay_awake()
    }

    /// Ends the event that woke us. That of a broken ring is never ended: its guest gets no
    /// further attention.
    fn end_event(&self, broken: bool, active: &mut bool) {
        if broken {
            return;
        }
        let activity = if *active {
            Activity::Real
        } else {
            Activity::Spurious
        };
        if self.guest.end_event(activity) {
            *active = false;
        }
    }

    /// Follows a change of the disk's size.
    fn limits_changed<G: Grants, B: Backend>(
        &self,
        engine: &mut Engine<'_, &Held, G, B>,
        known: u64,
    ) -> u64 {
        let sectors = self.disk.sectors();
        if sectors != known {
            // A device that is gone has no size. The guest's requests are as good as before and fail there.
            if sectors != 0 {
                engine.set_sectors(sectors);
            }
            self.events.clone().reconcile();
        }
        sectors
    }
}
