// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The shadow of a tap disk beside its model: the same steps are done to both, and both are compared.

use ring::numbers::DiskTag;
use ring::response::Status;
use ring::tap::abi;
use ring::tap::checked::{Claimed, Commit, Fence, Outcome};
use ring::tap::shadow::{Committed, Delivered, Request, Shadow};
use ring::tap::table::Entry;

use crate::tap_model::{wire, Claim, Model, Stage, Undone, ARRIVED};
use crate::tap_oracle;

/// Queues that most requests come from.
pub const QUEUES: u16 = 2;
/// With so few requests one call does all that can be done; see `STEPS` of the shadow.
const FEW: usize = 2;
/// Times in nanoseconds: of deliveries, and descriptions.
const DELIVERED: u64 = 9;
const DESCRIBED: u64 = 11;

/// What is done to a shadow. An `ago` is how many openers earlier the process is that calls.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// A queue posts a request.
    Post(u16, u16, Request),
    /// The process fetches at most so many; and with its `ago`.
    Deliver(usize, u64),
    /// It commits a tag: with its generation or one beside it; and with its `ago`.
    Commit(u16, Outcome, u32, u64),
    /// It says any 16 bytes, as a completion; and with its `ago`.
    Say([u8; 16], u64),
    /// It asks whether there is something to fetch.
    Look,
    /// A queue takes at most so many results.
    Reap(u16, usize),
    /// A process opens the disk.
    Open,
    /// So many deaths at a request are enough.
    Limit(u8),
    /// It says that the last death was no fault of a request; and with its `ago`.
    Excuse(u64),
    /// It says when its I/O is over after its end; and with its `ago`.
    Claim(Fence, u64),
    /// It starts it; and with its `ago`.
    Start(u64),
    /// It is gone.
    Close,
    /// No I/O of it is to be seen.
    Quiet,
    /// So many milliseconds pass.
    Pass(u32),
    /// A queue begins to close.
    Withdraw(u16),
    /// A queue is gone.
    Orphan(u16),
    /// The time without a process is over: at most so many fail.
    Fail(usize),
}

/// After the end of a process its I/O is over.
pub const OVER: [Step; 3] = [Step::Quiet, Step::Pass(abi::MAX_SETTLE_MS), Step::Quiet];

/// What happened in a run; the callers check that runs are not vacuous.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Requests posted.
    pub posted: u64,
    /// Deliveries.
    pub delivered: u64,
    /// Those of requests that were delivered before.
    pub replayed: u64,
    /// Requests that waited for others when the process got all that it could.
    pub blocked: u64,
    /// Completions that gave a request its result.
    pub committed: u64,
    /// Requests that were returned.
    pub returned: u64,
    /// Requests without a queue that were released.
    pub released: u64,
    /// Completions that named no delivery.
    pub refused: u64,
    /// Completions that were malformed.
    pub malformed: u64,
    /// Processes that were fenced, with requests or without.
    pub deaths: u64,
    /// Requests that failed because nobody served them, or their queue closed.
    pub failed: u64,
    /// Requests that failed because processes died of them.
    pub poisoned: u64,
    /// Claims of processes that were served.
    pub claimed_again: u64,
    /// Looks at which I/O of a dead process could still go on where nobody sees it.
    pub unsettled: u64,
    /// Requests that failed because nobody can know whether they are over.
    pub lost: u64,
}

/// Both, side by side.
#[derive(Clone)]
pub struct Pair {
    shadow: Shadow<Vec<Entry>>,
    model: Model,
    tags: u16,
    steps: Vec<Step>,
    /// What happened.
    pub seen: Seen,
}

impl Pair {
    /// A disk with so many tags that nobody has opened.
    pub fn new(tags: u16) -> Self {
        Self {
            shadow: Shadow::new(vec![Entry::FREE; usize::from(tags)]),
            model: Model::default(),
            tags,
            steps: Vec::new(),
            seen: Seen::default(),
        }
    }

    /// The same after some steps.
    pub fn with(tags: u16, steps: &[Step]) -> Self {
        let mut pair = Self::new(tags);
        steps.iter().for_each(|step| pair.apply(*step));
        pair
    }

    /// The tags that the process has, the oldest request first.
    pub fn held(&self) -> Vec<u16> {
        let held = self.model.undone.values();
        let held = held.filter(|r| r.stage == Stage::Delivered);
        held.map(|r| r.tag).collect()
    }

    /// Generation of the latest delivery of a tag.
    pub fn generation(&self, tag: u16) -> u32 {
        self.model.generations.get(&tag).copied().unwrap_or(0)
    }

