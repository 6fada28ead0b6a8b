// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory with a name: several disks have it, and it ends with the last of them.

use super::bed::{self, block_on, end, kill, test, until, which, Bed, Succession};
use super::left::is_alive;
use super::sharing::stubbed;
use super::steps::at_each_step;
use blktapctrl::recovery;
use control::supervisor::{Check, Create, MirrorTo, Mode, Reply, Request, What};
use control::tapdisk::{Open, State};
use control::{Code, Failure, Target};
use rustix::process::Signal;
use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const SCRATCH: &str = "name=scratch,ram:512";

fn target(text: &str) -> Target {
    text.parse().expect("a target")
}

fn create(bed: &Bed, mode: Mode, text: &str) -> Create {
    Create {
        open: Open::new(target(text)),
        mode,
        ..bed.create("none")
    }
}

async fn made(bed: &Bed, mode: Mode, text: &str) -> u32 {
    bed.made(create(bed, mode, text)).await
}

async fn refused(bed: &Bed, mode: Mode, text: &str) -> Failure {
    let asked = Request::Create(Box::new(create(bed, mode, text)));
    bed.ask(asked).await.expect_err("refused")
}

async fn check(bed: &Bed, mode: Mode, text: &str) -> Result<Reply, Failure> {
    let (target, vbd) = (target(text), None);
    bed.ask(Request::Check(Check { target, mode, vbd })).await
}

fn unpause(minor: u32, text: Option<&str>) -> Request {
    bed::unpause(minor, text.map(target))
}

async fn pause(bed: &Bed, minor: u32) {
    let (which, timeout_s) = (which(minor), 0);
    let paused = bed.ask(Request::Pause { which, timeout_s }).await;
    assert_eq!(paused, Ok(Reply::Done));
}

fn file(dir: &Path) -> PathBuf {
    dir.join("run/ram/scratch.named")
}

/// As a process does for its guest.
fn write(dir: &Path, content: &str) {
    let file = fs::File::options().write(true).open(file(dir));
    let content = format!("{content:512}");
    rustix::io::pwrite(file.expect("the memory"), content.as_bytes(), 0).expect("write");
}

/// Returns the content that the last process found, and its mode.
fn found(bed: &Bed) -> String {
    let log = bed.log();
    let opened = |line: &&String| line.starts_with("open ") || line.starts_with("unpause ");
    let last = log.iter().rfind(opened).expect("a disk was opened");
    last.trim_matches(['\0', ' ']).to_owned()
}

fn spoil_record(host: &Succession, minor: u32, text: &str) {
    fs::write(host.dir.join(format!("run/disks/{minor}.json")), text).expect("write");
}

async fn has_ended(pid: u32) {
    until("the end of a process", || async {
        (!is_alive(pid)).then_some(())
    })
    .await;
}

#[test]
fn disks_with_one_name_show_the_same_until_the_last_one_ends() {
    test("named", |bed| async move {
        let first = made(&bed, Mode::WriteShared, SCRATCH).await;
        assert_eq!(found(&bed), "open w!");
        write(&bed.dir, "first");
        let second = made(&bed, Mode::WriteShared, SCRATCH).await;
        assert_eq!(found(&bed), "open w! first");
        bed.replaced(first, kill).await;
        assert_eq!(found(&bed), "open w! first");
        write(&bed.dir, "second");
        pause(&bed, second).await;
        let unpaused = bed.ask(unpause(second, None)).await;
        assert!(matches!(unpaused, Ok(Reply::Opened(_))), "{unpaused:?}");
        assert_eq!(found(&bed), "unpause w! second");
        // Another name is other memory, and so is none.
        for text in ["name=scratch2,ram:512", "ram:512"] {
            let other = made(&bed, Mode::Write, text).await;
            assert_eq!(found(&bed), "open w");
            bed.destroy(other).await;
        }
        bed.destroy(first).await;
        assert!(file(&bed.dir).exists(), "taken from the other disk");
        bed.replaced(second, kill).await;
        assert_eq!(found(&bed), "open w! second");
        let text = bed.row(second).await.target.expect("a target").to_string();
        assert_eq!(text, SCRATCH);
        bed.destroy(second).await;
        bed.assert_nothing_left().await;
        // No disk gets the memory that others had.
        made(&bed, Mode::Write, SCRATCH).await;
        assert_eq!(found(&bed), "open w");
    });
}

