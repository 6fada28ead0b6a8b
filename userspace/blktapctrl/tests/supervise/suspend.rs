// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest is suspended, resumes, or arrives, with deaths on the way: which disk has the image then.

use super::bed::{block_on, kill, test, unpause, until, which, Bed, Succession};
use super::fake::FakeDomains;
use super::lease::{elsewhere, generation};
use blktapctrl::recovery;
use control::supervisor::{Create, Reply, Request, What};
use control::tapdisk::State;
use control::{Code, LeaseKind};
use lease::Lease;
use std::cell::RefCell;
use std::fs;
use std::rc::Rc;
use std::time::Duration;

/// A host on which guests move.
struct Moving {
    bed: Rc<Bed>,
    domains: FakeDomains,
    /// The image of the guest.
    image: &'static str,
}

impl Moving {
    fn new(bed: Rc<Bed>) -> Moving {
        Moving::with(bed, "a.img")
    }

    fn with(bed: Rc<Bed>, image: &'static str) -> Moving {
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        bed.registry().use_store(Some(store));
        bed.image(image, "A");
        let domains = FakeDomains::default();
        bed.lifecycle.use_domains(Rc::new(domains.clone()));
        tokio::task::spawn_local(bed.lifecycle.clone().watch_suspended());
        Moving {
            bed,
            domains,
            image,
        }
    }

    /// The disk of one machine in a domain.
    fn create(&self, domain: u32) -> Create {
        let mut create = self.bed.create(self.image);
        let directory = format!("backend/vbd/{domain}/51712");
        let home = format!("/local/domain/{domain}");
        self.bed.store.put(&home, &[("vm", "/vm/a")]);
        self.bed.store.put(&directory, &[("frontend", "f")]);
        create.vbd = Some(directory);
        create
    }

    async fn made(&self, domain: u32) -> u32 {
        self.bed.made(self.create(domain)).await
    }

    fn suspend(&self, domain: u32) {
        self.domains.0.borrow_mut().insert(domain);
        self.bed.lifecycle.look_for_suspended();
    }

    fn resume(&self, domain: u32) {
        self.domains.0.borrow_mut().remove(&domain);
    }

    /// Makes a request to a disk.
    fn wish(&self, minor: u32) {
        let wish = self.bed.dir.join(format!("wish-{minor}"));
        fs::write(wish, "").expect("a wish");
    }

    fn no_wish(&self, minor: u32) {
        let wish = self.bed.dir.join(format!("wish-{minor}"));
        fs::remove_file(wish).expect("the wish");
    }

    fn switch(&self, name: &str, on: bool) {
        let path = self.bed.dir.join(name);
        match on {
            true => fs::write(path, "").expect("a file"),
            false => fs::remove_file(path).expect("the file"),
        }
    }

    async fn is(&self, minor: u32, state: State) {
        until(&format!("disk {minor} becomes {state:?}"), || async {
            (self.bed.row(minor).await.state == Some(state)).then_some(())
        })
        .await;
    }

    /// The kernel does not serve the disk by itself any more.
    async fn gone(&self, minor: u32) {
        until("the kernel has let go", || async {
            let nodes = self.bed.kernel.nodes.borrow();
            nodes[&minor].backing.is_none().then_some(())
        })
        .await;
    }

    async fn held(&self, part: &str) {
        until("an event", || async {
            let is_it = |what: &What| matches!(what, What::Held { why } if why.contains(part));
            self.bed.events().iter().any(is_it).then_some(())
        })
        .await;
    }
}

/// Another host may have it, and nothing of this one may write it then.
#[test]
fn kernel_loses_the_image_of_a_guest_that_is_suspended() {
    test("suspend-direct", |bed| async move {
        let host = Moving::with(bed.clone(), "a.dev");
        let minor = host.made(3).await;
        assert!(bed.kernel.nodes.borrow()[&minor].backing.is_some());
        host.suspend(3);
        host.is(minor, State::Inactive).await;
        host.gone(minor).await;
        host.resume(3);
        host.wish(minor);
        host.is(minor, State::Running).await;
        host.no_wish(minor);
        let round = ["inactivate", "remove 0", "add 0 w", "activate again w A"];
        assert_eq!(bed.log()[3..], round);
        // Its process dies on the way.
        host.switch("slow", true);
        host.suspend(3);
        until("it is asked", || async {
            (bed.log().len() == 8).then_some(())
        })
        .await;
        assert_eq!(bed.log()[7], "inactivate");
        kill(bed.row(minor).await.pid.expect("a process"));
        host.gone(minor).await;
        host.switch("slow", false);
        host.is(minor, State::Inactive).await;
        assert!(bed.kernel.nodes.borrow()[&minor].backing.is_none());
    });
}

