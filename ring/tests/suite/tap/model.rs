// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The shadow beside a model of a few lines, which keeps a map and looks at everything each time.

use std::collections::BTreeMap;

use proptest::prelude::*;
use ring::response::Status;
use ring::tap::abi;
use ring::tap::checked::{Commit, Outcome};
use ring::tap::shadow::{Committed, Op, Request, Shadow, Tag};
use ring::tap::table::Entry;

const QUEUES: u16 = 2;

/// What is done to a shadow.
#[derive(Clone, Copy, Debug)]
enum Step {
    Post(Tag, u16, Request),
    Deliver(usize),
    /// Commits a tag: with its generation or one beside it, and of this or an earlier epoch.
    Commit(Tag, Outcome, u32, u64),
    Reap(u16, usize),
    Open,
    Start,
    Close,
    Fence,
    Withdraw(u16),
    Orphan(u16),
    Fail(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Waiting,
    Delivered,
}

#[derive(Clone, Debug)]
struct Undone {
    tag: Tag,
    queue: u16,
    request: Request,
    stage: Stage,
    replay: bool,
    again: bool,
    ordered: bool,
    orphan: bool,
}

impl Undone {
    fn range(&self) -> std::ops::Range<u64> {
        let sectors = match self.request.op {
            Op::Flush => 0,
            _ => self.request.sectors,
        };
        self.request.sector..self.request.sector + sectors
    }

    fn writes(&self) -> bool {
        !matches!(self.request.op, Op::Read | Op::Flush)
    }

    fn in_the_way_of(&self, later: &Undone) -> bool {
        let (a, b) = (self.range(), later.range());
        let overlap = a.start.max(b.start) < a.end.min(b.end);
        let flush = later.request.op == Op::Flush || later.request.preflush;
        overlap && (self.writes() || later.writes()) || later.ordered && flush && self.writes()
    }
}

/// The model.
#[derive(Clone, Debug, Default)]
struct Model {
    sequence: u64,
    undone: BTreeMap<u64, Undone>,
    done: Vec<(u16, Tag, Status)>,
    generations: BTreeMap<Tag, u32>,
    epoch: u64,
    state: u32,
    committed: u64,
    replayed: u64,
    refused: u64,
}

impl Model {
    fn sequence_of(&self, tag: Tag) -> Option<u64> {
        let mut all = self.undone.iter();
        all.find(|(_, r)| r.tag == tag).map(|(s, _)| *s)
    }

    fn is_free(&self, tag: Tag) -> bool {
        self.sequence_of(tag).is_none() && !self.done.iter().any(|d| d.1 == tag)
    }

    fn deliverable(&self) -> Vec<Tag> {
        if self.state != abi::STATE_LIVE {
            return Vec::new();
        }
        let free = |(sequence, later): &(&u64, &Undone)| {
            let mut earlier = self.undone.range(..**sequence);
            later.stage == Stage::Waiting && !earlier.any(|(_, r)| r.in_the_way_of(later))
        };
        self.undone
            .iter()
            .filter(free)
            .map(|(_, r)| r.tag)
            .collect()
    }

    fn count(&self, stage: Stage) -> u32 {
        self.undone.values().filter(|r| r.stage == stage).count() as u32
    }

    fn finish(&mut self, sequence: u64, status: Status) {
        let request = self.undone.remove(&sequence).expect("it is there");
        self.done.push((request.queue, request.tag, status));
    }

    fn fail(&mut self, max: usize, which: impl Fn(&Undone) -> bool) -> (usize, u64) {
        let waits = |r: &Undone| r.stage == Stage::Waiting && which(r);
        let failed = self.undone.iter().filter(|(_, r)| waits(r)).take(max);
        let failed: Vec<u64> = failed.map(|(s, _)| *s).collect();
        let mut queues = 0;
        for sequence in &failed {
            queues |= 1 << self.undone[sequence].queue;
            self.finish(*sequence, Status::Error);
        }
        (failed.len(), queues)
    }
}

/// Both, side by side.
#[derive(Clone)]
struct Pair {
    shadow: Shadow<Vec<Entry>>,
    model: Model,
    tags: u16,
    seen: Vec<Step>,
}

impl Pair {
    fn new(tags: u16) -> Self {
        Self {
            shadow: Shadow::new(vec![Entry::FREE; usize::from(tags)]),
            model: Model::default(),
            tags,
            seen: Vec::new(),
        }
    }

    fn with(tags: u16, steps: &[Step]) -> Self {
        let mut pair = Self::new(tags);
        steps.iter().for_each(|step| pair.apply(*step));
        pair
    }

