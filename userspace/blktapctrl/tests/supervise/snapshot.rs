// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshots: disks that switch to a new image over their present one, and failures on the way.

use super::bed::{kill, test, until, which, Bed};
use super::fake::put;
use super::steps::{at_each_step, create, one};
use blktapctrl::disk::Disk;
use blktapctrl::watchdog;
use control::supervisor::{Create, Mode, Reply, Request, Row, Snapshot, What};
use control::tapdisk::{Open, State};
use control::{Code, Failure, Target};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn target(dir: &Path, name: &str) -> Target {
    let text = format!("qcow2:{}", dir.join(name).display());
    text.parse().expect("a target")
}

fn snapshot(dir: &Path, name: &str) -> Request {
    Request::Snapshot {
        which: which(0),
        target: target(dir, name),
    }
}

async fn taken(bed: &Bed, name: &str) -> Snapshot {
    match bed.ask(snapshot(&bed.dir, name)).await {
        Ok(Reply::Snapshot(taken)) => taken,
        other => panic!("{other:?}"),
    }
}

async fn refused(bed: &Bed, name: &str) -> Failure {
    let answer = bed.ask(snapshot(&bed.dir, name)).await;
    answer.expect_err("it is refused")
}

/// Whether its mode has no write permission.
fn is_marked(path: &Path) -> bool {
    let rights = fs::metadata(path).expect("stat").permissions().mode();
    rights & 0o222 == 0
}

/// Returns the content that a fake process puts into an image over another one.
fn over(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    format!("{{\"kind\":\"parent\",\"path\":\"{}\"}}", path.display())
}

fn is_served_from(row: &Row, name: &str) -> bool {
    let path = row.target.as_ref().and_then(Target::path);
    row.state == Some(State::Running) && path.is_some_and(|path| path.ends_with(name))
}

async fn make_both(bed: &Bed) {
    for (name, content) in [("a.img", "A"), ("b.img", "B")] {
        bed.image(name, content);
        bed.made(bed.create(name)).await;
    }
}

/// Disks 0 and 1, of a.img and b.img, in new images at one instant.
fn both(dir: &Path, names: [&str; 2]) -> Request {
    let disks = [1, 0].map(|minor| (which(minor), target(dir, names[minor as usize])));
    Request::Snapshots {
        disks: disks.into(),
    }
}

#[test]
fn disks_go_on_at_one_instant() {
    test("snapshots", |bed| async move {
        make_both(&bed).await;
        let before = bed.log().len();
        let ask = || bed.ask(both(&bed.dir, ["c.qcow2", "d.qcow2"]));
        let Ok(Reply::Snapshots { taken }) = ask().await else {
            panic!("not taken");
        };
        let minors: Vec<u32> = taken.iter().map(|taken| taken.minor).collect();
        assert_eq!(minors, [0, 1]);
        // None was served again before none was served any more.
        let log = bed.log().split_off(before);
        let last_end = log.iter().rposition(|line| line.starts_with("pause"));
        let first_begin = log
            .iter()
            .position(|line| line.contains("open w") || line.contains("unpause w"));
        assert!(last_end.is_some() && last_end < first_begin, "{log:?}");
        for (minor, name) in [(0, "c.qcow2"), (1, "d.qcow2")] {
            assert!(is_served_from(&bed.row(minor).await, name));
        }
        // The answer got lost.
        let Ok(Reply::Snapshots { taken: again }) = ask().await else {
            panic!("not taken");
        };
        assert_eq!(again.len(), taken.len());
    });
}

#[test]
fn disks_are_served_as_before_if_one_cannot_go_on() {
    test("snapshots-fail", |bed| async move {
        make_both(&bed).await;
        // There is something already where one of the new images is to be.
        bed.image("there.qcow2", "x");
        let before = bed.log().len();
        for names in [["c.qcow2", "there.qcow2"], ["there.qcow2", "c.qcow2"]] {
            bed.ask(both(&bed.dir, names)).await.expect_err("refused");
            for (minor, name) in [(0, "a.img"), (1, "b.img")] {
                until("it is served as before", || async {
                    let row = bed.row(minor).await;
                    (row.doing.is_none() && is_served_from(&row, name)).then_some(())
                })
                .await;
            }
            assert!(!bed.dir.join("c.qcow2").exists(), "a new image is left");
        }
        // No guest had to wait for a refused snapshot.
        let log = bed.log().split_off(before);
        assert!(!log.iter().any(|line| line.starts_with("pause")), "{log:?}");
        // A name twice, and a disk that is not there.
        let failure = bed.ask(both(&bed.dir, ["c.qcow2", "c.qcow2"])).await;
        assert_eq!(failure.expect_err("refused").code, Code::Invalid);
        let disks = vec![
            (which(0), target(&bed.dir, "c.qcow2")),
            (which(7), target(&bed.dir, "d.qcow2")),
        ];
        let failure = bed.ask(Request::Snapshots { disks }).await;
        assert_eq!(failure.expect_err("refused").code, Code::NotFound);
        // One that is paused.
        let (which, timeout_s) = (which(1), 0);
        bed.ask(Request::Pause { which, timeout_s })
            .await
            .expect("paused");
        bed.ask(both(&bed.dir, ["c.qcow2", "d.qcow2"]))
            .await
            .expect_err("refused");
        assert!(is_served_from(&bed.row(0).await, "a.img"));
        assert!(!bed.dir.join("c.qcow2").exists() && !bed.dir.join("d.qcow2").exists());
    });
}

