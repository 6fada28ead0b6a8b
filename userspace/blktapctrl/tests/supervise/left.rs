// SPDX-License-Identifier: MIT OR Apache-2.0
//! A supervisor ignores disks that it does not understand.

use super::bed::{block_on, kill, test, until, which, Bed, Succession};
use super::fake::put;
use blktapctrl::recovery;
use control::supervisor::{Create, Reply, Request, What};
use control::tapdisk::{RequestedFile, State};
use control::Code;
use std::fs;
use std::io;
use std::path::PathBuf;

/// A supervisor with a disk, which ends. Returns the process of the disk.
fn first(host: &Succession) -> u32 {
    block_on(async {
        let bed = host.bed();
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        bed.row(minor).await.pid.expect("a process")
    })
}

fn record(host: &Succession) -> PathBuf {
    host.dir.join("run/disks/0.json")
}

/// Any thread of it is: what the process has open is closed by the last one.
pub(crate) fn is_alive(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let stats = threads.map(|thread| fs::read_to_string(thread?.path().join("stat")));
    stats.flatten().any(|stat| !stat.contains(") Z "))
}

/// Checks that a disk with a faulty record is served on and shown, and that its image is not free.
fn left_alone(name: &str, spoil: impl Fn(&str) -> Option<String>) {
    let two = Succession::new(name);
    let pid = first(&two);
    match spoil(&fs::read_to_string(record(&two)).expect("a record")) {
        Some(text) => fs::write(record(&two), text).expect("write"),
        None => fs::remove_file(record(&two)).expect("remove"),
    }
    let before = fs::read_to_string(record(&two)).ok();
    block_on(async {
        let bed = two.bed();
        recovery::disks(&bed.lifecycle).await;
        assert!(is_alive(pid), "{name}: its process was ended");
        assert!(bed.kernel.nodes.borrow().contains_key(&0));
        let row = bed.row(0).await;
        assert_eq!((row.pid, row.state), (Some(pid), None));
        assert!(row.unknown.is_some(), "{row:?}");
        let told = |what: &What| matches!(what, What::Unknown { .. });
        assert!(bed.events().iter().any(told), "{:?}", bed.events());
        assert_eq!(fs::read_to_string(record(&two)).ok(), before);
        let create = Request::Create(Box::new(bed.create("a.img")));
        assert_eq!(bed.ask(create).await.expect_err("in use").code, Code::Busy);
        let free = Request::Free { minor: 0 };
        assert_eq!(
            bed.ask(free).await.expect_err("left alone").code,
            Code::Busy
        );
        // An administrator says that it is to be supervised.
        let adopt = Request::Adopt { minor: 0 };
        assert_eq!(bed.ask(adopt).await, Ok(Reply::Done));
        let row = bed.row(0).await;
        assert_eq!((row.pid, row.state), (Some(pid), Some(State::Running)));
        assert_eq!(row.unknown, None);
        kill(pid);
        until("its replacement", || async {
            let row = bed.row(0).await;
            (row.state == Some(State::Running) && row.pid != Some(pid)).then_some(())
        })
        .await;
        assert_eq!(bed.log().last().map(String::as_str), Some("open w A"));
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_record_of_a_newer_supervisor_is_left_alone() {
    left_alone("newer", |text| {
        Some(text.replace("\"version\": 1", "\"version\": 5"))
    });
}

#[test]
fn a_record_that_was_cut_is_left_alone() {
    left_alone("cut", |text| Some(text[..text.len() / 2].into()));
    left_alone("empty", |_| Some(String::new()));
}

#[test]
fn a_record_with_a_value_that_is_not_known_is_left_alone() {
    left_alone("value", |text| {
        Some(text.replace("\"hung\": \"report\"", "\"hung\": \"sing\""))
    });
}

#[test]
fn a_disk_without_a_record_is_left_alone() {
    left_alone("none", |_| None);
}

#[test]
fn parts_of_a_disk_that_is_left_alone_are_not_free() {
    let two = Succession::new("left-parts");
    block_on(async {
        let bed = two.bed();
        bed.image("a.qcow2", "A");
        let path = bed.image("part.img", "part");
        let need = RequestedFile::Extent { path: path.clone() };
        let need = serde_json::to_string(&need).expect("text");
        put(bed.dir.join("ask"), need);
        let files = vec![path];
        let create = bed.create("a.qcow2");
        bed.made(Create { files, ..create }).await;
    });
    let text = fs::read_to_string(record(&two)).expect("a record");
    let newer = text.replace("\"version\": 2", "\"version\": 5");
    assert_ne!(newer, text);
    fs::write(record(&two), newer).expect("write");
    block_on(async {
        let bed = two.bed();
        recovery::disks(&bed.lifecycle).await;
        assert!(bed.row(0).await.unknown.is_some());
        let create = || Request::Create(Box::new(bed.create("part.img")));
        assert_eq!(
            bed.ask(create()).await.expect_err("in use").code,
            Code::Busy
        );
        let adopt = Request::Adopt { minor: 0 };
        assert_eq!(bed.ask(adopt).await, Ok(Reply::Done));
        assert_eq!(bed.row(0).await.unknown, None);
        assert_eq!(
            bed.ask(create()).await.expect_err("in use").code,
            Code::Busy
        );
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_field_that_may_be_passed_over_is() {
    let two = Succession::new("field");
    let pid = first(&two);
    let text = fs::read_to_string(record(&two)).expect("a record");
    let text = text.replacen('{', "{ \"colour\": \"green\",", 1);
    fs::write(record(&two), text).expect("write");
    block_on(async {
        let bed = two.bed();
        recovery::disks(&bed.lifecycle).await;
        let row = bed.row(0).await;
        assert_eq!((row.pid, row.state), (Some(pid), Some(State::Running)));
        let text = fs::read_to_string(record(&two)).expect("a record");
        assert!(text.contains("green"), "{text}");
        bed.destroy(0).await;
    });
}

#[test]
fn a_kernel_that_does_not_answer_does_not_end_a_disk() {
    for error in [
        io::ErrorKind::Interrupted,
        io::ErrorKind::OutOfMemory,
        io::ErrorKind::Other,
    ] {
        let two = Succession::new("mute");
        let pid = first(&two);
        two.kernel.mute.set(Some(error));
        block_on(async {
            let bed = two.bed();
            recovery::disks(&bed.lifecycle).await;
            assert!(is_alive(pid));
            assert!(bed.kernel.nodes.borrow().contains_key(&0));
            two.kernel.mute.set(None);
            let row = bed.row(0).await;
            assert_eq!((row.pid, row.state), (Some(pid), Some(State::Running)));
            assert_eq!(row.doing, None, "it is being taken away");
            bed.destroy(0).await;
            bed.assert_nothing_left().await;
        });
    }
}

#[test]
fn a_process_that_cannot_be_asked_is_not_ended() {
    let two = Succession::new("deaf");
    let pid = first(&two);
    let socket = two.dir.join("run/tapdisk/0.sock");
    fs::rename(&socket, two.dir.join("elsewhere")).expect("rename");
    block_on(async {
        let bed = two.bed();
        recovery::disks(&bed.lifecycle).await;
        assert!(is_alive(pid));
        assert_eq!(bed.row(0).await.pid, Some(pid));
        let told = |what: &What| matches!(what, What::Unknown { .. });
        assert!(bed.events().iter().any(told), "{:?}", bed.events());
        // As soon as it can be, it is.
        fs::rename(two.dir.join("elsewhere"), &socket).expect("rename");
        let stats = Request::Stats(which(0));
        assert!(matches!(bed.ask(stats).await, Ok(Reply::Stats(_))));
        bed.destroy(0).await;
    });
}

#[test]
fn a_full_folder_refuses_a_verb_and_ends_nobody() {
    test("full", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        let minor = bed.made(bed.create("a.img")).await;
        let pid = bed.row(minor).await.pid.expect("a process");
        bed.kernel.full.set(true);
        let create = Request::Create(Box::new(bed.create("b.img")));
        let failure = bed.ask(create).await.expect_err("it cannot be written");
        assert!(failure.message.contains("/run full"), "{failure}");
        assert_eq!(bed.kernel.nodes.borrow().len(), 1);
        let pause = Request::Pause {
            which: which(minor),
            timeout_s: 0,
        };
        assert!(bed.ask(pause).await.is_err());
        let row = bed.row(minor).await;
        assert_eq!((row.pid, row.state), (Some(pid), Some(State::Running)));
        assert_eq!(row.doing, None);
        // A process that dies now is replaced all the same, and the next supervisor finds the new one.
        kill(pid);
        until("its replacement", || async {
            (bed.row(minor).await.restarts == 1).then_some(())
        })
        .await;
        let new = bed.row(minor).await.pid;
        let next = Bed::new(&bed.dir, &bed.kernel);
        recovery::disks(&next.lifecycle).await;
        assert_eq!(next.row(minor).await.pid, new);
        bed.kernel.full.set(false);
        bed.destroy(minor).await;
    });
}

#[test]
fn what_is_left_of_a_disk_is_forgotten_and_freed() {
    let two = Succession::new("forget");
    let pid = first(&two);
    fs::write(record(&two), "{").expect("write");
    kill(pid);
    block_on(until("its end", || async {
        (!is_alive(pid)).then_some(())
    }));
    block_on(async {
        let bed = two.bed();
        recovery::disks(&bed.lifecycle).await;
        let adopt = bed.ask(Request::Adopt { minor: 0 }).await;
        let failure = adopt.expect_err("nobody knows it");
        assert!(failure.message.contains("tap-ctl forget -m 0"), "{failure}");
        assert_eq!(bed.ask(Request::Forget { minor: 0 }).await, Ok(Reply::Done));
        assert!(!record(&two).exists());
        assert_eq!(bed.ask(Request::Free { minor: 0 }).await, Ok(Reply::Done));
        bed.assert_nothing_left().await;
    });
}
