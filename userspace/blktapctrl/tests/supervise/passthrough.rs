// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which disks the kernel may serve by itself, and when it gets and loses their image.

use super::bed::{kill, test, unpause, until, which, Bed, Succession};
use control::supervisor::{Create, Mode, Reply, Request, What};
use control::tapdisk::{RequestedFile, State};
use control::{Code, Target};
use diskio::{LockKind, LockPart};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

fn pause(minor: u32) -> Request {
    Request::Pause {
        which: which(minor),
        timeout_s: 5,
    }
}

/// The target of an image with words in front.
fn target(bed: &Bed, words: &str, name: &str) -> Target {
    let text = format!("{words}aio:{}", bed.dir.join(name).display());
    text.parse().expect("a target")
}

fn is_backed(bed: &Bed, minor: u32) -> bool {
    bed.kernel.nodes.borrow()[&minor].backing.is_some()
}

/// Returns the reasons without passthrough, from the events.
fn told(bed: &Bed) -> Vec<String> {
    let told = bed.events().into_iter().filter_map(|event| match event {
        What::NotDirect { why } => Some(why),
        _ => None,
    });
    told.collect()
}

/// Returns the log of the processes and the kernel, without the lines about nodes.
fn log(bed: &Bed) -> Vec<String> {
    let mut log = bed.log();
    log.retain(|line| !line.starts_with("attach"));
    log
}

#[test]
fn the_kernel_has_a_device_from_before_it_is_opened_until_it_is_closed() {
    test("direct", |bed| async move {
        bed.image("a.dev", "A");
        let minor = bed.made(bed.create("a.dev")).await;
        assert_eq!(log(&bed), ["add 0 w", "open w A"]);
        assert_eq!(bed.row(minor).await.kernel.expect("a node").backings, 1);
        // The guest of a dead process continues, and the next process finds what it had.
        bed.replaced(minor, kill).await;
        assert_eq!(log(&bed)[2..], ["open w A"]);
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        assert_eq!(log(&bed)[3..], ["pause", "remove 0"]);
        let unpaused = bed.ask(unpause(minor, None)).await;
        assert!(matches!(unpaused, Ok(Reply::Opened(_))), "{unpaused:?}");
        assert_eq!(log(&bed)[5..], ["add 0 w", "unpause w A"]);
        let handoff = Request::Handoff {
            which: which(minor),
            program: None,
            timeout_s: 0,
        };
        let handed = bed.ask(handoff).await;
        assert!(matches!(handed, Ok(Reply::HandedOff(_))), "{handed:?}");
        assert!(is_backed(&bed, minor));
        let close = Request::Close {
            which: which(minor),
            force: false,
            timeout_s: 5,
        };
        assert_eq!(bed.ask(close).await, Ok(Reply::Done));
        assert!(!is_backed(&bed, minor));
        assert_eq!(told(&bed), [""; 0]);
    });
}

/// Makes an image with a backing image.
fn child(bed: &Bed) -> Create {
    bed.image("a.dev", "A");
    let below = bed.image("below.img", "B");
    let what = RequestedFile::Parent {
        path: below.clone(),
    };
    super::fd_broker::ask(bed, "ask", &[what]);
    let path = bed.dir.join("a.dev");
    let mut create = bed.create("a.dev");
    let target = format!("direct=yes,qcow2:{}", path.display());
    create.open.target = target.parse().expect("a target");
    create.files = vec![below];
    create
}

