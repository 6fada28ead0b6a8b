// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Processes that serve a disk: they execute in any order, die at any point and leave I/O behind, hang, and lie.

use std::collections::BTreeMap;

use ring::tap::abi::{
    Completion, Desc, TapSegment, COMPLETION_RETURNED, DESC_FUA, DESC_PREFLUSH, DESC_REPLAY,
    OP_FLUSH, OP_READ, OP_WRITE, STATE_FENCING, STATE_IDLE, STATE_OPEN, STATE_RECOVERING,
};
use ring::tap::checked::Fence;
use ring::tap::shadow::{Committed, Op};

use crate::ending::Ghost;
use crate::history::SECTOR;
use crate::machine::{Machine, MachineFault};
use crate::tap::TapBytes;

/// When a process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// At any time.
    Any,
    /// With nothing to do.
    Idle,
    /// With requests of which none is started.
    Unstarted,
    /// With requests that are executed and not committed.
    Executed,
    /// With I/O that is running.
    Running,
    /// With two uncommitted writes to equal sectors, one of them delivered.
    Overlapping,
    /// With a flush.
    Flush,
    /// With a write that must be durable when it is done.
    Fua,
    /// With a discard.
    Discard,
    /// With a request that an earlier process had.
    Replay,
}

/// Plan of a case; chances are in a hundred of the steps of the process.
#[derive(Clone, Copy, Debug)]
pub struct ProcessPlan {
    /// The disk is served by a process.
    pub enabled: bool,
    /// Processes that may die.
    pub deaths: u32,
    /// Moment of the death.
    pub moment: Moment,
    /// Chance to die, at that moment.
    pub death: u64,
    /// Chance to hang; a hung process is killed.
    pub hang: u64,
    /// Chance to lie.
    pub lies: u64,
    /// Chance to return a request.
    pub returns: u64,
    /// Chance that the guest rewrites the pages of a write that is being executed.
    pub rewrite: u64,
    /// Chance that a remote server executes the I/O of a process, which may continue for a while after its end.
    pub sessions: u64,
    /// Chance that the end of a process's I/O is unknown.
    pub unknown: u64,
    /// Chance of a process that has no request in hand to claim again.
    pub claims: u64,
    /// Chance that waiting requests fail while there is no process.
    pub fail: u64,
    /// Maximum number of requests that a process fetches at once.
    pub fetch: usize,
    /// The guest makes new requests only when all are answered.
    pub patient: bool,
    /// Overlapping requests may be executed in any order that the guest cannot distinguish.
    pub any_order: bool,
    /// Chance that a process delays the completion of an executed write.
    pub hoard: u64,
    /// Size of the disk in sectors; random if `None`.
    pub sectors: Option<u64>,
}

impl Default for ProcessPlan {
    fn default() -> Self {
        Self {
            enabled: false,
            deaths: 0,
            moment: Moment::Any,
            death: 0,
            hang: 0,
            lies: 0,
            returns: 0,
            rewrite: 0,
            sessions: 0,
            unknown: 0,
            claims: 0,
            fail: 0,
            fetch: 8,
            patient: false,
            any_order: false,
            hoard: 0,
            sectors: None,
        }
    }
}

/// A request as a process has it.
#[derive(Clone, Debug)]
pub(crate) struct ProcessJob {
    pub(crate) desc: Desc,
    pub(crate) segments: Vec<TapSegment>,
    /// Its I/O was given to the store.
    pub(crate) started: bool,
    /// Sectors that are transferred.
    pub(crate) landed: u64,
    pub(crate) done: bool,
    /// Sectors that a flush makes durable: those in the cache when it started.
    pub(crate) flushes: Vec<u64>,
}

/// A process.
#[derive(Debug)]
pub(crate) struct SimProcess {
    pub(crate) epoch: u64,
    /// When its I/O is over after its end, as it has claimed.
    pub(crate) fence: Fence,
    pub(crate) jobs: Vec<ProcessJob>,
    awake: bool,
    hung: bool,
    /// Writes that a faulty process keeps in its own memory.
    cache: BTreeMap<u64, TapBytes>,
}