#[test]
fn who_may_have_memory_is_decided_as_of_an_image() {
    test("named-modes", |bed| async move {
        let writer = made(&bed, Mode::Write, SCRATCH).await;
        write(&bed.dir, "content");
        for mode in [Mode::Write, Mode::Read] {
            let failure = refused(&bed, mode, SCRATCH).await;
            assert_eq!(failure.code, Code::Busy, "{failure}");
            let remedy = format!("the mode {mode}!");
            for words in ["tap disk 0", "scratch", &*remedy] {
                assert!(failure.message.contains(words), "{failure}");
            }
            let checked = check(&bed, mode, SCRATCH).await.expect_err("in use");
            assert_eq!(checked, failure);
        }
        let other = made(&bed, Mode::WriteShared, SCRATCH).await;
        assert_eq!(found(&bed), "open w! content");
        bed.destroy(writer).await;
        let failure = refused(&bed, Mode::Write, SCRATCH).await;
        assert_eq!(failure.code, Code::Busy);
        // A reader stands who writes under his own responsibility, and locks nothing against him.
        made(&bed, Mode::Read, SCRATCH).await;
        assert_eq!(found(&bed), "open r! content");
        bed.destroy(other).await;
        made(&bed, Mode::Read, SCRATCH).await;
        assert_eq!(found(&bed), "open r content");
    });
}

#[test]
fn memory_of_a_name_has_one_size() {
    test("named-size", |bed| async move {
        const LARGER: &str = "name=scratch,ram:1024";
        let minor = made(&bed, Mode::WriteShared, SCRATCH).await;
        write(&bed.dir, "content");
        let failure = refused(&bed, Mode::WriteShared, LARGER).await;
        assert_eq!(failure.code, Code::Exists);
        for words in [
            "scratch",
            "tap disk 0",
            "512",
            "1024",
            "name=scratch,ram:512",
        ] {
            assert!(failure.message.contains(words), "{words}: {failure}");
        }
        assert_eq!(check(&bed, Mode::Read, LARGER).await, Err(failure.clone()));
        pause(&bed, minor).await;
        assert_eq!(bed.ask(unpause(minor, Some(LARGER))).await, Err(failure));
        let unpaused = bed.ask(unpause(minor, None)).await;
        assert!(matches!(unpaused, Ok(Reply::Opened(_))), "{unpaused:?}");
        assert_eq!(found(&bed), "unpause w! content");
        bed.destroy(minor).await;
        made(&bed, Mode::Write, LARGER).await;
        assert_eq!(fs::metadata(file(&bed.dir)).expect("memory").len(), 1024);
    });
}

#[test]
fn two_at_once_get_the_same_memory_or_one_of_them_does() {
    test("named-race", |bed| async move {
        let both = async |mode, other| {
            let one = |text| bed.ask(Request::Create(Box::new(create(&bed, mode, text))));
            futures::future::join(one(SCRATCH), one(other)).await
        };
        for (mode, other, all) in [
            (Mode::WriteShared, SCRATCH, true),
            (Mode::Write, SCRATCH, false),
            (Mode::WriteShared, "name=scratch,ram:1024", false),
        ] {
            let answers = both(mode, other).await;
            let made = [answers.0.is_ok(), answers.1.is_ok()];
            assert_eq!(made == [true; 2], all, "{answers:?}");
            assert!(made.contains(&true), "{answers:?}");
            // No disk has lost the file, or has another one.
            let its = fs::metadata(file(&bed.dir)).expect("the memory");
            for row in bed.rows().await {
                let pid = row.pid.expect("a process");
                let opened = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
                let stat = |fd: fs::DirEntry| fs::metadata(fd.path()).ok();
                let mut opened = opened.flatten().filter_map(stat);
                assert!(opened.any(|file| (file.dev(), file.ino()) == (its.dev(), its.ino())));
                bed.destroy(row.minor.expect("a disk")).await;
            }
            bed.assert_nothing_left().await;
        }
    });
}

