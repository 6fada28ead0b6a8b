// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images with tables of their own, alone and over others, as a guest sees them: whenever the process dies,
//! what was answered is there, and QEMU's tools find nothing wrong.

mod common;
#[path = "../../formats/tests/common/qemu.rs"]
mod qemu;

use common::guest::{step, Guest, Step};
use common::Process;
use control::tapdisk::{Disk, Needed, Open, Provided, Reply, Request};
use control::{Channel, Code, Driver, Failure};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use qemu::has_qemu;
use ring::response::Status as Answer;
use ring::tap::shadow::Op;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use tapdev::fake::Fake;

/// Bytes of a disk: some clusters of all formats, and an odd end.
const SIZE: u64 = (5 << 20) + 4096;
/// Steps of a guest with one image.
const STEPS: usize = 300;
/// Deaths among them.
const DEATHS: usize = 6;

/// A folder on the file system of the build, which can do direct I/O.
struct Folder(tempfile::TempDir);

impl Folder {
    /// Nothing, and says so, if QEMU's tools are not there.
    fn new(test: &str) -> Option<Self> {
        if !has_qemu(test) {
            return None;
        }
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"));
        Some(Self(folder.expect("a folder")))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs qemu-img here; its status and what it says.
    fn qemu_img(&self, args: &[&str]) -> (i32, String) {
        let mut command = Command::new("qemu-img");
        let output = command.args(args).current_dir(self.0.path()).output();
        let output = output.expect("qemu-img");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (output.status.code().expect("a status"), text)
    }

    /// The same, which must succeed.
    fn img(&self, args: &[&str]) -> String {
        let (status, text) = self.qemu_img(args);
        assert_eq!(status, 0, "qemu-img {args:?}: {text}");
        text
    }

    /// A raw image with something everywhere.
    fn raw(&self, name: &str, seed: u8) -> Vec<u8> {
        let bytes: Vec<u8> = (0..SIZE)
            .map(|at| seed.wrapping_add((at / 512) as u8).wrapping_mul(31) | 1)
            .collect();
        fs::write(self.path(name), &bytes).expect("write");
        bytes
    }

    /// What QEMU reads of an image.
    fn content(&self, format: &str, name: &str) -> Vec<u8> {
        // It need not survive a loss of power.
        let convert = ["convert", "-t", "unsafe", "-f", format, "-O", "raw"];
        self.img(&[&convert[..], &[name, "content.raw"]].concat());
        fs::read(self.path("content.raw")).expect("read")
    }

    /// No table of an image is wrong. Space that a process had prepared when it was killed may be lost.
    fn check(&self, format: &str, name: &str, after_death: bool) {
        let (status, text) = self.qemu_img(&["check", "-f", format, name]);
        match status {
            0 => {}
            // Only leaked clusters.
            3 if after_death => {}
            // The format has no check.
            63 => assert!(matches!(format, "vpc" | "qcow"), "{text}"),
            _ => panic!("qemu-img check {name}: {text}"),
        }
    }
}

fn file(path: &Path, write: bool) -> OwnedFd {
    let mut options = File::options();
    options.read(true).write(write).custom_flags(libc::O_DIRECT);
    options.open(path).expect("a file").into()
}

/// Gives a process so many files that it asks for. What it could leave to the next one it asks for first,
/// and does without.
fn give(channel: &mut Channel, files: usize) -> Vec<Needed> {
    let (mut known, mut asked) = (0, Vec::new());
    while asked.len() < 1 + files {
        // Who fails asks for nothing more: the answer says why.
        let Ok(Reply::Needs { needs }) = channel.ask(Request::Needs { after: known }, &[]) else {
            break;
        };
        for need in needs {
            known = known.max(need.number);
            let fd = match &need.what {
                Needed::Parent { path } => Some(file(path, false)),
                Needed::Extent { path } => Some(file(path, true)),
                _ => None,
            };
            let provided = match &fd {
                Some(_) => Provided::Locked,
                None => Provided::Refused(Failure::new(Code::Denied, "it is not for a test")),
            };
            let number = need.number;
            let question = Request::Provide { number, provided };
            let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
            assert_eq!(channel.ask(&question, &fds), Ok(Reply::Done));
            asked.push(need.what);
        }
    }
    asked.retain(|what| what.path().is_some());
    asked
}

/// An image that is served, with so many files beside it.
struct Served {
    path: PathBuf,
    driver: &'static str,
    files: usize,
}

impl Served {
    fn question(&self) -> Open {
        let target = format!("{}:{}", self.driver, self.path.display());
        Open {
            may_ask: true,
            ..Open::new(target.parse().expect("a target"))
        }
    }

