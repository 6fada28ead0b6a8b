// SPDX-License-Identifier: GPL-2.0-only

//! The memory for data that all `phy:` disks of the host share: `shares` divides it, a pool keeps free blocks ready,
//! and the kernel can ask for them.
//!
//! A queue's thread never waits for memory: it takes ready blocks, or continues with those that it has. The work queue
//! fills the pool, if memory can be had without waiting for I/O.

use crate::connect_error::ConnectError;
use crate::engine::{BlockGroup, Mapping, PendingRequest, SegmentEntry};
use crate::linux::block::bio::BioDisk;
use crate::linux::bounds;
use crate::linux::memory::data::DataPages;
use crate::linux::memory::page_blocks::{AllocEffort, PageBlock, PAGES};
use crate::linux::memory::pool::Pool;
use crate::linux::memory::shrinker::{Shrink, Shrinker};
use crate::linux::monotonic_ns;
use crate::linux::task::workqueue;
use crate::linux::xen::grant::GuestGrants;
use crate::memory_quota::{Bounds, GuestLedger, HostLedger, Refusal};
use crate::params::{self, PoolSizes};
use crate::ring::abi::{Protocol, PAGE_SIZE};
use kernel::new_spinlock;
use kernel::prelude::*;
use kernel::rbtree::{RBTree, RBTreeNodeReservation};
use kernel::sync::atomic::{ordering::Acquire, ordering::Full, ordering::Relaxed};
use kernel::sync::atomic::{ordering::Release, Atomic, AtomicFlag};
use kernel::sync::{Arc, SpinLock};
use kernel::workqueue::{impl_has_work, new_work, Work, WorkItem};

/// Free blocks that are kept ready: 2 MiB.
const READY: u32 = 64;
/// The pool is filled again when it has fewer blocks.
const FEW: u32 = READY / 2;
/// Nanoseconds for which the pool is left alone after the kernel had no memory.
const PAUSE_NS: u64 = 10_000_000;
/// Pages of a block.
const BLOCK: u32 = PAGES as u32;

kernel::sync::global_lock! {
    // SAFETY: `DiskMemory::new` initialises it once, and no function uses it before `INITIALISED` is set.
    unsafe(uninit) static HOST: Mutex<Option<Arc<HostMemory>>> = None;
}

static CLAIMED: AtomicFlag = AtomicFlag::new(false);
static INITIALISED: AtomicFlag = AtomicFlag::new(false);

/// The books of the host.
struct HostBooks {
    host: HostLedger,
    /// Guests that have queues or an offer, and for each the number of users of its books.
    guests: RBTree<u16, (GuestLedger, u32)>,
}

impl HostBooks {
    /// Does something with the books of a guest that has a user of them.
    fn with<T>(
        &mut self,
        domain: u16,
        how: impl FnOnce(&mut HostLedger, &mut GuestLedger) -> T,
    ) -> Option<T> {
        let (guest, _) = self.guests.get_mut(&domain)?;
        let result = how(&mut self.host, guest);
        bounds::set_memory_kib(self.host.held().saturating_mul(4));
        Some(result)
    }
}

/// The memory of the host.
#[pin_data]
struct HostMemory {
    #[pin]
    books: SpinLock<HostBooks>,
    #[pin]
    pool: Pool,
    /// Changes when queues are to look whether they owe something.
    calls: Atomic<u32>,
    /// Number of times that the kernel has asked for memory.
    pressure: Atomic<u32>,
    /// Time at which the pool may be filled again, in nanoseconds of the monotonic clock.
    fill_after: Atomic<u64>,
    #[pin]
    work: Work<HostMemory>,
}

impl_has_work! {
    impl HasWork<Self> for HostMemory { self.work }
}

/// The bounds as the parameters are now.
fn current_bounds() -> Bounds {
    const MIB: u32 = 256;
    let host = match bounds::host_memory_mib() {
        0 => u32::try_from(crate::linux::total_ram_pages() / 4).unwrap_or(u32::MAX),
        mib => mib.saturating_mul(MIB),
    };
    Bounds {
        host,
        guest: bounds::domain_memory_mib().saturating_mul(MIB),
    }
}

/// The memory of all disks; the module holds it while it is loaded.
pub(crate) struct DiskMemory(Option<Shrinker<HostMemory>>);