#[test]
fn what_a_disk_leaves_for_another_image_is_given_back() {
    test("named-leaves", |bed| async move {
        bed.image("a.img", "A");
        let image = format!("sync:{}", bed.dir.join("a.img").display());
        let minor = made(&bed, Mode::Write, &image).await;
        // It is not the disk's if it cannot be served.
        pause(&bed, minor).await;
        fs::write(bed.dir.join("refuse"), "no").expect("write");
        bed.ask(unpause(minor, Some(SCRATCH)))
            .await
            .expect_err("refused");
        assert!(!file(&bed.dir).exists());
        fs::remove_file(bed.dir.join("refuse")).expect("remove");
        bed.ask(unpause(minor, Some(SCRATCH)))
            .await
            .expect("unpaused");
        assert!(file(&bed.dir).exists());
        pause(&bed, minor).await;
        bed.ask(unpause(minor, Some(&image)))
            .await
            .expect("unpaused");
        assert!(!file(&bed.dir).exists());
        let (which, force, timeout_s) = (which(minor), false, 0);
        let close = Request::Close {
            which: which.clone(),
            force,
            timeout_s,
        };
        pause(&bed, minor).await;
        bed.ask(unpause(minor, Some(SCRATCH)))
            .await
            .expect("unpaused");
        assert_eq!(bed.ask(close).await, Ok(Reply::Done));
        assert!(!file(&bed.dir).exists());
    });
}

/// A guest that moves within the host has its memory on one side at a time; nothing copies that elsewhere.
#[test]
fn memory_is_moved_as_an_image_is_and_copied_nowhere() {
    test("named-moves", |bed| async move {
        let of = stubbed(&bed);
        bed.store.put("/local/domain/5", &[("vm", "/vm/a")]);
        let disk = |domain| Create {
            open: Open::new(target(SCRATCH)),
            ..of(domain)
        };
        let minor = bed.made(disk(3)).await;
        bed.made(disk(5)).await;
        assert_eq!(bed.log().last().map(String::as_str), Some("open inactive"));
        let to = MirrorTo {
            target: target("name=other,ram:512"),
            rate: 0,
        };
        let mirror = Request::Mirror {
            which: which(minor),
            to: Some(to),
        };
        let failure = bed.ask(mirror).await.expect_err("memory");
        assert!(failure.message.contains("does not outlive"), "{failure}");
    });
}

#[test]
fn memory_outlives_the_supervisor_and_all_processes() {
    let host = Succession::new("named-both");
    let pids = block_on(async {
        let bed = host.bed();
        let mut pids = Vec::new();
        for _ in 0..2 {
            let minor = made(&bed, Mode::WriteShared, SCRATCH).await;
            pids.push(bed.row(minor).await.pid.expect("a process"));
        }
        write(&bed.dir, "content");
        pids
    });
    pids.iter().copied().for_each(kill);
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        for minor in [0, 1] {
            until("the disk is served", || async {
                let row = bed.row(minor).await;
                (row.state == Some(State::Running) && !pids.contains(&row.pid?)).then_some(())
            })
            .await;
        }
        assert_eq!(found(&bed), "open w! content");
        bed.destroy(0).await;
        assert!(file(&bed.dir).exists());
        bed.destroy(1).await;
        bed.assert_nothing_left().await;
    });
}

/// Two disks of which one is not understood by the next supervisor: whatever that is, its memory stays.
fn left_alone(name: &str, lives: bool, spoil: impl Fn(&str) -> String, work: impl AsyncFn(&Bed)) {
    let host = Succession::new(name);
    let pid = block_on(async {
        let bed = host.bed();
        for _ in 0..2 {
            made(&bed, Mode::WriteShared, SCRATCH).await;
        }
        write(&bed.dir, "content");
        bed.row(0).await.pid.expect("a process")
    });
    let record = fs::read_to_string(host.dir.join("run/disks/0.json")).expect("a record");
    spoil_record(&host, 0, &spoil(&record));
    if !lives {
        kill(pid);
        block_on(has_ended(pid));
    }
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        assert!(bed.row(0).await.unknown.is_some());
        bed.destroy(1).await;
        assert!(file(&bed.dir).exists(), "{name}: it was taken away");
        let failure = refused(&bed, Mode::Write, SCRATCH).await;
        assert_eq!(failure.code, Code::Busy, "{failure}");
        work(&bed).await;
        assert!(!file(&bed.dir).exists(), "{name}: it is left");
        bed.assert_nothing_left().await;
    });
}

async fn adopted(bed: &Bed) {
    assert_eq!(bed.ask(Request::Adopt { minor: 0 }).await, Ok(Reply::Done));
    bed.replaced(0, kill).await;
    assert_eq!(found(bed), "open w! content");
    bed.destroy(0).await;
}

