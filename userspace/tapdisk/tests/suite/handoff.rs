// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process closes its disk and another one takes it, while the guest has requests under way: each is executed once,
//! by one of both.

use crate::common::guest::{step, Guest, Step};
use crate::common::{Image, Process, SECTORS, SIZE};
use control::tapdisk::{Engine, Open, Reply, Request, State};
use control::{Code, Failure};
use proptest::prelude::*;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use tapdev::fake::FakeTap;

/// Hands the disk over with whatever is under way: the old process lives until the new one serves.
fn hand_over(mut old: Process, fake: &FakeTap, image: &Image, engine: Engine) -> Process {
    assert_eq!(old.ask(Request::Close, None), Ok(Reply::Done));
    assert_eq!(old.status().state, State::Idle);
    // The kernel does this when the node is given back.
    fake.fence();
    let new = Process::serving(fake, image, engine);
    old.exit();
    new
}

fn run(engine: Engine, depth: usize, steps: &[Step]) {
    let fake = FakeTap::new(16).unwrap();
    let image = Image::new(SIZE);
    let mut process = Process::serving(&fake, &image, engine);
    let mut guest = Guest::new(&fake, vec![0; SIZE as usize], depth);
    for step in steps {
        if matches!(step, Step::Kill) {
            process = hand_over(process, &fake, &image, engine);
        }
        guest.send(step);
    }
    process = hand_over(process, &fake, &image, engine);
    guest.finish();
    process.exit();
    assert!(
        image.bytes() == guest.model,
        "the image is not what was written"
    );
    let info = fake.info();
    assert_eq!((info.refused, fake.malformed(), info.delivered), (0, 0, 0));
    assert_eq!(info.replayed, 0, "something was executed twice");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// With flushes and discards under way.
    #[test]
    fn nothing_is_lost_or_executed_twice(
        steps in prop::collection::vec(step(SECTORS), 1..80),
        depth in 1_usize..16,
    ) {
        for engine in [Engine::Uring, Engine::Aio, Engine::Sync] {
            run(engine, depth, &steps);
        }
    }
}

fn code(answer: Result<Reply, Failure>) -> Code {
    answer.expect_err("it is refused").code
}

#[test]
fn an_image_is_looked_at_while_somebody_else_serves_it() {
    let (fake, other) = (FakeTap::new(4).unwrap(), FakeTap::new(1).unwrap());
    let image = Image::new(SIZE);
    let mut old = Process::serving(&fake, &image, Engine::Auto);
    let mut new = Process::idle(&other, |_| ());
    let prepare = || Request::Prepare(image.open(Engine::Auto));
    let size = Some(SIZE);
    assert_eq!(new.ask(prepare(), Some(&image)), Ok(Reply::Fit { size }));
    // The process has kept nothing of the image, and may do it again.
    assert_eq!(new.ask(prepare(), Some(&image)), Ok(Reply::Fit { size }));
    assert_eq!(new.status().state, State::Idle);
    assert_eq!(code(new.ask(prepare(), None)), Code::Invalid);
    // A process that has a disk cannot be a successor.
    assert_eq!(code(old.ask(prepare(), Some(&image))), Code::State);
    new.exit();
    old.exit();
}

#[test]
fn an_image_without_its_header_is_seen_in_advance() {
    let (other, image) = (FakeTap::new(1).unwrap(), Image::new(SIZE));
    let target = format!("qcow2:{}", image.0.path().display());
    let question = || Request::Prepare(Open::new(target.parse().unwrap()));
    let mut new = Process::idle(&other, |_| ());
    let fd = image.descriptor();
    assert_eq!(code(new.ask_with(question(), fd.as_fd())), Code::Image);
    // A whole one: version 2, clusters of 64 KiB, nothing in it.
    let mut header = vec![0; 4096];
    header[..4].copy_from_slice(b"QFI\xfb");
    for (at, value) in [(4, 2_u32), (20, 16), (36, 1), (56, 1)] {
        header[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    for (at, value) in [(24, SIZE), (40, 3 << 16), (48, 1 << 16)] {
        header[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    image.0.as_file().write_all_at(&header, 0).unwrap();
    let size = None;
    let fit = new.ask_with(question(), fd.as_fd());
    assert_eq!(fit, Ok(Reply::Fit { size }));
    new.exit();
}
