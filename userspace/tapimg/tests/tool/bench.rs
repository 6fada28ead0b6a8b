// SPDX-License-Identifier: MIT OR Apache-2.0
//! Folders with images, and the programs that are run in them.

pub(crate) use crate::qemu::has_qemu;
use jsonpages::JsonPages;
use rustix::fs::{fcntl_lock, FlockOperation};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A folder on the file system of the build, which is gone afterwards.
pub(crate) struct Bench(tempfile::TempDir);

/// Whether a program is there, which answers the word `ask`. Says that the test, or a part of it, did not run without it.
pub(crate) fn has_program(test: &str, program: &str, ask: &str) -> bool {
    let known = Command::new(program)
        .arg(ask)
        .stdout(Stdio::null())
        .status();
    let is_there = known.is_ok_and(|status| status.success());
    if !is_there {
        println!("SKIP {test}: there is no {program}");
    }
    is_there
}

/// Output of a program, and its exit status.
#[derive(Debug)]
pub(crate) struct ProgramOutput {
    pub(crate) status: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

fn said(output: Output) -> ProgramOutput {
    ProgramOutput {
        status: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Prepares a program with the words of a line.
    pub(crate) fn command(&self, program: &str, line: &str) -> Command {
        let mut command = Command::new(program);
        command
            .args(line.split_whitespace())
            .current_dir(self.0.path());
        command
    }

    /// Runs tapimg, whatever comes of it.
    pub(crate) fn run(&self, line: &str) -> ProgramOutput {
        let said = said(
            self.command(env!("CARGO_BIN_EXE_tapimg"), line)
                .output()
                .unwrap(),
        );
        assert!(said.status.is_some(), "tapimg {line}: {said:?}");
        assert!(!said.err.contains("panicked"), "tapimg {line}: {said:?}");
        JsonPages::check_line("tapimg", line, &said.out);
        said
    }

    /// Returns the path of the program under another name.
    fn link(&self, name: &str) -> PathBuf {
        let link = self.path(&format!(".bin-{name}")).join(name);
        if !link.exists() {
            fs::create_dir(link.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_tapimg"), &link).unwrap();
        }
        link
    }

    /// Runs it under another name, whatever comes of it.
    pub(crate) fn named(&self, name: &str, line: &str) -> ProgramOutput {
        let link = self.link(name);
        let program = link.to_str().unwrap();
        let said = said(self.command(program, line).output().unwrap());
        assert!(!said.err.contains("panicked"), "{name} {line}: {said:?}");
        said
    }

    /// Runs it under another name, or its own, with output and messages that no process reads; returns its exit status.
    pub(crate) fn unread(&self, name: &str, line: &str) -> Option<i32> {
        let link = self.link(name);
        let mut command = self.command(link.to_str().unwrap(), line);
        let closed = || {
            let (ours, its) = UnixStream::pair().unwrap();
            drop(ours);
            OwnedFd::from(its)
        };
        command.stdout(closed()).stderr(closed());
        command.status().unwrap().code()
    }

    /// Runs tapimg, which must succeed, and returns what it prints.
    pub(crate) fn good(&self, line: &str) -> String {
        let said = self.run(line);
        assert_eq!(said.status, Some(0), "tapimg {line}: {said:?}");
        said.out
    }

    /// Runs tapimg, which must say no with this status, and returns why.
    pub(crate) fn bad(&self, status: i32, line: &str) -> String {
        let said = self.run(line);
        assert_eq!(said.status, Some(status), "tapimg {line}: {said:?}");
        said.err + &said.out
    }

    pub(crate) fn json(&self, line: &str) -> Value {
        let out = self.run(&format!("--json {line}")).out;
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("tapimg {line}: {error}: {out}"))
    }

    /// Runs one of QEMU's tools, which must succeed.
    pub(crate) fn qemu(&self, line: &str) -> String {
        let (program, rest) = line.split_once(' ').unwrap();
        let said = said(self.command(program, rest).output().unwrap());
        assert_eq!(said.status, Some(0), "{line}: {said:?}");
        said.out
    }

    /// Runs one of QEMU's tools, and says whether it succeeded.
    pub(crate) fn try_qemu(&self, line: &str) -> bool {
        let (program, rest) = line.split_once(' ').unwrap();
        let said = said(self.command(program, rest).output().unwrap());
        said.status == Some(0)
    }

    /// Runs a line of the shell, which must succeed.
    pub(crate) fn shell(&self, line: &str) {
        let mut command = self.command("sh", "-c");
        let said = said(command.arg(line).output().unwrap());
        assert_eq!(said.status, Some(0), "{line}: {said:?}");
    }

    /// Has qemu-io do something with a qcow2 image.
    pub(crate) fn qemu_write(&self, name: &str, what: &str) {
        let mut command = self.command("qemu-io", "-f qcow2 -c");
        let said = said(command.args([what, name]).output().unwrap());
        assert_eq!(said.status, Some(0), "{what}: {said:?}");
    }

    /// Has qemu-io do something with an image that is opened with the file `key`.
    pub(crate) fn qemu_io(&self, opts: &str, what: &str) {
        let mut command = self.command("qemu-io", "--object secret,id=s,file=key --image-opts -c");
        let said = said(command.args([what, opts]).output().unwrap());
        assert_eq!(said.status, Some(0), "{what}: {said:?}");
    }

    /// Has qemu-io do something with an image that these options name.
    pub(crate) fn qemu_io_plain(&self, opts: &str, what: &str) {
        let mut command = self.command("qemu-io", "--image-opts -c");
        let said = said(command.args([what, opts]).output().unwrap());
        assert_eq!(said.status, Some(0), "{what}: {said:?}");
    }

    /// Begins tapimg.
    pub(crate) fn start(&self, line: &str) -> Child {
        self.command(env!("CARGO_BIN_EXE_tapimg"), line)
            .stderr(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Begins to serve a disk.
    pub(crate) fn serve(&self, line: &str) -> Child {
        self.command(
            env!("CARGO_BIN_EXE_tapimg"),
            &format!("--json serve {line}"),
        )
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
    }

    /// Begins tapimg and sends it a signal as soon as `is_time`. It must not be done by then.
    pub(crate) fn end(
        &self,
        line: &str,
        signal: Signal,
        is_time: impl Fn() -> bool,
    ) -> ProgramOutput {
        let mut child = self.start(line);
        while !is_time() {
            assert!(
                child.try_wait().unwrap().is_none(),
                "it was too quick to be ended"
            );
            std::thread::yield_now();
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        let said = said(child.wait_with_output().unwrap());
        self.wait_for_locks();
        said
    }

    /// Waits until no program has a lock on a file here: the kernel may end the I/O of a killed one, and release its files,
    /// after its parent has been informed.
    fn wait_for_locks(&self) {
        const LIMIT: Duration = Duration::from_secs(120);
        let begin = Instant::now();
        for name in self.files() {
            let file = File::options()
                .read(true)
                .write(true)
                .open(self.path(&name));
            let file = file.unwrap();
            while fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                assert!(begin.elapsed() < LIMIT, "{name} is still locked");
                std::thread::yield_now();
            }
        }
    }

    /// Begins tapimg and kills it when the file system has so many bytes for a file.
    pub(crate) fn kill(&self, line: &str, name: &str, allocated: u64) {
        self.end(line, Signal::KILL, || self.allocated(name) >= allocated);
    }

    /// A raw image with data in some places and holes in all others.
    pub(crate) fn sparse(&self, name: &str, size: u64, data: &[(u64, u64)], seed: u64) {
        let mut file = File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        for (offset, len) in data {
            file.seek(SeekFrom::Start(*offset)).unwrap();
            file.write_all(&noise(seed ^ offset, *len as usize))
                .unwrap();
        }
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Changes bytes of a file.
    pub(crate) fn poke(&self, name: &str, offset: u64, bytes: &[u8]) {
        let mut file = File::options().write(true).open(self.path(name)).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.write_all(bytes).unwrap();
    }

    pub(crate) fn peek(&self, name: &str, offset: u64) -> u64 {
        let mut file = File::open(self.path(name)).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        let mut bytes = [0; 8];
        file.read_exact(&mut bytes).unwrap();
        u64::from_be_bytes(bytes)
    }

    /// Bytes that the file system has for a file.
    pub(crate) fn allocated(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().blocks() * 512
    }

    /// Names of all files.
    pub(crate) fn files(&self) -> Vec<String> {
        let files = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// Bytes by chance, of which none is zero.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8 | 1
        })
        .collect()
}

/// Places with data by chance: sectors of a disk.
pub(crate) fn places(seed: u64, size: u64, count: usize) -> Vec<(u64, u64)> {
    let mut state = seed | 1;
    let mut next = move |most: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % most
    };
    (0..count)
        .map(|_| {
            let at = next(size / 512);
            let len = (1 + next(600)).min(size / 512 - at);
            (at * 512, len * 512)
        })
        .collect()
}

/// QEMU's name of a kind.
pub(crate) fn qemu_name(kind: &str) -> &str {
    match kind {
        "vhd" => "vpc",
        "aio" => "raw",
        kind => kind,
    }
}
