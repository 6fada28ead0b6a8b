// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A model of the shadow of a tap disk in a few lines, which keeps a map of requests and searches all of it each time.
//! It uses the real map of the disk's extents, like the shadow, because that has its own model (`map_pair`).

use std::collections::BTreeMap;

use ring::response::ResponseStatus;
use ring::tap::abi;
use ring::tap::checked::{Commit, Fence};
use ring::tap::extent::{BackingNumber, DataExtent, ExtentAccess, Sectors};
use ring::tap::map::tree::{Leaf, LeafSlot};
use ring::tap::map::ExtentMap;
use ring::tap::shadow::passthrough::{RequestPart, MAX_PARTS};
use ring::tap::shadow::{Op, PostedRequest};

/// Time at which requests arrive, in nanoseconds.
pub(crate) const ARRIVED: u64 = 7;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Waiting,
    Delivered,
    /// Its queue executes it, in this backing; in none if it reads as zeroes.
    Direct(Option<BackingNumber>),
}

/// Executor of a request that waits without another one blocking it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum For {
    /// Not determined yet, or another request blocks it.
    Unknown,
    Queue,
    Process,
}

pub(crate) type VecMap = ExtentMap<Vec<LeafSlot>, Vec<Leaf>>;

/// The map of a disk, if it can have mappings.
#[derive(Clone, Default)]
pub(crate) struct Mappings(pub(crate) Option<Box<VecMap>>);

impl std::fmt::Debug for Mappings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let extents = self.0.iter().flat_map(|map| map.extents());
        f.debug_list().entries(extents).finish()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Undone {
    pub(crate) tag: u16,
    pub(crate) queue: u16,
    pub(crate) request: PostedRequest,
    pub(crate) stage: Stage,
    pub(crate) whose: For,
    pub(crate) replay: bool,
    pub(crate) deliveries: u32,
    pub(crate) ordered: bool,
    pub(crate) orphan: bool,
    pub(crate) deaths: u32,
    pub(crate) in_last: bool,
    pub(crate) proven: bool,
}

pub(crate) fn wire(op: Op) -> u8 {
    match op {
        Op::Read => 0,
        Op::Write => 1,
        Op::Flush => 2,
        Op::Discard => 3,
        Op::WriteZeroes => 5,
        Op::SecureDiscard => 6,
    }
}

impl Undone {
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        let sectors = match self.request.op {
            Op::Flush => 0,
            _ => self.request.sectors,
        };
        self.request.sector..self.request.sector + sectors
    }

    pub(crate) fn writes(&self) -> bool {
        !matches!(self.request.op, Op::Read | Op::Flush)
    }

    /// Returns the descriptor that the process must read.
    pub(crate) fn desc(&self, sequence: u64, generation: u32) -> abi::Desc {
        let range = self.range();
        let flag = |on: bool, flag: u8| if on { flag } else { 0 };
        abi::Desc {
            op: wire(self.request.op),
            flags: flag(self.request.fua, 1)
                | flag(self.request.preflush, 2)
                | flag(self.replay, 4),
            segments: self.request.segments,
            generation,
            sector: if range.is_empty() { 0 } else { range.start },
            sectors: range.end - range.start,
            sequence,
            arrived_ns: ARRIVED,
            tag: self.tag,
            queue: self.queue,
            deliveries: self.deliveries,
            reserved: [0; 4],
        }
    }

    /// Returns true if the two must not be executed concurrently.
    pub(crate) fn conflicts(&self, other: &Undone) -> bool {
        let (a, b) = (self.range(), other.range());
        let overlap = a.start.max(b.start) < a.end.min(b.end);
        overlap && (self.writes() || other.writes())
    }

    pub(crate) fn in_the_way_of(&self, later: &Undone) -> bool {
        let flush = later.request.op == Op::Flush || later.request.preflush;
        self.conflicts(later) || later.ordered && flush && self.writes()
    }
}

/// The model.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    pub(crate) sequence: u64,
    pub(crate) undone: BTreeMap<u64, Undone>,
    pub(crate) done: Vec<(u16, u16, ResponseStatus)>,
    pub(crate) generations: BTreeMap<u16, u32>,
    pub(crate) epoch: u64,
    pub(crate) state: u32,
    pub(crate) committed: u64,
    pub(crate) replayed: u64,
    pub(crate) refused: u64,
    pub(crate) limit: u32,
    /// Number of requests that the last process had when it died, and whether it had answered others.
    pub(crate) death: Option<(u32, bool)>,
    pub(crate) answered: bool,
    pub(crate) unproven: bool,
    /// Requests that are isolated, by arrival number.
    pub(crate) isolated: Vec<u64>,
    pub(crate) poisoned: Vec<(Op, std::ops::Range<u64>)>,
    /// Time in milliseconds.
    pub(crate) clock: u64,
    pub(crate) claimed: ProcessClaim,
    /// Claims of the process since it last declared all of its I/O over.
    pub(crate) claims: Vec<Fence>,
    /// Time from which no I/O of the process was visible.
    pub(crate) quiet: Option<u64>,
    /// The process was started before.
    pub(crate) started: bool,
    pub(crate) mappings: Mappings,
    /// Queues that can execute requests, one bit for each.
    pub(crate) able: u64,
    /// Requests that queues have executed.
    pub(crate) executed: u64,
    /// Number of flushes among them that failed.
    pub(crate) failed_flushes: u32,
}

