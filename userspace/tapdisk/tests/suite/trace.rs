// SPDX-License-Identifier: MIT OR Apache-2.0
//! The requests of a disk are traced, and no trace makes a disk fail. The tests of `tapimg replay` show that a trace
//! leads to the same disk.

use crate::common::images::{answered, file, Folder};
use crate::common::watched::{does_all_itself, give, Raw, Watched};
use crate::common::{Image, Process};
use control::tapdisk::{Engine, Reply, Request};
use control::{Channel, Code};
use ring::response::ResponseStatus;
use ring::tap::shadow::Op;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tapdev::fake::FakeTap;
use trace::{Operation, Trace, TraceEntry, TraceHeader, TraceSegment, What, Writer};

/// Makes a trace in a file that is there already. It is sparse at first, and grows with the trace.
fn create(path: &Path) -> File {
    let header = TraceHeader {
        data: true,
        segment: 1 << 20,
        segments: 4,
        mark: 0x0246_8ace_1357_9bdf,
        started_ms: 1,
        started_ns: 0,
        sectors: crate::common::SECTORS,
        minor: 0,
    };
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path).expect("a file");
    file.set_len(header.size()).expect("a size");
    Writer::create(&file, &header).expect("a trace");
    file
}

/// All requests, each with what became of it.
fn requests(path: &Path) -> Vec<(TraceEntry, Option<u32>)> {
    let trace = Trace::open(File::open(path).expect("open")).expect("a trace");
    let read = |number: &u64| trace.segment(*number).expect("read");
    let segments: Vec<TraceSegment> = trace.segments().iter().filter_map(read).collect();
    let mut all = Vec::new();
    for record in segments.iter().flat_map(TraceSegment::records) {
        match record.what {
            What::Request(entry) => all.push((entry, None)),
            What::Done { errno } => all[record.number as usize - 1].1 = Some(errno),
            What::Segment | What::Opened { .. } => {}
        }
    }
    all
}

fn trace(process: &mut Process, file: &File) {
    let reply = process.ask_with(Request::Trace { on: true }, file.as_fd());
    assert_eq!(reply, Ok(Reply::Done));
    assert!(process.status().open.expect("an image").trace);
}

fn end(process: &mut Process) {
    let reply = process.ask(Request::Trace { on: false }, None);
    assert_eq!(reply, Ok(Reply::Done));
    assert!(!process.status().open.expect("an image").trace);
}

fn untraced(process: &mut Process) -> String {
    match process.needs.ask(Request::Untraced, &[]) {
        Ok(Reply::Untraced { why }) => why,
        other => panic!("{other:?}"),
    }
}

