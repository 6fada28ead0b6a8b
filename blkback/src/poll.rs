// SPDX-License-Identifier: GPL-2.0-only

//! Waiting for the guest's next request, or for a fast disk, without going to sleep.
//!
//! Going to sleep and being woken costs the guest an event, Xen two scheduling decisions and dom0
//! an interrupt and two task switches: more than serving a small request. A queue whose guest
//! comes back soon therefore looks at the ring for a while first, with the guest's events off.
//!
//! It does so for no longer than a sleep costs (`poll_us`), and only where that has paid off
//! ([`Worth`]); for a process it looks wherever sleeps are short ([`Gathering`]). And nothing is
//! waited for when anything else could run on this CPU: another task, or where dom0 shares its
//! physical CPU, another domain ([`Rivals`]).

use crate::linux;
use crate::params;
use crate::worth::Worth;
use kernel::processor::cpu_relax;

/// Looks between two looks at the clock: a few microseconds.
const LOOKS: u32 = 16;
/// Pauses between two looks. The guest writes to what is looked at, and each look takes that away
/// from its processor.
const PAUSES: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Ready,
    /// And another domain had the physical CPU until then.
    ReadyWhenBack,
    TimedOut,
    /// A task of this domain wants the CPU.
    CpuWanted,
    /// Another domain had the physical CPU, and that was no use or took too long.
    CpuShared,
}

/// Looks until `ready` for at most so many nanoseconds.
fn look(limit: u64, rivals: &mut Rivals, mut ready: impl FnMut() -> bool) -> Look {
    let start = linux::local_clock();
    loop {
        // Where the guest waits for this very CPU there is nothing to see before it had it.
        for _ in 0..if rivals.are_here() { 1 } else { LOOKS } {
            if ready() {
                return Look::Ready;
            }
            for _ in 0..PAUSES {
                cpu_relax();
            }
        }
        if linux::cpu_is_wanted() {
            return Look::CpuWanted;
        }
        if let Some(away) = rivals.offer_cpu() {
            if away <= Rivals::AWAY && ready() {
                return Look::ReadyWhenBack;
            }
            rivals.rest(away);
            return Look::CpuShared;
        }
        if since(start) > limit {
            return Look::TimedOut;
        }
    }
}

/// Nanoseconds since then; a clock that differs between CPUs may make it a very long time.
fn since(start: u64) -> u64 {
    linux::local_clock().saturating_sub(start)
}

/// Other domains on this physical CPU, the guest that is waited for among them.
///
/// A kernel sees its own tasks only, and steal time does not tell what is needed: while a queue looks,
/// the hypervisor takes nothing away from dom0, it is dom0 that keeps the CPU from a guest; and a vCPU
/// that wakes on a CPU of its own has "stolen" time as well, from leaving the idle state. So the CPU
/// is offered to whoever waits for it. If nobody does, that costs a hypercall, and is done ever more
/// rarely. If somebody does, the time was theirs. If that was the guest and it has sent a request, it
/// needs no event and dom0 no interrupt; if not, the CPU is left alone for long.
#[derive(Debug)]
struct Rivals {
    /// Offers to skip, and how many that was the last time.
    skip: u32,
    skipped: u32,
    /// The last offer was taken.
    here: bool,
    /// When looking was given up, and for how long.
    rest_since: u64,
    rest: u64,
}

impl Rivals {
    /// An offer that nobody takes comes back sooner than two switches of domains can be done.
    const BACK: u64 = 5_000;
    /// A guest that makes its next request has the CPU for no longer than this.
    const AWAY: u64 = 100_000;
    /// Most offers that are skipped.
    const SURE: u32 = 63;
    /// For one unit of time without the CPU, which an event might have ended sooner, so many with it.
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

    /// Offers the physical CPU, unless nobody has taken it for long; returns how long others had it.
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

    /// Others had the CPU for so long, and it was no use.
    fn rest(&mut self, away: u64) {
        self.rest_since = linux::local_clock();
        self.rest = away.saturating_mul(Self::REST);
    }

    /// True while the CPU is left to others.
    fn are_left_alone(&mut self) -> bool {
        if self.rest != 0 && since(self.rest_since) > self.rest {
            self.rest = 0;
        }
        self.rest != 0
    }
}

