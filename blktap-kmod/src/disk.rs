// SPDX-License-Identifier: GPL-2.0-only

//! A disk that a process serves.

use super::areas::DiskAreas;
use super::commands::Commands;
use super::express::ExpressSignal;
use crate::backing::Attachment;
use crate::events::DeviceEvents;
use crate::linux::block::storage::DiskStorage;
use crate::linux::module::ModuleReference;
use crate::linux::monotonic_ns;
use crate::linux::task::wake_event::WakeEvent;
use crate::ring::tap::abi::{self, Info};
use crate::ring::tap::checked::NewDisk;
use crate::ring::tap::map::tree::{Leaf, LeafSlot};
use crate::ring::tap::map::ExtentMap;
use crate::ring::tap::params::{Params, Unfit};
use crate::ring::tap::shadow::{Shadow, MAX_QUEUES};
use crate::ring::tap::table::TagEntry;
use kernel::new_poll_condvar;
use kernel::prelude::*;
use kernel::sync::atomic::{
    ordering::Full, ordering::Relaxed, ordering::Release, Atomic, AtomicFlag,
};
use kernel::sync::poll::PollCondVar;
use kernel::sync::{new_spinlock, Arc, SpinLock};
use kernel::workqueue::{new_delayed_work, DelayedWork};

/// Requests that are handled at most while the lock of a disk is held.
pub(crate) const BATCH: usize = 32;

/// A disk.
#[pin_data]
pub(crate) struct TapDisk {
    /// Number of the node.
    pub(crate) minor: u32,
    /// Its device number, as `dev_t`.
    pub(crate) number: u32,
    pub(crate) areas: DiskAreas,
    /// Nanoseconds for which requests wait for a process before they fail; 0 for no limit.
    fail_after_ns: u64,
    /// Time at which they fail, by [`monotonic_ns`]; 0 if a process serves the disk.
    deadline_ns: Atomic<u64>,
    /// Size in sectors (512 bytes); 0 before it is described.
    sectors: Atomic<u64>,
    /// The disk was destroyed; no opener waits for it any more.
    pub(super) destroyed: AtomicFlag,
    #[pin]
    pub(super) inner: SpinLock<DiskInner>,
    /// Notified when there is something to fetch, and when a node can be opened again.
    #[pin]
    pub(super) ready: PollCondVar,
    #[pin]
    pub(super) fence: DelayedWork<TapDisk>,
}

/// The map of a disk, from its first backing on.
pub(super) type DiskMap = Option<KBox<ExtentMap<KVVec<LeafSlot>, KVVec<Leaf>>>>;
/// The devices and files behind a disk, by their numbers.
pub(super) type BackingTable = [Option<DiskStorage>; abi::MAX_BACKINGS as usize];

/// State under the lock of a disk. This lock is a leaf: the module takes no other lock under it, and does not sleep
/// under it.
pub(crate) struct DiskInner {
    pub(super) shadow: Shadow<KVVec<TagEntry>, DiskMap>,
    /// Backings that the map has, and those that it has lost while a request is executed in them.
    pub(super) backings: BackingTable,
    /// Number of `MAP_SET`s that were refused.
    pub(super) sets_refused: u64,
    /// Number of `MAP_RECALL`s.
    pub(super) recalls: u64,
    /// Processes that wait until no request of a range is being executed.
    pub(super) recallers: u32,
    pub(super) params: Option<Params>,
    pub(super) pid: u32,
    /// The device to which the disk is bound.
    pub(super) attachment: Option<Attachment>,
    /// The device that was refused last because of that.
    pub(super) refused: Option<Arc<dyn DeviceEvents>>,
    pub(super) commands: Commands,
    /// Present while the last process has to be fenced, because the module must stay until its I/O is over.
    pub(super) fencing: Option<ModuleReference>,
    /// Number of checks whether the fence can end.
    pub(super) looks: u32,
    /// Number of pages of the arena, from the first on, that were seen free.
    pub(super) fenced_pages: u16,
    /// The process found no request: it may be sleeping, and must be woken for the next one.
    pub(super) wanted: bool,
    /// The queues of the connection.
    pub(super) shares: [Option<Arc<QueueSignal>>; MAX_QUEUES],
}

