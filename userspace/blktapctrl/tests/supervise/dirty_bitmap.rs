// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a guest has written since its marks, and what may happen to those.

use super::bed::{block_on, kill, test, until, which, Bed};
use super::fake::{put, FakeKernel};
use super::steps::{at_each_step, create, one, pause, unpause};
use blktapctrl::recovery;
use control::supervisor::{Mode, Reply, Request, What};
use control::tapdisk::{FdGrant, RequestedFile, State};
use control::{Changed, Code, Extent, Failure, Mark, MarkName, MAX_MARKS};
use std::fs;
use std::path::PathBuf;

/// Bytes of the disk for each bit.
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

fn list() -> Request {
    Request::Marks(which(0))
}

/// The names of the marks that there are then.
async fn marks(bed: &Bed, request: Request) -> Result<Vec<String>, Failure> {
    let marks = all(bed, request).await?;
    Ok(marks.iter().map(|mark| mark.name.to_string()).collect())
}

/// The marks that there are then.
async fn all(bed: &Bed, request: Request) -> Result<Vec<Mark>, Failure> {
    match bed.ask(request).await? {
        Reply::Marks { marks } => Ok(marks),
        other => panic!("{other:?}"),
    }
}

/// Asks for the parts that may have changed since a mark.
async fn changed(bed: &Bed, text: &str) -> Result<Changed, Failure> {
    let request = Request::Changed {
        which: which(0),
        since: name(text),
        from: 0,
    };
    match bed.ask(request).await? {
        Reply::Changed(changed) => Ok(changed),
        other => panic!("{other:?}"),
    }
}

/// The units that may have changed since a mark.
async fn since(bed: &Bed, text: &str) -> Result<Vec<u64>, Failure> {
    let Changed {
        size,
        extents,
        next,
        ..
    } = changed(bed, text).await?;
    assert_eq!((size, next), (SIZE, None));
    let all = |part: &Extent| (part.offset / UNIT)..(part.offset + part.length) / UNIT;
    Ok(extents.iter().flat_map(all).collect())
}

/// The maps that there are, the oldest first.
fn maps(bed: &Bed) -> Vec<PathBuf> {
    let folder = fs::read_dir(bed.registry().folder.notes()).expect("a folder");
    let mut maps: Vec<_> = folder.map(|entry| entry.expect("a file").path()).collect();
    maps.sort();
    maps
}

/// A process notes in the map of a number that it has written these units.
fn write(bed: &Bed, number: usize, units: &[u64]) {
    let path = &maps(bed)[number];
    let mut bits = fs::read(path).expect("a map");
    assert_eq!(bits.len(), 2, "16 units");
    for unit in units {
        bits[usize::try_from(unit / 8).expect("small")] |= 1 << (unit % 8);
    }
    fs::write(path, bits).expect("write");
}

async fn disk(bed: &Bed) {
    bed.image("a.img", "A");
    bed.made(bed.create("a.img")).await;
}

#[test]
fn what_has_changed_since_each_mark_is_known() {
    test("marks", |bed| async move {
        disk(&bed).await;
        assert!(marks(&bed, list()).await.expect("none").is_empty());
        let none = since(&bed, "a").await.expect_err("no mark");
        assert_eq!(none.code, Code::NotFound);
        assert!(none.message.contains("copy all of the disk"), "{none}");
        assert_eq!(marks(&bed, mark("a")).await.expect("set"), ["a"]);
        let noted = format!("note {UNIT}");
        assert!(bed.log().contains(&noted), "{:?}", bed.log());
        assert!(since(&bed, "a").await.expect("a mark").is_empty());
        write(&bed, 0, &[1, 15]);
        assert_eq!(marks(&bed, mark("b")).await.expect("set"), ["a", "b"]);
        write(&bed, 1, &[2]);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 15]);
        assert_eq!(since(&bed, "b").await.expect("a mark"), [2]);
        let twice = marks(&bed, mark("a")).await.expect_err("there is one");
        assert_eq!(twice.code, Code::Exists);
        marks(&bed, mark("c")).await.expect("set");
        write(&bed, 2, &[3]);
        // The bits that an older bitmap needs of it stay.
        assert_eq!(marks(&bed, forget("b")).await.expect("gone"), ["a", "c"]);
        assert_eq!(maps(&bed).len(), 2);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 3, 15]);
        assert_eq!(since(&bed, "c").await.expect("a mark"), [3]);
        assert_eq!(
            since(&bed, "b").await.expect_err("gone").code,
            Code::NotFound
        );
        // It is being written, and stays until it is not.
        assert_eq!(marks(&bed, forget("c")).await.expect("gone"), ["a"]);
        write(&bed, 1, &[4]);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 3, 4, 15]);
        marks(&bed, mark("d")).await.expect("set");
        assert_eq!(maps(&bed).len(), 2);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 3, 4, 15]);
        assert!(since(&bed, "d").await.expect("a mark").is_empty());
        marks(&bed, forget("a")).await.expect("gone");
        assert_eq!(maps(&bed).len(), 1);
        assert!(marks(&bed, forget("d")).await.expect("gone").is_empty());
        assert_eq!(bed.log().last().map(String::as_str), Some("note 0"));
        assert!(maps(&bed).is_empty());
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// The process asks in the middle of a verb, which waits for it.
async fn told(bed: &Bed, what: &[RequestedFile]) -> Result<Vec<String>, Failure> {
    let line = |what: &RequestedFile| serde_json::to_string(what).expect("json") + "\n";
    let lines: String = what.iter().map(line).collect();
    put(bed.dir.join("ask-later"), lines);
    let before = bed.log().len();
    bed.ask(Request::Resize(which(0))).await?;
    let log = bed.log().split_off(before);
    let told = log.iter().filter_map(|line| line.strip_prefix("told "));
    Ok(told.map(str::to_owned).collect())
}

