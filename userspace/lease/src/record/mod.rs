// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lease that is a record: a small file beside the image, which hosts read and write past their caches.
//!
//! Hosts agree by nothing but reads and writes of single sectors. How a generation is taken is Fischer's
//! algorithm (and with it that of light-weight leases, which sanlock's delta leases are): read that it is
//! free, write a claim, wait until whoever has read the same has written, and read again whose claim stands.
//!
//! | rule (`rules.rs`) | without it |
//! |---|---|
//! | after the wait the claim is read again | both who claim have it |
//! | a write counts only if it was done within 300 ms of the begin of the read that it rests on | a host that was stopped between reading and writing claims what another one has taken meanwhile |
//! | a generation has two cells, and only who got it writes the second | a claim that lands late hides the holder, or that it was given up |
//! | at the end of the wait what was there before is looked at again | a holder who was taken for dead, and was slow, has it too |
//! | a claim counts for nothing but against other claims: a holder that finds one claims again | a claim that came to nothing makes others forget that there is a holder, whose I/O is under way |
//! | the holder does I/O for 10 s of its own clock from the begin of the heartbeat before | a holder whose storage does not answer continues when the lease was broken |
//! | each heartbeat looks for a later generation first | a holder whose lease was broken keeps it |
//! | breaking it watches for 12.5 s first | a holder that lives loses it, with I/O under way |
//!
//! The rules rest on this, and on nothing else:
//!
//! - A sector of 512 bytes is read and written as a whole, and who reads it after a write has ended gets
//!   that or something later. A write that failed may have been done, but is not done afterwards. One that has
//!   not ended (its host died) may be done at any time, if fewer than 32 generations later.
//! - The clocks of two hosts may show anything. Their rates differ by less than a tenth.
//! - Between a holder's look at its clock and its I/O there is less than a second.
//! - An administrator who declares a holder dead has ensured that none of its I/O is under way. No other host takes a
//!   lease that is held, however long its holder has been silent, but the host itself after a new boot.
//!
//! Why the record is not in the image: a raw image is the disk byte for byte, and one in a format has a header
//! that a guest's data must not reach by a mistake of ours. A block device's record is in a file, or on
//! another device, that all hosts reach by the same path.

mod layout;
mod rules;
mod store;

#[cfg(test)]
mod booted;
#[cfg(test)]
mod model;

use crate::block_on::block_on;
use crate::host::hex;
use crate::{place, Grant, Holder, HolderIsDead, Lease, LeaseClaim, LeaseView, Term};
use control::{Code, Failure, LeaseKind};
use layout::{Area, LeaseRecord, RecordState};
use rules::{Party, RecordRules, Refusal, BEAT};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::LeaseStore;

/// A lease in a record.
#[derive(Debug)]
pub(crate) struct RecordLease {
    path: PathBuf,
    image: PathBuf,
    party: Party,
    /// The file; it is made when the lease is first taken.
    store: Option<LeaseStore>,
    generation: Option<u64>,
    term: Term,
}

impl RecordLease {
    /// The lease of `image` in the file at `path`, which need not be there yet.
    pub(crate) fn open(
        path: &Path,
        image: &Path,
        claim: LeaseClaim,
    ) -> Result<RecordLease, Failure> {
        Ok(RecordLease {
            path: path.into(),
            image: image.into(),
            store: LeaseStore::open(path)?,
            party: Party {
                claim,
                image: store::number(image)?,
                rules: RecordRules::ALL,
            },
            generation: None,
            term: Term::default(),
        })
    }

    /// Returns the file, if a host has made it.
    fn look(&mut self) -> Result<Option<&LeaseStore>, Failure> {
        if self.store.is_none() {
            self.store = LeaseStore::open(&self.path)?;
        }
        Ok(self.store.as_ref())
    }

    /// The file, which is made if it is not there.
    fn make(&mut self) -> Result<(), Failure> {
        if self.store.is_none() {
            self.store = Some(LeaseStore::make(&self.path)?);
        }
        Ok(())
    }

    fn store(&self) -> Result<&LeaseStore, Failure> {
        self.store.as_ref().ok_or_else(|| {
            Failure::new(
                Code::Gone,
                format!(
                    "there is no lease at {}: it was never taken, or removed",
                    self.path.display()
                ),
            )
        })
    }

    fn explain(&self, refusal: Refusal) -> Failure {
        let place = self.image.display();
        match refusal {
            Refusal::Failed(failure) => failure,
            Refusal::Busy(record) => {
                let (who, remedy) = (self.describe(&record), self.remedy(&record));
                Failure::new(Code::Busy, format!("{place} is in use by {who}: {remedy}"))
            }
            Refusal::Other(record) => {
                let who = self.describe(&record);
                Failure::new(
                    Code::Busy,
                    format!("{who} has the lease of {place}, which is not the holder that was said to be dead: look again: `tap-ctl lease show {}`", self.named()),
                )
            }
            Refusal::Lives(record) => {
                let who = self.describe(&record);
                Failure::new(
                    Code::Busy,
                    format!("the holder of the lease of {place} lives, so it is not broken: {who} has it; end that disk"),
                )
            }
            Refusal::Lost(record) => {
                let who = record.map_or("nobody".into(), |record| self.describe(&record));
                Failure::new(
                    Code::Gone,
                    format!("the lease of {place} is lost, {who} has it now: destroy this disk, and see which of the two is right"),
                )
            }
            Refusal::Replaced(record) => Failure::new(
                Code::Image,
                format!(
                    "the lease {} is of another file than {place} is now, and {} had it last: put that file back, or if no host has it open, remove the lease",
                    self.path.display(),
                    self.describe(&record)
                ),
            ),
            Refusal::Slow => Failure::new(
                Code::Timeout,
                format!(
                    "the storage of {} takes longer than {} ms to read and write the lease: let it recover, or put the lease elsewhere with lease=record:/PATH",
                    self.path.display(),
                    rules::CLAIM.as_millis()
                ),
            ),
        }
    }

