// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mirrors: disks that are copied to another image and switch to that, and failures on the way.

use super::bed::{block_on, kill, test, until, which, Bed, Succession};
use super::fake::put;
use super::fd_broker::{ask, hello};
use super::sharing::stubbed;
use super::steps::{at_each_step, create, one, pause, unpause};
use blktapctrl::record::PartRole;
use blktapctrl::recovery;
use control::stats::{Mirror, Mirroring};
use control::supervisor::{Create, MirrorTo, Reply, Request, Row, What};
use control::tapdisk::{Open, RequestedFile, State};
use control::{Code, Failure, Target};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

fn target(dir: &Path, name: &str) -> Target {
    let text = format!("sync:{}", dir.join(name).display());
    text.parse().expect("a target")
}

fn question(dir: &Path, name: &str) -> Request {
    let to = MirrorTo {
        target: target(dir, name),
        rate: 1000,
    };
    Request::Mirror {
        which: which(0),
        to: Some(to),
    }
}

pub(crate) async fn asked(bed: &Bed, question: Request) -> Result<Mirror, Failure> {
    match bed.ask(question).await? {
        Reply::Mirror(mirror) => Ok(mirror),
        other => panic!("{other:?}"),
    }
}

async fn mirror(bed: &Bed, name: &str) -> Result<Mirror, Failure> {
    asked(bed, question(&bed.dir, name)).await
}

/// How far it is.
async fn now(bed: &Bed) -> Mirroring {
    let question = Request::Mirror {
        which: which(0),
        to: None,
    };
    asked(bed, question).await.expect("a mirror").state
}

/// A disk that is served from `a.img`, and another image.
async fn two(bed: &Bed) {
    bed.image("a.img", "A");
    bed.image("b.img", "B");
    bed.made(bed.create("a.img")).await;
}

/// Sets a process' answer about its mirror.
pub(crate) fn says(dir: &Path, what: &str) {
    put(dir.join("mirror"), what);
}

pub(crate) fn is_served_from(row: &Row, name: &str) -> bool {
    let path = row.target.as_ref().and_then(Target::path);
    row.state == Some(State::Running) && path.is_some_and(|path| path.ends_with(name))
}

/// The disk has the other image for itself.
fn has_part(bed: &Bed) -> bool {
    let disk = bed.registry().get(0).expect("a disk");
    let record = disk.record.borrow();
    let has = record
        .parts
        .iter()
        .any(|part| part.role == PartRole::Mirror);
    assert_eq!(has, record.mirror.is_some());
    has
}

pub(crate) fn is_marked(path: &Path) -> bool {
    let rights = fs::metadata(path).expect("stat").permissions().mode();
    rights & 0o222 == 0
}

pub(crate) async fn until_over(bed: &Bed) -> Mirroring {
    until("its end", || async {
        let now = now(bed).await;
        (!matches!(now, Mirroring::Copying | Mirroring::Same)).then_some(now)
    })
    .await
}

fn begun(bed: &Bed) -> usize {
    let log = bed.log();
    log.iter()
        .filter(|line| line.starts_with("mirror "))
        .count()
}

#[test]
fn a_disk_goes_on_in_the_image_that_it_was_copied_to() {
    test("mirror", |bed| async move {
        two(&bed).await;
        says(&bed.dir, "copying");
        let pid = bed.row(0).await.pid;
        let begins = mirror(&bed, "b.img").await.expect("it begins");
        assert_eq!(begins.state, Mirroring::Copying);
        assert!(has_part(&bed));
        // No other disk gets that image, and a second question changes nothing.
        let create = Request::Create(Box::new(bed.create("b.img")));
        let busy = bed.ask(create).await.expect_err("it is taken");
        assert!(busy.message.contains("b.img"), "{busy}");
        mirror(&bed, "b.img").await.expect("it runs");
        let other = mirror(&bed, "c.img").await.expect_err("there is one");
        assert!(other.message.contains("--cancel"), "{other}");
        assert_eq!(begun(&bed), 1);
        says(&bed.dir, "same");
        assert_eq!(until_over(&bed).await, Mirroring::Complete);
        let row = bed.row(0).await;
        assert!(is_served_from(&row, "b.img"), "{row:?}");
        // The one that had the old image has ended.
        assert_ne!(row.pid, pid);
        assert_eq!(
            bed.log(),
            [
                "attach 0",
                "open w A",
                "mirror 1000 sync B",
                "pause",
                "close",
                "attach 0",
                "open w B"
            ]
        );
        assert!(is_marked(&bed.dir.join("a.img")));
        let moved = |what: &What| match what {
            What::Moved(moved) => Some(moved.clone()),
            _ => None,
        };
        let moved = bed.events().iter().find_map(moved).expect("an event");
        assert_eq!(
            (&moved.to, moved.marked),
            (&target(&bed.dir, "b.img"), true)
        );
        assert!(moved.pause_us.is_some());
        bed.replaced(0, kill).await;
        assert!(is_served_from(&bed.row(0).await, "b.img"));
        bed.destroy(0).await;
        // As a configuration would have it that was not changed.
        let old = bed.ask(Request::Create(Box::new(bed.create("a.img"))));
        assert_eq!(old.await.expect_err("it is old").code, Code::Denied);
        bed.assert_nothing_left().await;
    });
}

