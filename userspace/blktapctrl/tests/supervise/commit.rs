// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commits: disks that switch to the image below their own, which has taken over its blocks, and failures on the way.

use super::bed::{kill, test, until, which, Bed};
use super::mirror::{asked, is_marked, is_served_from, says, until_over};
use super::steps::{at_each_step, create_of, one};
use control::stats::Mirroring;
use control::supervisor::{Create, MirrorTo, Request, What};
use control::tapdisk::RequestedFile;
use control::{Code, Target};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn commit_to(dir: &Path, name: &str) -> Request {
    let target = format!("sync:{}", dir.join(name).display());
    Request::Commit {
        which: which(0),
        to: MirrorTo {
            target: target.parse().expect("a target"),
            rate: 1000,
        },
    }
}

fn commit(bed: &Bed) -> Request {
    commit_to(&bed.dir, "a.img")
}

fn mark(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o440)).expect("chmod");
}

/// Makes an image with `a.img` as its backing image, which its process requests.
fn over(dir: &Path, name: &str) {
    let path = dir.join("a.img");
    let parent = serde_json::to_string(&RequestedFile::Parent { path }).expect("text");
    fs::write(dir.join(name), parent).expect("write");
}

/// An image over a raw one, as after a snapshot.
fn images(dir: &Path, top: &str) {
    fs::write(dir.join("a.img"), "A").expect("write");
    mark(&dir.join("a.img"));
    over(dir, top);
}

async fn snapshot(bed: &Bed) -> u32 {
    images(&bed.dir, "b.qcow2");
    bed.made(bed.create("b.qcow2")).await
}

#[test]
fn a_vhd_over_an_image_ends_in_that() {
    test("commit-vhd", |bed| async move {
        images(&bed.dir, "b.vhd");
        bed.made(bed.create("b.vhd")).await;
        says(&bed.dir, "same");
        asked(&bed, commit(&bed)).await.expect("it begins");
        assert_eq!(until_over(&bed).await, Mirroring::Complete);
        assert!(is_served_from(&bed.row(0).await, "a.img"));
        assert!(is_marked(&bed.dir.join("b.vhd")) && !is_marked(&bed.dir.join("a.img")));
    });
    test("commit-qcow", |bed| async move {
        images(&bed.dir, "b.qcow");
        bed.made(bed.create("b.qcow")).await;
        let failure = asked(&bed, commit(&bed))
            .await
            .expect_err("of no such image");
        assert_eq!(failure.code, Code::Unsupported, "{failure}");
        assert!(is_marked(&bed.dir.join("a.img")));
    });
}

#[test]
fn a_snapshot_ends_in_the_image_below() {
    test("commit", |bed| async move {
        snapshot(&bed).await;
        says(&bed.dir, "copying");
        let begins = asked(&bed, commit(&bed)).await.expect("it begins");
        assert_eq!(begins.state, Mirroring::Copying);
        // It keeps its mark until it is the disk: nothing but that says to others what it is.
        let base = bed.dir.join("a.img");
        assert!(is_marked(&base));
        let stream = Request::Stream {
            which: which(0),
            rate: Some(1),
        };
        let both = bed.ask(stream).await.expect_err("one of the two");
        assert!(
            both.message.contains("`tap-ctl commit -m 0 --cancel`"),
            "{both}"
        );
        // A second question changes nothing, and no other disk gets the backing image.
        asked(&bed, commit(&bed)).await.expect("it runs");
        let mut reader = Create {
            minor: Some(1),
            ..bed.create("a.img")
        };
        reader.mode = control::supervisor::Mode::Read;
        let busy = bed.ask(Request::Create(Box::new(reader.clone()))).await;
        let busy = busy.expect_err("it changes").message;
        assert!(busy.contains("tap disk 0"), "{busy}");
        reader.mode = control::supervisor::Mode::ReadShared;
        let busy = bed.ask(Request::Create(Box::new(reader))).await;
        let busy = busy.expect_err("it changes").message;
        assert!(busy.contains("one of the two"), "{busy}");
        // Another process begins anew.
        bed.replaced(0, kill).await;
        let begun = || {
            bed.log()
                .iter()
                .filter(|l| l.starts_with("commit "))
                .count()
        };
        until("the next one", || async { (begun() == 2).then_some(()) }).await;
        says(&bed.dir, "same");
        assert_eq!(until_over(&bed).await, Mirroring::Complete);
        let over = Request::Mirror {
            which: which(0),
            to: None,
        };
        let over = asked(&bed, over).await.expect("a commit");
        let path = over.to.as_ref().and_then(Target::path);
        assert_eq!(path, Some(&*base));
        assert_eq!(over.copied, 4096, "as far as it was at its end");
        assert!(is_served_from(&bed.row(0).await, "a.img"));
        // Its configuration must name that one: the other one is refused.
        assert!(!is_marked(&base) && is_marked(&bed.dir.join("b.qcow2")));
        let disk = bed.registry().get(0).expect("a disk");
        assert!(disk.record.borrow().parts.is_empty());
        bed.destroy(0).await;
        let old = bed.ask(Request::Create(Box::new(bed.create("b.qcow2"))));
        assert_eq!(old.await.expect_err("it is old").code, Code::Denied);
        bed.assert_nothing_left().await;
    });
}

