// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A backend that cannot do all I/O with pages of the guest: the engine repeats an I/O that it gives back once, in
//! pages of the queue.

use blkback::engine::{Backend, Io, IoKind};
use ring::abi::{OP_READ, OP_WRITE, OP_WRITE_BARRIER};
use ring::numbers::QueueTag;
use ring::response::ResponseStatus;
use seeds::Seeds;
use sim::machine::{MachineFault, MachineSetup};
use sim::negative::{self, CASES};
use sim::port::FakeDisk;
use sim::rng::Rng;
use sim::schedule::{random_setup, run_setup};
use sim::spec::{Expect, Spec};
use sim::world::{EngineWorld, ReservedMemory};

const SEEDS: u64 = 16;

fn giving(gives_back: u64) -> MachineSetup {
    MachineSetup {
        copy_max_segments: u16::MAX,
        keeps_grants: true,
        gives_back,
        ..MachineSetup::default()
    }
}

fn each(setup: &MachineSetup, case: impl Fn(&mut EngineWorld<'_>)) {
    for seed in 0..SEEDS {
        let mut storage = ReservedMemory::new(setup);
        let mut world = EngineWorld::new(&mut storage, setup.clone(), seed);
        case(&mut world);
        world.check_counters();
        world.close_clean();
    }
}

/// Returns the number of I/Os that the disk has given back.
fn given_back<B: Backend>(world: &EngineWorld<'_, B>) -> u64 {
    let (at_once, late) = world.machine.borrow().disk.given_back;
    at_once + late
}

/// Returns `count` requests, alternately reads and writes.
fn some(count: usize, pages: usize) -> Vec<Spec> {
    let one = |at: usize| match at % 2 {
        0 => Spec::indirect(OP_WRITE, 512 * at as u64 % 2048, pages),
        _ => Spec::indirect(OP_READ, 512 * at as u64 % 2048, pages),
    };
    (0..count).map(one).collect()
}

#[test]
fn each_is_given_back_once_and_counted_once() {
    for gives_back in [30, 100] {
        each(&giving(gives_back), |world| {
            let answers = world.serve(&some(24, 7));
            assert!(answers.iter().all(|answer| answer.status == 0));
            let stats = *world.engine.stats();
            assert_eq!((stats.rd_req, stats.wr_req, stats.f_req), (12, 12, 0));
            assert_eq!((stats.rd_sect, stats.wr_sect), (12 * 56, 12 * 56));
            assert_eq!((stats.times.read.done, stats.times.write.done), (12, 12));
            assert_eq!((stats.failed, stats.refused), (0, 0));
            match gives_back {
                100 => assert_eq!(given_back(world), stats.mapped),
                _ => assert!(given_back(world) < stats.mapped),
            }
            assert!(given_back(world) > 0 && stats.mapped < 24, "{stats:?}");
        });
    }
}

#[test]
fn its_pages_stay_mapped_for_the_next_request() {
    each(&giving(100), |world| {
        let both = [Spec::pages(OP_WRITE, 0, 3), Spec::pages(OP_READ, 0, 3)];
        for _ in 0..20 {
            world.send(&both);
            // Without a sweep, which the worker makes only now and then.
            while world.engine.in_flight() > 0 || world.engine.has_requests() {
                let _pass = world.engine.pass();
                world.machine.borrow_mut().backend_step();
            }
            world.machine.borrow_mut().consume();
        }
        let maps = world.machine.borrow().accesses.maps;
        assert_eq!((maps, world.engine.kept()), (6, 6));
        assert!(given_back(world) > 20);
        assert_eq!(world.engine.sweep(true), 0);
        assert!(world.machine.borrow().host.mappings.is_empty());
    });
}

#[test]
fn a_barrier_that_is_given_back_is_one() {
    each(&giving(100), |world| {
        let write = |sector| Spec::pages(OP_WRITE, sector, 3);
        let barrier = Spec::pages(OP_WRITE_BARRIER, 0, 4);
        for _ in 0..6 {
            world.serve(&[write(0), barrier.clone(), write(8), write(0)]);
        }
        assert_eq!(world.engine.stats().f_req, 6);
        assert!(given_back(world) > 0);
    });
}

#[test]
fn those_for_which_there_are_no_pages_wait_for_each_other() {
    let setup = MachineSetup {
        copy_pages: 16,
        ..giving(100)
    };
    each(&setup, |world| {
        world.serve(&some(12, 16));
        let stats = world.engine.stats();
        assert_eq!((stats.rd_req, stats.wr_req), (6, 6));
    });
}

/// A request that was mapped as a whole is executed piece by piece.
#[test]
fn what_is_done_in_pieces_is_counted_once() {
    let setup = MachineSetup {
        copy_pages: 352,
        own_pages: 16,
        ..giving(100)
    };
    each(&setup, |world| {
        world.serve(&some(6, 60));
        let stats = world.engine.stats();
        assert!(stats.pieces > 0);
        assert_eq!((stats.rd_req, stats.wr_req), (3, 3));
        assert_eq!((stats.rd_sect, stats.wr_sect), (3 * 480, 3 * 480));
    });
}

#[test]
fn what_can_never_be_copied_fails_and_leaves_nothing() {
    let setup = MachineSetup {
        copy_pages: 16,
        ..giving(100)
    };
    for seed in 0..SEEDS {
        let mut storage = ReservedMemory::new(&setup);
        let mut world = EngineWorld::new(&mut storage, setup.clone(), seed);
        let large = |op| Spec::indirect(op, 0, 17).expect(Expect::Any);
        let answers = world.serve(&[large(OP_READ), large(OP_WRITE), large(OP_READ)]);
        assert!(answers.iter().all(|answer| answer.status == -1));
        assert_eq!((given_back(&world), world.engine.stats().failed), (3, 3));
        world.serve(&some(4, 16));
        world.close_clean();
    }
}

#[test]
fn a_queue_that_closes_does_what_was_given_back() {
    for steps in 0..12 {
        for synchronous in [0, 50] {
            let setup = MachineSetup {
                copy_pages: 40,
                synchronous,
                ..giving(60)
            };
            each(&setup, |world| {
                world.send(&some(12, 16));
                for _ in 0..steps {
                    let _pass = world.pass();
                    world.machine.borrow_mut().disk_step();
                }
                world.close_clean();
                let m = world.machine.borrow();
                assert!(m.front.answers.iter().all(|answer| answer.status == 0));
            });
        }
    }
}

#[test]
fn a_guest_that_is_gone_leaves_nothing_mapped() {
    let (mut before, mut after) = (0, 0);
    for steps in 0..12 {
        for seed in 0..SEEDS {
            let setup = MachineSetup {
                copy_pages: 40,
                synchronous: 30 * (seed % 2),
                ..giving(60)
            };
            let mut storage = ReservedMemory::new(&setup);
            let mut world = EngineWorld::new(&mut storage, setup, seed);
            world.send(&some(12, 16));
            for _ in 0..steps {
                let _pass = world.pass();
                world.machine.borrow_mut().disk_step();
            }
            let (machine, here) = (world.machine.clone(), given_back(&world));
            let problems = world.abandon();
            assert!(problems.is_empty(), "{problems:#?}");
            let (at_once, late) = machine.borrow().disk.given_back;
            before += here;
            after += at_once + late - here;
        }
    }
    assert!(before > 100 && after > 100, "{before}, {after}");
}

#[test]
fn a_ring_that_goes_while_io_is_given_back_is_not_used_again() {
    for seed in 0..SEEDS {
        let setup = giving(100);
        let mut storage = ReservedMemory::new(&setup);
        let mut world = EngineWorld::new(&mut storage, setup, seed);
        world.send(&some(6, 7));
        world.machine.borrow_mut().goes_in_submit = true;
        let pass = world.pass();
        assert!(!pass.notify && !pass.again, "{pass:?}");
        let before = world.machine.borrow().accesses;
        let _pass = world.engine.drain_pass();
        assert_eq!(world.machine.borrow().accesses, before);
        let problems = world.abandon();
        assert!(problems.is_empty(), "{problems:#?}");
    }
}

/// A disk that allows no mappings.
struct Shy(FakeDisk);

impl Backend for Shy {
    fn submit<'b>(&mut self, count: u16, batch: impl Iterator<Item = Io<'b>>) {
        self.0.submit(count, batch);
    }

    fn reap(&mut self, done: impl FnMut(QueueTag, ResponseStatus)) {
        self.0.reap(done);
    }

    fn prefers_mapped(&self, kind: IoKind) -> bool {
        kind == IoKind::Read
    }

    fn give_back(&mut self, each: impl FnMut(QueueTag)) {
        self.0.give_back(each);
    }

    fn now(&self) -> u64 {
        self.0.now()
    }
}

