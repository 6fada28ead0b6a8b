// SPDX-License-Identifier: MIT OR Apache-2.0
//! The module is exchanged below all disks, or none.

use super::fake::{assert_documented, device, FakeHost, HostFault, Version};
use std::io;
use std::time::Duration;
use takeover::{exchange, BackendDriver, Exchange, ExchangeResult};

const PLAN: Exchange = Exchange {
    patience: Duration::from_millis(300),
    again: false,
    no_way_back: false,
    dry_run: false,
};

/// Another module is installed than the one that is loaded, of which there is a copy.
fn upgraded() -> FakeHost {
    let fake = FakeHost::new(BackendDriver::Rs);
    fake.installed.set(Version::New);
    fake.has_copy.set(true);
    fake.set(&device(2, 51712).back("tap-minor"), "3");
    fake.has_taps.set(true);
    fake.nodes.set(true);
    fake
}

fn run(fake: &FakeHost) -> io::Result<ExchangeResult> {
    let result = exchange(fake, PLAN)?;
    assert_documented("exchange", &result);
    Ok(result)
}

#[test]
fn the_installed_module_serves_all_disks() {
    let fake = upgraded();
    fake.newcomer.set(true);
    let outcome = run(&fake).unwrap();
    assert!(outcome.is_done && outcome.why.is_none(), "{outcome:?}");
    assert_eq!(outcome.disks.len(), 4);
    assert_eq!(fake.version.get(), Version::New);
    assert_eq!(
        fake.served_by(BackendDriver::Rs),
        5,
        "and one that came meanwhile"
    );
    fake.assert_sound("after it");
    // There is nothing more to do, unless a new exchange is requested.
    let calls = fake.calls.get();
    let outcome = run(&fake).unwrap();
    assert!(
        outcome.is_done && outcome.paused_ms.is_none(),
        "{outcome:?}"
    );
    assert_eq!(fake.calls.get(), calls);
    let again = Exchange {
        again: true,
        ..PLAN
    };
    assert!(exchange(&fake, again).unwrap().is_done);
    assert!(fake.calls.get() > calls);
    fake.assert_sound("again");
}

#[test]
fn without_a_way_back_nothing_is_begun() {
    let fake = upgraded();
    fake.has_copy.set(false);
    let outcome = run(&fake).unwrap();
    assert!(!outcome.is_done && outcome.is_as_before, "{outcome:?}");
    assert!(outcome.why.unwrap().contains("no way back"));
    assert_eq!(fake.calls.get(), 0);
    let all_the_same = Exchange {
        no_way_back: true,
        ..PLAN
    };
    assert!(exchange(&fake, all_the_same).unwrap().is_done);
    fake.assert_sound("all the same");
}

#[test]
fn a_module_that_cannot_be_loaded_gives_way_to_the_one_before() {
    let fake = upgraded();
    fake.unloadable.set(Some(Version::New));
    let outcome = run(&fake).unwrap();
    assert!(!outcome.is_done && outcome.is_as_before, "{outcome:?}");
    assert!(outcome.why.unwrap().contains("invalid module format"));
    assert_eq!(
        (fake.version.get(), fake.served_by(BackendDriver::Rs)),
        (Version::Old, 4)
    );
    fake.assert_sound("after it");
}

#[test]
fn a_module_that_serves_less_gives_way_to_the_one_before() {
    let fake = upgraded();
    fake.weak.set(Some(Version::New));
    let outcome = run(&fake).unwrap();
    assert!(!outcome.is_done && outcome.is_as_before, "{outcome:?}");
    assert!(outcome.why.unwrap().contains("256 indirect segments"));
    assert_eq!(
        (fake.version.get(), fake.served_by(BackendDriver::Rs)),
        (Version::Old, 4)
    );
    fake.assert_sound("after it");
}

#[test]
fn one_disk_that_must_stay_keeps_the_module() {
    let refused = |prepare: fn(&FakeHost), words: &str| {
        let fake = upgraded();
        prepare(&fake);
        let outcome = run(&fake).unwrap();
        let why = outcome
            .why
            .iter()
            .chain(outcome.left.iter().map(|left| &left.why));
        let why: Vec<_> = why.collect();
        assert!(!outcome.is_done && outcome.is_as_before, "{outcome:?}");
        assert!(why.len() == 1 && why[0].contains(words), "{words}: {why:?}");
        assert_eq!(fake.version.get(), Version::Old);
        assert_eq!(*fake.wrong.borrow(), [""; 0]);
        assert!(fake.paused.borrow().values().all(|count| *count == 0));
    };
    let hangs = |fake: &FakeHost| {
        fake.vbds
            .borrow_mut()
            .get_mut(&device(1, 51728))
            .unwrap()
            .hangs = true;
    };
    refused(hangs, "are not answered");
    refused(
        |fake| fake.set(&device(1, 51712).back("online"), "0"),
        "detached",
    );
    refused(|fake| fake.add(BackendDriver::Rs, 0, 51712, 1), "domain 0");
    // No guest is paused for a supervisor that cannot do its part.
    let fake = upgraded();
    fake.is_silent.set(true);
    assert!(run(&fake)
        .unwrap_err()
        .to_string()
        .contains("does not answer"));
    assert_eq!(fake.calls.get(), 0);
}

#[test]
fn whatever_fails_a_module_serves_all_and_no_guest_is_paused() {
    let calls = {
        let fake = upgraded();
        run(&fake).unwrap();
        fake.calls.get()
    };
    assert!(calls > 25, "{calls}");
    for broken in [None, Some(Version::New)] {
        for at in 0..calls + 8 {
            for fault in [HostFault::Before, HostFault::After, HostFault::Killed] {
                let when = format!("{broken:?} cannot be loaded, {fault:?} at {at}");
                let fake = upgraded();
                fake.unloadable.set(broken);
                fake.fault.set(Some((at, fault)));
                let first = run(&fake);
                if let Ok(outcome) = &first {
                    let is_told = |why: &String| why.contains("ask again");
                    let is_settled = outcome.is_done || outcome.is_as_before;
                    if is_settled {
                        fake.assert_sound(&when);
                    }
                    assert!(
                        is_settled
                            || !outcome.left.is_empty()
                            || outcome.why.as_ref().is_some_and(is_told),
                        "{when}: {outcome:?}"
                    );
                }
                // The next one puts right what is left.
                fake.is_dead.set(false);
                fake.fault.set(None);
                let second = run(&fake).unwrap_or_else(|error| panic!("{when}: {error}"));
                fake.assert_sound(&when);
                assert_eq!(fake.served_by(BackendDriver::Rs), 4, "{when}: {second:?}");
                let wanted = if broken.is_some() {
                    Version::Old
                } else {
                    Version::New
                };
                assert_eq!(fake.version.get(), wanted, "{when}: {second:?}");
            }
        }
    }
}
