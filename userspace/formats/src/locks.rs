// SPDX-License-Identifier: MIT OR Apache-2.0
//! A lock for each cluster, as long as somebody wants it.

use diskio::{Gate, Pass};
use std::cell::RefCell;
use std::collections::HashMap;

/// Locks by number.
#[derive(Debug, Default)]
pub(crate) struct Locks(RefCell<HashMap<u64, (Gate, usize)>>);

/// One of them, which is held, or waited for.
#[derive(Debug)]
#[must_use = "the lock is held as long as this"]
pub(crate) struct Held<'l> {
    locks: &'l Locks,
    number: u64,
    pass: Option<Pass>,
}

impl Locks {
    /// Waits until nobody has lock `number`.
    pub(crate) async fn alone(&self, number: u64) -> Held<'_> {
        let gate = {
            let mut locks = self.0.borrow_mut();
            let (gate, users) = locks.entry(number).or_default();
            *users += 1;
            gate.clone()
        };
        let mut held = Held {
            locks: self,
            number,
            pass: None,
        };
        held.pass = Some(gate.alone().await);
        held
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        drop(self.pass.take());
        let mut locks = self.locks.0.borrow_mut();
        if let Some((_, users)) = locks.get_mut(&self.number) {
            *users -= 1;
            if *users == 0 {
                locks.remove(&self.number);
            }
        }
    }
}
