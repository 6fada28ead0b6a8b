// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes that die or hang, and supervisors that do.

use super::bed::{block_on, kill, test, until, which, Bed, Succession};
use blktapctrl::{recovery, watchdog};
use control::supervisor::{HungAction, Reply, Request, What, Which};
use control::tapdisk::{Call, State};
use control::Code;
use std::fs;
use std::time::{Duration, Instant};

#[test]
fn a_dead_process_is_replaced_at_once() {
    test("replace", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        let first = bed.row(minor).await.pid.expect("a process");
        // The name leads to another image by now; the disk keeps its own.
        fs::rename(bed.dir.join("a.img"), bed.dir.join("b.img")).expect("rename");
        bed.image("a.img", "X");
        let start = Instant::now();
        kill(first);
        let row = until("a new process", || async {
            let row = bed.row(minor).await;
            (row.pid != Some(first) && row.restarts == 1).then_some(row)
        })
        .await;
        assert_eq!(row.state, Some(State::Running));
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(bed.log(), ["attach 0", "open w A", "attach 0", "open w A"]);
        let died = What::Died {
            pid: first,
            how: "was killed by signal 9".into(),
        };
        assert!(bed.events().contains(&died), "{:?}", bed.events());
        // As Xen's script block-tap does, which remembers the first process.
        let which = Which {
            pid: Some(first),
            ..which(minor)
        };
        let reply = bed
            .ask(Request::Destroy {
                which,
                timeout_s: 0,
                of: None,
            })
            .await;
        assert_eq!(reply, Ok(Reply::Done));
        bed.assert_nothing_left().await;
    });
}

/// Requests over a network may be executed for a minute after the death of their sender.
#[test]
fn a_successor_waits_until_the_io_of_the_dead_has_settled() {
    test("settle", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        let first = bed.row(minor).await.pid.expect("a process");
        bed.lifecycle.patience.set(Duration::from_millis(1));
        bed.fencing(minor, true);
        kill(first);
        bed.queried(20).await;
        // It can be paused meanwhile, which is not done before the I/O is over, and is done then.
        let pause = Request::Pause {
            which: which(minor),
            timeout_s: 1,
        };
        let failure = bed.ask(pause).await.expect_err("its I/O is not over");
        assert_eq!(failure.code, Code::Timeout);
        bed.queried(20).await;
        bed.fencing(minor, false);
        until("the end of the pause", || async {
            let row = bed.row(minor).await;
            (row.doing.is_none() && row.state.is_none()).then_some(())
        })
        .await;
        assert!(bed.events().contains(&What::Paused));
        // An unpause waits for the I/O, too.
        bed.fencing(minor, true);
        let unpause = bed.ask(Request::Unpause {
            which: which(minor),
            target: None,
            may_shrink: false,
            files: Vec::new(),
        });
        let settled = async {
            bed.queried(20).await;
            bed.fencing(minor, false);
        };
        let (unpaused, ()) = futures::future::join(unpause, settled).await;
        assert!(matches!(unpaused, Ok(Reply::Opened(_))), "{unpaused:?}");
        let failed = |what: &What| matches!(what, What::Failed { .. });
        assert!(!bed.events().iter().any(failed), "{:?}", bed.events());
    });
}

/// A verb that its limit ends while the process is dead is done all the same.
#[test]
fn a_verb_that_takes_too_long_is_tried_again() {
    test("finish-again", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        bed.lifecycle.patience.set(Duration::from_millis(1));
        fs::write(bed.dir.join("slow"), "").expect("write");
        let pause = Request::Pause {
            which: which(minor),
            timeout_s: 1,
        };
        let failure = bed.ask(pause).await.expect_err("it does not answer");
        assert_eq!(failure.code, Code::Timeout);
        let pid = bed.row(minor).await.pid.expect("a process");
        // The kernel does not answer either when it is looked for what the dead process left.
        bed.kernel.mute.set(Some(std::io::ErrorKind::Other));
        kill(pid);
        bed.queried(6).await;
        bed.kernel.mute.set(None);
        until("the end of the pause", || async {
            bed.row(minor).await.doing.is_none().then_some(())
        })
        .await;
        assert!(bed.events().contains(&What::Paused));
    });
}

#[test]
fn pauses_grow_while_it_keeps_dying_and_then_it_serves() {
    test("backoff", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        fs::write(bed.dir.join("die"), "").expect("write");
        kill(bed.row(minor).await.pid.expect("a process"));
        let pauses = |events: Vec<What>| -> Vec<u64> {
            let pause = |what| match what {
                What::Failed { retry_ms, .. } => Some(retry_ms),
                _ => None,
            };
            events.into_iter().filter_map(pause).collect()
        };
        until("three attempts", || async {
            (pauses(bed.events()).len() >= 3).then_some(())
        })
        .await;
        assert_eq!(pauses(bed.events())[..3], [100, 200, 400]);
        fs::remove_file(bed.dir.join("die")).expect("remove");
        until("the disk is served", || async {
            (bed.row(minor).await.state == Some(State::Running)).then_some(())
        })
        .await;
    });
}

