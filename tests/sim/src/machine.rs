// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The machine around the engine: guest, ring, grant table and disk in one place.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use ring::abi::{Protocol, PAGE_SIZE};
use ring::request::RequestLimits;

use crate::again::{Again, UnansweredRequests};
use crate::disk::{Lane, SimDisk};
use crate::frontend::Frontend;
use crate::grants::GrantHost;
use crate::history::DiskHistory;
use crate::ring::{Accesses, RingMemory};
use crate::rng::Rng;
use crate::schedule;
use crate::tap::SimTap;

/// The machine as its parts share it.
pub type SharedMachine = Rc<RefCell<Machine>>;

/// A page.
pub type Page = Box<[u8; PAGE_SIZE]>;

/// A page filled with one byte.
pub fn page(byte: u8) -> Page {
    Box::new([byte; PAGE_SIZE])
}

/// A fault planted into a fake, to show that the checker finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineFault {
    /// The disk forgets to complete an I/O.
    LoseCompletion,
    /// The disk completes an I/O again when its tag is next in use.
    DoubleCompletion,
    /// The disk reports a completion twice in a row.
    RepeatCompletion,
    /// The disk writes two sectors to each other's place.
    SwapSectors,
    /// The disk writes one sector further than the request.
    MisdirectWrite,
    /// The disk forgets to give back an I/O that it does not execute.
    LoseGivenBack,
    /// The disk executes an I/O that it has given back.
    BeginGivenBack,
    /// The disk completes a write and forgets its data.
    DropWrite,
    /// The disk completes a flush without executing it.
    IgnoreFlush,
    /// The disk reads only the first half of a sector.
    TearRead,
    /// A copy goes beyond the segment.
    CopyBeyond,
    /// A copy is reported as done but was not.
    SkipCopy,
    /// A copy hits the guest's page again after the answer.
    LateCopy,
    /// An unmap is forgotten.
    ForgetUnmap,
    /// A failed unmap is not reported.
    ForgetLost,
    /// A mapping is made and its handle withheld.
    LeakMapping,
    /// An event of the frontend is lost.
    LoseEvent,
    /// An event to the frontend is lost.
    LoseInterrupt,
    /// A response carries another identifier.
    WrongId,
    /// The disk delays one I/O for as long as there are others.
    StarveFirst,
    /// A completion does not wake the worker.
    SwallowWake,
    /// A completion that answers in place of the worker does not wake it for the rest.
    SleepOn,
    /// A worker sleeps without a limit while requests may gather that bring no event.
    SleepLong,
    /// Requests of a dead process are delivered again while its I/O is running.
    SkipFence,
    /// The shadow does not learn that the I/O of a process is executed elsewhere.
    ForgetClass,
    /// A process writes the first sector of a write once more, later.
    ExecuteTwice,
    /// The shadow gets another range than that of the request.
    HideRanges,
    /// A process keeps written data in its own memory.
    PrivateCache,
    /// A process assumes that its predecessor has executed a write.
    SkipReplay,
    /// The guest's pages are copied again before a request is delivered again.
    RereadGuest,
    /// An old completion counts as a new one.
    TrustStale,
    /// A sleeping process is not woken for requests.
    LeaveAsleep,
    /// The next guest is served while the process has requests of the last one.
    ForgetOrphans,
    /// The host claims to have lent pages and has not.
    LendNothing,
    /// Running I/O is dropped when a guest is suspended.
    AbortAtSuspend,
    /// The host gives up the image with running I/O, which ends later.
    LeaveRunning,
    /// A migrated frontend forgets one of its requests.
    ForgetReplay,
    /// A copy to the guest's page marks it as changed before the copy is made.
    MarkEarly,
    /// A request is answered before its data is in the guest's page.
    CopyLater,
    /// A page is unmapped later than the answer, and later than it was copied to another host.
    LateUnmap,
}

