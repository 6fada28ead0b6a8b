// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leases in real files.

use super::layout::{encode, place, Cell, LeaseRecord, RecordState, CELL, SIZE};
use super::RecordLease;
use crate::{HolderIsDead, Lease, LeaseClaim, LeaseRenewer, LeaseView, RenewerNews};
use control::Code;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Duration;

struct SharedImage {
    _dir: tempfile::TempDir,
    image: PathBuf,
    lease: PathBuf,
}

impl SharedImage {
    fn new() -> SharedImage {
        // The lease needs a file system with direct I/O.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let image = dir.path().join("a.img");
        fs::write(&image, b"image").unwrap();
        SharedImage {
            lease: dir.path().join("a.img.lease"),
            image,
            _dir: dir,
        }
    }

    fn host(&self, name: &str, number: u8) -> RecordLease {
        let mut claim = LeaseClaim::new(format!("guest {number}, xvda")).unwrap();
        claim.host.name = name.into();
        claim.host.machine = [number; 16];
        claim.host.boot = [number; 16];
        RecordLease::open(&self.lease, &self.image, claim).unwrap()
    }

    fn write(&self, cell: Cell, record: &LeaseRecord) {
        let mut bytes = fs::read(&self.lease).unwrap();
        let at = place(record.generation, cell) * CELL;
        let record = encode(record);
        bytes[at..at + record.len()].copy_from_slice(&record);
        fs::write(&self.lease, bytes).unwrap();
    }
}

#[test]
fn one_host_has_it_and_the_other_gets_it_afterwards() {
    let shared = SharedImage::new();
    let (mut a, mut b) = (shared.host("a", 1), shared.host("b", 2));
    assert!(matches!(
        b.inspect().unwrap(),
        LeaseView::Free { generation: 0, .. }
    ));
    assert!(!shared.lease.exists(), "looking makes nothing");
    let grant = a.take(Duration::ZERO).unwrap();
    assert_eq!(grant.generation, 1);
    assert!(!grant.term.is_over());
    assert_eq!(fs::metadata(&shared.lease).unwrap().len(), SIZE as u64);
    match b.inspect().unwrap() {
        LeaseView::Held(holder) => {
            assert_eq!((holder.host.as_str(), holder.generation), ("a", 1));
            assert_eq!(holder.disk, "guest 1, xvda");
            assert!(!holder.is_here);
        }
        view => panic!("{view:?}"),
    }
    let refused = b.take(Duration::ZERO).unwrap_err();
    assert_eq!(refused.code, Code::Busy);
    for word in ["host a", "guest 1, xvda", "since 2", "tap-ctl lease break"] {
        assert!(refused.message.contains(word), "{refused}");
    }
    let before = grant.term.until();
    a.keep().unwrap();
    assert!(grant.term.until() > before);
    a.give_up().unwrap();
    assert!(grant.term.is_over());
    assert_eq!(a.keep().unwrap_err().code, Code::Gone);
    let grant = b.take(Duration::from_secs(5)).unwrap();
    assert_eq!(grant.generation, 2);
}

#[test]
fn the_next_process_of_a_disk_goes_on_and_another_disk_does_not() {
    let shared = SharedImage::new();
    let mut first = shared.host("a", 1);
    first.take(Duration::ZERO).unwrap();
    let claim = first.party.claim.clone();
    drop(first);
    let mut next = RecordLease::open(&shared.lease, &shared.image, claim).unwrap();
    assert_eq!(next.resume(1).unwrap().generation, 1);
    assert_eq!(next.resume(7).unwrap_err().code, Code::Gone);
    let mut other = shared.host("a", 1);
    assert_eq!(other.resume(1).unwrap_err().code, Code::Gone);
    let refused = other.take(Duration::ZERO).unwrap_err();
    let remedy = format!(
        "tap-ctl lease break {} --holder-is-dead 1",
        shared.image.display()
    );
    for words in ["this host itself", "tap-ctl destroy", &remedy] {
        assert!(refused.message.contains(words), "{refused}");
    }
}

