// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests of a process for files beside its image, and those that it may have.

use super::bed::{block_on, kill, test, until, which, Bed, Succession};
use super::fake::put;
use blktapctrl::recovery;
use control::supervisor::{Create, Mode, Request, What};
use control::tapdisk::{Open, RequestedFile};
use control::{Code, Target};
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Instant;

/// Sets the requests of the next process.
pub(crate) fn ask(bed: &Bed, list: &str, needs: &[RequestedFile]) {
    let lines = needs
        .iter()
        .map(|need| serde_json::to_string(need).expect("text") + "\n");
    put(bed.dir.join(list), lines.collect::<String>());
}

fn parent(path: &Path) -> RequestedFile {
    RequestedFile::Parent { path: path.into() }
}

pub(crate) async fn refused(bed: &Bed, create: Create) -> String {
    let asked = bed.ask(Request::Create(Box::new(create))).await;
    asked.expect_err("it may not").message
}

fn served(bed: &Bed) -> PathBuf {
    bed.image("a.qcow2", "child");
    bed.image("parent.img", "old")
}

/// A disk for which files are named.
fn with(bed: &Bed, name: &str, files: &[&Path]) -> Create {
    Create {
        files: files.iter().map(|path| path.to_path_buf()).collect(),
        ..bed.create(name)
    }
}