/// Completions that were once valid, and I/O that a faulty process repeats.
#[derive(Debug, Default)]
pub(crate) struct Words {
    pub(crate) old: Vec<(u64, Completion)>,
    echoes: Vec<(u64, TapBytes)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Open,
    Claim,
    Widen,
    Start,
    Fetch,
    Begin(usize),
    Land(usize),
    Commit(usize),
    Return(usize),
    Lie,
    Die,
    Hang,
    Haunt(usize),
    Exorcise(usize),
    Elsewhere(usize),
    Fence,
    Fail,
    Echo,
    Rewrite,
}

impl Act {
    /// Returns true for an act of dead processes only.
    fn is_late(self) -> bool {
        matches!(
            self,
            Act::Haunt(_) | Act::Exorcise(_) | Act::Elsewhere(_) | Act::Echo
        )
    }
}

pub(crate) fn completion(desc: &Desc) -> Completion {
    Completion {
        tag: desc.tag,
        generation: desc.generation,
        ..Completion::default()
    }
}

impl Machine {
    /// Returns true if the side of the disk can make a step.
    pub fn backend_busy(&self) -> bool {
        if self.tap.plan.enabled {
            !self.acts().is_empty()
        } else {
            self.disk.running() > 0
        }
    }

    /// Makes a step at the side of the disk.
    pub fn backend_step(&mut self) {
        if self.tap.plan.enabled {
            let mut acts = self.acts();
            acts.retain(|act| self.is_here(*act));
            // Late I/O happens after most other acts.
            let prompt = acts.iter().any(|act| !act.is_late());
            if prompt && self.rng.percent(90) {
                acts.retain(|act| !act.is_late());
            }
            if !acts.is_empty() {
                let act = self.rng.pick(&acts);
                self.act(act);
            }
        } else {
            self.disk_step();
        }
    }

    /// Returns false if the act needs the pages of a queue that is not the current one.
    fn is_here(&self, act: Act) -> bool {
        let jobs = self.tap.process.iter().flat_map(|process| &process.jobs);
        let queue = match act {
            Act::Begin(at) | Act::Land(at) | Act::Commit(at) | Act::Return(at) => {
                jobs.map(|job| job.desc.queue).nth(at)
            }
            Act::Haunt(at) | Act::Exorcise(at) => self.tap.ghosts.get(at).map(Ghost::queue),
            _ => None,
        };
        queue.is_none_or(|queue| self.tap.is_at(queue))
    }

    /// Returns the acts of a process, and the events that can happen to it.
    fn acts(&self) -> Vec<Act> {
        let (tap, mut acts) = (&self.tap, Vec::new());
        for (at, _) in tap.ghosts.iter().enumerate() {
            acts.extend([Act::Haunt(at), Act::Haunt(at), Act::Exorcise(at)]);
        }
        acts.extend((0..tap.sent.len()).map(Act::Elsewhere));
        acts.extend(tap.words.echoes.iter().map(|_| Act::Echo));
        let state = tap.shadow.state();
        if state == STATE_FENCING {
            let over = tap.ghosts.is_empty();
            let planted = matches!(self.fault, Some((MachineFault::SkipFence, 0)));
            acts.extend((over || planted).then_some(Act::Fence));
        }
        let waits = tap.shadow.waiting() > 0;
        if [STATE_IDLE, STATE_RECOVERING].contains(&state) && waits {
            acts.push(Act::Open);
            acts.extend((tap.plan.fail > 0).then_some(Act::Fail));
        }
        let Some(process) = &tap.process else {
            return acts;
        };
        if process.hung {
            return vec![Act::Die];
        }
        if state == STATE_OPEN {
            acts.push(Act::Start);
            return acts;
        }
        acts.extend(process.awake.then_some(Act::Fetch));
        for (at, job) in process.jobs.iter().enumerate() {
            acts.push(match (job.started, job.done) {
                (false, _) => Act::Begin(at),
                (true, false) => Act::Land(at),
                (true, true) => Act::Commit(at),
            });
        }
        // An idle process may still die while the guest has plans.
        if acts.is_empty() && self.plan > 0 && self.may_die() {
            acts.push(Act::Die);
        }
        acts
    }