    /// Does a step on both sides and compares them.
    pub fn apply(&mut self, step: Step) {
        self.steps.push(step);
        match step {
            Step::Post(tag, queue, request) => self.post(tag, queue, request),
            Step::Deliver(max, ago) => self.deliver(max, ago),
            Step::Commit(tag, outcome, beside, ago) => {
                let generation = self.generation(tag).wrapping_sub(beside);
                let commit = Commit {
                    tag: DiskTag::new(tag),
                    generation,
                    outcome,
                };
                self.commit(&commit, ago);
            }
            Step::Say(bytes, ago) => match tap_oracle::completion(&bytes) {
                Some(commit) => self.commit(&commit, ago),
                None => self.seen.malformed += 1,
            },
            Step::Look => self.look(),
            Step::Reap(queue, max) => self.reap(queue, max),
            Step::Open => self.open(),
            Step::Limit(limit) => {
                self.shadow.set_death_limit(limit);
                self.model.limit = if limit == 1 { 2 } else { limit.into() };
            }
            Step::Excuse(ago) => self.excuse(ago),
            Step::Claim(fence, ago) => self.claim(fence, ago),
            Step::Start(ago) => self.start(ago),
            Step::Close => self.close(),
            Step::Quiet => self.quiet(),
            Step::Pass(ms) => self.model.clock += u64::from(ms),
            Step::Withdraw(queue) => {
                let (failed, _) = self.model.fail(usize::MAX, |r| r.queue == queue);
                assert_eq!(self.shadow.withdraw(queue) as usize, failed, "{self:?}");
                self.seen.failed += failed as u64;
            }
            Step::Orphan(queue) => self.orphan(queue),
            Step::Fail(max) => self.fail(max),
        }
        self.compare();
    }

    fn post(&mut self, tag: u16, queue: u16, request: Request) {
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
        // Each call that stops early has looked at a request for good.
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
        let request = self.model.undone.get_mut(&sequence).expect("delivered");
        let queue = request.queue;
        let expected = match commit.outcome {
            _ if request.orphan => {
                self.model.undone.remove(&sequence);
                self.seen.released += 1;
                Committed::Released
            }
            Outcome::Returned => {
                request.stage = Stage::Waiting;
                self.seen.returned += 1;
                Committed::Returned
            }
            Outcome::Finished(status) => {
                self.model.finish(sequence, status);
                self.model.committed += 1;
                (self.model.answered, self.model.unproven) = (true, false);
                self.seen.committed += 1;
                Committed::Done(queue)
            }
        };
        assert_eq!(committed, expected, "{self:?}");
    }

