// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases of hosts whose daemons say what a test likes.

use super::fake::{LockspaceStorage, SanlockNode};
use super::slept;
use crate::{now, HolderIsDead, Lease, LeaseClaim, LeaseRenewer, LeaseView, RenewerNews};
use control::{Code, LeaseKind, SanlockResource};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

fn resource() -> SanlockResource {
    match "sanlock:vms:a:/srv/leases:1048576".parse() {
        Ok(LeaseKind::Sanlock(resource)) => *resource,
        other => panic!("{other:?}"),
    }
}

fn lease(node: &SanlockNode) -> Box<dyn Lease> {
    let mut claim = LeaseClaim::new("a disk").unwrap();
    claim.host.name = "here".into();
    node.lease(&resource(), Path::new("/dev/sdx"), claim)
}

/// Two hosts of a lockspace.
fn hosts() -> (
    tempfile::TempDir,
    LockspaceStorage,
    SanlockNode,
    SanlockNode,
) {
    let dir = tempfile::tempdir().unwrap();
    let storage = LockspaceStorage::default();
    let [a, b] = [1, 2].map(|number| storage.node(dir.path(), number).unwrap());
    (dir, storage, a, b)
}

#[test]
fn one_host_has_it_and_the_other_gets_it_afterwards() {
    let (_dir, storage, alpha, beta) = hosts();
    let (mut a, mut b) = (lease(&alpha), lease(&beta));
    assert!(matches!(
        a.inspect().unwrap(),
        LeaseView::Free { generation: 0, .. }
    ));
    let grant = a.take(Duration::ZERO).unwrap();
    assert_eq!(grant.generation, 1);
    // No process has it, and the host does not leave its lockspace with it.
    assert_eq!(alpha.stays(&resource()), Some(true));
    let refused = b.take(Duration::ZERO).unwrap_err();
    assert_eq!(refused.code, Code::Busy);
    for word in [
        "/dev/sdx",
        "host alpha (host 1 of the lockspace vms, which is live, since 2",
        "watchdog",
    ] {
        assert!(refused.message.contains(word), "{refused}");
    }
    let LeaseView::Held(holder) = b.inspect().unwrap() else {
        panic!("it is held");
    };
    let owner = holder.sanlock.unwrap();
    assert_eq!(
        (owner.host_id, owner.generation, &owner.state[..]),
        (1, 1, "live")
    );
    assert!(!holder.is_here && holder.since_ms > 0 && holder.host == "alpha");
    assert!(
        matches!(a.inspect().unwrap(), LeaseView::Held(holder) if holder.is_here && holder.host == "here")
    );
    a.keep().unwrap();
    a.give_up().unwrap();
    assert!(grant.term.is_over());
    assert_eq!(a.keep().unwrap_err().code, Code::Gone);
    assert_eq!(storage.owner(&resource()), None);
    assert_eq!(b.take(Duration::ZERO).unwrap().generation, 2);
    assert_eq!(storage.owner(&resource()), Some(2));
}

#[test]
fn the_end_of_who_took_it_changes_nothing_and_the_next_goes_on() {
    let (_dir, storage, alpha, _) = hosts();
    let first = lease(&alpha).take(Duration::ZERO).unwrap();
    assert_eq!(storage.owner(&resource()), Some(1));
    for generation in [0, first.generation] {
        let next = lease(&alpha).resume(generation).unwrap();
        assert_eq!(next.generation, first.generation);
        assert!(!next.term.is_over());
    }
    assert_eq!(lease(&alpha).resume(7).unwrap_err().code, Code::Gone);
    // One that was taken, and never written down.
    let again = lease(&alpha).take(Duration::ZERO).unwrap();
    assert_eq!(again.generation, first.generation);
    let mut last = lease(&alpha);
    last.resume(0).unwrap();
    last.give_up().unwrap();
    let gone = lease(&alpha).resume(0).unwrap_err();
    assert_eq!(gone.code, Code::Gone);
    assert!(gone.message.contains("has it no longer"), "{gone}");
}

#[test]
fn a_term_ends_when_sanlock_warns() {
    let (_dir, _, alpha, _) = hosts();
    let mut a = lease(&alpha);
    let begun = now();
    let term = a.take(Duration::ZERO).unwrap().term;
    let most = Duration::from_secs(60);
    assert!(term.until() > begun + most - Duration::from_secs(2) && term.until() <= now() + most);
    alpha.change(|told| told.age = 58);
    a.keep().unwrap();
    assert!(term.until() <= now() + Duration::from_secs(2));
    // It is not lost before sanlock says so, which may be a moment late.
    alpha.change(|told| told.age = 79);
    a.keep().unwrap();
    assert!(term.is_over());
    alpha.change(|told| told.age = 1);
    a.keep().unwrap();
    assert!(!term.is_over());
}

