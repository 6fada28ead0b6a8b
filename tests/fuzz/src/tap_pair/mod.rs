// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The shadow of a tap disk beside its model: the same steps are done to both, and both are compared.

use ring::numbers::DiskTag;
use ring::response::Status;
use ring::tap::abi;
use ring::tap::checked::{Claimed, Commit, Fence, Outcome};
use ring::tap::extent::{Access, BackingNumber, Extent, Sectors, Source};
use ring::tap::map::tree::{Leaf, Slot};
use ring::tap::map::{Backing, Map};
use ring::tap::shadow::direct::{Part, Parts, Start};
use ring::tap::shadow::{Committed, Delivered, Op, Request, Shadow};
use ring::tap::table::Entry;

use crate::tap_model::{wire, Claim, For, Mappings, Model, Stage, Undone, VecMap, ARRIVED};
use crate::tap_oracle;

/// Queues that most requests come from.
pub const QUEUES: u16 = 2;
/// With so few requests one call does all that can be done; see `STEPS` of the shadow.
const FEW: usize = 2;
/// Times in nanoseconds: of deliveries, and descriptions.
const DELIVERED: u64 = 9;
const DESCRIBED: u64 = 11;
/// Sectors of a disk that has backings, and of these.
const SIZE: u64 = 1 << 54;
/// The backings that a disk can have: an extent is at the same place in both. Of the second one blocks are larger.
pub const BACKINGS: [Backing; 2] = [
    Backing {
        sectors: SIZE,
        block: 1,
        writable: true,
    },
    Backing {
        sectors: SIZE,
        block: 8,
        writable: true,
    },
];

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
    /// A queue posts a request, and begins it if it can.
    Begin(u16, u16, Request),
    /// A queue begins at most so many that waited.
    Resume(u16, usize),
    /// A queue has executed a tag, with this result.
    End(u16, Status),
    /// The process says that a range is in a backing, or [`ZEROES`]; it knows that many changes less than there were.
    Set(Sectors, Access, u16, u32),
    /// It says that much of what requests are near to is in a backing, but in parts that lie in another order.
    Scatter(u16),
    /// It says that a flush is one of the backing.
    SetFlush,
    /// It takes a range back.
    Recall(Sectors),
    /// The disk gets a backing.
    Add(u16),
    /// The disk loses a backing.
    Remove(u16),
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
    /// Claims of processes that were served, and were not from then on.
    pub claimed_again: u64,
    /// Claims of processes that were served on.
    pub widened: u64,
    /// Looks at which I/O of a dead process could still go on where nobody sees it.
    pub unsettled: u64,
    /// Requests that failed because nobody can know whether they are over.
    pub lost: u64,
    /// Requests that a queue began at once.
    pub begun: u64,
    /// Of these, those that were in more than one part.
    pub begun_in_parts: u64,
    /// Of those that were begun, those that read zeroes.
    pub begun_with_zeroes: u64,
    /// Requests that a queue began when they had waited for others.
    pub resumed: u64,
    /// Of those that it was to begin, those that were not mapped any more.
    pub missed: u64,
    /// Requests that a queue executed.
    pub executed: u64,
    /// Requests that failed there.
    pub redone: u64,
}

/// Takes the place of a backing's number where there is none, but zeroes.
pub const ZEROES: u16 = BACKINGS.len() as u16;

fn number(backing: u16) -> BackingNumber {
    BackingNumber::new(backing).expect("a small number")
}

/// Parts of 16 sectors, of which two have changed places.
fn scatter(map: &mut VecMap, backing: u16) {
    for part in 0..264 {
        let extent = Extent {
            range: Sectors::new(16 * part, 16).expect("it is not empty"),
            place: 16 * (part ^ 1),
            source: Source::Backing(number(backing)),
            access: Access::ReadWrite,
        };
        let _taken = map.set(&extent, map.generation());
    }
}

fn mappings(leaves: usize, backings: u16) -> Box<VecMap> {
    let (slots, leaves) = (vec![Slot::FREE; leaves], vec![Leaf::FREE; leaves]);
    let mut map = Map::new(slots, leaves, SIZE, true);
    for (backing, what) in (0..backings).zip(BACKINGS) {
        assert!(map.add_backing(number(backing), what));
    }
    Box::new(map)
}

