// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lease that is a resource of sanlock, for hosts whose shared storage is ordered by that.
//!
//! sanlock gives a resource to a host: each host joins a lockspace under a number of its own and renews that on storage
//! (every 20 s); a resource names the number that has it. To processes it lends what the host has: it kills them when
//! the number is not renewed for 80 s, and if one of them stays, a watchdog resets the host 60 s later. Only then
//! sanlock gives another host what this one had.
//!
//! **No process stays registered here.** A registered process loses the resource when it ends, and the process of a
//! disk may end at any time, with I/O under way, and be replaced; so may the supervisor. So the resource is taken
//! *persistent*: the connection that took it is closed at once, and the host has it as an *orphan* until it is given
//! up. The lockspace knows that orphans use it, so until none of the disk's I/O is under way, the host does not leave
//! it, and the watchdog stays armed. The writer ends by the [term](Term) of this library: a timer of the kernel ends
//! the process whether a supervisor is there or not.
//!
//! | rule | without it |
//! |---|---|
//! | the resource is taken persistent | another host takes it when a process dies, with its I/O under way |
//! | the lockspace counts orphans as use | the host leaves a lockspace that is lost, and is not reset, though I/O hangs that lands after the writes of the next host |
//! | the term ends 6 I/O timeouts after the last renewal, when sanlock warns, by the time of [`now`](crate::now) | I/O over a network, which gets a minute to settle, is not over when the watchdog resets the host; a host that slept writes when it wakes |
//! | a lost lease is released when its I/O is over ([`Lease::settle`]), and not before | as above; or the watchdog resets a host that has stopped in order |
//! | a heartbeat compares the number's generation and the resource's version | a host that has left the lockspace and joined it again continues with a resource that another host had in the meantime |
//! | after taking or resuming it, or after a sleep, the host reads the holder from storage | sanlock measures by a clock that stands still while the host sleeps, and does not know which host took it in the meantime |
//! | there is a watchdog | no program ends the I/O of a host that others take for dead |
//! | the image is not written through the page cache | the kernel writes dirty pages after its process is gone |
//!
//! Such leases rest on the assumptions of sanlock: the storage of the lockspace and that of the image are lost to a
//! host together or not at all, or the watchdog ends both; and all hosts have the same timeouts.

mod daemon;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod refusal;
mod state;
mod wire;

use crate::{Grant, Holder, HolderIsDead, Lease, LeaseClaim, LeaseView, Owner, Term};
use control::{Code, Failure, SanlockResource};
use daemon::{Daemon, Trouble};
use rustix::time::{clock_gettime, ClockId};
use state::{DaemonState, HeldResource, JoinedLockspace, Phase};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Time between two looks.
const BEAT: Duration = Duration::from_secs(2);
/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(500);
/// The least I/O timeout of a lockspace, in seconds: its terms are twelve, and some heartbeats find it renewed.
const TIMEOUT: u64 = 2;
/// How much longer a sleep of the host may seem than it was: its clocks are not read at once.
const SLEPT: Duration = Duration::from_secs(1);

/// Why it is lost, if storage knows what the daemon does not.
const TAKEN: &str = "on storage it is not this host's, which must have slept";

/// A lease that is a resource of sanlock.
#[derive(Debug)]
pub(crate) struct Sanlock {
    resource: SanlockResource,
    image: PathBuf,
    claim: LeaseClaim,
    daemon: Daemon,
    /// A watchdog is required; without one this host is not fenced, which is for tests only.
    needs_watchdog: bool,
    got: Option<TakenResource>,
    term: Term,
}

/// Identity of a resource that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TakenResource {
    host_id: u64,
    generation: u64,
    version: u64,
    /// How long the host had slept since its boot.
    slept: Duration,
}

/// A lease that is not this host's any more, and why.
enum LostLease {
    Here(TakenResource, Duration),
    Lost(String),
}

/// The resource as a lease of `image`.
pub(crate) fn open(resource: &SanlockResource, image: &Path, claim: LeaseClaim) -> Box<dyn Lease> {
    Box::new(Sanlock::new(resource, image, claim, Daemon::here()))
}