    fn apply(&mut self, step: Step) {
        self.seen.push(step);
        match step {
            Step::Post(tag, queue, request) => self.post(tag, queue, request),
            Step::Deliver(max) => self.deliver(max),
            Step::Commit(tag, outcome, beside, ago) => self.commit(tag, outcome, beside, ago),
            Step::Reap(queue, max) => self.reap(queue, max),
            Step::Open => self.open(),
            Step::Start => self.start(),
            Step::Close => self.close(),
            Step::Fence => self.fence(),
            Step::Withdraw(queue) => {
                let (failed, _) = self.model.fail(usize::MAX, |r| r.queue == queue);
                assert_eq!(self.shadow.withdraw(queue) as usize, failed, "{self:?}");
            }
            Step::Orphan(queue) => self.orphan(queue),
            Step::Fail(max) => self.fail(max),
        }
        self.compare();
    }

    fn post(&mut self, tag: Tag, queue: u16, request: Request) {
        let valid = tag < self.tags && usize::from(queue) < 64 && self.model.is_free(tag);
        let posted = self.shadow.post(tag, queue, &request, 7);
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
                    again: false,
                    ordered,
                    orphan: false,
                },
            );
            self.model.sequence += 1;
        }
    }

    fn deliver(&mut self, max: usize) {
        let mut got = Vec::new();
        let epoch = self.model.epoch;
        let result = self
            .shadow
            .deliver(epoch, max, 9, |_, desc| got.push(*desc));
        assert_eq!(result.count, got.len());
        for desc in &got {
            assert!(self.model.deliverable().contains(&desc.tag), "{self:?}");
            let sequence = self.model.sequence_of(desc.tag).expect("it waits");
            let generation = self.model.generations.entry(desc.tag).or_default();
            *generation += 1;
            let request = self.model.undone.get_mut(&sequence).expect("it waits");
            request.stage = Stage::Delivered;
            self.model.replayed += u64::from(request.again);
            assert_eq!(desc.sequence, sequence);
            assert_eq!(desc.generation, *generation);
            assert_eq!(desc.flags & abi::DESC_REPLAY != 0, request.replay);
            assert_eq!(desc.queue, request.queue);
            let range = request.range();
            assert_eq!(desc.sectors, range.end - range.start);
            assert!(desc.sectors == 0 || desc.sector == range.start);
        }
        if got.len() < max {
            assert!(!result.more, "so few need no second call: {self:?}");
            assert_eq!(self.model.deliverable(), [], "{self:?}");
        }
    }

    fn commit(&mut self, tag: Tag, outcome: Outcome, beside: u32, ago: u64) {
        let current = self.model.generations.get(&tag).copied().unwrap_or(0);
        let commit = Commit {
            tag,
            generation: current.wrapping_sub(beside),
            outcome,
        };
        let epoch = self.model.epoch.wrapping_sub(ago);
        let committed = self.shadow.commit(epoch, &commit);
        let sequence = self.model.sequence_of(tag).filter(|sequence| {
            let delivered = self.model.undone[sequence].stage == Stage::Delivered;
            delivered && beside == 0 && ago == 0 && self.model.state == abi::STATE_LIVE
        });
        let Some(sequence) = sequence else {
            self.model.refused += 1;
            return assert_eq!(committed, Committed::Refused, "{self:?}");
        };
        let request = self.model.undone.get_mut(&sequence).expect("delivered");
        let queue = request.queue;
        let expected = match outcome {
            _ if request.orphan => {
                self.model.undone.remove(&sequence);
                Committed::Released
            }
            Outcome::Returned => {
                request.stage = Stage::Waiting;
                request.again = true;
                Committed::Returned
            }
            Outcome::Finished(status) => {
                self.model.finish(sequence, status);
                self.model.committed += 1;
                Committed::Done(queue)
            }
        };
        assert_eq!(committed, expected, "{self:?}");
    }

    fn reap(&mut self, queue: u16, max: usize) {
        let mut got = Vec::new();
        let count = self
            .shadow
            .reap(queue, max, |tag, status| got.push((queue, tag, status)));
        assert_eq!(count, got.len());
        let of_queue = self.model.done.iter().filter(|d| d.0 == queue).copied();
        let expected: Vec<_> = of_queue.take(max).collect();
        assert_eq!(got, expected, "{self:?}");
        self.model.done.retain(|d| !expected.contains(d));
    }

    fn open(&mut self) {
        let may = [abi::STATE_IDLE, abi::STATE_RECOVERING].contains(&self.model.state);
        assert_eq!(self.shadow.opened().is_ok(), may);
        if may {
            self.model.epoch += 1;
            self.model.state = abi::STATE_OPEN;
        }
    }

    fn start(&mut self) {
        let may = self.model.state == abi::STATE_OPEN;
        assert_eq!(self.shadow.started(self.model.epoch), may);
        if may {
            self.model.state = abi::STATE_LIVE;
        }
    }

    fn close(&mut self) {
        self.shadow.closed();
        if [abi::STATE_OPEN, abi::STATE_LIVE].contains(&self.model.state) {
            self.model.state = abi::STATE_FENCING;
        }
    }

    fn fence(&mut self) {
        self.shadow.fenced();
        if self.model.state != abi::STATE_FENCING {
            return;
        }
        let undone = &mut self.model.undone;
        undone.retain(|_, r| !(r.orphan && r.stage == Stage::Delivered));
        for request in undone.values_mut() {
            request.ordered = true;
            if request.stage == Stage::Delivered {
                request.stage = Stage::Waiting;
                request.replay = true;
                request.again = true;
            }
        }
        self.model.state = match undone.is_empty() {
            true => abi::STATE_IDLE,
            false => abi::STATE_RECOVERING,
        };
    }

    fn orphan(&mut self, queue: u16) {
        self.model.fail(usize::MAX, |r| r.queue == queue);
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
        let may = ![abi::STATE_LIVE, abi::STATE_FENCING].contains(&self.model.state);
        let expected = if may {
            self.model.fail(max, |_| true)
        } else {
            (0, 0)
        };
        assert_eq!((failed.count, failed.queues), expected, "{self:?}");
        let left = may && self.model.count(Stage::Waiting) > 0;
        assert_eq!(failed.more, left, "{self:?}");
    }

    fn compare(&mut self) {
        let mut info = abi::Info::default();
        self.shadow.describe(&mut info, 11);
        let model = &self.model;
        let delivered = model.count(Stage::Delivered);
        let expected = abi::Info {
            state: model.state,
            epoch: model.epoch,
            tags: u32::from(self.tags),
            waiting: model.count(Stage::Waiting),
            delivered,
            committed: model.committed,
            replayed: model.replayed,
            refused: model.refused,
            oldest_ns: if delivered > 0 { 2 } else { 0 },
            ..Default::default()
        };
        assert_eq!(info, expected, "{self:?}");
        let orphans = model.undone.values().filter(|r| r.orphan).count();
        assert_eq!(self.shadow.orphans() as usize, orphans, "{self:?}");
        for queue in 0..QUEUES {
            let results = model.done.iter().any(|d| d.0 == queue);
            assert_eq!(self.shadow.has_results(queue), results, "{self:?}");
        }
    }

    /// Everything that waits comes to its end.
    fn drain(mut self) {
        if self.model.state == abi::STATE_OPEN {
            self.apply(Step::Start);
        }
        if self.model.state != abi::STATE_LIVE {
            for step in [Step::Fence, Step::Open, Step::Start] {
                self.apply(step);
            }
        }
        for _ in 0..=2 * self.tags {
            let ready = !self.model.deliverable().is_empty();
            assert_eq!(self.shadow.has_deliverable(), ready, "{self:?}");
            self.apply(Step::Deliver(usize::MAX));
            let held = self.model.undone.values();
            let held: Vec<_> = held.filter(|r| r.stage == Stage::Delivered).collect();
            let Some(tag) = held.last().map(|r| r.tag) else {
                break;
            };
            self.apply(Step::Commit(tag, Outcome::Finished(Status::Okay), 0, 0));
        }
        assert!(self.model.undone.is_empty(), "{self:?}");
        for queue in 0..64 {
            self.apply(Step::Reap(queue, usize::MAX));
        }
        assert!(self.model.done.is_empty(), "{self:?}");
    }
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "after {:#?}: {:#?}", self.seen, self.model)
    }
}