    fn act(&mut self, act: Act) {
        let act = self.instead(act);
        match act {
            Act::Open => self.open(),
            Act::Claim => {
                let epoch = self.tap.process.as_ref().map_or(0, |p| p.epoch);
                self.claim(epoch);
            }
            Act::Widen => self.widen(),
            Act::Start => self.start(),
            Act::Fetch => self.fetch_some(),
            Act::Begin(at) => self.begin(at),
            Act::Land(at) => self.with_job(at, Self::land),
            Act::Commit(at) => self.commit_job(at, 0),
            Act::Return(at) => self.commit_job(at, COMPLETION_RETURNED),
            Act::Lie => self.lie(),
            Act::Die => self.die(),
            Act::Hang => {
                if let Some(process) = &mut self.tap.process {
                    process.hung = true;
                }
            }
            Act::Haunt(at) => self.haunt(at),
            Act::Exorcise(at) => self.exorcise(at),
            Act::Elsewhere(at) => self.execute_sent(at),
            Act::Fence => self.look(),
            Act::Fail => self.fail(),
            Act::Echo => {
                let at = self.rng.index(self.tap.words.echoes.len());
                let (sector, bytes) = self.tap.words.echoes.swap_remove(at);
                self.disk.put(sector, bytes, true);
            }
            Act::Rewrite => self.rewrite(),
        }
    }

    /// Replaces an act by another one now and then.
    fn instead(&mut self, act: Act) -> Act {
        let plan = self.tap.plan;
        let alive = self.tap.process.as_ref().is_some_and(|p| !p.hung);
        if self.rng.percent(plan.rewrite) {
            return Act::Rewrite;
        }
        if self.rng.percent(plan.lies) {
            return Act::Lie;
        }
        if !alive || act.is_late() {
            return act;
        }
        if self.may_die() && self.rng.percent(plan.death) {
            return Act::Die;
        }
        if plan.hang > 0 && self.tap.plan.deaths > 0 && self.rng.percent(plan.hang) {
            return Act::Hang;
        }
        let rests = self.tap.shadow.delivered() == 0;
        match act {
            Act::Fetch if rests && self.rng.percent(plan.claims) => Act::Claim,
            Act::Fetch if !rests && plan.claims > 0 && self.rng.percent(plan.claims) => Act::Widen,
            Act::Begin(at) if self.rng.percent(plan.returns) => Act::Return(at),
            Act::Commit(at) if self.is_write(at) && self.rng.percent(plan.hoard) => Act::Fetch,
            act => act,
        }
    }

    fn is_write(&self, at: usize) -> bool {
        let job = self.tap.process.as_ref().and_then(|p| p.jobs.get(at));
        job.is_some_and(|job| job.desc.op == OP_WRITE)
    }

    fn may_die(&self) -> bool {
        let tap = &self.tap;
        let Some(process) = tap.process.as_ref().filter(|_| tap.plan.deaths > 0) else {
            return false;
        };
        let jobs = || process.jobs.iter();
        let op = |op: u8| jobs().any(|job| job.desc.op == op);
        match tap.plan.moment {
            Moment::Any => true,
            Moment::Idle => tap.shadow.delivered() == 0 && tap.shadow.waiting() == 0,
            Moment::Unstarted => jobs().len() > 0 && jobs().all(|job| !job.started),
            Moment::Executed => jobs().any(|job| job.done),
            Moment::Running => jobs().any(|job| job.started && !job.done),
            Moment::Overlapping => jobs().any(|job| job.desc.op == OP_WRITE && self.is_met(job)),
            Moment::Flush => op(OP_FLUSH),
            Moment::Fua => jobs().any(|job| job.desc.flags & DESC_FUA != 0),
            Moment::Discard => jobs().any(|job| job.desc.op > OP_FLUSH),
            // The first process to die has nothing to replay.
            Moment::Replay if tap.counts.deaths == 0 => jobs().len() > 0,
            Moment::Replay => jobs().any(|job| job.desc.flags & DESC_REPLAY != 0),
        }
    }

