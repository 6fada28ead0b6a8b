// SPDX-License-Identifier: MIT OR Apache-2.0
//! A storage with reservations in memory, which several hosts reach, as SPC-5 and NVMe say what one does.

use super::rules::ReservationStorage;
use super::ReservationLease;
use crate::{Lease, LeaseClaim};
use control::Failure;
use diskio::reservation::{Reservation, ReservationKind, StorageAnswer};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The storage. Copies are the same one.
#[derive(Clone, Debug)]
pub struct ScsiTarget {
    state: Arc<Mutex<TargetState>>,
    kind: ReservationKind,
}

/// Sender of a command: an initiator, which is one of a host.
pub type Initiator = u8;

#[derive(Debug, Default)]
struct TargetState {
    keys: BTreeMap<Initiator, u64>,
    changes: u32,
    holder: Option<Initiator>,
    /// Writes under way, by number: their initiators, and whether they were ended.
    writes: BTreeMap<u64, (Initiator, bool)>,
    count: u64,
}

impl Default for ScsiTarget {
    fn default() -> Self {
        ScsiTarget::of_kind(ReservationKind::WriteExclusive)
    }
}

impl ScsiTarget {
    /// One whose reservations are all of a kind.
    #[must_use]
    pub fn of_kind(kind: ReservationKind) -> ScsiTarget {
        ScsiTarget {
            state: Arc::default(),
            kind,
        }
    }

    fn state(&self) -> MutexGuard<'_, TargetState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lease of this storage, as an initiator has it.
    #[must_use]
    pub fn lease(&self, initiator: Initiator, image: &Path, claim: LeaseClaim) -> Box<dyn Lease> {
        let storage = InitiatorPath {
            target: self.clone(),
            initiator,
        };
        Box::new(ReservationLease::new(image, storage, claim))
    }

    /// Makes `new` the key of an initiator that is registered as `old`.
    pub fn register(&self, by: Initiator, old: u64, new: u64) -> StorageAnswer {
        let mut state = self.state();
        if state.keys.get(&by).copied().unwrap_or(0) != old {
            return StorageAnswer::Conflict;
        }
        state.changes += 1;
        match new {
            0 => state.forget(by),
            new => drop(state.keys.insert(by, new)),
        }
        StorageAnswer::Done
    }

    /// Reserves for an initiator that is registered with `key`.
    pub fn reserve(&self, by: Initiator, key: u64) -> StorageAnswer {
        let mut state = self.state();
        let is_registered = state.keys.get(&by) == Some(&key);
        if !is_registered || state.holder.is_some_and(|holder| holder != by) {
            return StorageAnswer::Conflict;
        }
        state.holder = Some(by);
        StorageAnswer::Done
    }

    /// Takes away what all have that are registered as `victim`; what they have under way ends first, if `aborts`.
    pub fn preempt(&self, by: Initiator, own: u64, victim: u64, aborts: bool) -> StorageAnswer {
        let mut state = self.state();
        if state.keys.get(&by) != Some(&own) || !state.keys.values().any(|key| *key == victim) {
            return StorageAnswer::Conflict;
        }
        let is_victim = |state: &TargetState, who: &Initiator| state.keys.get(who) == Some(&victim);
        let held_by_victim = state
            .holder
            .is_some_and(|holder| is_victim(&state, &holder));
        let victims: Vec<_> = state.keys.keys().copied().collect();
        for who in victims {
            if who != by && is_victim(&state, &who) {
                state.forget(who);
                let writes = state.writes.values_mut();
                for (_, is_ended) in writes.filter(|(of, _)| aborts && *of == who) {
                    *is_ended = true;
                }
            }
        }
        state.changes += 1;
        if held_by_victim {
            state.holder = Some(by);
        }
        StorageAnswer::Done
    }

    /// Returns the registered keys, and the number of changes of them.
    #[must_use]
    pub fn keys(&self) -> (u32, Vec<u64>) {
        let state = self.state();
        (state.changes, state.keys.values().copied().collect())
    }

    /// Returns the reservation.
    #[must_use]
    pub fn reservation(&self) -> Option<Reservation> {
        let state = self.state();
        let key = *state.keys.get(&state.holder?)?;
        let kind = self.kind;
        Some(Reservation { key, kind })
    }

    /// Returns the holder of the reservation.
    #[must_use]
    pub fn holder(&self) -> Option<Initiator> {
        self.state().holder
    }

    /// An initiator is there anew, as after a boot: what it had under way is ended, and it stays registered.
    pub fn disconnect(&self, by: Initiator) {
        let mut state = self.state();
        for (_, is_ended) in state.writes.values_mut().filter(|(of, _)| *of == by) {
            *is_ended = true;
        }
    }

    /// Begins a write; nothing if the storage refuses it.
    #[must_use]
    pub fn begin(&self, by: Initiator) -> Option<u64> {
        let mut state = self.state();
        let may = match (state.holder, self.kind) {
            (Some(_), ReservationKind::WriteExclusiveRegistrants) => state.keys.contains_key(&by),
            (Some(holder), _) => holder == by,
            (None, _) => true,
        };
        if !may {
            return None;
        }
        state.count += 1;
        let number = state.count;
        state.writes.insert(number, (by, false));
        Some(number)
    }

    /// A write that was begun lands; false if it was ended before.
    #[must_use]
    pub fn land(&self, number: u64) -> bool {
        let write = self.state().writes.remove(&number);
        write.is_some_and(|(_, is_ended)| !is_ended)
    }
}

impl TargetState {
    /// An initiator is registered no longer, and has nothing reserved.
    fn forget(&mut self, who: Initiator) {
        self.keys.remove(&who);
        self.holder = self.holder.filter(|holder| *holder != who);
    }
}

/// The way of an initiator to the storage.
#[derive(Debug)]
struct InitiatorPath {
    target: ScsiTarget,
    initiator: Initiator,
}

impl ReservationStorage for InitiatorPath {
    fn now(&self) -> Duration {
        crate::now()
    }

    async fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }

    async fn register(&self, old: u64, new: u64) -> Result<StorageAnswer, Failure> {
        Ok(self.target.register(self.initiator, old, new))
    }

    async fn reserve(&self, key: u64) -> Result<StorageAnswer, Failure> {
        Ok(self.target.reserve(self.initiator, key))
    }

    async fn preempt(&self, own: u64, victim: u64, aborts: bool) -> Result<StorageAnswer, Failure> {
        Ok(self.target.preempt(self.initiator, own, victim, aborts))
    }

    async fn keys(&self) -> Result<(u32, Vec<u64>), Failure> {
        Ok(self.target.keys())
    }

    async fn reservation(&self) -> Result<Option<Reservation>, Failure> {
        Ok(self.target.reservation())
    }
}