/// Claim of a process; without one, its I/O is only on this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProcessClaim(pub(crate) Fence);

impl Default for ProcessClaim {
    fn default() -> Self {
        Self(Fence::Local)
    }
}

impl Model {
    /// Returns true if no I/O of the process can be running any more, visible or not.
    pub(crate) fn is_over(&self) -> bool {
        let settles = |fence: &Fence| match fence {
            Fence::Session { settle_ms } => u64::from(*settle_ms),
            Fence::Local | Fence::None => 0,
        };
        let longest = self.claims.iter().map(settles).max().unwrap_or(0);
        self.quiet
            .is_some_and(|since| self.clock >= since + longest)
    }

    /// Returns the request of a tag that a process may commit, `ago` openers earlier.
    pub(crate) fn meant(&self, commit: &Commit, ago: u64) -> Option<u64> {
        let sequence = self.sequence_of(commit.tag.number())?;
        let delivered = self.undone[&sequence].stage == Stage::Delivered;
        let latest = self.generations.get(&commit.tag.number()) == Some(&commit.generation);
        let served = self.state == abi::STATE_LIVE && ago == 0;
        (delivered && latest && served).then_some(sequence)
    }

    pub(crate) fn sequence_of(&self, tag: u16) -> Option<u64> {
        let mut all = self.undone.iter();
        all.find(|(_, r)| r.tag == tag).map(|(s, _)| *s)
    }

    pub(crate) fn is_free(&self, tag: u16) -> bool {
        self.sequence_of(tag).is_none() && !self.done.iter().any(|d| d.1 == tag)
    }

    /// Returns the isolated requests without a result. While there is one, a process has one request at a time.
    pub(crate) fn isolated_undone(&self) -> impl Iterator<Item = &u64> {
        let undone = |sequence: &&u64| self.undone.contains_key(sequence);
        self.isolated.iter().filter(undone)
    }

    pub(crate) fn isolates(&self) -> bool {
        self.isolated_undone().next().is_some()
    }

    /// Counts the last death. Returns the request that is the reason for it, if that is certain.
    pub(crate) fn judge(&mut self) -> Option<u64> {
        let (held, answered) = self.death.take()?;
        let limit = self.limit;
        self.isolated.clear();
        if limit == 0 {
            return None;
        }
        let mut reason = None;
        for (sequence, request) in &mut self.undone {
            if std::mem::take(&mut request.in_last) {
                request.deaths += 1;
                request.proven |= answered;
                let enough = request.deaths >= limit && request.proven && !self.unproven;
                if held == 1 && enough {
                    reason = Some(*sequence);
                }
            }
            if request.deaths + 1 >= limit {
                self.isolated.push(*sequence);
            }
        }
        reason
    }

    pub(crate) fn deliverable(&self) -> Vec<u16> {
        let busy = self.isolates() && self.count(Stage::Delivered) > 0;
        if self.state != abi::STATE_LIVE || busy {
            return Vec::new();
        }
        let free = |(sequence, request): &(&u64, &Undone)| {
            let waits = request.stage == Stage::Waiting && request.whose != For::Queue;
            waits && self.blocker(**sequence).is_none()
        };
        self.undone
            .iter()
            .filter(free)
            .map(|(_, r)| r.tag)
            .collect()
    }

    /// Returns the latest earlier request that blocks one.
    pub(crate) fn blocker(&self, sequence: u64) -> Option<&Undone> {
        let later = &self.undone[&sequence];
        let mut earlier = self.undone.range(..sequence).rev().map(|(_, r)| r);
        earlier.find(|r| r.in_the_way_of(later))
    }

    /// Returns true if all requests are those that queues execute, except for the one that was just posted.
    pub(crate) fn is_left_to_queues(&self) -> bool {
        let direct = |r: &&Undone| matches!(r.stage, Stage::Direct(_));
        self.undone.values().filter(direct).count() + 1 == self.undone.len()
    }