/// State that a queue's thread shares with the callers that complete its requests.
pub(crate) struct QueueSignal {
    pub(super) wake_event: Arc<WakeEvent>,
    /// The queue has something to reap.
    pub(super) done: AtomicFlag,
    /// The queue can begin a request that waited.
    pub(super) resumable: AtomicFlag,
    pub(super) express: ExpressSignal,
}

impl QueueSignal {
    /// Tells the queue that it has something to reap.
    pub(super) fn tell(&self) {
        self.done.store(true, Release);
        self.wake_event.wake();
    }

    /// Tells the queue that it has something to reap, or reaps it in its place if the queue's thread sleeps. The disk is not
    /// locked. May sleep.
    pub(super) fn tell_or_reap(&self) {
        self.done.store(true, Release);
        self.wake_event.wake_or_work_as_task();
    }

    /// Tells the queue that it can begin a request that waited.
    fn tell_resumable(&self) {
        self.resumable.store(true, Release);
        self.wake_event.wake();
    }
}

impl TapDisk {
    /// Makes a disk. May sleep.
    // A function of its own, so that it and its caller have small stack frames: the disk is made on the stack.
    #[inline(never)]
    pub(crate) fn new(minor: u32, number: u32, new: &NewDisk) -> Result<Arc<Self>> {
        let areas = DiskAreas::new(new.arena_kib)?;
        let tags = usize::from(areas.tags());
        let mut entries = KVVec::with_capacity(tags, GFP_KERNEL)?;
        for _ in 0..tags {
            entries
                .push_within_capacity(TagEntry::FREE)
                .map_err(|_| ENOMEM)?;
        }
        let commands = Commands::new()?;
        let fail_after_ns = u64::from(new.fail_after_s.unwrap_or(0)).wrapping_mul(1_000_000_000);
        let disk = Arc::pin_init(
            pin_init!(Self {
                minor,
                number,
                areas,
                fail_after_ns,
                deadline_ns: Atomic::new(0),
                sectors: Atomic::new(0),
                destroyed: AtomicFlag::new(false),
                inner <- new_spinlock!(
                    DiskInner {
                        shadow: Shadow::with_map(entries, None),
                        backings: [const { None }; abi::MAX_BACKINGS as usize],
                        sets_refused: 0,
                        recalls: 0,
                        recallers: 0,
                        params: None,
                        pid: 0,
                        attachment: None,
                        refused: None,
                        commands,
                        fencing: None,
                        looks: 0,
                        fenced_pages: 0,
                        wanted: false,
                        shares: [const { None }; MAX_QUEUES],
                    },
                    "TapDisk::inner"
                ),
                ready <- new_poll_condvar!("TapDisk::ready"),
                fence <- new_delayed_work!("TapDisk::fence"),
            }),
            GFP_KERNEL,
        )?;
        disk.inner.lock().shadow.set_death_limit(new.max_deaths);
        disk.start_waiting();
        Ok(disk)
    }

