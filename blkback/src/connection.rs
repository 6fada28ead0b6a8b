// SPDX-License-Identifier: GPL-2.0-only

//! A connection: all queues of a device, from connect to disconnect.

use crate::backing::{BackingDisk, QueueBackends};
use crate::connect_error::ConnectError;
use crate::events::DeviceEvents;
use crate::linux::memory::vectors::push;
use crate::linux::module::ModuleReference;
use crate::linux::task::workqueue;
use crate::linux::xen::device::XenDevice;
use crate::linux::xen::store;
use crate::memory::Reservation;
use crate::proto::frontend::{self, Offer};
use crate::proto::state::Ending;
use crate::queue::{Prepared, Queue, QueueSetup, ThreadEnds};
use crate::ring::abi::Protocol;
use crate::ring::request::RequestLimits;
use crate::totals::Totals;
use kernel::prelude::*;
use kernel::str::CString;
use kernel::sync::atomic::{ordering::Full, ordering::Relaxed, Atomic};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::workqueue::{impl_has_work, new_work, Work, WorkItem};

/// The device that connects to a disk.
pub(crate) struct Peer<'a> {
    /// Receiver of events of the queues.
    pub(crate) events: Arc<dyn DeviceEvents>,
    /// Counters of the device.
    pub(crate) totals: &'a Arc<Totals>,
    /// The device on the bus.
    pub(crate) device: &'a Arc<XenDevice>,
    /// Limits of the guest's requests.
    pub(crate) limits: &'a RequestLimits,
    /// Offer to its frontend: queues, ring size and protocol.
    pub(crate) offer: &'a Offer,
    /// The backend announces persistent grants: pages that the guest keeps granted stay mapped.
    pub(crate) keeps_grants: bool,
    /// Memory of the guest that is reserved for the disk.
    pub(crate) reservation: Option<&'a Reservation>,
}

/// A disk to which a device can connect, whatever serves it. This is the last indirect call: the
/// queues know the backend of their disk by its type.
pub(crate) trait Connect: BackingDisk {
    /// Connects to the frontend as its directory says. All or nothing. May sleep.
    fn connect(self: Arc<Self>, peer: &Peer<'_>) -> Result<Arc<Connection>, ConnectError>;
}

impl<D: QueueBackends> Connect for D {
    fn connect(self: Arc<Self>, peer: &Peer<'_>) -> Result<Arc<Connection>, ConnectError> {
        Connection::new(&self, peer)
    }
}

/// All queues of a connected device.
#[pin_data]
pub(crate) struct Connection {
    queues: KVec<Queue>,
    threads: Arc<Threads>,
    asked: frontend::FrontendRequest,
    limits: RequestLimits,
    #[pin]
    work: Work<Connection>,
    // Last: the threads run the module's code.
    _module: ModuleReference,
}

/// The end of a connection's threads, for which no caller waits: the last thread to finish its I/O queues the work that
/// fetches them all.
#[pin_data]
struct Threads {
    /// Threads that may still wait for I/O, and one until the connection is released.
    left: Atomic<u32>,
    #[pin]
    released: Mutex<Option<Arc<Connection>>>,
}

impl Threads {
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                left: Atomic::new(1),
                released <- new_mutex!(None, "Threads::released"),
            }),
            GFP_KERNEL,
        )
    }
}

impl ThreadEnds for Threads {
    fn add_thread(&self) {
        self.left.fetch_add(1, Relaxed);
    }

    fn done(&self) {
        if self.left.fetch_sub(1, Full) != 1 {
            return;
        }
        let connection = self.released.lock().take();
        if let Some(connection) = connection {
            // Only this function queues it.
            let _queued = workqueue::enqueue(connection);
        }
    }
}

impl_has_work! {
    impl HasWork<Self> for Connection { self.work }
}

