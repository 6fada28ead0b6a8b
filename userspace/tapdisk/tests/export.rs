// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tapdisk serves an export of QEMU's server, over connections that the supervisor makes.

mod common;

use common::Process;
use control::tapdisk::{Needed, Open, Provided, Reply, Request};
use control::{Channel, Code};
use ring::tap::shadow::Op;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tapdev::fake::Fake;

const SIZE: usize = 1 << 20;

/// A server with an image that is the disk byte for byte.
struct Server {
    child: Child,
    folder: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.img"), vec![0; SIZE]).unwrap();
        let child = Self::spawn(folder.path());
        Self { child, folder }
    }

    fn spawn(folder: &Path) -> Child {
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "--shared=4", "--format=raw"])
            .args(["--export-name=disk", "--socket"])
            .arg(folder.join("s"))
            .arg(folder.join("a.img"))
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd, of the package qemu-utils");
        while UnixStream::connect(folder.join("s")).is_err() {
            std::thread::yield_now();
        }
        child
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn open(&self, name: &str) -> Open {
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
        self.child = Self::spawn(self.folder.path());
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join("a.img")).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Answers what a process asks for until it has asked for a connection, so often.
fn give(channel: &mut Channel, socket: &Path, mut times: u32) {
    let mut known = 0;
    while times > 0 {
        for need in common::needs(channel, known) {
            known = known.max(need.number);
            let is_server = matches!(need.what, Needed::Server { .. });
            let stream = is_server.then(|| UnixStream::connect(socket).unwrap());
            let provided = match &stream {
                Some(stream) => {
                    stream.set_nonblocking(true).unwrap();
                    Provided::Shared
                }
                None => Provided::Refused(control::Failure::unsupported("no memory")),
            };
            let question = Request::Provide {
                number: need.number,
                provided,
            };
            let fds: Vec<_> = stream.iter().map(AsFd::as_fd).collect();
            assert_eq!(channel.ask::<_, Reply>(&question, &fds), Ok(Reply::Done));
            times -= u32::from(is_server);
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
    let (fake, mut server) = (Fake::new(4).unwrap(), Server::start());
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
    let (fake, server) = (Fake::new(4).unwrap(), Server::start());
    let mut process = Process::start(&fake);
    let failure = serve(&mut process, server.open("other"), &server.socket()).unwrap_err();
    assert_eq!(failure.code, Code::NotFound);
    assert!(failure.message.contains("nbdinfo --list"), "{failure}");
    // Without a supervisor there is nobody who connects.
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
