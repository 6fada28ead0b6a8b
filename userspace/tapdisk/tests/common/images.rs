// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images with tables of their own in a folder, judged by QEMU's tools, and a process that serves one.

#[path = "../../../formats/tests/common/qemu.rs"]
pub(crate) mod qemu;

use super::guest::{step, Step};
use super::{give_or_refuse, Process};
use control::tapdisk::{Disk, FdGrant, Open, Reply, Request, RequestedFile};
use control::{Channel, Failure};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use qemu::has_qemu;
use ring::response::ResponseStatus;
use ring::tap::shadow::Op;
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tapdev::fake::FakeTap;

/// Bytes of a disk: some clusters of all formats, and an odd end.
pub(crate) const SIZE: u64 = (5 << 20) + 4096;
/// Steps of a guest with one image.
pub(crate) const STEPS: usize = 300;
/// The key of images that are encrypted, and the words before the name of one to [`Folder`]'s questions.
pub(crate) const KEY: &[u8] = b"open sesame\n";
pub(crate) const SEALED: &str = "sealed ";
/// Deaths among them.
pub(crate) const DEATHS: usize = 6;

/// A folder on the file system of the build, which can do direct I/O.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    /// Nothing, and says so, if QEMU's tools are not there.
    pub(crate) fn new(test: &str) -> Option<Self> {
        if !has_qemu(test) {
            return None;
        }
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"));
        Some(Self(folder.expect("a folder")))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs qemu-img in the folder; returns its status and its output.
    pub(crate) fn qemu_img(&self, args: &[&str]) -> (i32, String) {
        let mut command = Command::new("qemu-img");
        let output = command.args(args).current_dir(self.0.path()).output();
        let output = output.expect("qemu-img");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (output.status.code().expect("a status"), text)
    }

    /// Runs qemu-img, which must succeed.
    pub(crate) fn img(&self, args: &[&str]) -> String {
        let (status, text) = self.qemu_img(args);
        assert_eq!(status, 0, "qemu-img {args:?}: {text}");
        text
    }

    /// A raw image with something everywhere.
    pub(crate) fn raw(&self, name: &str, seed: u8) -> Vec<u8> {
        let bytes: Vec<u8> = (0..SIZE)
            .map(|at| seed.wrapping_add((at / 512) as u8).wrapping_mul(31) | 1)
            .collect();
        fs::write(self.path(name), &bytes).expect("write");
        bytes
    }

    /// Words that name an image to qemu-img, after those that it begins with: of one that is encrypted its key, too.
    fn words(&self, begin: &[&str], format: &str, name: &str) -> Vec<String> {
        let mut words: Vec<String> = begin.iter().map(|word| word.to_string()).collect();
        let Some(format) = format.strip_prefix(SEALED) else {
            words.extend(["-f", format, name].map(String::from));
            return words;
        };
        let key = match format {
            "luks" => "key-secret=s",
            _ => "encrypt.key-secret=s",
        };
        let image = format!("driver={format},{key},file.filename={name}");
        words.extend(["--object", "secret,id=s,file=key", "--image-opts"].map(String::from));
        words.push(image);
        words
    }

    /// Returns the content that QEMU reads from an image.
    pub(crate) fn content(&self, format: &str, name: &str) -> Vec<u8> {
        // The copy need not survive a power cut.
        let convert = ["convert", "-t", "unsafe", "-O", "raw"];
        let words = self.words(&convert, format, name);
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        words.push("content.raw");
        self.img(&words);
        fs::read(self.path("content.raw")).expect("read")
    }

    /// Makes an image of a format without content, of `SIZE` bytes.
    pub(crate) fn empty(&self, format: &str, name: &str) {
        let create = ["create", "-f", format];
        // The size as it is, not as a number of cylinders.
        let options: &[&str] = match format {
            "vpc" => &["-o", "force_size=on"],
            _ => &[],
        };
        self.img(&[&create, options, &[name, &SIZE.to_string()]].concat());
    }

    /// Makes an image of a format with the content of a raw one.
    pub(crate) fn copy(&self, from: &str, format: &str, name: &str) {
        let convert = ["convert", "-f", "raw", "-O", format];
        let options: &[&str] = match format {
            "vpc" => &["-o", "force_size=on"],
            _ => &[],
        };
        self.img(&[&convert, options, &[from, name]].concat());
    }

    /// Makes an encrypted image, with a key that takes that many milliseconds, and the other options behind that.
    pub(crate) fn sealed(&self, format: &str, name: &str, options: &str, size: u64) {
        fs::write(self.path("key"), KEY).expect("write");
        let (how, before) = match format {
            "luks" => ("", ""),
            _ => ("encrypt.format=luks,", "encrypt."),
        };
        let options = format!("{how}{before}key-secret=s,{before}iter-time={options}");
        let object = [
            "create",
            "--object",
            "secret,id=s,file=key",
            "-f",
            format,
            "-o",
        ];
        let size = size.to_string();
        self.img(&[&object[..], &[&options, name, &size]].concat());
    }

    /// No table of an image is wrong. Space that a process had prepared when it was killed may be lost.
    pub(crate) fn check(&self, format: &str, name: &str, after_death: bool) {
        let words = self.words(&["check"], format, name);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (status, text) = self.qemu_img(&words);
        match status {
            0 => {}
            // Only leaked clusters.
            3 if after_death => {}
            // The format has no check.
            63 => assert!(matches!(format, "vpc" | "qcow" | "sealed luks"), "{text}"),
            _ => panic!("qemu-img check {name}: {text}"),
        }
    }
}