async fn forgotten(bed: &Bed) {
    assert_eq!(bed.ask(Request::Forget { minor: 0 }).await, Ok(Reply::Done));
    assert_eq!(bed.ask(Request::Free { minor: 0 }).await, Ok(Reply::Done));
}

#[test]
fn disk_that_is_left_alone_keeps_its_memory() {
    let newer = |text: &str| text.replace("\"version\": 1", "\"version\": 5");
    left_alone("named-newer", true, newer, adopted);
    left_alone("named-cut", true, |_| "{".into(), adopted);
    // The supervisor knows the memory that it serves, by the number of the file alone.
    let odd = |text: &str| newer(text).replace(SCRATCH, "odd:512");
    left_alone("named-odd", false, odd, forgotten);
}

#[test]
fn what_nobody_can_say_of_a_disk_may_be_any_memory() {
    let unknown = async |bed: &Bed| {
        let failure = refused(bed, Mode::WriteShared, SCRATCH).await;
        for words in ["scratch", "tap disk 0", "tap-ctl adopt", "another name"] {
            assert!(failure.message.contains(words), "{failure}");
        }
        let other = made(bed, Mode::Write, "name=other,ram:512").await;
        bed.destroy(other).await;
        assert!(bed.dir.join("run/ram/other.named").exists());
        forgotten(bed).await;
    };
    left_alone("named-dead", false, |_| "{".into(), unknown);
}