impl Sanlock {
    fn new(resource: &SanlockResource, image: &Path, claim: LeaseClaim, daemon: Daemon) -> Sanlock {
        Sanlock {
            resource: resource.clone(),
            image: image.into(),
            claim,
            daemon,
            needs_watchdog: true,
            got: None,
            term: Term::default(),
        }
    }

    /// The lockspace, if something may be taken there.
    fn joined<'s>(&self, state: &'s DaemonState) -> Result<&'s JoinedLockspace, Failure> {
        let name = &self.resource.lockspace;
        let refuse = |why: String| Err(Failure::new(Code::State, why));
        let space = match state.space(name) {
            Some(space) if space.phase == Phase::Joined => space,
            Some(space) if space.phase == Phase::Joining => {
                return refuse(format!("this host is joining the lockspace {name}, which takes it up to a minute or two: try again"))
            }
            Some(_) => {
                return refuse(format!("this host is leaving the lockspace {name}, or has lost its storage: see to that, and have it join again"))
            }
            None => {
                return refuse(format!("this host has not joined the lockspace {name}: sanlock client add_lockspace -s {name}:HOST_ID:/PATH:OFFSET, which oVirt and libvirt do by themselves"))
            }
        };
        if space.io_timeout < TIMEOUT {
            return refuse(format!(
                "the lockspace {name} has an I/O timeout of {} s, so a disk would have to stop whenever its storage is slow: add it with {TIMEOUT} s or more, sanlock's own is 10",
                space.io_timeout
            ));
        }
        if self.needs_watchdog && !state.has_watchdog {
            return refuse("sanlock runs without a watchdog, so nothing ends the I/O of this host before another one takes its leases: set use_watchdog = 1 in /etc/sanlock/sanlock.conf, and start wdmd".into());
        }
        Ok(space)
    }

    /// One attempt. Returns the daemon's error number if another holder has it.
    fn attempt(&mut self) -> Result<Result<Grant, i32>, Failure> {
        self.joined(&self.daemon.state()?)?;
        match self.acquire() {
            Ok(()) => {}
            Err(Trouble::Refused(code)) if refusal::is_held(code) => return Ok(Err(code)),
            Err(Trouble::Refused(code)) => return Err(refusal::explain(&self.resource, code)),
            // It may be this host's by now.
            Err(Trouble::Failed(failure)) => return Err(self.undone(failure)),
        }
        match self.confirm() {
            Ok(LostLease::Here(got, until)) => Ok(Ok(self.granted(got, until))),
            Ok(LostLease::Lost(why)) => Err(self.undone(self.lost(&why))),
            Err(failure) => Err(self.undone(failure)),
        }
    }

    /// Looks whether it is this host's, on storage too: what the host had before may have been lost in its sleep.
    fn confirm(&self) -> Result<LostLease, Failure> {
        match self.look(None)? {
            LostLease::Here(got, _) if !self.is_owner(&got)? => Ok(LostLease::Lost(TAKEN.into())),
            look => Ok(look),
        }
    }

    fn acquire(&self) -> Result<(), Trouble> {
        self.daemon.stay(&self.resource.lockspace)?;
        self.daemon.acquire(&self.resource)
    }

    /// Releases a resource that may have been taken, so that it is not kept from other hosts.
    fn undone(&self, failure: Failure) -> Failure {
        let more = match self.daemon.let_go(&self.resource) {
            Ok(_) => return failure,
            Err(Trouble::Failed(more)) => more,
            Err(Trouble::Refused(code)) => refusal::explain(&self.resource, code),
        };
        let message = format!("{failure}; this host may have it all the same ({more})");
        Failure { message, ..failure }
    }

    /// Looks whether it is this host's, and until when. `before` is what it was.
    fn look(&self, before: Option<TakenResource>) -> Result<LostLease, Failure> {
        let asked = crate::now();
        let state = self.daemon.state()?;
        let name = &self.resource.lockspace;
        let Some(space) = state.space(name) else {
            let why = format!("this host has left the lockspace {name}");
            return Ok(LostLease::Lost(why));
        };
        if space.phase != Phase::Joined {
            return Ok(LostLease::Lost(format!(
                "this host has not renewed its number in the lockspace {name} for {} s, or has orders to leave it",
                space.lasts()
            )));
        }
        let held = state.held(&self.resource).filter(|held| !held.is_passing);
        let Some(held) = held else {
            let why = "sanlock says that this host has it no longer".to_owned();
            return Ok(LostLease::Lost(why));
        };
        let slept = slept();
        let got = TakenResource {
            host_id: space.host_id,
            generation: space.generation,
            version: held.version,
            slept,
        };
        if let Some(before) = before {
            let since = TakenResource { slept, ..before };
            if got != since {
                let why = format!("this host has joined the lockspace {name} or taken it anew");
                return Ok(LostLease::Lost(why));
            }
            if slept > before.slept + SLEPT && !self.is_owner(&got)? {
                return Ok(LostLease::Lost(TAKEN.into()));
            }
        }
        // Both times are without their fractions.
        let age = state.now.saturating_sub(space.renewed) + 1;
        let lasts = space.is_well_for().saturating_sub(age);
        Ok(LostLease::Here(got, asked + Duration::from_secs(lasts)))
    }

    /// Returns true if the resource is this host's on storage as well.
    fn is_owner(&self, got: &TakenResource) -> Result<bool, Failure> {
        let owners = match self.daemon.owners(&self.resource) {
            Ok(owners) => owners,
            Err(trouble) => return Err(self.explained(trouble)),
        };
        let is_ours = |host: &wire::SanlkHost| {
            (host.host_id, host.generation) == (got.host_id, got.generation)
        };
        Ok(owners.version == got.version && owners.hosts.iter().any(is_ours))
    }

    fn granted(&mut self, got: TakenResource, until: Duration) -> Grant {
        self.got = Some(got);
        self.term.set(until);
        Grant {
            generation: got.version,
            term: self.term.clone(),
        }
    }

    fn explained(&self, trouble: Trouble) -> Failure {
        match trouble {
            Trouble::Failed(failure) => failure,
            Trouble::Refused(code) => refusal::explain(&self.resource, code),
        }
    }

    /// Ends the lease, because it is no longer this host's.
    fn ended(&mut self, why: &str) -> Failure {
        self.got = None;
        self.term.end();
        self.lost(why)
    }

    fn lost(&self, why: &str) -> Failure {
        Failure::new(
            Code::Gone,
            format!(
                "the lease {} of {} is lost: {why}; see whether another host writes it (`tap-ctl lease show TARGET`): if so destroy this disk, if not, resume it: `tap-ctl unpause -m MINOR`",
                self.resource,
                self.image.display()
            ),
        )
    }

    /// The host that has it, as far as is known.
    fn holder(&self) -> Result<Result<Holder, u64>, Failure> {
        let owners = self.daemon.owners(&self.resource);
        let owners = owners.map_err(|trouble| self.explained(trouble))?;
        let Some(owner) = owners.hosts.first() else {
            return Ok(Err(owners.version));
        };
        let state = self.daemon.state()?;
        let space = state.space(&self.resource.lockspace);
        let is_here = space.is_some_and(|space| {
            (space.host_id, space.generation) == (owner.host_id, owner.generation)
        });
        let known = self.daemon.host(&self.resource.lockspace, owner.host_id)?;
        let name = match is_here {
            true => Some(self.claim.host.name.clone()),
            false => self.daemon.name(&self.resource.lockspace, owner.host_id)?,
        };
        // Both times are by the clock of that host, which was seen a moment ago if it lives.
        let seen = match (is_here, &known) {
            (true, _) => Some(state.now),
            (false, Some(host)) if host.generation == owner.generation => Some(host.timestamp),
            _ => None,
        };
        Ok(Ok(Holder {
            host: name.unwrap_or_else(|| format!("id-{}", owner.host_id)),
            machine: String::new(),
            disk: String::new(),
            generation: owners.version,
            since_ms: seen.map_or(0, |seen| date_of(seen.saturating_sub(owner.timestamp))),
            is_here,
            key: None,
            sanlock: Some(Owner {
                host_id: owner.host_id,
                generation: owner.generation,
                state: refusal::condition(known, owner.generation).into(),
            }),
        }))
    }

    /// Returns the failure for a resource that is taken, with its holder.
    fn taken(&self, code: i32) -> Failure {
        let place = self.image.display();
        let busy = |why| Failure::new(Code::Busy, why);
        if let Some(why) = refusal::of_this_host(code) {
            return match self.daemon.state() {
                Ok(state) => busy(format!(
                    "{place} cannot be used: {why}{}",
                    whose(state.held(&self.resource))
                )),
                Err(failure) => failure,
            };
        }
        match self.holder() {
            Ok(Ok(holder)) => busy(format!(
                "{place} is in use by {}: end its disk there; if that host is dead, sanlock gives this one the lease as soon as its watchdog has reset it, so try again",
                refusal::describe(&self.resource, &holder)
            )),
            Ok(Err(_)) => busy(format!("{place} was in use by another host until now: try again")),
            Err(failure) => failure,
        }
    }
}