#[test]
fn what_is_lost_is_let_go_of_when_its_writer_has_ended() {
    let (_dir, storage, alpha, beta) = hosts();
    let mut a = lease(&alpha);
    let grant = a.take(Duration::ZERO).unwrap();
    let (sender, news) = channel();
    alpha.change(|told| told.is_ending = true);
    let keeper = LeaseRenewer::start(a, &grant, move |told| sender.send(told).unwrap()).unwrap();
    let Ok(RenewerNews::Lost(lost)) = news.recv() else {
        panic!("it is lost");
    };
    for word in [
        "vms:a:/srv/leases",
        "is lost",
        "not renewed its number",
        "tap-ctl unpause",
    ] {
        assert!(lost.message.contains(word), "{lost}");
    }
    assert!(grant.term.is_over());
    assert_eq!(keeper.give_up().unwrap_err().code, Code::Gone);
    // Its I/O may be under way: the host stays in the lockspace, or the watchdog resets it.
    assert!(!alpha.rejoin());
    assert_eq!(
        lease(&alpha).take(Duration::ZERO).unwrap_err().code,
        Code::State
    );
    assert_eq!(lease(&alpha).resume(0).unwrap_err().code, Code::Gone);
    assert!(!alpha.rejoin());
    let mut next = lease(&alpha);
    next.settle().unwrap();
    next.settle().unwrap();
    assert!(alpha.rejoin());
    // It is on storage yet, as of a host that has gone.
    assert_eq!(storage.owner(&resource()), Some(1));
    assert_eq!(lease(&alpha).resume(0).unwrap_err().code, Code::Gone);
    lease(&alpha).take(Duration::ZERO).unwrap();
    // A lease that is not lost is not given up.
    lease(&alpha).settle().unwrap();
    assert_eq!(
        lease(&beta).take(Duration::ZERO).unwrap_err().code,
        Code::Busy
    );
    assert_eq!(alpha.stays(&resource()), Some(true));
}

#[test]
fn who_gives_up_what_is_lost_is_told_so_and_lets_go() {
    let (_dir, _, alpha, _) = hosts();
    let mut a = lease(&alpha);
    a.take(Duration::ZERO).unwrap();
    alpha.change(|told| told.is_ending = true);
    assert_eq!(a.give_up().unwrap_err().code, Code::Gone);
    assert!(alpha.rejoin());
}

#[test]
fn a_host_that_has_joined_anew_or_slept_has_lost_it() {
    let (_dir, _, alpha, _) = hosts();
    let mut a = lease(&alpha);
    a.take(Duration::ZERO).unwrap();
    alpha.change(|told| told.generation += 1);
    let lost = a.keep().unwrap_err();
    assert_eq!(lost.code, Code::Gone);
    assert!(lost.message.contains("joined the lockspace"), "{lost}");
    // The daemon does not know of a sleep, so a host that resumes asks the storage.
    alpha.change(|told| told.generation -= 1);
    a.resume(0).unwrap();
    alpha.is_robbed(&resource(), 2);
    for lost in [
        lease(&alpha).resume(0).unwrap_err(),
        lease(&alpha).take(Duration::ZERO).unwrap_err(),
    ] {
        assert_eq!(lost.code, Code::Gone);
        assert!(lost.message.contains("on storage"), "{lost}");
    }
}

#[test]
fn a_heartbeat_after_a_sleep_asks_the_storage() {
    let (dir, _, alpha, _) = hosts();
    let claim = LeaseClaim::new("a disk").unwrap();
    let socket = dir.path().join("sanlock-1.sock");
    let daemon = super::Daemon { socket };
    let mut a = super::Sanlock::new(&resource(), Path::new("/dev/sdx"), claim, daemon);
    a.take(Duration::ZERO).unwrap();
    alpha.is_robbed(&resource(), 2);
    a.keep().unwrap();
    // It was awake for longer than the host was, as if that had slept since.
    let got = a.got.as_mut().unwrap();
    got.slept = slept() + Duration::from_secs(3600);
    a.keep().unwrap();
    let Some(early) = slept().checked_sub(Duration::from_secs(2)) else {
        // This host has not slept, so a sleep would begin before its boot: the test calls the check itself.
        let got = a.got.unwrap();
        assert!(!a.is_owner(&got).unwrap());
        return;
    };
    a.got.as_mut().unwrap().slept = early;
    assert_eq!(a.keep().unwrap_err().code, Code::Gone);
}

