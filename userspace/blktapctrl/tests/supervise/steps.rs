// SPDX-License-Identifier: MIT OR Apache-2.0
//! Verbs that are interrupted: by the end of the supervisor after any step, by storage that does not
//! answer, by a target that is refused.

use super::bed::{self, block_on, kill, test, until, which, Bed};
use super::fake::{put, FakeKernel};
use super::lease::holder_of;
use blktapctrl::recovery;
use control::supervisor::{PendingOperation, Reply, Request, Row, What};
use control::tapdisk::State;
use control::{Code, LeaseKind, Target};
use std::fs;
use std::path::Path;
use std::time::Duration;

pub(crate) fn pause(timeout_s: u32) -> Request {
    Request::Pause {
        which: which(0),
        timeout_s,
    }
}

fn target(dir: &Path, name: &str) -> Target {
    let text = format!("sync:{}", dir.join(name).display());
    text.parse().expect("a target")
}

/// A target with a lease.
fn leased(dir: &Path, name: &str) -> Target {
    let target = target(dir, name).with_lease(LeaseKind::Record(None));
    target.expect("a target")
}

pub(crate) fn unpause(target: Option<Target>) -> Request {
    bed::unpause(0, target)
}

fn close() -> Request {
    Request::Close {
        which: which(0),
        force: false,
        timeout_s: 0,
    }
}

/// Lets the supervisor end at each step of a verb, starts the next one, and looks whether that has
/// brought the verb to its end or back to its beginning. Returns the number of steps.
pub(crate) fn at_each_step(
    name: &str,
    before: impl Fn(&Path) -> Vec<Request>,
    verb: impl Fn(&Bed) -> Request,
    settled: impl Fn(&[Row], Option<u32>) -> bool,
) -> u32 {
    for step in 0.. {
        let place = format!("supervise-{}-{name}-{step}", std::process::id());
        let dir = std::env::temp_dir().join(place);
        fs::create_dir_all(&dir).expect("a folder");
        let kernel = FakeKernel::default();
        let (crashed, pid) = block_on(async {
            let bed = Bed::new(&dir, &kernel);
            bed.image("a.img", "A");
            bed.image("b.img", "B");
            for request in before(&dir) {
                bed.ask(request).await.expect("what comes before");
            }
            let pid = bed.rows().await.first().and_then(|row| row.pid);
            kernel.crash.left.set(Some(step));
            let (next, request) = (bed.clone(), verb(&bed));
            let asked = tokio::task::spawn_local(async move { next.ask(request).await });
            until("the end of the verb or of the supervisor", || async {
                (asked.is_finished() || kernel.crash.happened.get()).then_some(())
            })
            .await;
            (kernel.crash.happened.get(), pid)
        });
        kernel.crash.left.set(None);
        kernel.crash.happened.set(false);
        block_on(async {
            let bed = Bed::new(&dir, &kernel);
            recovery::disks(&bed.lifecycle).await;
            until(&format!("{name}: a good end after step {step}"), || async {
                let rows = bed.rows().await;
                let calm = rows.iter().all(|row| row.doing.is_none());
                (calm && settled(&rows, pid)).then_some(())
            })
            .await;
            let unknown = |what: &What| matches!(what, What::Unknown { .. });
            assert!(!bed.events().iter().any(unknown), "{:?}", bed.events());
            bed.lifecycle.destroy_all(bed.registry().all()).await;
            bed.assert_nothing_left().await;
            for image in ["a.img", "b.img"] {
                let left = holder_of(&bed, image);
                assert_eq!(left, None, "{name}: the lease of {image} after step {step}");
            }
        });
        fs::remove_dir_all(&dir).expect("remove");
        if !crashed {
            return step;
        }
    }
    unreachable!("a verb has an end")
}

pub(crate) fn one(rows: &[Row]) -> &Row {
    assert_eq!(rows.len(), 1, "{rows:?}");
    &rows[0]
}

pub(crate) fn create(dir: &Path) -> Request {
    create_of(target(dir, "a.img"))
}

pub(crate) fn create_of(target: Target) -> Request {
    Request::Create(Box::new(control::supervisor::Create {
        open: control::tapdisk::Open::new(target),
        mode: control::supervisor::Mode::Write,
        minor: None,
        policy: control::supervisor::Policy::default(),
        arena_kib: 0,
        vbd: None,
        nbd: false,
        no_wait: false,
        files: Vec::new(),
    }))
}

#[test]
fn a_create_is_finished_or_leaves_nothing() {
    let steps = at_each_step(
        "create",
        |_| Vec::new(),
        |bed| create(&bed.dir),
        |rows, _| rows.is_empty() || one(rows).state == Some(State::Running),
    );
    // A record, a node, a process, and that it is served.
    assert!(steps >= 8, "{steps} steps");
}

#[test]
fn a_pause_is_finished_by_the_next_supervisor() {
    let steps = at_each_step(
        "pausing",
        |dir| vec![create(dir)],
        |_| pause(0),
        |rows, pid| {
            let row = one(rows);
            assert_eq!(row.pid, pid);
            matches!(row.state, Some(State::Paused | State::Running))
        },
    );
    assert!(steps >= 4, "{steps} steps");
}