/// Both, side by side.
#[derive(Clone)]
pub struct Pair {
    shadow: Shadow<Vec<Entry>, Option<Box<VecMap>>>,
    model: Model,
    tags: u16,
    /// Queues that were told that they can begin something, and have not looked; one bit for each.
    told: u64,
    steps: Vec<Step>,
    /// What happened.
    pub seen: Seen,
}

impl Pair {
    /// A disk with so many tags that nobody has opened.
    pub fn new(tags: u16) -> Self {
        Self {
            shadow: Shadow::with_map(vec![Entry::FREE; usize::from(tags)], None),
            model: Model::default(),
            tags,
            told: 0,
            steps: Vec::new(),
            seen: Seen::default(),
        }
    }

    /// The same with so many backings, and room for some leaves of extents, of which none may be forgotten. The
    /// queues from which most requests come can execute something.
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

    /// A disk that can have no mappings, after some steps.
    pub fn with(tags: u16, steps: &[Step]) -> Self {
        Self::new(tags).after(steps)
    }

    /// The same after some steps.
    #[must_use]
    pub fn after(mut self, steps: &[Step]) -> Self {
        steps.iter().for_each(|step| self.apply(*step));
        self
    }

    /// The tags that the process has, the oldest request first.
    pub fn held(&self) -> Vec<u16> {
        let held = self.model.undone.values();
        let held = held.filter(|r| r.stage == Stage::Delivered);
        held.map(|r| r.tag).collect()
    }

    /// True if the disk can have mappings.
    pub fn is_mapped(&self) -> bool {
        self.model.mappings.0.is_some()
    }

