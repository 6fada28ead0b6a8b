// SPDX-License-Identifier: MIT OR Apache-2.0
//! After any failure, and any end: each disk has a driver, no guest stays paused, and no driver gets a ring on which
//! something is half done.

mod fake;
mod module_exchange;

use fake::{device, FakeHost, HostFault};
use takeover::{retire, BackendDriver, RetiredDriver};

fn both(test: impl Fn(BackendDriver)) {
    BackendDriver::ALL.into_iter().for_each(test);
}

#[test]
fn all_disks_go_to_the_other_driver_which_alone_stays() {
    both(|to| {
        let fake = FakeHost::new(to.other());
        let outcomes = fake.run(to).unwrap();
        assert_eq!(outcomes.len(), 2);
        assert!(
            outcomes.iter().all(|outcome| outcome.left.is_empty()),
            "{outcomes:?}"
        );
        assert_eq!(fake.served_by(to), 4);
        fake.assert_sound("after all");
        // Another program still uses it.
        fake.fault.set(Some((fake.calls.get(), HostFault::Before)));
        let retired = retire(&fake, fake.plan(to)).unwrap();
        assert!(matches!(retired, RetiredDriver::Stays(_)), "{retired:?}");
        let retired = retire(&fake, fake.plan(to)).unwrap();
        assert!(matches!(retired, RetiredDriver::Unloaded), "{retired:?}");
        assert_eq!(*fake.loaded.borrow(), [to]);
    });
}

#[test]
fn storage_that_does_not_answer_keeps_its_disk_where_it_is() {
    both(|to| {
        let fake = FakeHost::new(to.other());
        fake.vbds
            .borrow_mut()
            .get_mut(&device(1, 51728))
            .unwrap()
            .hangs = true;
        let outcomes = fake.run(to).unwrap();
        assert_eq!((outcomes[0].moved.len(), outcomes[0].left.len()), (1, 1));
        assert!(
            outcomes[0].left[0].why.contains("are not answered"),
            "{outcomes:?}"
        );
        assert_eq!(fake.served_by(to), 3);
        fake.assert_sound("after all");
        let retired = retire(&fake, fake.plan(to)).unwrap();
        assert!(matches!(retired, RetiredDriver::Serves), "{retired:?}");
        assert_eq!(fake.loaded.borrow().len(), 2);
    });
}

#[test]
fn a_driver_that_takes_less_than_the_guest_may_send_gives_them_back() {
    both(|to| {
        let fake = FakeHost::new(to.other());
        fake.is_small.set(Some(to));
        let outcomes = fake.run(to).unwrap();
        assert_eq!(fake.served_by(to), 1, "the one that is not connected");
        let left = &outcomes[0].left[0].why;
        assert!(left.contains("256 indirect segments"), "{left}");
        fake.assert_sound("after all");
    });
}

#[test]
fn a_guest_that_is_destroyed_meanwhile_leaves_nothing_to_do() {
    both(|to| {
        let fake = FakeHost::new(to.other());
        fake.vanishes.set(true);
        let outcomes = fake.run(to).unwrap();
        assert!(outcomes[0].moved.is_empty() && outcomes[0].left.len() >= 2);
        assert_eq!(fake.vbds.borrow().len(), 0, "{outcomes:?}");
        fake.run(to).unwrap();
        fake.assert_sound("asked again");
    });
}

#[test]
fn a_driver_that_refuses_gives_them_back() {
    both(|to| {
        let fake = FakeHost::new(to.other());
        fake.refuses.set(Some(to));
        let outcomes = fake.run(to).unwrap();
        assert_eq!(fake.served_by(to), 1, "the one that is not connected");
        assert!(outcomes.iter().any(|outcome| outcome.left.len() == 2));
        fake.assert_sound("after all");
    });
}

#[test]
fn what_is_not_safe_is_refused_by_its_reason() {
    let refused = |to: BackendDriver, prepare: fn(&FakeHost), words: &str| {
        let fake = FakeHost::new(to.other());
        prepare(&fake);
        let outcomes = fake.run(to).unwrap();
        let left: Vec<_> = outcomes.iter().flat_map(|outcome| &outcome.left).collect();
        assert!(
            left.len() == 1 && left[0].why.contains(words),
            "{words}: {left:?}"
        );
        // The names of the fake's disks have the number behind that.
        assert!(left[0].disk.starts_with("xvd"), "{words}: {left:?}");
        assert_eq!(*fake.wrong.borrow(), [""; 0]);
    };
    refused(
        BackendDriver::C,
        |fake| fake.set(&device(1, 51712).back("tap-minor"), "3"),
        "tap disk",
    );
    both(|to| {
        refused(
            to,
            |fake| fake.set(&device(1, 51712).back("online"), "0"),
            "detached",
        );
        refused(
            to,
            |fake| fake.set("/local/domain/1/device/vbd/51712/ring-page-order", "9"),
            "takes 4",
        );
        refused(
            to,
            |fake| {
                fake.set(
                    "/local/domain/1/device/vbd/51728/multi-queue-num-queues",
                    "4000000000",
                )
            },
            "takes 4",
        );
        refused(
            to,
            |fake| fake.set("/local/domain/1/device/vbd/51712/state", "pear"),
            "no number",
        );
        refused(
            to,
            |fake| fake.set("/local/domain/1/device/vbd/51712/ring-ref", "pear"),
            "names no ring",
        );
        refused(
            to,
            |fake| {
                let from = fake.loaded.borrow()[0];
                fake.add(from, 0, 51712, 1);
            },
            "domain 0",
        );
    });
}

#[test]
fn whatever_fails_each_disk_has_a_driver_and_no_guest_is_paused() {
    both(|to| {
        let calls = {
            let fake = FakeHost::new(to.other());
            fake.run(to).unwrap();
            fake.calls.get()
        };
        assert!(calls > 20, "{calls}");
        for at in 0..calls + 5 {
            for fault in [HostFault::Before, HostFault::After, HostFault::Killed] {
                let when = format!("to {to:?}, {fault:?} at {at}");
                let fake = FakeHost::new(to.other());
                fake.fault.set(Some((at, fault)));
                let first = fake.run(to);
                let is_finished = first
                    .as_ref()
                    .is_ok_and(|outcomes| outcomes.iter().all(|outcome| !outcome.is_unfinished));
                if !fake.is_dead.get() && is_finished && fake.begun.borrow().is_none() {
                    fake.assert_sound(&when);
                }
                // The next one puts right what is left.
                fake.is_dead.set(false);
                fake.fault.set(None);
                fake.only_says(to, &when);
                let second = fake.run(to);
                let second = second.unwrap_or_else(|error| panic!("{when}: {error}"));
                assert!(
                    second.iter().all(|outcome| outcome.left.is_empty()),
                    "{when}: {second:?}"
                );
                fake.assert_sound(&when);
                assert_eq!(fake.served_by(to), 4, "{when}");
            }
        }
    });
}
