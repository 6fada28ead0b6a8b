// SPDX-License-Identifier: GPL-2.0-only

//! One queue of a disk: a ring, its event channel, and the thread that serves it.
//!
//! The thread owns everything that touches the guest. It ends in one of two ways: *drained*, when
//! every request is answered before the ring is given back; or *abandoned*, when the guest is gone or has given its
//! requests up, and the ring is given back at once, also while the thread sleeps in the block layer. I/O that is
//! still in flight keeps its pages until the disk lets go of them; those of the guest are among these
//! only where requests are mapped instead of copied.

use crate::backing::{Drain, QueueBackends, QueueNeeds, QueuePart};
use crate::blocking_backend::{BlockingBackend, BlockingContext, Detached};
use crate::connect_error::ConnectError;
use crate::engine::{
    Backend, BlockGroup, Config, DetachedEngine, Engine, EngineTables, Fetch, Grants, Latencies,
    Mapping, Pass, PendingRequest, SegmentEntry, Stats, TableShape,
};
use crate::events::DeviceEvents;
use crate::halt;
use crate::halt_estimator::HaltEstimator;
use crate::idle_reclaim::IdleReclaim;
use crate::lent_engine::{sleep, LentEngine, SleepLength, LENT_IN_HALT};
use crate::linux::memory::vectors::filled;
use crate::linux::task::kthread::{Runner, Thread};
use crate::linux::task::wake_event::WakeEvent;
use crate::linux::trace;
use crate::linux::xen::device::XenDevice;
use crate::linux::xen::evtchn::{Activity, EventChannel};
use crate::linux::xen::grant::GuestGrants;
use crate::linux::xen::guest_mapping::{GuestMapping, MappingRevoker};
use crate::linux::xen::ring_map::RingMap;
use crate::linux::{cond_resched, local_clock};
use crate::mapping_room;
use crate::memory::Reservation;
use crate::params;
use crate::poll::Pollers;
use crate::proto::frontend;
use crate::proto::state::Ending;
use crate::ring::index::BackRing;
use crate::ring::request::RequestLimits;
use crate::totals::{QueueTally, Totals};
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Acquire, ordering::Release, Atomic};
use kernel::sync::Arc;

/// Command to the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum QueueCommand {
    /// Touch nothing yet.
    Wait = 0,
    /// Serve the ring.
    Serve = 1,
    /// Take nothing more, answer what was taken, and end.
    Drain = 2,
    /// Take nothing more, answer what was taken, and end, but wait no longer than the disk says.
    Finish = 3,
    /// Let go of the guest now.
    Abandon = 4,
}

impl From<Ending> for QueueCommand {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Answered => Self::Drain,
            Ending::Soon => Self::Finish,
            Ending::Now => Self::Abandon,
        }
    }
}

/// Receiver of the end of threads, so that no caller has to wait for them.
pub(crate) trait ThreadEnds: Send + Sync + 'static {
    /// A thread is about to be started.
    fn add_thread(&self);

    /// A thread does nothing more but return, or could not be started.
    fn done(&self);
}

/// State that the thread and its owner share.
struct ThreadControl {
    wake_event: Arc<WakeEvent>,
    /// A [`QueueCommand`]; only ever raised.
    command: Atomic<u32>,
    detached: Detached,
}

impl ThreadControl {
    fn command(&self) -> QueueCommand {
        match self.command.load(Acquire) {
            0 => QueueCommand::Wait,
            1 => QueueCommand::Serve,
            2 => QueueCommand::Drain,
            3 => QueueCommand::Finish,
            _ => QueueCommand::Abandon,
        }
    }
}

/// A served queue. Dropping it waits for the end of its thread; tell it to end first.
pub(crate) struct Queue {
    control: Arc<ThreadControl>,
    guest: MappingRevoker,
    memory_kib: u64,
    _thread: Thread,
}

/// Parts and parameters of a new queue.
pub(crate) struct QueueSetup<'a, D> {
    /// The device.
    pub(crate) device: &'a Arc<XenDevice>,
    /// Receiver of a broken ring, a new size and the end.
    pub(crate) events: &'a Arc<dyn DeviceEvents>,
    /// Counters of the device.
    pub(crate) totals: &'a Arc<Totals>,
    /// The frontend's request: queues, ring size, protocol and features.
    pub(crate) request: &'a frontend::FrontendRequest,
    /// The disk.
    pub(crate) disk: &'a Arc<D>,
    /// Limits of the guest's requests.
    pub(crate) limits: &'a RequestLimits,
    /// The guest keeps its pages granted, and knows that they stay mapped.
    pub(crate) keeps_grants: bool,
    /// Memory of the guest that is reserved for the disk.
    pub(crate) reservation: Option<&'a Reservation>,
}