    /// Returns true if another write to equal sectors waits.
    fn is_met(&self, job: &ProcessJob) -> bool {
        let end = job.desc.sector + job.desc.sectors;
        self.tap.posted.iter().any(|(tag, posted)| {
            let sectors = posted.slices.iter().map(|s| u64::from(s.len)).sum::<u64>() / 512;
            let overlap = posted.sector < end && job.desc.sector < posted.sector + sectors;
            *tag != job.desc.tag && posted.op == Op::Write && overlap
        })
    }

    fn open(&mut self) {
        match self.tap.shadow.opened() {
            Ok(epoch) => {
                self.tap.process = Some(SimProcess {
                    epoch,
                    fence: Fence::Local,
                    jobs: Vec::new(),
                    awake: true,
                    hung: false,
                    cache: BTreeMap::new(),
                });
                self.claim(epoch);
            }
            Err(why) => self.problem(format!("nobody has the disk, but: {why:?}")),
        }
    }

    fn start(&mut self) {
        let epoch = self.tap.process.as_ref().map_or(0, |p| p.epoch);
        match self.tap.shadow.started(epoch) {
            Err(why) => self.problem(format!("who has opened the disk cannot start it: {why:?}")),
            Ok(failed) => self.disk.wake |= failed.count > 0,
        }
    }

    /// Wakes a sleeping process if there is a request for it.
    pub(crate) fn wake_process(&mut self) {
        let wake = self.tap.shadow.has_deliverable();
        if wake && !self.commit(MachineFault::LeaveAsleep) {
            if let Some(process) = &mut self.tap.process {
                process.awake = true;
            }
        }
    }

    fn fetch_some(&mut self) {
        let epoch = self.tap.process.as_ref().map_or(0, |p| p.epoch);
        let max = self.rng.range(1, self.tap.plan.fetch as u64) as usize;
        let descs = self.fetch(epoch, max);
        if descs.is_empty() && !self.tap.shadow.has_deliverable() {
            if let Some(process) = &mut self.tap.process {
                process.awake = false;
            }
        }
        for desc in descs {
            self.fetched(desc);
        }
    }

    fn fetched(&mut self, desc: Desc) {
        let replay = desc.flags & DESC_REPLAY != 0;
        let mut job = ProcessJob {
            segments: self.tap.segments[usize::from(desc.tag)].clone(),
            desc,
            started: false,
            landed: 0,
            done: false,
            flushes: Vec::new(),
        };
        if replay {
            self.tap.counts.flushes += u64::from(desc.op == OP_FLUSH);
            self.tap.counts.fua += u64::from(desc.flags & DESC_FUA != 0);
            self.tap.counts.discards += u64::from(desc.op > OP_FLUSH);
            let flushes = desc.op == OP_FLUSH || desc.flags & DESC_PREFLUSH != 0;
            if flushes {
                self.check_earlier_writes(&desc);
            }
            if desc.op == OP_WRITE && self.commit(MachineFault::RereadGuest) {
                self.reread(desc.tag);
            }
            if desc.op == OP_WRITE && self.commit(MachineFault::SkipReplay) {
                job.started = true;
                job.done = true;
            }
        }
        if let Some(process) = &mut self.tap.process {
            process.jobs.push(job);
        }
    }

    /// Checks that a replayed flush comes after every earlier write.
    fn check_earlier_writes(&mut self, flush: &Desc) {
        let jobs = self.tap.process.iter().flat_map(|p| &p.jobs);
        let early = jobs
            .filter(|job| job.desc.op != OP_READ && job.desc.op != OP_FLUSH)
            .find(|job| job.desc.sequence < flush.sequence);
        if let Some(job) = early {
            let what = format!("a flush passes {:?} in a replay", job.desc);
            self.problem(what);
        }
    }

