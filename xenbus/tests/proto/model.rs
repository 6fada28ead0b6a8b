// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The state machine in every situation that can arise, and in those that cannot.

use crate::machine::DeviceWorld;
use std::collections::HashSet;
use xenbus::proto::state::{
    ending, step, step_asking, Action, Ending, OnlineWish, Rings, View, XenbusState,
};

const BOTH: [bool; 2] = [false, true];
const RINGS: [Rings; 3] = [Rings::None, Rings::Served, Rings::Draining];

fn every_view() -> Vec<View> {
    let mut views = Vec::new();
    for ours in XenbusState::ALL {
        for theirs in XenbusState::ALL {
            for rings in RINGS {
                for online in OnlineWish::ALL {
                    for bits in 0..8 {
                        views.push(View {
                            ours,
                            theirs,
                            online,
                            disk: bits & 1 != 0,
                            ready: bits & 2 != 0,
                            rings,
                            refused: bits & 4 != 0,
                        });
                    }
                }
            }
        }
    }
    views
}

/// Does what the machine says without asking whether it may.
fn obey(view: &mut View, connects: bool) -> bool {
    match step(view) {
        Action::Wait | Action::Leave => return false,
        Action::Offer => view.ours = XenbusState::InitWait,
        Action::Connect if connects => {
            view.ours = XenbusState::Connected;
            view.rings = Rings::Served;
        }
        Action::Connect => {
            view.ours = XenbusState::Closing;
            view.refused = true;
        }
        Action::StartClosing | Action::Refuse => view.ours = XenbusState::Closing,
        Action::Disconnect => view.rings = Rings::Draining,
        Action::Close => view.ours = XenbusState::Closed,
    }
    true
}

#[test]
fn every_view_comes_to_rest() {
    let mut longest = 0;
    for start in every_view() {
        for connects in BOTH {
            let mut view = start;
            let mut steps = 0;
            loop {
                while obey(&mut view, connects) {
                    steps += 1;
                    assert!(steps <= 8, "no rest from {start:?}: now {view:?}");
                }
                if view.rings != Rings::Draining {
                    break;
                }
                view.rings = Rings::None;
            }
            longest = longest.max(steps);
        }
    }
    // A frontend that starts again while it is served: close, disconnect, close, offer. One more
    // from views that cannot arise.
    assert!((4..=5).contains(&longest), "{longest} steps");
}

#[test]
fn a_frontend_that_wants_to_be_connected_is_served() {
    for start in every_view() {
        let wants = matches!(
            start.theirs,
            XenbusState::Initialised | XenbusState::Connected
        );
        if wants && start.disk && start.ready && !start.refused && start.online != OnlineWish::No {
            let mut view = start;
            for _ in 0..8 {
                obey(&mut view, true);
                if view.rings == Rings::Draining {
                    view.rings = Rings::None;
                }
            }
            assert_eq!(view.ours, XenbusState::Connected, "{start:?}");
            assert_eq!(view.rings, Rings::Served, "{start:?}");
        }
    }
}

#[test]
fn a_device_that_is_taken_away_is_not_connected_but_closed() {
    for start in every_view() {
        let wants = matches!(
            start.theirs,
            XenbusState::Initialised | XenbusState::Connected
        );
        if wants && start.online == OnlineWish::No && start.rings == Rings::None {
            let mut view = start;
            for _ in 0..8 {
                assert_ne!(step(&view), Action::Connect, "{start:?}");
                obey(&mut view, true);
            }
            assert!(
                matches!(view.ours, XenbusState::Closing | XenbusState::Closed),
                "{start:?} comes to {view:?}"
            );
        }
    }
}

#[test]
fn asking_for_online_only_where_it_matters_changes_nothing() {
    let mut asked = 0;
    for view in every_view() {
        let answer = || {
            asked += 1;
            Ok::<_, ()>(view.online)
        };
        assert_eq!(step_asking(view, answer), Ok(step(&view)), "{view:?}");
    }
    assert!(0 < asked && asked < every_view().len() / 4, "asked {asked}");
}

