// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The shadow of a tap disk and its model: both get the same steps, and both are compared.

mod passthrough;
mod process;
mod seen;
mod step;

use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::checked::{Commit, RequestOutcome};
use ring::tap::extent::BackingNumber;
use ring::tap::map::MapBacking;
use ring::tap::shadow::{Committed, Delivered, PostedRequest, Shadow};
use ring::tap::table::TagEntry;

use crate::tap_model::{wire, For, Mappings, Model, Stage, Undone, VecMap, ARRIVED};
use crate::tap_oracle;
use passthrough::mappings;
pub use seen::TapEvents;
pub use step::{ShadowStep, OVER};

/// Queues that most requests come from.
pub const QUEUES: u16 = 2;
/// With this number of requests one call does all possible work; see `STEPS` of the shadow.
const FEW: usize = 2;
/// Time of deliveries and descriptions, in nanoseconds.
const DELIVERED: u64 = 9;
const DESCRIBED: u64 = 11;
/// Sectors of a disk that has backings, and of these.
const SIZE: u64 = 1 << 54;
/// The backings that a disk can have: an extent has an equal place in both. The second one has larger blocks.
pub const BACKINGS: [MapBacking; 2] = [
    MapBacking {
        sectors: SIZE,
        block: 1,
        writable: true,
    },
    MapBacking {
        sectors: SIZE,
        block: 8,
        writable: true,
    },
];

/// Used as a backing's number for zeroes.
pub const ZEROES: u16 = BACKINGS.len() as u16;

fn number(backing: u16) -> BackingNumber {
    BackingNumber::new(backing).expect("a small number")
}

/// The shadow and its model.
#[derive(Clone)]
pub struct Pair {
    shadow: Shadow<Vec<TagEntry>, Option<Box<VecMap>>>,
    model: Model,
    tags: u16,
    /// Queues that were woken to begin a request, and have not done so yet; one bit for each.
    told: u64,
    steps: Vec<ShadowStep>,
    /// Counts of events.
    pub seen: TapEvents,
}

impl Pair {
    /// Returns a disk with this number of tags that no process has opened.
    pub fn new(tags: u16) -> Self {
        Self {
            shadow: Shadow::with_map(vec![TagEntry::FREE; usize::from(tags)], None),
            model: Model::default(),
            tags,
            told: 0,
            steps: Vec::new(),
            seen: TapEvents::default(),
        }
    }

    /// Returns such a disk with backings, and room for enough leaves of extents that none is forgotten. The queues from
    /// which most requests come can execute requests.
    pub fn mapped(tags: u16, leaves: usize, backings: u16) -> Self {
        let mut pair = Self::new(tags);
        *pair.shadow.map() = Some(mappings(leaves, backings));
        pair.model.mappings = Mappings(Some(mappings(leaves, backings)));
        for queue in 0..QUEUES {
            pair.shadow.set_able(queue, true);
            pair.model.able |= 1 << queue;
        }
        pair
    }

    /// Returns a disk that can have no mappings, after some steps.
    pub fn with(tags: u16, steps: &[ShadowStep]) -> Self {
        Self::new(tags).after(steps)
    }

    /// Returns the pair after some steps.
    #[must_use]
    pub fn after(mut self, steps: &[ShadowStep]) -> Self {
        steps.iter().for_each(|step| self.apply(*step));
        self
    }

    /// Returns the tags that the process has, the oldest request first.
    pub fn held(&self) -> Vec<u16> {
        let held = self.model.undone.values();
        let held = held.filter(|r| r.stage == Stage::Delivered);
        held.map(|r| r.tag).collect()
    }

    /// Returns true if the disk can have mappings.
    pub fn is_mapped(&self) -> bool {
        self.model.mappings.0.is_some()
    }

    /// Returns the tags that queues execute, the oldest request first.
    pub fn begun(&self) -> Vec<u16> {
        let begun = self.model.undone.values();
        let begun = begun.filter(|r| matches!(r.stage, Stage::Direct(_)));
        begun.map(|r| r.tag).collect()
    }

    /// Returns the generation of the latest delivery of a tag.
    pub fn generation(&self, tag: u16) -> u32 {
        self.model.generations.get(&tag).copied().unwrap_or(0)
    }

