// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks whose lease is a resource of sanlock.

use super::bed::{block_on, kill, test, unpause, until, which, Bed, Succession};
use super::reservation::{pause, wait_stopped};
use blktapctrl::recovery;
use control::supervisor::{Create, MirrorTo, Reply, Request, What};
use control::tapdisk::State;
use control::{Code, LeaseKind, SanlockResource};
use lease::sanlock::fake::{LockspaceStorage, SanlockNode};
use lease::{Lease, LeaseClaim};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The numbers of this host and of another one.
const HERE: u64 = 1;
const THERE: u64 = 2;

fn resource() -> SanlockResource {
    match "sanlock:vms:a:/srv/leases".parse() {
        Ok(LeaseKind::Sanlock(resource)) => *resource,
        other => panic!("{other:?}"),
    }
}

/// A lockspace, this host, and another one.
fn hosts(dir: &Path) -> (LockspaceStorage, SanlockNode, SanlockNode) {
    let storage = LockspaceStorage::default();
    let [here, there] = [HERE, THERE].map(|number| storage.node(dir, number).expect("a host"));
    (storage, here, there)
}

/// From now on the supervisor asks the daemon of this host.
fn reach(bed: &Bed, here: &SanlockNode) {
    let here = here.clone();
    bed.lifecycle
        .use_leases(Arc::new(move |kind, image, claim| match kind {
            LeaseKind::Sanlock(resource) => Ok(here.lease(resource, image, claim)),
            kind => lease::open(kind, image, claim),
        }));
}

fn leased(bed: &Bed, name: &str) -> Create {
    bed.image(name, "A");
    let mut create = bed.create(name);
    let target = create.open.target.clone();
    let target = target.with_lease(LeaseKind::Sanlock(Box::new(resource())));
    create.open.target = target.expect("a target");
    create
}

fn elsewhere(there: &SanlockNode) -> Box<dyn Lease> {
    let claim = LeaseClaim::new("its disk").expect("a host");
    there.lease(&resource(), Path::new("/dev/a"), claim)
}

