// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The kernel's side of a disk that a process serves: the shadow, the descriptor area, the arena.
//!
//! The arena is the memory of the machine's data pages. The store is the machine's disk. The acts of the processes are
//! in [`crate::process`].

use std::collections::BTreeMap;

use blkback::engine::segments::Slice;
use blkback::engine::{Backend, Io, IoKind, ReapContext};
use ring::abi::PAGE_SIZE;
use ring::numbers::{DiskTag, QueueTag};
use ring::response::ResponseStatus;
use ring::tap::abi::{Desc, TapSegment};
use ring::tap::shadow::{Op, PostedRequest, Shadow};
use ring::tap::table::TagEntry;

use crate::ending::{Ghost, Sent};
use crate::history::{decode, SECTOR};
use crate::machine::{Machine, MachineFault, SharedMachine};
use crate::process::{ProcessPlan, SimProcess, Words};

/// Bytes of a sector.
pub(crate) type TapBytes = [u8; SECTOR];

/// Number of requests examined in one hold of the lock.
const BATCH: usize = 32;

/// Effect that a posted request must have when it is reaped.
#[derive(Debug)]
pub(crate) struct Posted {
    pub(crate) sector: u64,
    pub(crate) op: Op,
    pub(crate) slices: Vec<Slice>,
    /// Data that a read returns if everything is executed in arrival order.
    expected: Vec<Option<u64>>,
}

/// Events of a case, to show that it exercised something.
#[derive(Clone, Copy, Debug, Default)]
pub struct TapCounts {
    /// Processes that died.
    pub deaths: u64,
    /// Deaths of processes that had requests.
    pub deaths_in_work: u64,
    /// Requests delivered again.
    pub replayed: u64,
    /// Completions refused.
    pub refused: u64,
    /// I/Os that landed after the death of their process.
    pub late: u64,
    /// Flushes that were delivered again.
    pub flushes: u64,
    /// Writes with FUA that were delivered again.
    pub fua: u64,
    /// Discards that were delivered again.
    pub discards: u64,
    /// Pages of requests in execution that the guest rewrote.
    pub rewritten: u64,
    /// Requests that failed because no process came.
    pub failed: u64,
    /// Requests that a process had when the guest went away.
    pub orphans: u64,
    /// Requests that were taken and not answered when the driver had to leave.
    pub under_way: u64,
    /// Checks at which a remote server could still execute I/O of a dead process.
    pub unsettled: u64,
    /// I/Os that a remote server executed after their process and its pages were gone.
    pub elsewhere: u64,
    /// Requests that failed because the end of their I/O is unknown.
    pub lost: u64,
    /// Claims of processes that were served.
    pub claimed_again: u64,
    /// Processes with requests in hand that claimed a later fence.
    pub widened: u64,
}

impl TapCounts {
    /// Adds the counts of another case.
    pub fn add(&mut self, other: &Self) {
        self.deaths += other.deaths;
        self.deaths_in_work += other.deaths_in_work;
        self.replayed += other.replayed;
        self.refused += other.refused;
        self.late += other.late;
        self.flushes += other.flushes;
        self.fua += other.fua;
        self.discards += other.discards;
        self.rewritten += other.rewritten;
        self.failed += other.failed;
        self.orphans += other.orphans;
        self.under_way += other.under_way;
        self.unsettled += other.unsettled;
        self.elsewhere += other.elsewhere;
        self.lost += other.lost;
        self.claimed_again += other.claimed_again;
        self.widened += other.widened;
    }
}

/// The current queue, and its first tag.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QueuePlace {
    pub(crate) queue: u16,
    pub(crate) base: u16,
}

/// A disk that a process serves.
#[derive(Debug)]
pub struct SimTap {
    /// The shadow.
    pub shadow: Shadow<Vec<TagEntry>>,
    pub(crate) at: QueuePlace,
    descs: Vec<Desc>,
    pub(crate) segments: Vec<Vec<TapSegment>>,
    pub(crate) posted: BTreeMap<u16, Posted>,
    /// The disk if everything is executed in arrival order; `None` once a request has failed.
    pub(crate) ordered: Option<BTreeMap<u64, TapBytes>>,
    /// The process.
    pub(crate) process: Option<SimProcess>,
    /// I/O of dead processes that is still running.
    pub(crate) ghosts: Vec<Ghost>,
    /// I/O of dead processes that a remote server may still execute.
    pub(crate) sent: Vec<Sent>,
    /// Requests of the last process that must not be replayed.
    pub(crate) lost: usize,
    /// False completions that processes may send.
    pub(crate) words: Words,
    /// Plan of the case.
    pub plan: ProcessPlan,
    /// Events of the case.
    pub counts: TapCounts,
}