#[test]
fn a_device_at_work_is_not_asked_about() {
    for view in every_view() {
        if view.ours == XenbusState::Connected && view.rings == Rings::Served {
            let asked = step_asking(view, || Err(()));
            assert!(asked.is_ok(), "asked, at {view:?}");
        }
    }
}

#[test]
fn nothing_is_done_while_rings_drain() {
    for view in every_view() {
        if view.rings == Rings::Draining {
            assert_eq!(step(&view), Action::Wait, "{view:?}");
        }
    }
}

#[test]
fn served_rings_are_never_left_nor_mapped_again() {
    for view in every_view() {
        if view.rings == Rings::Served {
            let action = step(&view);
            let bad = [Action::Leave, Action::Close, Action::Connect];
            assert!(!bad.contains(&action), "{view:?}: {action:?}");
        }
    }
}

/// Everything that can happen next, one thing at a time: a step of the driver, a write of the
/// frontend or of the toolstack, the end of draining.
fn successors(world: &DeviceWorld) -> Vec<DeviceWorld> {
    let mut next = Vec::new();
    let mut after = |change: &dyn Fn(&mut DeviceWorld)| {
        let mut copy = world.clone();
        change(&mut copy);
        next.push(copy);
    };
    after(&|world| {
        world.one_step();
    });
    for state in XenbusState::ALL {
        after(&|world| world.write(state));
    }
    for online in OnlineWish::ALL {
        after(&|world| world.set_online(online));
    }
    for on in BOTH {
        after(&|world| world.set_ready(on));
        after(&|world| world.good_keys = on);
        after(&|world| world.is_short = on);
    }
    after(&DeviceWorld::disk_comes);
    after(&DeviceWorld::disk_is_bad);
    after(&DeviceWorld::drained);
    next
}

fn key(world: &DeviceWorld) -> (u32, u32, OnlineWish, [bool; 6], u8) {
    let view = &world.view;
    let rings = match view.rings {
        Rings::None => 0,
        Rings::Served => 1,
        Rings::Draining => 2,
    };
    let flags = [
        view.disk,
        view.ready,
        view.refused,
        world.good_keys,
        world.is_short,
        world.left,
    ];
    (
        view.ours.number(),
        view.theirs.number(),
        view.online,
        flags,
        rings,
    )
}

/// Visits every situation that any order of events can lead to, also in the middle of the driver's
/// work, and lets the driver come to rest from each.
#[test]
fn every_order_of_events_is_safe_and_forgotten() {
    let mut seen = HashSet::new();
    let mut open = vec![DeviceWorld::new()];
    while let Some(world) = open.pop() {
        world.check();
        let mut rest = world.clone();
        rest.settle();
        rest.check_rest();
        for mut next in successors(&world) {
            if seen.insert(key(&next)) {
                next.published.clear();
                open.push(next);
            }
        }
    }
    // A model that stands still would pass as well.
    assert!(seen.len() > 400, "only {} situations", seen.len());
}

#[test]
fn numbers_that_are_no_state_are_unknown() {
    for state in XenbusState::ALL {
        assert_eq!(XenbusState::from_number(state.number()), state);
    }
    for number in [9, 10, 255, 256, u32::MAX] {
        assert_eq!(XenbusState::from_number(number), XenbusState::Unknown);
    }
}

/// For every view of a device whose rings are served: a frontend that could continue with them is not left before it
/// has all answers, and no backend waits for one that is gone.
#[test]
fn rings_are_given_back_early_only_where_nobody_goes_on_with_them() {
    for theirs in XenbusState::ALL {
        let goes_on = every_view().into_iter().any(|view| {
            let again = View {
                theirs,
                rings: Rings::None,
                ..view
            };
            theirs == XenbusState::Closing || step(&again) == Action::Connect
        });
        for unbound in BOTH {
            let how = ending(theirs, unbound);
            assert_eq!(
                how == Ending::Answered,
                goes_on,
                "{theirs:?}, unbound: {unbound}"
            );
            if !goes_on {
                assert_eq!(how == Ending::Now, unbound, "{theirs:?}");
            }
        }
    }
}
