// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A storage that takes its time, fails, and does late what a dead host had asked for, as hosts see it.

use super::super::layout::{Area, Cell, LeaseRecord};
use super::super::rules::LeaseWorld;
use crate::sim::{latency, Dice, Sim};
use control::{Code, Failure};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// Behaviour of hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostMood {
    /// Now this, now that.
    Mixed,
    /// Hosts are often stopped for about as long as a break watches.
    Drowsy,
}

/// A host's view of the storage, and its clock.
#[derive(Clone)]
pub(super) struct ModelHost {
    pub(super) sim: Rc<Sim>,
    pub(super) dice: Rc<Dice>,
    pub(super) store: Rc<RefCell<Area>>,
    pub(super) mood: HostMood,
    /// Thousandths of a second that its clock counts in a second, and where it began.
    pub(super) rate: u32,
    pub(super) begin: Duration,
}

impl ModelHost {
    /// A host may be stopped at any step.
    async fn pause(&self) {
        let is_drowsy = self.mood == HostMood::Drowsy;
        if !self.dice.once_in(if is_drowsy { 10 } else { 60 }) {
            return;
        }
        let time = match is_drowsy {
            true => Duration::from_secs(11) + self.dice.up_to(Duration::from_secs(3)),
            false => self.dice.up_to(Duration::from_secs(15)),
        };
        self.sim.pass(time).await;
    }

    /// The outcome of an operation that takes effect at some time before it ends; what fails may have had its effect.
    async fn operate<T: 'static>(
        &self,
        effect: impl FnOnce() -> T + 'static,
    ) -> Result<T, Failure> {
        self.pause().await;
        let place: Rc<RefCell<Option<T>>> = Rc::default();
        let (takes, fails) = (latency(&self.dice), self.dice.once_in(40));
        let is_done = !fails || self.dice.once_in(2);
        let there = place.clone();
        if is_done {
            // Once asked for it is done, even if the host dies meanwhile.
            self.sim.after(self.dice.up_to(takes), move || {
                there.replace(Some(effect()));
            });
        }
        self.sim.pass(takes).await;
        self.pause().await;
        match place.take() {
            Some(result) if !fails => Ok(result),
            _ => Err(Failure::new(Code::System, "the storage failed")),
        }
    }
}

impl LeaseWorld for ModelHost {
    fn now(&self) -> Duration {
        self.begin + self.sim.time() * self.rate / 1000
    }

    fn date(&self) -> u64 {
        // Clocks of hosts show anything.
        self.dice.below(1 << 40)
    }

    async fn read(&self) -> Result<Area, Failure> {
        let store = self.store.clone();
        self.operate(move || store.borrow().clone()).await
    }

    async fn write(&self, cell: Cell, record: &LeaseRecord) -> Result<(), Failure> {
        let (store, record) = (self.store.clone(), record.clone());
        self.operate(move || store.borrow_mut().set(cell, record))
            .await
    }

    async fn sleep(&self, time: Duration) {
        self.sim.pass(time * 1000 / self.rate).await;
        self.pause().await;
    }
}