#[test]
fn a_group_of_which_one_was_taken_before_is_told_apart() {
    test("snapshots-partly", |bed| async move {
        make_both(&bed).await;
        taken(&bed, "c.qcow2").await;
        let partly = bed.ask(both(&bed.dir, ["c.qcow2", "d.qcow2"])).await;
        let partly = partly.expect_err("refused");
        assert_eq!(partly.code, Code::State);
        assert!(partly.message.contains("new one: 0;"), "{partly}");
        assert!(is_served_from(&bed.row(1).await, "b.img"));
        assert!(!bed.dir.join("d.qcow2").exists());
    });
}

#[test]
fn a_disk_that_waits_for_others_is_not_taken_for_hung() {
    test("snapshots-wait", |bed| async move {
        make_both(&bed).await;
        fs::write(bed.dir.join("slow-1"), "").expect("write");
        let disks = [0, 1].map(|minor| {
            let disks = bed.registry().all();
            let disk = disks.into_iter().find(|disk| disk.minor == minor);
            disk.expect("a disk")
        });
        let asked = bed.ask(both(&bed.dir, ["c.qcow2", "d.qcow2"]));
        let look = async {
            until("one waits for the other", || async {
                disks[0].waits_for_others.get().then_some(())
            })
            .await;
            for node in bed.kernel.nodes.borrow_mut().values_mut() {
                node.oldest_ns = 31_000_000_000;
            }
            for disk in &disks {
                watchdog::look(bed.registry(), disk);
            }
            let hung = |disk: &Disk| disk.hung.get();
            assert!(!hung(&disks[0]) && hung(&disks[1]));
            fs::remove_file(bed.dir.join("slow-1")).expect("remove");
        };
        let (taken, ()) = futures::future::join(asked, look).await;
        assert!(matches!(taken, Ok(Reply::Snapshots { .. })), "{taken:?}");
        assert!(!disks[0].waits_for_others.get());
    });
}

/// The process has failed to write something that the guest still has to hear of: no other process knows that.
#[test]
fn a_process_that_owes_its_guest_an_error_stays() {
    test("snapshot-owes", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let pid = bed.row(0).await.pid;
        // Known at once, or only when it has closed its image.
        for name in ["owes", "owes-closed"] {
            fs::write(bed.dir.join(name), "").expect("write");
            let owes = refused(&bed, "b.qcow2").await;
            assert!(owes.message.contains("made durable"), "{owes}");
            fs::remove_file(bed.dir.join(name)).expect("remove");
            assert_as_before(&bed).await;
            assert_eq!(bed.row(0).await.pid, pid);
        }
        taken(&bed, "b.qcow2").await;
    });
}

#[test]
fn a_disk_that_is_taken_away_leaves_no_new_image() {
    test("snapshot-destroyed", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        fs::write(bed.dir.join("slow-overlay"), "").expect("write");
        let asked = bed.ask(snapshot(&bed.dir, "b.qcow2"));
        let end = async {
            until("a new image", || async {
                bed.dir.join("b.qcow2").exists().then_some(())
            })
            .await;
            bed.destroy(0).await;
        };
        let (taken, ()) = futures::future::join(asked, end).await;
        assert_eq!(taken.expect_err("it is gone").code, Code::State);
        assert!(!bed.dir.join("b.qcow2").exists(), "it is left");
        bed.assert_nothing_left().await;
    });
}

/// Checks that the disk is as it was before the request.
async fn assert_as_before(bed: &Bed) {
    until("it is served again", || async {
        let row = bed.row(0).await;
        (row.doing.is_none() && is_served_from(&row, "a.img")).then_some(())
    })
    .await;
    assert!(!bed.dir.join("b.qcow2").exists(), "something is left");
    assert!(!is_marked(&bed.dir.join("a.img")));
}