    /// Returns the words by which `tap-ctl lease` finds this record.
    fn named(&self) -> String {
        let beside = place(&LeaseKind::Record(None), &self.image);
        match beside.record.as_ref() == Some(&self.path) {
            true => self.image.display().to_string(),
            false => format!(
                "lease=record:{},aio:{}",
                self.path.display(),
                self.image.display()
            ),
        }
    }

    /// Returns the action that ends the tenure of a holder.
    fn remedy(&self, record: &LeaseRecord) -> String {
        let (host, own) = (&record.who.host, &self.party.claim.host);
        let (image, named) = (&self.image, self.named());
        let number = record.generation;
        let ends = format!("`tap-ctl lease break {named} --holder-is-dead {number}`");
        match (host.machine == own.machine, host.boot == own.boot) {
            (true, true) => format!(
                "that is this host itself; `tap-ctl list` shows its disks, and `tap-ctl destroy -m MINOR` ends one; if that disk is not there, and `fuser -v {}` names no process, that holder is dead: use {ends}",
                image.display()
            ),
            (true, false) => format!(
                "this host was booted since, so that holder is dead: use {ends}"
            ),
            (false, _) => format!(
                "end that disk there, or if its host is dead, power it off for certain and use {ends}"
            ),
        }
    }

    /// Returns the holder and the time of its claim, for people.
    fn describe(&self, record: &LeaseRecord) -> String {
        let (host, own) = (&record.who.host, &self.party.claim.host);
        let other = match host.name == own.name && host.machine != own.machine {
            true => format!(
                " (another machine of this host's name: its machine-id is {}, name one of them anew)",
                hex(&host.machine)
            ),
            false => String::new(),
        };
        format!(
            "host {}{other} for {}, generation {}, since {}",
            host.name,
            record.who.disk,
            record.generation,
            crate::date(record.since_ms)
        )
    }

    fn granted(&mut self, held: rules::HeldLease) -> Grant {
        self.generation = Some(held.generation);
        self.term.set(held.until);
        Grant {
            generation: held.generation,
            term: self.term.clone(),
        }
    }

    fn held(&self) -> Result<u64, Failure> {
        self.generation.ok_or_else(|| {
            Failure::new(
                Code::Gone,
                format!("the lease of {} is not held", self.image.display()),
            )
        })
    }

    /// Ends the term if another host has the lease; otherwise the term just ends.
    fn ended(&mut self, refusal: Refusal) -> Failure {
        if matches!(refusal, Refusal::Lost(_)) {
            self.generation = None;
            self.term.end();
        }
        self.explain(refusal)
    }
}

impl Lease for RecordLease {
    fn inspect(&mut self) -> Result<LeaseView, Failure> {
        let area = match self.look()? {
            Some(store) => store.read()?,
            None => Area::default(),
        };
        let holder = |record: &LeaseRecord| record.holder(&self.party.claim);
        Ok(match (area.settled(), area.claim()) {
            (Some(record), _) if record.state == RecordState::Held => {
                LeaseView::Held(holder(record))
            }
            (_, Some(record)) => LeaseView::Claimed(holder(record)),
            (last, None) => LeaseView::Free {
                generation: area.generation(),
                last: last.map(holder),
            },
        })
    }

    fn take(&mut self, wait: Duration) -> Result<Grant, Failure> {
        self.make()?;
        let taken = block_on(self.party.take(self.store()?, wait));
        match taken {
            Ok(held) => Ok(self.granted(held)),
            Err(refusal) => Err(self.explain(refusal)),
        }
    }

    fn resume(&mut self, generation: u64) -> Result<Grant, Failure> {
        match block_on(self.party.keep(self.store()?, generation)) {
            Ok(held) => Ok(self.granted(held)),
            Err(refusal) => Err(self.explain(refusal)),
        }
    }

    fn keep(&mut self) -> Result<(), Failure> {
        match block_on(self.party.keep(self.store()?, self.held()?)) {
            Ok(held) => {
                self.granted(held);
                Ok(())
            }
            Err(refusal) => Err(self.ended(refusal)),
        }
    }

    fn beat(&self) -> Option<Duration> {
        Some(BEAT)
    }

    fn watches(&self) -> bool {
        true
    }

    fn give_up(&mut self) -> Result<(), Failure> {
        let generation = self.held()?;
        self.term.end();
        match block_on(self.party.give_up(self.store()?, generation)) {
            Ok(()) => {
                self.generation = None;
                Ok(())
            }
            Err(refusal) => Err(self.ended(refusal)),
        }
    }

    fn break_off(&mut self, confirmed: HolderIsDead) -> Result<Option<Holder>, Failure> {
        if self.look()?.is_none() {
            return Ok(None);
        }
        match block_on(self.party.break_off(self.store()?, confirmed.generation)) {
            Ok(record) => Ok(record.map(|record| record.holder(&self.party.claim))),
            Err(refusal) => Err(self.explain(refusal)),
        }
    }
}

#[cfg(test)]
mod tests;