/// Number of passes in a row of which one publishes the counters; so does each before a sleep.
const HIDDEN: u8 = 16;

/// Pause before pages that storage holds are looked at once more; each pause in a row is longer by as much.
const HELD_NS: u64 = 5_000_000;
/// The longest of these pauses, in multiples of the first one.
const HELD_MOST: u64 = 40;

const NO_MEMORY: &str = "there is not enough memory for the queues";

fn step(what: &'static str, error: Error) -> ConnectError {
    ConnectError::Step(what, error)
}

/// See [`RingMap::map`] for its errors.
fn not_mapped(error: Error) -> ConnectError {
    if error == ENOSPC {
        mapping_room::want();
        return step(
            "Xen has no room to map the frontend's ring (max_maptrack_frames of this domain)",
            error,
        );
    }
    match error == ENOMEM {
        true => step(NO_MEMORY, error),
        false => ConnectError::Frontend("the frontend's ring-ref cannot be mapped", error),
    }
}

/// A queue with its memory reserved and its ring mapped, but without a thread.
pub(crate) struct Prepared<D: QueueBackends> {
    server: QueueServer<D>,
    control: Arc<ThreadControl>,
    guest: MappingRevoker,
    memory_kib: u64,
}

impl<D: QueueBackends> Prepared<D> {
    /// Maps the ring, binds the event channel and reserves all memory that the queue will need.
    #[inline(never)]
    pub(crate) fn new(
        setup: &QueueSetup<'_, D>,
        ring: &frontend::Ring,
        index: u32,
    ) -> Result<Self, ConnectError> {
        let request = setup.request;
        let slots = request.slots();
        let depth = u16::try_from(slots).map_err(|_| step("the ring is too large", EINVAL))?;
        // First the values that the guest can get wrong: it costs no memory to refuse those.
        let wake_event = WakeEvent::new().map_err(|error| step(NO_MEMORY, error))?;
        let map = RingMap::map(setup.device, &ring.refs, request.order, request.protocol)
            .map_err(not_mapped)?;
        let back = BackRing::attach(map, slots)
            .map_err(|_| step("the indices in the frontend's ring are impossible", EIO))?;
        let channel = EventChannel::bind(setup.device, ring.port, wake_event.clone())
            .map_err(|error| step("the frontend's event-channel cannot be bound", error))?;
        let control = ThreadControl {
            wake_event,
            command: Atomic::new(QueueCommand::Wait as u32),
            detached: Detached::new(setup.events.clone()),
        };
        let control =
            Arc::new(control, GFP_KERNEL).map_err(|error| step(NO_MEMORY, error.into()))?;
        let (ring, map) = back.replace(());
        let traced = trace::TracedQueue {
            domain: setup.device.otherend_id(),
            device: setup.device.number(),
            index,
        };
        let (guest, taker) =
            GuestMapping::new(channel, map, traced).map_err(|error| step(NO_MEMORY, error))?;
        let (state, grants) = ServerState::new(setup, index, depth, &control)?;
        Ok(Self {
            memory_kib: state.memory_kib,
            server: QueueServer {
                ring,
                guest,
                state,
                grants,
            },
            control,
            guest: taker,
        })
    }

