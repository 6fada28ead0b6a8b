// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A disk whose process maps extents for the kernel and keeps changing them: the real shadow and the real map between
//! guests, a kernel that executes with delays, and processes that copy, move and free clusters, and die.
//!
//! The oracle is the history of the guest, as for every disk: the requests must have an order in which an answered
//! request comes before a later one, and each read returns the data of the writes before it, whether queues or
//! processes executed them. Requests that queues execute concurrently have no order, even if they overlap. After a
//! flush, a power cut loses no write that was answered before it. A lying process harms only its own disk.

mod guest;
mod image;
mod kernel;
mod process;

use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::extent::{BackingNumber, Sectors};
use ring::tap::map::tree::{Leaf, LeafSlot};
use ring::tap::map::{ExtentMap, MapBacking};
use ring::tap::shadow::Shadow;
use ring::tap::table::TagEntry;

use crate::rng::Rng;
use guest::MappedGuest;
use image::{SimImage, BASE, CLUSTERS, FIRST, SECOND, SECTORS};
use kernel::{RequestWay, RunningRequest, SimExpress};
use process::MappedProcess;

/// Clusters with most of the requests, moves and lookups.
const HOT: u64 = 6;
/// Clusters of calm requests.
const CALM: u64 = 2;
/// Tags of the queue that executes mapped requests; the other queue executes none.
const ABLE: std::ops::Range<u16> = 0..8;
const UNABLE: std::ops::Range<u16> = 8..11;
/// Steps after which a case counts as stuck.
const PATIENCE: u32 = 200_000;

type DiskMap = Option<Box<ExtentMap<Vec<LeafSlot>, Vec<Leaf>>>>;

/// A fault in the surroundings of the shadow and the map, or a broken rule of theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappedFault {
    /// A recall returns while the recalled range is in use.
    RecallAtOnce,
    /// Requests that the process gets, answers or leaves do not change the map.
    ForgetChanges,
    /// A process begins with the mappings of the last one.
    KeepAtStart,
    /// The next process gets a request that a queue executes.
    GiveAway,
    /// A queue executes a mapped request without waiting for overlapping ones.
    IgnoreOverlap,
    /// A lookup from before a change counts after it.
    IgnoreGeneration,
    /// The process maps a cluster before the image has it there.
    TellEarly,
    /// A flush of the disk flushes its first store only.
    FlushOne,
    /// The process gets a failed request whose data is in mapped pages, as if the data were in the arena.
    ServeMapped,
    /// A queue gives express up while it executes requests in it.
    LeaveEarly,
    /// A queue begins requests in express after it has given that up.
    KeepExtent,
}

/// Plan of a case; chances are in a hundred.
#[derive(Clone, Copy, Debug)]
pub struct MappedPlan {
    /// Requests of the guest.
    pub requests: u32,
    /// Processes that die.
    pub deaths: u32,
    /// Chance of a death in each step.
    pub death: u64,
    /// A part of the disk is in a shared store.
    pub base: bool,
    /// The kernel executes flushes, and another store is added later.
    pub grows: bool,
    /// Chance that a step of a process moves a cluster.
    pub moves: u64,
    /// Chance that a read or write of the queue that executes requests has its data in mapped pages of the guest.
    pub mapped: u64,
    /// Chance that a request which a queue executes fails.
    pub failing: u64,
    /// Chance that it takes long.
    pub slow: u64,
    /// Chance that the process lies.
    pub lies: u64,
    /// Requests in a row that need no process before the queue gets express.
    pub streak: u32,
    /// Chance that a request is a read or write of a few clusters by the queue that executes requests.
    pub calm: u64,
}

impl Default for MappedPlan {
    fn default() -> Self {
        Self {
            requests: 150,
            deaths: 3,
            death: 1,
            base: true,
            grows: false,
            moves: 10,
            mapped: 30,
            failing: 5,
            slow: 10,
            lies: 0,
            streak: u32::MAX,
            calm: 0,
        }
    }
}

