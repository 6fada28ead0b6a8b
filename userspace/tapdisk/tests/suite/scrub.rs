// SPDX-License-Identifier: MIT OR Apache-2.0
//! All data of a disk is read in the background.

use crate::common::{Image, Process, LIMIT};
use control::stats::{Scrub, Stats};
use control::tapdisk::{Call, Engine, Open, Reply, Request, Trouble};
use control::Failure;
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Content, Disk, DiskInfo, Driver, Extent, Fence};
use ring::response::ResponseStatus as Answer;
use ring::tap::shadow::Op;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use tapdev::fake::FakeTap;

const SIZE: u64 = 8 << 20;

/// An image with data in two places, and how much that is.
fn image() -> (Image, u64) {
    let image = Image::new(SIZE);
    let file = image.0.as_file();
    file.write_all_at(&vec![1; 64 << 10], 1 << 20).unwrap();
    file.write_all_at(&vec![2; 2 << 20], 5 << 20).unwrap();
    file.sync_all().unwrap();
    (image, (64 << 10) + (2 << 20))
}

fn stats(process: &mut Process) -> Stats {
    match process.ask(Request::Stats, None) {
        Ok(Reply::Stats(stats)) => *stats,
        other => panic!("{other:?}"),
    }
}

/// Asks until `is_so` holds; the limit is longer than any of these waits.
fn until(process: &mut Process, is_so: impl Fn(&Scrub) -> bool) -> Scrub {
    let start = Instant::now();
    loop {
        let scrub = stats(process).scrub.expect("a scrub");
        if is_so(&scrub) {
            return scrub;
        }
        assert!(start.elapsed() < LIMIT, "{scrub:?}");
    }
}

fn scrub(process: &mut Process, rate: u64) {
    let reply = process.ask(Request::Scrub { rate }, None);
    assert_eq!(reply, Ok(Reply::Done));
}

#[test]
fn all_data_is_read_and_nothing_else() {
    for engine in [Engine::Uring, Engine::Aio, Engine::Sync] {
        let fake = FakeTap::new(4).unwrap();
        let (image, data) = image();
        let mut process = Process::serving(&fake, &image, engine);
        assert_eq!(stats(&mut process).scrub, None);
        scrub(&mut process, u64::MAX);
        let found = until(&mut process, |scrub| !scrub.running);
        let expected = Scrub {
            running: false,
            offset: SIZE,
            read: data,
            errors: 0,
        };
        assert_eq!(found, expected, "{engine:?}");
        process.exit();
    }
}

#[test]
fn rate_is_kept_and_the_guest_and_a_pause_need_not_wait() {
    let fake = FakeTap::new(4).unwrap();
    let (image, _) = image();
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    // A piece takes a month.
    scrub(&mut process, 1);
    let first = until(&mut process, |scrub| scrub.read > 0);
    assert_eq!(first.read, 64 << 10);
    let tag = fake.send(Op::Write, 2048, &[7; 512], false).unwrap();
    assert_eq!(fake.answer(tag, 0).unwrap().0, Answer::Okay);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let unpause = Request::Unpause(image.open(Engine::Auto));
    assert!(process.ask(unpause, Some(&image)).is_ok());
    assert_eq!(stats(&mut process).scrub, Some(first));
    // A second of it.
    let begun = Instant::now();
    scrub(&mut process, 1 << 20);
    until(&mut process, |scrub| scrub.offset >= 6 << 20);
    let left = until(&mut process, |scrub| !scrub.running);
    assert_eq!(left.offset, SIZE);
    assert!(
        begun.elapsed() > Duration::from_millis(1500),
        "it is too fast"
    );
    scrub(&mut process, 1);
    until(&mut process, |scrub| scrub.read > 0);
    scrub(&mut process, 0);
    let ended = until(&mut process, |scrub| !scrub.running);
    assert!(ended.offset < SIZE);
    process.exit();
}

#[test]
fn what_cannot_be_read_is_told_and_the_rest_is_read() {
    let fake = FakeTap::new(4).unwrap();
    let (image, data) = image();
    let mut process = Process::start(&fake);
    let open = Open {
        read_only: true,
        // Nothing is locked, which takes a descriptor that can be read.
        shared: true,
        ..image.open(Engine::Auto)
    };
    let unreadable = File::options().write(true).open(image.0.path()).unwrap();
    let reply = process.ask_with(Request::Open(open), unreadable.as_fd());
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    scrub(&mut process, u64::MAX);
    let found = until(&mut process, |scrub| !scrub.running);
    assert_eq!((found.offset, found.read, found.errors), (SIZE, data, 3));
    let Ok(Reply::Troubles(troubles)) = process.ask(Request::Troubles { after: None }, None) else {
        panic!("no troubles");
    };
    let last = Trouble {
        what: Call::Read,
        offset: 6 << 20,
        len: 1 << 20,
        errno: libc::EBADF,
    };
    assert_eq!((troubles.count, troubles.last), (3, Some(last)));
    assert!(!troubles.is_stopped);
    process.exit();
}

/// The other image has data elsewhere, so the progress would be of neither.
#[test]
fn scrub_ends_with_its_image() {
    let fake = FakeTap::new(4).unwrap();
    let ((first, _), (second, data)) = (image(), image());
    let mut process = Process::serving(&fake, &first, Engine::Auto);
    // A piece takes a month.
    scrub(&mut process, 1);
    let begun = until(&mut process, |scrub| scrub.read > 0);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let unpause = Request::Unpause(second.open(Engine::Auto));
    assert!(process.ask(unpause, Some(&second)).is_ok());
    let ended = until(&mut process, |scrub| !scrub.running);
    assert_eq!((ended.offset, ended.read), (begun.offset, begun.read));
    // The next scrub is of the other image, from its beginning on.
    scrub(&mut process, u64::MAX);
    let found = until(&mut process, |scrub| !scrub.running);
    assert_eq!((found.offset, found.read, found.errors), (SIZE, data, 0));
    scrub(&mut process, 1);
    until(&mut process, |scrub| scrub.read > 0);
    assert_eq!(process.ask(Request::Close, None), Ok(Reply::Done));
    until(&mut process, |scrub| !scrub.running);
    process.exit();
}

/// Storage whose extents cannot be read, although its data can.
struct Unmapped;

impl Driver for Unmapped {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        Ok(DiskInfo {
            size: SIZE,
            ..crate::common::shape(false)
        })
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
        Ok(())
    }
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let content = Content::Data;
        match offset / (1 << 20) {
            2 | 5 => Err(Errno::IO),
            _ => Ok(vec![Extent { len, content }]),
        }
    }
}

#[test]
fn where_it_is_not_known_what_is_there_the_scrub_goes_on() {
    let fake = FakeTap::new(4).unwrap();
    let mut process = Process::start_with(&fake, |session| {
        let its = session.clone();
        session.runtime().tasks.spawn(async move {
            let disk = Disk::new(Unmapped);
            let shape = disk.activate().await.unwrap();
            let open = Open::new("null:8M".parse().unwrap());
            its.serve_disk(open, disk, shape).await.unwrap();
        });
    });
    fake.wait_for_params();
    scrub(&mut process, u64::MAX);
    let found = until(&mut process, |scrub| !scrub.running);
    assert_eq!((found.offset, found.read, found.errors), (SIZE, SIZE, 2));
    let Ok(Reply::Troubles(troubles)) = process.ask(Request::Troubles { after: None }, None) else {
        panic!("no troubles");
    };
    let last = troubles.last.unwrap();
    assert_eq!((last.offset, last.len), (5 << 20, 1 << 20));
    assert_eq!(troubles.count, 2);
    process.exit();
}