    /// Returns the place where its queue could execute a request that nothing blocks: the backing, and the parts.
    pub(crate) fn place(
        &mut self,
        sequence: u64,
    ) -> Option<(Option<BackingNumber>, Vec<RequestPart>)> {
        let request = &self.undone[&sequence];
        let durable = request.request.fua || request.request.preflush;
        let touched = request.replay || request.deliveries > 0;
        if self.able & 1 << request.queue == 0 || durable || touched {
            return None;
        }
        let map = self.mappings.0.as_mut()?;
        let access = match request.request.op {
            Op::Read => ExtentAccess::Read,
            Op::Write => ExtentAccess::ReadWrite,
            Op::Flush => return map.flushed().map(|backing| (Some(backing), Vec::new())),
            _ => return None,
        };
        let range = Sectors::between(request.range().start, request.range().end)?;
        let mut pieces: Vec<DataExtent> = Vec::new();
        let each = |piece: &DataExtent| pieces.push(*piece);
        map.translate(&range, access, MAX_PARTS, each).ok()?;
        let number = |piece: &DataExtent| piece.source.backing();
        let mut backings: Vec<_> = pieces.iter().filter_map(number).collect();
        backings.dedup();
        let part = |piece: &DataExtent| RequestPart {
            sector: number(piece).map(|_| piece.place),
            sectors: piece.range.count(),
        };
        let backing = backings.first().copied();
        (backings.len() < 2).then(|| (backing, pieces.iter().map(part).collect()))
    }

    /// Assigns waiting requests that nothing blocks to the process or to queues. While the map is empty it assigns
    /// none, because a mapping may follow.
    pub(crate) fn sort(&mut self) {
        if self.mappings.0.as_ref().is_none_or(|map| map.is_empty()) {
            return;
        }
        for sequence in self.waiting() {
            if self.undone[&sequence].whose == For::Unknown && self.blocker(sequence).is_none() {
                let whose = match self.place(sequence) {
                    Some(_) => For::Queue,
                    None => For::Process,
                };
                self.undone.get_mut(&sequence).expect("it waits").whose = whose;
            }
        }
    }

    /// Forgets the assignment of waiting requests.
    pub(crate) fn unsort(&mut self) {
        for request in self.undone.values_mut() {
            request.whose = For::Unknown;
        }
    }

    pub(crate) fn waiting(&self) -> Vec<u64> {
        let waits = |(_, r): &(&u64, &Undone)| r.stage == Stage::Waiting;
        self.undone.iter().filter(waits).map(|(s, _)| *s).collect()
    }

    /// Returns the requests that a queue must begin.
    pub(crate) fn ready(&self, queue: u16) -> Vec<u64> {
        let of_queue = |s: &u64| {
            let request = &self.undone[s];
            request.queue == queue && request.whose == For::Queue
        };
        self.waiting().into_iter().filter(of_queue).collect()
    }

    /// Updates the map when the process gets a request, answers it, or dies with it.
    pub(crate) fn changes(&mut self, sequence: u64) {
        let request = &self.undone[&sequence];
        let range = Sectors::between(request.range().start, request.range().end);
        let (Some(map), Some(range)) = (&mut self.mappings.0, range) else {
            return;
        };
        match request.request.op {
            Op::Read | Op::Flush => {}
            Op::Write => map.written(&range),
            _ => map.recall(&range),
        }
    }

    pub(crate) fn executing(&self, which: impl Fn(Option<BackingNumber>, &Undone) -> bool) -> u32 {
        let executes = |r: &&Undone| match r.stage {
            Stage::Direct(backing) => which(backing, r),
            _ => false,
        };
        self.undone.values().filter(executes).count() as u32
    }

    pub(crate) fn count(&self, stage: Stage) -> u32 {
        self.undone.values().filter(|r| r.stage == stage).count() as u32
    }

    pub(crate) fn finish(&mut self, sequence: u64, status: ResponseStatus) {
        let request = self.undone.remove(&sequence).expect("it is there");
        self.done.push((request.queue, request.tag, status));
    }

    /// Fails at most `max` waiting requests, the oldest first. Each is examined after the ones before it have failed.
    pub(crate) fn fail(
        &mut self,
        max: usize,
        which: impl Fn(&Self, u64, &Undone) -> bool,
    ) -> (usize, u64) {
        let (mut count, mut queues) = (0, 0);
        for sequence in self.waiting() {
            let request = &self.undone[&sequence];
            if count < max && which(self, sequence, request) {
                count += 1;
                queues |= 1 << request.queue;
                self.finish(sequence, ResponseStatus::Error);
            }
        }
        (count, queues)
    }

    /// Returns true if a waiting request waits for a process, itself or because of the request that blocks it. It does
    /// not if its queue must begin it, nor if a queue executes the blocking request, nor if that one waits for no
    /// process.
    pub(crate) fn needs_process(&self, sequence: u64, request: &Undone) -> bool {
        let blocker = self.blocker(sequence);
        let process = blocker.is_none_or(|blocker| blocker.stage == Stage::Delivered);
        process && request.whose != For::Queue
    }
}
