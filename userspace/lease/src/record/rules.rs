// SPDX-License-Identifier: MIT OR Apache-2.0
//! By which rules hosts take, keep, give up and break a lease, whatever their clocks and storage are.

use super::layout::{Area, Cell, LeaseRecord, RecordState};
use crate::LeaseClaim;
use control::Failure;
use std::time::Duration;

/// Longest time from the start of a host's read to the end of a write that rests on it: a later write does not count.
pub(super) const CLAIM: Duration = Duration::from_millis(300);
/// Time between two heartbeats.
pub(super) const BEAT: Duration = Duration::from_secs(2);
/// For how long a heartbeat entitles to I/O.
pub(super) const LEASE: Duration = Duration::from_secs(10);
/// Time between two looks at the lease of another host.
const POLL: Duration = Duration::from_millis(100);
/// How long a claim must stand still until another host may claim the generation after it.
const STALE: Duration = Duration::from_millis(1200);

/// How long a host waits for something that another host measures: its clock may be faster. Rates of clocks
/// may differ by a tenth; the rest is for the time between a holder's look at its clock and its I/O.
pub(super) fn patience(time: Duration) -> Duration {
    time + time / 4
}

/// The storage of a lease and the clock of a host.
pub(super) trait LeaseWorld {
    /// Time that never goes back, that of suspends included.
    fn now(&self) -> Duration;
    /// Milliseconds since 1970, for people.
    fn date(&self) -> u64;
    /// All cells.
    async fn read(&self) -> Result<Area, Failure>;
    /// Writes a cell, durably. After a failure the cell may have changed, but will not change later.
    async fn write(&self, cell: Cell, record: &LeaseRecord) -> Result<(), Failure>;
    async fn sleep(&self, time: Duration);
}

/// Rules that tests switch off, to see that they are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RecordRules {
    /// A claim is read again after the wait.
    pub(super) reads_again: bool,
    /// A write that took too long does not count.
    pub(super) is_bounded: bool,
    /// The records from before the claim must not have changed by the end of the wait.
    pub(super) looks_back: bool,
    /// A holder looks whether there is a later generation.
    pub(super) knows_generations: bool,
    /// Breaking a lease first watches for as long as its holder may live on.
    pub(super) watches: bool,
}

impl RecordRules {
    pub(super) const ALL: Self = Self {
        reads_again: true,
        is_bounded: true,
        looks_back: true,
        knows_generations: true,
        watches: true,
    };
}

/// Why something was not done.
#[derive(Debug)]
pub(super) enum Refusal {
    /// Another host has it, or claims it.
    Busy(Box<LeaseRecord>),
    /// The lease to break has this holder, not the one that was named.
    Other(Box<LeaseRecord>),
    /// The lease to break has a holder that lives.
    Lives(Box<LeaseRecord>),
    /// Another host has, or may have, a later generation; or the record is gone.
    Lost(Option<Box<LeaseRecord>>),
    /// The record is of another image.
    Replaced(Box<LeaseRecord>),
    /// The storage takes too long.
    Slow,
    /// The storage fails.
    Failed(Failure),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        Refusal::Failed(failure)
    }
}

/// A lease that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeldLease {
    pub(super) generation: u64,
    /// Until when its holder may do I/O, by its own clock.
    pub(super) until: Duration,
}

/// The acting disk and host, and its image.
#[derive(Debug)]
pub(super) struct Party {
    pub(super) claim: LeaseClaim,
    /// As in [`LeaseRecord`].
    pub(super) image: u64,
    pub(super) rules: RecordRules,
}

/// The last look, and how long it has been unchanged.
#[derive(Default)]
struct LeaseWatch {
    seen: Option<Area>,
    since: Duration,
}

impl LeaseWatch {
    /// For how long it has been the same.
    fn look(&mut self, now: Duration, area: &Area) -> Duration {
        if self.seen.as_ref() != Some(area) {
            self.seen = Some(area.clone());
            self.since = now;
        }
        now.saturating_sub(self.since)
    }
}

