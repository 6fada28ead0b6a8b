// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks whose images several hosts reach.

use super::bed::{block_on, kill, test, unpause, until, which, Bed, Succession};
use blktapctrl::recovery;
use control::supervisor::{Create, Mode, Reply, Request, What};
use control::tapdisk::State;
use control::{Code, Failure, LeaseKind};
use lease::{Grant, Holder, HolderIsDead, Lease, LeaseClaim, LeaseView};
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
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
    let mut claim = LeaseClaim::new("its disk").expect("a host");
    claim.host.name = "beta".into();
    (claim.host.machine, claim.host.boot) = ([7; 16], [7; 16]);
    let image = bed.dir.join("a.img");
    lease::open(&LeaseKind::Record(None), &image, claim).expect("a lease")
}

/// Returns the holder of the lease of an image, for people.
pub(crate) fn holder_of(bed: &Bed, image: &str) -> Option<String> {
    let claim = LeaseClaim::new("its disk").expect("a host");
    let image = bed.dir.join(image);
    if !image.exists() {
        return None;
    }
    let lease = lease::open(&LeaseKind::Record(None), &image, claim);
    match lease.expect("a lease").inspect().expect("a lease") {
        LeaseView::Held(holder) => Some(holder.disk),
        _ => None,
    }
}

/// Storage on which no lease can be given up while the switch is on.
#[derive(Debug)]
struct Stuck(Box<dyn Lease>, Arc<AtomicBool>);

impl Lease for Stuck {
    fn inspect(&mut self) -> Result<LeaseView, Failure> {
        self.0.inspect()
    }

    fn take(&mut self, wait: Duration) -> Result<Grant, Failure> {
        self.0.take(wait)
    }

    fn resume(&mut self, generation: u64) -> Result<Grant, Failure> {
        self.0.resume(generation)
    }

    fn keep(&mut self) -> Result<(), Failure> {
        self.0.keep()
    }

    fn beat(&self) -> Option<Duration> {
        self.0.beat()
    }

    fn give_up(&mut self) -> Result<(), Failure> {
        match self.1.load(Ordering::Relaxed) {
            true => Err(Failure::new(Code::System, "the storage is broken")),
            false => self.0.give_up(),
        }
    }

    fn break_off(&mut self, confirmed: HolderIsDead) -> Result<Option<Holder>, Failure> {
        self.0.break_off(confirmed)
    }
}

/// From now on leases of this host are on storage that can break.
fn breakable(bed: &Bed) -> Arc<AtomicBool> {
    let is_broken = Arc::new(AtomicBool::new(false));
    let switch = is_broken.clone();
    let open = move |kind: &LeaseKind, image: &Path, claim| {
        let lease = lease::open(kind, image, claim)?;
        Ok(Box::new(Stuck(lease, switch.clone())) as Box<dyn Lease>)
    };
    bed.lifecycle.use_leases(Arc::new(open));
    is_broken
}

pub(crate) fn generation(lease: &mut dyn Lease) -> Option<u64> {
    match lease.inspect().expect("a lease") {
        LeaseView::Held(holder) => Some(holder.generation),
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
        // Nor is one for which a script asks twice: the caller that waits for it hears why.
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
        // It is not this host's any more, nor another's.
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
        recovery::disks(&bed.lifecycle).await;
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

/// The record of a lease as [`a_disk_that_ends_before_it_was_taken_over_gives_its_reservation_up`] has a reservation.
///
/// [`a_disk_that_ends_before_it_was_taken_over_gives_its_reservation_up`]: super::reservation
#[test]
fn a_disk_that_ends_before_it_was_taken_over_gives_its_lease_up() {
    let host = Succession::new("lease-end");
    block_on(async {
        let bed = host.bed();
        let minor = bed.made(leased(&bed)).await;
        kill(bed.row(minor).await.pid.expect("a process"));
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        // No supervisor has asked for the lease yet.
        bed.destroy(0).await;
        assert_eq!(generation(&mut *elsewhere(&bed)), None);
    });
}

#[test]
fn a_lease_that_cannot_be_given_up_is_given_up_later() {
    test("lease-later", |bed| async move {
        let is_broken = breakable(&bed);
        let minor = bed.made(leased(&bed)).await;
        is_broken.store(true, Ordering::Relaxed);
        let pause = Request::Pause {
            which: which(minor),
            timeout_s: 0,
        };
        assert_eq!(bed.ask(pause).await, Ok(Reply::Done));
        let told = |what: &What| matches!(what, What::Failed { message, .. } if message.contains("is not given up yet"));
        assert!(bed.events().iter().any(told), "{:?}", bed.events());
        assert!(generation(&mut *elsewhere(&bed)).is_some());
        is_broken.store(false, Ordering::Relaxed);
        until("another attempt", || async {
            generation(&mut *elsewhere(&bed)).is_none().then_some(())
        })
        .await;
        let served = bed.ask(unpause(minor, None)).await;
        assert!(matches!(served, Ok(Reply::Opened(_))), "{served:?}");
        // A disk stays until its lease is free, and says so.
        is_broken.store(true, Ordering::Relaxed);
        let destroy = || Request::Destroy {
            which: which(minor),
            timeout_s: 1,
            of: None,
        };
        let held = bed.ask(destroy()).await.expect_err("it is held");
        assert_eq!(held.code, Code::Busy);
        for words in [
            "is not given up yet",
            "the storage is broken",
            "tap-ctl forget -m 0",
        ] {
            assert!(held.message.contains(words), "{held}");
        }
        is_broken.store(false, Ordering::Relaxed);
        bed.emptied().await;
        assert_eq!(generation(&mut *elsewhere(&bed)), None);
    });
}

#[test]
fn a_lease_that_will_never_be_given_up_can_be_forgotten() {
    test("lease-forgotten", |bed| async move {
        let is_broken = breakable(&bed);
        let minor = bed.made(leased(&bed)).await;
        let forget = || Request::Forget { minor };
        let served = bed.ask(forget()).await.expect_err("it is served");
        assert_eq!(served.code, Code::NotFound);
        is_broken.store(true, Ordering::Relaxed);
        let destroy = Request::Destroy {
            which: which(minor),
            timeout_s: 1,
            of: None,
        };
        bed.ask(destroy).await.expect_err("it is held");
        assert_eq!(bed.ask(forget()).await, Ok(Reply::Done));
        bed.emptied().await;
        bed.assert_nothing_left().await;
        assert!(generation(&mut *elsewhere(&bed)).is_some());
    });
}

/// A supervisor that knows the token and no more wrote the record.
#[test]
fn the_lease_of_an_older_supervisor_is_given_up() {
    let host = Succession::new("lease-older");
    block_on(async {
        let bed = host.bed();
        let minor = bed.made(leased(&bed)).await;
        kill(bed.row(minor).await.pid.expect("a process"));
    });
    let path = host.dir.join("run/disks/0.json");
    let text = fs::read(&path).expect("a record");
    let mut record: serde_json::Value = serde_json::from_slice(&text).expect("json");
    let fields = record.as_object_mut().expect("a record");
    assert!(fields["lease"].is_string());
    assert!(fields.remove("leases").is_some());
    fs::write(&path, record.to_string()).expect("write");
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        bed.destroy(0).await;
        assert_eq!(generation(&mut *elsewhere(&bed)), None);
    });
}
