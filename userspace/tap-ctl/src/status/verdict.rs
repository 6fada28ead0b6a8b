// SPDX-License-Identifier: MIT OR Apache-2.0
//! Verdicts on disks, and their severity.

use crate::host::Memory;
use crate::sample_delta::Figures;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// How a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// The disk is served.
    Ok,
    /// Its guest does not use it: it has not booted that far, or lets go of it.
    NotConnected,
    /// No image is open, and no request waits.
    Closed,
    /// Its guest is suspended, and its image is free.
    Inactive,
    /// The state of the disk is unknown.
    Unknown,
    /// Requests take long.
    Slow,
    /// Requests end in errors.
    Failing,
    /// An administrator or an error of the image has stopped it.
    Paused,
    /// Requests are there, and none is answered.
    Hung,
    /// Its process has ended, and that one's I/O has not.
    Fencing,
    /// Its guest waits, because the image cannot be had.
    Held,
    /// The disk has no process.
    DeadProcess,
    /// The guest's disk has no driver.
    NoDriver,
}

impl State {
    /// Returns 0 if all is well, 1 if an administrator should look at it, 2 if its guest waits or will.
    pub(crate) fn severity(self) -> u8 {
        match self {
            State::Ok | State::NotConnected | State::Closed | State::Inactive => 0,
            State::Unknown | State::Slow | State::Failing | State::Paused => 1,
            State::Hung | State::Fencing | State::Held | State::DeadProcess | State::NoDriver => 2,
        }
    }

    /// As it is printed, in JSON and in the metrics too.
    pub(crate) fn name(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::NotConnected => "not-connected",
            State::Closed => "closed",
            State::Inactive => "inactive",
            State::Unknown => "unknown",
            State::Slow => "slow",
            State::Failing => "failing",
            State::Paused => "paused",
            State::Hung => "hung",
            State::Fencing => "fencing",
            State::Held => "held",
            State::DeadProcess => "dead-process",
            State::NoDriver => "no-driver",
        }
    }
}

/// Where the time goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Cause {
    /// The image or device from which the disk is served.
    Storage,
    /// The process that serves it.
    Process,
    /// Memory of the driver, for which requests wait.
    PagePool,
    /// The ring, which has no room for more.
    Ring,
    /// Processors of this domain.
    HostCpu,
    /// The guest.
    Guest,
    /// An administrator, or a setting.
    Administrator,
}

impl Cause {
    /// As it is printed.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Cause::Storage => "storage",
            Cause::Process => "process",
            Cause::PagePool => "page-pool",
            Cause::Ring => "ring",
            Cause::HostCpu => "host-cpu",
            Cause::Guest => "guest",
            Cause::Administrator => "administrator",
        }
    }
}

/// For how long the oldest request has waited.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OldestRequest {
    /// A number of seconds.
    Seconds(f64),
    /// The request is older than this number of seconds; no counter shows when it began.
    AtLeast(f64),
}

impl fmt::Display for OldestRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OldestRequest::Seconds(seconds) => write!(f, "oldest={seconds:.0}s"),
            OldestRequest::AtLeast(seconds) => write!(f, "oldest>{seconds:.0}s"),
        }
    }
}

/// Verdict on a disk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Verdict {
    /// How it is.
    pub(crate) verdict: State,
    /// Older name of `verdict`, which a later version drops. In `tap-ctl list` `state` is that of the process.
    pub(crate) state: State,
    /// For how long, if it is hung.
    pub(crate) oldest: Option<OldestRequest>,
    /// Part in which the time is spent, if that is known.
    pub(crate) cause: Option<Cause>,
    /// Observation; empty if it adds nothing.
    pub(crate) why: String,
    /// Remedy.
    pub(crate) remedy: Option<String>,
}

impl Verdict {
    /// Nothing but a state.
    pub(crate) fn new(state: State, why: impl Into<String>) -> Verdict {
        Verdict {
            verdict: state,
            state,
            oldest: None,
            cause: None,
            why: why.into(),
            remedy: None,
        }
    }

    /// Adds the cause.
    pub(crate) fn because(self, cause: Cause) -> Verdict {
        let cause = Some(cause);
        Verdict { cause, ..self }
    }

    /// Adds the age of the oldest request.
    pub(crate) fn since(self, oldest: OldestRequest) -> Verdict {
        let oldest = Some(oldest);
        Verdict { oldest, ..self }
    }

    /// Adds the remedy.
    pub(crate) fn remedy(self, remedy: impl Into<String>) -> Verdict {
        let remedy = Some(remedy.into());
        Verdict { remedy, ..self }
    }

    /// The state, and for how long.
    pub(crate) fn word(&self) -> String {
        match &self.oldest {
            Some(oldest) => format!("{} {oldest}", self.state.name()),
            None => self.state.name().to_owned(),
        }
    }
}

/// Limits from which on a verdict is given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Requests take long from here on.
    pub(crate) slow: Duration,
    /// A disk is hung if it has answered nothing for so long.
    pub(crate) hung: Duration,
}