#[test]
fn an_unpause_is_finished_by_the_next_supervisor() {
    for other in [false, true] {
        let steps = at_each_step(
            "unpausing",
            |dir| vec![create(dir), pause(0)],
            |bed| unpause(other.then(|| target(&bed.dir, "b.img"))),
            |rows, pid| {
                let row = one(rows);
                assert_eq!(row.pid, pid);
                let path = row.target.as_ref().and_then(Target::path);
                let new = path.expect("a target").ends_with("b.img");
                match row.state {
                    Some(State::Paused) => !new,
                    Some(State::Running) => new == other,
                    _ => false,
                }
            },
        );
        assert!(steps >= 4, "{steps} steps");
    }
}

#[test]
fn a_close_is_finished_by_the_next_supervisor() {
    let steps = at_each_step(
        "closing",
        |dir| vec![create(dir)],
        |_| close(),
        |rows, pid| {
            let row = one(rows);
            assert_eq!(row.pid, pid);
            match row.state {
                Some(State::Running) => row.target.is_some(),
                _ => row.target.is_none(),
            }
        },
    );
    assert!(steps >= 4, "{steps} steps");
}

#[test]
fn a_destroy_is_finished_by_the_next_supervisor() {
    let steps = at_each_step(
        "ending",
        |dir| vec![create(dir)],
        |_| Request::Destroy {
            which: which(0),
            timeout_s: 0,
            of: None,
        },
        |rows, pid| rows.is_empty() || (one(rows).pid == pid && one(rows).state.is_some()),
    );
    assert!(steps >= 6, "{steps} steps");
}

/// At any end of a supervisor, the lease of the image is given up with the disk: the check for that is in
/// [`at_each_step`].
#[test]
fn a_lease_is_given_up_by_the_next_supervisor() {
    let create = |dir: &Path| create_of(leased(dir, "a.img"));
    let destroy = || Request::Destroy {
        which: which(0),
        timeout_s: 0,
        of: None,
    };
    let any = |_: &[Row], _: Option<u32>| true;
    let none = |_: &Path| Vec::new();
    let served = |dir: &Path| vec![create(dir)];
    let paused = |dir: &Path| vec![create(dir), pause(0)];
    let other = |bed: &Bed| unpause(Some(leased(&bed.dir, "b.img")));
    let all = [
        at_each_step("lease-create", none, |bed| create(&bed.dir), any),
        at_each_step("lease-destroy", served, |_| destroy(), any),
        at_each_step("lease-pause", served, |_| pause(0), any),
        at_each_step("lease-close", served, |_| close(), any),
        at_each_step("lease-unpause", paused, other, any),
    ];
    // That it is taken and given up is on record, too.
    assert!(all.iter().all(|steps| *steps >= 6), "{all:?} steps");
}

#[test]
fn a_pause_that_timed_out_is_not_done() {
    test("slow", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        fs::write(bed.dir.join("slow"), "").expect("write");
        for _ in 0..2 {
            let failure = bed.ask(pause(1)).await.expect_err("it does not answer");
            assert_eq!(failure.code, Code::Timeout);
            let row = bed.row(0).await;
            assert_eq!(
                row.doing,
                Some(control::supervisor::PendingOperation::Pause)
            );
        }
        assert!(!bed.events().contains(&What::Paused));
        fs::remove_file(bed.dir.join("slow")).expect("remove");
        assert_eq!(bed.ask(pause(0)).await, Ok(Reply::Done));
        let row = bed.row(0).await;
        assert_eq!((row.state, row.doing), (Some(State::Paused), None));
        assert!(matches!(bed.ask(unpause(None)).await, Ok(Reply::Opened(_))));
        assert_eq!(bed.row(0).await.state, Some(State::Running));
    });
}

#[test]
fn a_pause_waits_until_the_io_of_a_dead_process_is_over() {
    test("fence", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let pid = bed.row(0).await.pid.expect("a process");
        fs::write(bed.dir.join("slow"), "").expect("write");
        bed.fencing(0, true);
        let asked = bed.ask(pause(1));
        let death = async {
            until("the question", || async {
                bed.log().contains(&"pause".to_owned()).then_some(())
            })
            .await;
            kill(pid);
        };
        let (answer, ()) = futures::future::join(asked, death).await;
        let failure = answer.expect_err("its I/O is not over");
        assert_eq!(failure.code, Code::Timeout);
        bed.fencing(0, false);
        assert_eq!(bed.ask(pause(0)).await, Ok(Reply::Done));
        assert_eq!(bed.row(0).await.pid, None);
    });
}

