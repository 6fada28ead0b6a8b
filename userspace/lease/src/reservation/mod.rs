// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lease that is a persistent reservation of SCSI or NVMe: the storage itself refuses the writes of all others.
//!
//! The holder registers a [key](key::ReservationKey) and reserves Write Exclusive, so that others may read. For a disk
//! that one path leads to it is that: only the holder writes, and another registered host does not. Of a map of
//! dm-multipath it is Write Exclusive - Registrants Only, because a reservation is one path's, and writes go over all
//! paths of the host, which are all registered. There no other host may be registered, so a host that does not get the
//! reservation does not stay registered.
//!
//! | rule (`rules.rs`) | without it |
//! |---|---|
//! | breaking it makes the storage end the holder's writes under way first (PREEMPT AND ABORT) | a write that the dead host had under way lands after those of the next holder |
//! | a host that does not get the reservation is registered no longer | of a map of dm-multipath, a host writes that has lost the lease |
//! | of this host's keys only an idle one is replaced, under which no disk writes | a disk takes away what another one of its host has, which is one to the storage |
//! | after a release or a break it stays reserved, for an idle key, and the next holder preempts that | a host that has lost it and does not know yet writes when it is free, and that lands after the writes of the next holder |
//! | it is given up when no I/O is under way | a write lands after those of the next holder, if the storage allows it to who reserves again |
//!
//! A reservation has no term, and its next holder need not wait for late writes: the storage refuses the I/O of a
//! holder that has lost it. A heartbeat looks whether it is lost, so that the disk stops also if its guest only reads.
//! Requests that the storage refuses in the meantime fail with EBADE, and the process stops at that error (`tapdisk`).
//!
//! The lease rests on this: the storage keeps to SPC-5 (5.14) or to NVMe (Reservations), also when it loses its power;
//! this host's kernel tells of each command whether it was done; and a host that was booted has nothing under way of
//! what it asked for before, which the loss of its connection to the storage has ended.

mod device;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod key;
mod rules;

#[cfg(test)]
mod model;

use crate::block_on::block_on;
use crate::{Grant, Holder, HolderIsDead, Lease, LeaseClaim, LeaseView, Term};
use control::{Code, Failure};
use device::ReservedDevice;
use diskio::reservation::Reservation;
use key::ReservationKey;
use rules::{Party, Refusal, ReservationRules, ReservationStorage};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time between two looks.
const BEAT: Duration = Duration::from_secs(2);

/// A lease that is a reservation.
#[derive(Debug)]
pub(crate) struct ReservationLease<S> {
    image: PathBuf,
    party: Party,
    storage: S,
    key: Option<ReservationKey>,
    term: Term,
}

/// The reservation of the device at `image`.
pub(crate) fn open(image: &Path, claim: LeaseClaim) -> Result<Box<dyn Lease>, Failure> {
    Ok(Box::new(ReservationLease::new(
        image,
        ReservedDevice::open(image)?,
        claim,
    )))
}

impl<S: ReservationStorage> ReservationLease<S> {
    fn new(image: &Path, storage: S, claim: LeaseClaim) -> ReservationLease<S> {
        ReservationLease {
            image: image.into(),
            party: Party {
                claim,
                rules: ReservationRules::ALL,
            },
            storage,
            key: None,
            term: Term::default(),
        }
    }

    fn granted(&mut self, key: ReservationKey) -> Grant {
        self.key = Some(key);
        // It ends when the storage says so.
        self.term.set(Duration::MAX);
        Grant {
            generation: key.0,
            term: self.term.clone(),
        }
    }

    fn held(&self) -> Result<ReservationKey, Failure> {
        self.key.ok_or_else(|| {
            Failure::new(
                Code::Gone,
                format!("{} is not reserved", self.image.display()),
            )
        })
    }

    /// Of a key only this is known.
    fn holder(&self, key: ReservationKey) -> Holder {
        let own = &self.party.claim.host;
        let is_here = key.is_of_boot(own);
        Holder {
            host: match is_here {
                true => own.name.clone(),
                false => key.host_id(),
            },
            machine: String::new(),
            disk: String::new(),
            generation: key.0,
            since_ms: 0,
            is_here,
            key: Some(key.to_string()),
            sanlock: None,
        }
    }

    /// Returns the holder, for people.
    fn describe(&self, key: u64) -> String {
        let key = ReservationKey(key);
        match key.is_of_boot(&self.party.claim.host) {
            true => format!("this host (key {key})"),
            false => format!("host {} (key {key})", key.host_id()),
        }
    }

    fn now_has_it(&self, held: Option<Reservation>) -> String {
        match held {
            Some(held) if !ReservationKey(held.key).is_of_nobody() => self.describe(held.key),
            _ => "nobody".into(),
        }
    }

