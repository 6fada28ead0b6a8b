// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Sequences of frontends and toolstacks in use, step by step, and the states that they see.

use crate::machine::DeviceWorld;
use xenbus::proto::state::{OnlineWish, Rings, XenbusState};
use XenbusState::{
    Closed, Closing, Connected, InitWait, Initialised, Initialising, Reconfigured, Reconfiguring,
    Unknown,
};

/// The frontend writes a state, the driver looks and everything in flight ends; returns what was
/// published meanwhile.
fn sees(world: &mut DeviceWorld, theirs: XenbusState) -> Vec<XenbusState> {
    let from = world.published.len();
    world.write(theirs);
    world.settle();
    world.check_rest();
    world.published[from..].to_vec()
}

/// A device whose disk is open and whose frontend is connected.
fn connected() -> DeviceWorld {
    let mut world = DeviceWorld::new();
    world.settle();
    world.disk_comes();
    assert_eq!(sees(&mut world, Initialised), [Connected]);
    assert_eq!(sees(&mut world, Connected), []);
    world
}

#[test]
fn normal_start() {
    let mut world = DeviceWorld::new();
    world.settle();
    assert_eq!(world.published, [InitWait]);
    world.disk_comes();
    world.settle();
    assert_eq!(world.published, [InitWait], "the frontend was not asked");
    assert_eq!(sees(&mut world, Initialised), [Connected]);
    assert_eq!(sees(&mut world, Connected), []);
    assert_eq!(world.attempts, 1);
}

#[test]
fn start_with_connected_at_once() {
    let mut world = DeviceWorld::new();
    world.disk_comes();
    assert_eq!(sees(&mut world, Connected), [InitWait, Connected]);
}

#[test]
fn physical_device_comes_after_the_frontend() {
    let mut world = DeviceWorld::new();
    assert_eq!(sees(&mut world, Initialised), [InitWait]);
    world.settle();
    assert_eq!(world.attempts, 0);
    world.disk_comes();
    world.settle();
    assert_eq!(world.published, [InitWait, Connected]);
}

#[test]
fn physical_device_is_bad_and_then_good() {
    let mut world = DeviceWorld::new();
    world.settle();
    world.disk_is_bad();
    world.settle();
    assert_eq!(
        world.view.ours, Closing,
        "the toolstack cannot see the error"
    );
    world.disk_comes();
    world.settle();
    assert_eq!(world.published, [InitWait, Closing, Closed, InitWait]);
    assert_eq!(sees(&mut world, Initialised), [Connected]);
}

#[test]
fn bad_physical_device_is_detached_without_the_guest() {
    let mut world = DeviceWorld::new();
    world.settle();
    world.disk_is_bad();
    world.set_online(OnlineWish::No);
    world.settle();
    assert!(world.left);
    assert_eq!(world.published, [InitWait, Closing, Closed]);
}

#[test]
fn detach_by_the_toolstack() {
    for first in [Closing, Closed] {
        let mut world = connected();
        // The toolstack also writes 5 into our own state, which is not what we published.
        world.set_online(OnlineWish::No);
        world.settle();
        assert_eq!(world.view.rings, Rings::Served, "the guest decides when");
        let mut seen = sees(&mut world, first);
        assert_eq!(seen.first(), Some(&Closing));
        if first == Closing {
            assert!(!world.left);
            seen.extend(sees(&mut world, Closed));
        }
        assert_eq!(seen, [Closing, Closed]);
        assert!(world.left);
    }
}

/// Between what the driver saw and what it writes there is a moment.
#[test]
fn a_detach_is_not_written_over() {
    let about_to_offer = DeviceWorld::new();
    let mut about_to_connect = DeviceWorld::new();
    about_to_connect.settle();
    about_to_connect.disk_comes();
    // Our state is Closing already.
    let mut about_to_connect_again = connected();
    sees(&mut about_to_connect_again, Reconfigured);
    for (mut world, theirs) in [
        (about_to_offer, Initialising),
        (about_to_connect, Initialised),
        (about_to_connect_again, Initialised),
    ] {
        world.detach_in_between = true;
        sees(&mut world, theirs);
        assert!(!world.detach_in_between, "nothing was to be published");
        assert_eq!(world.view.rings, Rings::None);
        if !world.left {
            assert_eq!(world.there, Closing, "the frontend does not hear of it");
            sees(&mut world, Closing);
            sees(&mut world, Closed);
        }
        assert!(world.left);
    }
}

#[test]
fn rings_are_served_until_the_frontend_has_closed() {
    let mut world = connected();
    world.write(Closing);
    world.look();
    assert_eq!(world.view.ours, Closing);
    assert_eq!(world.view.rings, Rings::Served);
    world.write(Closed);
    world.look();
    assert_eq!(world.view.rings, Rings::Draining);
    assert_eq!(world.view.ours, Closing, "Closed before all was answered");
    world.drained();
    world.look();
    assert_eq!(world.view.ours, Closed);
}

#[test]
fn close_and_reconnect_many_times() {
    let mut world = connected();
    for round in 0..1000 {
        assert_eq!(sees(&mut world, Closing), [Closing], "round {round}");
        assert_eq!(sees(&mut world, Closed), [Closed], "round {round}");
        assert_eq!(sees(&mut world, Initialising), [InitWait], "round {round}");
        assert_eq!(sees(&mut world, Initialised), [Connected], "round {round}");
    }
}

#[test]
fn reconnect_without_waiting() {
    // Each list is what the frontend writes before we look.
    for merged in [
        &[Closing, Closed, Initialising][..],
        &[Closed, Initialising],
        &[Initialising],
    ] {
        let mut world = connected();
        for state in merged {
            world.write(*state);
        }
        world.settle();
        assert_eq!(
            world.published[2..],
            [Closing, Closed, InitWait],
            "{merged:?}"
        );
        assert_eq!(sees(&mut world, Initialised), [Connected]);
    }
}