#[test]
fn guest_that_was_not_moved_after_all_gets_its_image_again() {
    test("suspend-cancel", |bed| async move {
        let host = Moving::new(bed.clone());
        let minor = host.made(3).await;
        for _ in 0..3 {
            host.suspend(3);
            host.is(minor, State::Inactive).await;
            host.resume(3);
            host.wish(minor);
            host.is(minor, State::Running).await;
            host.no_wish(minor);
        }
        let round = ["inactivate", "activate again w A"];
        let rounds: Vec<&str> = [round; 3].concat();
        assert_eq!(bed.log()[2..], rounds);
        assert!(bed.events().contains(&What::Inactive));
        // The supervisor distinguishes a guest that runs from a suspended one by its requests.
        host.switch("runs", true);
        host.suspend(3);
        until("it was tried", || async {
            (bed.log().len() == 9).then_some(())
        })
        .await;
        host.is(minor, State::Running).await;
    });
}

#[test]
fn another_host_may_have_the_image_of_a_suspended_guest() {
    test("suspend-lease", |bed| async move {
        let host = Moving::new(bed.clone());
        let mut create = host.create(3);
        let target = create.open.target.clone();
        let target = target.with_lease(LeaseKind::Record(None));
        create.open.target = target.expect("a target");
        let minor = bed.made(create).await;
        let other = RefCell::new(elsewhere(&bed));
        let take = || other.borrow_mut().take(Duration::ZERO);
        take().expect_err("it is held");
        host.suspend(3);
        until("the other host has it", || async { take().ok() }).await;
        host.is(minor, State::Inactive).await;
        // The guest was not moved after all, and the other host has let go.
        bed.lifecycle.patience_for_images.set(Duration::ZERO);
        host.resume(3);
        host.wish(minor);
        host.held("beta").await;
        other.borrow_mut().give_up().expect("given up");
        host.is(minor, State::Running).await;
        assert_eq!(generation(&mut **other.borrow_mut()), Some(3));
    });
}

impl Moving {
    /// The disk of a domain, with a lease.
    async fn leased(&self, domain: u32) -> u32 {
        let mut create = self.create(domain);
        let target = create.open.target.clone();
        let target = target.with_lease(LeaseKind::Record(None));
        create.open.target = target.expect("a target");
        self.bed.made(create).await
    }

    /// The disk of a guest that was suspended, with a lease that another host may have now.
    async fn inactive_with_lease(&self) -> u32 {
        let minor = self.leased(3).await;
        self.suspend(3);
        self.is(minor, State::Inactive).await;
        until("the lease is free", || async {
            generation(&mut *elsewhere(&self.bed))
                .is_none()
                .then_some(())
        })
        .await;
        minor
    }

    /// A process opens an image for longer than it is waited for. Returns when another host has the lease: by then that
    /// process must be dead.
    async fn taken_by_another_host(&self, pid: u32) -> Box<dyn Lease> {
        let mut other = elsewhere(&self.bed);
        until("the other host has it", || {
            let taken = other.take(Duration::ZERO);
            std::future::ready(taken.ok())
        })
        .await;
        assert!(!lives(pid), "two write: tapdisk {pid} may have the image");
        other
    }
}

fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Its storage answers when another host may have the lease: then nothing of it is there any more.
#[test]
fn process_that_opens_its_image_late_has_ended_when_the_lease_is_given_up() {
    test("suspend-late", |bed| async move {
        let host = Moving::new(bed.clone());
        let minor = host.inactive_with_lease().await;
        let pid = bed.row(minor).await.pid.expect("a process");
        host.switch("hang", true);
        bed.lifecycle
            .patience_to_open
            .set(Duration::from_millis(50));
        host.resume(3);
        host.wish(minor);
        until("the lease", || async { generation(&mut *elsewhere(&bed)) }).await;
        let mut other = host.taken_by_another_host(pid).await;
        host.switch("hang", false);
        // There is another process, which waits for the image.
        host.is(minor, State::Inactive).await;
        assert_ne!(bed.row(minor).await.pid, Some(pid));
        other.give_up().expect("given up");
        host.is(minor, State::Running).await;
    });
}

