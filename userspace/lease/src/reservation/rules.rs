// SPDX-License-Identifier: MIT OR Apache-2.0
//! By which rules a host registers, reserves, looks, gives up and preempts, whatever the storage is.

use super::key::ReservationKey;
use crate::LeaseClaim;
use control::Failure;
use diskio::reservation::{Reservation, StorageAnswer};
use std::time::Duration;

/// Time between two attempts to get a reservation that another host has.
const POLL: Duration = Duration::from_millis(100);

/// One way to the storage, that of a host: each call is one command, and the storage does one after the other.
pub(crate) trait ReservationStorage {
    /// Time that never goes back.
    fn now(&self) -> Duration;
    async fn sleep(&self, time: Duration);
    /// Makes `new` the key of this host, which is registered as `old`; 0 is none. A holder that is registered no longer
    /// has lost its reservation.
    async fn register(&self, old: u64, new: u64) -> Result<StorageAnswer, Failure>;
    /// Reserves for the key under which this host is registered, so that no other host can write from now on.
    async fn reserve(&self, key: u64) -> Result<StorageAnswer, Failure>;
    /// Takes away what `victim` has, its registration too, and reserves for this host's key `own`; ends first what
    /// `victim` has under way, if `aborts`.
    async fn preempt(&self, own: u64, victim: u64, aborts: bool) -> Result<StorageAnswer, Failure>;
    /// Returns the registered keys, and the number of changes of them.
    async fn keys(&self) -> Result<(u32, Vec<u64>), Failure>;
    /// Returns the reservation.
    async fn reservation(&self) -> Result<Option<Reservation>, Failure>;
}

/// Rules that tests switch off, to see that they are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReservationRules {
    /// A preemption first ends the holder's commands under way.
    pub(super) aborts: bool,
    /// A host that does not get the reservation is registered no longer.
    pub(super) leaves: bool,
    /// The key of another disk of this host is not replaced.
    pub(super) respects: bool,
    /// After a release or a break the reservation stays, for an idle key.
    pub(super) idles: bool,
}

impl ReservationRules {
    pub(super) const ALL: Self = Self {
        aborts: true,
        leaves: true,
        respects: true,
        idles: true,
    };
}

/// Why something was not done.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The storage is reserved for another host or disk.
    Busy(Reservation),
    /// This host is registered already, for another disk, or by a program that is none of ours.
    Registered(Vec<u64>),
    /// The reservation to break has this holder, not the one that was named.
    Other(Option<Reservation>),
    /// The reservation to break is this host's.
    Here(ReservationKey),
    /// The reservation is no longer this disk's.
    Lost(Option<Reservation>),
    /// A command failed.
    Failed(Failure),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        Refusal::Failed(failure)
    }
}

/// The acting disk and host.
#[derive(Debug)]
pub(super) struct Party {
    pub(super) claim: LeaseClaim,
    pub(super) rules: ReservationRules,
}

impl Party {
    /// Reserves; waits so long for who has it.
    pub(super) async fn take(
        &self,
        storage: &impl ReservationStorage,
        wait: Duration,
    ) -> Result<ReservationKey, Refusal> {
        let start = storage.now();
        loop {
            match self.attempt(storage).await {
                Err(Refusal::Busy(_) | Refusal::Registered(_))
                    if storage.now().saturating_sub(start) < wait =>
                {
                    storage.sleep(POLL).await;
                }
                result => return result,
            }
        }
    }

    async fn attempt(&self, storage: &impl ReservationStorage) -> Result<ReservationKey, Refusal> {
        match storage.reservation().await? {
            Some(held) => self.inherit(storage, held).await,
            None => self.reserve(storage).await,
        }
    }

    /// Returns the key for an existing reservation, if that is this disk's, or was left by this host.
    async fn inherit(
        &self,
        storage: &impl ReservationStorage,
        held: Reservation,
    ) -> Result<ReservationKey, Refusal> {
        let key = ReservationKey(held.key);
        if key.is_of(&self.claim) {
            return Ok(key);
        }
        let (changes, keys) = storage.keys().await?;
        let new = ReservationKey::new(&self.claim, changes);
        // The storage refuses it to all who are not registered so, whatever host the key seems to be of.
        let may_replace = self.is_left_over(key) || key.is_of_nobody();
        let replaced =
            may_replace && storage.register(held.key, new.0).await? == StorageAnswer::Done;
        if replaced {
            match storage.reservation().await? {
                Some(held) if held.key == new.0 => return Ok(new),
                Some(_) => {}
                None => return self.reserve_as(storage, new).await,
            }
        } else if key.is_of_nobody() {
            self.register(storage, &keys, new, None).await?;
        } else {
            return Err(Refusal::Busy(held));
        }
        let taken = match key.is_of_nobody() {
            true => self.preempt(storage, key, new).await?,
            // Of a map, a path that was not registered is now, and another host has it.
            false => {
                self.settle(storage, new, Ok(StorageAnswer::Conflict))
                    .await?
            }
        };
        match taken {
            StorageAnswer::Done => Ok(new),
            // Another host was faster.
            StorageAnswer::Conflict => Err(Refusal::Busy(held)),
        }
    }

    /// Takes away what `old` has.
    async fn preempt(
        &self,
        storage: &impl ReservationStorage,
        old: ReservationKey,
        new: ReservationKey,
    ) -> Result<StorageAnswer, Refusal> {
        let preempted = storage.preempt(new.0, old.0, self.rules.aborts).await;
        self.settle(storage, new, preempted).await
    }

    /// Whether no disk does I/O under this key, which this host left behind when it died or when a command failed.
    fn is_left_over(&self, key: ReservationKey) -> bool {
        let host = &self.claim.host;
        let is_idle = !key.is_of_boot(host) || key.is_of_nobody();
        key.is_of_machine(host) && (is_idle || !self.rules.respects)
    }

