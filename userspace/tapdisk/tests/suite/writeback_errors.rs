// SPDX-License-Identifier: MIT OR Apache-2.0
//! WritebackErrors writes are reported to each client that relies on them, also over a pause.

use crate::common::{Image, Process, SIZE};
use control::tapdisk::{Engine, Open, Reply, Request, State};
use control::Failure;
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Disk, DiskInfo, Driver, Fence};
use ring::response::ResponseStatus;
use ring::tap::shadow::{self, Op};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use tapdev::fake::FakeTap;

/// Storage that acknowledges writes and loses them at the write-back.
struct Losing {
    /// True if the flush fails that runs while the disk is served; else the final one.
    early: bool,
}

impl Driver for Losing {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        Ok(crate::common::shape(true))
    }
    fn fence(&self) -> Fence {
        Fence::Local
    }
    async fn read(&self, _: u64, data: Data) -> Result<(), Errno> {
        data.fill(0, data.len(), 0);
        Ok(())
    }
    async fn write(&self, _: u64, _: Bytes, _: Attributes) -> Result<(), Errno> {
        Ok(())
    }
    async fn flush(&self) -> Result<(), Errno> {
        match self.early {
            true => Err(Errno::IO),
            false => Ok(()),
        }
    }
    async fn inactivate(&self) -> Result<(), Errno> {
        match self.early {
            // The system has reported it already.
            true => Ok(()),
            false => Err(Errno::IO),
        }
    }
}

/// A process that serves it.
fn serving(fake: &FakeTap, early: bool) -> Process {
    let process = Process::start_with(fake, move |session| {
        let its = session.clone();
        session.runtime().tasks.spawn(async move {
            let disk = Disk::new(Losing { early });
            let shape = disk.activate().await.unwrap();
            let open = Open::new("null:1M".parse().unwrap());
            its.serve_disk(open, disk, shape).await.unwrap();
        });
    });
    fake.wait_for_params();
    process
}

fn status(fake: &FakeTap, op: Op, preflush: bool, fua: bool) -> ResponseStatus {
    let bytes: &[u8] = if op == Op::Flush { &[] } else { &[1; 512] };
    let request = shadow::PostedRequest {
        op,
        preflush,
        fua,
        sector: 0,
        sectors: bytes.len() as u64 / 512,
        segments: 0,
    };
    let tag = fake.post(request, bytes).unwrap();
    fake.answer(tag, 0).unwrap().0
}

/// A pause loses a write, and the disk resumes from an intact image.
fn lose(process: &mut Process, image: &Image) {
    let failure = process.ask(Request::Pause, None).unwrap_err();
    assert!(failure.message.contains("durable"), "{failure}");
    assert_eq!(process.status().state, State::Paused);
    let reply = process.ask(Request::Unpause(image.open(Engine::Auto)), Some(image));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
}

#[test]
fn guest_learns_of_what_a_pause_lost() {
    for early in [false, true] {
        for (op, preflush, fua) in [
            (Op::Flush, false, false),
            (Op::Write, true, false),
            (Op::Write, true, true),
        ] {
            let (fake, image) = (FakeTap::new(4).unwrap(), Image::new(SIZE));
            let mut process = serving(&fake, early);
            assert_eq!(status(&fake, Op::Write, false, false), ResponseStatus::Okay);
            lose(&mut process, &image);
            // Neither of these writes covers earlier ones.
            assert_eq!(status(&fake, Op::Write, false, false), ResponseStatus::Okay);
            assert_eq!(status(&fake, Op::Write, false, true), ResponseStatus::Okay);
            let first = status(&fake, op, preflush, fua);
            assert_eq!(
                first,
                ResponseStatus::Error,
                "{op:?} {preflush} {fua} {early}"
            );
            assert_eq!(status(&fake, op, preflush, fua), ResponseStatus::Okay);
            process.exit();
        }
    }
}

fn bytes(socket: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    socket.read_exact(&mut bytes).unwrap();
    bytes
}

/// An NBD client that is served, without news of the disk.
fn client(path: &std::path::Path) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    bytes(&mut socket, 18);
    // No zeroes after the size, and the only export.
    let hello = [&3_u32.to_be_bytes()[..], b"IHAVEOPT\0\0\0\x01\0\0\0\0"].concat();
    socket.write_all(&hello).unwrap();
    bytes(&mut socket, 10);
    socket
}

/// The code of the answer to a flush.
fn flush(socket: &mut UnixStream) -> u32 {
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend([0, 0, 0, 3]);
    request.extend([0; 20]);
    socket.write_all(&request).unwrap();
    u32::from_be_bytes(bytes(socket, 16)[4..8].try_into().unwrap())
}

#[test]
fn each_who_writes_learns_of_it() {
    let (fake, image) = (FakeTap::new(4).unwrap(), Image::new(SIZE));
    let mut process = serving(&fake, false);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let nbd = Request::Nbd {
        export: String::new(),
    };
    assert_eq!(process.ask_with(nbd, listener.as_fd()), Ok(Reply::Done));
    let mut before = client(&path);
    lose(&mut process, &image);
    let mut after = client(&path);
    assert_eq!(flush(&mut before), 5, "EIO");
    assert_eq!(flush(&mut before), 0);
    assert_eq!(flush(&mut after), 0, "nothing of its own is lost");
    assert_eq!(
        status(&fake, Op::Flush, false, false),
        ResponseStatus::Error
    );
    assert_eq!(status(&fake, Op::Flush, false, false), ResponseStatus::Okay);
    process.exit();
}
