// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases that a host had when it was booted anew, with a storage that answers at once and a clock that only sleeps move.

use super::layout::{Area, Cell, LeaseRecord, RecordState};
use super::rules::{HeldLease, LeaseWorld, Party, RecordRules, Refusal};
use crate::block_on::block_on;
use crate::host::{Host as Name, LeaseClaim};
use control::Failure;
use std::cell::{Cell as Var, RefCell};
use std::time::Duration;

/// For how long the supervisor waits for another host.
const WAIT: Duration = Duration::from_secs(5);

/// The storage, and a host that looks at it.
struct Still {
    now: Var<Duration>,
    area: RefCell<Area>,
    /// The holder's heartbeats come this often, if it lives.
    beats: Option<Duration>,
}

impl Still {
    /// With a lease of `holder`.
    fn held_by(holder: &Party, beats: Option<Duration>) -> Self {
        let world = Self {
            now: Var::default(),
            area: RefCell::default(),
            beats,
        };
        let taken = block_on(holder.take(&world, Duration::ZERO));
        assert_eq!(taken.expect("it is free").generation, 1);
        world
    }

    fn take(&self, party: &Party) -> (Result<HeldLease, Refusal>, Duration) {
        let begun = self.now.get();
        let taken = block_on(party.take(self, WAIT));
        (taken, self.now.get() - begun)
    }
}

impl LeaseWorld for Still {
    fn now(&self) -> Duration {
        self.now.get()
    }

    fn date(&self) -> u64 {
        0
    }

    async fn read(&self) -> Result<Area, Failure> {
        let mut area = self.area.borrow_mut();
        if let Some(every) = self.beats {
            let held = area
                .settled()
                .filter(|record| record.state == RecordState::Held);
            if let Some(held) = held.cloned() {
                // CAST: few.
                let beat = (self.now.get().as_millis() / every.as_millis()) as u64;
                area.set(Cell::Hold, LeaseRecord { beat, ..held });
            }
        }
        Ok(area.clone())
    }

    async fn write(&self, cell: Cell, record: &LeaseRecord) -> Result<(), Failure> {
        self.area.borrow_mut().set(cell, record.clone());
        Ok(())
    }

    async fn sleep(&self, time: Duration) {
        self.now.set(self.now.get() + time);
    }
}

/// A disk on a machine in one of its boots.
fn on(machine: u8, boot: u8) -> Party {
    Party {
        claim: LeaseClaim {
            host: Name {
                name: format!("host{machine}"),
                machine: [machine; 16],
                boot: [boot; 16],
            },
            disk: "the disk".into(),
            // Drawn for each disk.
            token: [boot; 16],
        },
        image: 1,
        rules: RecordRules::ALL,
    }
}

#[test]
fn a_booted_host_takes_back_what_it_had() {
    let world = Still::held_by(&on(1, 1), None);
    let (taken, waited) = world.take(&on(1, 2));
    assert_eq!(taken.expect("no other host has it").generation, 2);
    // As long as an I/O of the earlier boot could be under way, if its clock was slow.
    assert!(waited >= Duration::from_millis(12_500), "{waited:?}");
    assert!(waited < Duration::from_secs(14), "{waited:?}");
}

#[test]
fn a_booted_host_does_not_take_from_one_that_has_its_number() {
    for every in [2, 9, 12] {
        let world = Still::held_by(&on(1, 1), Some(Duration::from_secs(every)));
        let (taken, waited) = world.take(&on(1, 2));
        assert!(matches!(taken, Err(Refusal::Busy(_))), "{taken:?}");
        assert!(waited < Duration::from_secs(16), "{waited:?}");
    }
}

#[test]
fn what_a_silent_host_has_no_other_takes() {
    let world = Still::held_by(&on(1, 1), None);
    let (taken, waited) = world.take(&on(2, 1));
    assert!(matches!(taken, Err(Refusal::Busy(_))), "{taken:?}");
    assert!(waited < Duration::from_secs(6), "{waited:?}");
}
