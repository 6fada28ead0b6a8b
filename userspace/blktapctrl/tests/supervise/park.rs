// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks release the kernel's module, and resume with the next one.

use super::bed::{block_on, test, unpause, until, which, Bed, Succession};
use blktapctrl::kernel::{Kernel, Make};
use blktapctrl::recovery;
use control::supervisor::{PendingOperation, Reply, Request};
use control::tapdisk::State;
use control::{Code, Failure};
use std::fs;
use std::rc::Rc;
use std::time::Duration;

const PARK: Request = Request::Park { timeout_s: 5 };

async fn parked(bed: &Bed) -> Vec<u32> {
    minors(bed.ask(PARK).await)
}

fn minors(reply: Result<Reply, Failure>) -> Vec<u32> {
    match reply {
        Ok(Reply::Parked { minors }) => minors,
        other => panic!("{other:?}"),
    }
}

/// Another module is loaded: nothing of the one before is left.
fn assert_unloaded(bed: &Bed) {
    let nodes = bed.kernel.nodes.borrow();
    assert!(nodes.is_empty(), "{:?}", nodes.keys());
}

async fn is_served(bed: &Bed, minor: u32) {
    until("a disk that is served", || async {
        let row = bed.row(minor).await;
        (row.state == Some(State::Running) && row.doing.is_none()).then_some(())
    })
    .await;
}

fn bind(bed: &Bed, minor: u32, to: Option<(u32, u32)>) {
    let mut nodes = bed.kernel.nodes.borrow_mut();
    nodes.get_mut(&minor).expect("the node").bound = to;
}

#[test]
fn disks_go_on_with_the_next_module_as_they_were() {
    test("park", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        let mut first = bed.create("a.img");
        (first.minor, first.arena_kib) = (Some(3), 2048);
        bed.made(first).await;
        bed.made(bed.create("b.img")).await;
        let pause = Request::Pause {
            which: which(0),
            timeout_s: 5,
        };
        assert_eq!(bed.ask(pause).await, Ok(Reply::Done));
        let before = bed.row(3).await;
        assert_eq!(parked(&bed).await, [0, 3]);
        assert_unloaded(&bed);
        for minor in [0, 3] {
            let row = bed.row(minor).await;
            assert_eq!((row.pid, row.doing), (None, Some(PendingOperation::Park)));
        }
        assert_eq!(parked(&bed).await, [0, 3], "it is done already");
        let refused = bed.ask(unpause(0, None));
        let failure = refused.await.expect_err("it has no node");
        assert!(failure.message.contains("being exchanged"), "{failure}");
        assert_eq!(minors(bed.ask(Request::Unpark).await), [0, 3]);
        let after = bed.row(3).await;
        assert_eq!((after.state, after.doing), (Some(State::Running), None));
        assert_ne!(after.pid, before.pid);
        assert_eq!(bed.kernel.nodes.borrow()[&3].make.arena_kib, 2048);
        let paused = bed.row(0).await;
        assert_eq!((paused.pid, paused.doing), (None, None), "it is paused yet");
        assert_eq!(minors(bed.ask(Request::Unpark).await), [0; 0]);
        bed.assert_nobody_died();
    });
}

#[test]
fn all_are_served_as_before_if_one_cannot_let_go() {
    test("park-refused", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        let first = bed.made(bed.create("a.img")).await;
        let second = bed.made(bed.create("b.img")).await;
        bind(&bed, second, Some((7, 51712)));
        let failure = bed.ask(PARK).await.expect_err("a guest has it");
        assert!(failure.message.contains("domain 7"), "{failure}");
        is_served(&bed, first).await;
        is_served(&bed, second).await;
        bind(&bed, second, None);
        // The node of another program.
        let node = bed.kernel.create(Make::default()).expect("a node");
        let failure = bed.ask(PARK).await.expect_err("a node is left");
        assert!(failure.message.contains("tap-ctl free"), "{failure}");
        is_served(&bed, first).await;
        is_served(&bed, second).await;
        bed.kernel.destroy(node).expect("free");
        assert_eq!(parked(&bed).await, [first, second]);
        bed.ask(Request::Unpark).await.expect("unparked");
    });
}

/// I/O of a dead process may still reach the image: the module must not go.
#[test]
fn a_node_that_is_not_free_keeps_the_module() {
    test("park-fencing", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        bed.fencing(minor, true);
        let asked = Request::Park { timeout_s: 1 };
        let failure = bed.ask(asked).await.expect_err("its node is in use");
        assert_eq!(failure.code, Code::Timeout, "{failure}");
        let row = bed.row(minor).await;
        assert_eq!((row.pid, row.doing), (None, None));
        bed.fencing(minor, false);
        is_served(&bed, minor).await;
    });
}

