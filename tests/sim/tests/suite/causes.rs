// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Defects that were once found in the engine, each named after its cause.

use std::cell::Cell;

use crate::closing::{large_writes, one_at_a_time};
use blkback::engine::{Backend, Io};
use ring::abi::{OP_DISCARD, OP_READ, OP_WRITE, OP_WRITE_BARRIER, REQ_PROD};
use ring::numbers::QueueTag;
use ring::request::RequestLimits;
use ring::response::ResponseStatus;
use sim::machine::MachineSetup;
use sim::port::FakeDisk;
use sim::spec::{Expect, Spec};
use sim::world::{EngineWorld, ReservedMemory};

fn discard_all(sectors: u64) -> Spec {
    Spec {
        discard: sectors,
        ..Spec::new(OP_DISCARD, 0)
    }
}

fn large_disk() -> MachineSetup {
    MachineSetup {
        limits: RequestLimits {
            sectors: 10 << 20,
            ..MachineSetup::default().limits
        },
        ..MachineSetup::default()
    }
}

#[test]
fn a_request_too_large_for_both_pools_does_not_fill_the_pages_of_another() {
    let setup = MachineSetup {
        copy_pages: 4,
        map_pages: 4,
        ..MachineSetup::default()
    };
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.serve(&[
        Spec::pages(OP_WRITE, 8, 1),
        Spec::pages(OP_WRITE, 64, 11).expect(Expect::Error),
        Spec::pages(OP_WRITE_BARRIER, 64, 11).expect(Expect::Error),
    ]);
    world.serve(&[Spec::pages(OP_READ, 8, 1), Spec::pages(OP_READ, 64, 4)]);
}

#[test]
fn a_discard_of_the_whole_disk_does_not_delay_closing() {
    let setup = large_disk();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&[discard_all(10 << 20).expect(Expect::Error)]);
    let _pass = world.pass();
    world.close_clean();
    let m = world.machine.borrow();
    assert_eq!(m.front.answers.len(), 1);
    assert_eq!(m.disk.special, 1, "only the piece that was running");
}

#[test]
fn a_discard_done_in_pieces_is_counted_once() {
    let setup = large_disk();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.serve(&[discard_all(10 << 20)]);
    assert_eq!(world.machine.borrow().disk.special, 5);
    assert_eq!(world.engine.stats().ds_req, 1);
}

#[test]
fn a_request_that_waits_for_long_is_counted_once() {
    let setup = one_at_a_time();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&large_writes::<2>());
    for _ in 0..5 {
        let _pass = world.pass();
    }
    assert_eq!(world.engine.stats().oo_req, 1);
    world.run_clean();
    assert_eq!(world.engine.stats().oo_req, 1);
}

#[test]
fn an_impossible_index_found_on_the_way_to_sleep_is_reported() {
    let setup = MachineSetup::default();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    assert!(!world.engine.pass().broken);
    world.machine.borrow_mut().ring.store(REQ_PROD, 33);
    assert!(
        world.engine.must_stay_awake(),
        "nobody would learn that the ring is broken"
    );
    assert!(world.engine.pass().broken);
    assert!(!world.engine.must_stay_awake());
}

#[test]
fn a_request_that_can_be_neither_mapped_nor_copied_does_not_wait_for_the_end_of_the_load() {
    let setup = MachineSetup {
        copy_pages: 11,
        map_pages: 200,
        copy_max_segments: 0,
        no_space: 100,
        ..MachineSetup::default()
    };
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&[Spec::indirect(OP_READ, 0, 40).expect(Expect::Error)]);
    for _ in 0..5 {
        world.send(&[Spec::pages(OP_READ, 512, 1)]);
        let _pass = world.pass();
        world.machine.borrow_mut().disk_step();
    }
    let refused = |m: &sim::machine::Machine| m.front.answers.iter().any(|a| a.status == -1);
    assert!(refused(&world.machine.borrow()), "still waiting");
    world.run_clean();
}

/// A disk that can begin a request from the moment at which the engine asks whether it can.
struct PromptDisk {
    disk: FakeDisk,
    told: Cell<bool>,
    begun: bool,
}

impl Backend for PromptDisk {
    fn submit<'b>(&mut self, count: u16, batch: impl Iterator<Item = Io<'b>>) {
        self.disk.submit(count, batch);
    }

    fn can_resume(&self) -> bool {
        self.told.replace(true) && !self.begun
    }

    fn resume(&mut self) {
        self.begun = true;
    }

    /// Takes all results, so that a wake-up from before this call finds none.
    fn reap(&mut self, done: impl FnMut(QueueTag, ResponseStatus)) {
        self.disk.reap(done);
    }

    fn now(&self) -> u64 {
        self.disk.now()
    }
}

#[test]
fn what_can_be_begun_is_not_slept_over() {
    let setup = MachineSetup::default();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::behind(&mut storage, setup, 1, |disk| PromptDisk {
        disk,
        told: Cell::new(false),
        begun: false,
    });
    assert!(world.pass().again, "it was told in the middle of the pass");
    assert!(!world.pass().again, "it has begun it");
}