    /// The tags that queues execute, the oldest request first.
    pub fn begun(&self) -> Vec<u16> {
        let begun = self.model.undone.values();
        let begun = begun.filter(|r| matches!(r.stage, Stage::Direct(_)));
        begun.map(|r| r.tag).collect()
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
                let (failed, _) = self.model.fail(usize::MAX, |_, _, r| r.queue == queue);
                assert_eq!(self.shadow.withdraw(queue) as usize, failed, "{self:?}");
                self.seen.failed += failed as u64;
            }
            Step::Orphan(queue) => self.orphan(queue),
            Step::Fail(max) => self.fail(max),
            Step::Begin(tag, queue, request) => {
                self.post(tag, queue, request);
                self.begin(tag);
            }
            Step::Resume(queue, max) => self.resume(queue, max),
            Step::End(tag, status) => self.end(tag, status),
            Step::Set(..) | Step::Scatter(_) | Step::SetFlush => self.map(step),
            Step::Recall(_) | Step::Add(_) | Step::Remove(_) => self.map(step),
        }
        // Once is enough but for very many, of which each call sorts some.
        for _ in 0..=self.model.undone.len() {
            self.shadow.sort();
        }
        self.told |= self.shadow.take_resumable();
        self.model.sort();
        self.compare();
    }

    /// A queue begins what it has just posted, or what else has this tag.
    fn begin(&mut self, tag: u16) {
        let waits = |s: &u64| {
            let request = &self.model.undone[s];
            request.stage == Stage::Waiting && request.whose == For::Unknown
        };
        let sequence = self.model.sequence_of(tag).filter(waits);
        let free = sequence.filter(|s| self.model.blocker(*s).is_none());
        let expected = free.and_then(|s| self.expect_start(s));
        let mut parts = Parts::default();
        let start = self.shadow.begin(DiskTag::new(tag), &mut parts);
        let got = start.map(|start| (start, parts.as_slice().to_vec()));
        assert_eq!(got, expected, "{self:?}");
        self.seen.begun += u64::from(start.is_some());
        self.seen.begun_in_parts += u64::from(start.is_some() && parts.as_slice().len() > 1);
        let reads_zeroes = parts.as_slice().iter().any(|part| part.sector.is_none());
        self.seen.begun_with_zeroes += u64::from(start.is_some() && reads_zeroes);
    }

    /// What a queue is told of a request with nothing in its way, which it executes from now on if it can.
    fn expect_start(&mut self, sequence: u64) -> Option<(Start, Vec<Part>)> {
        let (backing, parts) = self.model.place(sequence)?;
        let request = self.model.undone.get_mut(&sequence).expect("it waits");
        request.stage = Stage::Direct(backing);
        let start = Start {
            backing,
            op: wire(request.request.op),
            sectors: request.range().end - request.range().start,
            segments: request.request.segments,
        };
        Some((start, parts))
    }

    fn resume(&mut self, queue: u16, max: usize) {
        let ready = self.model.ready(queue);
        let gone = |s: &&u64| self.model.clone().place(**s).is_none();
        let missed = ready.iter().filter(gone).count();
        // Which of them it tries first is its affair.
        let max = if missed > 0 { usize::MAX } else { max };
        self.told &= !1u64.wrapping_shl(queue.into());
        let mut got = Vec::new();
        let each = |tag: DiskTag, start, parts: &[Part]| {
            got.push((tag.number(), (start, parts.to_vec())));
        };
        self.shadow.resume(queue, max, each);
        assert_eq!(got.len(), max.min(ready.len() - missed), "{self:?}");
        for (tag, start) in &got {
            let sequence = self.model.sequence_of(*tag).expect("it waits");
            assert!(ready.contains(&sequence), "{self:?}");
            let expected = self.expect_start(sequence);
            assert_eq!(Some(start), expected.as_ref(), "{self:?}");
        }
        if max == usize::MAX {
            for sequence in self.model.ready(queue) {
                let request = self.model.undone.get_mut(&sequence);
                request.expect("it waits").whose = For::Process;
            }
        }
        self.seen.resumed += got.len() as u64;
        self.seen.missed += missed as u64;
    }

    fn end(&mut self, tag: u16, status: Status) {
        let result = self.shadow.ended(DiskTag::new(tag), status);
        let direct = |s: &u64| matches!(self.model.undone[s].stage, Stage::Direct(_));
        let Some(sequence) = self.model.sequence_of(tag).filter(direct) else {
            return assert_eq!(result, None, "{self:?}");
        };
        let request = self.model.undone.get_mut(&sequence).expect("it is there");
        if status == Status::Okay || request.request.op == Op::Flush {
            self.model.undone.remove(&sequence);
            self.model.executed += 1;
            self.model.failed_flushes += u32::from(status != Status::Okay);
            self.seen.executed += 1;
            return assert_eq!(result, Some(status), "{self:?}");
        }
        request.stage = Stage::Waiting;
        request.whose = For::Unknown;
        request.replay = true;
        self.seen.redone += 1;
        assert_eq!(result, None, "{self:?}");
    }

    /// The process says something of the mappings if it is served; the host changes the backings.
    fn map(&mut self, step: Step) {
        let live = self.model.state == abi::STATE_LIVE;
        let busy = |number| self.shadow.is_executing_in(number);
        let may = match step {
            Step::Add(backing) => !busy(number(backing)),
            Step::Remove(_) => true,
            _ => live,
        };
        let (shadow, model) = (self.shadow.map(), &mut self.model.mappings.0);
        let (Some(shadow), Some(model), true) = (shadow, model, may) else {
            return;
        };
        for map in [shadow, model] {
            match step {
                Step::Set(range, access, backing, ago) => {
                    let extent = Extent {
                        range,
                        place: match backing {
                            ZEROES => 0,
                            _ => range.start(),
                        },
                        source: match backing {
                            ZEROES => Source::Zeroes,
                            _ => Source::Backing(number(backing)),
                        },
                        access,
                    };
                    let generation = map.generation().wrapping_sub(ago);
                    let _taken = map.set(&extent, generation);
                }
                Step::Scatter(backing) => scatter(map, backing),
                Step::SetFlush => {
                    let _taken = map.set_flush();
                }
                Step::Recall(range) => map.recall(&range),
                Step::Add(backing) => {
                    let what = BACKINGS[usize::from(backing)];
                    let _added = map.add_backing(number(backing), what);
                }
                Step::Remove(backing) => {
                    let _removed = map.remove_backing(number(backing));
                }
                _ => {}
            }
        }
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
            Outcome::Returned => {
                request.stage = Stage::Waiting;
                request.whose = For::Unknown;
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

    /// The same, without a change.
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
            self.model.started = false;
        }
    }

    fn claim(&mut self, fence: Fence, ago: u64) {
        let is_live = self.model.state == abi::STATE_LIVE;
        let widens = is_live && fence > self.model.claimed.0;
        let rests = match self.model.state {
            abi::STATE_OPEN => true,
            abi::STATE_LIVE => widens || self.model.count(Stage::Delivered) == 0,
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
        if !widens {
            self.model.state = abi::STATE_OPEN;
        }
        self.model.claimed = Claim(fence);
        match fence {
            Fence::Local => self.model.claims.clear(),
            Fence::Session { .. } | Fence::None => self.model.claims.push(fence),
        }
        self.seen.claimed_again += u64::from(is_live && !widens);
        self.seen.widened += u64::from(widens);
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
        if let Some(map) = &mut self.model.mappings.0 {
            map.clear();
        }
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
        let again = std::mem::replace(&mut self.model.started, true);
        if !again && self.model.isolates() {
            // What waits is delivered in another order, also what a queue was to begin.
            self.model.unsort();
        }
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
        let left = self.model.undone.iter();
        let left = left.filter(|(_, r)| r.stage == Stage::Delivered);
        for sequence in left.map(|(sequence, _)| *sequence).collect::<Vec<_>>() {
            self.model.changes(sequence);
        }
        let undone = &mut self.model.undone;
        undone.retain(|_, r| !(r.orphan && r.stage == Stage::Delivered));
        let lost = self.lose();
        assert_eq!(failed, Some((lost.0, lost.1, false)), "{self:?}");
        self.model.unsort();
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
        // It has waited for what it executes.
        for tag in self.begun() {
            let sequence = self.model.sequence_of(tag).expect("it is there");
            if self.model.undone[&sequence].queue == queue {
                self.end(tag, Status::Okay);
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

    /// What there is only if something may be mapped.
    fn compare_mapped(&mut self) {
        let known = self.shadow.map().as_ref().expect("as the model");
        let model = &self.model;
        let expected = model.mappings.0.as_ref().expect("the caller looked");
        assert!(known.extents().eq(expected.extents()), "{self:?}");
        assert_eq!(known.generation(), expected.generation(), "{self:?}");
        assert_eq!(known.flushed(), expected.flushed(), "{self:?}");
        assert_eq!(known.evicted() + expected.evicted(), 0, "too few leaves");
        for backing in (0..).take(BACKINGS.len()).map(number) {
            let executing = model.executing(|of, _| of == Some(backing)) > 0;
            assert_eq!(self.shadow.is_executing_in(backing), executing, "{self:?}");
        }
        let any = model.executing(|_, _| true) > 0;
        assert_eq!(self.shadow.is_executing(&Sectors::ALL), any, "{self:?}");
        for (sequence, request) in &model.undone {
            let executes = |stage| stage != Stage::Waiting;
            for (_, earlier) in model.undone.range(..sequence) {
                let both = executes(request.stage) && executes(earlier.stage);
                assert!(!(both && earlier.conflicts(request)), "{self:?}");
            }
            // Whoever could begin something was told so.
            let waits = request.stage == Stage::Waiting && request.whose == For::Queue;
            assert!(!waits || self.told >> request.queue & 1 == 1, "{self:?}");
            if let Some(range) = Sectors::between(request.range().start, request.range().end) {
                let meets = |r: &Undone| {
                    let range = r.range().start.max(range.start())..r.range().end.min(range.end());
                    !range.is_empty()
                };
                let executing = model.executing(|_, r| meets(r)) > 0;
                assert_eq!(self.shadow.is_executing(&range), executing, "{self:?}");
            }
        }
        self.look_on();
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
            for queue in 0..QUEUES {
                if self.told >> queue & 1 == 1 {
                    self.apply(Step::Resume(queue, usize::MAX));
                }
            }
            if let Some(tag) = self.begun().pop() {
                self.apply(Step::End(tag, Status::Okay));
            } else if let Some(tag) = self.held().pop() {
                self.apply(Step::Commit(tag, Outcome::Finished(Status::Okay), 0, 0));
            } else if self.model.deliverable().is_empty() {
                break;
            }
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
