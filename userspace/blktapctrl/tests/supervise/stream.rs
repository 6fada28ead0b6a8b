// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images that take over what is below them, and what may happen on the way.

use super::bed::{block_on, kill, test, until, which, Bed, Succession};
use super::fake::put;
use super::steps::{pause, unpause};
use blktapctrl::record::PartRole;
use blktapctrl::recovery;
use control::stats::{Stream, Streaming};
use control::supervisor::{Reply, Request, What};
use control::tapdisk::State;
use control::{Code, Failure, Target};
use std::rc::Rc;

/// A disk that is served from `b.qcow2` over `a.img`.
async fn over(bed: &Bed) -> Target {
    bed.image("a.img", "A");
    bed.made(bed.create("a.img")).await;
    let target = image(bed, "b.qcow2");
    snapshot(bed, &target).await;
    assert_eq!(parents(bed), 1);
    target
}

fn image(bed: &Bed, name: &str) -> Target {
    let text = format!("qcow2:{}", bed.dir.join(name).display());
    text.parse().expect("a target")
}

async fn snapshot(bed: &Bed, target: &Target) {
    let snapshot = Request::Snapshot {
        which: which(0),
        target: target.clone(),
    };
    let taken = bed.ask(snapshot).await;
    assert!(matches!(taken, Ok(Reply::Snapshot(_))), "{taken:?}");
}

/// Parents that the disk has on record.
fn parents(bed: &Bed) -> usize {
    let disk = bed.registry().get(0).expect("a disk");
    let record = disk.record.borrow();
    let parents = record
        .parts
        .iter()
        .filter(|part| part.role == PartRole::Parent);
    parents.count()
}

async fn stream(bed: &Bed, rate: Option<u64>) -> Result<Stream, Failure> {
    let question = Request::Stream {
        which: which(0),
        rate,
    };
    match bed.ask(question).await? {
        Reply::Stream(stream) => Ok(stream),
        other => panic!("{other:?}"),
    }
}

/// Sets a process' answer about its stream.
fn says(bed: &Bed, what: &str) {
    put(bed.dir.join("stream"), what);
}

/// Returns the number of requests to a process to begin one.
fn begun(bed: &Bed) -> usize {
    let log = bed.log();
    log.iter().filter(|line| *line == "stream 1000").count()
}

async fn ended(bed: &Bed, target: &Target) -> Streaming {
    let of = |what: &What| match what {
        What::Streamed {
            target: of,
            outcome,
        } if of == target => Some(outcome.clone()),
        _ => None,
    };
    until("its end", || async {
        bed.events().iter().rev().find_map(of)
    })
    .await
}

#[test]
fn what_an_image_needs_no_more_is_not_the_disks() {
    test("stream", |bed| async move {
        let target = over(&bed).await;
        let none = stream(&bed, None).await.expect_err("there is none");
        assert_eq!(none.code, Code::State);
        says(&bed, "running");
        let first = stream(&bed, Some(1000)).await.expect("it begins");
        assert_eq!(first.state, Streaming::Running);
        // The next process gets the question as well.
        bed.replaced(0, kill).await;
        until("the next one", || async {
            (begun(&bed) == 2).then_some(())
        })
        .await;
        assert_eq!(parents(&bed), 1);
        says(&bed, "done");
        assert_eq!(ended(&bed, &target).await, Streaming::Done);
        assert_eq!(parents(&bed), 0);
        let last = stream(&bed, None).await.expect("there was one");
        assert_eq!(last.state, Streaming::Done);
        // No process gets the question any more.
        bed.replaced(0, kill).await;
        assert_eq!(begun(&bed), 2);
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn one_that_fails_or_is_refused_changes_nothing() {
    test("stream-fails", |bed| async move {
        let target = over(&bed).await;
        says(&bed, "refused");
        let refused = stream(&bed, Some(1000)).await.expect_err("it cannot");
        assert_eq!(refused.code, Code::Unsupported);
        says(&bed, "running");
        stream(&bed, Some(1000)).await.expect("it begins");
        says(&bed, "no room");
        let why = "no room".to_owned();
        let failed = Streaming::Failed { why };
        assert_eq!(ended(&bed, &target).await, failed);
        assert_eq!(parents(&bed), 1);
        let last = stream(&bed, None).await.expect("there was one");
        assert_eq!(last.state, failed);
        // A stream that an administrator ends reports nothing.
        says(&bed, "running");
        stream(&bed, Some(1000)).await.expect("it begins");
        let last = stream(&bed, Some(0)).await.expect("it ends");
        assert_eq!(last.state, Streaming::Ended);
        assert!(bed.log().contains(&"stream 0".to_owned()));
        // A stream that cannot be recorded does not run.
        bed.kernel.full.set(true);
        let full = stream(&bed, Some(1000)).await.expect_err("full");
        assert!(full.message.contains("/run full"), "{full}");
        bed.kernel.full.set(false);
        bed.destroy(0).await;
    });
}

#[test]
fn it_waits_for_a_disk_that_is_paused_and_ends_with_its_image() {
    test("stream-image", |bed| async move {
        let first = over(&bed).await;
        says(&bed, "running");
        stream(&bed, Some(1000)).await.expect("it begins");
        assert_eq!(bed.ask(pause(0)).await, Ok(Reply::Done));
        assert!(matches!(bed.ask(unpause(None)).await, Ok(Reply::Opened(_))));
        assert_eq!(
            stream(&bed, None).await.expect("runs").state,
            Streaming::Running
        );
        // The image that it was for is one below the disk's now.
        snapshot(&bed, &image(&bed, "c.qcow2")).await;
        assert_eq!(ended(&bed, &first).await, Streaming::Ended);
        assert!(parents(&bed) > 0);
        assert_eq!(bed.row(0).await.state, Some(State::Running));
        bed.destroy(0).await;
    });
}

#[test]
fn the_next_supervisor_goes_on() {
    let two = Succession::new("stream-next");
    let target = block_on(async {
        let bed = two.bed();
        let target = over(&bed).await;
        says(&bed, "running");
        stream(&bed, Some(1000)).await.expect("it begins");
        target
    });
    block_on(async {
        let bed: Rc<Bed> = two.bed();
        recovery::disks(&bed.lifecycle).await;
        assert_eq!(
            stream(&bed, None).await.expect("runs").state,
            Streaming::Running
        );
        says(&bed, "done");
        assert_eq!(ended(&bed, &target).await, Streaming::Done);
        assert_eq!(parents(&bed), 0);
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}