/// The remedy is the word of the operator, which helps.
#[test]
fn what_this_host_had_before_it_was_booted_can_be_broken() {
    let shared = SharedImage::new();
    shared.host("a", 1).take(Duration::ZERO).unwrap();
    let mut next = shared.host("a", 1);
    next.party.claim.host.boot = [9; 16];
    let refused = next.take(Duration::ZERO).unwrap_err();
    let remedy = format!(
        "tap-ctl lease break {} --holder-is-dead 1",
        shared.image.display()
    );
    for words in ["booted since", &remedy] {
        assert!(refused.message.contains(words), "{refused}");
    }
    let broken = next.break_off(HolderIsDead { generation: 1 });
    assert!(broken.unwrap().is_some());
    next.take(Duration::ZERO).unwrap();
}

#[test]
fn a_break_while_the_holder_lives_is_refused() {
    let shared = SharedImage::new();
    let (mut a, mut b) = (shared.host("a", 1), shared.host("b", 2));
    let grant = a.take(Duration::ZERO).unwrap();
    let keeper = LeaseRenewer::start(Box::new(a), &grant, |_| ()).unwrap();
    let refused = b.break_off(HolderIsDead { generation: 7 }).unwrap_err();
    assert!(refused.message.contains("not the holder"), "{refused}");
    let refused = b.break_off(HolderIsDead { generation: 1 }).unwrap_err();
    assert_eq!(refused.code, Code::Busy);
    assert!(
        refused.message.contains("lives") && refused.message.contains("host a"),
        "{refused}"
    );
    keeper.give_up().unwrap();
    assert_eq!(b.break_off(HolderIsDead { generation: 1 }).unwrap(), None);
    assert_eq!(keeper.give_up().unwrap_err().code, Code::Gone);
}

#[test]
fn who_keeps_a_lease_learns_that_it_was_lost() {
    let shared = SharedImage::new();
    let mut a = shared.host("a", 1);
    let grant = a.take(Duration::ZERO).unwrap();
    let b = shared.host("b", 2);
    let (sender, news) = channel();
    let keeper =
        LeaseRenewer::start(Box::new(a), &grant, move |told| sender.send(told).unwrap()).unwrap();
    // As if it had been broken and taken by another host.
    let store = b.store.as_ref().unwrap();
    let mut record = store.read().unwrap().settled().unwrap().clone();
    record.who = b.party.claim.clone();
    (record.state, record.generation) = (RecordState::Held, 2);
    shared.write(Cell::Hold, &record);
    match news.recv().unwrap() {
        RenewerNews::Lost(failure) => assert!(failure.message.contains("host b"), "{failure}"),
        news => panic!("{news:?}"),
    }
    assert!(grant.term.is_over());
    assert_eq!(keeper.give_up().unwrap_err().code, Code::Gone);
}

#[test]
fn what_cannot_be_right_is_refused_by_one_sentence() {
    let shared = SharedImage::new();
    let (mut a, mut b) = (shared.host("a", 1), shared.host("a", 2));
    a.take(Duration::ZERO).unwrap();
    let name = b.take(Duration::ZERO).unwrap_err();
    assert!(
        name.message.contains("another machine of this host's name"),
        "{name}"
    );
    // The image is another file now.
    let other = shared.image.with_extension("other");
    fs::write(&other, b"other").unwrap();
    fs::rename(&other, &shared.image).unwrap();
    let mut c = shared.host("c", 3);
    for failure in [
        c.take(Duration::ZERO).unwrap_err(),
        c.break_off(HolderIsDead { generation: 1 }).unwrap_err(),
    ] {
        assert_eq!(failure.code, Code::Image);
        assert!(failure.message.contains("host a"), "{failure}");
    }
    let mut bytes = fs::read(&shared.lease).unwrap();
    let at = place(1, Cell::Hold) * CELL;
    bytes[at + 8] = 9;
    fs::write(&shared.lease, &bytes).unwrap();
    let version = c.inspect().unwrap_err();
    assert_eq!(version.code, Code::Version);
    assert!(version.message.contains("version 9"), "{version}");
    fs::write(&shared.lease, b"something else").unwrap();
    let foreign = shared.host("c", 3).take(Duration::ZERO).unwrap_err();
    assert_eq!(foreign.code, Code::Image);
    assert!(foreign.message.contains("remove it"), "{foreign}");
}