#[test]
fn an_unpause_that_failed_can_be_repeated_and_keeps_the_old_image() {
    test("again", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        bed.made(bed.create("a.img")).await;
        assert_eq!(bed.ask(pause(0)).await, Ok(Reply::Done));
        let other = || unpause(Some(target(&bed.dir, "b.img")));
        put(bed.dir.join("refuse"), "it is no image");
        for _ in 0..2 {
            let failure = bed.ask(other()).await.expect_err("refused");
            assert_eq!(failure.code, Code::Image);
            let row = bed.row(0).await;
            // The process that had the other image has ended.
            assert_eq!((row.state, row.doing), (None, None));
            let path = row.target.as_ref().and_then(Target::path);
            assert!(path.expect("a target").ends_with("a.img"));
            assert!(bed.ask(unpause(None)).await.is_err());
        }
        // The process may be replaced meanwhile.
        kill(bed.row(0).await.pid.expect("a process"));
        until("its end", || async {
            bed.row(0).await.pid.is_none().then_some(())
        })
        .await;
        assert!(bed.ask(unpause(None)).await.is_err());
        fs::remove_file(bed.dir.join("refuse")).expect("remove");
        assert!(matches!(bed.ask(unpause(None)).await, Ok(Reply::Opened(_))));
        assert_eq!(bed.log().last().map(String::as_str), Some("open w A"));
        // The image that was refused is free.
        let create = bed.create("b.img");
        bed.made(create).await;
    });
}

/// A verb that waited for something writes down what it has begun, and the end of the disk stays there.
#[test]
fn the_end_of_a_disk_is_not_written_over() {
    test("end-stays", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let disk = bed.registry().all().remove(0);
        bed.lifecycle.destroy_later(&disk);
        let begun = bed.registry().change(&disk, |record| {
            record.doing = Some(PendingOperation::Unpause);
        });
        begun.expect("written");
        assert_eq!(disk.doing(), Some(PendingOperation::Destroy));
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// A crash on the way to another image is known, and is reported exactly once.
#[test]
fn a_death_on_the_way_to_another_image_is_told_once() {
    test("death-told", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        bed.made(bed.create("a.img")).await;
        assert_eq!(bed.ask(pause(0)).await, Ok(Reply::Done));
        let first = bed.row(0).await.pid.expect("a process");
        fs::write(bed.dir.join("die"), "").expect("write");
        let died = bed.ask(unpause(Some(target(&bed.dir, "b.img")))).await;
        died.expect_err("it died");
        let disk = bed.registry().all().remove(0);
        assert!(disk.crashed.get());
        let told = |what: &What| matches!(what, What::Died { pid, .. } if *pid == first);
        let told = bed.events().iter().filter(|what| told(what)).count();
        assert_eq!(told, 1, "{:?}", bed.events());
    });
}

/// The disk got permission to shrink for this one image and moment.
#[test]
fn an_image_that_was_served_for_a_moment_may_not_shrink_later() {
    test("moment-shrink", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        bed.made(bed.create("a.img")).await;
        assert_eq!(bed.ask(pause(0)).await, Ok(Reply::Done));
        let pid = bed.row(0).await.pid.expect("a process");
        fs::write(bed.dir.join("hang"), "").expect("write");
        let asked = bed.ask(Request::Unpause {
            which: which(0),
            target: Some(target(&bed.dir, "b.img")),
            may_shrink: true,
            files: Vec::new(),
        });
        let death = async {
            until("the beginning", || async {
                let doing = bed.row(0).await.doing;
                (doing == Some(PendingOperation::Unpause)).then_some(())
            })
            .await;
            let mut nodes = bed.kernel.nodes.borrow_mut();
            nodes.get_mut(&0).expect("the node").committed += 1;
            drop(nodes);
            kill(pid);
            fs::remove_file(bed.dir.join("hang")).expect("remove");
        };
        let (answer, ()) = futures::future::join(asked, death).await;
        assert!(answer.is_err(), "{answer:?}");
        let disk = bed.registry().all().remove(0);
        until("it is served", || async {
            (bed.row(0).await.state == Some(State::Running)).then_some(())
        })
        .await;
        let open = disk.record.borrow().open.clone().expect("an image");
        assert!(open.target.path().expect("a path").ends_with("b.img"));
        assert!(!open.may_shrink, "it may shrink for ever");
    });
}

#[test]
fn an_image_that_was_served_for_a_moment_is_the_disks() {
    test("moment", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        bed.made(bed.create("a.img")).await;
        assert_eq!(bed.ask(pause(0)).await, Ok(Reply::Done));
        let pid = bed.row(0).await.pid.expect("a process");
        fs::write(bed.dir.join("hang"), "").expect("write");
        let asked = bed.ask(unpause(Some(target(&bed.dir, "b.img"))));
        let death = async {
            until("the beginning", || async {
                let doing = bed.row(0).await.doing;
                (doing == Some(control::supervisor::PendingOperation::Unpause)).then_some(())
            })
            .await;
            // It answered a request of the guest from the new image, and died.
            bed.kernel
                .nodes
                .borrow_mut()
                .get_mut(&0)
                .expect("the node")
                .committed += 1;
            tokio::time::sleep(Duration::from_millis(1)).await;
            kill(pid);
            fs::remove_file(bed.dir.join("hang")).expect("remove");
        };
        let (answer, ()) = futures::future::join(asked, death).await;
        assert!(answer.is_err(), "{answer:?}");
        until("it is served", || async {
            (bed.row(0).await.state == Some(State::Running)).then_some(())
        })
        .await;
        assert_eq!(bed.log().last().map(String::as_str), Some("open w B"));
    });
}