fn failed_traces(process: &mut Process) -> u64 {
    match process.ask(Request::Stats, None) {
        Ok(Reply::Stats(stats)) => stats.failed_traces,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_request_is_there_with_what_became_of_it() {
    let Some(folder) = Folder::new("each_request") else {
        return;
    };
    folder.raw("a.img", 5);
    let image = Raw(folder.path("a.img"));
    let path = folder.path("t");
    let file = create(&path);
    let fake = FakeTap::new(16).expect("a node");
    let mut process = image.start(&fake, Watched::default());
    answered(&fake, Op::Write, 0, &[7; 512]);
    trace(&mut process, &file);
    answered(&fake, Op::Read, 8, &[0; 1024]);
    let tag = fake.send(Op::Write, 16, &[7; 512], true).expect("sent");
    assert_eq!(fake.answer(tag, 0).expect("answer").0, ResponseStatus::Okay);
    let behind = crate::common::images::SIZE / 512;
    let tag = fake.send(Op::Write, behind, &[7; 512], false);
    let (status, _) = fake.answer(tag.expect("sent"), 0).expect("answer");
    assert_eq!(status, ResponseStatus::Error);
    for op in [Op::WriteZeroes, Op::Discard] {
        let tag = fake.send_range(op, 24, 8).expect("sent");
        assert_eq!(fake.answer(tag, 0).expect("answer").0, ResponseStatus::Okay);
    }
    answered(&fake, Op::Flush, 0, &[]);
    end(&mut process);
    answered(&fake, Op::Write, 32, &[7; 512]);
    process.exit();
    let found = requests(&path);
    let said: Vec<_> = found
        .iter()
        .map(|(entry, errno)| (entry.operation, entry.sector, entry.sectors, *errno))
        .collect();
    let eio = Some(libc::EIO as u32);
    let wanted = [
        (Operation::Read, 8, 2, Some(0)),
        (Operation::Write, 16, 1, Some(0)),
        (Operation::Write, behind, 1, eio),
        (Operation::Zeroes, 24, 8, Some(0)),
        (Operation::Discard, 24, 8, Some(0)),
        (Operation::Flush, 0, 0, Some(0)),
    ];
    assert_eq!(said, wanted);
    assert!(found[1].0.flags.fua && !found[0].0.flags.fua);
}

/// A request is in the file before it is executed, and nothing else than that need be there when the process dies.
#[test]
fn what_a_dead_process_had_is_there() {
    let Some(folder) = Folder::new("dead_process") else {
        return;
    };
    folder.raw("a.img", 5);
    let image = Raw(folder.path("a.img"));
    let path = folder.path("t");
    let file = create(&path);
    let watched = Watched {
        trace: Some(file.as_fd()),
        ..Watched::default()
    };
    let fake = FakeTap::new(16).expect("a node");
    let process = image.start(&fake, watched);
    for sector in 0..5 {
        answered(&fake, Op::Write, sector, &[7; 512]);
    }
    process.kill();
    let known = requests(&path);
    assert_eq!(known.len(), 5);
    let process = image.start(&fake, watched);
    answered(&fake, Op::Write, 5, &[7; 512]);
    process.exit();
    let all = requests(&path);
    let sectors: Vec<u64> = all.iter().map(|(entry, _)| entry.sector).collect();
    assert_eq!(sectors, [0, 1, 2, 3, 4, 5]);
    assert_eq!(all[5].1, Some(0));
}

/// The kernel would execute requests that no trace has.
#[test]
fn the_kernel_does_nothing_by_itself_meanwhile() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = create(&folder.path().join("t"));
    does_all_itself(|process| trace(process, &file), end);
}

/// A file that is no trace does not stop a disk.
#[test]
fn a_disk_is_served_without_its_trace() {
    let Some(folder) = Folder::new("without_trace") else {
        return;
    };
    folder.raw("a.img", 5);
    let image = Raw(folder.path("a.img"));
    let other = folder.path("other");
    std::fs::write(&other, [0; 9000]).expect("write");
    let mut options = File::options();
    let other = options.read(true).write(true).open(other).expect("a file");
    let fake = FakeTap::new(16).expect("a node");
    let mut process = image.start(&fake, Watched::default());
    let refused = process.ask_with(Request::Trace { on: true }, other.as_fd());
    assert_eq!(refused.expect_err("no trace").code, Code::Image);
    let alone = process.ask(Request::Trace { on: true }, None);
    assert_eq!(alone.expect_err("no file").code, Code::Invalid);
    assert_eq!(failed_traces(&mut process), 0);
    process.exit();
    let watched = Watched {
        trace: Some(other.as_fd()),
        ..Watched::default()
    };
    let mut process = Process::start(&fake);
    let question = Request::Open(image.open(&watched));
    let give = |channel: &mut Channel| give(channel, &watched);
    let opened = process.ask_and_give(question, file(&image.0, true).as_fd(), give);
    assert!(matches!(opened, Ok(Reply::Disk(_))), "{opened:?}");
    assert!(!process.status().open.expect("an image").trace);
    let why = untraced(&mut process);
    assert!(why.contains("no file that `tap-ctl trace"), "{why}");
    answered(&fake, Op::Write, 0, &[7; 512]);
    process.exit();
}

/// A file system with room for little, which goes with this.
struct Small {
    child: Child,
    root: PathBuf,
}

impl Small {
    /// Nothing, and says so, where nothing can be mounted.
    fn new(bytes: u64) -> Option<Self> {
        let script =
            format!("mount -t tmpfs -o size={bytes} none /mnt && echo mounted && read end");
        let mut child = Command::new("unshare")
            .args(["-m", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut said = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut said).expect("read");
        let root = PathBuf::from(format!("/proc/{}/root/mnt", child.id()));
        let small = Self { child, root };
        if said.trim() != "mounted" {
            eprintln!(
                "a_full_storage_ends_the_trace_and_not_the_disk: nothing can be mounted here"
            );
            return None;
        }
        Some(small)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.child.stdin.take() {
            // The process may have ended already.
            let _ = stdin.write_all(b"\n");
        }
        self.child.wait().expect("the end of a child");
    }
}

#[test]
fn a_full_storage_ends_the_trace_and_not_the_disk() {
    let Some(small) = Small::new(256 << 10) else {
        return;
    };
    let path = small.root.join("t");
    let file = create(&path);
    let (fake, image) = (
        FakeTap::new(16).expect("a node"),
        Image::new(crate::common::SIZE),
    );
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    trace(&mut process, &file);
    for number in 0..16 {
        let bytes = vec![number as u8 + 1; 64 << 10];
        answered(&fake, Op::Write, number * 128, &bytes);
    }
    let why = untraced(&mut process);
    assert!(why.contains("No space left"), "{why}");
    assert_eq!(failed_traces(&mut process), 1);
    assert!(!process.status().open.expect("an image").trace);
    // The file has the requests that it had room for.
    let found = requests(&path);
    assert!((1..8).contains(&found.len()), "{}", found.len());
    // The report repeats until the supervisor has received it.
    assert_eq!(untraced(&mut process), why);
    end(&mut process);
    answered(&fake, Op::Write, 0, &[1; 512]);
    process.exit();
    let bytes = image.bytes();
    let is_right = |(at, byte): (usize, &u8)| usize::from(*byte) == at / (64 << 10) + 1;
    assert!(bytes.iter().enumerate().all(is_right));
}