    fn explain(&self, refusal: Refusal) -> Failure {
        let place = self.image.display();
        let busy = |message| Failure::new(Code::Busy, message);
        match refusal {
            Refusal::Failed(failure) => failure,
            Refusal::Busy(held) => {
                let (who, key) = (self.describe(held.key), ReservationKey(held.key));
                let remedy = match key.is_of_boot(&self.party.claim.host) {
                    true => self.remedy_here(key),
                    false => format!(
                        "end its disk there (on that host `tap-ctl lease show {place}` says \"here\"), or if that host is dead, use `tap-ctl lease break {place} --holder-is-dead {key}`"
                    ),
                };
                busy(format!("{place} is reserved by {who}: {remedy}"))
            }
            Refusal::Registered(keys) => {
                let keys: Vec<_> = keys.iter().map(|key| ReservationKey(*key).to_string()).collect();
                let keys = match keys.is_empty() {
                    true => "a key".into(),
                    false => keys.join(", "),
                };
                busy(format!(
                    "{place} has this host registered with {keys} for another disk or program: end that, or, if there is none, unregister it with sg_persist or nvme resv-register"
                ))
            }
            Refusal::Other(held) => busy(format!(
                "{} has the reservation of {place}, which is not the holder that was said to be dead: look again: `tap-ctl lease show {place}`",
                self.now_has_it(held)
            )),
            Refusal::Here(key) => busy(format!(
                "this host itself has {place} reserved (key {key}): {}, or, if the host was booted since, attach it again",
                self.remedy_here(key)
            )),
            Refusal::Lost(held) => Failure::new(
                Code::Gone,
                format!(
                    "the reservation of {place} is lost, {} has it now: see whether another host writes it; if so destroy this disk, if not, resume it: `tap-ctl unpause -m MINOR`",
                    self.now_has_it(held)
                ),
            ),
        }
    }

    /// Returns the action that ends the tenure of a disk of this host.
    fn remedy_here(&self, key: ReservationKey) -> String {
        let place = self.image.display();
        format!(
            "`tap-ctl list` shows its disks, and `tap-ctl destroy -m MINOR` ends one; if none of them has it, unregister the key: `sg_persist --out --register --param-rk={key} --param-sark=0 {place}` (NVMe: `nvme resv-register {place} --rrega=1 --crkey={key}`)"
        )
    }

    /// Explains a refusal, and ends the lease if this disk has lost it.
    fn ended(&mut self, refusal: Refusal) -> Failure {
        if matches!(refusal, Refusal::Lost(_)) {
            self.key = None;
            self.term.end();
        }
        self.explain(refusal)
    }
}

impl<S: ReservationStorage + Send + fmt::Debug> Lease for ReservationLease<S> {
    fn inspect(&mut self) -> Result<LeaseView, Failure> {
        let held = block_on(async { Ok(self.storage.reservation().await?) });
        match held {
            Ok(Some(held)) if !ReservationKey(held.key).is_of_nobody() => {
                Ok(LeaseView::Held(self.holder(ReservationKey(held.key))))
            }
            Ok(_) => Ok(LeaseView::Free {
                generation: 0,
                last: None,
            }),
            Err(refusal) => Err(self.explain(refusal)),
        }
    }

    fn take(&mut self, wait: Duration) -> Result<Grant, Failure> {
        match block_on(self.party.take(&self.storage, wait)) {
            Ok(key) => Ok(self.granted(key)),
            Err(refusal) => Err(self.explain(refusal)),
        }
    }

    fn resume(&mut self, _generation: u64) -> Result<Grant, Failure> {
        match block_on(self.party.resume(&self.storage)) {
            Ok(key) => Ok(self.granted(key)),
            Err(refusal) => Err(self.explain(refusal)),
        }
    }

    fn keep(&mut self) -> Result<(), Failure> {
        let key = self.held()?;
        block_on(self.party.keep(&self.storage, key)).map_err(|refusal| self.ended(refusal))
    }

    fn beat(&self) -> Option<Duration> {
        Some(BEAT)
    }

    fn give_up(&mut self) -> Result<(), Failure> {
        let key = self.held()?;
        self.term.end();
        match block_on(self.party.give_up(&self.storage, key)) {
            Ok(()) => {
                self.key = None;
                Ok(())
            }
            Err(refusal) => Err(self.ended(refusal)),
        }
    }

    fn break_off(&mut self, confirmed: HolderIsDead) -> Result<Option<Holder>, Failure> {
        let dead = ReservationKey(confirmed.generation);
        match block_on(self.party.break_off(&self.storage, dead)) {
            Ok(true) => Ok(Some(self.holder(dead))),
            Ok(false) => Ok(None),
            Err(refusal) => Err(self.explain(refusal)),
        }
    }
}

#[cfg(test)]
mod tests;
