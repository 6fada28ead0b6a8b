// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A hostile frontend, case by case; the numbers are those of the project's list of such cases.
//!
//! After each case a valid load on the ring must be served normally, and nothing may be left behind: pages, slots,
//! mappings.

mod data;
mod requests;
mod rings;

use ring::abi::Protocol;
use sim::machine::MachineSetup;
use sim::spec::Spec;
use sim::world::{EngineWorld, ReservedMemory};

/// Runs a case on every layout and data path.
fn each(change: impl Fn(&mut MachineSetup), case: impl Fn(&mut EngineWorld<'_>)) {
    for protocol in [Protocol::Abi64, Protocol::Abi32] {
        for (copy_max_segments, keeps_grants) in [(0, false), (u16::MAX, false), (u16::MAX, true)] {
            let mut setup = MachineSetup {
                protocol,
                copy_max_segments,
                keeps_grants,
                ..MachineSetup::default()
            };
            change(&mut setup);
            let mut storage = ReservedMemory::new(&setup);
            let mut world = EngineWorld::new(&mut storage, setup, 1);
            case(&mut world);
        }
    }
}

/// Serves the requests of a case, each with the answer it expects, then a valid load.
fn requests(change: impl Fn(&mut MachineSetup), specs: &[Spec]) {
    each(change, |world| {
        let answers = world.serve(specs);
        assert_eq!(answers.len(), specs.len(), "one answer to each");
        world.still_works();
    });
}

fn unchanged(_setup: &mut MachineSetup) {}

/// Lets the engine and the disk finish without the guest's doing anything.
fn settle(world: &mut EngineWorld<'_>) {
    for _ in 0..10_000 {
        let again = world.engine.pass().again || world.engine.must_stay_awake();
        let mut m = world.machine.borrow_mut();
        if m.disk.running() == 0 && !m.disk.has_completions() && !again {
            return;
        }
        m.disk_step();
    }
    panic!("the engine does not come to rest");
}