    /// Starts the thread, which does nothing until it has a command to serve or to end.
    pub(crate) fn start(self, name: &CStr, ending: &Arc<dyn ThreadEnds>) -> Result<Queue> {
        let body = ThreadBody {
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
    fn tell(&self, command: QueueCommand) {
        if self.control.command() < command {
            self.control.command.store(command as u32, Release);
            self.control.wake_event.wake();
        }
    }

    /// Serves the ring from now on.
    pub(crate) fn serve(&self) {
        self.tell(QueueCommand::Serve);
    }

    /// Takes no more requests and ends as `ending` says, or in a quicker way that an earlier call chose; does not wait.
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

/// Nanoseconds that a thread sleeps at most which has `left` for what it has taken, and whose last `held` passes found
/// pages that storage holds.
fn longest_pause(left: Option<u64>, held: u64) -> Option<u64> {
    let soon = HELD_NS.saturating_mul(held.min(HELD_MOST));
    match left {
        _ if soon == 0 => left,
        Some(left) => Some(left.min(soon)),
        None => Some(soon),
    }
}

/// Reports whether all I/O goes to a process, whose tasks answer it or wake the thread: a thread that polled or halted would
/// keep the processor from them.
fn leaves_to_tasks<G: Grants, B: Backend>(engine: &Engine<'_, &GuestMapping, G, B>) -> bool {
    engine.is_served_by_tasks() && !params::polls_for_processes()
}

/// Body of the thread.
struct ThreadBody<D: QueueBackends> {
    server: QueueServer<D>,
    ending: Arc<dyn ThreadEnds>,
}

impl<D: QueueBackends> Runner for ThreadBody<D> {
    fn run(self) {
        // All that may wait for I/O is gone now.
        self.server.run();
        self.ending.done();
    }
}

/// State that the thread owns.
struct QueueServer<D: QueueBackends> {
    ring: BackRing<()>,
    guest: GuestMapping,
    state: KBox<ServerState<D>>,
    grants: KBox<GuestGrants>,
}

/// The part of it that stays in its place, because it is too large for a stack on which a driver of
/// the block layer has yet to run.
struct ServerState<D: QueueBackends> {
    slots: KVec<PendingRequest>,
    entries: KVec<SegmentEntry>,
    groups: KVec<BlockGroup>,
    mappings: KVec<Mapping>,
    fetches: KVec<Option<Fetch>>,
    stats: Stats,
    latencies: Latencies,
    shape: TableShape,
    /// Memory that the queue always has, in KiB.
    memory_kib: u64,
    config: Config,
    limits: RequestLimits,
    backend: D::Backend,
    around: Surroundings<D>,
}

/// Surroundings of the thread: it reads them while the engine has the rest of its state.
struct Surroundings<D> {
    disk: Arc<D>,
    events: Arc<dyn DeviceEvents>,
    tally: QueueTally,
    control: Arc<ThreadControl>,
    /// True for the first queue of a device.
    leads: bool,
}

impl<D: QueueBackends> QueueServer<D> {
    fn run(self) {
        let Self {
            ring,
            guest,
            mut state,
            mut grants,
        } = self;
        let disk = state.around.disk.clone();
        // This outlasts it.
        let control = state.around.control.clone();
        while control.command() == QueueCommand::Wait {
            control.wake_event.wait();
        }
        let context = BlockingContext {
            guest: &guest,
            detached: &control.detached,
            begun: state.around.tally.begun(),
        };
        let (command, mut rest) = state.serve(ring, &mut grants, &context);
        let may_go = disk.drain() != Drain::MustFinish && !rest.is_bound();
        if command == QueueCommand::Drain || may_go {
            rest.let_go();
            // The disk, too, is given back before the detached state is visible: the toolstack's script takes it apart
            // as soon as the state is Closed.
            drop(state);
            drop(disk);
            control.detached.set();
            // Last, because this waits for pages that storage still holds.
            drop(grants);
            return;
        }
        control.detached.set();
        while rest.drain() {
            control.wake_event.wait();
        }
    }
}

impl<D: QueueBackends> ServerState<D> {
    /// Reserves all memory that a queue with a ring of `slots` slots will need.
    // Not part of its caller, so that each of the two has a small frame.
    #[inline(never)]
    fn new(
        setup: &QueueSetup<'_, D>,
        index: u32,
        slots: u16,
        control: &Arc<ThreadControl>,
    ) -> Result<(KBox<Self>, KBox<GuestGrants>), ConnectError> {
        let no_memory = |error| step(NO_MEMORY, error);
        let domain = setup.device.otherend_id();
        let QueuePart {
            backend,
            pages,
            own_pages,
            rest,
            memory_kib,
            depth,
        } = setup.disk.queue(&QueueNeeds {
            domain,
            index,
            queues: setup.request.queues,
            segments: setup.limits.max_indirect_segments,
            depth: slots,
            keeps_grants: setup.keeps_grants,
            reservation: setup.reservation,
            wake_event: &control.wake_event,
        })?;
        let shape = TableShape {
            copy: pages.with_memory(),
            own: own_pages,
            map: pages.mappable(),
        };
        let entries = [shape.copy, shape.map, rest]
            .into_iter()
            .fold(0, |sum, part| usize::from(part).wrapping_add(sum));
        let entries = filled(SegmentEntry::EMPTY, entries).map_err(no_memory)?;
        let groups =
            filled(BlockGroup::EMPTY, BlockGroup::needed(shape.copy)).map_err(no_memory)?;
        let mappings = filled(Mapping::FREE, usize::from(shape.map)).map_err(no_memory)?;
        let grants = GuestGrants::new(domain, pages).map_err(no_memory)?;
        let buffers = usize::from(grants.descriptor_buffers());
        let tally = QueueTally::new(setup.totals, slots).map_err(no_memory)?;
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
            backend,
            around: Surroundings {
                disk: setup.disk.clone(),
                events: setup.events.clone(),
                tally,
                control: control.clone(),
                leads: index == 0,
            },
        });
        let state = KBox::init(state, GFP_KERNEL).map_err(no_memory)?;
        Ok((state, grants))
    }

    /// Serves the ring until told to end, and gives it and the event channel back. Returns the command that ended it,
    /// and the rest of the queue.
    // Not part of its caller, so that its frame is gone during the wait for the rest.
    #[inline(never)]
    fn serve<'a>(
        &'a mut self,
        ring: BackRing<()>,
        grants: &'a mut GuestGrants,
        context: &'a BlockingContext<'a>,
    ) -> (QueueCommand, Left<'a, D>) {
        let guest = context.guest;
        let (ring, ()) = ring.replace(guest);
        let server = Serving {
            guest,
            around: &self.around,
        };
        let mut engine = Engine::new(
            ring,
            grants,
            BlockingBackend {
                backend: &mut self.backend,
                context,
            },
            EngineTables {
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
        let command = server.serve(&mut engine, self.limits.sectors);
        server.show(&mut engine);
        let left = engine.detach();
        // The owner may publish state Closed only when ring and event channel are gone.
        guest.let_go();
        (command, left)
    }
}

/// Engine of a queue that has let go of its guest.
type Left<'a, D> = DetachedEngine<
    'a,
    &'a mut GuestGrants,
    BlockingBackend<'a, &'a mut <D as QueueBackends>::Backend>,
>;

/// The thread while the engine has the rest of its state.
struct Serving<'a, D> {
    guest: &'a GuestMapping,
    around: &'a Surroundings<D>,
}

impl<'a, D: QueueBackends> Serving<'a, D> {
    /// Serves the ring until it has a command to end, which it returns.
    // Not part of its caller, so that each of the two has a small frame.
    #[inline(never)]
    fn serve<G: Grants, B: Backend>(
        &self,
        engine: &mut Engine<'_, &'a GuestMapping, G, B>,
        mut sectors: u64,
    ) -> QueueCommand {
        let mut broken = false;
        let mut active = false;
        let mut hidden = 0u8;
        let mut draining = None;
        let mut held: u64 = 0;
        let mut pollers = Pollers::new();
        let mut halts = HaltEstimator::new(params::halt_nanoseconds());
        let mut reclaim = IdleReclaim::new(&self.around.tally);
        loop {
            let command = self.around.control.command();
            // Before the pass: the guest may know of a new size already.
            sectors = self.limits_changed(engine, sectors);
            self.measure(engine);
            let pass = match command {
                QueueCommand::Wait | QueueCommand::Serve => engine.pass(),
                QueueCommand::Drain | QueueCommand::Finish => engine.drain_pass(),
                QueueCommand::Abandon => return QueueCommand::Abandon,
            };
            if pass.notify {
                self.guest.notify();
            }
            if params::WASTEFUL {
                (1..pass.answered).for_each(|_| self.guest.notify());
            }
            let traced = self.guest.traced();
            traced.pass(pass.taken, pass.answered, pass.notify);
            reclaim.after_pass(engine);
            pollers.passed(pass.taken.max(pass.answered), engine.gathers());
            active |= pass.taken > 0;
            if pass.broken && !broken {
                broken = true;
                self.around.events.clone().ring_broken();
            }
            if command >= QueueCommand::Drain && engine.in_flight() == 0 {
                return QueueCommand::Drain;
            }
            let left = self.time_left(command, &mut draining);
            if left == Some(0) {
                return QueueCommand::Abandon;
            }
            if self.must_go_on(command, &pass, engine, &mut pollers) {
                self.show_rarely(engine, &mut hidden);
                cond_resched();
                continue;
            }
            let start = local_clock();
            let wake_event = &self.around.control.wake_event;
            held = if pass.held { held.saturating_add(1) } else { 0 };
            let pause = longest_pause(left, held);
            self.end_event(broken, &mut active);
            let serves = pause.is_none() && command == QueueCommand::Serve;
            let in_flight = engine.in_flight();
            let halts_here = serves && !leaves_to_tasks(engine);
            let disk = (&*self.around.disk, sectors);
            let mut work =
                LentEngine::new(engine, disk, self.guest, wake_event, &self.around.tally);
            let lends = in_flight <= LENT_IN_HALT;
            if halts_here && work.while_lent(lends, |lent| halt::wait(&mut halts, lent, start)) {
                self.show_rarely(work.engine(), &mut hidden);
                // The thread may never sleep.
                cond_resched();
            } else {
                let borrows = reclaim.before_sleep(work.engine(), start);
                self.show(work.engine());
                let length = match pause {
                    Some(nanoseconds) => SleepLength::For(nanoseconds),
                    None if work.engine().must_sleep_briefly() => SleepLength::Briefly,
                    None if borrows || !serves || self.around.leads => SleepLength::ForAWhile,
                    None => SleepLength::Long,
                };
                work.while_lent(serves, |lent| sleep(lent, length));
            }
            let calls = work.calls();
            active |= work.took();
            engine.woken(wake_event.woken_ns());
            // What came in the meantime and was answered without the thread would have been waits of its own.
            let waited = local_clock().saturating_sub(start) / u64::from(calls).saturating_add(1);
            halts.waited(waited);
            pollers.slept(in_flight, waited);
        }
    }

