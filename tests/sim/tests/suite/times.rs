// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Durations of I/O and waiting times of requests, by a clock that the test sets.

use ring::abi::{OP_DISCARD, OP_FLUSH_DISKCACHE, OP_READ, OP_WRITE};
use sim::machine::MachineSetup;
use sim::spec::Spec;
use sim::world::{EngineWorld, ReservedMemory};

/// I/O ends in the order of arrival, and not before the test lets it.
fn slow() -> MachineSetup {
    MachineSetup {
        fifo: true,
        synchronous: 0,
        ..MachineSetup::default()
    }
}

fn at(world: &EngineWorld<'_>, now: u64) {
    world.machine.borrow_mut().now = now;
}

/// Ends the oldest I/O.
fn end_one(world: &mut EngineWorld<'_>) {
    world.machine.borrow_mut().disk_step();
    let _pass = world.pass();
}

#[test]
fn times_are_those_from_the_batch_to_the_end_by_operation() {
    let setup = slow();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&[
        Spec::pages(OP_READ, 8, 1),
        Spec::pages(OP_READ, 16, 1),
        Spec::pages(OP_WRITE, 24, 1),
    ]);
    at(&world, 10_000);
    let _pass = world.pass();
    let flight = world.engine.flight();
    assert_eq!((flight.requests, flight.oldest), (3, Some(10_000)));
    world.send(&[Spec::pages(OP_WRITE, 32, 1)]);
    at(&world, 20_000);
    let _pass = world.pass();
    assert_eq!(world.engine.flight().oldest, Some(10_000));
    for (now, oldest) in [
        (30_000, Some(10_000)),
        (40_000, Some(10_000)),
        (50_000, Some(20_000)),
        (90_000, None),
    ] {
        at(&world, now);
        end_one(&mut world);
        assert_eq!(world.engine.flight().oldest, oldest, "at {now}");
    }
    let times = world.engine.stats().times;
    assert_eq!((times.read.done, times.read.ns), (2, 20_000 + 30_000));
    assert_eq!((times.write.done, times.write.ns), (2, 40_000 + 70_000));
    assert_eq!(world.engine.flight().requests, 0);
    world.run_clean();
}

#[test]
fn flushes_and_discards_are_told_apart() {
    let setup = slow();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&[
        Spec::new(OP_FLUSH_DISKCACHE, 0),
        Spec {
            discard: 8,
            ..Spec::new(OP_DISCARD, 8)
        },
    ]);
    at(&world, 1_000);
    let _pass = world.pass();
    for now in [5_000, 8_000] {
        at(&world, now);
        end_one(&mut world);
    }
    let times = world.engine.stats().times;
    assert_eq!((times.flush.done, times.flush.ns), (1, 4_000));
    assert_eq!((times.discard.done, times.discard.ns), (1, 7_000));
    world.run_clean();
}

#[test]
fn latencies_are_counted_while_that_is_switched_on() {
    let setup = slow();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    let mut now = 1_000;
    for (on, took, write) in [
        (false, 5_000, false),
        (true, 5_000, false),
        (true, 7_000, false),
        (true, 100_000, true),
        (false, 100_000, true),
    ] {
        world.engine.latencies().switch(on);
        let operation = if write { OP_WRITE } else { OP_READ };
        world.send(&[Spec::pages(operation, 8, 1)]);
        at(&world, now);
        let _pass = world.pass();
        now += took;
        at(&world, now);
        end_one(&mut world);
    }
    let counts = *world.engine.latencies().counts();
    let sums = counts.map(|steps| steps.iter().sum::<u64>());
    // Both reads took 4 to 8 us, the write 64 to 128.
    assert_eq!((counts[0][3], counts[1][7]), (2, 1));
    // The arrival of the first one in the ring is unknown.
    assert_eq!(sums, [2, 1, 0, 0, 2, 3, 3]);
    world.run_clean();
}

/// Returns the step of each count of a histogram, once for each.
fn steps(counts: &[u64]) -> Vec<usize> {
    let steps = counts.iter().enumerate();
    steps
        .flat_map(|(step, count)| std::iter::repeat_n(step, usize::try_from(*count).unwrap()))
        .collect()
}

