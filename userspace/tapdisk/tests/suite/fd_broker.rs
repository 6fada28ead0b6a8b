// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tapdisk asks for files that it cannot open itself.

use crate::common::{needs, refuse, Image, Process, SIZE};
use control::tapdisk::{Engine, FdGrant, Open, Reply, Request, RequestedFile};
use control::wire::{encode, Envelope};
use control::{Channel, Code, Failure};
use ring::tap::shadow::Op;
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::io::pread;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use tapdev::fake::FakeTap;

fn may_ask(image: &Image) -> Request {
    Request::Open(Open {
        may_ask: true,
        ..image.open(Engine::Auto)
    })
}

/// Opens an image while `give` answers on the other connection.
fn open(
    process: &mut Process,
    image: &Image,
    give: impl FnOnce(&mut Channel) + Send,
) -> Result<Reply, Failure> {
    process.ask_and_give(may_ask(image), image.descriptor().as_fd(), give)
}

fn give_memory(channel: &mut Channel, memory: &OwnedFd) {
    let asked = needs(channel, 0);
    let [need] = asked.as_slice() else {
        panic!("{asked:?}");
    };
    assert!(matches!(need.what, RequestedFile::State { .. }), "{need:?}");
    let question = Request::Provide {
        number: need.number,
        provided: FdGrant::Shared,
        backing: None,
    };
    // Without the descriptor it is no answer, and the need stands.
    let refused = channel.ask::<_, Reply>(&question, &[]);
    assert_eq!(refused.unwrap_err().code, Code::Invalid);
    assert_eq!(needs(channel, 0), asked);
    let reply = channel.ask(&question, &[memory.as_fd()]);
    assert_eq!(reply, Ok(Reply::Done));
    // The first answer counts; a late one is no error.
    let reply = channel.ask(&question, &[memory.as_fd()]);
    assert_eq!(reply, Ok(Reply::Done));
}

fn writes(process: &mut Process) -> u64 {
    match process.ask(Request::Stats, None) {
        Ok(Reply::Stats(stats)) => stats.write.requests,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_counted_outlives_the_process() {
    let (fake, image) = (FakeTap::new(4).unwrap(), Image::new(SIZE));
    let memory = memfd_create("state", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 1 << 16).unwrap();
    let mut process = Process::start(&fake);
    let reply = open(&mut process, &image, |channel| {
        give_memory(channel, &memory)
    });
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    for _ in 0..3 {
        let tag = fake.send(Op::Write, 0, &[1; 512], false).unwrap();
        fake.answer(tag, 0).unwrap();
    }
    assert_eq!(writes(&mut process), 3);
    let limit = Instant::now() + Duration::from_secs(20);
    loop {
        let mut bytes = vec![0; 1 << 16];
        pread(&memory, &mut bytes, 0).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        if text.contains("\"write\":{\"requests\":3,") {
            break;
        }
        assert!(Instant::now() < limit, "nothing was left: {text}");
        // The process is idle, and stores all counts before it sleeps for long.
        std::thread::sleep(Duration::from_millis(10));
    }
    process.kill();
    let mut process = Process::start(&fake);
    let reply = open(&mut process, &image, |channel| {
        give_memory(channel, &memory)
    });
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    assert_eq!(writes(&mut process), 3);
    let tag = fake.send(Op::Write, 0, &[1; 512], false).unwrap();
    fake.answer(tag, 0).unwrap();
    assert_eq!(writes(&mut process), 4);
    process.exit();
}

/// The next supervisor comes with connections of its own.
#[test]
fn connection_ends_with_who_waited_for_an_answer() {
    let (fake, image) = (FakeTap::new(4).unwrap(), Image::new(SIZE));
    for question in [
        Request::Needs { after: 0 },
        Request::Troubles { after: Some(0) },
    ] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut process = Process::start_with(&fake, |session| {
            tapdisk::listen::connected(session, theirs.into());
        });
        let open = Request::Open(image.open(Engine::Auto));
        assert!(process.ask(open, Some(&image)).is_ok());
        let line = encode(&Envelope::new(1, 0, question)).unwrap();
        ours.write_all(&line).unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        let limit = Some(Duration::from_secs(30));
        ours.set_read_timeout(limit).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0, "it is closed");
        process.exit();
    }
}

/// Such as one that ended between the question and the answer, when no other one is started.
#[test]
fn a_supervisor_that_does_not_answer_does_not_keep_the_disk_for_ever() {
    let (fake, image) = (FakeTap::new(4).unwrap(), Image::new(SIZE));
    let mut process = Process::start(&fake);
    let mut number = 0;
    let reply = open(&mut process, &image, |channel| {
        let asked = needs(channel, 0);
        assert!(
            matches!(asked[0].what, RequestedFile::State { .. }),
            "{asked:?}"
        );
        number = asked[0].number;
    });
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    let tag = fake.send(Op::Write, 0, &[1; 512], false).unwrap();
    fake.answer(tag, 0).unwrap();
    // The answer is too late, which does no harm.
    let memory = memfd_create("state", MemfdFlags::CLOEXEC).unwrap();
    let question = Request::Provide {
        number,
        provided: FdGrant::Shared,
        backing: None,
    };
    let reply = process.ask_with(question, memory.as_fd());
    assert_eq!(reply, Ok(Reply::Done));
    process.exit();
}

#[test]
fn a_disk_is_served_without_what_it_can_do_without() {
    let (fake, image) = (FakeTap::new(4).unwrap(), Image::new(SIZE));
    let mut process = Process::start(&fake);
    let reply = open(&mut process, &image, |channel| {
        let asked = needs(channel, 0);
        for need in &asked {
            refuse(channel, need.number);
        }
    });
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    process.exit();
}
