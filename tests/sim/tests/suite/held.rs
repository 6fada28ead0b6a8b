// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Mapped pages that network storage still holds after their I/O is done: an unmap would wait for that storage.

use ring::abi::{OP_READ, OP_WRITE};
use sim::machine::MachineSetup;
use sim::rng::Rng;
use sim::schedule::{random_setup, run_setup};
use sim::spec::Spec;
use sim::world::{EngineWorld, ReservedMemory};

fn mapped() -> MachineSetup {
    MachineSetup {
        copy_max_segments: 0,
        map_pages: 64,
        copy_pages: 64,
        ..MachineSetup::default()
    }
}

/// Three requests whose I/O is done; storage still holds a page of the second one. Returns that request's number.
fn done_and_held(world: &mut EngineWorld<'_>) -> u64 {
    let ids = world.send(&[
        Spec::pages(OP_READ, 0, 2),
        Spec::pages(OP_WRITE, 64, 2),
        Spec::pages(OP_READ, 128, 3),
    ]);
    let _pass = world.pass();
    let mut m = world.machine.borrow_mut();
    let page = m.host.mappings.keys().nth(3).copied();
    m.host.held.extend(page);
    while m.disk.running() > 0 {
        m.disk_step();
    }
    ids[1]
}

fn answered(world: &EngineWorld<'_>) -> Vec<u64> {
    let m = world.machine.borrow();
    m.front.answers.iter().map(|answer| answer.id).collect()
}

/// The frontend takes the answers that it can see.
fn look(world: &EngineWorld<'_>) {
    world.machine.borrow_mut().consume();
}

#[test]
fn a_page_that_storage_still_holds_delays_its_request_alone() {
    let setup = mapped();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    let held = done_and_held(&mut world);
    let pass = world.pass();
    assert!(pass.held && !pass.again, "{pass:?}");
    assert_eq!(pass.answered, 2);
    look(&world);
    assert!(!answered(&world).contains(&held));
    // The queue serves other requests.
    world.send(&[Spec::pages(OP_WRITE, 256, 2)]);
    let _pass = world.pass();
    while world.machine.borrow().disk.running() > 0 {
        world.machine.borrow_mut().disk_step();
    }
    let pass = world.pass();
    assert_eq!((pass.answered, pass.held), (1, true));
    world.machine.borrow_mut().host.held.clear();
    let pass = world.pass();
    assert_eq!((pass.answered, pass.held), (1, false));
    look(&world);
    assert_eq!(answered(&world).last(), Some(&held));
    world.run_clean();
}

#[test]
fn a_request_whose_page_storage_holds_is_answered_before_the_queue_ends() {
    let setup = mapped();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    done_and_held(&mut world);
    for _ in 0..3 {
        assert!(world.engine.drain_pass().held);
        assert_eq!(world.engine.in_flight(), 1);
    }
    world.machine.borrow_mut().host.held.clear();
    world.close_clean();
}

#[test]
fn a_page_that_storage_holds_does_not_keep_the_ring_from_being_given_back() {
    let setup = mapped();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    done_and_held(&mut world);
    assert!(world.pass().held);
    let problems = world.abandon();
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn a_ring_that_goes_while_stalled_pages_are_unmapped_is_not_used_again() {
    let setup = MachineSetup {
        gives_back: 100,
        ..mapped()
    };
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&[Spec::pages(OP_READ, 0, 2), Spec::pages(OP_WRITE, 64, 2)]);
    world.machine.borrow_mut().goes_in_unmap = true;
    let pass = world.pass();
    assert!(world.machine.borrow().gone, "no unmap was waited for");
    assert_eq!(pass, Default::default());
    let before = world.machine.borrow().accesses;
    let _pass = world.engine.pass();
    assert_eq!(world.machine.borrow().accesses, before);
    let problems = world.abandon();
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn no_schedule_makes_a_queue_wait_for_storage() {
    let mut mapped = 0;
    for seed in 0..600 {
        let mut rng = Rng::new(seed);
        let setup = MachineSetup {
            holds: rng.pick(&[5, 30, 100]),
            ..random_setup(&mut rng)
        };
        let outcome = run_setup(setup, &mut rng, None);
        assert!(
            outcome.problems.is_empty(),
            "seed {seed}: {:#?}",
            outcome.problems
        );
        mapped += outcome.mapped;
    }
    assert!(mapped > 1000, "{mapped} pages were mapped");
}