    /// Takes a step on both sides and compares them.
    pub fn apply(&mut self, step: ShadowStep) {
        self.steps.push(step);
        match step {
            ShadowStep::Post(tag, queue, request) => {
                self.post(tag, queue, request);
            }
            ShadowStep::Deliver(max, ago) => self.deliver(max, ago),
            ShadowStep::Commit(tag, outcome, beside, ago) => {
                let generation = self.generation(tag).wrapping_sub(beside);
                let commit = Commit {
                    tag: DiskTag::new(tag),
                    generation,
                    outcome,
                };
                self.commit(&commit, ago);
            }
            ShadowStep::Say(bytes, ago) => match tap_oracle::completion(&bytes) {
                Some(commit) => self.commit(&commit, ago),
                None => self.seen.malformed += 1,
            },
            ShadowStep::Look => self.look(),
            ShadowStep::Reap(queue, max) => self.reap(queue, max),
            ShadowStep::Open => self.open(),
            ShadowStep::Limit(limit) => {
                self.shadow.set_death_limit(limit);
                self.model.limit = if limit == 1 { 2 } else { limit.into() };
            }
            ShadowStep::Excuse(ago) => self.excuse(ago),
            ShadowStep::Claim(fence, ago) => self.claim(fence, ago),
            ShadowStep::Start(ago) => self.start(ago),
            ShadowStep::Close => self.close(),
            ShadowStep::Quiet => self.quiet(),
            ShadowStep::Pass(ms) => self.model.clock += u64::from(ms),
            ShadowStep::Withdraw(queue) => {
                let (failed, _) = self.model.fail(usize::MAX, |_, _, r| r.queue == queue);
                assert_eq!(self.shadow.withdraw(queue) as usize, failed, "{self:?}");
                self.seen.failed += failed as u64;
            }
            ShadowStep::Orphan(queue) => self.orphan(queue),
            ShadowStep::Fail(max) => self.fail(max),
            ShadowStep::Begin(tag, queue, request) => {
                let posted = self.post(tag, queue, request);
                self.begin(tag, posted);
            }
            ShadowStep::Resume(queue, max) => self.resume(queue, max),
            ShadowStep::End(tag, status) => self.end(tag, status),
            ShadowStep::Set(..) | ShadowStep::Scatter(_) | ShadowStep::SetFlush => self.map(step),
            ShadowStep::Recall(_) | ShadowStep::Add(_) | ShadowStep::Remove(_) => self.map(step),
        }
        // One call is enough except for very many requests, of which each call sorts some.
        for _ in 0..=self.model.undone.len() {
            self.shadow.sort();
        }
        self.told |= self.shadow.take_resumable();
        self.model.sort();
        self.compare();
    }

    fn post(&mut self, tag: u16, queue: u16, request: PostedRequest) -> bool {
        let valid = tag < self.tags && usize::from(queue) < 64 && self.model.is_free(tag);
        let posted = self
            .shadow
            .post(DiskTag::new(tag), queue, &request, ARRIVED);
        assert_eq!(posted.is_ok(), valid, "{self:?}");
        if valid {
            let ordered = self.model.undone.values().any(|r| r.replay);
            self.model.undone.insert(
                self.model.sequence,
                Undone {
                    tag,
                    queue,
                    request,
                    stage: Stage::Waiting,
                    whose: For::Unknown,
                    replay: false,
                    deliveries: 0,
                    ordered,
                    orphan: false,
                    deaths: 0,
                    in_last: false,
                    proven: false,
                },
            );
            self.model.sequence += 1;
            self.seen.posted += 1;
        }
        valid
    }

    fn deliver(&mut self, max: usize, ago: u64) {
        if ago > 0 {
            let epoch = self.model.epoch.wrapping_sub(ago);
            let result = self.shadow.deliver(epoch, max, DELIVERED, |_, _| {
                panic!("an earlier process gets requests");
            });
            return assert_eq!(result, Delivered::default(), "{self:?}");
        }
        let mut left = max;
        // Each call that stops early has finished with at least one request.
        for _ in 0..=self.model.undone.len() {
            let (count, more) = self.deliver_once(left);
            assert!(count < 2 || !self.model.isolates(), "{self:?}");
            left -= count;
            if left == 0 {
                return;
            }
            if !more {
                assert_eq!(self.model.deliverable(), [], "{self:?}");
                self.seen.blocked += u64::from(self.model.count(Stage::Waiting));
                return;
            }
            let few = self.model.undone.len() <= FEW;
            assert!(!few, "so few need no second call: {self:?}");
        }
        panic!("there is always more: {self:?}");
    }