/// Events of a case.
#[derive(Clone, Copy, Debug, Default)]
pub struct MappedCounts {
    /// Requests that queues executed.
    pub executed: u64,
    /// Requests among them that failed there.
    pub redone: u64,
    /// Requests that were begun with their data mapped.
    pub begun_mapped: u64,
    /// Requests among them that failed, and were posted anew.
    pub failed_mapped: u64,
    /// Requests with mapped data that could not be begun, and were posted anew.
    pub taken_back: u64,
    /// Requests that queues began when they had waited for others.
    pub resumed: u64,
    /// Requests that processes executed.
    pub served: u64,
    /// Clusters that were copied for a write.
    pub copied: u64,
    /// Clusters that were moved.
    pub moved: u64,
    /// Clusters that were discarded.
    pub freed: u64,
    /// Recalls that had to wait.
    pub waited: u64,
    /// Mappings of processes that were refused.
    pub refused: u64,
    /// Processes that began while queues executed requests.
    pub begun_beside: u64,
    /// Processes that died.
    pub deaths: u64,
    /// Flushes that queues executed.
    pub flushed: u64,
    /// Flushes that processes executed.
    pub synced: u64,
    /// Extents that were forgotten for lack of room.
    pub evicted: u64,
    /// Requests that were begun in express.
    pub begun_in_express: u64,
    /// Times that the queue gave express up.
    pub left_express: u64,
}

impl MappedCounts {
    /// Adds the counts of another case.
    pub fn add(&mut self, other: &Self) {
        self.executed += other.executed;
        self.redone += other.redone;
        self.begun_mapped += other.begun_mapped;
        self.failed_mapped += other.failed_mapped;
        self.taken_back += other.taken_back;
        self.resumed += other.resumed;
        self.served += other.served;
        self.copied += other.copied;
        self.moved += other.moved;
        self.freed += other.freed;
        self.waited += other.waited;
        self.refused += other.refused;
        self.begun_beside += other.begun_beside;
        self.deaths += other.deaths;
        self.flushed += other.flushed;
        self.synced += other.synced;
        self.evicted += other.evicted;
        self.begun_in_express += other.begun_in_express;
        self.left_express += other.left_express;
    }
}

/// Everything in a case.
struct MappedScene {
    rng: Rng,
    plan: MappedPlan,
    fault: Option<MappedFault>,
    shadow: Shadow<Vec<TagEntry>, DiskMap>,
    image: SimImage,
    guest: MappedGuest,
    /// Requests that queues execute.
    running: Vec<RunningRequest>,
    /// The queue was woken to begin a request.
    told: bool,
    express: SimExpress,
    process: Option<MappedProcess>,
    deaths: u32,
    problems: Vec<String>,
    counts: MappedCounts,
}

/// Runs the case of a seed. Returns the violations, and the counts.
pub fn run_mapped(
    seed: u64,
    plan: &MappedPlan,
    fault: Option<MappedFault>,
) -> (Vec<String>, MappedCounts) {
    let mut scene = MappedScene::new(seed, plan, fault);
    for _ in 0..PATIENCE {
        if !scene.problems.is_empty() || scene.is_over() {
            break;
        }
        scene.step();
    }
    scene.judge_the_end();
    scene.counts.evicted = scene.map_seen().evicted();
    (scene.problems, scene.counts)
}

fn number(store: u16) -> BackingNumber {
    BackingNumber::new(store).expect("a small number")
}

impl MappedScene {
    fn new(seed: u64, plan: &MappedPlan, fault: Option<MappedFault>) -> Self {
        // One leaf only, so that some extents are forgotten.
        let memory = (vec![LeafSlot::FREE; 1], vec![Leaf::FREE; 1]);
        let map = ExtentMap::new(memory.0, memory.1, SECTORS, true);
        let tags = usize::from(UNABLE.end);
        let mut shadow = Shadow::with_map(vec![TagEntry::FREE; tags], Some(Box::new(map)));
        shadow.set_able(0, true);
        shadow.set_express_streak(plan.streak);
        let image = SimImage::new(plan.base);
        let mut scene = Self {
            rng: Rng::new(seed),
            plan: *plan,
            fault,
            shadow,
            guest: MappedGuest::new(&image, plan.requests),
            image,
            running: Vec::new(),
            told: false,
            express: SimExpress::default(),
            process: None,
            deaths: plan.deaths,
            problems: Vec::new(),
            counts: MappedCounts::default(),
        };
        scene.add_backing(FIRST);
        if plan.base {
            scene.add_backing(BASE);
        }
        scene
    }

    /// Adds a backing, as the supervisor does.
    fn add_backing(&mut self, store: u16) {
        let backing = MapBacking {
            sectors: self.image.sectors_of(store),
            block: 1,
            writable: store != BASE,
        };
        assert!(self.map().add_backing(number(store), backing));
    }