    /// Returns the size in sectors (512 bytes); 0 before it is described.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors.load(Relaxed)
    }

    /// Records that no process serves the disk from now on.
    pub(super) fn start_waiting(&self) {
        if self.fail_after_ns == 0 || self.deadline_ns.load(Relaxed) != 0 {
            return;
        }
        let deadline = monotonic_ns().saturating_add(self.fail_after_ns);
        self.deadline_ns.store(deadline, Relaxed);
    }

    /// Records that a process serves the disk again.
    pub(super) fn stop_waiting(&self) {
        self.deadline_ns.store(0, Relaxed);
    }

    /// Returns true if requests have waited for a process for as long as they may.
    pub(super) fn is_overdue(&self) -> bool {
        let deadline = self.deadline_ns.load(Relaxed);
        deadline != 0 && monotonic_ns() >= deadline
    }

    /// Describes the disk, or changes its size. The properties that guests have seen stay.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it was described before and cannot be used as guests have seen it, `ERANGE` if it is smaller and the
    /// description does not permit that.
    pub(super) fn describe(&self, params: Params) -> Result {
        let mut inner = self.inner.lock();
        let params = match inner.params {
            None => params,
            Some(before) => before.succeeded_by(&params).map_err(|why| match why {
                Unfit::Shape => EINVAL,
                Unfit::Smaller => ERANGE,
            })?,
        };
        if inner.params.is_none() {
            // No device connects and no process is started before this.
            inner.shadow.offer(params.operations());
        }
        inner.params = Some(params);
        if let Some(map) = inner.shadow.map() {
            map.resize(params.sectors);
        }
        self.sectors.store(params.sectors, Relaxed);
        inner.withdraw_express();
        // The queues look at the size before each pass.
        inner.wake_queues();
        inner.kick();
        Ok(())
    }

    /// Fails waiting requests if they have waited for too long; called by the threads of the queues. A dead process'
    /// requests count when its I/O is over.
    pub(super) fn fail_overdue(&self) {
        if !self.is_overdue() {
            return;
        }
        let mut more = true;
        while more {
            let mut inner = self.inner.lock();
            let failed = inner.shadow.fail_waiting(BATCH);
            inner.tell(failed.queues);
            more = failed.more;
        }
    }

    /// Returns true if requests can be executed in a device or file without the process.
    pub(super) fn has_backings(&self) -> bool {
        self.inner.lock().backing_bits() != 0
    }

    /// Returns true if the disk has backings, and pages of the guest can be used in all of them.
    pub(super) fn may_use_mapped(&self) -> bool {
        let inner = self.inner.lock();
        let mut backings = inner.backings.iter().flatten().peekable();
        backings.peek().is_some() && backings.all(|storage| !storage.wants_stable_pages())
    }

    /// Returns true once the disk was destroyed.
    pub(super) fn is_destroyed(&self) -> bool {
        self.destroyed.load(Relaxed)
    }

    /// Marks the disk as destroyed; callers that wait to open it are refused.
    ///
    /// # Errors
    ///
    /// `EBUSY` while it is open or bound, and while I/O of its last process may be running, because a caller that
    /// believes the disk to be gone gives its image to another one.
    pub(super) fn destroy(&self) -> Result {
        let mut inner = self.inner.lock();
        let used = !matches!(
            inner.shadow.state(),
            abi::STATE_IDLE | abi::STATE_RECOVERING
        );
        if used || inner.attachment.is_some() {
            return Err(EBUSY);
        }
        // Under the lock, under which it is opened and bound.
        let _before = self.destroyed.xchg(true, Full);
        // No queue is left that could execute something in them.
        let backings = core::mem::take(&mut inner.backings);
        drop(inner);
        drop(backings);
        self.ready.notify_all();
        Ok(())
    }

    /// Returns the memory that the disk holds, in KiB: the areas and the shadow.
    fn memory_kib(&self) -> u32 {
        let shadow = u64::from(self.areas.tags()).wrapping_mul(size_of::<TagEntry>() as u64);
        let areas = self
            .areas
            .arena_len()
            .wrapping_add(self.areas.descriptors_len());
        // CAST: an arena has 64 MiB at most.
        areas.wrapping_add(shadow).div_ceil(1024) as u32
    }

    /// Returns the node's static properties and current state (`INFO`).
    pub(crate) fn info(&self) -> Info {
        let mut info = Info {
            version: abi::VERSION,
            minor: self.minor,
            features: abi::FEATURES,
            max_segments: crate::ring::tap::arena::MAX_SEGMENTS.into(),
            descriptors_len: self.areas.descriptors_len(),
            segments_offset: self.areas.segments_offset(),
            arena_len: self.areas.arena_len(),
            sectors: self.sectors(),
            memory_kib: self.memory_kib(),
            ..Info::default()
        };
        let now = monotonic_ns();
        let inner = self.inner.lock();
        inner.shadow.describe(&mut info, now);
        let (executed, executing) = inner.express_counts();
        info.direct = info.direct.wrapping_add(executed);
        // CAST: at most as many as there are tags.
        info.executing = info.executing.wrapping_add(executing as u32);
        info.backings = inner.backing_bits();
        info.pid = inner.pid;
        let (domain, device) = inner
            .attachment
            .as_ref()
            .map_or((u32::MAX, u32::MAX), |to| (to.domain.into(), to.device));
        info.domain = domain;
        info.device = device;
        info
    }

    /// Wakes the process if it waits and there is a request to fetch, queues that can begin a request, and queues that must
    /// give express up.
    pub(super) fn announce(&self, inner: &mut DiskInner) {
        inner.withdraw_express();
        if inner.shadow.waiting() == 0 {
            return;
        }
        inner.shadow.sort();
        inner.tell_resumable();
        let waits = inner.wanted || inner.commands.is_waiting();
        if !waits || !inner.has_deliverable() {
            return;
        }
        // Wakes one command, which wakes the next one if it leaves requests.
        if let Some(command) = inner.commands.next() {
            command.wake();
        }
        if core::mem::replace(&mut inner.wanted, false) {
            self.ready.notify_all();
        }
    }
}

