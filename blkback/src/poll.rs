// SPDX-License-Identifier: GPL-2.0-only

//! Waiting for the guest's next request, or for a fast disk, without going to sleep.
//!
//! Going to sleep and being woken costs the guest an event, Xen two scheduling decisions and dom0 an interrupt and two
//! task switches: more than serving a small request. A queue whose guest comes back soon therefore polls the ring for a
//! while first, with the guest's events off.
//!
//! A queue polls for no longer than a sleep costs (`poll_us`), and only where that has paid off ([`PollEstimator`]); for a
//! process it polls wherever sleeps are short ([`Gathering`]). It stops polling when anything else could run on this
//! CPU: another task, or, where dom0 shares its physical CPU, another domain ([`Rivals`]).

use crate::linux;
use crate::params;
use crate::poll_estimator::PollEstimator;
use kernel::processor::cpu_relax;

/// Checks of the ring between two readings of the clock: a few microseconds.
const LOOKS: u32 = 16;
/// Pauses between two checks. The guest writes to the memory that is polled, and each check takes its cache line away
/// from the guest's processor.
const PAUSES: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PollResult {
    Ready,
    /// Ready, and another domain had the physical CPU until then.
    ReadyWhenBack,
    TimedOut,
    /// Another task of this domain needs the CPU.
    CpuWanted,
    /// Another domain had the physical CPU, and that was no use or took too long.
    CpuShared,
}

/// Polls until `ready`, for at most `limit` nanoseconds.
fn look(limit: u64, rivals: &mut Rivals, mut ready: impl FnMut() -> bool) -> PollResult {
    let start = linux::local_clock();
    loop {
        // If the guest waits for this very CPU, its request cannot come before it has had the CPU.
        for _ in 0..if rivals.are_here() { 1 } else { LOOKS } {
            if ready() {
                return PollResult::Ready;
            }
            for _ in 0..PAUSES {
                cpu_relax();
            }
        }
        if linux::cpu_is_wanted() {
            return PollResult::CpuWanted;
        }
        if let Some(away) = rivals.offer_cpu() {
            if away <= Rivals::AWAY && ready() {
                return PollResult::ReadyWhenBack;
            }
            rivals.rest(away);
            return PollResult::CpuShared;
        }
        if since(start) > limit {
            return PollResult::TimedOut;
        }
    }
}

/// Returns the nanoseconds since `start`; clocks that differ between CPUs may make it a very long time.
fn since(start: u64) -> u64 {
    linux::local_clock().saturating_sub(start)
}

/// Other domains on this physical CPU, including the guest whose request the queue polls for.
///
/// A kernel sees only its own tasks. Steal time does not help: while a queue polls, the hypervisor takes nothing away
/// from dom0, but dom0 keeps the CPU from a guest; and a vCPU that wakes on a CPU of its own has "stolen" time as well,
/// from leaving the idle state. So the queue offers the CPU to any domain that waits for it. If none does, the offer
/// costs a hypercall, and is made ever more rarely. If one does, it was entitled to the time. If it was the guest and
/// has sent a request, the guest needs no event and dom0 no interrupt; if not, the queue does not poll for a long time.
#[derive(Debug)]
struct Rivals {
    /// Offers still to skip, and the number that was set last.
    skip: u32,
    skipped: u32,
    /// Another domain took the last offer.
    here: bool,
    /// When polling was given up, and for how long, in nanoseconds.
    rest_since: u64,
    rest: u64,
}

impl Rivals {
    /// Nanoseconds: an offer that no domain takes returns sooner than two switches of domains can be done.
    const BACK: u64 = 5_000;
    /// Nanoseconds: a guest that makes its next request has the CPU for no longer than this.
    const AWAY: u64 = 100_000;
    /// Most offers that are skipped in a row.
    const SURE: u32 = 63;
    /// Factor from the time that other domains had the CPU without use, which an event might have ended sooner, to the
    /// time without polling.
    const REST: u64 = 128;

    fn new() -> Self {
        Self {
            skip: 0,
            skipped: 0,
            here: false,
            rest_since: 0,
            rest: 0,
        }
    }

    fn are_here(&self) -> bool {
        self.here
    }

    /// Offers the physical CPU, unless no domain has taken it for long; returns for how many nanoseconds others had it.
    fn offer_cpu(&mut self) -> Option<u64> {
        if let Some(left) = self.skip.checked_sub(1) {
            self.skip = left;
            return None;
        }
        let offered = linux::local_clock();
        linux::yield_processor();
        let away = since(offered);
        self.here = away > Self::BACK;
        if self.here {
            self.skipped = 0;
            return Some(away);
        }
        let skip = self.skipped.saturating_mul(2).saturating_add(1);
        self.skipped = skip.min(Self::SURE);
        self.skip = self.skipped;
        None
    }

    /// Stops polling for a while, because others had the CPU for `away` nanoseconds without use.
    fn rest(&mut self, away: u64) {
        self.rest_since = linux::local_clock();
        self.rest = away.saturating_mul(Self::REST);
    }