#[test]
fn the_kernel_has_what_is_below_an_image_as_long_as_the_image() {
    test("direct-below", |bed| async move {
        let minor = bed.made(child(&bed)).await;
        let opened = ["add 0 below 1", "told 1", "given B Locked", "open w A"];
        assert_eq!(log(&bed)[0], "add 0 w");
        assert_eq!(log(&bed)[1..], opened);
        // The next process knows it by the same number, and the kernel keeps it.
        bed.replaced(minor, kill).await;
        assert_eq!(log(&bed)[5..], ["told 1", "given B Locked", "open w A"]);
        let before = log(&bed).len();
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        let paused = ["pause", "remove 0", "remove 0 below 1"];
        assert_eq!(log(&bed)[before..], paused);
        // Then another process may write it, and the kernel gets it when that is over.
        let below = bed.dir.join("below.img");
        let other = fs::File::options().write(true).open(&below);
        let other = other.expect("the file");
        let kind = LockKind::Write;
        diskio::lock_part(other.as_fd(), kind, LockPart::Whole).expect("nobody has it");
        let before = log(&bed).len();
        assert!(bed.ask(unpause(minor, None)).await.is_ok());
        let log_then = log(&bed);
        assert_eq!(log_then[before], "add 0 w");
        assert!(!log_then[before..]
            .iter()
            .any(|line| line.starts_with("add 0 below")));
        let why = told(&bed);
        assert!(
            why.iter()
                .all(|why| why.contains("is locked by another process")),
            "{why:?}"
        );
        assert!(!why.is_empty());
        drop(other);
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        assert!(bed.ask(unpause(minor, None)).await.is_ok());
        assert!(
            log(&bed)
                .iter()
                .filter(|line| *line == "add 0 below 1")
                .count()
                == 2
        );
        // No process writes it while the kernel reads it, whichever process lives.
        let other = fs::File::options()
            .write(true)
            .open(&below)
            .expect("the file");
        let locked = diskio::lock_part(other.as_fd(), kind, LockPart::Whole);
        let locked = locked.map_err(|error| error.kind());
        assert_eq!(locked, Err(io::ErrorKind::WouldBlock));
        bed.destroy(minor).await;
        diskio::lock_part(other.as_fd(), kind, LockPart::Whole).expect("nobody has it");
    });
}

/// The kernel would read it past the page cache, each time.
#[test]
fn what_is_to_be_cached_below_an_image_is_not_for_the_kernel() {
    test("direct-below-cached", |bed| async move {
        let how = || fs::read_to_string(bed.dir.join("below")).expect("it was given");
        let plain = child(&bed);
        let mut create = child(&bed);
        let target = plain.open.target.to_string();
        create.open.target = format!("below=cached,{target}").parse().expect("a target");
        let minor = bed.made(create).await;
        let opened = ["add 0 w", "given B Locked", "open w A"];
        assert_eq!(
            (log(&bed), how()),
            (opened.map(String::from).to_vec(), "cached".into())
        );
        bed.replaced(minor, kill).await;
        assert_eq!(log(&bed)[3..], opened[1..]);
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        assert!(bed.ask(unpause(minor, None)).await.is_ok());
        assert!(!log(&bed).iter().any(|line| line.contains("below")));
        assert_eq!(told(&bed), [""; 0]);
        bed.destroy(minor).await;
        bed.made(plain).await;
        assert_eq!(how(), "direct");
        assert!(log(&bed).contains(&"add 0 below 1".into()));
    });
}

/// As a supervisor leaves it that does not know what numbers are.
#[test]
fn a_number_leads_to_what_a_process_is_told_of_it() {
    test("direct-below-other", |bed| async move {
        let minor = bed.made(child(&bed)).await;
        let other = fs::File::open(bed.image("other.img", "C")).expect("the file");
        {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            let below = &mut nodes.get_mut(&minor).expect("the node").below;
            below.insert(1, other.into());
        }
        let before = log(&bed).len();
        bed.replaced(minor, kill).await;
        let taken = ["remove 0 below 1", "add 0 below 1", "told 1"];
        assert!(log(&bed)[before..].ends_with(&["given B Locked".into(), "open w A".into()]));
        let log = log(&bed);
        assert!(
            taken
                .iter()
                .all(|line| log[before..].iter().any(|one| one == line)),
            "{log:?}"
        );
        bed.destroy(minor).await;
    });
}

#[test]
fn what_is_below_an_image_that_the_kernel_does_not_serve_is_not_for_it() {
    test("direct-below-not", |bed| async move {
        let mut create = child(&bed);
        create.open.target = target(&bed, "", "a.dev")
            .to_string()
            .replace("aio:", "qcow2:")
            .parse()
            .expect("a target");
        let minor = bed.made(create).await;
        assert_eq!(log(&bed), ["given B Locked", "open w A"]);
        bed.destroy(minor).await;
    });
}