    async fn reserve(&self, storage: &impl ReservationStorage) -> Result<ReservationKey, Refusal> {
        let (changes, keys) = storage.keys().await?;
        let new = ReservationKey::new(&self.claim, changes);
        self.register(storage, &keys, new, None).await?;
        self.reserve_as(storage, new).await
    }

    /// Reserves for a key that is registered.
    async fn reserve_as(
        &self,
        storage: &impl ReservationStorage,
        key: ReservationKey,
    ) -> Result<ReservationKey, Refusal> {
        let reserved = storage.reserve(key.0).await;
        match self.settle(storage, key, reserved).await? {
            StorageAnswer::Done => Ok(key),
            StorageAnswer::Conflict => match storage.reservation().await? {
                Some(held) => Err(Refusal::Busy(held)),
                // It was given up since, so the next attempt gets it.
                None => Err(Refusal::Registered(Vec::new())),
            },
        }
    }

    /// Finds the result of a command that was to reserve for this key, and whose answer may be lost. A host that has
    /// not got it is registered no longer, because registration would entitle it to write where the storage lets all
    /// registered hosts write.
    async fn settle(
        &self,
        storage: &impl ReservationStorage,
        key: ReservationKey,
        answer: Result<StorageAnswer, Failure>,
    ) -> Result<StorageAnswer, Refusal> {
        if matches!(answer, Ok(StorageAnswer::Done)) {
            return Ok(StorageAnswer::Done);
        }
        // To unregister what has been reserved would make it free.
        if matches!(storage.reservation().await?, Some(held) if held.key == key.0) {
            return Ok(StorageAnswer::Done);
        }
        if self.rules.leaves {
            storage.register(key.0, 0).await?;
        }
        Ok(answer?)
    }

    /// Registers a new key in place of none, or of one that was left over, but not of `except`.
    async fn register(
        &self,
        storage: &impl ReservationStorage,
        keys: &[u64],
        new: ReservationKey,
        except: Option<u64>,
    ) -> Result<(), Refusal> {
        if storage.register(0, new.0).await? == StorageAnswer::Done {
            return Ok(());
        }
        let own = |key: &&u64| {
            let left_over = ReservationKey(**key).is_of(&self.claim)
                || self.is_left_over(ReservationKey(**key));
            left_over && Some(**key) != except
        };
        for old in keys.iter().filter(own) {
            if storage.register(*old, new.0).await? == StorageAnswer::Done {
                return Ok(());
            }
        }
        let host = &self.claim.host;
        let here = keys
            .iter()
            .filter(|key| ReservationKey(**key).is_of_machine(host));
        Err(Refusal::Registered(here.copied().collect()))
    }

    /// Continues with the reservation of an earlier supervisor for this disk.
    pub(super) async fn resume(
        &self,
        storage: &impl ReservationStorage,
    ) -> Result<ReservationKey, Refusal> {
        match storage.reservation().await? {
            Some(held) if ReservationKey(held.key).is_of(&self.claim) => {
                Ok(ReservationKey(held.key))
            }
            held => Err(Refusal::Lost(held)),
        }
    }

    /// A heartbeat: looks whether it is still reserved for this disk.
    pub(super) async fn keep(
        &self,
        storage: &impl ReservationStorage,
        key: ReservationKey,
    ) -> Result<(), Refusal> {
        match storage.reservation().await? {
            Some(held) if held.key == key.0 => Ok(()),
            held => Err(Refusal::Lost(held)),
        }
    }

    /// Gives it up. No I/O is under way, and none follows.
    ///
    /// The storage keeps it reserved, for an idle key: if it were free, the storage would accept writes of a host that
    /// has lost it before and has not noticed.
    pub(super) async fn give_up(
        &self,
        storage: &impl ReservationStorage,
        key: ReservationKey,
    ) -> Result<(), Refusal> {
        let idle = match self.rules.idles {
            true => ReservationKey::of_nobody(&self.claim.host, key.changes()),
            false => ReservationKey(0),
        };
        if storage.register(key.0, idle.0).await? == StorageAnswer::Done {
            return Ok(());
        }
        match storage.reservation().await? {
            // It was done, but the answer was lost.
            Some(held) if held.key == idle.0 => Ok(()),
            held => Err(Refusal::Lost(held)),
        }
    }

    /// Takes it away from the holder with the key `dead`, and keeps it reserved for an idle key. True if there was
    /// something to be taken.
    pub(super) async fn break_off(
        &self,
        storage: &impl ReservationStorage,
        dead: ReservationKey,
    ) -> Result<bool, Refusal> {
        let (changes, keys) = storage.keys().await?;
        let held = storage.reservation().await?;
        match held {
            Some(held) if ReservationKey(held.key).is_of_nobody() => return Ok(false),
            Some(held) if held.key != dead.0 => return Err(Refusal::Other(Some(held))),
            None if !keys.contains(&dead.0) => return Ok(false),
            _ => {}
        }
        let idle = ReservationKey::of_nobody(&self.claim.host, changes);
        match self.register(storage, &keys, idle, Some(dead.0)).await {
            Err(Refusal::Registered(here)) if here.contains(&dead.0) => {
                return Err(Refusal::Here(dead))
            }
            registered => registered?,
        }
        if self.preempt(storage, dead, idle).await? == StorageAnswer::Conflict {
            return Err(Refusal::Other(storage.reservation().await?));
        }
        // Of who was registered and had nothing reserved nothing is left.
        if held.is_none() || !self.rules.idles {
            storage.register(idle.0, 0).await?;
        }
        Ok(true)
    }
}