/// Takes the first queue of those whose bits are set.
fn take_queue(queues: &mut u64) -> Option<usize> {
    let left = *queues;
    *queues &= left.wrapping_sub(1);
    // CAST: below 64.
    (left != 0).then(|| left.trailing_zeros() as usize)
}

impl DiskInner {
    /// Schedules the device's work, which looks at the disk.
    pub(super) fn kick(&self) {
        if let Some(attachment) = &self.attachment {
            attachment.events.clone().reconcile();
        }
    }

    /// Wakes the threads of all queues, which then look at the disk.
    pub(super) fn wake_queues(&self) {
        let queues = self.shares.iter().flatten();
        queues.for_each(|share| share.wake_event.wake());
    }

    /// Tells queues, one for each bit, that they have something to reap.
    pub(super) fn tell(&self, queues: u64) {
        let mut left = queues;
        while let Some(queue) = take_queue(&mut left) {
            if let Some(Some(share)) = self.shares.get(queue) {
                share.tell();
            }
        }
    }

    /// Returns what the first queue of those whose bits are set shares, and takes its bit.
    pub(super) fn next_share(&self, queues: &mut u64) -> Option<Arc<QueueSignal>> {
        self.shares.get(take_queue(queues)?)?.clone()
    }

    /// Tells queues with requests that can begin now.
    pub(super) fn tell_resumable(&mut self) {
        let mut left = self.shadow.take_resumable();
        while let Some(queue) = take_queue(&mut left) {
            if let Some(Some(share)) = self.shares.get(queue) {
                share.tell_resumable();
            }
        }
    }

    /// Withdraws express from all queues, if something is in its way.
    pub(super) fn withdraw_express(&mut self) {
        let mut queues = self.shadow.take_withdrawn();
        while let Some(queue) = take_queue(&mut queues) {
            match self.shares.get(queue) {
                Some(Some(share)) => {
                    share.express.withdraw();
                    share.wake_event.wake();
                }
                // A queue that is gone has given it up.
                // CAST: below 64.
                _ => self.shadow.gave_up_express(queue as u16),
            }
        }
    }

    /// Returns the number of requests that the queues have executed in express, and of those in flight.
    pub(super) fn express_counts(&self) -> (u64, u64) {
        let queues = self.shares.iter().flatten();
        queues.fold((0, 0), |(ended, running), share| {
            let (more, now) = share.express.counts();
            (ended.wrapping_add(more), running.wrapping_add(now))
        })
    }

    /// Returns true if there is a request to fetch.
    pub(super) fn has_deliverable(&mut self) -> bool {
        let has = self.shadow.has_deliverable();
        self.tell_resumable();
        has
    }

    /// Wakes processes that wait for the end of a request, after one was executed.
    pub(super) fn tell_recallers(&self, waiting: &PollCondVar) {
        if self.recallers > 0 {
            waiting.notify_all();
        }
    }

    /// Returns a bit for each backing.
    pub(super) fn backing_bits(&self) -> u32 {
        let mut bits = 0u32;
        for (number, backing) in (0..).zip(&self.backings) {
            bits |= u32::from(backing.is_some()).wrapping_shl(number);
        }
        bits
    }

    /// Returns true if a frontend can be connected: the disk is described, and no queue or request of an earlier
    /// connection is left.
    pub(super) fn is_ready(&self) -> bool {
        self.params.is_some()
            && self.shadow.orphans() == 0
            && self.shares.iter().all(Option::is_none)
    }
}
