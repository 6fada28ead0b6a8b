// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Several queues of one guest: each has a ring, requests and pages of its own, and all share one disk. The machine has
//! one current queue at a time.

use crate::disk::Lane;
use crate::frontend::Frontend;
use crate::grants::GrantHost;
use crate::machine::{Machine, MachineSetup, SharedMachine};
use crate::ring::{Accesses, RingMemory};
use crate::tap::QueuePlace;

/// A queue that is not the current one.
#[derive(Debug)]
struct OtherQueue {
    ring: RingMemory,
    front: Frontend,
    host: GrantHost,
    accesses: Accesses,
    taken: u32,
    event: bool,
    lane: Lane,
    at: QueuePlace,
}

impl OtherQueue {
    fn new(setup: &MachineSetup, number: u16) -> Self {
        let ring = RingMemory::new(setup.protocol, setup.order, setup.junk);
        let size = ring.size();
        Self {
            front: Frontend::new(size),
            ring,
            host: GrantHost::new(setup),
            accesses: Accesses::default(),
            taken: 0,
            event: false,
            lane: Lane::default(),
            at: QueuePlace {
                queue: number,
                base: number * size as u16,
            },
        }
    }

    fn exchange(&mut self, m: &mut Machine) {
        std::mem::swap(&mut self.ring, &mut m.ring);
        std::mem::swap(&mut self.front, &mut m.front);
        std::mem::swap(&mut self.host, &mut m.host);
        std::mem::swap(&mut self.accesses, &mut m.accesses);
        std::mem::swap(&mut self.taken, &mut m.taken);
        std::mem::swap(&mut self.event, &mut m.event);
        std::mem::swap(&mut self.at, &mut m.tap.at);
        m.disk.exchange(&mut self.lane);
        // Swaps back the numbering, which requests of all queues share.
        m.front.count_on(&mut self.front);
    }
}

/// The queues of a machine.
#[derive(Debug)]
pub(crate) struct Queues {
    machine: SharedMachine,
    /// All but the current one.
    others: Vec<Option<OtherQueue>>,
    here: usize,
}

impl Queues {
    /// Returns `count` queues, of which the first is current.
    pub(crate) fn new(machine: SharedMachine, count: usize) -> Self {
        let setup = machine.borrow().setup.clone();
        let first = machine.borrow().tap.at.queue;
        let other = |at: usize| (at > 0).then(|| OtherQueue::new(&setup, first + at as u16));
        Self {
            others: (0..count).map(other).collect(),
            machine,
            here: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.others.len()
    }

    /// Switches to another queue.
    pub(crate) fn look_at(&mut self, at: usize) {
        let Some(mut queue) = self.others[at].take() else {
            return;
        };
        queue.exchange(&mut self.machine.borrow_mut());
        self.others[self.here] = Some(queue);
        self.here = at;
    }
}