#[test]
fn of_a_disk_that_is_only_read_the_kernel_only_reads() {
    test("direct-read", |bed| async move {
        bed.image("a.dev", "A");
        let mut create = bed.create("a.dev");
        create.mode = Mode::Read;
        bed.made(create).await;
        assert_eq!(log(&bed), ["add 0 r", "open r A"]);
    });
}

/// Checks that a disk is served as ever, without passthrough and without an event.
async fn not_given(bed: &Rc<Bed>, name: &str, words: &str, mode: Mode) {
    bed.image(name, "A");
    let mut create = bed.create(name);
    if !words.is_empty() {
        create.open.target = target(bed, words, name);
    }
    create.mode = mode;
    let minor = bed.made(create).await;
    assert!(!is_backed(bed, minor), "{words}{name}");
    assert_eq!(told(bed), [""; 0]);
    bed.destroy(minor).await;
}

#[test]
fn what_the_kernel_cannot_serve_or_is_not_the_disks_alone_is_served_by_its_process() {
    test("direct-not", |bed| async move {
        not_given(&bed, "a.img", "", Mode::Write).await;
        not_given(&bed, "a.qcow2", "", Mode::Write).await;
        not_given(&bed, "a.dev", "", Mode::WriteShared).await;
        not_given(&bed, "a.dev", "lease=record,", Mode::Write).await;
        bed.kernel.is_old.set(true);
        not_given(&bed, "a.dev", "", Mode::Write).await;
    });
}

#[test]
fn who_asked_for_what_the_kernel_cannot_do_hears_of_it() {
    test("direct-asked", |bed| async move {
        bed.image("a.img", "A");
        let mut create = bed.create("a.img");
        create.open.target = target(&bed, "direct=yes,", "a.img");
        let minor = bed.made(create).await;
        assert!(!is_backed(&bed, minor));
        let told = told(&bed);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("does not take"), "{told:?}");
    });
}

/// The kernel gets an image with tables, for the clusters that its process finds, if the target asks for that.
#[test]
fn an_image_with_tables_is_given_to_who_asks_for_it() {
    test("direct-tables", |bed| async move {
        bed.image("a.dev", "A");
        for (words, is_given) in [("", false), ("direct=no,", false), ("direct=yes,", true)] {
            let text = format!("{words}qcow2:{}", bed.dir.join("a.dev").display());
            let mut create = bed.create("a.dev");
            create.open.target = text.parse().expect("a target");
            let minor = bed.made(create).await;
            assert_eq!(is_backed(&bed, minor), is_given, "{text}");
            bed.destroy(minor).await;
            free(&bed, "a.dev").await;
        }
        assert_eq!(told(&bed), [""; 0]);
    });
}

fn open(bed: &Bed, name: &str) -> fs::File {
    let mut options = fs::File::options();
    let options = options.read(true).write(true);
    options.open(bed.dir.join(name)).expect("the image")
}

/// True if another process could lock the image.
fn is_free(bed: &Bed, name: &str) -> bool {
    let image = open(bed, name);
    match diskio::lock_whole(image.as_fd(), LockKind::Write) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            false
        }
    }
}

/// Other tests start processes, each of which has a copy of all files for a moment.
async fn free(bed: &Bed, name: &str) {
    until("a lock", || async { is_free(bed, name).then_some(()) }).await;
}

#[test]
fn what_the_kernel_has_is_locked_whatever_becomes_of_processes() {
    test("direct-locked", |bed| async move {
        bed.image("a.dev", "A");
        let minor = bed.made(bed.create("a.dev")).await;
        assert!(!is_free(&bed, "a.dev"));
        bed.replaced(minor, kill).await;
        assert!(!is_free(&bed, "a.dev"));
        bed.destroy(minor).await;
        free(&bed, "a.dev").await;
    });
}

