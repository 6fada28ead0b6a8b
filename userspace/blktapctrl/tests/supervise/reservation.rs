// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks whose storage refuses the writes of all hosts but one.

use super::bed::{block_on, kill, test, unpause, until, which, Bed, Succession};
use blktapctrl::recovery;
use control::supervisor::{Create, MirrorTo, Mode, Reply, Request, What};
use control::tapdisk::State;
use control::{Code, LeaseKind};
use lease::reservation::fake::ScsiTarget;
use lease::{HolderIsDead, Lease, LeaseClaim, LeaseView};
use std::sync::Arc;
use std::time::Duration;

/// This host, and another one, as the storage knows them.
const HERE: u8 = 1;
const THERE: u8 = 2;

/// From now on this host reaches a storage with reservations.
fn reach(bed: &Bed, target: &ScsiTarget) {
    let target = target.clone();
    bed.lifecycle
        .use_leases(Arc::new(move |kind, image, claim| match kind {
            LeaseKind::Reservation => Ok(target.lease(HERE, image, claim)),
            kind => lease::open(kind, image, claim),
        }));
}

fn reserved(bed: &Bed) -> Create {
    bed.image("a.dev", "A");
    let mut create = bed.create("a.dev");
    let target = create.open.target.clone();
    create.open.target = target.with_lease(LeaseKind::Reservation).expect("a target");
    create
}

fn elsewhere(bed: &Bed, target: &ScsiTarget) -> Box<dyn Lease> {
    let mut claim = LeaseClaim::new("its disk").expect("a host");
    claim.host.name = "beta".into();
    (claim.host.machine, claim.host.boot) = ([7; 16], [7; 16]);
    target.lease(THERE, &bed.dir.join("a.dev"), claim)
}

/// The key of the disk that has it reserved, in the eyes of another host.
fn key(bed: &Bed, target: &ScsiTarget) -> Option<u64> {
    match elsewhere(bed, target).inspect().expect("a lease") {
        LeaseView::Held(holder) => Some(holder.generation),
        _ => None,
    }
}

/// Whether no host has it, and another host cannot write it either.
fn is_nobodys(bed: &Bed, target: &ScsiTarget) -> bool {
    let refused = [HERE, THERE].map(|by| target.begin(by).is_none());
    key(bed, target).is_none() && refused.contains(&true)
}

/// Another host takes it away, as if this one were dead.
fn broken(bed: &Bed, target: &ScsiTarget) {
    let generation = key(bed, target).expect("a key");
    let was = elsewhere(bed, target).break_off(HolderIsDead { generation });
    assert!(was.expect("broken").is_some());
    // The disk that had it writes nothing more, though it does not know.
    assert_eq!(target.begin(HERE), None);
}

pub(crate) fn pause(minor: u32) -> Request {
    Request::Pause {
        which: which(minor),
        timeout_s: 0,
    }
}

/// Waits until a disk is paused because its lease is lost, and for the event about that.
pub(crate) async fn wait_stopped(bed: &Bed) {
    until("the pause", || async {
        bed.events().contains(&What::Paused).then_some(())
    })
    .await;
    let lost =
        |what: &What| matches!(what, What::Failed { message, .. } if message.contains("is lost"));
    assert!(bed.events().iter().any(lost), "{:?}", bed.events());
}

#[test]
fn a_reservation_is_held_while_the_image_is_open_and_no_longer() {
    test("reservation", |bed| async move {
        let target = ScsiTarget::default();
        reach(&bed, &target);
        let minor = bed.made(reserved(&bed)).await;
        let held = key(&bed, &target).expect("a key");
        let mut other = elsewhere(&bed, &target);
        assert_eq!(other.take(Duration::ZERO).unwrap_err().code, Code::Busy);
        // The kernel does nothing by itself that could not be taken from it at once.
        assert_eq!(bed.kernel.nodes.borrow()[&minor].backing, None);
        // Neither the death of a process nor its successor changes that.
        bed.replaced(minor, kill).await;
        assert_eq!(key(&bed, &target), Some(held));
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        assert!(is_nobodys(&bed, &target));
        other.take(Duration::ZERO).expect("it is free");
        let busy = bed
            .ask(unpause(minor, None))
            .await
            .expect_err("it is beta's");
        assert_eq!(busy.code, Code::Busy);
        for word in ["is reserved by host id-", "(key 0x", "tap-ctl lease break"] {
            assert!(busy.message.contains(word), "{busy}");
        }
        assert_eq!(bed.row(minor).await.state, Some(State::Paused));
        other.give_up().expect("given up");
        assert!(matches!(
            bed.ask(unpause(minor, None)).await,
            Ok(Reply::Opened(_))
        ));
        assert_ne!(key(&bed, &target), Some(held));
        bed.destroy(minor).await;
        assert!(is_nobodys(&bed, &target));
        // A disk that another host has is not made, unless it is only read.
        other.take(Duration::ZERO).expect("it is free");
        let create = Request::Create(Box::new(reserved(&bed)));
        assert_eq!(bed.ask(create).await.expect_err("in use").code, Code::Busy);
        bed.assert_nothing_left().await;
        let mut reader = reserved(&bed);
        reader.mode = Mode::Read;
        bed.made(reader).await;
    });
}

