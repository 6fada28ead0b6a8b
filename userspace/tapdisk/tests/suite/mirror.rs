// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk is copied to another image while its guest works, and switches to it.

use crate::common::guest::{Guest, Step};
use crate::common::images::{answered, file, steps, Folder, ServedImage, SIZE};
use crate::common::{Process, LIMIT};
use crate::export::{give, ExportServer};
use control::stats::{Mirror, Mirroring};
use control::tapdisk::{Disk, Open, Reply, Request};
use control::{Code, Failure};
use ring::response::ResponseStatus as Answer;
use ring::tap::shadow::Op;
use rustix::fs::{fcntl_add_seals, ftruncate, memfd_create, MemfdFlags, SealFlags};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use tapdev::fake::FakeTap;

/// Time in which a guest's request ends although its mirror hangs, on a busy machine.
const LATE: Duration = Duration::from_secs(90);
/// Milliseconds in which requests on a network may still be executed.
const LATER: u64 = 60_000;

fn told(process: &mut Process) -> Option<Mirror> {
    match process.ask(Request::Stats, None) {
        Ok(Reply::Stats(stats)) => stats.mirror,
        other => panic!("{other:?}"),
    }
}

/// Asks until `is_so` holds; the limit is longer than any of these waits.
fn until(process: &mut Process, is_so: impl Fn(&Mirror) -> bool) -> Mirror {
    let start = Instant::now();
    loop {
        let found = told(process).expect("a mirror");
        if is_so(&found) {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "{found:?}");
    }
}

fn begin(
    process: &mut Process,
    open: Open,
    image: BorrowedFd<'_>,
    rate: u64,
) -> Result<Reply, Failure> {
    let below = false;
    process.ask_with(Request::Mirror { open, rate, below }, image)
}

fn mirror(process: &mut Process, to: &ServedImage, rate: u64) -> Result<Reply, Failure> {
    let image = file(&to.path, true);
    begin(process, to.question(), image.as_fd(), rate)
}

fn is_same(mirror: &Mirror) -> bool {
    mirror.state == Mirroring::Same
}

/// Waits until a copy is as the disk.
pub(crate) fn until_same(process: &mut Process) {
    until(process, is_same);
}

fn served(folder: &Folder, name: &str, driver: &'static str) -> ServedImage {
    ServedImage {
        path: folder.path(name),
        driver,
        files: 0,
    }
}

/// A guest works on an image that is copied to another one, while its process is killed, and switches to it. The old
/// content of the other image is never visible.
fn moves(test: &str, from: (&'static str, &str), to: (&'static str, &str)) {
    let Some(folder) = Folder::new(test) else {
        return;
    };
    let model = match from.0 {
        "aio" => folder.raw("from", 5),
        _ => {
            folder.empty(from.1, "from");
            vec![0; SIZE as usize]
        }
    };
    match to.0 {
        "aio" => drop(folder.raw("to", 77)),
        _ => folder.empty(to.1, "to"),
    }
    let (from, to) = (
        (served(&folder, "from", from.0), from.1),
        (served(&folder, "to", to.0), to.1),
    );
    let fake = FakeTap::new(16).expect("a node");
    let (mut process, _) = from.0.start(&fake);
    let mut guest = Guest::new(&fake, model, 8);
    let (mut steps, mut deaths) = (steps().into_iter(), 0);
    let rate = 8 << 20;
    mirror(&mut process, &to.0, rate).expect("a mirror");
    for step in steps.by_ref().take(200) {
        if matches!(step, Step::Kill) {
            deaths += 1;
            if deaths % 2 == 0 {
                until(&mut process, |mirror| mirror.offset > 0);
            }
            process.kill();
            process = from.0.start(&fake).0;
            mirror(&mut process, &to.0, rate).expect("a mirror");
        }
        guest.send(&step);
    }
    until(&mut process, is_same);
    // From now on each write goes to both.
    for step in steps
        .by_ref()
        .take(60)
        .filter(|step| !matches!(step, Step::Kill))
    {
        guest.send(&step);
    }
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let last = told(&mut process).expect("a mirror");
    assert_eq!(last.state, Mirroring::Complete, "{last:?}");
    if to.1 != "raw" {
        folder.check(to.1, "to", true);
    }
    assert!(folder.content(from.1, "from") == folder.content(to.1, "to"));
    let before = fs::read(&from.0.path).expect("read");
    let (reply, _) = to.0.ask(&mut process, Request::Unpause(to.0.question()));
    assert!(
        matches!(reply, Ok(Reply::Disk(Disk { size: SIZE, .. }))),
        "{reply:?}"
    );
    for step in steps.filter(|step| !matches!(step, Step::Kill)) {
        guest.send(&step);
    }
    guest.finish();
    process.exit();
    assert!(folder.content(to.1, "to") == guest.model);
    assert!(fs::read(&from.0.path).expect("read") == before);
}