impl DiskMemory {
    /// Works once in the life of the module. May sleep.
    pub(crate) fn new() -> Result<Self> {
        if CLAIMED.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The flag sees to it that this is done once, and no function uses the lock before.
        unsafe { HOST.init() };
        INITIALISED.store(true, Release);
        let store = Arc::pin_init(
            pin_init!(HostMemory {
                books <- new_spinlock!(
                    HostBooks { host: HostLedger::default(), guests: RBTree::new() },
                    "HostMemory::books"
                ),
                pool <- Pool::new(),
                calls: Atomic::new(0),
                pressure: Atomic::new(0),
                fill_after: Atomic::new(0),
                work <- new_work!("HostMemory::work"),
            }),
            GFP_KERNEL,
        )?;
        let shrinker = Shrinker::new(c"xen-blkback-rs", store.clone())?;
        *HOST.lock() = Some(store);
        Ok(Self(Some(shrinker)))
    }
}

impl Drop for DiskMemory {
    fn drop(&mut self) {
        drop(self.0.take());
        let store = HOST.lock().take();
        // Not under the lock: the free blocks go with it.
        drop(store);
    }
}

impl HostMemory {
    /// The one of the host.
    fn get() -> Result<Arc<Self>> {
        if !INITIALISED.load(Acquire) {
            return Err(ENODEV);
        }
        HOST.lock().clone().ok_or(ENODEV)
    }

    /// Asks for more free blocks, if that has not just failed.
    fn want_blocks(self: &Arc<Self>) {
        if monotonic_ns() >= self.fill_after.load(Relaxed) {
            // If it is queued already, that run does it.
            let _queued = workqueue::enqueue(self.clone());
        }
    }

    /// A guest has one more queue, or a disk that it is offered. May sleep.
    fn enter(&self, domain: u16) -> Result {
        let node = RBTreeNodeReservation::new(GFP_KERNEL)?;
        let node = node.into_node(domain, (GuestLedger::default(), 1));
        let mut books = self.books.lock();
        match books.guests.get_mut(&domain) {
            Some((_, queues)) => *queues = queues.saturating_add(1),
            None => {
                let _none = books.guests.insert(node);
            }
        }
        Ok(())
    }

    /// A queue of a guest is gone, or such a disk.
    fn leave(&self, domain: u16) {
        let mut books = self.books.lock();
        let left = books.guests.get_mut(&domain).map(|(_, queues)| {
            *queues = queues.saturating_sub(1);
            *queues
        });
        if left == Some(0) {
            books.with(domain, |host, guest| host.is_content(guest));
            let node = books.guests.remove_node(&domain);
            drop(books);
            drop(node);
        }
    }
}

impl WorkItem for HostMemory {
    type Pointer = Arc<HostMemory>;

    fn run(this: Arc<HostMemory>) {
        while this.pool.len() < READY {
            match PageBlock::new(AllocEffort::Light) {
                Ok(block) => this.pool.give(block, READY),
                Err(_) => {
                    let later = monotonic_ns().saturating_add(PAUSE_NS);
                    this.fill_after.store(later, Relaxed);
                    return;
                }
            }
        }
    }
}

impl Shrink for HostMemory {
    fn count(&self) -> usize {
        (self.pool.len() as usize).saturating_mul(PAGES)
    }

    fn free(&self, pages: usize) -> usize {
        // The pool does not take freed memory back at once.
        let later = monotonic_ns().saturating_add(PAUSE_NS);
        self.fill_after.store(later, Relaxed);
        // Queues give back what they do not use at this moment.
        self.pressure.fetch_add(1, Relaxed);
        self.calls.fetch_add(1, Relaxed);
        let mut freed: usize = 0;
        while freed < pages && self.pool.take().is_some() {
            freed = freed.saturating_add(PAGES);
        }
        freed
    }
}

/// Bytes that a queue of a `phy:` disk takes whether it is busy or not.
pub(crate) fn queue_bytes(sizes: &PoolSizes, depth: u16) -> usize {
    let slots = usize::from(depth).saturating_mul(size_of::<PendingRequest>());
    let entries = sizes.entries().saturating_mul(size_of::<SegmentEntry>());
    let groups = BlockGroup::needed(sizes.copy).saturating_mul(size_of::<BlockGroup>());
    let mappings = usize::from(sizes.map).saturating_mul(size_of::<Mapping>());
    usize::from(sizes.own)
        .saturating_mul(PAGE_SIZE)
        .saturating_add(slots)
        .saturating_add(entries)
        .saturating_add(groups)
        .saturating_add(mappings)
        .saturating_add(DataPages::bytes(sizes.copy))
        .saturating_add(BioDisk::bytes(depth))
        .saturating_add(GuestGrants::bytes(sizes.map))
}