#[test]
fn the_process_is_told_what_tap_ctl_is_told() {
    test("marks-told", |bed| async move {
        let json = |what: &FdGrant| serde_json::to_string(what).expect("json");
        let ask = |mark: &Mark| RequestedFile::Changed {
            mark: mark.number,
            size: SIZE,
            from: 0,
        };
        disk(&bed).await;
        let none = told(&bed, &[RequestedFile::Marks]).await.expect("told");
        assert_eq!(none, [json(&FdGrant::Marks(vec![]))]);
        marks(&bed, mark("a")).await.expect("set");
        write(&bed, 0, &[1, 15]);
        let both = all(&bed, mark("b")).await.expect("set");
        write(&bed, 1, &[2]);
        let questions = [RequestedFile::Marks, ask(&both[0]), ask(&both[1])];
        let mut wanted = vec![json(&FdGrant::Marks(both.clone()))];
        for name in ["a", "b"] {
            let changed = changed(&bed, name).await.expect("a mark");
            assert!(!changed.extents.is_empty());
            wanted.push(json(&FdGrant::Changed(changed)));
        }
        assert_eq!(told(&bed, &questions).await.expect("told"), wanted);
        // From a place on, and of a disk that has grown.
        let later = RequestedFile::Changed {
            mark: both[0].number,
            size: SIZE + UNIT,
            from: 3 * UNIT,
        };
        let extents = vec![Extent {
            offset: 15 * UNIT,
            length: 2 * UNIT,
        }];
        let changed = Changed {
            mark: both[0].number,
            size: SIZE + UNIT,
            extents,
            next: None,
        };
        let wanted = [json(&FdGrant::Changed(changed))];
        assert_eq!(told(&bed, &[later]).await.expect("told"), wanted);
        // It hears that a mark is gone, and is not told of another one that has its name.
        marks(&bed, forget("b")).await.expect("gone");
        assert_eq!(bed.log().last().map(String::as_str), Some("unmarked"));
        for again in [false, true] {
            if again {
                let new = all(&bed, mark("b")).await.expect("set");
                told(&bed, &[ask(&new[1])]).await.expect("the new one");
            }
            let gone = told(&bed, &[ask(&both[1])]).await.expect_err("gone");
            assert_eq!(gone.code, Code::NotFound, "{gone}");
        }
        fs::write(bed.dir.join("ask-later"), "").expect("write");
        put(bed.dir.join("size"), (SIZE / 2).to_string());
        bed.ask(Request::Resize(which(0))).await.expect("smaller");
        assert_eq!(bed.log().last().map(String::as_str), Some("unmarked"));
        let gone = told(&bed, &[ask(&both[0])]).await.expect_err("gone");
        assert_eq!(gone.code, Code::NotFound);
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn each_process_goes_on_noting() {
    test("marks-deaths", |bed| async move {
        disk(&bed).await;
        marks(&bed, mark("a")).await.expect("set");
        write(&bed, 0, &[1]);
        bed.replaced(0, kill).await;
        let goes_on = || {
            let goes_on = |line: &&String| line.starts_with("goes on");
            bed.log().iter().filter(goes_on).count()
        };
        assert_eq!(goes_on(), 1);
        let handoff = || Request::Handoff {
            which: which(0),
            program: None,
            timeout_s: 0,
        };
        bed.ask(handoff()).await.expect("another process");
        assert_eq!(goes_on(), 2);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1]);
        // A program that does not know of dirty bitmaps records no writes.
        fs::write(bed.dir.join("old"), "").expect("write");
        bed.ask(handoff()).await.expect("an older process");
        assert_eq!(
            since(&bed, "a").await.expect_err("gone").code,
            Code::NotFound
        );
        let told = |what: &What| matches!(what, What::Unmarked { why } if why.contains("older"));
        assert!(bed.events().iter().any(told), "{:?}", bed.events());
        assert!(maps(&bed).is_empty());
        let older = marks(&bed, mark("a")).await.expect_err("it does not know");
        assert!(older.message.contains("tap-ctl handoff"), "{older}");
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_mark_that_no_process_knows_of_is_none() {
    test("marks-refused", |bed| async move {
        disk(&bed).await;
        put(bed.dir.join("no-notes"), "it has no room");
        let refused = marks(&bed, mark("a")).await.expect_err("refused");
        assert!(refused.message.contains("it has no room"), "{refused}");
        assert!(maps(&bed).is_empty());
        assert!(marks(&bed, list()).await.expect("none").is_empty());
        fs::remove_file(bed.dir.join("no-notes")).expect("remove");
        marks(&bed, mark("a")).await.expect("set");
        write(&bed, 0, &[1]);
        // The supervisor does not know whether the process heard it, so it is none.
        fs::write(bed.dir.join("die-noting"), "").expect("write");
        let unknown = marks(&bed, mark("b")).await.expect_err("it died");
        assert!(unknown.message.contains("start it again"), "{unknown}");
        assert_eq!(marks(&bed, list()).await.expect("one"), ["a"]);
        until("the next process", || async {
            let row = bed.row(0).await;
            (row.state == Some(State::Running) && row.restarts == 1).then_some(())
        })
        .await;
        // The next process hears where to record writes.
        write(&bed, 1, &[2]);
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2]);
        assert_eq!(
            since(&bed, "b").await.expect_err("none").code,
            Code::NotFound
        );
        assert_eq!(marks(&bed, mark("b")).await.expect("set"), ["a", "b"]);
        assert_eq!(
            maps(&bed).len(),
            2,
            "what was left of the first one is in a's"
        );
        assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2]);
        assert!(since(&bed, "b").await.expect("a mark").is_empty());
        for number in 2..MAX_MARKS {
            let next = mark(&format!("m{number}"));
            marks(&bed, next).await.expect("set");
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
        bed.ask(unpause(None)).await.expect_err("it is not paused");
        assert_eq!(marks(&bed, list()).await.expect("a mark"), ["a"]);
        bed.ask(pause(0)).await.expect("paused");
        let paused = since(&bed, "a").await.expect_err("paused");
        assert_eq!(paused.code, Code::State);
        bed.ask(unpause(None)).await.expect("it goes on");
        assert_eq!(
            since(&bed, "a").await.expect_err("gone").code,
            Code::NotFound
        );
        assert!(maps(&bed).is_empty());
        // A missing file holds no process up.
        marks(&bed, mark("a")).await.expect("set");
        fs::remove_file(&maps(&bed)[0]).expect("remove");
        bed.replaced(0, kill).await;
        assert!(marks(&bed, list()).await.expect("none").is_empty());
        // No bitmap has the writes behind the end of a smaller disk.
        marks(&bed, mark("a")).await.expect("set");
        put(bed.dir.join("size"), (SIZE / 2).to_string());
        bed.ask(Request::Resize(which(0))).await.expect("smaller");
        assert!(marks(&bed, list()).await.expect("none").is_empty());
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

/// The supervisor ends at any step of a second mark; then the first one, or the second, is forgotten or set again.
#[test]
fn what_an_older_mark_knows_is_not_lost_by_the_next_one() {
    for step in 0..6 {
        let place = format!("supervise-{}-second-mark-{step}", std::process::id());
        let dir = std::env::temp_dir().join(place);
        fs::create_dir_all(&dir).expect("a folder");
        let kernel = FakeKernel::default();
        block_on(async {
            let bed = Bed::new(&dir, &kernel);
            disk(&bed).await;
            for text in ["a", "b"] {
                marks(&bed, mark(text)).await.expect("set");
            }
            write(&bed, 0, &[1]);
            write(&bed, 1, &[2]);
            kernel.crash.left.set(Some(step));
            let next = bed.clone();
            let asked = tokio::task::spawn_local(async move { next.ask(mark("c")).await });
            until("the end of the verb or of the supervisor", || async {
                (asked.is_finished() || kernel.crash.happened.get()).then_some(())
            })
            .await;
        });
        kernel.crash.left.set(None);
        kernel.crash.happened.set(false);
        block_on(async {
            let bed = Bed::new(&dir, &kernel);
            recovery::disks(&bed.lifecycle).await;
            // The process notes in the map that it was given last, or in the one before.
            let heard = |line: &&String| line.starts_with("note ");
            let noted = bed.log().iter().filter(heard).count();
            write(&bed, noted - 1, &[3]);
            assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 3]);
            marks(&bed, forget("b")).await.expect("gone");
            let file = maps(&bed).len().min(noted) - 1;
            write(&bed, file, &[4]);
            assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 3, 4]);
            match marks(&bed, list()).await.expect("marks").len() {
                2 => assert_eq!(noted, 3),
                _ => drop(marks(&bed, mark("c")).await.expect("set")),
            }
            assert_eq!(since(&bed, "a").await.expect("a mark"), [1, 2, 3, 4]);
            assert_eq!(marks(&bed, list()).await.expect("marks"), ["a", "c"]);
            bed.destroy(0).await;
            bed.assert_nothing_left().await;
        });
        fs::remove_dir_all(&dir).expect("remove");
    }
}