#[test]
fn raw_image_becomes_a_qcow2_image() {
    moves("raw_becomes_qcow2", ("aio", "raw"), ("qcow2", "qcow2"));
}

#[test]
fn qcow2_image_becomes_a_raw_image_that_held_something() {
    moves("qcow2_becomes_raw", ("qcow2", "qcow2"), ("aio", "raw"));
}

#[test]
fn raw_image_becomes_a_vmdk() {
    moves("raw_becomes_vmdk", ("aio", "raw"), ("vmdk", "vmdk"));
}

#[test]
fn qcow_image_becomes_a_vhd() {
    moves("qcow_becomes_vhd", ("qcow", "qcow"), ("vhd", "vpc"));
}

#[test]
fn vhd_becomes_a_qcow_image() {
    moves("vhd_becomes_qcow", ("vhd", "vpc"), ("qcow", "qcow"));
}

#[test]
fn vmdk_becomes_a_qcow2_image() {
    moves("vmdk_becomes_qcow2", ("vmdk", "vmdk"), ("qcow2", "qcow2"));
}

#[test]
fn one_that_is_paused_or_ended_is_over_and_another_one_begins() {
    let Some(folder) = Folder::new("one_that_is_paused") else {
        return;
    };
    let model = folder.raw("from", 5);
    folder.raw("to", 9);
    let (from, to) = (served(&folder, "from", "aio"), served(&folder, "to", "aio"));
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = from.start(&fake);
    assert_eq!(told(&mut process), None);
    // A piece takes days.
    mirror(&mut process, &to, 1).expect("a mirror");
    let again = mirror(&mut process, &to, 1).expect_err("there is one");
    // Its own lock is in the way, or it says so itself.
    assert!(matches!(again.code, Code::State | Code::Busy), "{again}");
    until(&mut process, |mirror| mirror.offset > 0);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let ended = told(&mut process).expect("a mirror");
    assert_eq!(ended.state, Mirroring::Ended);
    let (reply, _) = from.ask(&mut process, Request::Unpause(from.question()));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    let before = fs::read(&to.path).expect("read");
    answered(&fake, Op::Write, 0, &[7; 4096]);
    assert!(
        fs::read(&to.path).expect("read") == before,
        "it was written"
    );
    mirror(&mut process, &to, u64::MAX).expect("a mirror");
    until(&mut process, is_same);
    process.exit();
    let mut expected = model;
    expected[..4096].fill(7);
    assert!(fs::read(&to.path).expect("read") == expected);
}

