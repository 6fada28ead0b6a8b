// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The end of a process, and the I/O that it leaves running: on this machine, where it holds pages of the arena, and on
//! remote servers, where this machine does not see it.

use ring::tap::abi::{Desc, MAX_SETTLE_MS, OP_FLUSH, OP_READ, OP_WRITE, STATE_LIVE};
use ring::tap::checked::{Claimed, Fence};

use crate::history::{decode, SECTOR};
use crate::machine::{Machine, MachineFault};
use crate::process::{completion, ProcessJob};
use crate::tap::TapBytes;

/// Nanoseconds of one unit of the machine's clock.
const TICK_NS: u64 = 1_000_000;
/// The longest time for which a remote server may execute I/O that a process of the simulation has sent.
const LONGEST_MS: u64 = 1000;
/// The longest pause between two checks of a dead process.
const LONGEST_PAUSE: u64 = 100;

/// I/O of a dead process that holds pages of the arena.
#[derive(Debug)]
pub(crate) struct Ghost {
    job: ProcessJob,
    fence: Fence,
}

/// I/O that a remote server executes, and that holds no pages here any more.
#[derive(Debug)]
pub(crate) struct Sent {
    job: ProcessJob,
    /// Data that it writes.
    data: Vec<TapBytes>,
    /// The server executes it before this time or never; `None` if the time is unknown.
    until: Option<u64>,
}

impl Ghost {
    /// The queue whose pages it holds.
    pub(crate) fn queue(&self) -> u16 {
        self.job.desc.queue
    }
}

fn changes(desc: &Desc) -> bool {
    desc.op != OP_READ && desc.op != OP_FLUSH
}

impl Machine {
    /// Claims when the I/O of a process is over, or claims nothing if that is when it holds no page.
    pub(crate) fn claim(&mut self, epoch: u64) {
        let plan = self.tap.plan;
        let fence = if self.rng.percent(plan.sessions) {
            // CAST: a small number.
            let settle_ms = self.rng.range(1, LONGEST_MS) as u32;
            assert!(settle_ms <= MAX_SETTLE_MS);
            Fence::Session { settle_ms }
        } else if self.rng.percent(plan.unknown) {
            Fence::None
        } else {
            Fence::Local
        };
        let again = self.tap.shadow.state() == STATE_LIVE;
        let unsaid = fence == Fence::Local && !again && self.rng.percent(50);
        let heard = match self.commit(MachineFault::ForgetClass) {
            true => Fence::Local,
            false => fence,
        };
        let claimed = Claimed {
            fence: heard,
            ..Claimed::BEFORE
        };
        if !unsaid && !self.tap.shadow.claim(epoch, claimed) {
            self.problem(format!("{claimed:?} is refused: {:?}", self.tap.shadow));
        }
        self.tap.counts.claimed_again += u64::from(again);
        if let Some(process) = &mut self.tap.process {
            process.fence = fence;
        }
    }

    /// Makes a process that has requests in hand claim a later fence: it is served on.
    pub(crate) fn widen(&mut self) {
        let Some((epoch, before)) = self.tap.process.as_ref().map(|p| (p.epoch, p.fence)) else {
            return;
        };
        // CAST: a small number.
        let more = self.rng.range(1, LONGEST_MS) as u32;
        let fence = match before {
            Fence::Local => Fence::Session { settle_ms: more },
            Fence::Session { settle_ms } => Fence::Session {
                settle_ms: settle_ms.saturating_add(more).min(MAX_SETTLE_MS),
            },
            Fence::None => return,
        };
        let claimed = Claimed {
            fence,
            ..Claimed::BEFORE
        };
        if fence == before {
            return;
        }
        let is_heard = !self.commit(MachineFault::ForgetClass);
        let is_taken = !is_heard || self.tap.shadow.claim(epoch, claimed);
        if !is_taken || self.tap.shadow.state() != STATE_LIVE {
            self.problem(format!("{claimed:?} is refused: {:?}", self.tap.shadow));
        }
        self.tap.counts.widened += 1;
        if let Some(process) = &mut self.tap.process {
            process.fence = fence;
        }
    }

    pub(crate) fn die(&mut self) {
        let Some(process) = self.tap.process.take() else {
            return;
        };
        let counts = &mut self.tap.counts;
        counts.deaths += 1;
        counts.deaths_in_work += u64::from(!process.jobs.is_empty());
        self.tap.plan.deaths = self.tap.plan.deaths.saturating_sub(1);
        let lost = process.jobs.iter().filter(|job| changes(&job.desc));
        self.tap.lost = match process.fence {
            Fence::None => lost.count(),
            Fence::Local | Fence::Session { .. } => 0,
        };
        for job in process.jobs {
            // The completion that it would have sent.
            let said = (process.epoch, completion(&job.desc));
            self.tap.words.old.push(said);
            if job.started && !job.done {
                let fence = process.fence;
                self.tap.ghosts.push(Ghost { job, fence });
            }
        }
        self.tap.shadow.closed();
    }