    fn reread(&mut self, tag: u16) {
        let slices = self.tap.posted.get(&tag).map(|p| p.slices.clone());
        for slice in slices.into_iter().flatten() {
            let range = usize::from(slice.offset)..usize::from(slice.offset + slice.len);
            if let Some(target) = self.front.resolve(slice.gref, false) {
                let bytes = self.target(target).map(|page| page[range.clone()].to_vec());
                if let Some(bytes) = bytes {
                    self.host.pages[slice.page.index()][range].copy_from_slice(&bytes);
                }
            }
        }
    }

    fn begin(&mut self, at: usize) {
        let dirty = self.disk.dirty();
        if let Some(job) = self.tap.process.as_mut().and_then(|p| p.jobs.get_mut(at)) {
            job.started = true;
            job.flushes = dirty;
        }
    }

    fn with_job(&mut self, at: usize, go_on: fn(&mut Self, &mut ProcessJob)) {
        let Some(mut process) = self.tap.process.take() else {
            return;
        };
        let mut job = process.jobs.swap_remove(at);
        self.tap.process = Some(process);
        go_on(self, &mut job);
        if let Some(process) = &mut self.tap.process {
            process.jobs.push(job);
        }
    }

    /// Executes a part of the I/O.
    pub(crate) fn land(&mut self, job: &mut ProcessJob) {
        let desc = job.desc;
        if job.landed == 0 && (desc.op == OP_FLUSH || desc.flags & DESC_PREFLUSH != 0) {
            self.flush_store(&job.flushes);
        }
        let left = desc.sectors - job.landed;
        let now = match self.rng.below(3) {
            0 if left > 1 => self.rng.range(1, left),
            _ => left,
        };
        for at in job.landed..job.landed + now {
            self.land_sector(job, at);
        }
        job.landed += now;
        if job.landed == desc.sectors {
            if desc.flags & DESC_FUA != 0 {
                let sectors: Vec<u64> = (desc.sector..desc.sector + desc.sectors).collect();
                self.flush_store(&sectors);
            }
            job.done = true;
        }
    }

    fn flush_store(&mut self, sectors: &[u64]) {
        if self.commit(MachineFault::IgnoreFlush) {
            return;
        }
        if let Some(process) = &mut self.tap.process {
            for (sector, bytes) in std::mem::take(&mut process.cache) {
                self.disk.put(sector, bytes, true);
                self.disk.flush(&[sector]);
            }
        }
        self.disk.flush(sectors);
    }

    fn land_sector(&mut self, job: &ProcessJob, at: u64) {
        let sector = job.desc.sector + at;
        let volatile = self.setup.limits.flush;
        match job.desc.op {
            OP_READ => {
                let cached = self.tap.process.as_ref().and_then(|p| p.cache.get(&sector));
                let bytes = cached.copied().or_else(|| self.disk.bytes(sector));
                let bytes = bytes.unwrap_or([0; SECTOR]);
                self.arena(&job.segments, at).copy_from_slice(&bytes);
            }
            OP_WRITE => {
                let bytes: TapBytes = (&*self.arena(&job.segments, at))
                    .try_into()
                    .expect("sector");
                if at == 0 && self.commit(MachineFault::ExecuteTwice) {
                    self.tap.words.echoes.push((sector, bytes));
                }
                if self.commit(MachineFault::PrivateCache) {
                    if let Some(process) = &mut self.tap.process {
                        process.cache.insert(sector, bytes);
                        return;
                    }
                }
                if let Some(process) = &mut self.tap.process {
                    process.cache.remove(&sector);
                }
                self.disk.put(sector, bytes, volatile);
            }
            _ => {
                if let Some(process) = &mut self.tap.process {
                    process.cache.remove(&sector);
                }
                self.disk.forget(sector, volatile);
            }
        }
    }