    fn ask(
        &self,
        process: &mut Process,
        question: Request,
    ) -> (Result<Reply, Failure>, Vec<Needed>) {
        let mut asked = Vec::new();
        let image = file(&self.path, true);
        let give = |channel: &mut Channel| asked = give(channel, self.files);
        let reply = process.ask_and_give(question, image.as_fd(), give);
        (reply, asked)
    }

    fn start(&self, fake: &Fake) -> (Process, Disk) {
        let mut process = Process::start(fake);
        let (reply, _) = self.ask(&mut process, Request::Open(self.question()));
        match reply {
            Ok(Reply::Disk(disk)) => (process, disk),
            reply => panic!("{}: {reply:?}", self.path.display()),
        }
    }
}

/// What a guest does. A discarded range may read as anything, so there is none.
fn steps() -> Vec<Step> {
    let mut runner = TestRunner::deterministic();
    let step = step(SIZE / 512).prop_filter("what is read afterwards is known", |step| {
        !matches!(step, Step::Discard(..) | Step::Kill)
    });
    let mut steps: Vec<Step> = std::iter::repeat_with(|| step.new_tree(&mut runner))
        .take(STEPS)
        .map(|tree| tree.expect("a step").current())
        .collect();
    for death in 1..=DEATHS {
        steps[death * STEPS / (DEATHS + 1)] = Step::Kill;
    }
    steps
}

/// A guest works on an image while its process is killed again and again.
fn endure(folder: &Folder, served: &Served, format: &str, model: Vec<u8>) {
    let name = served.path.file_name().and_then(|name| name.to_str());
    let name = name.expect("a name");
    let fake = Fake::new(16).expect("a node");
    let (mut process, disk) = served.start(&fake);
    assert_eq!(disk.size, SIZE, "{name}");
    let mut guest = Guest::new(&fake, model, 8);
    for step in steps() {
        if matches!(step, Step::Kill) {
            process.kill();
            folder.check(format, name, true);
            process = served.start(&fake).0;
        }
        guest.send(&step);
    }
    guest.finish();
    let info = fake.info();
    assert!(info.replayed > 0, "nothing was executed again");
    process.kill();
    folder.check(format, name, true);
    // Without another word from a process.
    assert!(folder.content(format, name) == guest.model, "{name}");
    // One that ends in order leaves all as it should be.
    let (process, _) = served.start(&fake);
    process.exit();
    folder.check(format, name, true);
    assert!(folder.content(format, name) == guest.model, "{name}");
    let info = fake.info();
    assert_eq!((info.refused, fake.malformed(), info.delivered), (0, 0, 0));
}

#[test]
fn qcow2_over_qcow2_over_raw() {
    let Some(folder) = Folder::new("qcow2_over_qcow2_over_raw") else {
        return;
    };
    let base = folder.raw("base.img", 1);
    folder.img(&[
        "create",
        "-f",
        "qcow2",
        "-b",
        "base.img",
        "-F",
        "raw",
        "mid.qcow2",
    ]);
    folder.img(&[
        "create",
        "-f",
        "qcow2",
        "-b",
        "mid.qcow2",
        "-F",
        "qcow2",
        "leaf.qcow2",
    ]);
    let mid = fs::read(folder.path("mid.qcow2")).expect("read");
    let served = Served {
        path: folder.path("leaf.qcow2"),
        driver: "qcow2",
        files: 2,
    };
    endure(&folder, &served, "qcow2", base.clone());
    // What is below was read and no more.
    assert!(fs::read(folder.path("base.img")).expect("read") == base);
    assert!(fs::read(folder.path("mid.qcow2")).expect("read") == mid);
    folder.img(&["check", "-r", "leaks", "leaf.qcow2"]);
    folder.check("qcow2", "leaf.qcow2", false);
}

/// An image that QEMU has made, without anything in it.
fn alone(test: &str, driver: &'static str, format: &str, options: &str, files: usize) {
    let Some(folder) = Folder::new(test) else {
        return;
    };
    let (name, size) = (format!("a.{driver}"), SIZE.to_string());
    let mut args = vec!["create", "-f", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([name.as_str(), size.as_str()]);
    folder.img(&args);
    let served = Served {
        path: folder.path(&name),
        driver,
        files,
    };
    if format == "vmdk" && files > 0 {
        // QEMU writes a random number with as few digits as it needs.
        let text = fs::read_to_string(&served.path).expect("a text");
        let short = |line: &str| match line.starts_with("CID=") {
            true => "CID=ab12\n".to_owned(),
            false => format!("{line}\n"),
        };
        let text: String = text.lines().map(short).collect();
        fs::write(&served.path, text).expect("write");
    }
    endure(&folder, &served, format, vec![0; SIZE as usize]);
}

#[test]
fn qcow2() {
    alone("qcow2", "qcow2", "qcow2", "cluster_size=4k", 0);
}

#[test]
fn qcow() {
    alone("qcow", "qcow", "qcow", "", 0);
}

#[test]
fn vhd_dynamic() {
    let options = "subformat=dynamic,force_size=on";
    alone("vhd_dynamic", "vhd", "vpc", options, 0);
}

#[test]
fn vhd_fixed() {
    let options = "subformat=fixed,force_size=on";
    alone("vhd_fixed", "vhd", "vpc", options, 0);
}

#[test]
fn vmdk() {
    alone("vmdk", "vmdk", "vmdk", "subformat=monolithicSparse", 0);
}

#[test]
fn vmdk_with_sparse_files() {
    let options = "subformat=twoGbMaxExtentSparse";
    alone("vmdk_with_sparse_files", "vmdk", "vmdk", options, 1);
}

#[test]
fn vmdk_with_a_flat_file() {
    let options = "subformat=monolithicFlat";
    alone("vmdk_with_a_flat_file", "vmdk", "vmdk", options, 1);
}

fn answered(fake: &Fake, op: Op, sector: u64, bytes: &[u8]) -> Vec<u8> {
    let len = if op == Op::Read { bytes.len() } else { 0 };
    let tag = fake.send(op, sector, bytes, false).expect("a request");
    let (status, read) = fake.answer(tag, len).expect("an answer");
    assert_eq!(status, Answer::Okay);
    read
}

/// A snapshot: the guest goes on in a new image over the one that was served.
#[test]
fn disk_goes_on_over_what_was_served() {
    let Some(folder) = Folder::new("disk_goes_on_over_what_was_served") else {
        return;
    };
    folder.raw("base.img", 3);
    let base = Served {
        path: folder.path("base.img"),
        driver: "aio",
        files: 0,
    };
    let fake = Fake::new(4).expect("a node");
    let (mut process, _) = base.start(&fake);
    answered(&fake, Op::Write, 0, &[7; 512]);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let before = fs::read(base.path).expect("read");
    folder.img(&[
        "create", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2",
    ]);
    let waits = fake
        .send(Op::Write, 1, &[8; 512], false)
        .expect("a request");
    let next = Served {
        path: folder.path("a.qcow2"),
        driver: "qcow2",
        files: 1,
    };
    let (reply, asked) = next.ask(&mut process, Request::Unpause(next.question()));
    assert!(
        matches!(reply, Ok(Reply::Disk(Disk { size: SIZE, .. }))),
        "{reply:?}"
    );
    let path = folder.path("base.img");
    assert_eq!(asked, [Needed::Parent { path }]);
    assert_eq!(fake.answer(waits, 0).expect("an answer").0, Answer::Okay);
    let read = answered(&fake, Op::Read, 0, &[0; 1024]);
    assert_eq!(read, [[7; 512], [8; 512]].concat());
    let Ok(Reply::Stats(stats)) = process.ask(Request::Stats, None) else {
        panic!("no statistics");
    };
    assert!(!stats.driver.is_empty(), "the driver counts nothing");
    // It has the size that its header says, and nobody else can change that.
    let reply = process.ask(Request::Resize, None);
    assert!(
        matches!(reply, Ok(Reply::Disk(Disk { size: SIZE, .. }))),
        "{reply:?}"
    );
    // Paused, it may be had by others: QEMU makes it larger, and the guest sees it.
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    folder.check("qcow2", "a.qcow2", false);
    let larger = (SIZE + (1 << 20)).to_string();
    folder.img(&["resize", "-f", "qcow2", "a.qcow2", &larger]);
    let (reply, _) = next.ask(&mut process, Request::Unpause(next.question()));
    let Ok(Reply::Disk(disk)) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!(disk.size.to_string(), larger);
    assert_eq!(fake.info().sectors, disk.size / 512);
    process.exit();
    folder.check("qcow2", "a.qcow2", false);
    let mut expected = before.clone();
    expected[512..1024].fill(8);
    expected.resize(disk.size as usize, 0);
    assert!(folder.content("qcow2", "a.qcow2") == expected);
    assert!(fs::read(folder.path("base.img")).expect("read") == before);
}

/// A guest works on a raw image, and goes on in new images, each over the one before, that the process makes
/// while it serves that: with requests under way, and the process killed in between.
fn goes_on(test: &str, chain: &[(&'static str, &str)]) {
    let Some(folder) = Folder::new(test) else {
        return;
    };
    let model = folder.raw("base.img", 5);
    let mut served = Served {
        path: folder.path("base.img"),
        driver: "aio",
        files: 0,
    };
    let fake = Fake::new(16).expect("a node");
    let (mut process, _) = served.start(&fake);
    let mut guest = Guest::new(&fake, model, 8);
    let (steps, mut left) = (steps(), Vec::new());
    let mut steps = steps.iter().filter(|step| !matches!(step, Step::Kill));
    for (number, (driver, format)) in chain.iter().enumerate() {
        for step in steps.by_ref().take(60) {
            guest.send(step);
        }
        let child = Served {
            path: folder.path(&format!("{number}.{driver}")),
            driver,
            files: number + 1,
        };
        File::create_new(&child.path).expect("a new file");
        let target = child.question().target;
        let image = file(&child.path, true);
        let reply = process.ask_with(Request::Overlay { target }, image.as_fd());
        assert_eq!(reply, Ok(Reply::Done));
        // Served on from the old one, whatever is in the new one.
        for step in steps.by_ref().take(10) {
            guest.send(step);
        }
        if number % 2 == 0 {
            guest.finish();
        }
        assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
        let complete = (number % 2 == 0).then(|| guest.model.clone());
        left.push((served.path.clone(), fs::read(&served.path).expect("read")));
        if let (0, Some(complete)) = (number, &complete) {
            assert!(left[0].1 == *complete, "the parent is not what was written");
        }
        let (reply, asked) = child.ask(&mut process, Request::Unpause(child.question()));
        assert!(
            matches!(reply, Ok(Reply::Disk(Disk { size: SIZE, .. }))),
            "{reply:?}"
        );
        let path = served.path;
        assert_eq!(asked[0], Needed::Parent { path });
        for step in steps.by_ref().take(20) {
            guest.send(step);
        }
        process.kill();
        if *format == "qcow2" {
            let name = child.path.file_name().and_then(|name| name.to_str());
            folder.check(format, name.expect("a name"), true);
        }
        process = child.start(&fake).0;
        served = child;
    }
    guest.finish();
    let bytes = vec![0; SIZE as usize];
    for at in (0..SIZE).step_by(1 << 16) {
        let len = (SIZE - at).min(1 << 16) as usize;
        let read = answered(&fake, Op::Read, at / 512, &bytes[..len]);
        assert!(read == guest.model[at as usize..][..len], "at {at}");
    }
    process.exit();
    for (path, before) in left {
        let now = fs::read(&path).expect("read");
        assert!(now == before, "{} was written", path.display());
    }
    let (driver, format) = chain[chain.len() - 1];
    if format == "qcow2" {
        let name = format!("{}.{driver}", chain.len() - 1);
        assert!(folder.content(format, &name) == guest.model, "{name}");
    }
    let info = fake.info();
    assert_eq!((info.refused, fake.malformed(), info.delivered), (0, 0, 0));
}

#[test]
fn disk_goes_on_in_images_that_its_process_makes() {
    let qcow2 = ("qcow2", "qcow2");
    goes_on("disk_goes_on_in_images", &[qcow2, qcow2, qcow2]);
}

#[test]
fn disk_goes_on_in_vhds_that_its_process_makes() {
    let vhd = ("vhd", "vpc");
    goes_on("disk_goes_on_in_vhds", &[vhd, vhd]);
}

#[test]
fn image_that_cannot_go_on_from_what_is_served_is_not_made() {
    let Some(folder) = Folder::new("image_that_cannot_go_on") else {
        return;
    };
    folder.raw("base.img", 1);
    let served = Served {
        path: folder.path("base.img"),
        driver: "aio",
        files: 0,
    };
    let fake = Fake::new(4).expect("a node");
    let (mut process, _) = served.start(&fake);
    let path = folder.path("new");
    File::create_new(&path).expect("a new file");
    let image = file(&path, true);
    let overlay = |driver: &str| {
        let target = format!("{driver}:{}", path.display());
        let target = target.parse().expect("a target");
        Request::Overlay { target }
    };
    for (driver, code) in [
        ("aio", Code::Invalid),
        ("vmdk", Code::Invalid),
        ("qcow", Code::Unsupported),
    ] {
        let failure = process.ask_with(overlay(driver), image.as_fd());
        assert_eq!(failure.expect_err(driver).code, code, "{driver}");
    }
    let failure = process.ask(overlay("qcow2"), None);
    assert_eq!(failure.expect_err("no file").code, Code::Invalid);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let failure = process.ask_with(overlay("qcow2"), image.as_fd());
    assert_eq!(failure.expect_err("it is paused").code, Code::State);
    assert_eq!(fs::metadata(&path).expect("stat").len(), 0);
    process.exit();
}

#[test]
fn image_that_is_none_or_lacks_something_is_refused() {
    let Some(folder) = Folder::new("image_that_is_none_or_lacks_something_is_refused") else {
        return;
    };
    let base = folder.raw("raw.img", 1);
    folder.img(&[
        "create", "-f", "qcow2", "-b", "raw.img", "-F", "raw", "a.qcow2",
    ]);
    folder.img(&[
        "create", "-f", "qcow", "-b", "raw.img", "-F", "raw", "old.qcow",
    ]);
    let fake = Fake::new(4).expect("a node");
    let mut process = Process::start(&fake);
    for driver in ["qcow2", "qcow", "vhd", "vmdk"] {
        let served = Served {
            path: folder.path("raw.img"),
            driver,
            files: 0,
        };
        let (reply, _) = served.ask(&mut process, Request::Open(served.question()));
        let failure = reply.expect_err("it is raw");
        assert_eq!(failure.code, Code::Image, "{failure}");
    }
    // Nobody answers: there is no supervisor.
    let served = Served {
        path: folder.path("a.qcow2"),
        driver: "qcow2",
        files: 0,
    };
    let alone = Open {
        may_ask: false,
        ..served.question()
    };
    let image = file(&served.path, true);
    let reply = process.ask_with(Request::Open(alone), image.as_fd());
    let failure = reply.expect_err("its parent is missing");
    assert_eq!(failure.code, Code::Unsupported);
    assert!(failure.message.contains("raw.img"), "{failure}");
    // What a guest wrote into a raw image is no header, whatever it looks like: nothing is guessed.
    let old = Served {
        path: folder.path("old.qcow"),
        driver: "qcow",
        ..served
    };
    let (reply, _) = old.ask(&mut process, Request::Open(old.question()));
    let failure = reply.expect_err("its parent could be anything");
    assert!(failure.message.contains("qemu-img rebase"), "{failure}");
    let null = Open {
        parents: Some(Driver::Null),
        ..old.question()
    };
    let (reply, _) = old.ask(&mut process, Request::Open(null));
    assert_eq!(reply.expect_err("it has none").code, Code::Invalid);
    // Unless somebody says what it is.
    let old = Served { files: 1, ..old };
    let said = Open {
        parents: Some(Driver::Aio),
        ..old.question()
    };
    let (reply, asked) = old.ask(&mut process, Request::Open(said));
    assert!(reply.is_ok() && asked.len() == 1, "{reply:?}");
    assert!(answered(&fake, Op::Read, 0, &[0; 512]) == base[..512]);
    assert_eq!(process.ask(Request::Close, None), Ok(Reply::Done));
    process.exit();
    let mut process = Process::start(&fake);
    // Nothing of all this holds the image.
    let raw = Served {
        path: folder.path("raw.img"),
        driver: "aio",
        files: 0,
    };
    let (reply, _) = raw.ask(&mut process, Request::Open(raw.question()));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    process.exit();
}

/// Another process has the image, or what it goes on from.
#[test]
fn image_and_parents_are_locked() {
    let Some(folder) = Folder::new("image_and_parents_are_locked") else {
        return;
    };
    folder.raw("base.img", 5);
    for name in ["a.qcow2", "b.qcow2"] {
        folder.img(&["create", "-f", "qcow2", "-b", "base.img", "-F", "raw", name]);
    }
    let served = |name: &str, driver, files| Served {
        path: folder.path(name),
        driver,
        files,
    };
    let (first, second) = (Fake::new(4).expect("a node"), Fake::new(4).expect("a node"));
    let (process, _) = served("a.qcow2", "qcow2", 1).start(&first);
    // Its parent may be that of another disk, and nobody may write it.
    let (other, _) = served("b.qcow2", "qcow2", 1).start(&second);
    other.exit();
    let mut other = Process::start(&second);
    for (name, driver, files) in [("a.qcow2", "qcow2", 0), ("base.img", "aio", 0)] {
        let image = served(name, driver, files);
        let (reply, _) = image.ask(&mut other, Request::Open(image.question()));
        assert_eq!(reply.expect_err("it is in use").code, Code::Busy, "{name}");
    }
    process.exit();
    let image = served("base.img", "aio", 0);
    let (reply, _) = image.ask(&mut other, Request::Open(image.question()));
    assert!(reply.is_ok(), "{reply:?}");
    let base = File::options().write(true).open(folder.path("base.img"));
    base.expect("a file").write_all_at(&[0], 0).expect("write");
    other.exit();
}
