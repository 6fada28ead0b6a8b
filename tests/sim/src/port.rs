// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The engine's port to the disk: I/Os that the engine submits, and that the disk completes or gives back.

use blkback::engine::{Backend, Io, IoKind, ReapContext};
use ring::numbers::QueueTag;
use ring::response::ResponseStatus;

use crate::disk::RunningIo;
use crate::machine::{Machine, MachineFault, SharedMachine};

impl Machine {
    /// Gives back an I/O that was begun, so that the engine submits it once more. The guest's pages may already have
    /// some of the data of a read. A write has no effect before, because its second execution could overwrite data that
    /// another guest's request may have read in between.
    pub(crate) fn give_back_late(&mut self, io: &RunningIo) {
        if io.kind == IoKind::Read {
            self.read(io, true);
        }
        self.disk.given_back.1 += 1;
        if !self.commit(MachineFault::LoseGivenBack) {
            self.disk.back.push(io.tag);
        }
    }

    /// Gives back an I/O that cannot be done where its data is. Returns true if it is not begun.
    fn give_back_at_once(&mut self, io: &mut RunningIo) -> bool {
        let chance = self.setup.gives_back;
        if chance == 0 || !self.rng.percent(chance) {
            return false;
        }
        if self.rng.percent(50) {
            io.is_given_back = true;
            return false;
        }
        self.disk.given_back.0 += 1;
        self.disk.back.push(io.tag);
        // The planted fault begins it nevertheless.
        !self.commit(MachineFault::BeginGivenBack)
    }
}

/// The engine's port to the disk.
#[derive(Debug)]
pub struct FakeDisk {
    machine: SharedMachine,
}

impl FakeDisk {
    /// Returns a port to the machine's disk.
    pub fn new(machine: SharedMachine) -> Self {
        Self { machine }
    }
}

impl Backend for FakeDisk {
    fn submit<'b>(&mut self, count: u16, batch: impl Iterator<Item = Io<'b>>) {
        let mut m = self.machine.borrow_mut();
        m.disk.batches += 1;
        m.gone |= m.goes_in_submit;
        let mut left = count;
        for io in batch {
            left = left.checked_sub(1).expect("no more than were announced");
            let mut running = m.accept(&io);
            if m.disk.again == Some(io.tag) {
                m.disk.again = None;
                m.disk.done.push((io.tag, ResponseStatus::Okay));
                m.disk.wake = true;
            }
            if io.is_mapped() && m.give_back_at_once(&mut running) {
                continue;
            }
            let now = m.setup.synchronous;
            if m.rng.percent(now) {
                // No wake-up: the worker is awake and reaps before it sleeps.
                m.execute(running);
            } else {
                m.disk.running.push(running);
            }
        }
        assert_eq!(left, 0, "as many as were announced");
    }

    fn reap(&mut self, mut done: impl FnMut(QueueTag, ResponseStatus)) {
        let mut m = self.machine.borrow_mut();
        for (tag, status) in std::mem::take(&mut m.disk.done) {
            m.disk.release(tag);
            done(tag, status);
        }
    }

    fn reap_context(&self) -> ReapContext {
        match self.machine.borrow().setup.reaps_anywhere {
            true => ReapContext::Any,
            false => ReapContext::Thread,
        }
    }

    fn reap_anywhere(&mut self, done: impl FnMut(QueueTag, ResponseStatus)) -> bool {
        self.reap(done);
        // I/O that is given back is for the worker.
        !self.machine.borrow().disk.back.is_empty()
    }

    fn prefers_mapped(&self, _kind: IoKind) -> bool {
        let mut m = self.machine.borrow_mut();
        m.setup.gives_back == 0 || m.rng.percent(80)
    }

    fn give_back(&mut self, mut each: impl FnMut(QueueTag)) {
        let mut m = self.machine.borrow_mut();
        for tag in std::mem::take(&mut m.disk.back) {
            m.disk.release(tag);
            each(tag);
        }
    }

    fn aside<T>(&mut self, body: impl FnOnce() -> T) -> T {
        let mut m = self.machine.borrow_mut();
        m.gone |= m.goes_in_unmap;
        drop(m);
        body()
    }

    fn now(&self) -> u64 {
        self.machine.borrow_mut().look_at_clock()
    }

    fn attach(&mut self, block: u16) -> bool {
        self.machine.borrow_mut().lend(block)
    }

    fn detach(&mut self, block: u16) {
        self.machine.borrow_mut().take_back(block);
    }
}