/// A late process also ends where an administrator makes it open the image.
#[test]
fn process_that_is_unpaused_late_has_ended_when_the_lease_is_given_up() {
    test("unpause-late", |bed| async move {
        let host = Moving::new(bed.clone());
        let minor = host.inactive_with_lease().await;
        let pid = bed.row(minor).await.pid.expect("a process");
        host.switch("hang", true);
        bed.lifecycle
            .patience_to_open
            .set(Duration::from_millis(50));
        let late = bed.ask(unpause(minor, None)).await;
        assert_eq!(late.expect_err("it hangs").code, Code::Timeout);
        let mut other = host.taken_by_another_host(pid).await;
        host.switch("hang", false);
        host.is(minor, State::Inactive).await;
        other.give_up().expect("given up");
        let served = bed.ask(unpause(minor, None)).await;
        assert!(matches!(served, Ok(Reply::Opened(_))), "{served:?}");
    });
}

#[test]
fn destination_waits_for_the_source() {
    test("destination", |bed| async move {
        let host = Moving::new(bed.clone());
        host.bed
            .lifecycle
            .patience_for_images
            .set(Duration::from_millis(1));
        let source = host.made(3).await;
        host.switch("busy", true);
        let there = host.made(4).await;
        host.is(there, State::Inactive).await;
        assert_eq!(
            bed.log(),
            ["attach 0", "open w A", "attach 1", "open inactive"],
            "locked by both, one after the other"
        );
        host.wish(there);
        // The message names a disk that does not let go.
        host.held("tap disk 0 of backend/vbd/3/51712").await;
        host.suspend(3);
        host.is(source, State::Inactive).await;
        host.switch("busy", false);
        host.is(there, State::Running).await;
        // From now on the source is one of the past.
        host.wish(source);
        host.held("tap disk 1 of backend/vbd/4/51712").await;
        assert_eq!(bed.row(source).await.state, Some(State::Inactive));
        // Unless an administrator knows better.
        let anyway = Request::Unpause {
            which: which(source),
            target: None,
            files: Vec::new(),
            may_shrink: false,
        };
        let reply = bed.ask(anyway).await;
        assert!(matches!(reply, Ok(Reply::Opened { .. })), "{reply:?}");
        host.is(source, State::Running).await;
    });
}

/// The process of a source dies in the middle of it, and the next one does not take the image back before its disk gets
/// a request.
#[test]
fn death_while_an_image_is_let_go_of() {
    test("suspend-death", |bed| async move {
        let host = Moving::new(bed.clone());
        let minor = host.made(3).await;
        host.switch("slow", true);
        host.suspend(3);
        until("it is asked", || async {
            bed.log().contains(&"inactivate".into()).then_some(())
        })
        .await;
        bed.replaced_in(minor, State::Inactive, kill).await;
        host.switch("slow", false);
        assert_eq!(bed.log()[3..], ["attach 0", "open inactive"]);
        // The image is as free as if the process had let go of it.
        until("the event", || async {
            bed.events().contains(&What::Inactive).then_some(())
        })
        .await;
        host.resume(3);
        host.wish(minor);
        host.is(minor, State::Running).await;
        host.no_wish(minor);
    });
}

/// Another host gets the image all the same.
#[test]
fn lease_is_given_up_for_a_process_that_dies_while_it_lets_go() {
    test("suspend-death-lease", |bed| async move {
        let host = Moving::new(bed.clone());
        let minor = host.leased(3).await;
        host.switch("slow", true);
        host.suspend(3);
        until("it is asked", || async {
            bed.log().contains(&"inactivate".into()).then_some(())
        })
        .await;
        let pid = bed.row(minor).await.pid.expect("a process");
        kill(pid);
        drop(host.taken_by_another_host(pid).await);
        host.switch("slow", false);
        host.is(minor, State::Inactive).await;
    });
}

/// The supervisor ends when the process has let go, and has not given the lease up.
#[test]
fn lease_of_an_inactive_disk_is_given_up_by_the_next_supervisor() {
    let host = Succession::new("suspend-next-lease");
    let pid = block_on(async {
        let moving = Moving::new(host.bed());
        let bed = moving.bed.clone();
        let minor = moving.leased(3).await;
        moving.switch("slow", true);
        moving.suspend(3);
        until("it is asked", || async {
            bed.log().contains(&"inactivate".into()).then_some(())
        })
        .await;
        bed.row(minor).await.pid.expect("a process")
    });
    fs::remove_file(host.dir.join("slow")).expect("the file");
    block_on(async {
        let moving = Moving::new(host.bed());
        let bed = moving.bed.clone();
        let status = async || {
            let socket = bed.registry().folder.tapdisk(0);
            let mut link = blktapctrl::rpc_client::RpcClient::connect(&socket)
                .await
                .ok()?;
            let status = link.ask(
                &control::tapdisk::Request::Status,
                &[],
                Duration::from_secs(60),
            );
            match status.await {
                Ok(control::tapdisk::Reply::Status(status)) => Some(status.state),
                _ => None,
            }
        };
        until("it has let go", || async {
            (status().await? == State::Inactive).then_some(())
        })
        .await;
        recovery::disks(&bed.lifecycle).await;
        // The process may have more questions than this supervisor knows of.
        drop(moving.taken_by_another_host(pid).await);
        moving.is(0, State::Inactive).await;
        bed.lifecycle.destroy_all(bed.registry().all()).await;
    });
}

