// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases of a storage with reservations.

use super::fake::ScsiTarget;
use super::key::ReservationKey;
use crate::{HolderIsDead, Lease, LeaseClaim, LeaseRenewer, LeaseView, RenewerNews};
use control::Code;
use diskio::reservation::{ReservationKind, StorageAnswer};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

fn claim(name: &str, machine: u8, boot: u8) -> LeaseClaim {
    let mut claim = LeaseClaim::new("a disk").unwrap();
    claim.host.name = name.into();
    claim.host.machine = [machine; 16];
    claim.host.boot = [boot; 16];
    claim
}

fn lease(target: &ScsiTarget, initiator: u8, claim: LeaseClaim) -> Box<dyn Lease> {
    target.lease(initiator, Path::new("/dev/sdx"), claim)
}

fn key(lease: &mut dyn Lease) -> Option<u64> {
    match lease.inspect().unwrap() {
        LeaseView::Held(holder) => Some(holder.generation),
        _ => None,
    }
}

#[test]
fn one_host_has_it_and_the_other_gets_it_afterwards() {
    for kind in [
        ReservationKind::WriteExclusive,
        ReservationKind::WriteExclusiveRegistrants,
    ] {
        let target = ScsiTarget::of_kind(kind);
        let mut a = lease(&target, 1, claim("a", 1, 1));
        let mut b = lease(&target, 2, claim("b", 2, 2));
        let grant = a.take(Duration::ZERO).unwrap();
        assert!(!grant.term.is_over());
        assert_eq!(key(&mut *b), Some(grant.generation));
        assert!(target.begin(1).is_some());
        assert_eq!(target.begin(2), None);
        let refused = b.take(Duration::ZERO).unwrap_err();
        assert_eq!(refused.code, Code::Busy);
        let shown = ReservationKey(grant.generation).to_string();
        for word in [&shown[..], "host id-", "/dev/sdx", "tap-ctl lease break"] {
            assert!(refused.message.contains(word), "{refused}");
        }
        // A refused host could not write either, whatever the storage allows to registered hosts.
        assert_eq!(target.begin(2), None);
        a.keep().unwrap();
        a.give_up().unwrap();
        assert!(grant.term.is_over());
        assert_eq!(a.keep().unwrap_err().code, Code::Gone);
        assert_eq!(key(&mut *b), None);
        assert_eq!(target.begin(2), None);
        b.take(Duration::ZERO).unwrap();
        assert_eq!(target.begin(1), None);
        assert_eq!(target.keys().1.len(), 1);
    }
}

#[test]
fn a_break_ends_what_the_holder_has_under_way_and_leaves_it_free() {
    let target = ScsiTarget::default();
    let mut a = lease(&target, 1, claim("a", 1, 1));
    let mut b = lease(&target, 2, claim("b", 2, 2));
    let generation = a.take(Duration::ZERO).unwrap().generation;
    let write = target.begin(1).unwrap();
    let other = b.break_off(HolderIsDead { generation: 7 }).unwrap_err();
    assert!(other.message.contains("not the holder"), "{other}");
    let own = a.break_off(HolderIsDead { generation }).unwrap_err();
    assert!(own.message.contains("this host itself"), "{own}");
    let was = b.break_off(HolderIsDead { generation }).unwrap().unwrap();
    assert_eq!(was.key, Some(ReservationKey(generation).to_string()));
    assert!(!target.land(write));
    assert_eq!(key(&mut *b), None);
    // It does not know yet.
    assert_eq!(target.begin(1), None);
    assert_eq!(b.break_off(HolderIsDead { generation }).unwrap(), None);
    let lost = a.keep().unwrap_err();
    assert_eq!(lost.code, Code::Gone);
    for word in ["is lost", "nobody has it now", "tap-ctl unpause"] {
        assert!(lost.message.contains(word), "{lost}");
    }
}

