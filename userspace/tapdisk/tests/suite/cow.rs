// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk whose guest writes into memory, on top of an image that does not change.

use crate::common::guest::{Guest, Step};
use crate::common::images::{answered, give, holds, steps, Folder, SIZE};
use crate::common::Process;
use control::tapdisk::{Disk, Open, Reply, Request};
use control::{Channel, Code, Failure};
use ring::response::ResponseStatus as Answer;
use ring::tap::shadow::Op;
use rustix::fs::{memfd_create, MemfdFlags};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use tapdev::fake::FakeTap;

/// The memory of a disk, which survives its processes, and its backing image.
struct Cow {
    memory: File,
    target: String,
    /// Number of files that it asks for.
    files: usize,
}

impl Cow {
    fn over(driver: &str, path: &Path, files: usize) -> Self {
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).expect("memory");
        Self {
            memory: memory.into(),
            target: format!("cow:{driver}:{}", path.display()),
            files,
        }
    }

    fn open(&self, process: &mut Process) -> Result<Reply, Failure> {
        let open = Open {
            may_ask: true,
            ..Open::new(self.target.parse().expect("a target"))
        };
        // A process that creates the image in the memory opens the backing image twice.
        let mut head = [0; 4];
        let is_new = self.memory.read_at(&mut head, 0).expect("read") == 0 || head == [0; 4];
        let files = self.files * if is_new { 2 } else { 1 };
        // A process has its own descriptor: a lock is that one's.
        let own = format!("/proc/self/fd/{}", self.number());
        let own = File::options().read(true).write(true).open(own);
        let own = own.expect("the memory");
        let give = |channel: &mut Channel| drop(give(channel, files));
        process.ask_and_give(Request::Open(open), own.as_fd(), give)
    }

    fn number(&self) -> i32 {
        std::os::fd::AsRawFd::as_raw_fd(&self.memory)
    }

    fn start(&self, fake: &FakeTap) -> Process {
        let mut process = Process::start(fake);
        let reply = self.open(&mut process);
        assert!(
            matches!(reply, Ok(Reply::Disk(Disk { size: SIZE, .. }))),
            "{reply:?}"
        );
        process
    }

    fn refused(&self) -> Failure {
        let fake = FakeTap::new(4).expect("a node");
        let mut process = Process::start(&fake);
        let failure = self.open(&mut process).expect_err("it may not");
        process.exit();
        failure
    }
}

/// Random requests with deaths in between, judged by QEMU at the end.
fn works(folder: &Folder, cow: &Cow, below: &[&str], model: Vec<u8>) {
    let content = |name: &&str| fs::read(folder.path(name)).expect("read");
    let before: Vec<Vec<u8>> = below.iter().map(content).collect();
    let fake = FakeTap::new(16).expect("a node");
    let mut process = cow.start(&fake);
    let mut guest = Guest::new(&fake, model, 8);
    for step in steps() {
        guest.send(&step);
        if matches!(step, Step::Kill) {
            process.kill();
            process = cow.start(&fake);
        }
    }
    guest.finish();
    holds(&fake, &guest.model);
    process.exit();
    let after: Vec<Vec<u8>> = below.iter().map(content).collect();
    assert!(after == before, "an image below was written");
    let own = format!("/proc/self/fd/{}", cow.number());
    fs::copy(own, folder.path("memory.qcow2")).expect("copy");
    folder.check("qcow2", "memory.qcow2", true);
    assert!(folder.content("qcow2", "memory.qcow2") == guest.model);
}

#[test]
fn guest_writes_into_memory_over_a_raw_image() {
    let Some(folder) = Folder::new("guest_writes_into_memory_over_a_raw_image") else {
        return;
    };
    let model = folder.raw("base.img", 3);
    let cow = Cow::over("aio", &folder.path("base.img"), 1);
    works(&folder, &cow, &["base.img"], model);
}

