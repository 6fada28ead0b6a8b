// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Teardown of a queue: what was taken is answered, nothing more is taken, and it ends.

use ring::abi::{OP_READ, OP_WRITE};
use sim::machine::MachineSetup;
use sim::spec::Spec;
use sim::world::{EngineWorld, ReservedMemory};

/// Returns a setup with pages for one of these requests, so that the next one waits.
pub(crate) fn one_at_a_time() -> MachineSetup {
    MachineSetup {
        copy_pages: 16,
        map_pages: 0,
        ..MachineSetup::default()
    }
}

/// Returns adjacent writes, each of as many pages as can be copied.
pub(crate) fn large_writes<const COUNT: usize>() -> [Spec; COUNT] {
    std::array::from_fn(|number| Spec::indirect(OP_WRITE, 128 * number as u64, 16))
}

#[test]
fn requests_stalled_for_copy_pages_do_not_keep_the_queue_from_closing() {
    let setup = MachineSetup {
        copy_pages: 16,
        map_pages: 64,
        copy_max_segments: 0,
        no_space: 100,
        ..MachineSetup::default()
    };
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&large_writes::<3>());
    while world.pass().again {}
    assert_eq!(world.machine.borrow().disk.running(), 1);
    world.close_clean();
    assert_eq!(world.machine.borrow().front.answers.len(), 3);
}

#[test]
fn a_parked_request_is_answered_when_the_queue_closes() {
    let setup = one_at_a_time();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&large_writes::<3>());
    let _pass = world.pass();
    assert_eq!(world.engine.in_flight(), 2, "one runs, one is parked");
    world.close_clean();
    // The third was never taken.
    assert_eq!(world.machine.borrow().front.answers.len(), 2);
    assert_eq!(world.machine.borrow().taken, 2);
}

#[test]
fn h47_requests_that_keep_arriving_do_not_keep_the_queue_from_closing() {
    let setup = MachineSetup::default();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&vec![Spec::pages(OP_READ, 0, 2); 12]);
    let _pass = world.pass();
    for _ in 0..12 {
        world.send(&[Spec::pages(OP_READ, 0, 1)]);
        let pass = world.engine.drain_pass();
        assert_eq!(pass.taken, 0);
        world.machine.borrow_mut().disk_step();
    }
    world.close_clean();
    let m = world.machine.borrow();
    assert_eq!(m.front.answers.len(), 12, "those that were taken");
    assert_eq!(m.accesses.slots, 12, "the others were not looked at");
}

#[test]
fn h45_a_guest_that_is_gone_leaves_nothing_behind() {
    for copy_max_segments in [0, 11, u16::MAX] {
        for steps in 0..12 {
            let setup = MachineSetup {
                copy_max_segments,
                copy_pages: 64,
                map_pages: 64,
                no_space: if steps % 2 == 0 { 0 } else { 40 },
                ..MachineSetup::default()
            };
            let mut storage = ReservedMemory::new(&setup);
            let mut world = EngineWorld::new(&mut storage, setup, steps);
            let mut specs = vec![Spec::indirect(OP_WRITE, 0, 40); 3];
            specs.extend(vec![Spec::pages(OP_READ, 0, 7); 10]);
            world.send(&specs);
            for _ in 0..steps {
                let _pass = world.pass();
                if steps > 4 {
                    world.machine.borrow_mut().disk_step();
                }
            }
            let problems = world.abandon();
            assert!(problems.is_empty(), "{problems:#?}");
        }
    }
}

#[test]
fn a_ring_that_goes_while_io_is_started_is_not_used_again() {
    for copy_max_segments in [0, u16::MAX] {
        let setup = MachineSetup {
            copy_max_segments,
            map_pages: 64,
            // Every I/O completes before the backend returns, and its answer is due.
            synchronous: 100,
            ..MachineSetup::default()
        };
        let mut storage = ReservedMemory::new(&setup);
        let mut world = EngineWorld::new(&mut storage, setup, 1);
        world.send(&[Spec::pages(OP_READ, 0, 2), Spec::pages(OP_WRITE, 64, 2)]);
        world.machine.borrow_mut().goes_in_submit = true;
        let pass = world.pass();
        assert!(!pass.notify && !pass.again, "{pass:?}");
        let before = world.machine.borrow().accesses;
        assert_eq!(before.published, 0, "answers in a ring that is gone");
        // The copies are those of the write's data, before it was started; none is of the read.
        assert_eq!(before.copies, u64::from(copy_max_segments > 0));
        for _ in 0..3 {
            let _pass = world.engine.pass();
            let _pass = world.engine.drain_pass();
        }
        assert_eq!(world.machine.borrow().accesses, before);
        let problems = world.abandon();
        assert!(problems.is_empty(), "{problems:#?}");
    }
}