/// The second request reuses the pages of the first one, and the clock advances while the engine works.
#[test]
fn what_is_before_an_io_and_after_it_is_counted() {
    let setup = MachineSetup {
        fifo: true,
        ..MachineSetup::poor()
    };
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.engine.latencies().switch(true);
    at(&world, 1_000);
    let _pass = world.pass();
    assert!(!world.engine.must_stay_awake());
    // The event came later than the last check.
    world.send(&[
        Spec::pages(OP_WRITE, 8, 11),
        Spec::pages(OP_WRITE, 1024, 11),
        Spec::pages(OP_WRITE, 2048, 11),
    ]);
    world.engine.woken(101_000);
    at(&world, 110_000);
    let _pass = world.pass();
    world.machine.borrow_mut().tick = 3_000;
    at(&world, 300_000);
    world.run_clean();
    let [_, writes, _, _, ring, pages, answers] = *world.engine.latencies().counts();
    assert_eq!(writes.iter().sum::<u64>(), 3);
    // 9 us after the event; the last one was taken later, when the ring had room.
    let waited = steps(&ring);
    assert!(waited.len() == 3 && waited[0] == 4, "{waited:?}");
    let waited = steps(&pages);
    assert!(waited.len() == 3 && waited[0] == 0, "at once: {waited:?}");
    // 190 us and more.
    assert!(waited[2] >= 8, "{waited:?}");
    let held = steps(&answers);
    assert!(
        held.len() == 3 && held.iter().all(|step| (1..6).contains(step)),
        "{held:?}"
    );
}

#[test]
fn a_clock_that_is_near_its_end_does_no_harm() {
    let setup = slow();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&[Spec::pages(OP_READ, 8, 1)]);
    at(&world, u64::MAX - 10);
    let _pass = world.engine.pass();
    at(&world, 20);
    world.machine.borrow_mut().disk_step();
    let _pass = world.engine.pass();
    assert_eq!(world.engine.stats().times.read.ns, 31);
}

#[test]
fn waiting_for_pages_is_counted_in_time_and_in_pieces() {
    let setup = MachineSetup {
        fifo: true,
        ..MachineSetup::poor()
    };
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&[
        Spec::indirect(OP_WRITE, 0, 32),
        Spec::pages(OP_WRITE, 1024, 11),
    ]);
    at(&world, 1_000);
    let _pass = world.pass();
    assert_eq!(world.engine.stats().page_wait_ns, 0, "it has just begun");
    at(&world, 6_000);
    end_one(&mut world);
    // The first one continues with its second half.
    assert_eq!(world.engine.stats().page_wait_ns, 5_000);
    assert_eq!(world.engine.stats().pieces, 1);
    at(&world, 9_000);
    end_one(&mut world);
    assert_eq!(world.engine.stats().page_wait_ns, 8_000);
    at(&world, 20_000);
    end_one(&mut world);
    assert_eq!(world.engine.stats().page_wait_ns, 8_000, "it has its pages");
    assert_eq!(world.engine.stats().times.write.done, 3);
    world.run_clean();
}

#[test]
fn a_barrier_that_waits_for_its_turn_does_not_wait_for_pages() {
    use ring::abi::OP_WRITE_BARRIER;
    let setup = slow();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    world.send(&[
        Spec::pages(OP_WRITE, 8, 1),
        Spec::pages(OP_WRITE_BARRIER, 16, 1),
    ]);
    let _pass = world.pass();
    at(&world, 50_000);
    world.run_clean();
    let stats = world.engine.stats();
    assert_eq!((stats.oo_req, stats.page_wait_ns), (1, 0));
    assert_eq!((stats.times.write.done, stats.times.flush.done), (1, 1));
}

#[test]
fn a_full_ring_is_counted_while_it_is_full() {
    let setup = slow();
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    let specs: Vec<Spec> = (0..32).map(|at| Spec::pages(OP_READ, at * 8, 1)).collect();
    world.send(&specs[..31]);
    let _pass = world.pass();
    assert_eq!(world.engine.stats().ring_full, 0);
    world.send(&specs[31..]);
    let _pass = world.pass();
    assert_eq!(world.engine.stats().ring_full, 1);
    world.run_clean();
    let full = world.engine.stats().ring_full;
    world.serve(&specs[..31]);
    assert_eq!(world.engine.stats().ring_full, full);
}