impl Lease for Sanlock {
    fn inspect(&mut self) -> Result<LeaseView, Failure> {
        Ok(match self.holder()? {
            Ok(holder) => LeaseView::Held(holder),
            Err(generation) => LeaseView::Free {
                generation,
                last: None,
            },
        })
    }

    fn take(&mut self, wait: Duration) -> Result<Grant, Failure> {
        let start = Instant::now();
        loop {
            match self.attempt()? {
                Ok(grant) => return Ok(grant),
                Err(code) if start.elapsed() >= wait => return Err(self.taken(code)),
                Err(_) => sleep(PAUSE),
            }
        }
    }

    fn resume(&mut self, generation: u64) -> Result<Grant, Failure> {
        match self.confirm()? {
            LostLease::Here(got, until) if generation == 0 || generation == got.version => {
                let stayed = self.daemon.stay(&self.resource.lockspace);
                stayed.map_err(|trouble| self.explained(trouble))?;
                Ok(self.granted(got, until))
            }
            LostLease::Here(..) => Err(self.ended("this host has taken it anew")),
            LostLease::Lost(why) => Err(self.ended(&why)),
        }
    }

    fn keep(&mut self) -> Result<(), Failure> {
        let Some(before) = self.got else {
            return Err(self.lost("it is not held"));
        };
        match self.look(Some(before))? {
            LostLease::Here(got, until) => {
                self.granted(got, until);
                Ok(())
            }
            LostLease::Lost(why) => Err(self.ended(&why)),
        }
    }