    /// Begins to count how long things take, or ends that.
    fn measure<G: Grants, B: Backend>(&self, engine: &mut Engine<'_, &GuestMapping, G, B>) {
        let wanted = self.around.tally.measures();
        if engine.latencies().is_on() != wanted {
            engine.latencies().switch(wanted);
            self.around.control.wake_event.time(wanted);
        }
    }

    /// Publishes the counters.
    fn show<G: Grants, B: Backend>(&self, engine: &mut Engine<'_, &GuestMapping, G, B>) {
        self.around.tally.show(engine.stats(), engine.flight());
        if engine.latencies().is_on() {
            self.around.tally.show_latencies(engine.latencies());
        }
    }

    /// Publishes the counters once in a while; `hidden` counts the calls.
    fn show_rarely<G: Grants, B: Backend>(
        &self,
        engine: &mut Engine<'_, &GuestMapping, G, B>,
        hidden: &mut u8,
    ) {
        *hidden = hidden.wrapping_add(1);
        if *hidden % HIDDEN == 0 {
            self.show(engine);
        }
    }

    /// Nanoseconds for which I/O in flight may still be waited for; `None` if that has no end, or while the ring is
    /// served. `since` is when this began to count.
    fn time_left(&self, command: QueueCommand, since: &mut Option<u64>) -> Option<u64> {
        if command != QueueCommand::Finish {
            return None;
        }
        let now = local_clock();
        let waited = now.saturating_sub(*since.get_or_insert(now));
        match self.around.disk.drain() {
            Drain::MustFinish => None,
            Drain::Detachable { timeout_ns } => Some(timeout_ns.saturating_sub(waited)),
        }
    }