#[test]
fn new_kernel_after_kexec() {
    let mut world = connected();
    // It finds us Connected, closes what its predecessor left behind, and starts.
    assert_eq!(sees(&mut world, Closing), [Closing]);
    assert_eq!(sees(&mut world, Closed), [Closed]);
    assert_eq!(sees(&mut world, Initialising), [InitWait]);
    assert_eq!(sees(&mut world, Initialised), [Connected]);
    // This one does not wait for the answers in flight.
    world.write(Closed);
    world.look();
    world.write(Initialising);
    world.look();
    assert_eq!(world.view.ours, Closing);
    world.settle();
    assert_eq!(world.view.ours, InitWait);
}

#[test]
fn destroyed_in_each_state() {
    for theirs in XenbusState::ALL {
        for online in OnlineWish::ALL {
            let mut world = connected();
            sees(&mut world, theirs);
            world.set_online(online);
            world.write(Unknown);
            world.settle();
            assert!(world.left, "{theirs:?}");
            assert!(!world.view.disk, "{theirs:?}");
        }
    }
    let mut early = DeviceWorld::new();
    early.write(Unknown);
    early.settle();
    assert!(early.left);
}

#[test]
fn destroyed_while_it_drains() {
    let mut world = connected();
    world.write(Closed);
    world.look();
    world.write(Unknown);
    world.look();
    assert!(!world.left, "left with I/O in flight");
    world.drained();
    world.look();
    assert!(world.left);
}

#[test]
fn bad_keys_then_good_ones() {
    for closes in [false, true] {
        let mut world = DeviceWorld::new();
        world.disk_comes();
        world.settle();
        world.good_keys = false;
        assert_eq!(sees(&mut world, Initialised), [Closing]);
        for _ in 0..10 {
            world.settle();
        }
        assert_eq!(world.attempts, 1, "read again without a reason");
        world.good_keys = true;
        if closes {
            assert_eq!(sees(&mut world, Closing), []);
            assert_eq!(sees(&mut world, Closed), [Closed]);
            assert_eq!(sees(&mut world, Initialising), [InitWait]);
        }
        assert_eq!(sees(&mut world, Initialised), [Connected]);
    }
}

#[test]
fn a_frontend_that_waits_out_a_shortage_sees_nothing_but_connected() {
    let mut world = DeviceWorld::new();
    world.settle();
    world.disk_comes();
    world.is_short = true;
    assert_eq!(sees(&mut world, Initialised), []);
    for _ in 0..3 {
        let before = world.attempts;
        // The pause is over.
        world.settle();
        assert!(world.attempts > before, "not tried again");
    }
    world.is_short = false;
    world.settle();
    assert_eq!(world.published, [InitWait, Connected]);
}

#[test]
fn a_frontend_may_give_up_during_a_shortage() {
    let mut world = DeviceWorld::new();
    world.disk_comes();
    world.is_short = true;
    assert_eq!(sees(&mut world, Initialised), [InitWait]);
    assert_eq!(sees(&mut world, Closing), [Closing]);
    assert_eq!(sees(&mut world, Closed), [Closed]);
    let attempts = world.attempts;
    world.settle();
    assert_eq!(world.attempts, attempts, "tried without a frontend");
    assert_eq!(sees(&mut world, Initialising), [InitWait]);
    world.is_short = false;
    assert_eq!(sees(&mut world, Initialised), [Connected]);
}

#[test]
fn a_device_that_waits_out_a_shortage_can_be_taken_away() {
    let mut world = DeviceWorld::new();
    world.disk_comes();
    world.is_short = true;
    sees(&mut world, Initialised);
    world.detach();
    world.settle();
    world.check_rest();
    assert_eq!(world.published, [InitWait, Closing]);
    assert_eq!(sees(&mut world, Closed), [Closed]);
    assert!(world.left);
}

#[test]
fn details_written_again_while_connected_are_ignored() {
    let mut world = connected();
    for state in [Initialised, Connected, Initialised] {
        assert_eq!(sees(&mut world, state), []);
    }
    assert_eq!(world.attempts, 1);
}

#[test]
fn impossible_states_close_and_are_reported_once() {
    for state in [InitWait, Reconfiguring, Reconfigured] {
        let mut world = connected();
        assert_eq!(sees(&mut world, state), [Closing]);
        for _ in 0..10 {
            assert_eq!(sees(&mut world, state), []);
        }
        assert_eq!(world.reports, 1);
        assert_eq!(sees(&mut world, Connected), [Connected], "reconnects");
    }
}

#[test]
fn toggling_costs_a_bounded_number_of_steps() {
    let mut world = connected();
    let mut steps = 0;
    for round in 0..2000 {
        // Every state in every order of pairs; Unknown is a destroy and ends the device.
        let state = XenbusState::ALL[1 + (round * 7 + round / 8) % 8];
        world.write(state);
        steps += world.look();
        if round % 3 == 0 {
            world.drained();
        }
    }
    assert!(steps <= 4 * 2000, "{steps} steps");
    world.settle();
    sees(&mut world, Connected);
    assert_eq!(world.view.ours, Connected);
    assert_eq!(world.view.rings, Rings::Served);
}

#[test]
fn a_device_without_online_connects_and_leaves_when_it_is_closed() {
    let mut world = DeviceWorld::new();
    world.set_online(OnlineWish::Unsaid);
    world.disk_comes();
    world.settle();
    assert_eq!(sees(&mut world, Initialised), [Connected]);
    assert_eq!(world.view.rings, Rings::Served);
    sees(&mut world, Closing);
    sees(&mut world, Closed);
    assert!(world.left);
}