/// Default milliseconds of [`Limits::slow`].
pub(crate) const SLOW_MS: u32 = 100;
/// Default seconds of [`Limits::hung`].
pub(crate) const HUNG_S: u32 = 5;

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            slow: Duration::from_millis(SLOW_MS.into()),
            hung: Duration::from_secs(HUNG_S.into()),
        }
    }
}

/// The part of the time from which on a thread that cannot run counts.
const STARVED: f64 = 0.2;

/// The part of the time from which on it counts that requests wait for pages.
const PAGE_WAIT: f64 = 0.1;

/// The part of the room in the rings from which on it counts that they are in use.
const FULL: f64 = 0.7;

/// A disk with which nothing is wrong.
pub(crate) fn well(figures: &Figures) -> Verdict {
    full_ring(figures).unwrap_or_else(|| Verdict::new(State::Ok, ""))
}

/// A disk whose guest fills its rings. Requests that wait in the guest for room cannot be seen from here, so the disk
/// is not called slow.
fn full_ring(figures: &Figures) -> Option<Verdict> {
    let used = figures.ring_used.filter(|part| *part >= FULL)?;
    // A request in several pieces counts several times.
    let percent = (used.min(1.0) * 100.0).round();
    let why = format!(
        "{percent} % of the room in its rings were in use: more requests may wait in its guest"
    );
    let well = Verdict::new(State::Ok, why).because(Cause::Ring);
    Some(well.remedy(
        "if the guest is not content: larger rings (boot a Linux guest with xen_blkfront.max_ring_page_order=4), or more processors for it, each of which has a ring",
    ))
}

/// Describes the waits of requests for pages, if too few pages made a difference.
fn page_waits(figures: &Figures) -> Option<String> {
    let requests = figures.requests;
    let Some(part) = figures.page_wait else {
        // A driver that counts no time: how often, which is also how often a barrier waited for its turn.
        let often = figures.page_waits > 0 && figures.page_waits >= requests / 10;
        let times = figures.page_waits;
        return often
            .then(|| format!("{requests} requests came and had to wait for pages {times} times"));
    };
    let percent = (part * 100.0).round();
    if part >= PAGE_WAIT {
        return Some(format!(
            "for {percent} % of the time requests waited for pages, {} times among {requests}",
            figures.page_waits
        ));
    }
    let pieces = figures.pieces;
    (pieces > 0 && pieces >= requests / 10).then(|| {
        format!("{requests} requests were done in {pieces} pieces more, for want of pages for all of one")
    })
}

/// Facts that are not the disk's own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Surroundings {
    /// Time between the two looks.
    pub(crate) elapsed: Duration,
    /// Limits from which on a verdict is given.
    pub(crate) limits: Limits,
    /// The part of this domain's time that the hypervisor gave to others, of 1.
    pub(crate) stolen: f64,
    /// Memory of all disks, if our driver is loaded.
    pub(crate) memory: Option<Memory>,
    /// Memory that the disks of this guest have of it.
    pub(crate) guest_kib: u64,
}

impl Surroundings {
    /// A disk that has too little of the processors.
    pub(crate) fn starved(&self, figures: &Figures) -> Option<Verdict> {
        let verdict = |why: String, remedy: &str| {
            let slow = Verdict::new(State::Slow, why).because(Cause::HostCpu);
            Some(slow.remedy(remedy))
        };
        let percent = |part: f64| (part * 100.0).round();
        if self.stolen >= STARVED && figures.requests > 0 {
            let why = format!(
                "for {} % of the time the hypervisor ran other domains instead of this one",
                percent(self.stolen)
            );
            let remedy = "give this domain more weight (xl sched-credit2 -d 0 -w WEIGHT) or processors of its own (dom0_vcpus_pin)";
            return verdict(why, remedy);
        }
        if figures.starved >= STARVED {
            let why = format!(
                "for {} % of the time the thread that serves it waited for a processor",
                percent(figures.starved)
            );
            return verdict(
                why,
                "see with top(1) who uses the processors of this domain; give it more of them",
            );
        }
        None
    }

    /// A disk whose requests wait for memory.
    pub(crate) fn short_of_pages(&self, figures: &Figures) -> Option<Verdict> {
        let why = page_waits(figures)?;
        let slow = Verdict::new(State::Slow, why).because(Cause::PagePool);
        Some(slow.remedy(self.more_pages()))
    }

    /// Returns the remedy for too few pages.
    fn more_pages(&self) -> String {
        // Nearly all of it is used when the next block does not fit.
        let is_full = |used: u64, limit: u64| used >= limit.saturating_sub(limit / 20);
        let folder = "/sys/module/xen_blkback_rs/parameters";
        match self.memory {
            Some(memory) if memory.host_kib.is_some_and(|limit| is_full(memory.used_kib, limit)) => format!(
                "all disks have {} MiB and may have no more: write a higher limit to {folder}/host_memory_mib",
                memory.used_kib / 1024
            ),
            Some(memory) if is_full(self.guest_kib, memory.guest_kib) => format!(
                "the disks of this guest have {} MiB and may have no more: write a higher limit to {folder}/domain_memory_mib",
                self.guest_kib / 1024
            ),
            _ => "the memory of one queue is used up: load the module with a larger copy_pages, or make a tap disk with a larger --arena".into(),
        }
    }
}