impl Connection {
    /// Connects to the frontend as its directory says. All or nothing. May sleep.
    fn new<D: QueueBackends>(disk: &Arc<D>, peer: &Peer<'_>) -> Result<Arc<Self>, ConnectError> {
        let dir: &XenDevice = peer.device;
        let request = frontend::FrontendRequest::read(dir, peer.offer)?;
        let mut limits = *peer.limits;
        // A barrier orders one queue only; frontends with several have no use for it.
        limits.barrier &= request.queues == 1;
        // Published again before the frontend sees Connected, which is when it looks.
        let max_segments = disk.max_segments(request.queues);
        limits.max_indirect_segments = limits.max_indirect_segments.min(max_segments);
        let setup = QueueSetup {
            device: peer.device,
            events: &peer.events,
            totals: peer.totals,
            request: &request,
            disk,
            limits: &limits,
            keeps_grants: peer.keeps_grants && request.keeps_grants,
            reservation: peer.reservation,
        };
        let no_memory = |_| ConnectError::Step("not enough memory for the queues", ENOMEM);
        let mut prepared = KVec::with_capacity(request.queues as usize, GFP_KERNEL)
            .map_err(|_| no_memory(ENOMEM))?;
        for index in 0..request.queues {
            let ring = request.ring(dir, index)?;
            let queue = Prepared::new(&setup, &ring, index)?;
            push(&mut prepared, queue).map_err(no_memory)?;
        }
        Self::start(peer.device, prepared, request, limits)
            .map_err(|error| ConnectError::Step("the queues' threads cannot be started", error))
    }

    /// Starts the threads; all or none.
    fn start<D: QueueBackends>(
        device: &XenDevice,
        prepared: KVec<Prepared<D>>,
        asked: frontend::FrontendRequest,
        limits: RequestLimits,
    ) -> Result<Arc<Self>> {
        let mut queues = KVec::with_capacity(prepared.len(), GFP_KERNEL)?;
        let module = ModuleReference::get().ok_or(ENODEV)?;
        let threads = Threads::new()?;
        let ending: Arc<dyn ThreadEnds> = threads.clone();
        let name = thread_name(device);
        for (index, queue) in prepared.into_iter().enumerate() {
            let started = CString::try_from_fmt(fmt!("{}-{index}", name.as_str()))
                .and_then(|name| queue.start(&name, &ending))
                .and_then(|queue| push(&mut queues, queue));
            // Dropping the queues that have a thread already ends these; none has served yet, so
            // there is no I/O to wait for.
            started?;
        }
        let connection = Arc::pin_init(
            pin_init!(Self {
                queues,
                threads,
                asked,
                limits,
                work <- new_work!("Connection::work"),
                _module: module,
            }),
            GFP_KERNEL,
        )?;
        connection.queues.iter().for_each(Queue::serve);
        Ok(connection)
    }

    /// Takes no more requests and lets go of the guest as `ending` says, or in a quicker way that an earlier call
    /// chose; does not wait.
    pub(crate) fn end(&self, ending: Ending) {
        self.queues.iter().for_each(|queue| queue.end(ending));
    }

    /// True once nothing of the guest is mapped or bound any more.
    pub(crate) fn is_detached(&self) -> bool {
        self.queues.iter().all(Queue::is_detached)
    }

    /// Returns a description of the frontend's request.
    pub(crate) fn summary(&self) -> Result<CString> {
        let layout = match self.asked.protocol {
            Protocol::Abi32 => "x86_32-abi",
            Protocol::Abi64 => "x86_64-abi",
        };
        CString::try_from_fmt(fmt!(
            "connected: queues {}, ring pages {}, {layout}, indirect segments {}",
            self.asked.queues,
            self.asked.pages(),
            self.limits.max_indirect_segments
        ))
    }

    /// Returns the limits of the guest's requests.
    pub(crate) fn limits(&self) -> &RequestLimits {
        &self.limits
    }

    /// Memory reserved for the queues, in KiB.
    pub(crate) fn memory_kib(&self) -> u64 {
        self.queues
            .iter()
            .fold(0, |sum, queue| queue.memory_kib().saturating_add(sum))
    }

    /// Releases the connection, whose threads have the command to end: the work queue fetches them when none of them
    /// has I/O in flight any more. Does not wait.
    pub(crate) fn release_deferred(self: Arc<Self>) {
        let threads = self.threads.clone();
        *threads.released.lock() = Some(self);
        threads.done();
    }
}

impl WorkItem for Connection {
    type Pointer = Arc<Connection>;

    fn run(this: Arc<Connection>) {
        // The last reference: dropping it waits for the threads, each of which is returning.
        drop(this);
    }
}

/// The C driver's thread name without the queue: domain and virtual device.
fn thread_name(device: &XenDevice) -> crate::proto::text::Name {
    let mut dev = [0u8; 16];
    // Threads have names for people to read: without the key it is a shorter one.
    let len = store::read(device.nodename(), c"dev", &mut dev).unwrap_or(None);
    let dev = len.and_then(|len| dev.get(..len)).unwrap_or_default();
    let dev = core::str::from_utf8(dev).unwrap_or_default();
    crate::proto::text::Name::new(format_args!("{}.{}", device.otherend_id(), dev))
}