impl Default for SimTap {
    fn default() -> Self {
        Self::new(0, 0, ProcessPlan::default())
    }
}

impl SimTap {
    /// Returns a disk of a ring of `size` slots, which is the frontend's queue number `queue`.
    pub fn new(size: u32, queue: u16, plan: ProcessPlan) -> Self {
        let at = QueuePlace {
            queue,
            base: queue * size as u16,
        };
        Self::at(at, usize::from(at.base) + size as usize, plan)
    }

    /// Returns a disk for the queue at `at`; all of its queues together have `tags` tags.
    fn at(at: QueuePlace, tags: usize, plan: ProcessPlan) -> Self {
        Self {
            shadow: Shadow::new(vec![TagEntry::FREE; tags]),
            at,
            descs: vec![Desc::default(); tags],
            segments: vec![Vec::new(); tags],
            posted: BTreeMap::new(),
            ordered: (!plan.any_order).then(BTreeMap::new),
            process: None,
            ghosts: Vec::new(),
            sent: Vec::new(),
            lost: 0,
            words: Words::default(),
            plan,
            counts: TapCounts::default(),
        }
    }

    /// Returns true if there are results to reap.
    pub fn has_results(&self) -> bool {
        self.shadow.has_results(self.at.queue)
    }

    /// Returns true if this is the current queue.
    pub(crate) fn is_at(&self, queue: u16) -> bool {
        self.at.queue == queue
    }

    /// Returns true if requests may have failed for lack of a process, or because the end of a process's I/O is
    /// unknown.
    pub fn may_fail(&self) -> bool {
        self.plan.fail > 0 || self.plan.unknown > 0
    }
}

/// Returns the place of a sector in the arena.
pub(crate) fn place(segments: &[TapSegment], mut at: u64) -> Option<(usize, usize)> {
    for segment in segments {
        let sectors = u64::from(segment.len) / SECTOR as u64;
        if at < sectors {
            let byte = segment.offset as usize + at as usize * SECTOR;
            return Some((byte / PAGE_SIZE, byte % PAGE_SIZE));
        }
        at -= sectors;
    }
    None
}

impl Machine {
    /// Gives the disk of a migrated guest a process of its own here, for `queues` queues, of which the first one is
    /// `first`.
    pub(crate) fn serve_here(&mut self, first: u16, queues: usize, plan: ProcessPlan) {
        let counts = self.tap.counts;
        let size = self.ring.size();
        let at = QueuePlace {
            queue: first,
            base: first * size as u16,
        };
        let tags = (usize::from(first) + queues) * size as usize;
        self.tap = SimTap::at(at, tags, plan);
        self.tap.counts = counts;
        if let Some(ordered) = &mut self.tap.ordered {
            *ordered = self.disk.image();
        }
    }

    /// Drops the requests that the process has.
    pub(crate) fn give_up_jobs(&mut self) {
        if let Some(process) = &mut self.tap.process {
            process.jobs.clear();
        }
    }

    /// Removes the queue. Returns the number of requests that the process has.
    pub(crate) fn orphan(&mut self) -> u32 {
        let queue = self.tap.at.queue;
        let orphans = self.tap.shadow.orphan(queue);
        if orphans != self.tap.shadow.delivered() || self.tap.shadow.waiting() > 0 {
            self.problem(format!("{orphans} orphans, but {:?}", self.tap.shadow));
        }
        // Requests without an answer may have been executed or not.
        self.tap.ordered = None;
        self.tap.posted.clear();
        self.disk.release_all();
        orphans
    }