#[test]
fn a_disk_that_has_lost_its_reservation_waits_for_somebody() {
    test("reservation-lost", |bed| async move {
        let target = ScsiTarget::default();
        reach(&bed, &target);
        let minor = bed.made(reserved(&bed)).await;
        broken(&bed, &target);
        wait_stopped(&bed).await;
        // It is free, and not taken by itself.
        assert_eq!(key(&bed, &target), None);
        let row = bed.row(minor).await;
        assert_ne!(row.state, Some(State::Running));
        let served = bed.ask(unpause(minor, None)).await;
        assert!(matches!(served, Ok(Reply::Opened(_))), "{served:?}");
        assert!(key(&bed, &target).is_some());
        bed.destroy(minor).await;
        assert!(is_nobodys(&bed, &target));
    });
}

#[test]
fn a_process_that_dies_after_the_loss_is_not_replaced() {
    test("reservation-dead", |bed| async move {
        let target = ScsiTarget::default();
        reach(&bed, &target);
        let minor = bed.made(reserved(&bed)).await;
        let pid = bed.row(minor).await.pid.expect("a process");
        // Before a heartbeat finds out.
        broken(&bed, &target);
        kill(pid);
        wait_stopped(&bed).await;
        assert_eq!(key(&bed, &target), None);
    });
}

#[test]
fn the_next_supervisor_goes_on_with_the_reservation() {
    let (host, target) = (Succession::new("reservation-next"), ScsiTarget::default());
    let held = block_on(async {
        let bed = host.bed();
        reach(&bed, &target);
        bed.made(reserved(&bed)).await;
        key(&bed, &target)
    });
    block_on(async {
        let bed = host.bed();
        reach(&bed, &target);
        recovery::disks(&bed.lifecycle).await;
        let disk = bed.registry().all().remove(0);
        until("the lease", || async {
            disk.lease.borrow().is_some().then_some(())
        })
        .await;
        assert_eq!(key(&bed, &target), held);
        bed.destroy(0).await;
        assert!(is_nobodys(&bed, &target));
    });
}

#[test]
fn what_was_lost_while_there_was_no_supervisor_is_not_taken_again() {
    let (host, target) = (Succession::new("reservation-gap"), ScsiTarget::default());
    for ends in [false, true] {
        let pid = block_on(async {
            let bed = host.bed();
            reach(&bed, &target);
            let minor = bed.made(reserved(&bed)).await;
            let pid = bed.row(minor).await.pid.expect("a process");
            broken(&bed, &target);
            pid
        });
        if ends {
            kill(pid);
        }
        block_on(async {
            let bed = host.bed();
            reach(&bed, &target);
            recovery::disks(&bed.lifecycle).await;
            wait_stopped(&bed).await;
            assert_eq!(key(&bed, &target), None);
            bed.destroy(0).await;
        });
    }
}

#[test]
fn a_disk_that_ends_before_it_was_taken_over_gives_its_reservation_up() {
    let (host, target) = (Succession::new("reservation-end"), ScsiTarget::default());
    block_on(async {
        let bed = host.bed();
        reach(&bed, &target);
        let minor = bed.made(reserved(&bed)).await;
        kill(bed.row(minor).await.pid.expect("a process"));
        assert!(key(&bed, &target).is_some());
    });
    block_on(async {
        let bed = host.bed();
        reach(&bed, &target);
        recovery::disks(&bed.lifecycle).await;
        // No supervisor has asked for the lease yet.
        bed.destroy(0).await;
        assert!(is_nobodys(&bed, &target));
    });
}

#[test]
fn what_has_no_reservation_of_its_own_is_refused() {
    test("reservation-refused", |bed| async move {
        // Of the kernel's own: a file, whatever its name.
        let create = Request::Create(Box::new(reserved(&bed)));
        let refused = bed.ask(create).await.expect_err("a file");
        assert_eq!(refused.code, Code::Unsupported);
        for word in ["is no block device", "lease=record"] {
            assert!(refused.message.contains(word), "{refused}");
        }
        let target = ScsiTarget::default();
        reach(&bed, &target);
        let mut shared = reserved(&bed);
        shared.mode = Mode::WriteShared;
        let both = bed.ask(Request::Create(Box::new(shared))).await;
        assert_eq!(both.expect_err("no sense").code, Code::Invalid);
        let minor = bed.made(reserved(&bed)).await;
        bed.image("b.dev", "B");
        let to = MirrorTo {
            target: bed.create("b.dev").open.target,
            rate: 0,
        };
        let mirror = Request::Mirror {
            which: which(minor),
            to: Some(to),
        };
        let refused = bed.ask(mirror).await.expect_err("a copy");
        assert!(refused.message.contains("has a reservation"), "{refused}");
    });
}