#[test]
fn a_daemon_that_does_not_answer_is_no_loss() {
    let (dir, _, alpha, _) = hosts();
    let mut a = lease(&alpha);
    let grant = a.take(Duration::ZERO).unwrap();
    for babble in [
        &b""[..],
        b"HTTP/1.1 400 Bad Request\r\n\r\n and more of that",
        &[0; 4096],
    ] {
        alpha.change(|told| told.babble = Some(babble.to_vec()));
        let missed = a.keep().unwrap_err();
        assert!(
            matches!(missed.code, Code::System | Code::Unsupported),
            "{missed:?}"
        );
        assert!(missed.message.contains("sanlock"), "{missed}");
        assert!(!grant.term.is_over());
    }
    alpha.change(|told| told.babble = None);
    a.keep().unwrap();
    std::fs::remove_file(dir.path().join("sanlock-1.sock")).unwrap();
    let missed = a.keep().unwrap_err();
    assert_eq!(missed.code, Code::System);
    for word in ["sanlock does not run", "sanlock-1.sock", "systemctl start"] {
        assert!(missed.message.contains(word), "{missed}");
    }
    assert!(!grant.term.is_over());
}

#[test]
fn where_nothing_can_be_taken_it_is_said_why_and_what_to_do() {
    let (_dir, _, alpha, _) = hosts();
    let refused = || lease(&alpha).take(Duration::ZERO).unwrap_err();
    let clean = |told: &mut super::fake::DaemonInfo| {
        (told.list, told.io_timeout, told.has_watchdog, told.refusal) = ("spaces", 10, true, None);
    };
    type How = fn(&mut super::fake::DaemonInfo);
    let states: [(How, &str); 4] = [
        (|told| told.list = "", "add_lockspace -s vms"),
        (|told| told.list = "add", "is joining"),
        (|told| told.io_timeout = 1, "I/O timeout of 1 s"),
        (|told| told.has_watchdog = false, "use_watchdog = 1"),
    ];
    for (how, word) in states {
        alpha.change(how);
        let failure = refused();
        assert_eq!(failure.code, Code::State);
        assert!(failure.message.contains(word), "{failure}");
        alpha.change(clean);
    }
    for (code, kind, word) in [
        (
            -223,
            Code::Image,
            "sanlock direct init -r vms:a:/srv/leases:1048576",
        ),
        (-226, Code::Image, "another lockspace"),
        (-227, Code::Image, "another resource"),
        (-229, Code::Image, "damaged"),
        (-202, Code::Timeout, "does not answer"),
        (-2, Code::NotFound, "no /srv/leases"),
        (-13, Code::Denied, "chown sanlock:sanlock"),
        (-28, Code::State, "leaving the lockspace"),
        (-17, Code::Busy, "another program of this host"),
        (-11, Code::Busy, "try again"),
        (-999, Code::System, "-999"),
    ] {
        alpha.change(|told| told.refusal = Some(code));
        let failure = refused();
        assert_eq!(failure.code, kind, "{failure}");
        assert!(failure.message.contains(word), "{failure}");
        alpha.change(clean);
    }
    // Nothing was taken by all that.
    assert_eq!(alpha.stays(&resource()), Some(false));
    lease(&alpha).take(Duration::ZERO).unwrap();
}

#[test]
fn nobody_but_sanlock_breaks_it() {
    let (_dir, storage, alpha, beta) = hosts();
    let confirmed = HolderIsDead { generation: 1 };
    assert_eq!(lease(&beta).break_off(confirmed).unwrap(), None);
    lease(&alpha).take(Duration::ZERO).unwrap();
    for (node, word) in [
        (&beta, "as soon as the watchdog"),
        (&alpha, "destroy its disk"),
    ] {
        let refused = lease(node).break_off(confirmed).unwrap_err();
        assert_eq!(refused.code, Code::Busy);
        for word in ["sanlock alone decides", word] {
            assert!(refused.message.contains(word), "{refused}");
        }
    }
    assert_eq!(storage.owner(&resource()), Some(1));
}