/// Returns the number of pages for `bytes`.
fn pages(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(kernel::page::PAGE_SIZE)).unwrap_or(u32::MAX)
}

/// Returns the pages that a queue needs at most, whichever protocol its frontend chooses. `order` is the power of two of
/// pages of its ring.
pub(crate) fn queue_pages(order: u8) -> u32 {
    let slots = |protocol: Protocol| protocol.ring_size(order).unwrap_or(0);
    let slots = slots(Protocol::Abi32).max(slots(Protocol::Abi64));
    let segments = params::max_indirect_segments();
    let sizes = params::pool_sizes(slots, params::keeps_grants(), segments);
    pages(queue_bytes(
        &sizes,
        u16::try_from(slots).unwrap_or(u16::MAX),
    ))
}

/// A disk that a frontend is offered, and the memory of its guest that is reserved for what the frontend may ask for.
/// Only the work of the device uses it. Dropping it gives the reserved pages back.
pub(crate) struct Reservation {
    store: Arc<HostMemory>,
    domain: u16,
    left: Atomic<u32>,
}

impl Reservation {
    /// Counts one more disk of a guest, and returns the pages that it may be offered, if a queue needs `least`. May
    /// sleep.
    pub(crate) fn new(domain: u16, least: u32) -> Result<(Self, u32)> {
        let store = HostMemory::get()?;
        store.enter(domain)?;
        let add = |host: &mut HostLedger, guest: &mut GuestLedger| {
            host.add_disk(guest, least, current_bounds())
        };
        let share = store.books.lock().with(domain, add).unwrap_or(least);
        let left = Atomic::new(0);
        let disk = Self {
            store,
            domain,
            left,
        };
        Ok((disk, share))
    }

    /// Reserves `pages` in all, or fewer if the guest has no more left.
    pub(crate) fn hold(&self, pages: u32) {
        let left = self.left.load(Relaxed);
        let more = pages.saturating_sub(left);
        let reserve = |host: &mut HostLedger, guest: &mut GuestLedger| {
            host.reserve(guest, more, current_bounds())
        };
        let got = self.store.books.lock().with(self.domain, reserve);
        let now = left.saturating_add(got.unwrap_or(0));
        self.left.store(now, Relaxed);
    }

    /// Gives back the reserved pages: the frontend has connected, and its queues have their memory.
    pub(crate) fn settle(&self) {
        let left = self.left.xchg(0, Relaxed);
        let unreserve =
            |host: &mut HostLedger, guest: &mut GuestLedger| host.unreserve(guest, left);
        let _done = self.store.books.lock().with(self.domain, unreserve);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.settle();
        let remove = |host: &mut HostLedger, guest: &mut GuestLedger| host.remove_disk(guest);
        let _done = self.store.books.lock().with(self.domain, remove);
        self.store.leave(self.domain);
    }
}

/// Part of the host's memory that one queue has. Dropping it gives back the promised pages; the queue must have given
/// back the lent ones before.
pub(crate) struct Lease {
    store: Arc<HostMemory>,
    domain: u16,
    promised: u32,
    lent: u32,
    /// Pages that are to be given back.
    owed: u32,
    /// The calls that were followed.
    calls: u32,
    pressure: u32,
    mappings: u32,
}

