// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encrypted images, as the supervisor sees their process: it opens no file itself, and work with the key does not
//! delay its answers.

use crate::common::images::{answered, file, key, Folder, ServedImage, KEY, SEALED, SIZE};
use crate::common::{give_or_refuse, needs, Process, LIMIT};
use control::stats::Streaming;
use control::tapdisk::{FdGrant, Open, Reply, Request, RequestedFile};
use control::{Channel, Code, Failure};
use ring::tap::shadow::Op;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;
use tapdev::fake::FakeTap;

fn open(words: &str, path: &Path) -> Open {
    let target = format!("{words}:{}", path.display());
    Open {
        may_ask: true,
        ..Open::new(target.parse().expect("a target"))
    }
}

/// Answers questions until one for a key, which gets `secret`.
fn give(channel: &mut Channel, secret: &[u8]) {
    let mut known = 0;
    loop {
        for need in needs(channel, known) {
            known = known.max(need.number);
            let is_key = matches!(need.what, RequestedFile::Key { .. });
            let fd = is_key.then(|| key(secret));
            give_or_refuse(channel, need.number, fd, FdGrant::Shared);
            if is_key {
                return;
            }
        }
    }
}

fn serve(process: &mut Process, open: Open, secret: &[u8]) -> Result<Reply, Failure> {
    let image = file(open.target.path().expect("a path"), true);
    let question = Request::Open(open);
    process.ask_and_give(question, image.as_fd(), |needs| give(needs, secret))
}

/// A wrong key changes nothing, says which file it was in, and not what that holds.
#[test]
fn key_is_used_in_the_sandbox() {
    let Some(folder) = Folder::new("key_is_used_in_the_sandbox") else {
        return;
    };
    folder.sealed("luks", "a.luks", "1", SIZE);
    folder.sealed("qcow2", "a.qcow2", "1", SIZE);
    for (driver, format) in [("luks", "luks"), ("qcow2", "qcow2")] {
        let path = folder.path(&format!("a.{driver}"));
        let before = fs::read(&path).expect("read");
        let fake = FakeTap::new(4).expect("a node");
        let confine = |session: &std::rc::Rc<tapdisk::Session>| {
            session.runtime().io.start_helpers(1).expect("a thread");
            tapdisk::sandbox::confine(None).expect("a sandbox");
        };
        let mut process = Process::start_with(&fake, confine);
        let question = open(&format!("key=/etc/a.key,{driver}"), &path);
        for (secret, why) in [
            (&b"wrong words"[..], "opens none of the 1 key slots"),
            (&KEY[..KEY.len() - 1], "a line's end too"),
            (b"", "key=/etc/a.key: the file of the key is empty"),
        ] {
            let failure = serve(&mut process, question.clone(), secret).expect_err("it is wrong");
            assert!(failure.message.contains(why), "{failure}");
            assert!(!failure.message.contains("words"), "{failure}");
        }
        assert!(fs::read(&path).expect("read") == before, "{driver}");
        let reply = serve(&mut process, question, KEY);
        assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
        answered(&fake, Op::Write, 8, &[7; 4096]);
        process.exit();
        let content = folder.content(&format!("{SEALED}{format}"), &format!("a.{driver}"));
        assert_eq!(content[4096..8192], [7; 4096]);
    }
}

/// A LUKS image has the size of its file.
#[test]
fn disk_is_made_larger_below_its_guest() {
    let Some(folder) = Folder::new("disk_is_made_larger_below_its_guest") else {
        return;
    };
    for format in ["luks", "qcow2"] {
        is_made_larger(&folder, format);
    }
}

fn is_made_larger(folder: &Folder, format: &str) {
    folder.sealed(format, "a", "1", SIZE);
    let fake = FakeTap::new(4).expect("a node");
    let mut process = Process::start(&fake);
    let question = open(&format!("key=/etc/a.key,{format}"), &folder.path("a"));
    serve(&mut process, question, KEY).expect("it is served");
    answered(&fake, Op::Write, 0, &[1; 512]);
    let grow = |process: &mut Process, size| process.ask(Request::Grow { size }, None);
    let reply = grow(&mut process, SIZE + 512);
    assert!(
        matches!(&reply, Ok(Reply::Disk(disk)) if disk.size == SIZE + 512),
        "{reply:?}"
    );
    assert_eq!(fake.info().sectors, SIZE / 512 + 1);
    answered(&fake, Op::Write, SIZE / 512, &[2; 512]);
    for wrong in [SIZE, SIZE + 513] {
        let refused = grow(&mut process, wrong).expect_err("it is wrong");
        // A driver with tables of its own refuses a part of a sector.
        assert!(
            matches!(refused.code, Code::Invalid | Code::Image),
            "{refused}"
        );
    }
    process.exit();
    let content = folder.content(&format!("{SEALED}{format}"), "a");
    assert_eq!(content.len() as u64, SIZE + 512);
    assert_eq!((content[0], content[SIZE as usize]), (1, 2));
}