    fn beat(&self) -> Option<Duration> {
        Some(BEAT)
    }

    fn give_up(&mut self) -> Result<(), Failure> {
        let Some(before) = self.got else {
            return Err(self.lost("it is not held"));
        };
        self.term.end();
        if let LostLease::Lost(why) = self.look(Some(before))? {
            self.settle()?;
            return Err(self.ended(&why));
        }
        match self.daemon.release(&self.resource) {
            Ok(()) => {
                self.got = None;
                Ok(())
            }
            Err(trouble) => Err(self.explained(trouble)),
        }
    }

    fn settle(&mut self) -> Result<(), Failure> {
        let state = self.daemon.state()?;
        let is_ending = state
            .space(&self.resource.lockspace)
            .is_some_and(|space| space.phase == Phase::Ending);
        let is_orphan = state
            .held(&self.resource)
            .is_some_and(|held| held.is_orphan);
        if !(is_ending && is_orphan) {
            return Ok(());
        }
        match self.daemon.let_go(&self.resource) {
            Ok(_) => Ok(()),
            Err(trouble) => Err(self.explained(trouble)),
        }
    }

    fn break_off(&mut self, _confirmed: HolderIsDead) -> Result<Option<Holder>, Failure> {
        let Ok(holder) = self.holder()? else {
            return Ok(None);
        };
        Err(refusal::not_broken(&self.resource, &holder))
    }
}

/// The process of this host that has a resource.
fn whose(held: Option<&HeldResource>) -> String {
    held.map_or(String::new(), |held| format!(" (process {})", held.pid))
}

/// For how long the host has slept since its boot.
fn slept() -> Duration {
    let awake = clock_gettime(ClockId::Monotonic);
    // Neither is negative since the boot.
    let seconds = u64::try_from(awake.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(awake.tv_nsec).unwrap_or(0);
    crate::now().saturating_sub(Duration::new(seconds, nanoseconds))
}

/// The time this number of seconds ago, in milliseconds since 1970.
fn date_of(seconds: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let then = now
        .unwrap_or_default()
        .saturating_sub(Duration::from_secs(seconds));
    u64::try_from(then.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod real;
#[cfg(test)]
mod tests;