    fn deliver_once(&mut self, max: usize) -> (usize, bool) {
        let mut got = Vec::new();
        let epoch = self.model.epoch;
        let result = self.shadow.deliver(epoch, max, DELIVERED, |tag, desc| {
            got.push((tag.number(), *desc))
        });
        assert_eq!(result.count, got.len());
        for (tag, desc) in &got {
            assert!(self.model.deliverable().contains(tag), "{self:?}");
            let sequence = self.model.sequence_of(*tag).expect("it waits");
            let generation = self.model.generations.entry(*tag).or_default();
            *generation += 1;
            let request = self.model.undone.get_mut(&sequence).expect("it waits");
            request.stage = Stage::Delivered;
            let again = u64::from(request.replay);
            request.deliveries += 1;
            self.model.replayed += again;
            self.seen.replayed += again;
            let expected = request.desc(sequence, *generation);
            self.model.changes(sequence);
            assert_eq!(*desc, expected, "{self:?}");
        }
        self.seen.delivered += got.len() as u64;
        (got.len(), result.more)
    }

    fn commit(&mut self, commit: &Commit, ago: u64) {
        let epoch = self.model.epoch.wrapping_sub(ago);
        let committed = self.shadow.commit(epoch, commit);
        let Some(sequence) = self.model.meant(commit, ago) else {
            self.model.refused += 1;
            self.seen.refused += 1;
            return assert_eq!(committed, Committed::Refused, "{self:?}");
        };
        self.model.changes(sequence);
        let request = self.model.undone.get_mut(&sequence).expect("delivered");
        let queue = request.queue;
        let expected = match commit.outcome {
            _ if request.orphan => {
                self.model.undone.remove(&sequence);
                self.seen.released += 1;
                Committed::Released
            }
            RequestOutcome::Returned => {
                request.stage = Stage::Waiting;
                request.whose = For::Unknown;
                self.seen.returned += 1;
                Committed::Returned
            }
            RequestOutcome::Finished(status) => {
                self.model.finish(sequence, status);
                self.model.committed += 1;
                (self.model.answered, self.model.unproven) = (true, false);
                self.seen.committed += 1;
                Committed::Done(queue)
            }
        };
        assert_eq!(committed, expected, "{self:?}");
    }

    /// Compares the answer of the shadow, which may be wrong while very many requests wait for others, but becomes
    /// right.
    fn look(&mut self) {
        let ready = !self.model.deliverable().is_empty();
        let many = self.model.undone.len() > FEW && !ready;
        let looks = if many { self.model.undone.len() + 1 } else { 1 };
        let right = (0..looks).any(|_| self.shadow.has_deliverable() == ready);
        assert!(right, "not {ready}: {self:?}");
    }

    /// Compares the answer without changing the pair.
    fn look_on(&self) {
        self.clone().look();
    }

    fn reap(&mut self, queue: u16, max: usize) {
        let mut got = Vec::new();
        let count = self.shadow.reap(queue, max, |tag, status| {
            got.push((queue, tag.number(), status));
        });
        assert_eq!(count, got.len());
        let of_queue = self.model.done.iter().filter(|d| d.0 == queue).copied();
        let expected: Vec<_> = of_queue.take(max).collect();
        assert_eq!(got, expected, "{self:?}");
        self.model.done.retain(|d| !expected.contains(d));
    }

    fn orphan(&mut self, queue: u16) {
        // It waited for requests of queues.
        for tag in self.begun() {
            let sequence = self.model.sequence_of(tag).expect("it is there");
            if self.model.undone[&sequence].queue == queue {
                self.end(tag, ResponseStatus::Okay);
            }
        }
        let (failed, _) = self.model.fail(usize::MAX, |_, _, r| r.queue == queue);
        self.seen.failed += failed as u64;
        self.model.done.retain(|d| d.0 != queue);
        let mut orphans = 0;
        for request in self.model.undone.values_mut() {
            if request.queue == queue && !request.orphan {
                request.orphan = true;
                orphans += 1;
            }
        }
        assert_eq!(self.shadow.orphan(queue), orphans, "{self:?}");
    }