/// The guest learns of writes that could not be made durable from this process alone.
#[test]
fn a_process_that_owes_its_guest_an_error_stays() {
    test("park-owes", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        let pid = bed.row(minor).await.pid;
        for name in ["owes", "owes-closed"] {
            let path = bed.dir.join(name);
            fs::write(&path, "").expect("write");
            let failure = bed.ask(PARK).await.expect_err("the guest has not asked");
            assert!(
                failure.message.contains("made durable"),
                "{name}: {failure}"
            );
            is_served(&bed, minor).await;
            assert_eq!(bed.row(minor).await.pid, pid, "{name}");
            fs::remove_file(path).expect("remove");
        }
        assert_eq!(parked(&bed).await, [minor]);
        bed.ask(Request::Unpark).await.expect("unparked");
    });
}

#[test]
fn a_disk_that_is_made_meanwhile_waits_for_the_next_module() {
    test("park-create", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        bed.made(bed.create("a.img")).await;
        parked(&bed).await;
        let create = Request::Create(Box::new(bed.create("b.img")));
        let waits = tokio::task::spawn_local({
            let bed = bed.clone();
            async move { bed.ask(create).await }
        });
        bed.destroy(0).await;
        assert_unloaded(&bed);
        assert!(!waits.is_finished());
        bed.ask(Request::Unpark).await.expect("unparked");
        let made = waits.await.expect("a task");
        assert!(matches!(made, Ok(Reply::Created { .. })), "{made:?}");
        assert_eq!(bed.rows().await.len(), 1);
    });
}

#[test]
fn the_next_supervisor_knows_what_is_parked() {
    let host = Succession::new("park-again");
    block_on(async {
        let bed = host.bed();
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        parked(&bed).await;
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        let row = bed.row(0).await;
        assert_eq!((row.pid, row.doing), (None, Some(PendingOperation::Park)));
        bed.ask(Request::Unpark).await.expect("unparked");
        is_served(&bed, 0).await;
        bed.lifecycle.destroy_all(bed.registry().all()).await;
        bed.assert_nothing_left().await;
    });
}

/// A disk with a process, and one without.
async fn two_disks(bed: &Rc<Bed>) {
    bed.image("a.img", "A");
    bed.image("b.img", "B");
    bed.made(bed.create("a.img")).await;
    bed.made(bed.create("b.img")).await;
    let paused = bed.ask(Request::Pause {
        which: which(1),
        timeout_s: 5,
    });
    paused.await.expect("paused");
}

/// How often the image with this content was opened.
fn opened(bed: &Bed, content: &str) -> usize {
    let open = format!("open w {content}");
    bed.log().iter().filter(|line| **line == open).count()
}

/// The supervisor ends before and after each of its steps; the next one gets the request to park once more, or to
/// resume all.
#[test]
fn a_supervisor_that_ends_in_the_middle_is_followed_by_one_that_goes_on() {
    for step in 0.. {
        let is_through = [true, false].map(|again| goes_on_after(step, again));
        if is_through == [true; 2] {
            assert!(step > 8, "{step} steps");
            break;
        }
    }
}

/// The supervisor ends after so many steps. True if it does not come to that.
fn goes_on_after(step: u32, again: bool) -> bool {
    let host = Succession::new(&format!("park-step-{step}-{again}"));
    block_on(async {
        let bed = host.bed();
        two_disks(&bed).await;
        host.kernel.crash.left.set(Some(step));
        let asked = {
            let bed = bed.clone();
            tokio::task::spawn_local(async move {
                parked(&bed).await;
                bed.ask(Request::Unpark).await.expect("unparked");
            })
        };
        until("the end of the verbs or of the supervisor", || async {
            (asked.is_finished() || host.kernel.crash.happened.get()).then_some(())
        })
        .await;
    });
    let is_through = !host.kernel.crash.happened.get();
    host.kernel.crash.left.set(None);
    host.kernel.crash.happened.set(false);
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        if again {
            assert_eq!(parked(&bed).await, [0, 1], "step {step}");
            assert_unloaded(&bed);
        }
        bed.ask(Request::Unpark).await.expect("unparked");
        is_served(&bed, 0).await;
        let paused = bed.row(1).await;
        assert_eq!(paused.doing, None, "step {step}, {again}");
        assert_eq!(opened(&bed, "B"), 1, "step {step}, {again}: nobody asked");
        bed.ask(unpause(1, None)).await.expect("unpaused");
        is_served(&bed, 1).await;
        bed.lifecycle.destroy_all(bed.registry().all()).await;
        bed.assert_nothing_left().await;
    });
    is_through
}