impl Party {
    /// Takes the lease; waits so long for who has it. A host that had it when it was booted anew is waited for until it
    /// is known that it does not live, unless nothing is to be waited for.
    pub(super) async fn take(
        &self,
        world: &impl LeaseWorld,
        wait: Duration,
    ) -> Result<HeldLease, Refusal> {
        let start = world.now();
        let mut watch = LeaseWatch::default();
        loop {
            let read_at = world.now();
            let area = world.read().await?;
            self.check_image(&area)?;
            match area.settled() {
                Some(record) if record.state == RecordState::Held && record.is_of(&self.claim) => {
                    // Of an earlier process for the same disk.
                    return self.keep(world, record.generation).await;
                }
                _ => {}
            }
            let still = watch.look(world.now(), &area);
            let Some(record) = self.in_the_way(&area, still) else {
                match self.seize(world, &area, read_at, RecordState::Held).await? {
                    SeizedLease::Held(held) => return Ok(held),
                    SeizedLease::Slow | SeizedLease::Lost => {}
                }
                world.sleep(POLL).await;
                continue;
            };
            let wait = match self.is_own_of_earlier(record) && !wait.is_zero() {
                true => wait.max(patience(LEASE) + BEAT),
                false => wait,
            };
            if world.now().saturating_sub(start) >= wait {
                return Err(
                    match record.state == RecordState::Claimed && record.is_of(&self.claim) {
                        true => Refusal::Slow,
                        false => Refusal::Busy(Box::new(record.clone())),
                    },
                );
            }
            world.sleep(POLL).await;
        }
    }

