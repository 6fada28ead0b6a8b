// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tapdisk serves an export of QEMU's server, over connections that the supervisor makes.

use crate::common::{give_or_refuse, Process};
use control::tapdisk::{FdGrant, Open, Reply, Request, RequestedFile};
use control::{Channel, Code};
use ring::response::ResponseStatus;
use ring::tap::shadow::{self, Op};
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::process::{kill_process, Pid, Signal};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tapdev::fake::{FakeTap, SLOT};

const SIZE: usize = 1 << 20;

/// A server with an image that is the disk byte for byte.
pub(crate) struct ExportServer {
    child: Child,
    folder: tempfile::TempDir,
    more: Vec<String>,
}

impl ExportServer {
    fn start() -> Self {
        Self::of(SIZE as u64)
    }

    /// Starts a server of an export with that many bytes.
    pub(crate) fn of(size: u64) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), size, &[])
    }

    /// Starts a server that encrypts, and needs its client's certificate.
    fn encrypting() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (from, to) in [
            ("ca.pem", "ca-cert.pem"),
            ("server.pem", "server-cert.pem"),
            ("server.key", "server-key.pem"),
        ] {
            std::fs::copy(certificate(from), folder.path().join(to)).unwrap();
        }
        let credentials = format!(
            "tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir={}",
            folder.path().display()
        );
        let more = ["--object", &credentials, "--tls-creds=tls"];
        Self::start_in(folder, SIZE as u64, &more)
    }

    fn start_in(folder: tempfile::TempDir, size: u64, more: &[&str]) -> Self {
        let image = File::create(folder.path().join("a.img")).unwrap();
        image.set_len(size).unwrap();
        let more: Vec<String> = more.iter().map(|word| (*word).to_owned()).collect();
        let child = Self::spawn(folder.path(), &more);
        Self {
            child,
            folder,
            more,
        }
    }

    /// Starts a server whose storage fails the first flush, and no later one.
    fn losing() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        File::create(&path).unwrap().set_len(SIZE as u64).unwrap();
        let fails = "file.inject-error.0";
        let image = format!(
            "driver=raw,file.driver=blkdebug,{fails}.event=flush_to_disk,{fails}.errno=5,{fails}.once=on,\
             file.image.driver=file,file.image.filename={}",
            path.display()
        );
        Self {
            child: Self::spawn_as(folder.path(), &["--image-opts", &image]),
            folder,
            more: Vec::new(),
        }
    }

    fn spawn(folder: &Path, more: &[String]) -> Child {
        let path = folder.join("a.img").display().to_string();
        let mut how = vec!["--format=raw"];
        how.extend(more.iter().map(String::as_str));
        how.push(&path);
        Self::spawn_as(folder, &how)
    }

    fn spawn_as(folder: &Path, how: &[&str]) -> Child {
        // The server dies with the test in any case.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-nbd"])
            .args(["--persistent", "--shared=4", "--export-name=disk"])
            .arg("--socket")
            .arg(folder.join("s"))
            .args(how)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd, of the package qemu-utils");
        while UnixStream::connect(folder.join("s")).is_err() {
            assert_eq!(child.try_wait().unwrap(), None, "it does not start");
            std::thread::yield_now();
        }
        child
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    pub(crate) fn open(&self, name: &str) -> Open {
        let target = format!("nbd:unix:{}:exportname={name}", self.socket().display());
        Open {
            may_ask: true,
            ..Open::new(target.parse().unwrap())
        }
    }

    fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_file(self.socket()).unwrap();
        self.child = Self::spawn(self.folder.path(), &self.more);
    }

    /// Stops the server.
    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// Resumes the server.
    fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        // CAST: the number of a process is positive.
        let process = Pid::from_raw(self.child.id() as i32).unwrap();
        kill_process(process, signal).unwrap();
    }

    pub(crate) fn image(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join("a.img")).unwrap()
    }
}

impl Drop for ExportServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file of the tests of the driver.
fn certificate(name: &str) -> PathBuf {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../drivers/tests/nbd/certs");
    PathBuf::from(folder).join(name)
}

/// Returns the descriptor that a supervisor gives for a question, if any.
fn given(what: &RequestedFile, socket: &Path) -> Option<OwnedFd> {
    match what {
        RequestedFile::Server { .. } => {
            let stream = UnixStream::connect(socket).unwrap();
            stream.set_nonblocking(true).unwrap();
            Some(stream.into())
        }
        RequestedFile::Credential { target, file } => {
            let path = target.tls().and_then(|tls| tls.path(*file)).unwrap();
            Some(File::open(path).unwrap().into())
        }
        _ => None,
    }
}

/// Answers questions of a process until it has asked for a connection that many times.
pub(crate) fn give(channel: &mut Channel, socket: &Path, mut times: u32) {
    let mut known = 0;
    while times > 0 {
        for need in crate::common::needs(channel, known) {
            known = known.max(need.number);
            let given = given(&need.what, socket);
            give_or_refuse(channel, need.number, given, FdGrant::Shared);
            times -= u32::from(matches!(need.what, RequestedFile::Server { .. }));
        }
    }
}