#[test]
fn a_parent_is_given_and_counts_as_used() {
    test("needs-parent", |bed| async move {
        let path = served(&bed);
        ask(&bed, "ask", &[parent(&path)]);
        let minor = bed.made(with(&bed, "a.qcow2", &[&path])).await;
        assert_eq!(bed.log()[1..], ["given old Locked", "open w child"]);
        ask(&bed, "ask", &[]);
        let why = refused(&bed, bed.create("parent.img")).await;
        assert!(why.contains(&format!("tap disk {minor}")), "{why}");
        // Other disks may have it as a backing image, too.
        ask(&bed, "ask", &[parent(&path)]);
        bed.image("b.qcow2", "other");
        let before = bed.log().len();
        let other = bed.made(with(&bed, "b.qcow2", &[&bed.dir])).await;
        let log = &bed.log()[before..];
        assert_eq!(log[log.len() - 2..], ["given old Locked", "open w other"]);
        // The next process gets what is on the record.
        bed.replaced(minor, kill).await;
        bed.destroy(other).await;
        bed.destroy(minor).await;
        ask(&bed, "ask", &[]);
        let minor = bed.made(bed.create("parent.img")).await;
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

/// A golden image: several guests have it at once and write into memory of their own.
#[test]
fn an_image_below_memory_is_shared_and_stays() {
    test("needs-cow", |bed| async move {
        let golden = bed.image("golden.qcow2", "golden");
        let (beside, another) = (bed.image("root.img", "root"), bed.image("a.img", "another"));
        let of = |mode| Create {
            open: Open::new(
                format!("cow:qcow2:{}", golden.display())
                    .parse()
                    .expect("a target"),
            ),
            mode,
            ..bed.create("none")
        };
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o444)).expect("chmod");
        // The served image names this file, and the file is in its own folder.
        ask(&bed, "ask", &[parent(&golden), parent(&beside)]);
        let first = bed.made(of(Mode::Write)).await;
        let second = bed.made(of(Mode::Write)).await;
        let given = ["given golden Locked", "given root Locked", "open w "];
        assert_eq!(bed.log()[1..4], given);
        let below = fs::read_to_string(bed.dir.join("below"));
        assert_eq!(below.expect("it was given"), "cached");
        for wrong in [
            parent(&another),
            RequestedFile::Extent {
                path: golden.clone(),
            },
        ] {
            ask(&bed, "ask", &[wrong]);
            let why = refused(&bed, of(Mode::Write)).await;
            assert!(why.contains("may not have"), "{why}");
        }
        ask(&bed, "ask", &[]);
        let why = refused(&bed, bed.create("golden.qcow2")).await;
        assert!(why.contains(&format!("tap disk {first}")), "{why}");
        let why = refused(&bed, of(Mode::Read)).await;
        assert!(why.contains("use qcow2:/"), "{why}");
        let why = refused(&bed, of(Mode::WriteShared)).await;
        assert!(why.contains("w!"), "{why}");
        let stream = Request::Stream {
            which: which(first),
            rate: Some(1000),
        };
        let why = bed.ask(stream).await.expect_err("it may not").message;
        assert!(why.contains("until the disk ends"), "{why}");
        // The next process has the same memory and the same image.
        let memory = bed.dir.join("run/ram").join(format!("{first}.cow"));
        fs::write(&memory, "written").expect("write");
        bed.replaced(first, kill).await;
        assert!(bed.log().iter().any(|line| line == "open w written"));
        bed.destroy(first).await;
        assert!(!memory.exists());
        bed.destroy(second).await;
        let minor = bed.made(bed.create("golden.qcow2")).await;
        ask(&bed, "ask", &[parent(&golden)]);
        let why = refused(&bed, of(Mode::Write)).await;
        assert!(why.contains("golden.qcow2 is not free"), "{why}");
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn an_extent_belongs_to_one_disk() {
    test("needs-extent", |bed| async move {
        let path = served(&bed);
        let extent = RequestedFile::Extent { path: path.clone() };
        ask(&bed, "ask", std::slice::from_ref(&extent));
        let minor = bed.made(with(&bed, "a.qcow2", &[&path])).await;
        assert_eq!(bed.log()[1..], ["given w old Locked", "open w child"]);
        bed.image("b.qcow2", "other");
        for need in [extent, parent(&path)] {
            ask(&bed, "ask", &[need]);
            let why = refused(&bed, with(&bed, "b.qcow2", &[&path])).await;
            assert!(why.contains("parent.img is not free"), "{why}");
            assert!(why.contains(&format!("tap disk {minor}")), "{why}");
        }
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn what_nobody_named_is_refused_with_the_remedy() {
    test("needs-unnamed", |bed| async move {
        let beside = served(&bed);
        let elsewhere = bed.dir.join("elsewhere");
        fs::create_dir_all(&elsewhere).expect("a folder");
        fs::write(elsewhere.join("secret"), "secret").expect("write");
        // A link in a folder that is named leads out of it.
        let named = bed.dir.join("servers");
        fs::create_dir_all(&named).expect("a folder");
        let link = named.join("link.img");
        std::os::unix::fs::symlink(elsewhere.join("secret"), &link).expect("a link");
        let secret = elsewhere.join("secret");
        // A file beside the image may be another guest's.
        for path in [&beside, &secret, &link, Path::new("/etc/passwd")] {
            ask(&bed, "ask", &[parent(path)]);
            let why = refused(&bed, with(&bed, "a.qcow2", &[&named])).await;
            assert!(why.contains(&path.display().to_string()), "{why}");
            assert!(why.contains("give --files"), "{why}");
            let why =
                move |what: &What| matches!(what, What::Refused { why: told } if *told == why);
            assert!(bed.events().iter().any(why));
        }
        ask(&bed, "ask", &[parent(&bed.dir.join("a.qcow2"))]);
        let why = refused(&bed, bed.create("a.qcow2")).await;
        assert!(why.contains("the image itself"), "{why}");
        let long = format!("/{}", "x".repeat(5000));
        for (path, wrong) in [
            ("/srv/a\nblktapctrl: all is well", "control characters"),
            ("../a.qcow2", "no absolute path"),
            (&long, "bytes at most"),
        ] {
            for need in [
                parent(Path::new(path)),
                RequestedFile::Socket { path: path.into() },
            ] {
                ask(&bed, "ask", &[need]);
                let why = refused(&bed, with(&bed, "a.qcow2", &[Path::new("/")])).await;
                assert!(why.contains(wrong), "{why}");
                assert!(!why.contains('\n') && why.len() < 400, "{why}");
            }
        }
        ask(&bed, "ask", &[RequestedFile::Other]);
        let why = refused(&bed, bed.create("a.qcow2")).await;
        assert!(why.contains("does not know"), "{why}");
        let why = refused(&bed, with(&bed, "a.qcow2", &[Path::new("b.qcow2")])).await;
        assert!(why.contains("absolute path"), "{why}");
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_folder_for_all_disks_is_read_and_not_written() {
    test("needs-all", |bed| async move {
        bed.image("a.qcow2", "child");
        let folder = bed.dir.join("servers");
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("part.img");
        fs::write(&path, "part").expect("write");
        let extent = RequestedFile::Extent { path: path.clone() };
        ask(&bed, "ask", std::slice::from_ref(&extent));
        let why = refused(&bed, bed.create("a.qcow2")).await;
        assert!(why.contains("when the disk is made or unpaused"), "{why}");
        let reader = Create {
            mode: Mode::Read,
            ..bed.create("a.qcow2")
        };
        let minor = bed.made(reader).await;
        bed.destroy(minor).await;
        ask(&bed, "ask", &[parent(&path)]);
        let minor = bed.made(bed.create("a.qcow2")).await;
        bed.destroy(minor).await;
        // No disk gets the supervisor's own files, whatever an administrator has named.
        let own = bed.registry().folder.root().join("disks/of.json");
        fs::write(&own, "{}").expect("write");
        ask(&bed, "ask", &[parent(&own)]);
        let why = refused(&bed, with(&bed, "a.qcow2", &[&bed.dir])).await;
        assert!(why.contains("the supervisor's own"), "{why}");
        fs::remove_file(own).expect("remove");
        bed.assert_nothing_left().await;
    });
}

/// A process that a guest has taken over stops, is paused for that, and requests files when an administrator resumes
/// the disk.
#[test]
fn an_unpause_gives_nothing_that_was_not_named() {
    test("needs-unpause", |bed| async move {
        let path = served(&bed);
        ask(&bed, "ask", &[]);
        let minor = bed.made(bed.create("a.qcow2")).await;
        let pause = Request::Pause {
            which: which(minor),
            timeout_s: 0,
        };
        let unpause = |files: &[&Path]| Request::Unpause {
            which: which(minor),
            target: None,
            may_shrink: false,
            files: files.iter().map(|path| path.to_path_buf()).collect(),
        };
        bed.ask(pause).await.expect("paused");
        ask(&bed, "ask", &[RequestedFile::Extent { path: path.clone() }]);
        let failure = bed.ask(unpause(&[])).await.expect_err("it may not");
        assert_eq!(failure.code, Code::Denied);
        bed.ask(unpause(&[&path])).await.expect("it is named");
        // The next process has it, too, and the name stays.
        bed.replaced(minor, kill).await;
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn what_got_lost_on_the_way_is_given_again() {
    test("needs-again", |bed| async move {
        let path = served(&bed);
        ask(&bed, "ask", &[parent(&path)]);
        fs::write(bed.dir.join("deaf"), "").expect("write");
        let minor = bed.made(with(&bed, "a.qcow2", &[&path])).await;
        assert!(!bed.dir.join("deaf").exists());
        assert_eq!(bed.log()[1..], ["given old Locked", "open w child"]);
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn who_answers_all_the_time_is_asked_now_and_then() {
    test("needs-chatty", |bed| async move {
        bed.image("a.qcow2", "A");
        fs::write(bed.dir.join("chatty"), "").expect("write");
        let start = Instant::now();
        let minor = bed.made(bed.create("a.qcow2")).await;
        let chat = || bed.log().iter().filter(|line| *line == "chat").count();
        until("questions", || async { (chat() >= 300).then_some(()) }).await;
        // 256 at once, then one in 10 ms, and one in 100 ms of what goes wrong.
        let (count, since) = (chat(), start.elapsed());
        let most = 256 + since.as_millis() / 10 + since.as_millis() / 100 + 4;
        assert!(u128::try_from(count).expect("a number") <= most);
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_disk_that_is_served_gets_nothing_new() {
    test("needs-later", |bed| async move {
        let path = served(&bed);
        ask(&bed, "ask", &[parent(&path)]);
        let minor = bed.made(with(&bed, "a.qcow2", &[&bed.dir])).await;
        let resize = || bed.ask(Request::Resize(which(minor)));
        ask(&bed, "ask-later", &[parent(&path)]);
        resize().await.expect("it is on the record");
        let other = bed.image("other.img", "other guest's");
        ask(&bed, "ask-later", &[parent(&other)]);
        let failure = resize().await.expect_err("it may not");
        assert_eq!(failure.code, Code::Denied);
        assert!(
            failure.message.contains("not on the disk's record"),
            "{failure}"
        );
        // Nor is it told what there is.
        ask(&bed, "ask-later", &[parent(&bed.dir.join("none"))]);
        let failure = resize().await.expect_err("it may not");
        assert!(
            failure.message.contains("not on the disk's record"),
            "{failure}"
        );
        // Another file of that name is another file.
        fs::rename(&other, &path).expect("rename");
        ask(&bed, "ask-later", &[parent(&path)]);
        let failure = resize().await.expect_err("it may not");
        assert!(
            failure.message.contains("not the image any more"),
            "{failure}"
        );
        // An administrator's act: what the new image needs counts from then on.
        let (pause, timeout_s) = (which(minor), 0);
        let pause = Request::Pause {
            which: pause,
            timeout_s,
        };
        bed.ask(pause).await.expect("paused");
        bed.image("next.qcow2", "next");
        let target: Target = format!("qcow2:{}", bed.dir.join("next.qcow2").display())
            .parse()
            .expect("a target");
        ask(&bed, "ask", &[parent(&path)]);
        let unpause = Request::Unpause {
            which: which(minor),
            target: Some(target),
            may_shrink: false,
            files: Vec::new(),
        };
        bed.ask(unpause).await.expect("goes on");
        resize().await.expect("it is on the record");
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

/// A file that leaves the record of a disk must not stay with its process, whatever that reports.
#[test]
fn who_has_a_part_that_is_the_disks_no_more_is_replaced() {
    test("needs-parted", |bed| async move {
        let path = served(&bed);
        let extent = [RequestedFile::Extent { path: path.clone() }];
        bed.image("b.qcow2", "other");
        let pause = || Request::Pause {
            which: which(0),
            timeout_s: 0,
        };
        let unpause = |name: &str, files: &[&Path]| Request::Unpause {
            which: which(0),
            target: Some(bed.create(name).open.target),
            may_shrink: false,
            files: files.iter().map(|path| path.to_path_buf()).collect(),
        };
        let free = || async {
            ask(&bed, "ask", &[]);
            let minor = bed.made(bed.create("parent.img")).await;
            bed.destroy(minor).await;
        };
        // An unpause that fails after it was given.
        bed.made(bed.create("a.qcow2")).await;
        let first = bed.row(0).await.pid;
        bed.ask(pause()).await.expect("paused");
        ask(&bed, "ask", &extent);
        put(bed.dir.join("refuse"), "it is no image");
        bed.ask(unpause("b.qcow2", &[&path]))
            .await
            .expect_err("refused");
        assert_ne!(bed.row(0).await.pid, first);
        fs::remove_file(bed.dir.join("refuse")).expect("remove");
        free().await;
        // An image of which it is a part is exchanged.
        ask(&bed, "ask", &extent);
        bed.ask(unpause("b.qcow2", &[&path]))
            .await
            .expect("goes on");
        let second = bed.row(0).await.pid;
        bed.ask(pause()).await.expect("paused");
        ask(&bed, "ask", &[]);
        bed.ask(unpause("a.qcow2", &[])).await.expect("goes on");
        let third = bed.row(0).await.pid;
        assert!(third.is_some() && third != second);
        free().await;
        // It is closed.
        bed.destroy(0).await;
        ask(&bed, "ask", &extent);
        bed.made(with(&bed, "a.qcow2", &[&path])).await;
        let fourth = bed.row(0).await.pid;
        let close = Request::Close {
            which: which(0),
            force: false,
            timeout_s: 0,
        };
        bed.ask(close).await.expect("closed");
        let fifth = bed.row(0).await.pid;
        assert!(fifth.is_some() && fifth != fourth);
        free().await;
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// A snapshot: the new image has the one that was served until now as its backing image.
#[test]
fn an_image_that_was_served_becomes_a_parent() {
    test("needs-snapshot", |bed| async move {
        let old = served(&bed);
        bed.made(bed.create("parent.img")).await;
        let pause = Request::Pause {
            which: which(0),
            timeout_s: 0,
        };
        bed.ask(pause).await.expect("paused");
        ask(&bed, "ask", &[parent(&old)]);
        let unpause = Request::Unpause {
            which: which(0),
            target: Some(bed.create("a.qcow2").open.target),
            may_shrink: false,
            files: Vec::new(),
        };
        bed.ask(unpause).await.expect("goes on");
        let log = bed.log();
        assert_eq!(
            log[log.len() - 2..],
            ["given old Locked", "unpause w child"]
        );
        // From now on it is read and not written: other disks may have it as a backing image, too.
        bed.image("b.qcow2", "other");
        let other = bed.made(with(&bed, "b.qcow2", &[&old])).await;
        bed.replaced(0, kill).await;
        bed.destroy(other).await;
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_server_is_connected_to_again() {
    test("needs-socket", |bed| async move {
        bed.image("a.qcow2", "child");
        let folder = bed.dir.join("servers");
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("server");
        let server = hello(UnixListener::bind(&path).expect("a socket"));
        let socket = RequestedFile::Socket { path: path.clone() };
        ask(&bed, "ask", std::slice::from_ref(&socket));
        let minor = bed.made(bed.create("a.qcow2")).await;
        assert_eq!(server.join().expect("a server"), *b"hello");
        // The server has gone: the process asks for it again, and once more when there is another.
        ask(&bed, "ask-later", std::slice::from_ref(&socket));
        let resize = || bed.ask(Request::Resize(which(minor)));
        let failure = resize().await.expect_err("nobody listens");
        assert!(
            failure.message.contains("see whether its server runs"),
            "{failure}"
        );
        fs::remove_file(&path).expect("remove");
        let server = hello(UnixListener::bind(&path).expect("a socket"));
        resize().await.expect("connected");
        assert_eq!(server.join().expect("a server"), *b"hello");
        let again = What::Reconnected { path: path.clone() };
        assert!(bed.events().contains(&again));
        // Sockets elsewhere, such as that of the supervisor, are not for disks.
        let elsewhere = bed.dir.join("socket");
        let _listener = UnixListener::bind(&elsewhere).expect("a socket");
        let socket = RequestedFile::Socket { path: elsewhere };
        bed.image("b.qcow2", "other");
        let before = bed.log().len();
        ask(&bed, "ask", &[socket]);
        let why = refused(&bed, bed.create("b.qcow2")).await;
        assert!(why.contains("or start blktapctrl with --files"), "{why}");
        assert!(!bed
            .log()
            .iter()
            .skip(before)
            .any(|line| line == "connected"));
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

/// A server that one client says something to.
pub(crate) fn hello(listener: UnixListener) -> JoinHandle<[u8; 5]> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut text = [0; 5];
        stream.read_exact(&mut text).expect("a client");
        text
    })
}

#[test]
fn an_export_is_reached_by_its_disk_alone() {
    test("needs-export", |bed| async move {
        let path = bed.dir.join("nbd.sock");
        let target = |place: &Path, name: &str| -> Target {
            let text = format!("nbd:unix:{}:exportname={name}", place.display());
            text.parse().expect("a target")
        };
        let create = |target: &Target, mode: Mode| Create {
            open: Open::new(target.clone()),
            mode,
            ..bed.create("a.img")
        };
        let first = target(&path, "a");
        let need = |target: &Target| RequestedFile::Server {
            target: target.clone(),
        };
        let server = hello(UnixListener::bind(&path).expect("a socket"));
        ask(&bed, "ask", &[need(&first)]);
        let minor = bed.made(create(&first, Mode::Write)).await;
        assert_eq!(server.join().expect("a server"), *b"hello");
        // Another disk does not get it, whatever the name of the socket's folder.
        let folder = bed.dir.join("other-name");
        std::os::unix::fs::symlink(&bed.dir, &folder).expect("a link");
        for place in [&path, &folder.join("nbd.sock")] {
            let why = refused(&bed, create(&target(place, "a"), Mode::Read)).await;
            assert!(why.contains(&format!("tap disk {minor}")), "{why}");
        }
        // Nor what its process likes to have.
        let other = target(&path, "b");
        ask(&bed, "ask", &[need(&first)]);
        let why = refused(&bed, create(&other, Mode::Write)).await;
        assert!(why.contains("is not served from nbd+unix"), "{why}");
        // Readers share it. The message names a server that is away.
        fs::remove_file(&path).expect("remove");
        ask(&bed, "ask", &[need(&other)]);
        let why = refused(&bed, create(&other, Mode::Read)).await;
        assert!(why.contains("nbd.sock"), "{why}");
        ask(&bed, "ask", &[]);
        for _ in 0..2 {
            bed.made(create(&other, Mode::Read)).await;
        }
        // It comes back, and is connected to again.
        let server = hello(UnixListener::bind(&path).expect("a socket"));
        ask(&bed, "ask-later", &[need(&first)]);
        let resize = bed.ask(Request::Resize(which(minor)));
        resize.await.expect("connected");
        assert_eq!(server.join().expect("a server"), *b"hello");
        let again = |what: &What| matches!(what, What::Reconnected { path } if path.starts_with("nbd+unix:"));
        assert!(bed.events().iter().any(again));
        // The disks' own sockets are no way around the rules.
        let own = bed.registry().folder.root().join("own");
        let _listener = UnixListener::bind(&own).expect("a socket");
        let own = target(&own, "");
        ask(&bed, "ask", &[need(&own)]);
        let why = refused(&bed, create(&own, Mode::Write)).await;
        assert!(why.contains("the supervisor's own"), "{why}");
        for minor in 0..3 {
            bed.destroy(minor).await;
        }
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_server_on_a_network_is_connected_to() {
    test("needs-network", |bed| async move {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let target: Target = format!("nbd:localhost:{port}:exportname=a")
            .parse()
            .expect("a target");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut text = [0; 5];
            stream.read_exact(&mut text).expect("a client");
            text
        });
        let need = RequestedFile::Server {
            target: target.clone(),
        };
        ask(&bed, "ask", std::slice::from_ref(&need));
        let create = Create {
            open: Open::new(target),
            ..bed.create("a.img")
        };
        let minor = bed.made(create.clone()).await;
        assert_eq!(server.join().expect("a server"), *b"hello");
        bed.destroy(minor).await;
        // No server listens there any more.
        let why = refused(&bed, create).await;
        assert!(why.contains("see whether its server runs"), "{why}");
        bed.assert_nothing_left().await;
    });
}

fn states(bed: &Bed) -> Vec<String> {
    let log = bed.log().into_iter();
    log.filter(|line| line.starts_with("state")).collect()
}

/// A supervisor ends in the middle of an unpause: the state of the image before is not that of the next.
#[test]
fn state_of_an_image_is_not_that_of_the_next() {
    let host = Succession::new("needs-state-next");
    let state = RequestedFile::State { size: 4096 };
    block_on(async {
        let bed = host.bed();
        bed.image("a.qcow2", "A");
        bed.image("b.qcow2", "B");
        ask(&bed, "ask", std::slice::from_ref(&state));
        bed.made(bed.create("a.qcow2")).await;
        let pause = Request::Pause {
            which: which(0),
            timeout_s: 0,
        };
        bed.ask(pause).await.expect("paused");
        // The supervisor ends when the record has the unpause: the process has no question yet.
        bed.kernel.crash.left.set(Some(1));
        let unpause = Request::Unpause {
            which: which(0),
            target: Some(bed.create("b.qcow2").open.target),
            may_shrink: false,
            files: Vec::new(),
        };
        let next = bed.clone();
        let asked = tokio::task::spawn_local(async move { next.ask(unpause).await });
        until("the end of the supervisor", || async {
            (asked.is_finished() && bed.kernel.crash.happened.get()).then_some(())
        })
        .await;
    });
    host.kernel.crash.left.set(None);
    host.kernel.crash.happened.set(false);
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        until("the end of the unpause", || async {
            bed.row(0).await.doing.is_none().then_some(())
        })
        .await;
        assert_eq!(bed.log().last().map(String::as_str), Some("unpause w B"));
        // The process holds that of the first image, and gets none of it for the second.
        assert_eq!(states(&bed), ["state ", "state "]);
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn state_outlives_a_process_and_a_supervisor() {
    let host = Succession::new("needs-state");
    let (mut pids, state) = (Vec::new(), RequestedFile::State { size: 4096 });
    block_on(async {
        let bed = host.bed();
        bed.image("a.qcow2", "child");
        ask(&bed, "ask", std::slice::from_ref(&state));
        let minor = bed.made(bed.create("a.qcow2")).await;
        assert_eq!(minor, 0);
        let row = bed.row(0).await;
        assert_eq!(row.state_bytes, 4096);
        pids.push(row.pid.expect("a process"));
        bed.replaced(0, kill).await;
        pids.push(bed.row(0).await.pid.expect("a process"));
        assert_eq!(
            states(&bed),
            ["state ".to_owned(), format!("state of {}", pids[0])]
        );
    });
    block_on(async {
        let bed = host.bed();
        recovery::disks(&bed.lifecycle).await;
        assert_eq!(bed.row(0).await.state_bytes, 4096);
        bed.replaced(0, kill).await;
        let last = states(&bed).pop();
        assert_eq!(last, Some(format!("state of {}", pids[1])));
        // A process that asks for another size does not know the content.
        ask(&bed, "ask", &[RequestedFile::State { size: 512 }]);
        bed.replaced(0, kill).await;
        assert_eq!(states(&bed).pop(), Some("state ".to_owned()));
        assert_eq!(bed.row(0).await.state_bytes, 512);
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

/// A file without write permission is no other guest's disk: beside the image it may be had without an option.
#[test]
fn a_parent_beside_the_image_is_given_if_nobody_may_write_it() {
    test("needs-beside", |bed| async move {
        let path = served(&bed);
        bed.image("b.qcow2", "other");
        let fixed = |path: &Path, mode: u32| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        };
        fixed(&path, 0o444);
        ask(&bed, "ask", &[parent(&path)]);
        let minor = bed.made(bed.create("a.qcow2")).await;
        let second = bed.made(bed.create("b.qcow2")).await;
        let log = bed.log();
        let given = log.iter().filter(|line| *line == "given old Locked");
        assert_eq!(given.count(), 2);
        // A file that one process got stays so, also for the next one.
        fixed(&path, 0o644);
        bed.replaced(minor, kill).await;
        bed.destroy(second).await;
        bed.destroy(minor).await;
        let why = refused(&bed, bed.create("a.qcow2")).await;
        assert!(why.contains("chmod a-w"), "{why}");
        // Not a file for writing, nor one that is elsewhere.
        fixed(&path, 0o444);
        ask(&bed, "ask", &[RequestedFile::Extent { path: path.clone() }]);
        let why = refused(&bed, bed.create("a.qcow2")).await;
        assert!(why.contains("when the disk is made or unpaused"), "{why}");
        let folder = bed.dir.join("elsewhere");
        fs::create_dir_all(&folder).expect("a folder");
        let secret = folder.join("secret");
        fs::write(&secret, "secret").expect("write");
        fixed(&secret, 0o444);
        let link = bed.dir.join("link");
        std::os::unix::fs::symlink(&secret, &link).expect("a link");
        for path in [&secret, &link, &folder.join("../elsewhere/secret")] {
            ask(&bed, "ask", &[parent(path)]);
            let why = refused(&bed, bed.create("a.qcow2")).await;
            assert!(why.contains("--files does not name"), "{why}");
        }
        bed.assert_nothing_left().await;
    });
}

#[test]
fn files_of_a_vmdk_are_known_by_their_names() {
    test("needs-vmdk", |bed| async move {
        bed.image("a.vmdk", "descriptor");
        bed.image("a-db.vmdk", "another guest's");
        let path = bed.image("a-flat.vmdk", "flat");
        let extent = |path: &Path| RequestedFile::Extent { path: path.into() };
        ask(&bed, "ask", &[extent(&path)]);
        let minor = bed.made(bed.create("a.vmdk")).await;
        let expected = ["given w flat Locked", "open w descriptor"];
        assert_eq!(bed.log()[1..], expected);
        // It is the disk's alone.
        ask(&bed, "ask", &[]);
        let why = refused(&bed, bed.create("a-flat.vmdk")).await;
        assert!(why.contains(&format!("tap disk {minor}")), "{why}");
        bed.destroy(minor).await;
        ask(&bed, "ask", &[extent(&bed.dir.join("a-db.vmdk"))]);
        let why = refused(&bed, bed.create("a.vmdk")).await;
        assert!(why.contains("when the disk is made or unpaused"), "{why}");
        // A disk that is only read gets no more than that.
        ask(&bed, "ask", &[extent(&path), parent(&path)]);
        let reader = Create {
            mode: Mode::Read,
            ..bed.create("a.vmdk")
        };
        let minor = bed.made(reader).await;
        assert!(bed.log().ends_with(&[
            "given flat Locked".into(),
            "given flat Locked".into(),
            "open r descriptor".into()
        ]));
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn who_serves_a_raw_image_gets_no_part_of_it() {
    test("needs-raw", |bed| async move {
        let path = bed.image("a.img", "raw");
        let other = bed.image("other.img", "other");
        bed.image("c.vhd", "VHD");
        let extent = RequestedFile::Extent {
            path: other.clone(),
        };
        for (name, need) in [
            ("a.img", parent(&other)),
            ("a.img", extent.clone()),
            ("c.vhd", extent),
        ] {
            ask(&bed, "ask", &[need]);
            let why = refused(&bed, with(&bed, name, &[&other])).await;
            assert!(why.contains("has none"), "{why}");
        }
        // The memory that outlives a process is for all.
        ask(&bed, "ask", &[RequestedFile::State { size: 512 }]);
        let minor = bed.made(bed.create("a.img")).await;
        bed.destroy(minor).await;
        assert!(path.exists());
        bed.assert_nothing_left().await;
    });
}

/// Each image of a chain has the one that was served before it as its backing image, with the whole chain of that.
#[test]
fn a_chain_of_snapshots_is_what_was_served() {
    test("needs-chain", |bed| async move {
        let old = served(&bed);
        bed.made(bed.create("parent.img")).await;
        let mut chain = vec![old];
        for name in ["a.qcow2", "b.qcow2", "c.qcow2"] {
            let path = bed.image(name, name);
            let pause = Request::Pause {
                which: which(0),
                timeout_s: 0,
            };
            bed.ask(pause).await.expect("paused");
            let needs: Vec<RequestedFile> = chain.iter().rev().map(|path| parent(path)).collect();
            ask(&bed, "ask", &needs);
            let unpause = Request::Unpause {
                which: which(0),
                target: Some(bed.create(name).open.target),
                may_shrink: false,
                files: Vec::new(),
            };
            bed.ask(unpause).await.expect("goes on");
            bed.replaced(0, kill).await;
            chain.push(path);
        }
        bed.destroy(0).await;
        // Another disk may not.
        let why = refused(&bed, bed.create("c.qcow2")).await;
        assert!(why.contains("--files does not name"), "{why}");
        bed.assert_nothing_left().await;
    });
}

/// A guest may have an image twice, but not one that changes below another one.
#[test]
fn what_a_guest_writes_is_no_parent_of_its_other_disk() {
    test("needs-written", |bed| async move {
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        bed.registry().use_store(Some(store));
        bed.store.put("/local/domain/3", &[("vm", "/vm/a")]);
        let path = served(&bed);
        let of = |device: u32, create: Create| {
            let directory = format!("backend/vbd/3/{device}");
            bed.store.put(&directory, &[("frontend", "f")]);
            Create {
                vbd: Some(directory),
                ..create
            }
        };
        let writer = bed.made(of(51712, bed.create("parent.img"))).await;
        ask(&bed, "ask", &[parent(&path)]);
        let why = refused(&bed, of(51728, with(&bed, "a.qcow2", &[&path]))).await;
        assert!(why.contains("one of the two writes it"), "{why}");
        bed.destroy(writer).await;
        let minor = bed.made(of(51728, with(&bed, "a.qcow2", &[&path]))).await;
        bed.destroy(minor).await;
        bed.assert_nothing_left().await;
    });
}