    fn fail(&mut self, max: usize) {
        let (mut count, mut queues, mut more) = (0, 0, true);
        // A call may stop early.
        for _ in 0..=self.model.undone.len() {
            if count < max && more {
                let failed = self.shadow.fail_waiting(max - count);
                (count, queues, more) = (count + failed.count, queues | failed.queues, failed.more);
            }
        }
        let may = self.model.state != abi::STATE_LIVE;
        let max = if may { max } else { 0 };
        let expected = self.model.fail(max, Model::needs_process);
        assert_eq!((count, queues), expected, "{self:?}");
        self.seen.failed += count as u64;
        let left = may && self.model.count(Stage::Waiting) > 0;
        let kept = self.begun().len() + self.model.waiting().len() > 0;
        let all = self.model.mappings.0.is_none() || !kept;
        assert!(more == left || !all, "{self:?}");
    }

    fn compare(&mut self) {
        let mut info = abi::Info::default();
        self.shadow.describe(&mut info, DESCRIBED);
        let model = &self.model;
        let delivered = model.count(Stage::Delivered);
        let mut expected = abi::Info {
            state: model.state,
            epoch: model.epoch,
            tags: u32::from(self.tags),
            waiting: model.count(Stage::Waiting),
            delivered,
            committed: model.committed,
            replayed: model.replayed,
            refused: model.refused,
            oldest_ns: if delivered > 0 {
                DESCRIBED - DELIVERED
            } else {
                0
            },
            isolated: model.isolated_undone().count() as u32,
            poisoned: model.poisoned.len() as u32,
            executing: model.executing(|_, _| true),
            direct: model.executed,
            failed_flushes: model.failed_flushes,
            ..Default::default()
        };
        let last = model.poisoned.last().cloned();
        if let Some((op, range)) = last {
            expected.poison_op = wire(op).into();
            expected.poison_sectors = range.end - range.start;
            expected.poison_sector = if range.is_empty() { 0 } else { range.start };
        }
        assert_eq!(info, expected, "{self:?}");
        let orphans = model.undone.values().filter(|r| r.orphan).count();
        assert_eq!(self.shadow.orphans() as usize, orphans, "{self:?}");
        for queue in 0..QUEUES {
            let results = model.done.iter().any(|d| d.0 == queue);
            assert_eq!(self.shadow.has_results(queue), results, "{self:?}");
        }
        if model.mappings.0.is_some() {
            self.compare_mapped();
        }
    }

    /// Brings all waiting requests to an end. Returns the counts of events.
    pub fn drain(mut self) -> TapEvents {
        if self.model.state == abi::STATE_OPEN {
            self.apply(ShadowStep::Start(0));
        }
        if self.model.state != abi::STATE_LIVE {
            for step in OVER
                .into_iter()
                .chain([ShadowStep::Open, ShadowStep::Start(0)])
            {
                self.apply(step);
            }
        }
        for _ in 0..=2 * self.tags {
            self.apply(ShadowStep::Look);
            self.apply(ShadowStep::Deliver(usize::MAX, 0));
            for queue in 0..QUEUES {
                if self.told >> queue & 1 == 1 {
                    self.apply(ShadowStep::Resume(queue, usize::MAX));
                }
            }
            if let Some(tag) = self.begun().pop() {
                self.apply(ShadowStep::End(tag, ResponseStatus::Okay));
            } else if let Some(tag) = self.held().pop() {
                self.apply(ShadowStep::Commit(
                    tag,
                    RequestOutcome::Finished(ResponseStatus::Okay),
                    0,
                    0,
                ));
            } else if self.model.deliverable().is_empty() {
                break;
            }
        }
        assert!(self.model.undone.is_empty(), "{self:?}");
        for queue in 0..64 {
            self.apply(ShadowStep::Reap(queue, usize::MAX));
        }
        assert!(self.model.done.is_empty(), "{self:?}");
        self.seen
    }
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "after {:#?}: {:#?}", self.steps, self.model)
    }
}