#[test]
fn what_somebody_else_has_locked_the_kernel_does_not_get() {
    test("direct-foreign-lock", |bed| async move {
        bed.image("a.dev", "A");
        let image = open(&bed, "a.dev");
        diskio::lock_whole(image.as_fd(), LockKind::Read).expect("the lock");
        bed.lifecycle.patience.set(Duration::from_millis(50));
        let minor = bed.made(bed.create("a.dev")).await;
        assert!(!is_backed(&bed, minor));
        assert_eq!(told(&bed).len(), 1);
        assert!(told(&bed)[0].contains("is locked by another process"));
    });
}

#[test]
fn somebody_may_not_want_it() {
    test("direct-no", |bed| async move {
        not_given(&bed, "a.dev", "direct=no,", Mode::Write).await;
        // The disk's own word counts before that of the host.
        bed.lifecycle.direct.set(false);
        not_given(&bed, "a.dev", "", Mode::Write).await;
        let mut create = bed.create("a.dev");
        create.open.target = target(&bed, "direct=yes,", "a.dev");
        let minor = bed.made(create).await;
        assert!(is_backed(&bed, minor));
        // Said of a disk that is paused, it counts from then on.
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        let no = target(&bed, "direct=no,", "a.dev");
        let unpaused = bed.ask(unpause(minor, Some(no))).await;
        assert!(matches!(unpaused, Ok(Reply::Opened(_))), "{unpaused:?}");
        assert!(!is_backed(&bed, minor));
    });
}

#[test]
fn a_kernel_that_takes_no_image_leaves_the_disk_to_its_process() {
    test("direct-refused", |bed| async move {
        bed.image("a.dev", "A");
        bed.kernel.refuses.set(true);
        let minor = bed.made(bed.create("a.dev")).await;
        assert_eq!(log(&bed), ["open w A"]);
        assert_eq!(bed.row(minor).await.state, Some(State::Running));
        let told = told(&bed);
        assert!(told.len() == 1 && told[0].contains("a.dev"), "{told:?}");
    });
}

#[test]
fn another_image_takes_the_place_of_the_one_that_the_kernel_has() {
    test("direct-other", |bed| async move {
        bed.image("a.dev", "A");
        let other = bed.image("b.dev", "B");
        let minor = bed.made(bed.create("a.dev")).await;
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        // As if an earlier supervisor had not come so far as to take it away.
        let stays = super::fake::FakeBacking {
            ino: 1,
            writable: true,
            busy: 3,
        };
        let set = |backing| {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            nodes.get_mut(&minor).expect("the node").backing = backing;
        };
        set(Some(stays));
        let next = target(&bed, "", "b.dev");
        let unpaused = bed.ask(unpause(minor, Some(next))).await;
        assert!(matches!(unpaused, Ok(Reply::Opened(_))), "{unpaused:?}");
        let ino = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&other).expect("the image"));
        let backing = bed.kernel.nodes.borrow()[&minor].backing;
        assert_eq!(backing.map(|backing| backing.ino), Some(ino));
        assert_eq!(
            log(&bed)[2..],
            ["pause", "remove 0", "remove 0", "add 0 w", "unpause w B"]
        );
    });
}

/// The process died when it had opened the other image, and the kernel continues to use that for a moment.
#[test]
fn an_image_into_which_the_kernel_wrote_last_is_the_disks() {
    test("direct-moment", |bed| async move {
        bed.image("a.dev", "A");
        bed.image("b.dev", "B");
        let minor = bed.made(bed.create("a.dev")).await;
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        let pid = bed.row(minor).await.pid.expect("a process");
        fs::write(bed.dir.join("hang"), "").expect("write");
        let asked = bed.ask(unpause(minor, Some(target(&bed, "", "b.dev"))));
        let death = async {
            until("the image in the kernel", || async {
                is_backed(&bed, minor).then_some(())
            })
            .await;
            let mut nodes = bed.kernel.nodes.borrow_mut();
            let backing = &mut nodes.get_mut(&minor).expect("the node").backing;
            backing.as_mut().expect("it has the image").busy = 1;
            drop(nodes);
            kill(pid);
            fs::remove_file(bed.dir.join("hang")).expect("remove");
        };
        let (answer, ()) = futures::future::join(asked, death).await;
        assert!(answer.is_err(), "{answer:?}");
        until("it is served", || async {
            (bed.row(minor).await.state == Some(State::Running)).then_some(())
        })
        .await;
        assert_eq!(log(&bed).last().map(String::as_str), Some("open w B"));
    });
}

