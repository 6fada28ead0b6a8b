// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a guest has written since its marks, and what may happen to those.

use super::bed::{kill, test, which, Bed};
use super::steps::{at_each_step, create, one, pause, unpause};
use control::supervisor::{Mode, Reply, Request, What};
use control::tapdisk::State;
use control::{Changed, Code, Extent, Failure, MarkName, MAX_MARKS};
use std::fs;
use std::path::PathBuf;

/// Bytes that are told apart.
const UNIT: u64 = 64 << 10;
/// Bytes of the disk.
const SIZE: u64 = 1 << 20;

fn name(name: &str) -> MarkName {
    name.parse().expect("a name")
}

fn mark(text: &str) -> Request {
    Request::Mark {
        which: which(0),
        name: name(text),
    }
}

fn forget(text: &str) -> Request {
    Request::Unmark {
        which: which(0),
        name: name(text),
    }
}

/// The names of the marks that there are then.
async fn marks(bed: &Bed, request: Request) -> Result<Vec<String>, Failure> {
    match bed.ask(request).await? {
        Reply::Marks { marks } => Ok(marks.iter().map(|mark| mark.name.to_string()).collect()),
        other => panic!("{other:?}"),
    }
}

/// The units that may have changed since a mark.
async fn since(bed: &Bed, text: &str) -> Result<Vec<u64>, Failure> {
    let request = Request::Changed {
        which: which(0),
        since: name(text),
        from: 0,
    };
    let Reply::Changed(Changed {
        size,
        extents,
        next: None,
    }) = bed.ask(request).await?
    else {
        panic!("no answer to that");
    };
    assert_eq!(size, SIZE);
    let all = |part: &Extent| (part.offset / UNIT)..(part.offset + part.length) / UNIT;
    Ok(extents.iter().flat_map(all).collect())
}

fn map(bed: &Bed, number: u64) -> PathBuf {
    bed.registry().folder.notes_of(0, number)
}

/// A process notes that it has written these units.
fn write(bed: &Bed, number: u64, units: &[u64]) {
    let path = map(bed, number);
    let mut bits = fs::read(&path).expect("a map");
    assert_eq!(bits.len(), 2, "16 units");
    for unit in units {
        bits[usize::try_from(unit / 8).expect("small")] |= 1 << (unit % 8);
    }
    fs::write(&path, bits).expect("write");
}

async fn disk(bed: &Bed) {
    bed.image("a.img", "A");
    bed.made(bed.create("a.img")).await;
}