#[test]
fn the_next_supervisor_takes_over() {
    let host = Succession::new("adopt");
    // The runtime ends with the first supervisor, as if it were killed.
    let (lives, dies) = block_on(async {
        let bed = host.bed();
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        bed.made(bed.create("a.img")).await;
        bed.made(bed.create("b.img")).await;
        // A process that has no disk yet is of no use to others.
        assert!(matches!(
            bed.ask(Request::Spawn).await,
            Ok(Reply::Pid { .. })
        ));
        (bed.row(0).await.pid, bed.row(1).await.pid)
    });
    kill(dies.expect("a process"));
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        let row = bed.row(0).await;
        assert_eq!((row.pid, row.state), (lives, Some(State::Running)));
        until("the dead one is replaced", || async {
            (bed.row(1).await.state == Some(State::Running)).then_some(())
        })
        .await;
        assert!(bed.row(1).await.pid != dies);
        // The image of a disk that was taken over is still not free.
        let create = Request::Create(Box::new(bed.create("a.img")));
        assert_eq!(bed.ask(create).await.expect_err("in use").code, Code::Busy);
        // Nor does its process end unseen. Another image in the place of its own is not taken.
        let path = bed.dir.join("b.img");
        let dies = bed.row(1).await.pid.expect("a process");
        fs::rename(&path, bed.dir.join("c.img")).expect("rename");
        fs::write(&path, "X").expect("an image");
        kill(dies);
        until("its replacement", || async {
            let row = bed.row(1).await;
            (row.state == Some(State::Running) && row.pid != Some(dies)).then_some(())
        })
        .await;
        assert_eq!(bed.log().last().map(String::as_str), Some("open w B"));
        kill(lives.expect("a process"));
        until("the other one is replaced", || async {
            let row = bed.row(0).await;
            (row.state == Some(State::Running) && row.pid != lives).then_some(())
        })
        .await;
        bed.lifecycle.destroy_all(bed.registry().all()).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn who_hangs_is_reported_or_killed() {
    test("hung", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        let reported = bed.made(bed.create("a.img")).await;
        let mut create = bed.create("b.img");
        create.policy.hung = HungAction::Kill;
        let killed = bed.made(create).await;
        let first = bed.row(killed).await.pid;
        let look = || {
            for disk in bed.registry().all() {
                watchdog::look(bed.registry(), &disk);
            }
        };
        look();
        for node in bed.kernel.nodes.borrow_mut().values_mut() {
            node.oldest_ns = 31_000_000_000;
        }
        look();
        look();
        let hung = |what: &What| matches!(what, What::Hung { .. });
        assert_eq!(bed.events().iter().filter(|what| hung(what)).count(), 2);
        until("the replacement", || async {
            (bed.row(killed).await.restarts == 1).then_some(())
        })
        .await;
        assert_ne!(bed.row(killed).await.pid, first);
        assert_eq!(bed.row(reported).await.restarts, 0);
    });
}

/// The kernel only counts them.
#[test]
fn flushes_that_failed_in_the_kernel_are_told_once() {
    let host = Succession::new("flushes");
    let told = |bed: &Bed, count| {
        let mut nodes = bed.kernel.nodes.borrow_mut();
        nodes.get_mut(&0).expect("the node").failed_flushes = count;
        drop(nodes);
        let disk = bed.registry().all().remove(0);
        watchdog::look(bed.registry(), &disk);
        watchdog::look(bed.registry(), &disk);
        let more = bed.events().into_iter().filter_map(|what| match what {
            What::Trouble { trouble, more, .. } if trouble.what == Call::Flush => Some(more),
            _ => None,
        });
        more.collect::<Vec<u64>>()
    };
    block_on(async {
        let bed = host.bed();
        bed.image("a.img", "A");
        let mut create = bed.create("a.img");
        // Whether the watchdog looks for processes that hang or not.
        create.policy.hung_after_s = 0;
        bed.made(create).await;
        assert_eq!(told(&bed, 0), [0; 0]);
        assert_eq!(told(&bed, 1), [0]);
        assert_eq!(told(&bed, 4), [0, 2]);
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        assert_eq!(told(&bed, 4), [0; 0]);
        assert_eq!(told(&bed, 5), [0]);
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn an_end_does_not_wait_for_who_hangs() {
    test("end", |bed| async move {
        bed.image("a.img", "A");
        fs::write(bed.dir.join("hang"), "").expect("write");
        let create = bed.ask(Request::Create(Box::new(bed.create("a.img"))));
        let end = async {
            until("the process", || async {
                let rows = bed.rows().await;
                rows.first().and_then(|row| row.pid)
            })
            .await;
            bed.destroy(0).await;
        };
        let (created, ()) = futures::future::join(create, end).await;
        assert_eq!(created.expect_err("taken away").code, Code::State);
        bed.assert_nothing_left().await;
    });
}

#[test]
fn an_end_does_not_wait_for_an_image_that_grows() {
    test("grow", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        fs::write(bed.dir.join("hang"), "").expect("write");
        let grow = bed.ask(Request::Grow {
            which: which(minor),
            size: 1 << 20,
        });
        let end = async {
            until("the question", || async {
                bed.log().contains(&"grow".into()).then_some(())
            })
            .await;
            bed.destroy(minor).await;
        };
        let start = Instant::now();
        let (grown, ()) = futures::future::join(grow, end).await;
        assert_eq!(grown.expect_err("taken away").code, Code::State);
        assert!(start.elapsed() < Duration::from_secs(30));
        bed.assert_nothing_left().await;
    });
}