/// Parameters of a case.
#[derive(Clone, Debug)]
pub struct MachineSetup {
    /// Layout of the slots.
    pub protocol: Protocol,
    /// The ring has 2^order pages.
    pub order: u8,
    /// Data pages with memory.
    pub copy_pages: u16,
    /// Those of them that have it from the beginning; the others are borrowed.
    pub own_pages: u16,
    /// Maximum number of pages that the host lends; the number changes from time to time.
    pub lendable: u16,
    /// Requested blocks at which that number changes, in a hundred.
    pub fickle: u64,
    /// Data pages without memory.
    pub map_pages: u16,
    /// Largest number of segments whose data is copied.
    pub copy_max_segments: u16,
    /// The guest uses persistent grants.
    pub keeps_grants: bool,
    /// Limits of the disk.
    pub limits: RequestLimits,
    /// Descriptor buffers of the grant port.
    pub descriptor_buffers: u8,
    /// Operations that a grant batch holds.
    pub batch: usize,
    /// Mappings for which the hypervisor has room.
    pub maptrack: usize,
    /// Maps refused for lack of room, in a hundred.
    pub no_space: u64,
    /// Unmaps that fail, in a hundred: the guest's page stays mapped.
    pub stuck: u64,
    /// I/Os that complete while they are submitted, in a hundred.
    pub synchronous: u64,
    /// I/Os of which storage still holds the pages when they are done, in a hundred.
    pub holds: u64,
    /// I/Os that the disk gives back because their data is mapped, in a hundred: at submission, or later.
    pub gives_back: u64,
    /// Its completions can be collected in any context, while the worker waits.
    pub reaps_anywhere: bool,
    /// The disk serves the oldest I/O first, so that none waits for ever.
    pub fifo: bool,
    /// Accesses to the ring during which the rest of the machine makes progress, in a hundred.
    pub race: u64,
    /// Passes before which measuring is switched on or off, in a hundred: while the engine measures, each request takes
    /// all steps.
    pub measures: u64,
    /// Requests of a random frontend that are hostile, in a hundred.
    pub hostile: u64,
    /// Ring accesses during which the guest breaks the rules of the ring, in a hundred.
    pub lawless: u64,
    /// Every slot changes right after it was copied.
    pub scribble: bool,
    /// Sectors at which the disk fails.
    pub bad_sectors: std::ops::Range<u64>,
    /// Content of the ring where neither side has stored anything.
    pub junk: u8,
}

/// Behaviour of the guest on every host.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// The guest may migrate. So it reads nothing that is being written, because a repeated write may be executed
    /// again.
    pub travels: bool,
    /// Identifiers are indices of a table.
    pub small_ids: bool,
    /// Number of answered reads whose data it keeps in place.
    pub keeps_data: usize,
    /// The guest copies data that it has read away from pages that stay granted.
    pub bounces: bool,
}

impl Default for Habits {
    fn default() -> Self {
        Self {
            travels: false,
            small_ids: false,
            keeps_data: 0,
            bounces: true,
        }
    }
}

impl Default for MachineSetup {
    fn default() -> Self {
        Self {
            protocol: Protocol::Abi64,
            order: 0,
            copy_pages: 352,
            own_pages: u16::MAX,
            lendable: 0,
            fickle: 10,
            map_pages: 512,
            copy_max_segments: 11,
            keeps_grants: false,
            limits: RequestLimits {
                sectors: 4096,
                block_sectors: 1,
                read_only: false,
                max_indirect_segments: 256,
                flush: true,
                barrier: true,
                discard: true,
                secure_discard: false,
            },
            descriptor_buffers: 4,
            batch: 64,
            maptrack: 4096,
            no_space: 0,
            stuck: 0,
            synchronous: 0,
            holds: 0,
            gives_back: 0,
            reaps_anywhere: true,
            fifo: false,
            race: 0,
            measures: 0,
            hostile: 0,
            lawless: 0,
            scribble: false,
            bad_sectors: 0..0,
            junk: 0,
        }
    }
}

impl MachineSetup {
    /// Returns the setup of a queue with 16 pages, on a host that lends nothing.
    pub fn poor() -> Self {
        let usual = Self::default();
        Self {
            copy_pages: 512,
            own_pages: 16,
            map_pages: 0,
            copy_max_segments: u16::MAX,
            limits: RequestLimits {
                max_indirect_segments: 512,
                sectors: 16384,
                ..usual.limits
            },
            ..usual
        }
    }

    /// Number of entries without a page, for requests that are executed in pieces.
    pub fn rest_entries(&self) -> u16 {
        let borrows = self.own_pages < self.copy_pages;
        if borrows {
            self.limits.max_indirect_segments
        } else {
            0
        }
    }
}

/// All surroundings of the engine.
#[derive(Debug)]
pub struct Machine {
    /// Parameters of the case.
    pub setup: MachineSetup,
    /// The schedule.
    pub rng: Rng,
    /// Number of steps so far: the time of the simulation.
    pub clock: u64,
    /// Time in nanoseconds that the engine gets when it reads the clock.
    pub now: u64,
    /// Number of times that the engine has read the clock.
    pub looks: u64,
    /// Nanoseconds that the clock advances with each reading.
    pub tick: u64,
    /// Violations found.
    pub problems: Vec<String>,
    /// The shared ring.
    pub ring: RingMemory,
    /// Accesses of the engine to the ring.
    pub accesses: Accesses,
    /// One beyond the last slot that the engine copied.
    pub taken: u32,
    /// Value that `req_prod` takes right after the next read of it.
    pub rewrite_req_prod: Option<u32>,
    /// The guest.
    pub front: Frontend,
    /// The disk.
    pub disk: SimDisk,
    /// The disk's process, if it is served by one.
    pub tap: SimTap,
    /// The host's pages and mappings.
    pub host: GrantHost,
    /// History of the guest's requests.
    pub history: DiskHistory,
    /// The guest destroyed its own ring: from now on only leaks are checked.
    pub hosed: bool,
    /// Requests that completions answered while the worker slept.
    pub answered_asleep: u64,
    /// Requests that completions took while the worker slept.
    pub taken_asleep: u64,
    /// The ring is given back while the next batch of I/O is started.
    pub goes_in_submit: bool,
    /// The ring is given back while pages are unmapped of requests that the backend gave back.
    pub goes_in_unmap: bool,
    /// The ring was given back.
    pub gone: bool,
    /// The queue is being closed: a discard may end early.
    pub closing: bool,
    /// Behaviour of the guest.
    pub habits: Habits,
    /// The guest is suspended: it neither sends requests nor sees answers.
    pub suspended: bool,
    /// Requests of the guest without a seen answer, kept only if it may migrate.
    pub(crate) asked: UnansweredRequests,
    /// Pages that were copied to other hosts.
    pub(crate) copied: u64,
    /// Requests that a migrated guest must repeat.
    pub(crate) again: VecDeque<Again>,
    /// Requests that a random frontend has yet to make.
    pub plan: u32,
    /// An event came from the frontend.
    pub event: bool,
    /// The planted fault, and the number of chances that are skipped first.
    pub fault: Option<(MachineFault, u32)>,
    racing: bool,
    /// No rules are broken for now.
    pub(crate) lawful: bool,
}