fn serve(process: &mut Process, open: Open, socket: &Path) -> Result<Reply, control::Failure> {
    process.ask_giving(Request::Open(open), &[], |channel| {
        give(channel, socket, 1);
    })
}

#[test]
fn export_is_served_and_its_server_may_be_replaced() {
    let (fake, mut server) = (FakeTap::new(4).unwrap(), ExportServer::start());
    let mut process = Process::start(&fake);
    let reply = serve(&mut process, server.open("disk"), &server.socket());
    let Ok(Reply::Disk(disk)) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!((disk.size, disk.discard), (SIZE as u64, true));
    let write = |sector: u64, byte: u8| {
        let tag = fake.send(Op::Write, sector, &[byte; 4096], false).unwrap();
        fake.answer(tag, 0).unwrap();
    };
    write(0, 1);
    server.restart();
    std::thread::scope(|scope| {
        scope.spawn(|| give(&mut process.needs, &server.socket(), 1));
        write(8, 2);
    });
    let tag = fake.send(Op::Flush, 0, &[], false).unwrap();
    fake.answer(tag, 0).unwrap();
    let image = server.image();
    assert_eq!(image[..4096], [1; 4096]);
    assert_eq!(image[4096..8192], [2; 4096]);
    process.exit();
}

#[test]
fn export_that_its_server_does_not_have() {
    let (fake, server) = (FakeTap::new(4).unwrap(), ExportServer::start());
    let mut process = Process::start(&fake);
    let failure = serve(&mut process, server.open("other"), &server.socket()).unwrap_err();
    assert_eq!(failure.code, Code::NotFound);
    assert!(failure.message.contains("nbdinfo --list"), "{failure}");
    // Without a supervisor no program can connect.
    let alone = Open {
        may_ask: false,
        ..server.open("disk")
    };
    let failure = process.ask(Request::Open(alone), None).unwrap_err();
    assert!(failure.message.contains("let blktapctrl"), "{failure}");
    let reply = serve(&mut process, server.open("disk"), &server.socket());
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    process.exit();
}

/// The process serves it from within the sandbox, with descriptors that the supervisor has opened.
#[test]
fn export_is_reached_with_tls() {
    let (fake, mut server) = (FakeTap::new(4).unwrap(), ExportServer::encrypting());
    let confine = |_: &_| {
        tapdisk::sandbox::confine(None).unwrap();
    };
    let mut process = Process::start_with(&fake, confine);
    let open = |host: &str, files: [&str; 3]| {
        let [ca, own, key] = files.map(|name| certificate(name).display().to_string());
        let target = format!("tls-ca={ca},tls-cert={own},tls-key={key},nbd://{host}/disk");
        Open {
            may_ask: true,
            ..Open::new(target.parse().unwrap())
        }
    };
    let good = ["ca.pem", "client.pem", "client.key"];
    let host = "server.example";
    for (host, files, why) in [
        ("other.example", good, "not for other.example"),
        (
            host,
            ["other-ca.pem", good[1], good[2]],
            "in the file of tls-ca=",
        ),
    ] {
        let failure = serve(&mut process, open(host, files), &server.socket()).unwrap_err();
        assert_eq!(failure.code, Code::Denied);
        let is_told = failure.message.contains(why) && failure.message.contains("nbd://");
        assert!(is_told, "{failure}");
    }
    let reply = serve(&mut process, open(host, good), &server.socket());
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    let write = |sector: u64, byte: u8| {
        let tag = fake.send(Op::Write, sector, &[byte; 4096], false).unwrap();
        fake.answer(tag, 0).unwrap();
    };
    write(0, 1);
    let tag = fake.send(Op::Flush, 0, &[], false).unwrap();
    fake.answer(tag, 0).unwrap();
    server.restart();
    std::thread::scope(|scope| {
        scope.spawn(|| give(&mut process.needs, &server.socket(), 1));
        write(8, 2);
    });
    let image = server.image();
    assert_eq!(image[..4096], [1; 4096]);
    assert_eq!(image[4096..8192], [2; 4096]);
    process.exit();
}

/// Writes all of the disk at once: more than a socket has room for.
fn write_all(fake: &FakeTap, round: u8) -> Vec<u16> {
    let count = SIZE / SLOT;
    let tags = (0..count).map(|at| {
        let bytes = [round + at as u8; SLOT];
        let sector = (at * SLOT / 512) as u64;
        fake.send(Op::Write, sector, &bytes, false).unwrap()
    });
    tags.collect()
}

fn assert_written(fake: &FakeTap, tags: Vec<u16>) {
    for tag in tags {
        assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    }
}

fn is_round(image: &[u8], round: u8) -> bool {
    let mut parts = image.chunks(SLOT).enumerate();
    parts.all(|(at, part)| part.iter().all(|byte| *byte == round + at as u8))
}