#[test]
fn what_has_changed_since_each_mark_is_known() {
    test("marks", |bed| async move {
        disk(&bed).await;
        assert!(marks(&bed, Request::Marks(which(0)))
            .await
            .expect("none")
            .is_empty());
        let none = since(&bed, "a").await.expect_err("no mark");
        assert_eq!(none.code, Code::NotFound);
        assert!(none.message.contains("copy all of it"), "{none}");
        assert_eq!(marks(&bed, mark("a")).await.expect("set"), ["a"]);
        assert!(
            bed.log().contains(&format!("note {UNIT}")),
            "{:?}",
            bed.log()
        );
        assert!(since(&bed, "a").await.expect("a mark").is_empty());
        write(&bed, 1, &[1, 15]);
        assert_eq!(marks(&bed, mark("b")).await.expect("set"), ["a", "b"]);
        write(&bed, 2, &[2]);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 15]);
        assert_eq!(since(&bed, "b").await.expect("a mark"), [2]);
        let twice = marks(&bed, mark("a")).await.expect_err("there is one");
        assert_eq!(twice.code, Code::Exists);
        marks(&bed, mark("c")).await.expect("set");
        write(&bed, 3, &[3]);
        // What an older one needs of it stays.
        assert_eq!(marks(&bed, forget("b")).await.expect("gone"), ["a", "c"]);
        assert!(!map(&bed, 2).exists());
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 3, 15]);
        assert_eq!(since(&bed, "c").await.expect("a mark"), [3]);
        assert_eq!(
            since(&bed, "b").await.expect_err("gone").code,
            Code::NotFound
        );
        // It is being written, and stays until it is not.
        assert_eq!(marks(&bed, forget("c")).await.expect("gone"), ["a"]);
        write(&bed, 3, &[4]);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 3, 4, 15]);
        marks(&bed, mark("d")).await.expect("set");
        assert!(!map(&bed, 3).exists() && map(&bed, 4).exists());
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 3, 4, 15]);
        marks(&bed, forget("a")).await.expect("gone");
        assert!(!map(&bed, 1).exists());
        assert!(marks(&bed, forget("d")).await.expect("gone").is_empty());
        assert_eq!(bed.log().last().map(String::as_str), Some("note 0"));
        assert!(!map(&bed, 4).exists());
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn each_process_goes_on_noting() {
    test("marks-deaths", |bed| async move {
        disk(&bed).await;
        marks(&bed, mark("a")).await.expect("set");
        write(&bed, 1, &[1]);
        bed.replaced(0, kill).await;
        let goes_on = || {
            bed.log()
                .iter()
                .filter(|line| line.starts_with("goes on"))
                .count()
        };
        assert_eq!(goes_on(), 1);
        let handoff = Request::Handoff {
            which: which(0),
            program: None,
            timeout_s: 0,
        };
        bed.ask(handoff).await.expect("another process");
        assert_eq!(goes_on(), 2);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1]);
        // A program that does not know of marks: what it writes nobody notes.
        fs::write(bed.dir.join("old"), "").expect("write");
        bed.replaced(0, kill).await;
        assert_eq!(
            since(&bed, "a").await.expect_err("gone").code,
            Code::NotFound
        );
        let told = |what: &What| matches!(what, What::Unmarked { why } if why.contains("older"));
        assert!(bed.events().iter().any(told), "{:?}", bed.events());
        assert!(!map(&bed, 1).exists());
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_mark_that_no_process_knows_of_is_none() {
    test("marks-refused", |bed| async move {
        disk(&bed).await;
        fs::write(bed.dir.join("no-notes"), "it knows no notes").expect("write");
        let refused = marks(&bed, mark("a")).await.expect_err("refused");
        assert!(refused.message.contains("it knows no notes"), "{refused}");
        assert!(!map(&bed, 1).exists());
        assert!(marks(&bed, Request::Marks(which(0)))
            .await
            .expect("none")
            .is_empty());
        fs::remove_file(bed.dir.join("no-notes")).expect("remove");
        marks(&bed, mark("a")).await.expect("set");
        write(&bed, 1, &[1]);
        // Nobody knows whether it was heard: who asks again, or asks what has changed, finds out.
        fs::write(bed.dir.join("die-noting"), "").expect("write");
        marks(&bed, mark("b")).await.expect_err("it died");
        assert_eq!(
            marks(&bed, Request::Marks(which(0))).await.expect("one"),
            ["a"]
        );
        super::bed::until("the next process", || async {
            let row = bed.row(0).await;
            (row.state == Some(State::Running) && row.restarts == 1).then_some(())
        })
        .await;
        assert_eq!(marks(&bed, mark("b")).await.expect("set"), ["a", "b"]);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1]);
        for number in 2..MAX_MARKS {
            marks(&bed, mark(&format!("m{number}"))).await.expect("set");
        }
        let many = marks(&bed, mark("more")).await.expect_err("too many");
        assert!(many.message.contains("--forget"), "{many}");
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn marks_are_gone_when_others_may_have_written() {
    test("marks-paused", |bed| async move {
        disk(&bed).await;
        marks(&bed, mark("a")).await.expect("set");
        bed.ask(pause(0)).await.expect("paused");
        let paused = since(&bed, "a").await.expect_err("paused");
        assert_eq!(paused.code, Code::State);
        bed.ask(unpause(None)).await.expect("it goes on");
        assert_eq!(
            since(&bed, "a").await.expect_err("gone").code,
            Code::NotFound
        );
        assert!(!map(&bed, 1).exists());
        bed.destroy(0).await;
        let mut shared = bed.create("a.img");
        shared.mode = Mode::WriteShared;
        bed.made(shared).await;
        let refused = marks(&bed, mark("a")).await.expect_err("others write it");
        assert!(refused.message.contains("w!"), "{refused}");
    });
}

/// Whenever the supervisor ends, the next one serves the disk on, and leaves nothing of it.
#[test]
fn a_mark_that_is_interrupted_does_no_harm() {
    let steps = at_each_step(
        "mark",
        |dir| vec![create(dir)],
        |_| mark("a"),
        |rows, pid| one(rows).state == Some(State::Running) && one(rows).pid == pid,
    );
    assert!(steps >= 2, "{steps} steps");
}