    /// Returns the record that forbids a further claim, without an administrator's statement that its host is dead.
    fn in_the_way<'a>(&self, area: &'a Area, still: Duration) -> Option<&'a LeaseRecord> {
        if let Some(record) = area
            .settled()
            .filter(|record| record.state == RecordState::Held)
        {
            if !self.is_own_of_earlier(record) || still < patience(LEASE) {
                return Some(record);
            }
        }
        // A claiming host has done no I/O, and will do none if there is a later claim at the time when it could.
        area.claim().filter(|_| still < STALE)
    }

    /// True if this host held the record and was booted since: nothing of that boot does I/O now. If another host has
    /// its number, that host's heartbeats move the record.
    fn is_own_of_earlier(&self, record: &LeaseRecord) -> bool {
        let (host, own) = (&record.who.host, &self.claim.host);
        let is_host = host.machine == own.machine && host.name == own.name;
        record.state == RecordState::Held && is_host && host.boot != own.boot
    }

    /// Claims the generation after those of the last read, and has it if no other host does.
    async fn seize(
        &self,
        world: &impl LeaseWorld,
        base: &Area,
        read_at: Duration,
        state: RecordState,
    ) -> Result<SeizedLease, Refusal> {
        let generation = base.generation().saturating_add(1);
        let claim = self.record(world, generation, RecordState::Claimed, 0);
        world.write(Cell::Claim, &claim).await?;
        if self.is_late(world, read_at) {
            return Ok(SeizedLease::Slow);
        }
        // Any other host that read the old state, and whose claim counts, has stored its claim after this sleep.
        world.sleep(patience(CLAIM)).await;
        let again_at = world.now();
        let again = world.read().await?;
        let is_ours = again.generation() == generation
            && again.at(generation, Cell::Hold).is_none()
            && again.at(generation, Cell::Claim) == Some(&claim);
        if self.rules.reads_again && !is_ours {
            return Ok(SeizedLease::Lost);
        }
        // A holder who was taken for dead, or a claim that was late and counted all the same.
        if self.rules.looks_back && again.settled() != base.settled() {
            return Ok(SeizedLease::Lost);
        }
        let hold = self.record(world, generation, state, 1);
        world.write(Cell::Hold, &hold).await?;
        if self.is_late(world, again_at) {
            // No other host can have this generation, but perhaps a later one: the next look shows that.
            return Ok(SeizedLease::Slow);
        }
        Ok(SeizedLease::Held(HeldLease {
            generation,
            until: again_at + LEASE,
        }))
    }

    /// A heartbeat, or the first one of a process that continues with another one's lease.
    pub(super) async fn keep(
        &self,
        world: &impl LeaseWorld,
        generation: u64,
    ) -> Result<HeldLease, Refusal> {
        let read_at = world.now();
        let area = world.read().await?;
        let own = self.own(&area, generation)?;
        if self.rules.knows_generations && area.claim().is_some() {
            // Another host takes this holder for dead, or has not seen it. The host with the last claim has it.
            return match self.seize(world, &area, read_at, RecordState::Held).await? {
                SeizedLease::Held(held) => Ok(held),
                SeizedLease::Slow | SeizedLease::Lost => Err(Refusal::Slow),
            };
        }
        let generation = own.generation;
        let mut next = self.record(
            world,
            generation,
            RecordState::Held,
            own.beat.saturating_add(1),
        );
        next.since_ms = own.since_ms;
        world.write(Cell::Hold, &next).await?;
        if self.is_late(world, read_at) {
            return Err(Refusal::Slow);
        }
        Ok(HeldLease {
            generation,
            until: read_at + LEASE,
        })
    }

    /// Gives it up. No I/O on the image is under way, and none follows.
    pub(super) async fn give_up(
        &self,
        world: &impl LeaseWorld,
        generation: u64,
    ) -> Result<(), Refusal> {
        let area = world.read().await?;
        let own = match area.settled() {
            // It was done, but the answer was lost.
            Some(record) if record.state == RecordState::Free && record.is_of(&self.claim) => {
                return Ok(())
            }
            _ => self.own(&area, generation)?,
        };
        let free = self.record(
            world,
            own.generation,
            RecordState::Free,
            own.beat.saturating_add(1),
        );
        world.write(Cell::Hold, &free).await?;
        Ok(())
    }

    /// Takes generation `dead` away from its holder, who is dead, and leaves it free; says who it was.
    pub(super) async fn break_off(
        &self,
        world: &impl LeaseWorld,
        dead: u64,
    ) -> Result<Option<LeaseRecord>, Refusal> {
        let mut first: Option<(LeaseRecord, Duration)> = None;
        loop {
            let read_at = world.now();
            let area = world.read().await?;
            self.check_image(&area)?;
            let held = area
                .settled()
                .filter(|record| record.state == RecordState::Held);
            let Some(record) = held.cloned() else {
                return Ok(None);
            };
            let (was, since) = first.get_or_insert_with(|| (record.clone(), world.now()));
            if was.generation != dead {
                return Err(Refusal::Other(Box::new(record)));
            }
            if *was != record {
                return Err(Refusal::Lives(Box::new(record)));
            }
            let still = world.now().saturating_sub(*since);
            if !self.rules.watches || still >= patience(LEASE) {
                return match self
                    .seize(world, &area, read_at, RecordState::Broken)
                    .await?
                {
                    SeizedLease::Held(_) => Ok(Some(record)),
                    SeizedLease::Slow => Err(Refusal::Slow),
                    SeizedLease::Lost => Err(Refusal::Lives(Box::new(record))),
                };
            }
            world.sleep(POLL).await;
        }
    }

    /// Returns the record of this disk.
    fn own<'a>(&self, area: &'a Area, generation: u64) -> Result<&'a LeaseRecord, Refusal> {
        let counts = match self.rules.knows_generations {
            // A later one is this disk's own, after it had to claim again.
            true => area
                .settled()
                .filter(|record| record.generation >= generation),
            false => area.at(generation, Cell::Hold),
        };
        counts
            .filter(|record| record.state == RecordState::Held && record.is_of(&self.claim))
            .ok_or_else(|| Refusal::Lost(area.settled().cloned().map(Box::new)))
    }

    fn is_late(&self, world: &impl LeaseWorld, read_at: Duration) -> bool {
        self.rules.is_bounded && world.now().saturating_sub(read_at) > CLAIM
    }

    fn check_image(&self, area: &Area) -> Result<(), Refusal> {
        match area.settled().or(area.claim()) {
            Some(record) if record.image != self.image => {
                Err(Refusal::Replaced(Box::new(record.clone())))
            }
            _ => Ok(()),
        }
    }

    fn record(
        &self,
        world: &impl LeaseWorld,
        generation: u64,
        state: RecordState,
        beat: u64,
    ) -> LeaseRecord {
        LeaseRecord {
            state,
            generation,
            beat,
            since_ms: world.date(),
            image: self.image,
            who: self.claim.clone(),
        }
    }
}

/// Result of a claim.
enum SeizedLease {
    Held(HeldLease),
    /// Another host got it.
    Lost,
    /// The storage took too long, so it does not count.
    Slow,
}