#[test]
fn one_that_fails_or_is_ended_leaves_the_chain_as_it_was() {
    test("commit-fails", |bed| async move {
        snapshot(&bed).await;
        let base = bed.dir.join("a.img");
        says(&bed.dir, "refused");
        asked(&bed, commit(&bed))
            .await
            .expect_err("it is too small");
        assert!(is_marked(&base));
        says(&bed.dir, "copying");
        asked(&bed, commit(&bed)).await.expect("it begins");
        says(&bed.dir, "no room");
        let over = until_over(&bed).await;
        assert!(matches!(over, Mirroring::Failed { .. }), "{over:?}");
        let told = |what: &What| matches!(what, What::Mirrored { .. });
        assert!(bed.events().iter().any(told), "{:?}", bed.events());
        assert!(is_marked(&base));
        says(&bed.dir, "copying");
        asked(&bed, commit(&bed)).await.expect("it begins");
        let ended = asked(&bed, Request::EndMirror(which(0))).await;
        assert_eq!(ended.expect("it ends").state, Mirroring::Ended);
        assert!(is_marked(&base));
        assert!(is_served_from(&bed.row(0).await, "b.qcow2"));
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn what_others_have_below_their_disks_stays() {
    test("commit-shared", |bed| async move {
        snapshot(&bed).await;
        over(&bed.dir, "c.qcow2");
        // Its process may say so, but the record does not name this one as a backing image.
        let secret = bed.image("secret", "S");
        mark(&secret);
        let wrong = asked(&bed, commit_to(&bed.dir, "secret")).await;
        let wrong = wrong.expect_err("it is not below");
        assert!(wrong.message.contains("is no backing image of"), "{wrong}");
        assert!(is_marked(&secret));
        let itself = asked(&bed, commit_to(&bed.dir, "b.qcow2")).await;
        itself.expect_err("it is itself");
        let other = bed.made(bed.create("c.qcow2")).await;
        says(&bed.dir, "copying");
        let shared = asked(&bed, commit(&bed)).await.expect_err("it is shared");
        assert_eq!(shared.code, Code::Busy, "{shared}");
        assert!(shared.message.contains(&format!("tap disk {other}")));
        assert!(is_marked(&bed.dir.join("a.img")));
        bed.destroy(other).await;
        asked(&bed, commit(&bed)).await.expect("it begins");
        // No other disk gets it as a backing image now either, whatever files an administrator has named.
        let other = Create {
            files: vec![bed.dir.join("a.img")],
            ..bed.create("c.qcow2")
        };
        let other = bed.ask(Request::Create(Box::new(other)));
        let refused = other.await.expect_err("it changes").message;
        assert!(refused.contains("tap disk 0"), "{refused}");
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// The supervisor ends at any step: the disk is served from one of the two, and only that one has write permission.
#[test]
fn a_commit_that_is_interrupted_comes_to_an_end() {
    for last in ["copying", "same"] {
        let steps = at_each_step(
            &format!("commit-{last}"),
            |dir| {
                says(dir, last);
                images(dir, "b.qcow2");
                let target = format!("qcow2:{}", dir.join("b.qcow2").display());
                vec![create_of(target.parse().expect("a target"))]
            },
            commit,
            |rows, _| {
                let row = one(rows);
                let path = row.target.as_ref().and_then(Target::path);
                let dir = path.and_then(Path::parent).expect("a folder");
                // The next supervisor finishes what is on the record.
                says(dir, "same");
                let marked = ["a.img", "b.qcow2"].map(|name| is_marked(&dir.join(name)));
                is_served_from(row, "a.img") && marked == [false, true]
                    || is_served_from(row, "b.qcow2") && marked == [true, false]
            },
        );
        assert!(steps >= 1, "{steps} steps");
    }
}