#[test]
fn without_a_supervisor_there_is_no_key() {
    let Some(folder) = Folder::new("without_a_supervisor_there_is_no_key") else {
        return;
    };
    folder.sealed("luks", "a.luks", "1", SIZE);
    let fake = FakeTap::new(4).expect("a node");
    let mut process = Process::start(&fake);
    let path = folder.path("a.luks");
    let alone = Open {
        may_ask: false,
        ..open("key=/etc/a.key,luks", &path)
    };
    for (question, why) in [
        (alone, "only a supervisor gives"),
        (open("luks", &path), "write key=FILE"),
    ] {
        let image = file(&path, true);
        let reply = process.ask_with(Request::Open(question), image.as_fd());
        let failure = reply.expect_err("it has no key");
        assert!(failure.message.contains(why), "{failure}");
    }
    process.exit();
}

/// Slow work on a key runs beside the loop: the process answers all the time, and not only between reads of the image.
#[test]
fn process_answers_while_it_opens_an_image() {
    /// More than there are reads of an image that is opened.
    const ANSWERS: u32 = 100;
    let Some(folder) = Folder::new("process_answers_while_it_opens_an_image") else {
        return;
    };
    folder.sealed("luks", "a.luks", "200", SIZE);
    let fake = FakeTap::new(4).expect("a node");
    let helpers = |session: &std::rc::Rc<tapdisk::Session>| {
        session.runtime().io.start_helpers(1).expect("a thread");
    };
    let mut process = Process::start_with(&fake, helpers);
    let path = folder.path("a.luks");
    let image = file(&path, true);
    let question = Request::Open(open("key=/etc/a.key,luks", &path));
    let mut answers = 0;
    let reply = process.ask_and_give(question, image.as_fd(), |needs| {
        give(needs, KEY);
        while answers < ANSWERS {
            match needs.ask(Request::Status, &[]) {
                Ok(Reply::Status(status)) if status.disk.is_none() => answers += 1,
                Ok(Reply::Status(_)) => break,
                other => panic!("{other:?}"),
            }
        }
    });
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    assert_eq!(answers, ANSWERS, "it was open before it answered");
    process.exit();
}

/// Both images of a mirror may be encrypted.
#[test]
fn disk_is_copied_to_an_image_with_a_key() {
    let Some(folder) = Folder::new("disk_is_copied_to_an_image_with_a_key") else {
        return;
    };
    for (from, to) in [("aio", "qcow2"), ("luks", "qcow2"), ("qcow2", "luks")] {
        let model = folder.raw("model", 3);
        folder.sealed(to, "to", "1", SIZE);
        let fake = FakeTap::new(4).expect("a node");
        let mut process = Process::start(&fake);
        match from {
            "aio" => {
                let image = file(&folder.path("model"), true);
                let question = Request::Open(open("aio", &folder.path("model")));
                let reply = process.ask_with(question, image.as_fd());
                assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
            }
            _ => {
                folder.sealed(from, "from", "1", SIZE);
                let question = open(&format!("key=/etc/a.key,{from}"), &folder.path("from"));
                serve(&mut process, question, KEY).expect("it is served");
                for (at, bytes) in (0..).step_by(128).zip(model.chunks(128 * 512)) {
                    answered(&fake, Op::Write, at, bytes);
                }
            }
        }
        let image = file(&folder.path("to"), true);
        let question = Request::Mirror {
            open: open(&format!("key=/etc/a.key,{to}"), &folder.path("to")),
            rate: u64::MAX,
            below: false,
        };
        let reply = process.ask_and_give(question, image.as_fd(), |needs| give(needs, KEY));
        assert_eq!(reply, Ok(Reply::Done));
        crate::mirror::until_same(&mut process);
        assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
        process.exit();
        let content = folder.content(&format!("{SEALED}{to}"), "to");
        assert!(content == model, "{from} {to}");
    }
}

/// An encrypted image may have a backing image in plain text, and takes over what that has.
#[test]
fn stream_into_an_image_with_a_key() {
    let Some(folder) = Folder::new("stream_into_an_image_with_a_key") else {
        return;
    };
    let mut model = folder.raw("base.img", 3);
    fs::write(folder.path("key"), KEY).expect("write");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1";
    let create = ["create", "--object", "secret,id=s,file=key", "-f", "qcow2"];
    let over = ["-b", "base.img", "-F", "raw", "-o", options, "a.qcow2"];
    folder.img(&[&create[..], &over].concat());
    let image = ServedImage {
        path: folder.path("a.qcow2"),
        driver: "key=/etc/a.key,qcow2",
        files: 2,
    };
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = image.start(&fake);
    answered(&fake, Op::Write, 8, &[7; 4096]);
    model[4096..8192].fill(7);
    let start = Instant::now();
    loop {
        let question = Request::Stream {
            rate: u64::MAX,
            anew: false,
        };
        match process.ask(question, None) {
            Ok(Reply::Stream(stream)) if stream.state == Streaming::Done => break,
            Ok(Reply::Stream(stream)) if stream.state == Streaming::Running => {}
            other => panic!("{other:?}"),
        }
        assert!(start.elapsed() < LIMIT);
    }
    process.exit();
    fs::remove_file(folder.path("base.img")).expect("it is not needed any more");
    assert!(folder.content("sealed qcow2", "a.qcow2") == model);
}