#[test]
fn a_lease_of_sanlock_is_the_hosts_while_the_image_is_open_and_no_longer() {
    test("sanlock", |bed| async move {
        let (storage, here, there) = hosts(&bed.dir);
        reach(&bed, &here);
        let minor = bed.made(leased(&bed, "a.dev")).await;
        assert_eq!(storage.owner(&resource()), Some(HERE));
        let mut other = elsewhere(&there);
        assert_eq!(other.take(Duration::ZERO).unwrap_err().code, Code::Busy);
        // Its process has a term, so the kernel does nothing by itself.
        assert_eq!(bed.kernel.nodes.borrow()[&minor].backing, None);
        // The death of a process changes nothing, and no other host has the lease in between.
        bed.replaced(minor, kill).await;
        assert_eq!(storage.owner(&resource()), Some(HERE));
        // Another disk of this host does not have it too, whatever its image is.
        let create = Request::Create(Box::new(leased(&bed, "b.dev")));
        let refused = bed.ask(create).await.expect_err("it is the first one's");
        assert_eq!(refused.code, Code::Busy);
        assert!(refused.message.contains("not released it"), "{refused}");
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        assert_eq!(storage.owner(&resource()), None);
        other.take(Duration::ZERO).expect("it is free");
        let busy = bed
            .ask(unpause(minor, None))
            .await
            .expect_err("it is beta's");
        assert_eq!(busy.code, Code::Busy);
        assert!(busy.message.contains("host beta (host 2"), "{busy}");
        assert_eq!(bed.row(minor).await.state, Some(State::Paused));
        other.give_up().expect("given up");
        let served = bed.ask(unpause(minor, None)).await;
        assert!(matches!(served, Ok(Reply::Opened(_))), "{served:?}");
        bed.image("c.dev", "C");
        let target = bed.create("c.dev").open.target;
        let mirror = Request::Mirror {
            which: which(minor),
            to: Some(MirrorTo { target, rate: 0 }),
        };
        let refused = bed.ask(mirror).await.expect_err("a copy");
        assert!(refused.message.contains("lease of sanlock's"), "{refused}");
        bed.destroy(minor).await;
        assert_eq!(storage.owner(&resource()), None);
        assert_eq!(here.stays(&resource()), Some(false));
        // A disk that another host has is not made.
        other.take(Duration::ZERO).expect("it is free");
        let create = Request::Create(Box::new(leased(&bed, "a.dev")));
        assert_eq!(bed.ask(create).await.expect_err("in use").code, Code::Busy);
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_disk_that_has_lost_its_lockspace_lets_go_when_its_io_is_over() {
    test("sanlock-lost", |bed| async move {
        let (storage, here, _) = hosts(&bed.dir);
        reach(&bed, &here);
        let minor = bed.made(leased(&bed, "a.dev")).await;
        let pid = bed.row(minor).await.pid;
        let fencing = |is: bool| {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            nodes.get_mut(&minor).expect("a node").fencing = is;
        };
        // The I/O that its process has under way hangs.
        fencing(true);
        here.change(|told| told.is_ending = true);
        let lost = |what: &What| matches!(what, What::Failed { message, .. } if message.contains("is lost"));
        until("its loss", || async {
            bed.events().iter().any(lost).then_some(())
        })
        .await;
        until("its end", || async {
            (bed.row(minor).await.pid != pid).then_some(())
        })
        .await;
        // The host is not taken for clean, so its watchdog would end that.
        assert!(!here.rejoin());
        assert!(!bed.events().contains(&What::Paused));
        fencing(false);
        wait_stopped(&bed).await;
        assert!(here.rejoin());
        // The supervisor does not take it again: another host may have changed the image.
        assert_eq!(here.stays(&resource()), None);
        assert_ne!(bed.row(minor).await.state, Some(State::Running));
        let served = bed.ask(unpause(minor, None)).await;
        assert!(matches!(served, Ok(Reply::Opened(_))), "{served:?}");
        bed.destroy(minor).await;
        assert_eq!(storage.owner(&resource()), None);
    });
}

#[test]
fn the_next_supervisor_goes_on_with_the_lease_of_sanlock() {
    let host = Succession::new("sanlock-next");
    let (storage, here, _) = hosts(&host.dir);
    block_on(async {
        let bed = host.bed();
        reach(&bed, &here);
        bed.made(leased(&bed, "a.dev")).await;
    });
    assert_eq!(storage.owner(&resource()), Some(HERE));
    block_on(async {
        let bed = host.bed();
        reach(&bed, &here);
        recovery::disks(&bed.lifecycle).await;
        let disk = bed.registry().all().remove(0);
        until("the lease", || async {
            disk.lease.borrow().is_some().then_some(())
        })
        .await;
        assert_eq!(storage.owner(&resource()), Some(HERE));
        bed.destroy(0).await;
        assert_eq!(storage.owner(&resource()), None);
    });
}

#[test]
fn what_sanlock_took_away_while_there_was_no_supervisor_is_not_taken_again() {
    let host = Succession::new("sanlock-gap");
    let (storage, here, _) = hosts(&host.dir);
    for ends in [false, true] {
        let pid = block_on(async {
            let bed = host.bed();
            reach(&bed, &here);
            let minor = bed.made(leased(&bed, "a.dev")).await;
            here.change(|told| told.is_ending = true);
            bed.row(minor).await.pid.expect("a process")
        });
        assert!(!here.rejoin());
        if ends {
            kill(pid);
        }
        block_on(async {
            let bed = host.bed();
            reach(&bed, &here);
            recovery::disks(&bed.lifecycle).await;
            wait_stopped(&bed).await;
            assert!(here.rejoin());
            assert_eq!(here.stays(&resource()), None);
            bed.destroy(0).await;
            assert_eq!(storage.owner(&resource()), Some(HERE));
        });
    }
}

#[test]
fn a_disk_that_ends_before_it_was_taken_over_gives_its_lease_of_sanlock_up() {
    let host = Succession::new("sanlock-end");
    let (storage, here, _) = hosts(&host.dir);
    block_on(async {
        let bed = host.bed();
        reach(&bed, &here);
        let minor = bed.made(leased(&bed, "a.dev")).await;
        kill(bed.row(minor).await.pid.expect("a process"));
    });
    assert_eq!(storage.owner(&resource()), Some(HERE));
    block_on(async {
        let bed = host.bed();
        reach(&bed, &here);
        recovery::disks(&bed.lifecycle).await;
        // No supervisor has asked for the lease yet.
        bed.destroy(0).await;
        assert_eq!(storage.owner(&resource()), None);
    });
}
