// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The short way of a request whose pages stay mapped, compared with the way of all steps, which requests take while the
//! engine measures.

use blkback::engine::{Stats, Times};
use ring::abi::{OP_FLUSH_DISKCACHE, OP_READ, OP_WRITE};
use sim::frontend::GuestAnswer;
use sim::machine::MachineSetup;
use sim::rng::Rng;
use sim::spec::Spec;
use sim::world::{EngineWorld, ReservedMemory};

/// The state that a guest and its administrator see of a run.
#[derive(Debug, PartialEq, Eq)]
struct RunOutcome {
    answers: Vec<GuestAnswer>,
    stats: Stats,
    kept: u16,
}

/// Returns the requests that a guest makes at once: mostly small ones, some that must wait for pages or take other ways.
fn random_requests(rng: &mut Rng, sectors: u64) -> Vec<Spec> {
    let count = rng.range(1, 20);
    let one = |rng: &mut Rng| {
        let operation = rng.pick(&[OP_READ, OP_READ, OP_WRITE, OP_WRITE]);
        let pages = rng.pick(&[1usize, 1, 1, 2, 3, 11]);
        let sector = rng.below(sectors - 8 * 22) / 8 * 8;
        match rng.below(20) {
            0 => Spec::new(OP_FLUSH_DISKCACHE, 0),
            1 => Spec::indirect(operation, sector, pages + 11),
            // Some sectors of its page.
            2 => Spec {
                segments: vec![(sim::spec::Gref::Fresh, 2, 4)],
                ..Spec::pages(operation, sector, 0)
            },
            _ => Spec::pages(operation, sector, pages),
        }
    };
    (0..count).map(|_| one(rng)).collect()
}

fn run(seed: u64, setup: &MachineSetup, measures: bool) -> RunOutcome {
    let mut storage = ReservedMemory::new(setup);
    let mut world = EngineWorld::new(&mut storage, setup.clone(), seed);
    world.engine.latencies().switch(measures);
    let mut rng = Rng::new(seed);
    for _ in 0..12 {
        let requests = random_requests(&mut rng, setup.limits.sectors);
        world.send(&requests);
        while world.engine.in_flight() > 0 || world.engine.has_requests() {
            let _pass = world.engine.pass();
            world.machine.borrow_mut().backend_step();
        }
        world.machine.borrow_mut().consume();
    }
    let mut answers = world.machine.borrow().front.answers.clone();
    // Requests may be answered in any order.
    answers.sort_by_key(|answer| answer.id);
    // How often the engine looks at the ring and at the clock differs.
    let stats = Stats {
        times: Times::default(),
        passes: 0,
        notified: 0,
        page_wait_ns: 0,
        ring_full: 0,
        ..*world.engine.stats()
    };
    let kept = world.engine.kept();
    world.close_clean();
    RunOutcome {
        answers,
        stats,
        kept,
    }
}

#[test]
fn both_ways_answer_and_count_alike() {
    let mut quick = 0;
    for seed in 0..150 {
        let mut rng = Rng::new(seed);
        let bad = rng.below(400);
        let setup = MachineSetup {
            // Fewer than requests need, for some.
            map_pages: rng.pick(&[4u16, 40, 512]),
            copy_max_segments: u16::MAX,
            keeps_grants: true,
            fifo: true,
            synchronous: rng.pick(&[0u64, 100]),
            bad_sectors: if rng.percent(30) { bad..bad + 4 } else { 0..0 },
            ..MachineSetup::default()
        };
        let measured = run(seed, &setup, true);
        assert_eq!(run(seed, &setup, false), measured, "seed {seed}");
        quick += measured.stats.mapped;
    }
    assert!(quick > 5_000, "{quick} requests had mapped pages");
}

#[test]
fn requests_are_begun_in_the_order_in_which_they_come() {
    let setup = MachineSetup {
        copy_max_segments: u16::MAX,
        keeps_grants: true,
        // The disk ends them in the order in which it gets them.
        fifo: true,
        ..MachineSetup::default()
    };
    let mut storage = ReservedMemory::new(&setup);
    let mut world = EngineWorld::new(&mut storage, setup, 1);
    // The page is known afterwards.
    let _answers = world.serve(&[Spec::pages(OP_READ, 0, 1)]);
    let requests = [
        Spec::new(OP_FLUSH_DISKCACHE, 0),
        Spec::pages(OP_READ, 8, 1),
        Spec::pages(OP_READ, 16, 2),
    ];
    let before = world.machine.borrow().front.answers.len();
    let ids = world.send(&requests);
    world.run_clean();
    let answers = world.machine.borrow().front.answers.clone();
    let answered: Vec<_> = answers[before..].iter().map(|answer| answer.id).collect();
    assert_eq!(answered, ids);
    world.close_clean();
}