/// A request that was sent only in part still has its place in the order: the next process begins with whole messages,
/// on a connection of its own.
#[test]
fn server_that_does_not_read_is_waited_for_by_who_closes_and_by_nobody_else() {
    let (fake, server) = (FakeTap::new(16).unwrap(), ExportServer::start());
    let mut process = Process::start(&fake);
    let reply = serve(&mut process, server.open("disk"), &server.socket());
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    // Another process is to get the disk; the guest's requests are finished first.
    server.stop();
    let tags = write_all(&fake, 1);
    let closed = process.ask_giving(Request::Close, &[], |channel| {
        for _ in 0..100 {
            let status = channel.ask::<_, Reply>(&Request::Status, &[]);
            assert!(matches!(status, Ok(Reply::Status(_))), "{status:?}");
        }
        server.go_on();
    });
    assert_eq!(closed, Ok(Reply::Done));
    assert_written(&fake, tags);
    assert!(is_round(&server.image(), 1));
    process.exit();
    // The next process is killed, because it does not leave.
    let mut process = Process::start(&fake);
    let reply = serve(&mut process, server.open("disk"), &server.socket());
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    server.stop();
    let tags = write_all(&fake, 101);
    fake.wait_for(|info| info.delivered == 16);
    process.kill();
    server.go_on();
    let mut process = Process::start(&fake);
    let reply = serve(&mut process, server.open("disk"), &server.socket());
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    assert_written(&fake, tags);
    let tag = fake.send(Op::Flush, 0, &[], false).unwrap();
    fake.answer(tag, 0).unwrap();
    assert!(is_round(&server.image(), 101));
    assert_eq!(fake.malformed(), 0);
    process.exit();
}

/// Ranges that the server reports as holes are neither read nor copied.
#[test]
fn holes_of_an_export_are_not_read() {
    let (fake, server) = (FakeTap::new(4).unwrap(), ExportServer::start());
    let mut process = Process::start(&fake);
    let reply = serve(&mut process, server.open("disk"), &server.socket());
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    for (sector, op) in [(64, Op::Write), (1024, Op::Write), (0, Op::Flush)] {
        let data = match op {
            Op::Write => vec![3; 8192],
            _ => Vec::new(),
        };
        let tag = fake.send(op, sector, &data, false).unwrap();
        fake.answer(tag, 0).unwrap();
    }
    let reply = process.ask(Request::Scrub { rate: u64::MAX }, None);
    assert_eq!(reply, Ok(Reply::Done));
    let start = Instant::now();
    let scrub = loop {
        let Ok(Reply::Stats(stats)) = process.ask(Request::Stats, None) else {
            panic!("no statistics");
        };
        if let Some(scrub) = stats.scrub.filter(|scrub| !scrub.running) {
            break scrub;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "it does not end");
    };
    assert_eq!((scrub.offset, scrub.read), (SIZE as u64, 2 * 8192));
    process.exit();
}

/// A process that dies leaves an error to the next one, which reports it to the guest: the storage has forgotten it.
#[test]
fn what_the_guest_is_owed_outlives_the_process() {
    let (fake, server) = (FakeTap::new(4).unwrap(), ExportServer::losing());
    let memory = memfd_create("state", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 1 << 16).unwrap();
    let start = || {
        let mut process = Process::start(&fake);
        let open = Request::Open(server.open("disk"));
        let reply = process.ask_giving(open, &[], |channel| {
            let (mut known, mut is_connected) = (0, false);
            while !is_connected {
                for need in crate::common::needs(channel, known) {
                    known = known.max(need.number);
                    let given = match need.what {
                        RequestedFile::State { .. } => Some(memory.try_clone().unwrap()),
                        _ => given(&need.what, &server.socket()),
                    };
                    give_or_refuse(channel, need.number, given, FdGrant::Shared);
                    is_connected |= matches!(need.what, RequestedFile::Server { .. });
                }
            }
        });
        assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
        process
    };
    let ask = |op| {
        let bytes: &[u8] = if op == Op::Flush { &[] } else { &[1; 512] };
        let request = shadow::PostedRequest {
            op,
            preflush: false,
            fua: false,
            sector: 0,
            sectors: bytes.len() as u64 / 512,
            segments: 0,
        };
        let tag = fake.post(request, bytes).unwrap();
        fake.answer(tag, 0).unwrap().0
    };
    let mut process = start();
    assert_eq!(ask(Op::Write), ResponseStatus::Okay);
    let failure = process.ask(Request::Pause, None).unwrap_err();
    assert!(failure.message.contains("durable"), "{failure}");
    assert!(process.status().owes);
    process.kill();
    let mut process = start();
    assert!(process.status().owes);
    assert_eq!(ask(Op::Flush), ResponseStatus::Error);
    assert!(!process.status().owes);
    // The answers of these are with the kernel, and so is that before them.
    for _ in 0..5 {
        assert_eq!(ask(Op::Flush), ResponseStatus::Okay);
    }
    process.kill();
    let process = start();
    assert_eq!(ask(Op::Flush), ResponseStatus::Okay);
    process.exit();
}