#[test]
fn a_pause_waits_for_io_of_the_kernel() {
    test("direct-busy", |bed| async move {
        bed.image("a.dev", "A");
        let minor = bed.made(bed.create("a.dev")).await;
        let busy = |times| {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            let backing = &mut nodes.get_mut(&minor).expect("the node").backing;
            backing.as_mut().expect("it has the image").busy = times;
        };
        busy(3);
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        assert_eq!(bed.row(minor).await.state, Some(State::Paused));
        assert!(!is_backed(&bed, minor));
        let unpaused = bed.ask(unpause(minor, None)).await;
        assert!(matches!(unpaused, Ok(Reply::Opened(_))), "{unpaused:?}");
        // If it takes longer, the disk is not paused, nothing else waits for it, and the same verb continues.
        busy(u32::MAX);
        let short = Request::Pause {
            which: which(minor),
            timeout_s: 1,
        };
        let late = bed.ask(short);
        let other = async {
            bed.image("b.dev", "B");
            bed.made(bed.create("b.dev")).await
        };
        let (late, other) = futures::future::join(late, other).await;
        assert!(is_backed(&bed, other));
        let late = late.expect_err("its I/O goes on");
        assert_eq!(late.code, Code::Timeout, "{late}");
        assert!(late.message.contains("of the kernel"), "{late}");
        busy(0);
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        assert!(!is_backed(&bed, minor));
    });
}

#[test]
fn the_kernel_loses_the_image_of_a_disk_that_is_paused_without_a_process() {
    test("direct-dead", |bed| async move {
        bed.image("a.dev", "A");
        let minor = bed.made(bed.create("a.dev")).await;
        // The next ones die, too.
        fs::write(bed.dir.join("die"), "").expect("write");
        kill(bed.row(minor).await.pid.expect("a process"));
        until("its death", || async {
            bed.row(minor).await.pid.is_none().then_some(())
        })
        .await;
        assert!(is_backed(&bed, minor), "its guest goes on");
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        assert!(!is_backed(&bed, minor));
    });
}

/// The kernel's requests have changed the new image alone.
#[test]
fn an_image_that_the_kernel_has_served_stays_the_disks() {
    test("direct-executed", |bed| async move {
        bed.image("a.dev", "A");
        bed.image("b.dev", "B");
        let minor = bed.made(bed.create("a.dev")).await;
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        fs::write(bed.dir.join("hang"), "").expect("write");
        let next = target(&bed, "", "b.dev");
        let unpaused = bed.ask(unpause(minor, Some(next)));
        let dies = async {
            until("the image", || async {
                is_backed(&bed, minor).then_some(())
            })
            .await;
            let pid = bed.row(minor).await.pid.expect("a process");
            let mut nodes = bed.kernel.nodes.borrow_mut();
            nodes.get_mut(&minor).expect("the node").direct = 1;
            drop(nodes);
            kill(pid);
            fs::remove_file(bed.dir.join("hang")).expect("remove");
        };
        let (unpaused, ()) = futures::future::join(unpaused, dies).await;
        assert!(unpaused.is_err(), "{unpaused:?}");
        until("the next process", || async {
            let row = bed.row(minor).await;
            (row.state == Some(State::Running)).then_some(())
        })
        .await;
        assert_eq!(log(&bed).last().map(String::as_str), Some("open w B"));
    });
}

#[test]
fn the_next_supervisor_takes_the_image_from_the_kernel() {
    let host = Succession::new("direct-left");
    let minor = super::bed::block_on(async {
        let bed = host.bed();
        bed.image("a.dev", "A");
        bed.made(bed.create("a.dev")).await
    });
    super::bed::block_on(async {
        let bed = host.bed();
        blktapctrl::recovery::disks(&bed.lifecycle).await;
        assert!(is_backed(&bed, minor));
        assert_eq!(bed.ask(pause(minor)).await, Ok(Reply::Done));
        assert!(!is_backed(&bed, minor));
        bed.lifecycle.destroy_all(bed.registry().all()).await;
    });
}