pub(crate) fn file(path: &Path, write: bool) -> OwnedFd {
    opened(path, write, true)
}

/// Past the page cache, or through it.
fn opened(path: &Path, write: bool, direct: bool) -> OwnedFd {
    let mut options = File::options();
    options.read(true).write(write);
    if direct {
        options.custom_flags(libc::O_DIRECT);
    }
    options.open(path).expect("a file").into()
}

/// Bytes of a file that are in dom0's page cache. Reading without waiting does not tell: it has them read.
pub(crate) fn cached(path: &Path) -> u64 {
    let what = ["--bytes", "--noheadings", "--output", "RES"];
    let out = Command::new("fincore").args(what).arg(path).output();
    let out = out.expect("fincore, of the package util-linux-extra");
    assert!(out.status.success(), "{out:?}");
    let text = String::from_utf8(out.stdout).expect("a text");
    text.trim().parse().expect("a number")
}

/// A file with a key.
pub(crate) fn key(bytes: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("write");
    file.rewind().expect("seek");
    file.into()
}

/// Gives a process `files` files that it asks for. It asks first for the memory that would survive it, which is
/// refused.
pub(crate) fn give(channel: &mut Channel, files: usize) -> Vec<RequestedFile> {
    give_to(channel, files, false)
}

/// Gives `files` files; those that are only read go through the page cache if `cached` is set.
fn give_to(channel: &mut Channel, files: usize, cached: bool) -> Vec<RequestedFile> {
    let (mut known, mut asked) = (0, Vec::new());
    while asked.len() < 1 + files {
        // A process whose open fails asks for no more files: its answer has the reason.
        let Ok(Reply::Needs { needs }) = channel.ask(Request::Needs { after: known }, &[]) else {
            break;
        };
        for need in needs {
            known = known.max(need.number);
            let fd = match &need.what {
                RequestedFile::Parent { path } => Some(opened(path, false, !cached)),
                RequestedFile::Extent { path } => Some(file(path, true)),
                RequestedFile::Key { .. } => Some(key(KEY)),
                _ => None,
            };
            give_or_refuse(channel, need.number, fd, FdGrant::Locked);
            asked.push(need.what);
        }
    }
    asked.retain(|what| what.path().is_some());
    asked
}

/// An image that is served, with that many files beside it.
pub(crate) struct ServedImage {
    pub(crate) path: PathBuf,
    pub(crate) driver: &'static str,
    pub(crate) files: usize,
}

impl ServedImage {
    pub(crate) fn question(&self) -> Open {
        let target = format!("{}:{}", self.driver, self.path.display());
        Open {
            may_ask: true,
            ..Open::new(target.parse().expect("a target"))
        }
    }

    pub(crate) fn ask(
        &self,
        process: &mut Process,
        question: Request,
    ) -> (Result<Reply, Failure>, Vec<RequestedFile>) {
        let mut asked = Vec::new();
        let image = file(&self.path, true);
        let cached = self.question().target.caches_below();
        let give = |channel: &mut Channel| asked = give_to(channel, self.files, cached);
        let reply = process.ask_and_give(question, image.as_fd(), give);
        (reply, asked)
    }

    pub(crate) fn start(&self, fake: &FakeTap) -> (Process, Disk) {
        let mut process = Process::start(fake);
        let (reply, _) = self.ask(&mut process, Request::Open(self.question()));
        match reply {
            Ok(Reply::Disk(disk)) => (process, disk),
            reply => panic!("{}: {reply:?}", self.path.display()),
        }
    }
}

/// Requests of a guest. A discarded range may read as anything, so there is none.
pub(crate) fn steps() -> Vec<Step> {
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

/// The guest reads all of its disk, which must be this.
pub(crate) fn holds(fake: &FakeTap, model: &[u8]) {
    let bytes = vec![0; 1 << 16];
    for (at, expected) in (0..).step_by(1 << 16).zip(model.chunks(1 << 16)) {
        let read = answered(fake, Op::Read, at / 512, &bytes[..expected.len()]);
        assert!(read == expected, "at {at}");
    }
}

/// Sends a request, which must succeed; returns the data of a read.
pub(crate) fn answered(fake: &FakeTap, op: Op, sector: u64, bytes: &[u8]) -> Vec<u8> {
    let len = if op == Op::Read { bytes.len() } else { 0 };
    let tag = fake.send(op, sector, bytes, false).expect("a request");
    let (status, read) = fake.answer(tag, len).expect("an answer");
    assert_eq!(status, ResponseStatus::Okay);
    read
}