#[test]
fn a_disk_goes_on_in_a_new_image() {
    test("snapshot", |bed| async move {
        let dir = &bed.dir;
        let first = bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let pid = bed.row(0).await.pid;
        let one = taken(&bed, "b.qcow2").await;
        assert_eq!(
            (&one.target, &one.parent, one.marked),
            (&target(dir, "b.qcow2"), &first, true)
        );
        assert!(one.pause_us.is_some());
        let row = bed.row(0).await;
        assert!(is_served_from(&row, "b.qcow2"));
        assert_eq!((row.pid, row.doing), (pid, None));
        let child = over(dir, "a.img");
        // The new image was complete before the guest had to wait, and got its backing image when that was closed.
        assert_eq!(
            bed.log(),
            [
                "attach 0",
                "open w A",
                "overlay qcow2",
                "pause",
                "given A Locked",
                &format!("unpause w {child}")
            ]
        );
        assert!(is_marked(&first));
        assert_eq!(fs::read_to_string(&first).expect("read"), "A");
        assert!(bed.events().contains(&What::Snapshot(one)));
        // Once more, on top: what the process had of the first image goes with it.
        let two = taken(&bed, "c.qcow2").await;
        assert_eq!(two.parent, dir.join("b.qcow2"));
        assert!(is_marked(&two.parent));
        assert_ne!(bed.row(0).await.pid, pid);
        // A caller that did not hear the answer asks again.
        let again = taken(&bed, "c.qcow2").await;
        assert_eq!(again.pause_us, None);
        assert_eq!((again.target, again.parent), (two.target, two.parent));
        bed.replaced(0, kill).await;
        assert!(is_served_from(&bed.row(0).await, "c.qcow2"));
        bed.destroy(0).await;
        // As a configuration would have it that was not changed.
        let answer = bed.ask(Request::Create(Box::new(bed.create("a.img"))));
        let failure = answer.await.expect_err("it has children");
        assert_eq!(failure.code, Code::Denied);
        assert!(failure.message.contains("after a snapshot"), "{failure}");
        // And one that was: what is marked may be had.
        bed.made(bed.create("c.qcow2")).await;
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn what_is_there_and_what_cannot_go_on_is_refused() {
    test("snapshot-refused", |bed| async move {
        let dir = &bed.dir;
        bed.image("a.img", "A");
        bed.image("there.qcow2", "THERE");
        bed.made(bed.create("a.img")).await;
        let exists = refused(&bed, "there.qcow2").await;
        assert_eq!(exists.code, Code::Exists, "{exists}");
        let text = fs::read_to_string(dir.join("there.qcow2"));
        assert_eq!(text.expect("read"), "THERE");
        assert_eq!(refused(&bed, "a.img").await.code, Code::Exists);
        assert_eq!(refused(&bed, "none/b.qcow2").await.code, Code::NotFound);
        let raw = Request::Snapshot {
            which: which(0),
            target: format!("aio:{}", dir.join("b.img").display())
                .parse()
                .expect("a target"),
        };
        let failure = bed.ask(raw).await.expect_err("a raw image has no parent");
        assert_eq!(failure.code, Code::Invalid);
        // Options of a new disk are refused for its next image.
        for words in ["bps=1M,", "iops=70,", "group=some,", "shared=yes,"] {
            let text = format!("{words}{}", target(dir, "b.qcow2"));
            let words = Request::Snapshot {
                which: which(0),
                target: text.parse().expect("a target"),
            };
            let failure = bed.ask(words).await.expect_err("it is of the disk");
            assert_eq!(failure.code, Code::Invalid, "{failure}");
            assert!(failure.message.contains("remove "), "{failure}");
            assert!(!dir.join("b.qcow2").exists());
        }
        // A snapshot that cannot be recorded does not begin.
        bed.kernel.full.set(true);
        let full = refused(&bed, "b.qcow2").await;
        assert!(full.message.contains("/run full"), "{full}");
        bed.kernel.full.set(false);
        assert_as_before(&bed).await;
        assert_eq!(bed.log(), ["attach 0", "open w A"]);
        bed.destroy(0).await;
        for (target, mode, code) in [
            ("ram:1M".to_owned(), Mode::Write, Code::Unsupported),
            (
                format!("sync:{}", dir.join("a.img").display()),
                Mode::Read,
                Code::Unsupported,
            ),
            (
                format!("sync:{}", dir.join("a.img").display()),
                Mode::WriteShared,
                Code::Unsupported,
            ),
            (
                format!("lease=record,sync:{}", dir.join("a.img").display()),
                Mode::Write,
                Code::Unsupported,
            ),
        ] {
            let open = Open::new(target.parse().expect("a target"));
            let create = bed.create("a.img");
            bed.made(Create {
                open,
                mode,
                ..create
            })
            .await;
            let failure = refused(&bed, "b.qcow2").await;
            assert_eq!(failure.code, code, "{target} {mode}: {failure}");
            bed.destroy(0).await;
        }
        assert!(!dir.join("b.qcow2").exists());
    });
}

#[test]
fn a_snapshot_that_cannot_be_served_is_undone() {
    for (file, code) in [
        ("no-room", Code::System),
        ("refuse-child", Code::Image),
        ("die-child", Code::System),
    ] {
        test(&format!("snapshot-{file}"), |bed| async move {
            bed.image("a.img", "A");
            bed.made(bed.create("a.img")).await;
            put(bed.dir.join(file), "there is no room");
            let failure = refused(&bed, "b.qcow2").await;
            assert_eq!(failure.code, code, "{file}: {failure}");
            assert!(failure.message.contains("served as before"), "{failure}");
            assert_as_before(&bed).await;
            let undone = |what: &What| matches!(what, What::SnapshotUndone { .. });
            assert!(bed.events().iter().any(undone), "{:?}", bed.events());
            fs::remove_file(bed.dir.join(file)).expect("remove");
            taken(&bed, "b.qcow2").await;
            bed.destroy(0).await;
            bed.assert_nothing_left().await;
        });
    }
}

/// Its requests wait in the kernel, and the next process is given the new image.
#[test]
fn a_process_that_dies_while_it_closes_its_image_is_replaced() {
    test("snapshot-death", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let pid = bed.row(0).await.pid.expect("a process");
        fs::write(bed.dir.join("slow"), "").expect("write");
        let asked = taken(&bed, "b.qcow2");
        let death = async {
            until("the question", || async {
                bed.log().contains(&"pause".to_owned()).then_some(())
            })
            .await;
            kill(pid);
        };
        futures::future::join(asked, death).await;
        let row = bed.row(0).await;
        assert!(is_served_from(&row, "b.qcow2"));
        assert_ne!(row.pid, Some(pid));
        assert_eq!(
            fs::read_to_string(bed.dir.join("a.img")).expect("read"),
            "A"
        );
    });
}

#[test]
fn a_new_image_from_which_something_was_answered_stays() {
    test("snapshot-moment", |bed| async move {
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let pid = bed.row(0).await.pid.expect("a process");
        let asked = taken(&bed, "b.qcow2");
        fs::write(bed.dir.join("hang"), "").expect("write");
        let death = async {
            until("the new image is being opened", || async {
                let given = "given A Locked".to_owned();
                bed.log().contains(&given).then_some(())
            })
            .await;
            // It answered a request of the guest, and died.
            if let Some(node) = bed.kernel.nodes.borrow_mut().get_mut(&0) {
                node.committed += 1;
            }
            kill(pid);
            fs::remove_file(bed.dir.join("hang")).expect("remove");
        };
        futures::future::join(asked, death).await;
        until("it is served", || async {
            is_served_from(&bed.row(0).await, "b.qcow2").then_some(())
        })
        .await;
        assert!(is_marked(&bed.dir.join("a.img")));
    });
}

/// The supervisor ends after any step: the disk is served from the new image, whose parent is marked, or from the old
/// one, which is no backing image.
#[test]
fn a_snapshot_is_finished_or_undone_by_the_next_supervisor() {
    for second in [false, true] {
        let (old, new) = match second {
            false => ("a.img", "s1.qcow2"),
            true => ("s1.qcow2", "s2.qcow2"),
        };
        let steps = at_each_step(
            "snapshot",
            |dir| match second {
                false => vec![create(dir)],
                true => vec![create(dir), snapshot(dir, "s1.qcow2")],
            },
            |bed| snapshot(&bed.dir, new),
            |rows, _| {
                let row = one(rows);
                let path = row.target.as_ref().and_then(Target::path);
                let dir = path.and_then(Path::parent).expect("a folder");
                let text = |name| fs::read_to_string(dir.join(name)).unwrap_or_default();
                // The old image has its data, whatever happened.
                let held = match second {
                    false => "A".to_owned(),
                    true => over(dir, "a.img"),
                };
                assert_eq!(text(old), held);
                let (child, marked) = (text(new), is_marked(&dir.join(old)));
                match is_served_from(row, new) {
                    true => marked && child == over(dir, old),
                    // The file may have been made before the record had anything.
                    false => is_served_from(row, old) && !marked && child.is_empty(),
                }
            },
        );
        // The steps are the image to make, the next image, and that it is served.
        assert!(steps >= 6, "{steps} steps");
    }
}