impl Machine {
    /// Returns an idle machine.
    pub fn new(setup: MachineSetup, seed: u64) -> Self {
        let ring = RingMemory::new(setup.protocol, setup.order, setup.junk);
        Self {
            front: Frontend::new(ring.size()),
            disk: SimDisk::default(),
            tap: SimTap::default(),
            host: GrantHost::new(&setup),
            history: DiskHistory::default(),
            ring,
            setup,
            rng: Rng::new(seed),
            clock: 1,
            now: 1_000,
            looks: 0,
            tick: 0,
            problems: Vec::new(),
            accesses: Accesses::default(),
            taken: 0,
            rewrite_req_prod: None,
            hosed: false,
            goes_in_submit: false,
            answered_asleep: 0,
            taken_asleep: 0,
            goes_in_unmap: false,
            gone: false,
            closing: false,
            habits: Habits::default(),
            suspended: false,
            asked: UnansweredRequests::default(),
            copied: 0,
            again: VecDeque::new(),
            plan: 0,
            event: false,
            fault: None,
            racing: false,
            lawful: false,
        }
    }

    /// Connects another guest to this disk.
    pub fn reconnect(&mut self) {
        self.ring = RingMemory::new(self.setup.protocol, self.setup.order, self.setup.junk);
        self.front = self.front.next_guest(self.ring.size());
        self.accesses = Accesses::default();
        self.event = false;
        self.closing = false;
    }

    /// Moves the guest to another host, with the same disk.
    pub(crate) fn arrive(&mut self, setup: MachineSetup) {
        self.setup = setup;
        self.host = GrantHost::new(&self.setup);
        self.disk.exchange(&mut Lane::default());
        self.reconnect();
        self.suspended = false;
        if !self.setup.limits.flush {
            // The disk reports no volatile cache, so its data is durable.
            let dirty = self.disk.dirty();
            self.disk.flush(&dirty);
        }
    }

    /// Advances to the next point in time and returns it.
    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Returns the time that the engine reads from the clock.
    pub fn look_at_clock(&mut self) -> u64 {
        self.looks += 1;
        self.now = self.now.wrapping_add(self.tick);
        self.now
    }

    /// Records a violation.
    pub fn problem(&mut self, what: String) {
        if self.problems.len() < 20 {
            self.problems.push(what);
        }
    }

    /// Returns true when the planted fault is due: at every third chance.
    pub fn commit(&mut self, fault: MachineFault) -> bool {
        match &mut self.fault {
            Some((planted, left)) if *planted == fault => {
                let due = *left == 0;
                *left = match fault {
                    _ if !due => *left - 1,
                    // Of several flushes at one time each does the work of the others.
                    MachineFault::IgnoreFlush
                    | MachineFault::StarveFirst
                    | MachineFault::HideRanges => 0,
                    // I/O that a process has sent does harm only if many requests follow it.
                    MachineFault::ForgetClass => 0,
                    // Only the last moment before a move matters.
                    MachineFault::MarkEarly | MachineFault::CopyLater | MachineFault::LateUnmap => {
                        0
                    }
                    _ => 2,
                };
                due
            }
            _ => false,
        }
    }

    /// Lets the rest of the machine make progress while the engine is in the middle of a call.
    pub fn race(&mut self) {
        if !self.lawful && self.rng.percent(self.setup.lawless) {
            self.break_rules();
        }
        if self.racing || self.setup.race == 0 || !self.rng.percent(self.setup.race) {
            return;
        }
        self.racing = true;
        match self.rng.below(4) {
            0 => self.consume(),
            1 => self.backend_step(),
            _ => schedule::post_some(self),
        }
        self.racing = false;
    }
}
