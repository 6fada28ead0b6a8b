// SPDX-License-Identifier: MIT OR Apache-2.0
//! Traces record a guest's requests across changes of its process and of the supervisor.

use super::bed::{block_on, kill, test, until, which, Bed, Succession};
use super::fake::put;
use super::steps::{at_each_step, create, one, pause, unpause};
use blktapctrl::recovery;
use control::supervisor::{Reply, Request, What};
use control::tapdisk::State;
use control::{Code, Failure, TraceTo, Tracing};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use trace::{Trace, TraceSegment};

/// Bytes of a file.
const SIZE: u64 = 16 << 20;

fn trace(path: &Path) -> Request {
    Request::Trace {
        which: which(0),
        to: Some(TraceTo {
            path: path.into(),
            data: true,
            size: SIZE,
        }),
    }
}

fn end() -> Request {
    Request::EndTrace(which(0))
}

/// The trace that there is then.
async fn asked(bed: &Bed, request: Request) -> Result<Option<Tracing>, Failure> {
    match bed.ask(request).await? {
        Reply::Trace { trace } => Ok(trace),
        other => panic!("{other:?}"),
    }
}

async fn is_on(bed: &Bed) -> Option<PathBuf> {
    let request = Request::Trace {
        which: which(0),
        to: None,
    };
    let trace = asked(bed, request).await.expect("an answer");
    trace.map(|trace| trace.path)
}

/// How many processes have written there.
fn processes(path: &Path) -> usize {
    let trace = Trace::open(File::open(path).expect("open")).expect("a trace");
    let read = |number: &u64| trace.segment(*number).expect("read");
    let all: Vec<TraceSegment> = trace.segments().iter().filter_map(read).collect();
    let opened = all.iter().flat_map(TraceSegment::records);
    opened
        .filter(|record| matches!(record.what, trace::What::Opened { .. }))
        .count()
}

fn handoff() -> Request {
    Request::Handoff {
        which: which(0),
        program: None,
        timeout_s: 0,
    }
}

async fn disk(bed: &Bed) {
    bed.image("a.img", "A");
    bed.made(bed.create("a.img")).await;
}

/// Why the last trace ended by itself.
fn why(bed: &Bed) -> Option<String> {
    let events = bed.events();
    let mut last = events.into_iter().rev();
    last.find_map(|what| match what {
        What::Untraced { why, .. } => Some(why),
        _ => None,
    })
}

#[test]
fn a_trace_outlives_processes_and_supervisors() {
    let host = Succession::new("trace");
    let path = host.dir.join("t");
    block_on(async {
        let bed = host.bed();
        disk(&bed).await;
        assert_eq!(is_on(&bed).await, None);
        let begun = asked(&bed, trace(&path)).await.expect("a trace");
        let begun = begun.expect("one");
        assert_eq!(
            (&begun.path, begun.data, begun.size),
            (&path, true, SIZE + 4096)
        );
        assert_eq!(processes(&path), 1);
        bed.replaced(0, kill).await;
        assert_eq!(processes(&path), 2);
        bed.ask(handoff()).await.expect("another process");
        assert_eq!(processes(&path), 3);
        bed.ask(pause(0)).await.expect("paused");
        bed.ask(unpause(None)).await.expect("it goes on");
        assert_eq!(processes(&path), 4);
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        assert_eq!(is_on(&bed).await.as_ref(), Some(&path));
        bed.replaced(0, kill).await;
        assert_eq!(processes(&path), 5);
        assert_eq!(asked(&bed, end()).await.expect("ended"), None);
        assert_eq!(bed.log().last().map(String::as_str), Some("trace off"));
        bed.replaced(0, kill).await;
        assert_eq!(processes(&path), 5);
        assert_eq!(is_on(&bed).await, None);
        assert_eq!(why(&bed), None);
        // It is the administrator's.
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
        assert!(path.exists());
    });
}

