// SPDX-License-Identifier: MIT OR Apache-2.0
//! Keys of images that are encrypted: who gets one, and what is not done with such an image.

use super::bed::{kill, test, until, which, Bed};
use super::fd_broker::{ask, refused};
use super::mirror::asked;
use control::supervisor::{Create, MirrorTo, Request};
use control::tapdisk::RequestedFile;
use control::{Code, Failure, Target};
use rustix::fs::{chown, Uid};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The key, which only the disk's process may see.
const SECRET: &str = "swordfish";

/// The file with a key.
fn key(bed: &Bed) -> PathBuf {
    let path = bed.image("a.key", SECRET);
    allow(&path, 0o600);
    path
}

pub(crate) fn allow(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// An image with words in front.
fn target(bed: &Bed, words: &str, name: &str) -> Target {
    bed.image(name, name);
    let text = format!("{words}{}", bed.dir.join(name).display());
    text.parse().expect("a target")
}

/// One that is encrypted.
fn sealed(bed: &Bed, name: &str) -> Target {
    target(bed, &format!("key={},qcow2:", key(bed).display()), name)
}

fn need(target: &Target) -> RequestedFile {
    RequestedFile::Key {
        target: target.clone(),
    }
}

fn create(bed: &Bed, target: &Target) -> Create {
    let mut create = bed.create("a.qcow2");
    create.open.target = target.clone();
    create
}

/// No file below a folder has the secret.
fn assert_unseen(folder: &Path) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let kind = fs::symlink_metadata(&path).expect("stat").file_type();
        if kind.is_dir() {
            assert_unseen(&path);
        } else if kind.is_file() {
            let text = fs::read(&path).expect("read");
            let found = text
                .windows(SECRET.len())
                .any(|word| word == SECRET.as_bytes());
            assert!(!found, "{}", path.display());
        }
    }
}

#[test]
fn a_key_is_that_of_the_disk_and_is_seen_by_its_process_alone() {
    test("keys", |bed| async move {
        let full = sealed(&bed, "a.qcow2");
        let plain = target(&bed, "qcow2:", "b.qcow2");
        ask(&bed, "ask", &[need(&full)]);
        let minor = bed.made(create(&bed, &full)).await;
        let given = format!("given {SECRET} Shared");
        assert_eq!(bed.log().iter().filter(|line| **line == given).count(), 1);
        // The next process asks for it again.
        bed.replaced(minor, kill).await;
        assert_eq!(bed.log().iter().filter(|line| **line == given).count(), 2);
        assert_unseen(bed.registry().folder.root());
        let events = format!("{:?} {:?}", bed.events(), bed.rows().await);
        assert!(!events.contains(SECRET), "{events}");
        bed.destroy(minor).await;
        // Not that of another disk, nor what this one has not.
        for (wanted, why) in [
            (need(&full), "is not served from key="),
            (need(&plain), "does not say key="),
        ] {
            ask(&bed, "ask", &[wanted]);
            let told = refused(&bed, create(&bed, &plain)).await;
            assert!(told.contains(why), "{told}");
        }
        bed.assert_nothing_left().await;
    });
}

/// Checks that the file at `path`, which the target of a disk names with a word, is given only if others than root
/// cannot have read or changed it.
pub(crate) async fn assert_has_to_be_a_secret(
    bed: &Bed,
    path: &Path,
    word: &str,
    create: impl Fn() -> Create,
) {
    let names = format!("{}, which {word} names", path.display());
    let refuses = async |why: &str| {
        let told = refused(bed, create()).await;
        assert!(told.contains(&names) && told.contains(why), "{told}");
    };
    for mode in [0o644, 0o604, 0o620, 0o602, 0o601] {
        allow(path, mode);
        refuses("chmod 600").await;
    }
    // Its group may be one of who makes copies.
    allow(path, 0o640);
    let minor = bed.made(create()).await;
    bed.destroy(minor).await;
    chown(path, Some(Uid::from_raw(65534)), None).expect("tests are root's");
    refuses("belongs to the user 65534").await;
    fs::remove_file(path).expect("remove");
    refuses("No such file").await;
    fs::create_dir(path).expect("a folder");
    refuses("no regular file").await;
}

#[test]
fn what_others_may_read_or_change_is_no_key() {
    test("keys-mode", |bed| async move {
        let full = sealed(&bed, "a.qcow2");
        ask(&bed, "ask", &[need(&full)]);
        let path = bed.dir.join("a.key");
        assert_has_to_be_a_secret(&bed, &path, "key=", || create(&bed, &full)).await;
        bed.assert_nothing_left().await;
    });
}

/// Why a question is refused; the disk is served as before.
async fn refuses(bed: &Bed, question: Request) -> Failure {
    let failure = bed.ask(question).await.expect_err("it is refused");
    let row = bed.row(0).await;
    let is_served = row
        .target
        .as_ref()
        .is_some_and(|target| target.key().is_some());
    assert!(is_served, "{row:?}");
    failure
}

#[test]
fn nothing_goes_on_in_plain_text_that_was_encrypted() {
    test("keys-snapshot", |bed| async move {
        let full = sealed(&bed, "a.qcow2");
        ask(&bed, "ask", &[]);
        bed.made(create(&bed, &full)).await;
        let new = |words: &str| {
            let path = bed.dir.join("new.qcow2");
            let text = format!("{words}qcow2:{}", path.display());
            text.parse::<Target>().expect("a target")
        };
        let snapshot = |target| Request::Snapshot {
            which: which(0),
            target,
        };
        let failure = refuses(&bed, snapshot(new(""))).await;
        assert_eq!(failure.code, Code::Unsupported, "{failure}");
        assert!(
            failure.message.contains("the new image is not"),
            "{failure}"
        );
        let key = format!("key={},", bed.dir.join("a.key").display());
        let failure = refuses(&bed, snapshot(new(&key))).await;
        assert!(failure.message.contains("remove key="), "{failure}");
        assert!(!bed.dir.join("new.qcow2").exists());
        let to = MirrorTo {
            target: target(&bed, "sync:", "below.img"),
            rate: 1000,
        };
        let commit = Request::Commit {
            which: which(0),
            to,
        };
        let failure = refuses(&bed, commit).await;
        assert!(
            failure.message.contains("the image below it is not"),
            "{failure}"
        );
    });
}

/// The process that copies a disk has the key of where it copies it to.
#[test]
fn a_copy_may_have_a_key_of_its_own() {
    test("keys-mirror", |bed| async move {
        let (from, to) = (bed.create("a.img"), sealed(&bed, "b.qcow2"));
        bed.image("a.img", "A");
        ask(&bed, "ask-mirror", &[need(&to)]);
        bed.made(from).await;
        let question = Request::Mirror {
            which: which(0),
            to: Some(MirrorTo {
                target: to,
                rate: 1000,
            }),
        };
        asked(&bed, question).await.expect("it begins");
        let given = format!("given {SECRET} Shared");
        until("the key is given", || async {
            bed.log().contains(&given).then_some(())
        })
        .await;
    });
}
