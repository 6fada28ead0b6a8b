// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tapdisk in a thread, with the kernel's own shadow and a guest in another one: reads return the data of earlier
//! writes, for each engine, and after a death at any time.

use crate::common::guest::{step, Guest, Step};
use crate::common::images::cached;
use crate::common::{Image, Process, SECTORS, SIZE};
use control::tapdisk::{Disk, Engine, Open, Reply, Request, State};
use control::{Code, Failure};
use proptest::prelude::*;
use ring::response::ResponseStatus as Answer;
use ring::tap::abi::{STATE_IDLE, STATE_LIVE, STATE_OPEN};
use ring::tap::shadow::Op;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use tapdev::fake::FakeTap;

fn run(engine: Engine, depth: usize, steps: &[Step]) {
    let fake = FakeTap::new(16).unwrap();
    let image = Image::new(SIZE);
    let mut process = Process::serving(&fake, &image, engine);
    let mut guest = Guest::new(&fake, vec![0; SIZE as usize], depth);
    for step in steps {
        if matches!(step, Step::Kill) {
            process.kill();
            process = Process::serving(&fake, &image, engine);
        }
        guest.send(step);
    }
    guest.finish();
    process.exit();
    assert!(
        image.bytes() == guest.model,
        "the image is not what was written"
    );
    let info = fake.info();
    assert_eq!((info.refused, fake.malformed(), info.delivered), (0, 0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn guest_reads_what_it_wrote_whenever_the_process_dies(
        steps in prop::collection::vec(step(SECTORS), 1..120),
        depth in 1_usize..16,
    ) {
        for engine in [Engine::Uring, Engine::Aio, Engine::Sync] {
            run(engine, depth, &steps);
        }
    }
}

#[test]
fn requests_wait_while_the_disk_is_paused() {
    let fake = FakeTap::new(4).unwrap();
    let (first, second) = (Image::new(SIZE), Image::new(2 * SIZE));
    let mut process = Process::serving(&fake, &first, Engine::Auto);
    let tag = fake.send(Op::Write, 0, &[1; 512], false).unwrap();
    fake.answer(tag, 0).unwrap();
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let waits = fake.send(Op::Write, 1, &[2; 512], false).unwrap();
    assert_eq!(process.status().state, State::Paused);
    assert_eq!(fake.info().waiting, 1);
    // The image is closed and unlocked, so another process may have it.
    let other = FakeTap::new(1).unwrap();
    Process::serving(&other, &first, Engine::Auto).exit();
    // The content moves to a larger image, and the disk switches to it.
    second.0.as_file().write_all_at(&first.bytes(), 0).unwrap();
    let reply = process.ask(Request::Unpause(second.open(Engine::Aio)), Some(&second));
    let Ok(Reply::Disk(Disk { size, engine, .. })) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!((size, engine), (2 * SIZE, Engine::Aio));
    fake.answer(waits, 0).unwrap();
    assert_eq!(fake.info().sectors, 2 * SECTORS);
    assert_eq!(second.bytes()[..1024], [[1; 512], [2; 512]].concat());
    assert_eq!(first.bytes()[512..1024], [0; 512]);
    process.exit();
}

/// Pages that are not written back are not dropped, so one that is not there any more is durable.
#[test]
fn paused_image_is_durable_and_nothing_of_it_is_kept() {
    let fake = FakeTap::new(4).unwrap();
    let image = Image::new(SIZE);
    let mut process = Process::start(&fake);
    let target = format!("sync:{}", image.0.path().display());
    let open = Open::new(target.parse().unwrap());
    let buffered = File::options().read(true).write(true).open(image.0.path());
    let buffered = buffered.unwrap();
    let reply = process.ask_with(Request::Open(open), buffered.as_fd());
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    let tag = fake.send(Op::Write, 8, &[7; 4096], false).unwrap();
    fake.answer(tag, 0).unwrap();
    assert!(cached(image.0.path()) >= 4096);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    assert_eq!(cached(image.0.path()), 0);
    assert_eq!(image.bytes()[4096..8192], [7; 4096]);
    process.exit();
}

#[test]
fn grown_image_makes_a_larger_disk() {
    let fake = FakeTap::new(4).unwrap();
    let image = Image::new(SIZE);
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    let beyond = fake.send(Op::Write, SECTORS, &[1; 512], false).unwrap();
    assert_eq!(fake.answer(beyond, 0).unwrap().0, Answer::Error);
    image.0.as_file().set_len(SIZE + 4096).unwrap();
    let reply = process.ask(Request::Resize, None);
    assert!(matches!(reply, Ok(Reply::Disk(Disk { size, .. })) if size == SIZE + 4096));
    assert_eq!(fake.info().sectors, SECTORS + 8);
    let beyond = fake.send(Op::Write, SECTORS, &[1; 512], false).unwrap();
    assert_eq!(fake.answer(beyond, 0).unwrap().0, Answer::Okay);
    process.exit();
}

#[test]
fn raw_image_is_made_larger_below_its_guest() {
    let fake = FakeTap::new(4).unwrap();
    let image = Image::new(SIZE);
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    let grow = |process: &mut Process, size| process.ask(Request::Grow { size }, None);
    let reply = grow(&mut process, SIZE + 4096);
    assert!(matches!(reply, Ok(Reply::Disk(Disk { size, .. })) if size == SIZE + 4096));
    assert_eq!(fake.info().sectors, SECTORS + 8);
    let beyond = fake.send(Op::Write, SECTORS, &[1; 512], false).unwrap();
    assert_eq!(fake.answer(beyond, 0).unwrap().0, Answer::Okay);
    for wrong in [SIZE, SIZE + 4097] {
        let refused = grow(&mut process, wrong).unwrap_err();
        assert_eq!(refused.code, Code::Invalid, "{refused}");
    }
    assert_eq!(image.0.as_file().metadata().unwrap().len(), SIZE + 4096);
    process.exit();
}

#[test]
fn read_only_disk_is_not_written() {
    let fake = FakeTap::new(4).unwrap();
    let image = Image::new(SIZE);
    let open = Open {
        read_only: true,
        ..image.open(Engine::Auto)
    };
    let mut process = Process::start(&fake);
    let reply = process.ask(Request::Open(open), Some(&image)).unwrap();
    assert!(matches!(
        reply,
        Reply::Disk(Disk {
            read_only: true,
            discard: false,
            ..
        })
    ));
    for (op, expected) in [
        (Op::Read, Answer::Okay),
        (Op::Write, Answer::Error),
        (Op::Flush, Answer::Okay),
    ] {
        let bytes: &[u8] = if op == Op::Flush { &[] } else { &[1; 512] };
        let tag = fake.send(op, 0, bytes, false).unwrap();
        assert_eq!(fake.answer(tag, 0).unwrap().0, expected, "{op:?}");
    }
    let tag = fake.send_range(Op::Discard, 0, 8).unwrap();
    assert_eq!(fake.answer(tag, 0).unwrap().0, Answer::Error);
    assert_eq!(image.bytes(), [0; SIZE as usize]);
    process.exit();
}

#[test]
fn secure_discard_is_not_promised() {
    let fake = FakeTap::new(4).unwrap();
    let image = Image::new(SIZE);
    let process = Process::serving(&fake, &image, Engine::Auto);
    let tag = fake.send_range(Op::SecureDiscard, 0, 8).unwrap();
    assert_eq!(fake.answer(tag, 0).unwrap().0, Answer::NotSupported);
    process.exit();
}

#[test]
fn everything_is_counted() {
    let fake = FakeTap::new(4).unwrap();
    let image = Image::new(SIZE);
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    for (op, bytes) in [
        (Op::Write, vec![1; 1024]),
        (Op::Write, vec![1; 512]),
        (Op::Read, vec![1; 512]),
        (Op::Flush, vec![]),
    ] {
        let tag = fake.send(op, 0, &bytes, false).unwrap();
        fake.answer(tag, 0).unwrap();
    }
    let tag = fake.send(Op::Read, SECTORS, &[1; 512], false).unwrap();
    fake.answer(tag, 0).unwrap();
    let Ok(Reply::Stats(stats)) = process.ask(Request::Stats, None) else {
        panic!("no stats");
    };
    assert_eq!(
        (stats.write.requests, stats.write.bytes, stats.write.errors),
        (2, 1536, 0)
    );
    assert_eq!(
        (stats.read.requests, stats.read.bytes, stats.read.errors),
        (2, 512, 1)
    );
    assert_eq!((stats.flush.requests, stats.flush.latency.total()), (1, 1));
    assert!(stats.calls > 0 && stats.turns > 0 && stats.sleeps > 0);
    process.exit();
}

#[test]
fn questions_in_the_wrong_state_are_refused() {
    let fake = FakeTap::new(1).unwrap();
    let image = Image::new(SIZE);
    let mut process = Process::start(&fake);
    let code = |reply: Result<Reply, Failure>| reply.unwrap_err().code;
    assert_eq!(process.status().state, State::Attached);
    assert_eq!(code(process.ask(Request::Pause, None)), Code::State);
    assert_eq!(code(process.ask(Request::Resize, None)), Code::State);
    let unpause = Request::Unpause(image.open(Engine::Auto));
    assert_eq!(code(process.ask(unpause, Some(&image))), Code::State);
    let open = Request::Open(image.open(Engine::Auto));
    assert_eq!(code(process.ask(open.clone(), None)), Code::Invalid);
    assert_eq!(fake.info().state, STATE_OPEN);
    process.ask(open.clone(), Some(&image)).unwrap();
    assert_eq!(code(process.ask(open.clone(), Some(&image))), Code::State);
    assert_eq!(fake.info().state, STATE_LIVE);
    assert_eq!(process.ask(Request::Close, None), Ok(Reply::Done));
    assert_eq!(process.status().state, State::Idle);
    assert_eq!(code(process.ask(open, Some(&image))), Code::State);
    fake.fence();
    assert_eq!(fake.info().state, STATE_IDLE);
    process.exit();
}

#[test]
fn image_with_other_properties_is_no_replacement() {
    let fake = FakeTap::new(1).unwrap();
    let image = Image::new(SIZE);
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    process.ask(Request::Pause, None).unwrap();
    let other = Open {
        read_only: true,
        ..image.open(Engine::Auto)
    };
    let refused = process.ask(Request::Unpause(other), Some(&image));
    assert_eq!(refused.unwrap_err().code, Code::Image);
    let reply = process.ask(Request::Unpause(image.open(Engine::Auto)), Some(&image));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    process.exit();
}

#[test]
fn image_in_use_is_refused() {
    let (first, second) = (FakeTap::new(1).unwrap(), FakeTap::new(1).unwrap());
    let image = Image::new(SIZE);
    let process = Process::serving(&first, &image, Engine::Auto);
    let mut other = Process::start(&second);
    let refused = other.ask(Request::Open(image.open(Engine::Auto)), Some(&image));
    assert_eq!(refused.unwrap_err().code, Code::Busy);
    process.exit();
    let reply = other.ask(Request::Open(image.open(Engine::Auto)), Some(&image));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    other.exit();
}