    fn must_go_on<G: Grants, B: Backend>(
        &self,
        command: QueueCommand,
        pass: &Pass,
        engine: &mut Engine<'_, &GuestMapping, G, B>,
        pollers: &mut Pollers,
    ) -> bool {
        if pass.again || self.around.control.command() != command {
            return true;
        }
        if command != QueueCommand::Serve {
            return false;
        }
        let (wake_event, in_flight) = (&self.around.control.wake_event, engine.in_flight());
        // The process's task answers meanwhile; a thread that polls would keep it from that.
        if leaves_to_tasks(engine) {
            return engine.must_stay_awake();
        }
        if pollers.wait(in_flight, || {
            wake_event.is_notified() || engine.has_requests()
        }) {
            return true;
        }
        engine.must_stay_awake()
    }

    /// Ends the event that woke us. The event of a broken ring is never ended: its guest gets no further attention.
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
        engine: &mut Engine<'_, &GuestMapping, G, B>,
        known: u64,
    ) -> u64 {
        let sectors = self.around.disk.sectors();
        if sectors != known {
            // A device that is gone has no size. The guest's requests are as good as before and fail there.
            if sectors != 0 {
                engine.set_sectors(sectors);
            }
            self.around.events.clone().reconcile();
        }
        sectors
    }
}