/// A disk that is paused, one whose I/O is not over, and one that is served.
async fn three_disks(bed: &Rc<Bed>) {
    for (name, content) in [("a.img", "A"), ("b.img", "B"), ("c.img", "C")] {
        bed.image(name, content);
        bed.made(bed.create(name)).await;
    }
    let (which, timeout_s) = (which(0), 5);
    let paused = bed.ask(Request::Pause { which, timeout_s });
    paused.await.expect("paused");
    bed.fencing(1, true);
}

/// Those that let go wait for one that cannot yet, and the supervisor ends meanwhile. Disks that were paused before
/// stay so, and other requests for them have no effect on a node that is not there.
#[test]
fn a_supervisor_that_ends_while_disks_wait_leaves_none_of_them_behind() {
    for again in [true, false] {
        let host = Succession::new(&format!("park-waits-{again}"));
        block_on(async {
            let bed = host.bed();
            three_disks(&bed).await;
            let asked = {
                let bed = bed.clone();
                let park = Request::Park { timeout_s: 300 };
                tokio::task::spawn_local(async move { bed.ask(park).await })
            };
            until("the others", || async {
                bed.kernel.nodes.borrow().keys().eq([&1]).then_some(())
            })
            .await;
            let (which, timeout_s) = (which(2), 5);
            for verb in [unpause(0, None), Request::Pause { which, timeout_s }] {
                let failure = bed.ask(verb).await.expect_err("it has no node");
                assert!(failure.message.contains("being exchanged"), "{failure}");
            }
            assert!(!asked.is_finished());
        });
        block_on(async {
            let bed = host.bed();
            recovery::disks(&bed.lifecycle).await;
            let doing: Vec<_> = bed.rows().await.iter().map(|row| row.doing).collect();
            assert_eq!(
                doing,
                [Some(PendingOperation::Park); 3],
                "whoever parked them asks"
            );
            bed.fencing(1, false);
            if again {
                assert_eq!(parked(&bed).await, [0, 1, 2]);
                assert_unloaded(&bed);
            }
            assert_eq!(minors(bed.ask(Request::Unpark).await), [0, 1, 2]);
            is_served(&bed, 1).await;
            is_served(&bed, 2).await;
            assert_eq!((bed.row(0).await.doing, opened(&bed, "A")), (None, 1));
            bed.ask(unpause(0, None)).await.expect("unpaused");
            is_served(&bed, 0).await;
            bed.lifecycle.destroy_all(bed.registry().all()).await;
            bed.assert_nothing_left().await;
        });
    }
}

/// A pause that takes long comes first. Where that is not done nothing is parked, and it is a pause yet.
#[test]
fn a_pause_that_is_not_done_comes_before() {
    test("park-pause", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        let first = bed.made(bed.create("a.img")).await;
        let second = bed.made(bed.create("b.img")).await;
        bed.lifecycle.patience.set(Duration::from_millis(200));
        let slow = bed.dir.join(format!("slow-{first}"));
        fs::write(&slow, "").expect("write");
        let pause = || Request::Pause {
            which: which(first),
            timeout_s: 1,
        };
        let failure = bed.ask(pause()).await.expect_err("it is slow");
        assert_eq!(failure.code, Code::Timeout, "{failure}");
        let failure = bed.ask(PARK).await.expect_err("a pause is not done");
        assert!(failure.message.contains("pause is not done"), "{failure}");
        is_served(&bed, second).await;
        assert_eq!(bed.row(first).await.doing, Some(PendingOperation::Pause));
        fs::remove_file(slow).expect("remove");
        bed.lifecycle.patience.set(Duration::from_secs(60));
        assert_eq!(parked(&bed).await, [first, second]);
        assert_eq!(minors(bed.ask(Request::Unpark).await), [first, second]);
        is_served(&bed, second).await;
        let paused = bed.row(first).await;
        assert_eq!((paused.pid, paused.doing), (None, None), "it is paused");
        bed.ask(unpause(first, None)).await.expect("unpaused");
        is_served(&bed, first).await;
    });
}
