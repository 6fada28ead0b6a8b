// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks whose images several hosts reach.

use super::bed::{block_on, kill, test, unpause, until, which, Bed, Succession};
use blktapctrl::adopt;
use control::supervisor::{Create, Mode, Reply, Request, What};
use control::tapdisk::State;
use control::{Code, LeaseKind};
use lease::{Claim, Lease, View};
use std::fs;
use std::rc::Rc;
use std::time::Duration;

/// A disk with a lease, of an image that is there.
fn leased(bed: &Bed) -> Create {
    bed.image("a.img", "A");
    let mut create = bed.create("a.img");
    let target = create.open.target.clone();
    let target = target.with_lease(LeaseKind::Record(None));
    create.open.target = target.expect("a target");
    create
}

/// The lease, as another host has it.
pub(crate) fn elsewhere(bed: &Bed) -> Box<dyn Lease> {
    let mut claim = Claim::new("its disk").expect("a host");
    claim.host.name = "beta".into();
    (claim.host.machine, claim.host.boot) = ([7; 16], [7; 16]);
    let image = bed.dir.join("a.img");
    lease::open(&LeaseKind::Record(None), &image, claim).expect("a lease")
}

pub(crate) fn generation(lease: &mut dyn Lease) -> Option<u64> {
    match lease.inspect().expect("a lease") {
        View::Held(holder) => Some(holder.generation),
        _ => None,
    }
}

#[test]
fn a_lease_is_held_while_the_image_is_open_and_no_longer() {
    test("lease", |bed| async move {
        let minor = bed.made(leased(&bed)).await;
        let mut other = elsewhere(&bed);
        assert_eq!(generation(&mut *other), Some(1));
        let refused = other.take(Duration::ZERO).expect_err("it is held");
        assert_eq!(refused.code, Code::Busy);
        let text = format!("disk {minor}");
        assert!(refused.message.contains(&text), "{refused}");
        // Neither the death of a process nor its successor changes that.
        bed.replaced(minor, kill).await;
        assert_eq!(generation(&mut *other), Some(1));
        let pause = Request::Pause {
            which: which(minor),
            timeout_s: 0,
        };
        assert_eq!(bed.ask(pause).await, Ok(Reply::Done));
        other.take(Duration::ZERO).expect("it is free");
        let held = bed
            .ask(unpause(minor, None))
            .await
            .expect_err("it is beta's");
        assert_eq!(held.code, Code::Busy);
        for word in ["host beta", "its disk", "since", "tap-ctl lease break"] {
            assert!(held.message.contains(word), "{held}");
        }
        assert_eq!(bed.row(minor).await.state, Some(State::Paused));
        other.give_up().expect("given up");
        assert!(matches!(
            bed.ask(unpause(minor, None)).await,
            Ok(Reply::Opened(_))
        ));
        assert_eq!(generation(&mut *other), Some(3));
        bed.destroy(minor).await;
        assert_eq!(generation(&mut *other), None);
        // A disk that another host has is not made.
        other.take(Duration::ZERO).expect("it is free");
        let create = Request::Create(Box::new(leased(&bed)));
        assert_eq!(bed.ask(create).await.expect_err("in use").code, Code::Busy);
        bed.assert_nothing_left().await;
        // Nor is one for which is asked twice, as a script does: who waits for it hears why.
        let directory = "backend/vbd/1/51712".to_owned();
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        bed.registry().use_store(Some(store));
        bed.store.put(&directory, &[("frontend", "f")]);
        let mut create = leased(&bed);
        create.vbd = Some(directory);
        let again = Request::Create(Box::new(create.clone()));
        create.no_wait = true;
        let begun = bed.ask(Request::Create(Box::new(create))).await;
        assert!(matches!(begun, Ok(Reply::Minor { .. })), "{begun:?}");
        until("a process", || async {
            bed.rows().await.first().and_then(|row| row.pid)
        })
        .await;
        let why = bed.ask(again).await.expect_err("it is beta's");
        assert!(why.message.contains("host beta"), "{why}");
        bed.assert_nothing_left().await;
        let mut shared = leased(&bed);
        shared.mode = Mode::WriteShared;
        let both = bed.ask(Request::Create(Box::new(shared))).await;
        assert_eq!(both.expect_err("no sense").code, Code::Invalid);
    });
}

#[test]
fn a_lease_that_is_lost_ends_the_process() {
    test("lost", |bed| async move {
        let minor = bed.made(leased(&bed)).await;
        let pid = bed.row(minor).await.pid;
        // It is not this host's any more, nor anybody's.
        let record = bed.dir.join("a.img.lease");
        let size = fs::metadata(&record).expect("a lease").len();
        fs::write(&record, vec![0; size.try_into().expect("small")]).expect("write");
        until("its end", || async {
            let row = bed.row(minor).await;
            (row.pid != pid && row.state == Some(State::Running)).then_some(())
        })
        .await;
        let lost = |what: &What| matches!(what, What::Failed { message, .. } if message.contains("is lost"));
        assert!(bed.events().iter().any(lost), "{:?}", bed.events());
        assert_eq!(generation(&mut *elsewhere(&bed)), Some(1));
    });
}

#[test]
fn the_next_supervisor_goes_on_with_the_lease() {
    let host = Succession::new("lease-next");
    block_on(async {
        let bed = host.bed();
        bed.made(leased(&bed)).await;
    });
    block_on(async {
        let bed = host.bed();
        adopt::disks(&bed.lifecycle).await;
        let disk = bed.registry().all().remove(0);
        until("the lease", || async {
            disk.lease.borrow().is_some().then_some(())
        })
        .await;
        assert_eq!(generation(&mut *elsewhere(&bed)), Some(1));
        bed.destroy(0).await;
        assert_eq!(generation(&mut *elsewhere(&bed)), None);
    });
}