    /// Returns true while the queue leaves the CPU to others.
    fn are_left_alone(&mut self) -> bool {
        if self.rest != 0 && since(self.rest_since) > self.rest {
            self.rest = 0;
        }
        self.rest != 0
    }
}

/// How long to poll where a process executes the requests: as long as sleeps are short, at any cost. Requests gather
/// while a queue polls, and the process wakes up once for all of them.
#[derive(Debug)]
struct Gathering {
    now: u64,
    most: u64,
}

impl Gathering {
    /// Nanoseconds of the first attempt.
    const START: u64 = 5_000;

    fn looked_in_vain(&mut self) {
        let half = self.now / 2;
        self.now = if half >= Self::START { half } else { 0 };
    }

    fn slept(&mut self, nanoseconds: u64) {
        if nanoseconds <= self.most {
            let twice = self.now.saturating_mul(2);
            self.now = twice.max(Self::START).min(self.most);
        }
    }
}

/// State of one queue's polling.
#[derive(Debug)]
pub(crate) struct Poller {
    estimator: PollEstimator,
    /// In place of `estimator`, where a process executes the requests.
    gathering: Gathering,
    gathers: bool,
    rivals: Rivals,
}

impl Poller {
    /// Factor by which a queue may poll longer where a process executes its requests.
    const FOR_PROCESS: u64 = 5;

    /// Makes the state of a queue that has not waited yet.
    fn new() -> Self {
        let sleep = params::poll_nanoseconds();
        Self {
            estimator: PollEstimator::new(sleep),
            gathering: Gathering {
                now: 0,
                most: sleep.saturating_mul(Self::FOR_PROCESS),
            },
            gathers: false,
            rivals: Rivals::new(),
        }
    }

    /// Polls until `ready`, if that is worth it, and for no longer than that; returns whether it became ready.
    fn wait(&mut self, ready: impl FnMut() -> bool) -> bool {
        let limit = match self.gathers {
            true => self.gathering.now,
            false => self.estimator.begin(),
        };
        if limit == 0 || self.rivals.are_left_alone() {
            return false;
        }
        let start = linux::local_clock();
        let look = look(limit, &mut self.rivals, ready);
        if self.gathers {
            match look {
                PollResult::TimedOut => self.gathering.looked_in_vain(),
                PollResult::CpuShared => self.gathering.now = 0,
                PollResult::Ready | PollResult::ReadyWhenBack | PollResult::CpuWanted => {}
            }
        }
        match look {
            PollResult::Ready => self.estimator.looked(since(start), true),
            PollResult::ReadyWhenBack => self.estimator.is_free(),
            PollResult::TimedOut => self.estimator.looked(since(start), false),
            PollResult::CpuWanted => self.estimator.interrupted(),
            PollResult::CpuShared => self.estimator.is_harmful(),
        }
        matches!(look, PollResult::Ready | PollResult::ReadyWhenBack)
    }

    /// Learns from a sleep of this length.
    fn slept(&mut self, nanoseconds: u64) {
        if self.rivals.are_left_alone() {
            return;
        }
        if self.gathers {
            self.gathering.slept(nanoseconds);
        }
        // Where other domains share the CPU, only polling shows what polling costs.
        if !self.rivals.are_here() {
            self.estimator.slept(nanoseconds);
        }
    }
}

/// How one queue waits: for the guest while the disk is idle, and for guest or disk while I/O is in flight. The two are
/// separate, because the speed of a guest says nothing about the speed of a disk.
#[derive(Debug)]
pub(crate) struct Pollers {
    idle: Poller,
    busy: Poller,
    /// The last sleep, if the queue has not waited since: the requests in flight when it began, and the requests that
    /// were taken or answered after it.
    asleep: Option<(u16, u32)>,
}

impl Pollers {
    /// Makes the pollers of a queue that has not waited yet.
    pub(crate) fn new() -> Self {
        Self {
            idle: Poller::new(),
            busy: Poller::new(),
            asleep: None,
        }
    }

    /// Polls with `in_flight` requests in flight, as [`Poller::wait`] does.
    pub(crate) fn wait(&mut self, in_flight: u16, ready: impl FnMut() -> bool) -> bool {
        if let Some((in_flight, requests)) = self.asleep.take() {
            self.of(in_flight).estimator.served(requests);
        }
        self.of(in_flight).wait(ready)
    }

    /// Returns the poller for this number of requests in flight.
    fn of(&mut self, in_flight: u16) -> &mut Poller {
        if in_flight == 0 {
            &mut self.idle
        } else {
            &mut self.busy
        }
    }

    /// Learns from a sleep of this length, with `in_flight` requests in flight.
    pub(crate) fn slept(&mut self, in_flight: u16, nanoseconds: u64) {
        self.of(in_flight).slept(nanoseconds);
        self.asleep = Some((in_flight, 0));
    }

    /// Records that a pass has taken or answered `requests` requests, which shows what the sleep was good for, and
    /// whether a process executes them now.
    pub(crate) fn passed(&mut self, requests: u32, gathers: bool) {
        self.idle.gathers = gathers;
        self.busy.gathers = gathers;
        if let Some((_, all)) = &mut self.asleep {
            *all = all.saturating_add(requests);
        }
    }
}