    fn commit_job(&mut self, at: usize, flags: u16) {
        let Some(process) = &mut self.tap.process else {
            return;
        };
        let job = process.jobs.swap_remove(at);
        let epoch = process.epoch;
        let completion = Completion {
            flags,
            ..completion(&job.desc)
        };
        if self.commit(MachineFault::LoseCompletion) {
            return;
        }
        let orphans = self.tap.shadow.orphans() > 0;
        let expected = match flags {
            _ if orphans => Committed::Released,
            0 => Committed::Done(job.desc.queue),
            _ => Committed::Returned,
        };
        let committed = self.say(epoch, &completion);
        if committed != Some(expected) {
            self.problem(format!("a true completion of {job:?}: {committed:?}"));
        }
        self.tap.words.old.push((epoch, completion));
        if flags == 0 {
            self.disk.completed += 1;
        }
    }

    /// Passes a completion to the kernel.
    fn say(&mut self, epoch: u64, completion: &Completion) -> Option<Committed> {
        let commit = completion.check().ok()?;
        let committed = self.tap.shadow.commit(epoch, &commit);
        if let Committed::Done(_) = committed {
            if !self.commit(MachineFault::SwallowWake) {
                self.disk.wake = true;
            }
        }
        self.tap.counts.refused += u64::from(committed == Committed::Refused);
        self.wake_process();
        Some(committed)
    }

    /// Lets a process, perhaps a dead one, lie.
    fn lie(&mut self) {
        let live = self.tap.shadow.epoch();
        let (mut epoch, mut completion) = (live, Completion::default());
        let old = self.tap.words.old.len();
        if old > 0 && self.rng.percent(70) {
            // Repeats a completion of this process, or of a dead one.
            (epoch, completion) = self.tap.words.old[self.rng.index(old)];
        } else {
            let tags = self.tap.segments.len() as u64;
            completion.tag = self.rng.below(tags + 2) as u16;
            completion.generation = self.rng.below(3) as u32;
            completion.result = self.rng.pick(&[0, -5, 1, i32::MIN]);
            completion.flags = self.rng.pick(&[0, 1, 2]);
            completion.reserved = self.rng.pick(&[0, 0, 7]);
            if self.names_a_delivery(&completion) {
                return;
            }
        }
        if self.commit(MachineFault::TrustStale) {
            epoch = live;
            completion.generation = self.generation(completion.tag);
        }
        let believed = self
            .say(epoch, &completion)
            .is_some_and(|committed| committed != Committed::Refused);
        if believed && self.fault.is_none() {
            self.problem(format!("{completion:?} of epoch {epoch} was believed"));
        }
    }

    fn generation(&self, tag: u16) -> u32 {
        let jobs = self.tap.process.iter().flat_map(|p| &p.jobs);
        let mut of_tag = jobs.filter(|job| job.desc.tag == tag);
        of_tag.next().map_or(0, |job| job.desc.generation)
    }

    fn names_a_delivery(&self, completion: &Completion) -> bool {
        let mut jobs = self.tap.process.iter().flat_map(|p| &p.jobs);
        jobs.any(|job| {
            job.desc.tag == completion.tag && job.desc.generation == completion.generation
        })
    }

    fn fail(&mut self) {
        let plan = self.tap.plan;
        if !self.rng.percent(plan.fail) {
            return;
        }
        let max = self.rng.range(1, 8) as usize;
        let failed = self.tap.shadow.fail_waiting(max);
        self.tap.counts.failed += failed.count as u64;
        self.disk.wake |= failed.count > 0;
    }

    /// The guest changes pages whose data it has handed over.
    fn rewrite(&mut self) {
        let writes = self.tap.posted.values().filter(|p| p.op == Op::Write);
        let all: Vec<_> = writes.flat_map(|p| &p.slices).copied().collect();
        if all.is_empty() {
            return;
        }
        let slice = self.rng.pick(&all);
        let range = usize::from(slice.offset)..usize::from(slice.offset + slice.len);
        self.front.rewrite(slice.gref, range);
        self.tap.counts.rewritten += 1;
    }
}