#[test]
fn what_cannot_be_the_disk_is_refused() {
    let Some(folder) = Folder::new("what_cannot_be_the_disk") else {
        return;
    };
    folder.raw("from", 5);
    let from = served(&folder, "from", "aio");
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = from.start(&fake);
    let small = (SIZE - 4096).to_string();
    folder.img(&["create", "-f", "qcow2", "small", &small]);
    let to = served(&folder, "small", "qcow2");
    let failure = mirror(&mut process, &to, 1).expect_err("it is too small");
    assert_eq!(failure.code, Code::Image, "{failure}");
    assert!(failure.message.contains("make it larger"), "{failure}");
    // The lock of the image is free again.
    folder.img(&["resize", "-f", "qcow2", "small", &SIZE.to_string()]);
    mirror(&mut process, &to, u64::MAX).expect("a mirror");
    until(&mut process, is_same);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let (reply, _) = from.ask(&mut process, Request::Unpause(from.question()));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    folder.img(&["create", "-f", "qcow2", "-b", "from", "-F", "raw", "child"]);
    let to = served(&folder, "child", "qcow2");
    let failure = mirror(&mut process, &to, 1).expect_err("it needs another one");
    assert_eq!(failure.code, Code::Unsupported, "{failure}");
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let failure = mirror(&mut process, &to, 1).expect_err("it is paused");
    assert_eq!(failure.code, Code::State);
    process.exit();
}

/// The other image fails, and the guest learns nothing of it.
#[test]
fn a_mirror_that_fails_is_not_the_guests() {
    let Some(folder) = Folder::new("a_mirror_that_fails") else {
        return;
    };
    folder.raw("from", 5);
    let from = served(&folder, "from", "aio");
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = from.start(&fake);
    let memory = memfd_create("to", MemfdFlags::ALLOW_SEALING).expect("memory");
    ftruncate(&memory, SIZE).expect("a size");
    let open = Open::new("sync:/memory".parse().expect("a target"));
    begin(&mut process, open, memory.as_fd(), u64::MAX).expect("a mirror");
    until(&mut process, is_same);
    answered(&fake, Op::Write, 8, &[7; 512]);
    // From now on it is read-only.
    fcntl_add_seals(&memory, SealFlags::FUTURE_WRITE | SealFlags::WRITE).expect("sealed");
    let tag = fake
        .send(Op::Write, 9, &[8; 512], false)
        .expect("a request");
    assert_eq!(fake.answer(tag, 0).expect("an answer").0, Answer::Okay);
    let failed = told(&mut process).expect("a mirror");
    let Mirroring::Failed { why } = failed.state else {
        panic!("{failed:?}");
    };
    assert!(why.contains("cannot write the other image"), "{why}");
    let read = answered(&fake, Op::Read, 8, &[0; 1024]);
    assert_eq!(read, [[7; 512], [8; 512]].concat());
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let still = told(&mut process).expect("a mirror");
    assert!(matches!(still.state, Mirroring::Failed { .. }), "{still:?}");
    process.exit();
}

/// When the disk is served from the other image, the guest sees the part behind the old end.
#[test]
fn what_a_larger_image_held_behind_the_disks_end_is_not_seen() {
    let Some(folder) = Folder::new("what_a_larger_image_held") else {
        return;
    };
    let model = folder.raw("from", 5);
    let from = served(&folder, "from", "aio");
    let to = served(&folder, "to", "aio");
    fs::write(&to.path, vec![0x77; SIZE as usize + (3 << 20)]).expect("write");
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = from.start(&fake);
    mirror(&mut process, &to, u64::MAX).expect("a mirror");
    until(&mut process, is_same);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    process.exit();
    let found = fs::read(&to.path).expect("read");
    assert!(found[..SIZE as usize] == model);
    assert!(found[SIZE as usize..].iter().all(|byte| *byte == 0));
}

/// Has the disk copied to an export, to which the test makes the connection.
fn mirror_to_server(process: &mut Process, server: &ExportServer, rate: u64) {
    let (open, below) = (server.open("disk"), false);
    let question = Request::Mirror { open, rate, below };
    let begun = process.ask_giving(question, &[], |channel| {
        give(channel, &server.socket(), 1);
    });
    assert_eq!(begun, Ok(Reply::Done));
}

/// A guest whose disk is a raw image in `folder`, and a server to which it can be copied.
struct OverNetwork {
    folder: Folder,
    from: ServedImage,
    model: Vec<u8>,
    server: ExportServer,
    fake: FakeTap,
}