/// How long to look where a process executes the requests: for as long as sleeps are short, whatever else
/// that costs. Requests gather while a queue looks, and the process wakes up once for all of them.
#[derive(Debug)]
struct Gathering {
    now: u64,
    most: u64,
}

impl Gathering {
    /// The first time that is tried.
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

/// How one queue waits.
#[derive(Debug)]
pub(crate) struct Poller {
    worth: Worth,
    /// In place of `worth`, where a process executes the requests.
    gathering: Gathering,
    gathers: bool,
    rivals: Rivals,
}

impl Poller {
    /// What looking for a process is worth, for each nanosecond that it is worth for a queue alone.
    const FOR_PROCESS: u64 = 5;

    /// A queue that has not waited yet.
    fn new() -> Self {
        let sleep = params::poll_nanoseconds();
        Self {
            worth: Worth::new(sleep),
            gathering: Gathering {
                now: 0,
                most: sleep.saturating_mul(Self::FOR_PROCESS),
            },
            gathers: false,
            rivals: Rivals::new(),
        }
    }

    /// Looks until `ready`, if that is worth it; returns whether it came to be in the time for which
    /// it is.
    fn wait(&mut self, ready: impl FnMut() -> bool) -> bool {
        let limit = match self.gathers {
            true => self.gathering.now,
            false => self.worth.begin(),
        };
        if limit == 0 || self.rivals.are_left_alone() {
            return false;
        }
        let start = linux::local_clock();
        let look = look(limit, &mut self.rivals, ready);
        if self.gathers {
            match look {
                Look::TimedOut => self.gathering.looked_in_vain(),
                Look::CpuShared => self.gathering.now = 0,
                Look::Ready | Look::ReadyWhenBack | Look::CpuWanted => {}
            }
        }
        match look {
            Look::Ready => self.worth.looked(since(start), true),
            Look::ReadyWhenBack => self.worth.is_free(),
            Look::TimedOut => self.worth.looked(since(start), false),
            Look::CpuWanted => self.worth.interrupted(),
            Look::CpuShared => self.worth.is_harmful(),
        }
        matches!(look, Look::Ready | Look::ReadyWhenBack)
    }

    /// Learns from a sleep that began at `start`.
    fn slept(&mut self, start: u64) {
        if self.rivals.are_left_alone() {
            return;
        }
        if self.gathers {
            self.gathering.slept(since(start));
        }
        // What looking costs where others are is learned by looking only.
        if !self.rivals.are_here() {
            self.worth.slept(since(start));
        }
    }
}

/// How one queue waits for the guest while the disk is idle, and for either while I/O is in flight.
/// How soon a guest comes back says nothing about how fast a disk is.
#[derive(Debug)]
pub(crate) struct Pollers {
    idle: Poller,
    busy: Poller,
    /// Of the last sleep, if nothing was waited for since: the requests in flight when it began, and those that were
    /// taken or answered when it was over.
    asleep: Option<(u16, u32)>,
}

impl Pollers {
    /// For a queue that has not waited yet.
    pub(crate) fn new() -> Self {
        Self {
            idle: Poller::new(),
            busy: Poller::new(),
            asleep: None,
        }
    }

    /// Looks with so many requests in flight, as [`Poller::wait`] does.
    pub(crate) fn wait(&mut self, in_flight: u16, ready: impl FnMut() -> bool) -> bool {
        if let Some((in_flight, requests)) = self.asleep.take() {
            self.of(in_flight).worth.served(requests);
        }
        self.of(in_flight).wait(ready)
    }

    /// The one for so many requests in flight.
    fn of(&mut self, in_flight: u16) -> &mut Poller {
        if in_flight == 0 {
            &mut self.idle
        } else {
            &mut self.busy
        }
    }

    /// Learns from a sleep that began at `start`, with so many requests in flight.
    pub(crate) fn slept(&mut self, in_flight: u16, start: u64) {
        self.of(in_flight).slept(start);
        self.asleep = Some((in_flight, 0));
    }

    /// Learns what a sleep was good for: a pass has taken or answered so many requests; and whether those are
    /// for a process now.
    pub(crate) fn passed(&mut self, requests: u32, gathers: bool) {
        self.idle.gathers = gathers;
        self.busy.gathers = gathers;
        if let Some((_, all)) = &mut self.asleep {
            *all = all.saturating_add(requests);
        }
    }
}