/// An error that was met when both images were closed reaches the guest from the process that met it.
#[test]
fn a_process_that_owes_its_guest_an_error_goes_on_in_the_copy() {
    test("mirror-owes", |bed| async move {
        two(&bed).await;
        let pid = bed.row(0).await.pid;
        fs::write(bed.dir.join("owes-closed"), "").expect("write");
        says(&bed.dir, "same");
        mirror(&bed, "b.img").await.expect("it begins");
        assert_eq!(until_over(&bed).await, Mirroring::Complete);
        let row = bed.row(0).await;
        assert!(is_served_from(&row, "b.img"), "{row:?}");
        assert_eq!(row.pid, pid);
        assert!(is_marked(&bed.dir.join("a.img")));
        fs::remove_file(bed.dir.join("owes-closed")).expect("remove");
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_new_process_begins_anew_and_a_pause_is_no_end() {
    test("mirror-death", |bed| async move {
        two(&bed).await;
        says(&bed.dir, "copying");
        mirror(&bed, "b.img").await.expect("it begins");
        bed.replaced(0, kill).await;
        until("the next one", || async {
            (begun(&bed) == 2).then_some(())
        })
        .await;
        assert_eq!(bed.ask(pause(0)).await, Ok(Reply::Done));
        assert!(has_part(&bed));
        assert!(matches!(bed.ask(unpause(None)).await, Ok(Reply::Opened(_))));
        until("the next one", || async {
            (begun(&bed) == 3).then_some(())
        })
        .await;
        says(&bed.dir, "same");
        assert_eq!(until_over(&bed).await, Mirroring::Complete);
        assert!(is_served_from(&bed.row(0).await, "b.img"));
        bed.destroy(0).await;
    });
}

#[test]
fn one_that_fails_or_is_ended_leaves_the_disk_where_it_is() {
    test("mirror-fails", |bed| async move {
        two(&bed).await;
        says(&bed.dir, "refused");
        let refused = mirror(&bed, "b.img").await.expect_err("it is too small");
        assert_eq!(refused.code, Code::Image);
        assert!(!has_part(&bed));
        says(&bed.dir, "copying");
        mirror(&bed, "b.img").await.expect("it begins");
        says(&bed.dir, "no room");
        let why = "no room".to_owned();
        assert_eq!(until_over(&bed).await, Mirroring::Failed { why });
        let told = |what: &What| matches!(what, What::Mirrored { .. });
        assert!(bed.events().iter().any(told), "{:?}", bed.events());
        says(&bed.dir, "copying");
        mirror(&bed, "b.img").await.expect("it begins");
        // The guest learns of an error that it is owed from this process.
        fs::write(bed.dir.join("owes"), "").expect("write");
        let pid = bed.row(0).await.pid;
        let owes = asked(&bed, Request::EndMirror(which(0))).await;
        let owes = owes.expect_err("the guest has not been told");
        assert!(owes.message.contains("made durable"), "{owes}");
        assert!(has_part(&bed) && bed.row(0).await.pid == pid);
        fs::remove_file(bed.dir.join("owes")).expect("remove");
        let ended = asked(&bed, Request::EndMirror(which(0))).await;
        assert_eq!(ended.expect("it ends").state, Mirroring::Ended);
        assert!(!has_part(&bed));
        // Its process had the other image open.
        assert_eq!(
            bed.log()[bed.log().len() - 4..],
            ["pause", "close", "attach 0", "open w A"]
        );
        // It is free.
        let other = bed.create("b.img");
        bed.made(Create {
            minor: Some(1),
            ..other
        })
        .await;
        bed.destroy(1).await;
        // One that is not the same when both are closed.
        mirror(&bed, "b.img").await.expect("it begins");
        fs::write(bed.dir.join("slow"), "").expect("write");
        says(&bed.dir, "same");
        until("the question", || async {
            (bed.log().last()? == "pause").then_some(())
        })
        .await;
        says(&bed.dir, "copying");
        fs::remove_file(bed.dir.join("slow")).expect("remove");
        let over = until_over(&bed).await;
        assert!(matches!(over, Mirroring::Failed { .. }), "{over:?}");
        assert!(is_served_from(&bed.row(0).await, "a.img"));
        assert!(!is_marked(&bed.dir.join("a.img")));
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// The process is given a connection to the server that its disk is copied to, and to no other one.
#[test]
fn a_disk_goes_on_at_a_server() {
    test("mirror-export", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        says(&bed.dir, "copying");
        let socket = bed.dir.join("nbd.sock");
        let export = |name: &str| -> Target {
            let text = format!("nbd:unix:{}:exportname={name}", socket.display());
            text.parse().expect("a target")
        };
        let need = |name: &str| RequestedFile::Server {
            target: export(name),
        };
        let to = MirrorTo {
            target: export("b"),
            rate: 1000,
        };
        let question = || Request::Mirror {
            which: which(0),
            to: Some(to.clone()),
        };
        ask(&bed, "ask-mirror", &[need("other")]);
        let other = asked(&bed, question()).await.expect_err("it is not its");
        assert!(other.message.contains("is not served from"), "{other}");
        assert!(!has_part(&bed));
        let server = hello(UnixListener::bind(&socket).expect("a socket"));
        ask(&bed, "ask-mirror", &[need("b")]);
        asked(&bed, question()).await.expect("it begins");
        assert_eq!(server.join().expect("a server"), *b"hello");
        assert!(has_part(&bed));
        // No other disk gets that export before the mirror ends.
        let create = Create {
            open: Open::new(export("b")),
            ..bed.create("a.img")
        };
        let busy = bed.ask(Request::Create(Box::new(create))).await;
        let busy = busy.expect_err("it is taken");
        assert!(busy.message.contains("tap disk 0"), "{busy}");
        ask(&bed, "ask-mirror", &[]);
        says(&bed.dir, "same");
        assert_eq!(until_over(&bed).await, Mirroring::Complete);
        assert_eq!(bed.row(0).await.target, Some(export("b")));
        assert!(is_marked(&bed.dir.join("a.img")));
        bed.replaced(0, kill).await;
        assert_eq!(bed.row(0).await.target, Some(export("b")));
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn what_cannot_be_copied_or_copied_to_is_refused() {
    test("mirror-refused", |bed| async move {
        two(&bed).await;
        says(&bed.dir, "copying");
        let itself = mirror(&bed, "a.img").await.expect_err("it is itself");
        assert_eq!(itself.code, Code::Busy, "{itself}");
        let none = mirror(&bed, "none.img").await.expect_err("there is none");
        assert_eq!(none.code, Code::NotFound, "{none}");
        let ram = Request::Mirror {
            which: which(0),
            to: Some(MirrorTo {
                target: "ram:1M".parse().expect("a target"),
                rate: 1,
            }),
        };
        let ram = bed.ask(ram).await.expect_err("it is no image");
        assert_eq!(ram.code, Code::Invalid, "{ram}");
        bed.kernel.full.set(true);
        let full = mirror(&bed, "b.img").await.expect_err("full");
        assert!(full.message.contains("/run full"), "{full}");
        bed.kernel.full.set(false);
        assert!(!has_part(&bed));
        // One that another disk has.
        let other = bed.create("b.img");
        bed.made(Create {
            minor: Some(1),
            open: Open::new(target(&bed.dir, "b.img")),
            ..other
        })
        .await;
        let busy = mirror(&bed, "b.img").await.expect_err("it is used");
        assert!(busy.message.contains("tap disk 1"), "{busy}");
        assert!(!has_part(&bed));
        assert_eq!(begun(&bed), 0);
        bed.destroy(1).await;
        bed.destroy(0).await;
    });
}

#[test]
fn the_next_supervisor_goes_on() {
    let host = Succession::new("mirror-next");
    block_on(async {
        let bed = host.bed();
        two(&bed).await;
        says(&bed.dir, "copying");
        mirror(&bed, "b.img").await.expect("it begins");
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        assert_eq!(now(&bed).await, Mirroring::Copying);
        says(&bed.dir, "same");
        assert_eq!(until_over(&bed).await, Mirroring::Complete);
        assert_eq!(begun(&bed), 1);
        assert!(is_served_from(&bed.row(0).await, "b.img"));
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// The supervisor ends at any step: the disk is served from one of the two, and that one is whole.
#[test]
fn a_move_that_is_interrupted_comes_to_an_end() {
    for last in ["copying", "same"] {
        let steps = at_each_step(
            &format!("mirror-{last}"),
            |dir| {
                says(dir, last);
                vec![create(dir)]
            },
            |bed| question(&bed.dir, "b.img"),
            |rows, _| {
                let row = one(rows);
                let path = row.target.as_ref().and_then(Target::path);
                let dir = path.and_then(Path::parent).expect("a folder");
                // The next supervisor finishes what is on the record.
                says(dir, "same");
                is_served_from(row, "b.img") && is_marked(&dir.join("a.img"))
                    || is_served_from(row, "a.img") && !is_marked(&dir.join("a.img"))
            },
        );
        assert!(steps >= 1, "{steps} steps");
    }
}

/// Another user of the image would stay with the old one.
#[test]
fn an_image_that_is_shared_is_not_left_and_one_that_is_left_not_shared() {
    test("mirror-stub", |bed| async move {
        let of = stubbed(&bed);
        bed.image("b.img", "B");
        bed.made(of(4)).await;
        says(&bed.dir, "copying");
        mirror(&bed, "b.img").await.expect("it begins");
        let second = bed.ask(Request::Create(Box::new(of(3)))).await;
        let second = second.expect_err("it would be left behind");
        assert!(second.message.contains("is being copied"), "{second}");
        let ended = asked(&bed, Request::EndMirror(which(0))).await;
        assert_eq!(ended.expect("it ends").state, Mirroring::Ended);
        bed.made(of(3)).await;
        let shared = mirror(&bed, "b.img").await.expect_err("it is shared");
        assert_eq!(shared.code, Code::Busy, "{shared}");
        assert!(!has_part(&bed));
    });
}
