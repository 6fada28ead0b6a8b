// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that asks for more than its disk may do.

mod common;

use common::{Image, Process, SIZE};
use control::stats::Stats;
use control::tapdisk::{Engine, Open, Reply, Request, Rules, State};
use control::Limits;
use ring::tap::shadow::Op;
use std::time::{Duration, Instant};
use tapdev::fake::Fake;

/// Requests that a fake kernel has at once.
const TAGS: u16 = 64;

fn rules(requests: u32) -> Rules {
    Rules {
        limits: Limits {
            requests,
            ..Limits::default()
        },
        ..Rules::default()
    }
}

fn open(image: &Image, requests: u32) -> Request {
    Request::Open(Open {
        limits: rules(requests).limits,
        ..image.open(Engine::Auto)
    })
}

fn stats(process: &mut Process) -> Stats {
    match process.ask(Request::Stats, None) {
        Ok(Reply::Stats(stats)) => *stats,
        other => panic!("{other:?}"),
    }
}

/// Writes one sector after the other, as many as there are tags.
fn write(fake: &Fake) -> Vec<u16> {
    let write = |at: u16| fake.send(Op::Write, at.into(), &[7; 512], false).unwrap();
    (0..TAGS).map(write).collect()
}

#[test]
fn more_than_a_disk_may_do_waits() {
    let (fake, image) = (Fake::new(TAGS).unwrap(), Image::new(SIZE));
    let mut process = Process::start(&fake);
    let opened = process.ask(open(&image, 40), Some(&image));
    assert!(matches!(opened, Ok(Reply::Disk(_))), "{opened:?}");
    let begun = Instant::now();
    for tag in write(&fake) {
        fake.answer(tag, 0).unwrap();
    }
    // 41 at once, and 23 more.
    let time = begun.elapsed();
    assert!(time >= Duration::from_millis(550), "{time:?}");
    let counted = stats(&mut process);
    assert_eq!(counted.limits, Some(rules(40).limits));
    assert!(
        counted.held >= 20 && counted.held_ns > 1_000_000_000,
        "{counted:?}"
    );
    // Without a limit nothing waits.
    assert_eq!(
        process.ask(Request::Set(Rules::default()), None),
        Ok(Reply::Done)
    );
    let begun = Instant::now();
    for _ in 0..2 {
        for tag in write(&fake) {
            fake.answer(tag, 0).unwrap();
        }
    }
    // With the limit that would be more than 3 seconds.
    let time = begun.elapsed();
    assert!(time < Duration::from_millis(2500), "{time:?}");
    assert_eq!(stats(&mut process).limits, None);
    let failure = process.ask(Request::Set(rules(1)), None).unwrap_err();
    assert!(failure.message.contains("too few"), "{failure}");
    process.exit();
}

/// Who waits for a limit is in nobody's way: a pause gives it back, and it is executed afterwards.
#[test]
fn pause_does_not_wait_for_a_limit() {
    let (fake, image) = (Fake::new(TAGS).unwrap(), Image::new(SIZE));
    let mut process = Process::start(&fake);
    process.ask(open(&image, 10), Some(&image)).unwrap();
    let tags = write(&fake);
    let begun = Instant::now();
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let time = begun.elapsed();
    assert!(time < Duration::from_secs(3), "{time:?}");
    assert_eq!(process.status().state, State::Paused);
    let unlimited = Open {
        limits: Limits::default(),
        ..image.open(Engine::Auto)
    };
    let unpaused = process.ask(Request::Unpause(unlimited), Some(&image));
    assert!(matches!(unpaused, Ok(Reply::Disk(_))), "{unpaused:?}");
    for tag in tags {
        fake.answer(tag, 0).unwrap();
    }
    assert_eq!(
        image.bytes()[..512 * usize::from(TAGS)],
        [7; 512 * TAGS as usize]
    );
    process.exit();
}