    /// Checks that the arena may be used for another guest.
    pub fn check_arena_is_ours(&mut self) {
        let jobs = self.tap.process.iter().map(|process| process.jobs.len());
        let running = jobs.sum::<usize>() + self.tap.ghosts.len();
        if running > 0 {
            self.problem(format!(
                "{running} I/Os use the arena, and no orphan is left"
            ));
        }
    }

    /// Returns true if the guest waits for its answers before it continues.
    pub fn waits(&self) -> bool {
        self.tap.plan.patient && self.front.outstanding() > 0
    }

    /// Returns a sector of the arena, for a process that has it mapped.
    pub(crate) fn arena(&mut self, segments: &[TapSegment], at: u64) -> &mut [u8] {
        let (page, byte) = place(segments, at).expect("segments hold all sectors of the request");
        &mut self.host.pages[page][byte..byte + SECTOR]
    }

    /// Takes an I/O of the engine.
    fn post_io(&mut self, io: &Io<'_>) {
        let request = request_of(io);
        let tag = self.tap.at.base + io.tag.number();
        let slices: Vec<Slice> = io.slices().collect();
        let segments = slices.iter().map(|slice| TapSegment {
            offset: u32::from(slice.page.number()) * PAGE_SIZE as u32 + u32::from(slice.offset),
            len: u32::from(slice.len),
        });
        self.tap.segments[usize::from(tag)] = segments.collect();
        let expected = self.execute_in_order(tag, &request);
        let posted = Posted {
            sector: io.sector,
            op: request.op,
            slices,
            expected,
        };
        let mut shown = request;
        if request.sectors > 0 && self.commit(MachineFault::HideRanges) {
            // The shadow gets a range that no other request has.
            shown.sector = (1 << 40) + (u64::from(tag) << 22);
        }
        let now = self.tick();
        let queue = self.tap.at.queue;
        if let Err(why) = self.tap.shadow.post(DiskTag::new(tag), queue, &shown, now) {
            self.problem(format!("tag {tag} cannot be posted: {why:?}"));
        }
        self.tap.posted.insert(tag, posted);
    }

    /// Applies the request to the ordered image; returns the data that a read returns.
    fn execute_in_order(&mut self, tag: u16, request: &PostedRequest) -> Vec<Option<u64>> {
        let segments = self.tap.segments[usize::from(tag)].clone();
        let sectors = request.sector..request.sector + request.sectors;
        let mut image = self.tap.ordered.take();
        let mut expected = Vec::new();
        if let Some(image) = &mut image {
            match request.op {
                Op::Read => {
                    expected = sectors
                        .map(|s| image.get(&s).map_or(Some(0), |b| decode(b)))
                        .collect();
                }
                Op::Write => {
                    for (at, sector) in (0u64..).zip(sectors) {
                        let bytes = (&*self.arena(&segments, at)).try_into().expect("a sector");
                        image.insert(sector, bytes);
                    }
                }
                Op::Flush => {}
                _ => image.retain(|sector, _| !sectors.contains(sector)),
            }
        }
        self.tap.ordered = image;
        expected
    }

    /// Checks a request whose result goes to the engine now.
    fn reaped(&mut self, tag: u16, status: ResponseStatus) {
        let Some(posted) = self.tap.posted.remove(&tag) else {
            return self.problem(format!("tag {tag} has a result and no request"));
        };
        if status != ResponseStatus::Okay || self.tap.ordered.is_none() {
            self.tap.ordered = None;
            return;
        }
        let segments = self.tap.segments[usize::from(tag)].clone();
        for (at, expected) in (0u64..).zip(&posted.expected) {
            let found = decode(self.arena(&segments, at));
            if found != *expected {
                let sector = posted.sector + at;
                self.problem(format!(
                    "sector {sector} read as {found:x?}, in arrival order it is {expected:x?}"
                ));
            }
        }
    }

    /// Checks, when everything is answered, that the store has the content that a last read would return.
    pub fn check_content(&mut self) {
        if self.tap.plan.enabled && self.front.outstanding() == 0 {
            self.look_at_content();
        }
    }

    /// Checks that the store has the content that a last read would return.
    pub(crate) fn look_at_content(&mut self) {
        let (from, to) = (self.tick(), self.tick());
        let mut sectors = self.history.sectors();
        sectors.sort_unstable();
        for sector in sectors {
            let found = self.disk.sector(sector);
            if let Err(why) = self.history.read(sector, found, from, to) {
                return self.problem(format!("in the end: {why}"));
            }
        }
    }

