// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Guests with persistent grants: which pages stay mapped, and for how long.

use ring::abi::{OP_READ, OP_WRITE};
use sim::machine::MachineSetup;
use sim::spec::{Gref, Spec};
use sim::world::{EngineWorld, ReservedMemory};

fn keeping(map_pages: u16) -> MachineSetup {
    MachineSetup {
        map_pages,
        copy_max_segments: u16::MAX,
        keeps_grants: true,
        ..MachineSetup::default()
    }
}

fn each(map_pages: u16, case: impl Fn(&mut EngineWorld<'_>)) {
    for seed in 0..8 {
        let setup = keeping(map_pages);
        let mut storage = ReservedMemory::new(&setup);
        let mut world = EngineWorld::new(&mut storage, setup, seed);
        case(&mut world);
        world.close_clean();
    }
}

/// Runs without a sweep, which the worker makes only now and then.
fn serve(world: &mut EngineWorld<'_>, specs: &[Spec]) {
    world.send(specs);
    while world.engine.in_flight() > 0 || world.engine.has_requests() {
        let _pass = world.engine.pass();
        world.machine.borrow_mut().backend_step();
    }
    world.machine.borrow_mut().consume();
}

fn counts(world: &EngineWorld<'_>) -> (u64, u64) {
    let accesses = world.machine.borrow().accesses;
    (accesses.copies, accesses.maps)
}

/// Checks that these requests need `first` batches of copies and maps the first time, and none later.
fn is_known_later(some: &[Spec], first: (u64, u64), kept: u16) {
    each(512, |world| {
        serve(world, some);
        assert_eq!(counts(world), first);
        for _ in 0..20 {
            serve(world, some);
        }
        assert_eq!(counts(world), first);
        assert_eq!(world.engine.kept(), kept);
    });
}

#[test]
fn a_page_that_is_known_is_neither_mapped_nor_copied() {
    let some = [Spec::pages(OP_WRITE, 0, 11), Spec::pages(OP_READ, 0, 11)];
    // A read needs what a write had mapped, so nothing is mapped read-only.
    is_known_later(&some, (0, 22), 22);
}

#[test]
fn descriptors_in_a_page_that_is_known_are_not_copied() {
    let some = [
        Spec::indirect(OP_WRITE, 0, 64),
        Spec::indirect(OP_READ, 0, 64),
    ];
    // One batch of copies of both requests' descriptors, and the maps of 2 pages for those and 128 for data.
    is_known_later(&some, (1, 130), 130);
}

#[test]
fn a_page_that_others_hold_is_left_for_another_sweep() {
    each(512, |world| {
        serve(world, &[Spec::pages(OP_WRITE, 0, 11)]);
        let (page, _) = world
            .machine
            .borrow()
            .host
            .mappings
            .iter()
            .next()
            .map(|(page, at)| (*page, *at))
            .unwrap();
        world.machine.borrow_mut().host.held.insert(page);
        // An unmap would wait for as long as the page has another user.
        assert_eq!(world.engine.sweep(true), 1);
        serve(world, &[Spec::pages(OP_READ, 0, 11)]);
        world.machine.borrow_mut().host.held.clear();
        assert_eq!(world.engine.sweep(true), 0);
    });
}

#[test]
fn a_queue_that_makes_room_copies_until_the_next_sweep() {
    each(512, |world| {
        let some = [Spec::pages(OP_WRITE, 0, 11)];
        serve(world, &some);
        let first = counts(world);
        world.engine.make_room();
        assert!(world.machine.borrow().host.mappings.is_empty());
        serve(world, &some);
        assert_eq!(world.engine.kept(), 0);
        assert_eq!(counts(world), (first.0 + 1, first.1));
        world.engine.sweep(false);
        serve(world, &some);
        assert_eq!(world.engine.kept(), 11);
    });
}

#[test]
fn what_is_not_used_goes_with_the_second_sweep() {
    each(512, |world| {
        serve(world, &[Spec::pages(OP_WRITE, 0, 11)]);
        assert_eq!(world.engine.sweep(false), 11);
        // One of them is used again.
        serve(world, &[Spec::pages(OP_WRITE, 0, 1)]);
        assert_eq!(world.engine.sweep(false), 1);
        assert_eq!(world.engine.sweep(false), 0);
        assert!(world.machine.borrow().host.mappings.is_empty());
    });
}

#[test]
fn what_a_request_uses_stays_whatever_is_swept() {
    each(512, |world| {
        world.send(&[Spec::pages(OP_WRITE, 0, 11)]);
        let _pass = world.engine.pass();
        assert_eq!(world.engine.sweep(true), 11);
        serve(world, &[Spec::pages(OP_READ, 512, 3)]);
        assert_eq!(world.engine.sweep(true), 0);
    });
}

#[test]
fn pages_beyond_the_last_place_are_copied() {
    each(16, |world| {
        let many = vec![
            Spec::indirect(OP_WRITE, 0, 64),
            Spec::pages(OP_WRITE, 1024, 11),
        ];
        for _ in 0..3 {
            serve(world, &many);
            assert!(world.engine.kept() <= 16);
        }
        // No map is retried before the next sweep.
        let (_, maps) = counts(world);
        serve(world, &many);
        assert_eq!(counts(world).1, maps);
        assert!(counts(world).0 > 0);
    });
}

#[test]
fn what_there_was_no_room_to_map_is_tried_again() {
    each(512, |world| {
        let some = [Spec::pages(OP_WRITE, 0, 11), Spec::pages(OP_READ, 0, 11)];
        world.machine.borrow_mut().setup.maptrack = 0;
        serve(world, &some);
        let (_, tried) = counts(world);
        serve(world, &some);
        assert_eq!((counts(world).1, world.engine.kept()), (tried, 0));
        world.machine.borrow_mut().setup.maptrack = 4096;
        assert!(world.engine.wants_sweep());
        let _none = world.engine.sweep(false);
        serve(world, &some);
        assert!(world.engine.kept() >= 11);
    });
}

#[test]
fn references_that_collide_are_looked_for_no_further_than_a_few() {
    const PAGES: u16 = 64;
    each(PAGES, |world| {
        let colliding: Vec<u32> = {
            let mut m = world.machine.borrow_mut();
            let grefs: Vec<u32> = (0..2500).map(|_| m.front.hold_page()).collect();
            let bucket =
                |gref: &u32| (u64::from(gref.wrapping_mul(0x9e37_79b1)) * u64::from(PAGES)) >> 32;
            let wanted = bucket(&grefs[0]);
            grefs
                .into_iter()
                .filter(|gref| bucket(gref) == wanted)
                .collect()
        };
        assert!(colliding.len() > 20, "{}", colliding.len());
        for operation in [OP_WRITE, OP_READ] {
            for gref in &colliding {
                let one = Spec {
                    wild: true,
                    ..Spec::new(operation, 0).with(&[(Gref::Raw(*gref), 0, 7)])
                };
                serve(world, &[one]);
            }
        }
        assert_eq!(world.engine.kept(), 16);
        assert_eq!(world.engine.stats().failed, 0);
        // Pages that are not kept are unmapped with their request.
        assert_eq!(world.machine.borrow().host.mappings.len(), 16);
    });
}