impl OverNetwork {
    fn new(test: &str) -> Option<Self> {
        let folder = Folder::new(test)?;
        Some(Self {
            model: folder.raw("from", 5),
            from: served(&folder, "from", "aio"),
            folder,
            server: ExportServer::of(SIZE),
            fake: FakeTap::new(16).expect("a node"),
        })
    }

    /// The process that serves it, and the guest.
    fn begin(&self) -> (Process, Guest<'_>) {
        let (process, _) = self.from.start(&self.fake);
        (process, Guest::new(&self.fake, self.model.clone(), 8))
    }
}

/// A server that does not answer any more makes the guest wait for a while, and not for ever: the copy is given up.
#[test]
fn guest_goes_on_without_a_server_that_hangs() {
    let Some(bed) = OverNetwork::new("server_hangs") else {
        return;
    };
    let (mut process, mut guest) = bed.begin();
    let (fake, server) = (&bed.fake, &bed.server);
    mirror_to_server(&mut process, server, 1 << 30);
    until(&mut process, is_same);
    server.stop();
    let begun = Instant::now();
    for step in steps().iter().filter(|step| !matches!(step, Step::Kill)) {
        guest.send(step);
    }
    guest.finish();
    assert!(begun.elapsed() < LATE, "{:?}", begun.elapsed());
    let last = told(&mut process).expect("a mirror");
    assert!(
        matches!(&last.state, Mirroring::Failed { why } if why.contains("has not answered for 30 s")),
        "{last:?}"
    );
    // The server may still execute requests that it got.
    process.leave();
    assert!(!fake.looks_quiet(LATER - 1));
    assert!(bed.folder.content("raw", "from") == guest.model);
}

/// The image is on a local disk, so without the server no process would have had to wait.
#[test]
fn raw_image_is_copied_to_a_server_and_goes_on_there() {
    let Some(bed) = OverNetwork::new("raw_goes_to_a_server") else {
        return;
    };
    let (mut process, mut guest) = bed.begin();
    let (fake, server, from) = (&bed.fake, &bed.server, &bed.from);
    let mut steps = steps()
        .into_iter()
        .filter(|step| !matches!(step, Step::Kill));
    let mut go_on = |guest: &mut Guest<'_>, count| {
        for step in steps.by_ref().take(count) {
            guest.send(&step);
        }
    };
    go_on(&mut guest, 40);
    mirror_to_server(&mut process, server, 8 << 20);
    go_on(&mut guest, 40);
    until(&mut process, |mirror| mirror.offset > 0);
    // It dies after it has told the kernel that its I/O may be over later.
    process.die();
    assert!(!fake.looks_quiet(0) && !fake.looks_quiet(LATER - 1));
    assert!(fake.looks_quiet(LATER));
    let (mut process, _) = from.start(fake);
    mirror_to_server(&mut process, server, 1 << 30);
    go_on(&mut guest, 40);
    until(&mut process, is_same);
    // It is paused, and resumes where it was.
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let (reply, _) = from.ask(&mut process, Request::Unpause(from.question()));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    mirror_to_server(&mut process, server, 1 << 30);
    go_on(&mut guest, 40);
    until(&mut process, is_same);
    go_on(&mut guest, 40);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let last = told(&mut process).expect("a mirror");
    assert_eq!(last.state, Mirroring::Complete, "{last:?}");
    assert!(bed.folder.content("raw", "from") == server.image());
    // As the supervisor does: another process serves it from there. Nothing of this one is under way.
    process.leave();
    assert!(fake.looks_quiet(0));
    let mut process = Process::start(fake);
    let question = Request::Open(server.open("disk"));
    let reply = process.ask_giving(question, &[], |channel| {
        give(channel, &server.socket(), 1);
    });
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    go_on(&mut guest, usize::MAX);
    guest.finish();
    process.exit();
    assert!(server.image() == guest.model);
}