/// Its process serves on: the next supervisor finds that.
#[test]
fn disk_that_was_forgotten_keeps_its_memory_while_its_process_may_live() {
    let host = Succession::new("named-forgotten");
    let pid = block_on(async {
        let bed = host.bed();
        made(&bed, Mode::WriteShared, SCRATCH).await;
        write(&bed.dir, "content");
        bed.row(0).await.pid.expect("a process")
    });
    spoil_record(&host, 0, "{");
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        assert_eq!(bed.ask(Request::Forget { minor: 0 }).await, Ok(Reply::Done));
        assert!(file(&bed.dir).exists());
        let other = made(&bed, Mode::WriteShared, SCRATCH).await;
        assert_eq!(found(&bed), "open w! content");
        bed.destroy(other).await;
        assert!(file(&bed.dir).exists());
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        assert_eq!(bed.row(0).await.pid, Some(pid));
        assert_eq!(bed.ask(Request::Adopt { minor: 0 }).await, Ok(Reply::Done));
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// A disk ends while another one is still being asked what it serves, because its record says nothing.
#[test]
fn memory_stays_while_records_are_being_read() {
    let host = Succession::new("named-reading");
    let pid = block_on(async {
        let bed = host.bed();
        for _ in 0..2 {
            made(&bed, Mode::WriteShared, SCRATCH).await;
        }
        write(&bed.dir, "content");
        bed.row(1).await.pid.expect("a process")
    });
    let first = fs::read_to_string(host.dir.join("run/disks/0.json")).expect("a record");
    let ends = first.replace("\"doing\": null", "\"doing\": \"destroy\"");
    assert_ne!(ends, first);
    spoil_record(&host, 0, &ends);
    spoil_record(&host, 1, "{");
    end(pid, Signal::STOP);
    block_on(async {
        let bed = host.bed();
        let ended = async {
            until("the end of the first disk", || async {
                (!bed.dir.join("run/disks/0.json").exists()).then_some(())
            })
            .await;
            assert!(file(&bed.dir).exists(), "taken away too early");
            end(pid, Signal::CONT);
        };
        futures::future::join(recovery::disks(&bed.lifecycle), ended).await;
        assert!(bed.row(1).await.unknown.is_some());
        assert_eq!(bed.ask(Request::Adopt { minor: 1 }).await, Ok(Reply::Done));
        bed.replaced(1, kill).await;
        assert_eq!(found(&bed), "open w! content");
        bed.destroy(1).await;
        bed.assert_nothing_left().await;
    });
}

/// As a supervisor that has ended before it had written down for whom it is.
fn leave_behind(bed: &Bed) {
    for name in ["scratch.named", "other.unfinished"] {
        fs::write(bed.dir.join("run/ram").join(name), "left").expect("write");
    }
}

#[test]
fn memory_of_nobody_is_found_by_the_next_supervisor() {
    let host = Succession::new("named-nobody");
    block_on(async {
        let bed = host.bed();
        leave_behind(&bed);
        // Nothing is known of any disk.
        let (disks, away) = (bed.dir.join("run/disks"), bed.dir.join("away"));
        fs::rename(&disks, &away).expect("rename");
        fs::write(&disks, "no folder").expect("write");
        recovery::disks(&bed.lifecycle).await;
        fs::remove_file(&disks).expect("remove");
        fs::rename(&away, &disks).expect("rename");
        assert!(file(&bed.dir).exists(), "it may be somebody's");
        let failure = refused(&bed, Mode::Write, SCRATCH).await;
        assert!(failure.message.contains("blktapctrl anew"), "{failure}");
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        bed.assert_nothing_left().await;
        leave_behind(&bed);
        made(&bed, Mode::Write, SCRATCH).await;
        assert_eq!(found(&bed), "open w", "it begins with zeroes");
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn memory_that_is_lost_is_taken_for_zeroes_by_nobody() {
    let host = Succession::new("named-lost");
    let dies = block_on(async {
        let bed = host.bed();
        let minor = made(&bed, Mode::WriteShared, SCRATCH).await;
        write(&bed.dir, "content");
        fs::remove_file(file(&bed.dir)).expect("remove");
        let failure = refused(&bed, Mode::WriteShared, SCRATCH).await;
        assert_eq!(failure.code, Code::Image);
        assert!(failure.message.contains("is lost"), "{failure}");
        assert!(failure.message.contains("tap disk 0"), "{failure}");
        bed.row(minor).await.pid.expect("a process")
    });
    kill(dies);
    block_on(async {
        has_ended(dies).await;
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        until("the failure", || async {
            let lost = |what: &What| matches!(what, What::Failed { message, .. } if message.contains("is lost"));
            bed.events().iter().any(lost).then_some(())
        })
        .await;
        assert_ne!(bed.row(0).await.state, Some(State::Running));
        assert!(!file(&bed.dir).exists());
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

fn request(text: &str) -> Request {
    super::steps::create_of(target(text))
}

#[test]
fn create_with_a_name_is_finished_or_leaves_nothing() {
    let steps = at_each_step(
        "named-create",
        |_| Vec::new(),
        |_| request(SCRATCH),
        |rows, _| rows.is_empty() || rows[0].state == Some(State::Running),
    );
    assert!(steps >= 8, "{steps} steps");
}

#[test]
fn end_of_a_disk_leaves_the_memory_of_others_at_each_step() {
    let place = RefCell::new(PathBuf::new());
    let text = format!("shared=yes,{SCRATCH}");
    let steps = at_each_step(
        "named-ending",
        |dir| {
            place.replace(file(dir));
            vec![request(&text), request(&text)]
        },
        |_| Request::Destroy {
            which: which(0),
            timeout_s: 0,
            of: None,
        },
        |rows, _| {
            assert!(place.borrow().exists(), "taken away: {rows:?}");
            let other = rows.iter().find(|row| row.minor == Some(1));
            other.is_some_and(|row| row.state == Some(State::Running))
        },
    );
    assert!(steps >= 6, "{steps} steps");
}

#[test]
fn way_to_memory_with_a_name_is_finished_by_the_next_supervisor() {
    let place = RefCell::new(PathBuf::new());
    let steps = at_each_step(
        "named-unpausing",
        |dir| {
            place.replace(file(dir));
            vec![super::steps::create(dir), super::steps::pause(0)]
        },
        |_| unpause(0, Some(SCRATCH)),
        |rows, _| {
            let row = super::steps::one(rows);
            let named = row
                .target
                .as_ref()
                .is_some_and(|target| target.name().is_some());
            match row.state {
                Some(State::Running) => named && place.borrow().exists(),
                Some(State::Paused) => !named && !place.borrow().exists(),
                _ => false,
            }
        },
    );
    assert!(steps >= 4, "{steps} steps");
}

/// The memory was made, and the record of its disk could not be stored.
#[test]
fn memory_of_a_disk_that_was_not_made_is_given_back() {
    test("named-early", |bed| async move {
        bed.kernel.full.set(true);
        let failure = refused(&bed, Mode::Write, SCRATCH).await;
        assert!(failure.message.contains("/run full"), "{failure}");
        bed.kernel.full.set(false);
        bed.assert_nothing_left().await;
    });
}