#[test]
fn what_cannot_be_traced_is_refused() {
    test("trace-refused", |bed| async move {
        let path = bed.dir.join("t");
        let refused = async |request: Request| {
            let failure = asked(&bed, request).await.expect_err("refused");
            (failure.code, failure.message)
        };
        assert_eq!(refused(trace(&path)).await.0, Code::NotFound);
        disk(&bed).await;
        let (code, message) = refused(end()).await;
        assert_eq!(code, Code::NotFound, "{message}");
        let (code, message) = refused(trace(&bed.dir.join("none/t"))).await;
        assert_eq!(code, Code::NotFound);
        assert!(message.contains("make its folder first"), "{message}");
        assert_eq!(refused(trace(Path::new("t"))).await.0, Code::Invalid);
        let small = Request::Trace {
            which: which(0),
            to: Some(TraceTo {
                path: path.clone(),
                data: false,
                size: 1 << 20,
            }),
        };
        assert!(refused(small).await.1.contains("--size"));
        fs::write(&path, "something").expect("write");
        let (code, message) = refused(trace(&path)).await;
        assert_eq!(code, Code::Exists);
        assert!(
            message.contains("name a file that is not there"),
            "{message}"
        );
        assert_eq!(fs::read(&path).expect("read"), b"something");
        fs::remove_file(&path).expect("remove");
        // The process has the last word.
        put(bed.dir.join("no-trace"), "it cannot write there");
        assert!(refused(trace(&path)).await.1.contains("cannot write there"));
        assert!(!path.exists());
        fs::remove_file(bed.dir.join("no-trace")).expect("remove");
        fs::write(bed.dir.join("die-tracing"), "").expect("write");
        refused(trace(&path)).await;
        assert!(!path.exists());
        until("the next process", || async {
            let row = bed.row(0).await;
            (row.state == Some(State::Running) && row.restarts == 1).then_some(())
        })
        .await;
        assert_eq!(is_on(&bed).await, None);
        asked(&bed, trace(&path)).await.expect("a trace");
        let (code, message) = refused(trace(&bed.dir.join("u"))).await;
        assert_eq!(code, Code::Exists);
        assert!(message.contains("`tap-ctl trace 0 --end`"), "{message}");
        asked(&bed, end()).await.expect("ended");
        bed.ask(pause(0)).await.expect("paused");
        let (code, message) = refused(trace(&bed.dir.join("u"))).await;
        assert_eq!(code, Code::State);
        assert!(message.contains("unpause it first"), "{message}");
        assert!(!bed.dir.join("u").exists());
        bed.destroy(0).await;
    });
}

#[test]
fn a_trace_that_cannot_go_on_ends_and_the_disk_does_not() {
    test("trace-ends", |bed| async move {
        let path = |name: &str| bed.dir.join(name);
        disk(&bed).await;
        asked(&bed, trace(&path("t"))).await.expect("a trace");
        let before = bed.row(0).await;
        put(path("untraced"), "No space left on device");
        until("the end of the trace", || async {
            why(&bed)
                .is_some_and(|why| why.contains("No space"))
                .then_some(())
        })
        .await;
        assert_eq!(is_on(&bed).await, None);
        let after = bed.row(0).await;
        assert_eq!((after.state, after.pid), (Some(State::Running), before.pid));
        // The process hears it once, and the recorded part stays.
        until("that the process is told", || async {
            (!path("untraced").exists()).then_some(())
        })
        .await;
        let told = |what: &&What| matches!(what, What::Untraced { .. });
        assert_eq!(bed.events().iter().filter(told).count(), 1);
        assert_eq!(processes(&path("t")), 1);
        // Its file is gone, and another one in its place.
        asked(&bed, trace(&path("u"))).await.expect("a trace");
        fs::remove_file(path("u")).expect("remove");
        fs::write(path("u"), "of somebody else").expect("write");
        bed.replaced(0, kill).await;
        until("the end of the trace", || async {
            why(&bed)
                .is_some_and(|why| why.contains("another file"))
                .then_some(())
        })
        .await;
        assert_eq!(is_on(&bed).await, None);
        assert_eq!(fs::read(path("u")).expect("read"), b"of somebody else");
        // A program that does not know of traces.
        asked(&bed, trace(&path("v"))).await.expect("a trace");
        fs::write(path("old"), "").expect("write");
        bed.ask(handoff()).await.expect("an older process");
        assert!(why(&bed).is_some_and(|why| why.contains("older")));
        let older = asked(&bed, trace(&path("w")))
            .await
            .expect_err("it does not know");
        assert!(older.message.contains("tap-ctl handoff"), "{older}");
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// Whenever the supervisor ends, the disk is served on, and what the next one says of its trace is so.
#[test]
fn a_trace_that_is_interrupted_does_no_harm() {
    for ends in [false, true] {
        let steps = at_each_step(
            if ends { "end-trace" } else { "trace" },
            |dir| {
                let begun = ends.then(|| trace(&dir.join("t")));
                [Some(create(dir)), begun].into_iter().flatten().collect()
            },
            |bed| match ends {
                true => end(),
                false => trace(&bed.dir.join("t")),
            },
            |rows, pid| one(rows).state == Some(State::Running) && one(rows).pid == pid,
        );
        assert!(steps >= 1, "{steps} steps");
    }
}