impl Lease {
    /// Promises `bytes` to a queue of a guest, first those that are reserved for its disk. May sleep.
    pub(crate) fn new(
        domain: u16,
        bytes: usize,
        reservation: Option<&Reservation>,
    ) -> Result<Self, ConnectError> {
        let failed = |error| ConnectError::Step("there is not enough memory for the queues", error);
        let store = HostMemory::get().map_err(failed)?;
        store.enter(domain).map_err(failed)?;
        let promised = pages(bytes);
        let reserved = reservation.map_or(0, |disk| disk.left.load(Relaxed));
        let mut lease = Self {
            store,
            domain,
            promised: 0,
            lent: 0,
            owed: 0,
            calls: 0,
            pressure: 0,
            mappings: 0,
        };
        lease.pressure = lease.store.pressure.load(Relaxed);
        let promise = |host: &mut HostLedger, guest: &mut GuestLedger| {
            host.promise_reserved(guest, promised, reserved, current_bounds())
        };
        let quota = Error::from_errno(-(kernel::bindings::EDQUOT as i32));
        let step = |what| Err(ConnectError::Step(what, quota));
        let result = lease.store.books.lock().with(domain, promise);
        match result {
            Some(Ok(used)) => {
                lease.promised = promised;
                if let Some(disk) = reservation {
                    disk.left.store(reserved.saturating_sub(used), Relaxed);
                }
            }
            Some(Err(Refusal::Host)) => {
                return step("the memory for the disks of all guests (host_memory_mib) is used up");
            }
            _ => {
                return step(
                    "the memory for the disks of the guest (domain_memory_mib) is used up",
                );
            }
        }
        // Other guests may have borrowed more than this promise leaves to lend.
        lease.store.calls.fetch_add(1, Relaxed);
        // Ready before the first request.
        lease.store.want_blocks();
        Ok(lease)
    }

    /// The guest.
    pub(crate) fn domain(&self) -> u16 {
        self.domain
    }

    /// Borrows a block; neither sleeps nor allocates.
    pub(crate) fn borrow(&mut self) -> Option<KBox<PageBlock>> {
        let lend = |host: &mut HostLedger, guest: &mut GuestLedger| {
            (host.lend(guest, BLOCK, current_bounds()), host.has_hungry())
        };
        let answer = self.store.books.lock().with(self.domain, lend);
        let (lent, hungry) = answer.unwrap_or((false, false));
        if !lent {
            if hungry {
                self.store.calls.fetch_add(1, Relaxed);
            }
            return None;
        }
        let block = self.store.pool.take();
        if self.store.pool.len() < FEW {
            self.store.want_blocks();
        }
        match block {
            Some(_) => self.lent = self.lent.saturating_add(BLOCK),
            None => self.settle(BLOCK),
        }
        block
    }

    /// Gives a block back.
    pub(crate) fn give_back(&mut self, block: KBox<PageBlock>) {
        self.store.pool.give(block, READY);
        let pages = BLOCK.min(self.lent);
        self.lent = self.lent.saturating_sub(pages);
        self.owed = self.owed.saturating_sub(pages);
        self.settle(pages);
    }

    fn settle(&self, pages: u32) {
        let back = |host: &mut HostLedger, guest: &mut GuestLedger| host.take_back(guest, pages);
        let _done = self.store.books.lock().with(self.domain, back);
    }

    /// Pages that are to be given back as soon as they are not used; looks into the books when
    /// there is a reason, or if `thorough`.
    pub(crate) fn owed(&mut self, thorough: bool) -> u32 {
        let calls = self.store.calls.load(Relaxed);
        if self.lent > 0 && (thorough || calls != self.calls) {
            let owed =
                |host: &mut HostLedger, guest: &mut GuestLedger| host.owed(guest, current_bounds());
            let owed = self.store.books.lock().with(self.domain, owed);
            self.owed = owed.unwrap_or(0).min(self.lent);
        }
        if calls == self.calls {
            return self.owed;
        }
        self.calls = calls;
        let pressure = self.store.pressure.load(Relaxed);
        if core::mem::replace(&mut self.pressure, pressure) != pressure {
            return self.lent;
        }
        self.owed
    }

    /// Reserves mappings of the guest's pages; `false` if it would have more than it may.
    pub(crate) fn reserve_mappings(&mut self, count: u32, most: u32) -> bool {
        let reserve =
            |_: &mut HostLedger, guest: &mut GuestLedger| guest.reserve_mappings(count, most);
        let done = self.store.books.lock().with(self.domain, reserve) == Some(true);
        if done {
            self.mappings = self.mappings.saturating_add(count);
        }
        done
    }

    /// The queue needs no more at present.
    pub(crate) fn is_content(&mut self) {
        let content = |host: &mut HostLedger, guest: &mut GuestLedger| host.is_content(guest);
        let _done = self.store.books.lock().with(self.domain, content);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let (promised, lent, mappings) = (self.promised, self.lent, self.mappings);
        let release = |host: &mut HostLedger, guest: &mut GuestLedger| {
            host.take_back(guest, lent);
            host.release(guest, promised);
            guest.release_mappings(mappings);
        };
        let _done = self.store.books.lock().with(self.domain, release);
        self.store.leave(self.domain);
    }
}