#[test]
fn what_the_backend_does_not_want_mapped_is_copied() {
    let setup = giving(0);
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::behind(&mut storage, setup, 1, Shy);
    world.serve(&some(24, 7));
    assert_eq!(world.engine.stats().mapped, 12, "the reads");
    assert_eq!(given_back(&world), 0);
    world.close_clean();
}

#[test]
fn every_schedule_is_explained_whatever_is_given_back() {
    let (mut count, mut sum) = (0, 0);
    for seed in Seeds::new(150) {
        let mut rng = Rng::new(seed);
        let random = random_setup(&mut rng);
        let setup = MachineSetup {
            copy_pages: 352,
            own_pages: rng.pick(&[16, 40, u16::MAX]),
            map_pages: 512,
            maptrack: 4096,
            keeps_grants: true,
            gives_back: rng.pick(&[5, 40, 100]),
            lawless: 0,
            ..random
        };
        let outcome = run_setup(setup, &mut rng, None);
        assert!(
            outcome.problems.is_empty(),
            "replay it with SEED={seed} SEEDS=1: {:#?}",
            outcome.problems
        );
        count += 1;
        sum += outcome.given_back;
    }
    println!("{count} cases, {sum} given back");
    // A single case may exercise little.
    assert!(count == 1 || sum > 5 * count, "{sum} in {count} cases");
}

fn loaded() -> MachineSetup {
    MachineSetup {
        synchronous: 20,
        race: 5,
        reaps_anywhere: false,
        ..giving(40)
    }
}

fn problems(setup: &MachineSetup, seed: u64, fault: Option<MachineFault>) -> Vec<String> {
    run_setup(setup.clone(), &mut Rng::new(seed), fault).problems
}

#[test]
fn without_a_fault_nothing_is_reported() {
    let (found, reports) = negative::found(|seed| problems(&loaded(), seed, None));
    assert_eq!(found, 0, "{reports:#?}");
}

#[test]
fn io_that_is_never_given_back_is_found() {
    let fault = MachineFault::LoseGivenBack;
    let words = ["asleep", "never answered"];
    negative::must_find(&fault, CASES * 3 / 4, &words, |seed| {
        problems(&loaded(), seed, Some(fault))
    });
}

#[test]
fn io_that_is_done_although_it_was_given_back_is_found() {
    let fault = MachineFault::BeginGivenBack;
    negative::must_find(&fault, CASES / 2, &["the tag is in use"], |seed| {
        problems(&loaded(), seed, Some(fault))
    });
}