/// A guest that is suspended while its process is being replaced is found by then.
#[test]
fn death_before_an_image_is_let_go_of() {
    test("suspend-dead", |bed| async move {
        let host = Moving::new(bed.clone());
        let minor = host.made(3).await;
        bed.fencing(minor, true);
        kill(bed.row(minor).await.pid.expect("a process"));
        until("it is dead", || async {
            bed.row(minor).await.pid.is_none().then_some(())
        })
        .await;
        host.suspend(3);
        bed.queried(3).await;
        bed.fencing(minor, false);
        host.is(minor, State::Inactive).await;
    });
}

/// The supervisor ends in each state, and the next one continues in it.
#[test]
fn next_supervisor_knows_who_is_inactive() {
    let host = Succession::new("suspend-next");
    let (source, there) = block_on(async {
        let moving = Moving::new(host.bed());
        let source = moving.made(3).await;
        moving.suspend(3);
        moving.is(source, State::Inactive).await;
        (source, moving.made(4).await)
    });
    block_on(async {
        let moving = Moving::new(host.bed());
        let bed = moving.bed.clone();
        recovery::disks(&bed.lifecycle).await;
        moving.is(source, State::Inactive).await;
        moving.is(there, State::Inactive).await;
        bed.replaced_in(there, State::Inactive, kill).await;
        moving.wish(there);
        moving.is(there, State::Running).await;
    });
    block_on(async {
        let moving = Moving::new(host.bed());
        let bed = moving.bed.clone();
        recovery::disks(&bed.lifecycle).await;
        moving.is(source, State::Inactive).await;
        moving.is(there, State::Running).await;
        moving.wish(source);
        bed.lifecycle.patience_for_images.set(Duration::ZERO);
        moving.held("has continued with its image").await;
        bed.lifecycle.destroy_all(bed.registry().all()).await;
    });
}

/// The supervisor ends between the release of an image and the event about it, which the next one sends, once.
#[test]
fn event_of_a_released_image_is_sent_by_the_next_supervisor() {
    let host = Succession::new("suspend-event");
    let tellings = |bed: &Bed| {
        let events = bed.registry().events.after(0);
        let inactive = events.iter().filter(|event| event.what == What::Inactive);
        inactive.count()
    };
    let history = block_on(async {
        let moving = Moving::new(host.bed());
        let source = moving.made(3).await;
        moving.suspend(3);
        moving.is(source, State::Inactive).await;
        until("the event", || async {
            (tellings(&moving.bed) == 1).then_some(())
        })
        .await;
        // The destination has had no image yet, so no event is about it.
        moving.made(4).await;
        moving.bed.registry().folder.events()
    });
    fs::remove_file(history).expect("the events");
    for _ in 0..2 {
        block_on(async {
            let bed = Moving::new(host.bed()).bed;
            recovery::disks(&bed.lifecycle).await;
            until("the event", || async {
                (tellings(&bed) == 1).then_some(())
            })
            .await;
        });
    }
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        bed.lifecycle.destroy_all(bed.registry().all()).await;
        assert_eq!(tellings(&bed), 1);
    });
}

/// An inactive disk can be paused, and another machine does not get the image.
#[test]
fn inactive_disk_is_still_the_disk_of_its_image() {
    test("suspend-pause", |bed| async move {
        let host = Moving::new(bed.clone());
        let minor = host.made(3).await;
        host.suspend(3);
        host.is(minor, State::Inactive).await;
        let stranger = host.create(9);
        bed.store.put("/local/domain/9", &[("vm", "/vm/z")]);
        let refused = bed.ask(Request::Create(Box::new(stranger))).await;
        assert_eq!(refused.expect_err("in use").code, Code::Busy);
        let pause = Request::Pause {
            which: which(minor),
            timeout_s: 5,
        };
        assert_eq!(bed.ask(pause).await, Ok(Reply::Done));
        host.is(minor, State::Paused).await;
    });
}