    /// Checks, when everything is answered, that the store equals the result of execution in arrival order.
    pub fn check_order(&mut self) {
        let Some(image) = self.tap.ordered.take() else {
            return;
        };
        if self.tap.plan.enabled && self.tap.posted.is_empty() {
            let mut sectors: Vec<u64> = image.keys().copied().collect();
            sectors.extend(self.disk.sectors());
            for sector in sectors {
                let found = self.disk.sector(sector);
                let expected = image.get(&sector).map_or(Some(0), |b| decode(b));
                if found != expected {
                    self.problem(format!(
                        "sector {sector} is {found:x?} in the end, in arrival order {expected:x?}"
                    ));
                    break;
                }
            }
        }
        self.tap.ordered = Some(image);
    }

    /// Fetches requests for the process: copies of their descriptors.
    pub(crate) fn fetch(&mut self, epoch: u64, max: usize) -> Vec<Desc> {
        let now = self.tick();
        let (shadow, descs) = (&mut self.tap.shadow, &mut self.tap.descs);
        let mut tags = Vec::new();
        let delivered = shadow.deliver(epoch, max.min(BATCH), now, |tag, desc| {
            descs[tag.index()] = *desc;
            tags.push(tag.number());
        });
        if delivered.count != tags.len() {
            self.problem(format!("{delivered:?} for {tags:?}"));
        }
        let mut fetched = Vec::new();
        for tag in tags {
            let mut desc = self.tap.descs[usize::from(tag)];
            if let Some(posted) = self.tap.posted.get(&tag) {
                // The process gets the true range, even if the shadow got a false one.
                if posted.op != Op::Flush {
                    desc.sector = posted.sector;
                }
            }
            fetched.push(desc);
        }
        fetched
    }
}

fn request_of(io: &Io<'_>) -> PostedRequest {
    let op = match io.kind {
        IoKind::Read => Op::Read,
        IoKind::Discard { secure: false } => Op::Discard,
        IoKind::Discard { secure: true } => Op::SecureDiscard,
        IoKind::Flush => Op::Flush,
        // A barrier without data.
        _ if io.sectors == 0 => Op::Flush,
        IoKind::Write | IoKind::PreFlushWrite | IoKind::BarrierWrite => Op::Write,
    };
    PostedRequest {
        op,
        preflush: matches!(io.kind, IoKind::PreFlushWrite | IoKind::BarrierWrite),
        fua: io.kind == IoKind::BarrierWrite,
        sector: io.sector,
        sectors: io.sectors,
        segments: io.count(),
    }
}

/// The engine's port to a disk that a process serves.
#[derive(Debug)]
pub struct TapBackend {
    machine: SharedMachine,
}

impl TapBackend {
    /// Returns a port to the machine's process.
    pub fn new(machine: SharedMachine) -> Self {
        Self { machine }
    }
}

impl Backend for TapBackend {
    fn submit<'b>(&mut self, _count: u16, batch: impl Iterator<Item = Io<'b>>) {
        let mut m = self.machine.borrow_mut();
        m.disk.batches += 1;
        for io in batch {
            let _running = m.accept(&io);
            m.post_io(&io);
        }
        m.wake_process();
    }

    fn reap_context(&self) -> ReapContext {
        ReapContext::Task
    }

    fn reap(&mut self, mut done: impl FnMut(QueueTag, ResponseStatus)) {
        let mut m = self.machine.borrow_mut();
        let QueuePlace { base, queue } = m.tap.at;
        loop {
            let mut results = Vec::new();
            let count = m.tap.shadow.reap(queue, BATCH, |tag, status| {
                results.push((tag.number(), status));
            });
            for (tag, status) in results {
                m.reaped(tag, status);
                let tag = QueueTag::new(tag - base);
                m.disk.release(tag);
                done(tag, status);
            }
            if count < BATCH {
                return;
            }
        }
    }

    fn now(&self) -> u64 {
        self.machine.borrow_mut().look_at_clock()
    }
}
