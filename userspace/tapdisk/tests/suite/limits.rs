// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that asks for more than its disk may do.

use crate::common::{Image, Process, SECTORS, SIZE};
use control::stats::Stats;
use control::tapdisk::{Engine, Open, Reply, Request, Rules, State};
use control::{Code, GroupRate, Limits, RateShare, ShareUsage};
use ring::tap::shadow::Op;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tapdev::fake::FakeTap;

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
fn write(fake: &FakeTap) -> Vec<u16> {
    let write = |at: u16| fake.send(Op::Write, at.into(), &[7; 512], false).unwrap();
    (0..TAGS).map(write).collect()
}

#[test]
fn more_than_a_disk_may_do_waits() {
    let (fake, image) = (FakeTap::new(TAGS).unwrap(), Image::new(SIZE));
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

/// A request that waits for a limit delays no other work: a pause hands it back, and it is executed afterwards.
#[test]
fn pause_does_not_wait_for_a_limit() {
    let (fake, image) = (FakeTap::new(TAGS).unwrap(), Image::new(SIZE));
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

/// Returns a share of that many requests in a second at first, and another number afterwards.
fn share(at_first: u32, time: Duration, after: u32) -> RateShare {
    let pace = |requests| {
        GroupRate::of(&Limits {
            requests,
            ..Limits::default()
        })
    };
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.try_into().unwrap());
    RateShare {
        pace: pace(at_first),
        until: now + time,
        after: pace(after),
        from: now + time,
        burst_s: 1,
    }
}

fn used(process: &mut Process, share: RateShare) -> ShareUsage {
    match process.ask(Request::Share(share), None) {
        Ok(Reply::Used(used)) => used,
        other => panic!("{other:?}"),
    }
}

/// A disk keeps to its share of the group's limits, which is renewed again and again, and to the share for the time
/// without a supervisor.
#[test]
fn share_of_a_group_holds_and_ends() {
    let (fake, image) = (FakeTap::new(TAGS).unwrap(), Image::new(SIZE));
    let mut process = Process::start(&fake);
    let long = Duration::from_secs(3600);
    let shared = Open {
        share: Some(share(40, long, 40)),
        ..image.open(Engine::Auto)
    };
    let opened = process.ask(Request::Open(shared), Some(&image));
    assert!(matches!(opened, Ok(Reply::Disk(_))), "{opened:?}");
    let begun = Instant::now();
    let tags = write(&fake);
    assert_eq!(
        process.ask(Request::Busy { came: 0 }, None),
        Ok(Reply::Done)
    );
    for tag in tags {
        fake.answer(tag, 0).unwrap();
    }
    // Nothing was saved up: one at once, and 63 more.
    let time = begun.elapsed();
    assert!(time >= Duration::from_millis(1550), "{time:?}");
    let told = used(&mut process, share(100_000, long, 40));
    assert_eq!((told.came, told.requests, told.bytes), (64, 64, 64 * 512));
    assert!(told.lacks_requests && !told.lacks_bytes, "{told:?}");
    let begun = Instant::now();
    for tag in write(&fake) {
        fake.answer(tag, 0).unwrap();
    }
    let time = begun.elapsed();
    assert!(time < Duration::from_millis(1500), "{time:?}");
    // No new share arrives: the old one ends, and the disk continues with its share for that time.
    let short = share(10, Duration::from_millis(200), 1000);
    let told = used(&mut process, short);
    assert_eq!(told.requests, 128);
    let begun = Instant::now();
    for tag in write(&fake) {
        fake.answer(tag, 0).unwrap();
    }
    let time = begun.elapsed();
    assert!(time < Duration::from_millis(3000), "{time:?}");
    assert_eq!(
        process.ask(Request::Set(Rules::default()), None),
        Ok(Reply::Done)
    );
    let refused = process.ask(Request::Share(short), None).unwrap_err();
    assert_eq!(refused.code, Code::State);
    process.exit();
}

/// A discard and a write of zeroes cost the storage something, though they bring no data: the group knows of both, and a
/// limit holds them back.
#[test]
fn discards_and_zeroes_count_too() {
    let (fake, image) = (FakeTap::new(TAGS).unwrap(), Image::new(SIZE));
    let mut process = Process::start(&fake);
    let shared = Open {
        share: Some(share(100_000, Duration::from_secs(3600), 100_000)),
        ..image.open(Engine::Auto)
    };
    let opened = process.ask(Request::Open(shared), Some(&image));
    assert!(matches!(opened, Ok(Reply::Disk(_))), "{opened:?}");
    let answered = |op, sector, sectors| {
        let tag = fake.send_range(op, sector, sectors).unwrap();
        fake.answer(tag, 0).unwrap();
    };
    for sector in 0..3 {
        answered(Op::Discard, sector, 1);
    }
    answered(Op::WriteZeroes, 0, 16);
    let told = used(
        &mut process,
        share(100_000, Duration::from_secs(3600), 100_000),
    );
    assert_eq!((told.requests, told.bytes), (4, 3 * 4096 + 16 * 512));
    process.exit();

    let mut process = Process::start(&fake);
    let limited = Open {
        limits: Limits {
            bytes: 1 << 20,
            ..Limits::default()
        },
        ..image.open(Engine::Auto)
    };
    let opened = process.ask(Request::Open(limited), Some(&image));
    assert!(matches!(opened, Ok(Reply::Disk(_))), "{opened:?}");
    for (op, sectors, count) in [
        // A megabyte at once, and another half of one. The disk may be zeroed at once after that, and once more later.
        (Op::Discard, 1, 256 + 128),
        (Op::WriteZeroes, SECTORS, 2),
    ] {
        let begun = Instant::now();
        let mut tags = VecDeque::new();
        for number in 0..count {
            if tags.len() == usize::from(TAGS) {
                fake.answer(tags.pop_front().unwrap(), 0).unwrap();
            }
            tags.push_back(
                fake.send_range(op, number * sectors % SECTORS, sectors)
                    .unwrap(),
            );
        }
        for tag in tags {
            fake.answer(tag, 0).unwrap();
        }
        let time = begun.elapsed();
        assert!(time >= Duration::from_millis(450), "{op:?}: {time:?}");
    }
    assert!(stats(&mut process).held > 0);
    process.exit();
}