    /// Advances the I/O of a dead process.
    pub(crate) fn haunt(&mut self, at: usize) {
        let mut ghost = self.tap.ghosts.swap_remove(at);
        self.tap.counts.late += 1;
        self.land(&mut ghost.job);
        if !ghost.job.done {
            self.tap.ghosts.push(ghost);
        }
    }

    /// Releases the pages of an I/O: it is cancelled, or was sent to a server.
    pub(crate) fn exorcise(&mut self, at: usize) {
        let Ghost { job, fence } = self.tap.ghosts.swap_remove(at);
        let until = match fence {
            Fence::Local => return,
            Fence::Session { settle_ms } => Some(self.clock + u64::from(settle_ms)),
            // I/O that may be executed at any time must be a write, which has values of its own.
            Fence::None if job.desc.op != OP_WRITE => return,
            Fence::None => None,
        };
        let sectors = match job.desc.op {
            OP_WRITE => job.landed..job.desc.sectors,
            _ => 0..0,
        };
        let mut data: Vec<TapBytes> = Vec::new();
        for at in sectors {
            let bytes: &[u8] = self.arena(&job.segments, at);
            data.push(bytes.try_into().expect("a sector"));
        }
        self.tap.sent.push(Sent { job, data, until });
    }

    /// Lets the server execute some I/O, if there is time left.
    pub(crate) fn execute_sent(&mut self, at: usize) {
        // The time is later than all others here.
        if self.rng.percent(80) {
            return;
        }
        let sent = self.tap.sent.swap_remove(at);
        if sent.until.is_none_or(|until| self.clock < until) {
            let left = (sent.data.len() as u64).max(1);
            let now = self.rng.range(1, left) as usize;
            self.execute_elsewhere(sent, now);
        }
    }

    fn execute_elsewhere(&mut self, mut sent: Sent, sectors: usize) {
        self.tap.counts.elsewhere += 1;
        let (desc, volatile) = (sent.job.desc, self.setup.limits.flush);
        let first = desc.sector + sent.job.landed;
        match desc.op {
            OP_READ => return,
            OP_FLUSH => return self.disk.flush(&sent.job.flushes),
            OP_WRITE => {}
            _ => {
                let sectors = first..desc.sector + desc.sectors;
                return sectors.for_each(|sector| self.disk.forget(sector, volatile));
            }
        }
        let rest = sent.data.split_off(sectors.min(sent.data.len()));
        for (sector, bytes) in (first..).zip(std::mem::replace(&mut sent.data, rest)) {
            if sent.until.is_none() {
                self.stray(&bytes);
            }
            self.disk.put(sector, bytes, volatile);
            sent.job.landed += 1;
        }
        if !sent.data.is_empty() {
            self.tap.sent.push(sent);
        }
    }

    /// Records that a write that failed, because its end is unknown, is executed after the failure.
    fn stray(&mut self, bytes: &[u8; SECTOR]) {
        if let Some(value) = decode(bytes) {
            self.history.stray((value >> 32) as u32);
        }
    }

    /// The kernel checks a dead process for visible I/O and sees none; it may have checked before.
    pub(crate) fn look(&mut self) {
        let _planted = self.commit(MachineFault::SkipFence);
        self.clock += self.rng.below(LONGEST_PAUSE);
        // During the pause.
        for sent in std::mem::take(&mut self.tap.sent) {
            match sent.until {
                Some(until) if until <= self.clock => {
                    if self.rng.percent(50) {
                        self.execute_elsewhere(sent, usize::MAX);
                    }
                }
                _ => self.tap.sent.push(sent),
            }
        }
        // Requests of a guest that is gone get no answer.
        let orphans = self.tap.shadow.orphans() > 0;
        let lost = if orphans { 0 } else { self.tap.lost };
        let Some(failed) = self.tap.shadow.quiet(self.clock * TICK_NS) else {
            self.tap.counts.unsettled += 1;
            return;
        };
        if failed.count != lost && self.fault.is_none() {
            self.problem(format!("{lost} requests are lost, but {failed:?}"));
        }
        self.tap.counts.lost += failed.count as u64;
        self.disk.wake |= failed.count > 0;
    }
}