    /// The answer may be wrong while very many wait for others, but it becomes right.
    fn look(&mut self) {
        let ready = !self.model.deliverable().is_empty();
        let many = self.model.undone.len() > FEW && !ready;
        let looks = if many { self.model.undone.len() + 1 } else { 1 };
        let right = (0..looks).any(|_| self.shadow.has_deliverable() == ready);
        assert!(right, "not {ready}: {self:?}");
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

    fn open(&mut self) {
        let may = [abi::STATE_IDLE, abi::STATE_RECOVERING].contains(&self.model.state);
        assert_eq!(self.shadow.opened().is_ok(), may, "{self:?}");
        if may {
            self.model.epoch += 1;
            self.model.state = abi::STATE_OPEN;
            self.model.answered = false;
            self.model.claimed = Claim::default();
            self.model.claims.clear();
            self.model.quiet = None;
        }
    }

    fn claim(&mut self, fence: Fence, ago: u64) {
        let again = self.model.state == abi::STATE_LIVE;
        let rests = match self.model.state {
            abi::STATE_OPEN => true,
            abi::STATE_LIVE => self.model.count(Stage::Delivered) == 0,
            _ => false,
        };
        let may = rests && ago == 0;
        let epoch = self.model.epoch.wrapping_sub(ago);
        let claimed = Claimed {
            fence,
            ..Claimed::BEFORE
        };
        assert_eq!(self.shadow.claim(epoch, claimed), may, "{self:?}");
        if !may {
            return;
        }
        self.model.state = abi::STATE_OPEN;
        self.model.claimed = Claim(fence);
        match fence {
            Fence::Local => self.model.claims.clear(),
            Fence::Session { .. } | Fence::None => self.model.claims.push(fence),
        }
        self.seen.claimed_again += u64::from(again);
    }

    fn excuse(&mut self, ago: u64) {
        let may = self.model.state == abi::STATE_OPEN && ago == 0;
        let epoch = self.model.epoch.wrapping_sub(ago);
        assert_eq!(self.shadow.excuse(epoch), may, "{self:?}");
        if may {
            self.model.death = None;
            let undone = self.model.undone.values_mut();
            undone.for_each(|request| request.in_last = false);
        }
    }

    fn start(&mut self, ago: u64) {
        let may = self.model.state == abi::STATE_OPEN && ago == 0;
        let epoch = self.model.epoch.wrapping_sub(ago);
        let started = self.shadow.started(epoch);
        assert_eq!(started.is_ok(), may, "{self:?}");
        let Ok(failed) = started else {
            return;
        };
        self.model.state = abi::STATE_LIVE;
        let queues = self.model.judge().map(|sequence| {
            let request = &self.model.undone[&sequence];
            let (queue, what) = (request.queue, (request.request.op, request.range()));
            self.model.poisoned.push(what);
            self.model.unproven = true;
            self.model.finish(sequence, Status::Error);
            self.seen.poisoned += 1;
            1 << queue
        });
        let expected = (usize::from(queues.is_some()), queues.unwrap_or(0), false);
        let failed = (failed.count, failed.queues, failed.more);
        assert_eq!(failed, expected, "{self:?}");
    }

    fn close(&mut self) {
        self.shadow.closed();
        if [abi::STATE_OPEN, abi::STATE_LIVE].contains(&self.model.state) {
            self.model.state = abi::STATE_FENCING;
        }
    }

    fn quiet(&mut self) {
        let now = self.model.clock * 1_000_000;
        if self.model.state != abi::STATE_FENCING {
            let nothing = self.shadow.quiet(now).map(|failed| failed.count);
            return assert_eq!(nothing, Some(0), "{self:?}");
        }
        self.model.quiet.get_or_insert(self.model.clock);
        if !self.model.is_over() {
            self.seen.unsettled += 1;
            return assert_eq!(self.shadow.quiet(now), None, "{self:?}");
        }
        let failed = self.shadow.quiet(now).map(|f| (f.count, f.queues, f.more));
        self.seen.deaths += 1;
        let held = self.model.count(Stage::Delivered);
        if held > 0 {
            self.model.death = Some((held, self.model.answered));
        }
        let undone = &mut self.model.undone;
        undone.retain(|_, r| !(r.orphan && r.stage == Stage::Delivered));
        let lost = self.lose();
        assert_eq!(failed, Some((lost.0, lost.1, false)), "{self:?}");
        for request in self.model.undone.values_mut() {
            request.ordered = true;
            if request.stage == Stage::Delivered {
                request.stage = Stage::Waiting;
                request.replay = true;
                request.in_last = true;
            }
        }
        self.model.state = match self.model.undone.is_empty() {
            true => abi::STATE_IDLE,
            false => abi::STATE_RECOVERING,
        };
    }

    /// What changes the disk is not executed again if nobody knows when its first execution is over.
    fn lose(&mut self) -> (usize, u64) {
        if self.model.claimed.0 != Fence::None {
            return (0, 0);
        }
        let undone = self.model.undone.iter();
        let lost = undone.filter(|(_, r)| r.stage == Stage::Delivered && r.writes());
        let lost: Vec<u64> = lost.map(|(sequence, _)| *sequence).collect();
        let mut queues = 0;
        for sequence in &lost {
            queues |= 1 << self.model.undone[sequence].queue;
            self.model.finish(*sequence, Status::Error);
        }
        self.seen.lost += lost.len() as u64;
        (lost.len(), queues)
    }

    fn orphan(&mut self, queue: u16) {
        let (failed, _) = self.model.fail(usize::MAX, |r| r.queue == queue);
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
        let failed = self.shadow.fail_waiting(max);
        let may = self.model.state != abi::STATE_LIVE;
        let expected = if may {
            self.model.fail(max, |_| true)
        } else {
            (0, 0)
        };
        assert_eq!((failed.count, failed.queues), expected, "{self:?}");
        self.seen.failed += expected.0 as u64;
        let left = may && self.model.count(Stage::Waiting) > 0;
        assert_eq!(failed.more, left, "{self:?}");
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
    }

    /// Everything that waits comes to its end. Returns what happened.
    pub fn drain(mut self) -> Seen {
        if self.model.state == abi::STATE_OPEN {
            self.apply(Step::Start(0));
        }
        if self.model.state != abi::STATE_LIVE {
            for step in OVER.into_iter().chain([Step::Open, Step::Start(0)]) {
                self.apply(step);
            }
        }
        for _ in 0..=2 * self.tags {
            self.apply(Step::Look);
            self.apply(Step::Deliver(usize::MAX, 0));
            let Some(tag) = self.held().pop() else {
                break;
            };
            self.apply(Step::Commit(tag, Outcome::Finished(Status::Okay), 0, 0));
        }
        assert!(self.model.undone.is_empty(), "{self:?}");
        for queue in 0..64 {
            self.apply(Step::Reap(queue, usize::MAX));
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