    fn map(&mut self) -> &mut ExtentMap<Vec<LeafSlot>, Vec<Leaf>> {
        self.shadow.map().as_mut().expect("it has one")
    }

    fn map_seen(&self) -> &ExtentMap<Vec<LeafSlot>, Vec<Leaf>> {
        self.shadow.map_seen().as_ref().expect("it has one")
    }

    fn cluster(&mut self) -> u64 {
        let most = if self.rng.percent(75) { HOT } else { CLUSTERS };
        self.rng.below(most)
    }

    fn commits(&self, fault: MappedFault) -> bool {
        self.fault == Some(fault)
    }

    fn problem(&mut self, what: String) {
        self.problems.push(what);
    }

    /// Makes a change that the map must not learn of, if the fault is planted.
    fn unnoticed<T>(&mut self, fault: MappedFault, change: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.commits(fault).then(|| self.shadow.map_seen().clone());
        let result = change(self);
        if let Some(before) = before {
            *self.shadow.map() = before;
        }
        result
    }

    /// Wakes the queue after a change of waiting requests or of the map.
    fn announce(&mut self) {
        self.withdraw_express();
        self.shadow.sort();
        self.told |= self.shadow.take_resumable() & 1 != 0;
    }

    fn is_over(&self) -> bool {
        self.guest.is_content()
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..3 => self.post_anew(),
            3..12 => self.post(),
            12..24 => self.execute_some(),
            24..30 => self.resume(),
            30..36 => self.reap(),
            36 if self.plan.grows && self.rng.percent(10) => self.grow(),
            _ => self.run_process(),
        }
    }

    fn grow(&mut self) {
        if !self.map_seen().has_backing(number(SECOND)) {
            self.add_backing(SECOND);
        }
    }

    fn run_process(&mut self) {
        if self.process.is_none() {
            return self.begin_process();
        }
        // It dies most likely while queues execute requests.
        let death = self.plan.death * if self.running.is_empty() { 1 } else { 4 };
        if self.deaths > 0 && self.rng.percent(death) {
            self.deaths -= 1;
            return self.kill();
        }
        self.step_process();
    }

    fn begin_process(&mut self) {
        // A guest is not always without a process for long.
        if !self.rng.percent(20) {
            return;
        }
        let epoch = self.shadow.opened().expect("nobody has it");
        self.counts.begun_beside += u64::from(!self.running.is_empty());
        let started = self.unnoticed(MappedFault::KeepAtStart, |scene| {
            scene.shadow.started(epoch)
        });
        if let Ok(failed) = started {
            assert_eq!(failed.count, 0, "there is no limit of deaths");
        } else {
            self.problem(format!("a process cannot start: {started:?}"));
        }
        self.announce();
        self.process = Some(MappedProcess::new(epoch, &self.image, self.plan.grows));
    }

    fn kill(&mut self) {
        self.process = None;
        self.counts.deaths += 1;
        self.shadow.closed();
        let failed = self.unnoticed(MappedFault::ForgetChanges, |scene| scene.shadow.quiet(0));
        assert_eq!(failed.map(|failed| failed.count), Some(0), "all is local");
        if self.commits(MappedFault::GiveAway) {
            let of_shadow = |running: &&RunningRequest| running.way == RequestWay::Shadow;
            for running in self.running.iter().filter(of_shadow) {
                let _given = self
                    .shadow
                    .ended(DiskTag::new(running.tag), ResponseStatus::Error);
            }
        }
        self.announce();
    }

    /// Returns true if a request that overlaps a range is being executed.
    fn is_executing(&self, range: &Sectors) -> bool {
        let beside = |running: &RunningRequest| {
            running.way == RequestWay::Beside && running.range.common(range).is_some()
        };
        self.shadow.is_executing(range) || self.running.iter().any(beside)
    }

    fn judge_the_end(&mut self) {
        if !self.problems.is_empty() {
            return;
        }
        if !self.is_over() {
            let what = format!("never answered: {:?}", self.guest.unanswered());
            return self.problem(what);
        }
        if self.image.is_foreign_written() {
            self.problem("a store was written that is not the disk's to write".into());
        }
        if self.plan.lies > 0 {
            return;
        }
        for sector in 0..SECTORS {
            if let Err(what) = self.guest.look(sector, self.image.sector(sector)) {
                return self.problem(format!("in the end {what}"));
            }
        }
    }
}