#[test]
fn the_next_process_of_a_disk_goes_on_and_another_disk_does_not() {
    let target = ScsiTarget::default();
    let own = claim("a", 1, 1);
    let mut first = lease(&target, 1, own.clone());
    let generation = first.take(Duration::ZERO).unwrap().generation;
    drop(first);
    let mut next = lease(&target, 1, own.clone());
    assert_eq!(next.resume(0).unwrap().generation, generation);
    assert_eq!(next.take(Duration::ZERO).unwrap().generation, generation);
    // Another disk of the same host is one to the storage.
    let mut other = lease(&target, 1, claim("a", 1, 1));
    let refused = other.take(Duration::ZERO).unwrap_err();
    assert!(refused.message.contains("this host"), "{refused}");
    assert_eq!(other.resume(0).unwrap_err().code, Code::Gone);
    next.give_up().unwrap();
    other.take(Duration::ZERO).unwrap();
    let lost = next.resume(0).unwrap_err();
    assert_eq!(lost.code, Code::Gone);
}

#[test]
fn what_an_earlier_boot_left_is_taken_over_and_by_no_other_host() {
    let target = ScsiTarget::default();
    let before = lease(&target, 1, claim("a", 1, 1)).take(Duration::ZERO);
    let before = before.unwrap().generation;
    // A machine whose number is the same, which the storage knows to be another one.
    let mut twin = lease(&target, 2, claim("twin", 1, 3));
    assert_eq!(twin.take(Duration::ZERO).unwrap_err().code, Code::Busy);
    let mut after = lease(&target, 1, claim("a", 1, 2));
    let generation = after.take(Duration::ZERO).unwrap().generation;
    assert_ne!(generation, before);
    assert_eq!(target.keys().1, [generation]);
    // Registered, and not reserved: it died in between.
    let target = ScsiTarget::default();
    assert_eq!(target.register(1, 0, before), StorageAnswer::Done);
    let mut same = lease(&target, 1, claim("a", 1, 1));
    let refused = same.take(Duration::ZERO).unwrap_err();
    assert!(
        refused.message.contains("has this host registered"),
        "{refused}"
    );
    let mut after = lease(&target, 1, claim("a", 1, 2));
    after.take(Duration::ZERO).unwrap();
    assert_eq!(target.keys().1.len(), 1);
}

#[test]
fn what_nobody_has_is_taken_by_one_host_of_several() {
    let target = ScsiTarget::default();
    let mut a = lease(&target, 1, claim("a", 1, 1));
    a.take(Duration::ZERO).unwrap();
    a.give_up().unwrap();
    let mut b = lease(&target, 2, claim("b", 2, 2));
    let taken = b.take(Duration::ZERO).unwrap().generation;
    assert_eq!(target.keys().1, [taken]);
    assert_eq!(a.take(Duration::ZERO).unwrap_err().code, Code::Busy);
    // The host that keeps the reservation for no disk can take it for another disk.
    b.give_up().unwrap();
    let mut other = lease(&target, 2, claim("b", 2, 2));
    other.take(Duration::ZERO).unwrap();
    assert_eq!(target.keys().1.len(), 1);
}

#[test]
fn who_keeps_a_reservation_learns_that_it_was_lost() {
    let target = ScsiTarget::default();
    let mut a = lease(&target, 1, claim("a", 1, 1));
    let grant = a.take(Duration::ZERO).unwrap();
    let (sender, news) = channel();
    let keeper = LeaseRenewer::start(a, &grant, move |told| sender.send(told).unwrap()).unwrap();
    assert!(matches!(news.recv().unwrap(), RenewerNews::Kept(_)));
    let mut b = lease(&target, 2, claim("b", 2, 2));
    let generation = grant.generation;
    b.break_off(HolderIsDead { generation }).unwrap().unwrap();
    b.take(Duration::ZERO).unwrap();
    let lost = loop {
        match news.recv().unwrap() {
            RenewerNews::Lost(failure) => break failure,
            RenewerNews::Kept(_) => {}
            RenewerNews::Missed(failure) => panic!("{failure}"),
        }
    };
    assert!(lost.message.contains("host id-"), "{lost}");
    assert!(grant.term.is_over());
    assert_eq!(keeper.give_up().unwrap_err().code, Code::Gone);
}