#[test]
fn guest_writes_into_memory_over_a_chain() {
    let Some(folder) = Folder::new("guest_writes_into_memory_over_a_chain") else {
        return;
    };
    let model = folder.raw("root.img", 9);
    folder.img(&[
        "create",
        "-f",
        "qcow2",
        "-b",
        "root.img",
        "-F",
        "raw",
        "base.qcow2",
    ]);
    let cow = Cow::over("qcow2", &folder.path("base.qcow2"), 2);
    works(&folder, &cow, &["base.qcow2", "root.img"], model);
}

/// In this way a guest can write to a disk whose format is read-only.
#[test]
fn guest_writes_into_memory_over_a_vhdx() {
    let Some(folder) = Folder::new("guest_writes_into_memory_over_a_vhdx") else {
        return;
    };
    let model = folder.raw("root.img", 4);
    folder.img(&[
        "convert",
        "-O",
        "vhdx",
        "-f",
        "raw",
        "root.img",
        "base.vhdx",
    ]);
    let cow = Cow::over("vhdx", &folder.path("base.vhdx"), 1);
    works(&folder, &cow, &["base.vhdx"], model);
}

/// A process died while it made the image in the memory.
#[test]
fn memory_that_was_not_finished_is_made_anew() {
    let Some(folder) = Folder::new("memory_that_was_not_finished_is_made_anew") else {
        return;
    };
    let model = folder.raw("base.img", 5);
    let cow = Cow::over("aio", &folder.path("base.img"), 1);
    let rest = vec![0xff; 1 << 20];
    cow.memory.write_all_at(&rest, 4).expect("write");
    works(&folder, &cow, &["base.img"], model);
}

#[test]
fn what_was_written_over_one_image_is_not_shown_over_another() {
    let Some(folder) = Folder::new("what_was_written_over_one_image") else {
        return;
    };
    folder.raw("base.img", 3);
    folder.raw("other.img", 4);
    let mut cow = Cow::over("aio", &folder.path("base.img"), 1);
    let fake = FakeTap::new(4).expect("a node");
    cow.start(&fake).exit();
    // The process does not even ask for the image.
    cow.files = 0;
    let right = cow.target.clone();
    for (driver, name) in [("aio", "other.img"), ("qcow2", "base.img")] {
        cow.target = format!("cow:{driver}:{}", folder.path(name).display());
        let failure = cow.refused();
        assert_eq!(failure.code, Code::Image);
        let told = format!("raw:{}", folder.path("base.img").display());
        assert!(failure.message.contains(&told), "{failure}");
    }
    (cow.target, cow.files) = (right, 1);
    cow.start(&fake).exit();
}

/// A guest fills at most its room, keeps what it has stored, and resumes when it gets more room.
#[test]
fn guest_fills_no_more_than_its_room() {
    let Some(folder) = Folder::new("guest_fills_no_more_than_its_room") else {
        return;
    };
    let mut model = folder.raw("base.img", 3);
    let mut cow = Cow::over("aio", &folder.path("base.img"), 1);
    let plain = cow.target.clone();
    cow.target = format!("room=1M,{plain}");
    let fake = FakeTap::new(4).expect("a node");
    let process = cow.start(&fake);
    let chunk = [0xab; 1 << 16];
    let mut refused = Vec::new();
    for at in (0..SIZE - (1 << 16)).step_by(1 << 16) {
        let tag = fake.send(Op::Write, at / 512, &chunk, false);
        match fake
            .answer(tag.expect("a request"), 0)
            .expect("an answer")
            .0
        {
            Answer::Okay => model[at as usize..][..1 << 16].fill(0xab),
            _ => refused.push(at),
        }
    }
    let written = (SIZE >> 16) as usize - refused.len();
    assert!((8..16).contains(&written), "{written} of 64 KiB in 1 MiB");
    let used = cow.memory.metadata().expect("stat").blocks() * 512;
    assert!(used <= 1 << 20, "{used}");
    process.kill();
    cow.target = format!("room=16M,{plain}");
    let process = cow.start(&fake);
    for at in refused {
        answered(&fake, Op::Write, at / 512, &chunk);
        model[at as usize..][..1 << 16].fill(0xab);
    }
    holds(&fake, &model);
    process.exit();
}