fn requests() -> impl Strategy<Value = Request> {
    let op = prop_oneof![
        4 => Just(Op::Read),
        5 => Just(Op::Write),
        1 => Just(Op::Flush),
        1 => Just(Op::Discard),
        1 => Just(Op::WriteZeroes),
        1 => Just(Op::SecureDiscard),
    ];
    // Sizes around those of the granules of the index, at places where these meet.
    let size = prop_oneof![0..4u64, 60..70u64, 4090..4100u64, Just(1 << 21)];
    let place = prop_oneof![0..8u64, 58..70u64, 4085..4105u64, 8185..8195u64];
    (op, place, size, any::<bool>(), any::<bool>()).prop_map(
        |(op, sector, sectors, preflush, fua)| Request {
            op,
            preflush: preflush && op == Op::Write,
            fua,
            sector,
            sectors,
            segments: 1,
        },
    )
}

fn steps(tags: u16) -> impl Strategy<Value = Step> {
    let tag = 0..tags;
    let outcome = prop_oneof![
        4 => Just(Outcome::Finished(Status::Okay)),
        1 => Just(Outcome::Finished(Status::Error)),
        1 => Just(Outcome::Returned),
    ];
    // What is right, and now and then what is not.
    let beside = prop_oneof![9 => Just(0u32), 1 => Just(1), 1 => Just(u32::MAX)];
    let ago = prop_oneof![12 => Just(0u64), 1 => Just(1)];
    let queue = 0..QUEUES;
    prop_oneof![
        12 => (0..tags + 1, prop_oneof![20 => 0..QUEUES, 1 => Just(63u16), 1 => Just(64)], requests())
            .prop_map(|(tag, queue, request)| Step::Post(tag, queue, request)),
        6 => prop_oneof![Just(1usize), Just(2), Just(usize::MAX)].prop_map(Step::Deliver),
        12 => (tag, outcome, beside, ago)
            .prop_map(|(tag, outcome, beside, ago)| Step::Commit(tag, outcome, beside, ago)),
        4 => (queue.clone(), prop_oneof![Just(1usize), Just(usize::MAX)])
            .prop_map(|(queue, max)| Step::Reap(queue, max)),
        3 => Just(Step::Open),
        3 => Just(Step::Start),
        1 => Just(Step::Close),
        2 => Just(Step::Fence),
        1 => queue.clone().prop_map(Step::Withdraw),
        1 => queue.prop_map(Step::Orphan),
        1 => prop_oneof![Just(1usize), Just(usize::MAX)].prop_map(Step::Fail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn the_shadow_does_what_the_model_does(
        tags in prop_oneof![Just(1u16), Just(2), Just(3), Just(16), Just(40)],
        steps in prop::collection::vec(steps(41), 0..120),
    ) {
        let mut pair = Pair::with(tags, &[Step::Open, Step::Start]);
        for step in steps {
            pair.apply(fit(step, tags));
        }
        pair.drain();
    }
}

/// Makes most steps name a tag that there is.
fn fit(step: Step, tags: u16) -> Step {
    let fit = |tag: Tag| if tag > 40 { tag } else { tag % tags };
    match step {
        Step::Post(tag, queue, request) => Step::Post(fit(tag), queue, request),
        Step::Commit(tag, outcome, beside, ago) => Step::Commit(fit(tag), outcome, beside, ago),
        other => other,
    }
}

/// Every order of steps on three tags, from several starts.
#[test]
fn every_short_history_does_what_the_model_does() {
    let request = super::shadow::request;
    let write = request(Op::Write, 0, 8);
    let read = request(Op::Read, 4, 8);
    let flush = request(Op::Flush, 0, 0);
    let finished = Outcome::Finished(Status::Okay);
    let mut steps = vec![
        Step::Deliver(1),
        Step::Deliver(8),
        Step::Commit(0, Outcome::Returned, 0, 0),
        Step::Reap(0, 1),
        Step::Close,
        Step::Fence,
        Step::Open,
        Step::Start,
        Step::Orphan(0),
        Step::Fail(8),
    ];
    for tag in 0..3 {
        steps.push(Step::Commit(tag, finished, 0, 0));
    }
    steps.push(Step::Post(0, 0, write));
    steps.push(Step::Post(2, 1, read));
    let three = [
        Step::Post(1, 0, write),
        Step::Post(0, 1, read),
        Step::Post(2, 0, flush),
    ];
    let dead = [Step::Deliver(8), Step::Close, Step::Fence];
    let starts: [&[Step]; 4] = [
        &[],
        &[Step::Open, Step::Start],
        &[&[Step::Open, Step::Start], &three[..]].concat(),
        &[
            &[Step::Open, Step::Start],
            &three[..],
            &dead[..],
            &[Step::Open, Step::Start],
        ]
        .concat(),
    ];
    let mut count = 0;
    for start in starts {
        explore(&Pair::with(3, start), &steps, 4, &mut count);
    }
    assert!(count > 200_000, "{count}");
}

fn explore(pair: &Pair, steps: &[Step], depth: u32, count: &mut u64) {
    *count += 1;
    if depth == 0 {
        return pair.clone().drain();
    }
    for step in steps {
        let mut next = pair.clone();
        next.apply(*step);
        explore(&next, steps, depth - 1, count);
    }
}
