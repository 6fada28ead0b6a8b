// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images whose I/O may end later than the process.

use crate::common::{Image, Process, SECTORS, SIZE};
use control::tapdisk::{Engine, Open, Reply, Request, State};
use control::{Code, Failure};
use diskio::{Bytes, Data, Errno, Io, Op, Region, Runtime};
use drivers::{Attributes, Disk, DiskInfo, Driver, Fence};
use ring::response::ResponseStatus;
use ring::tap::shadow::Op as Kind;
use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tapdev::abi::{Claims, Completion, Info, FENCE_LOCAL, FENCE_SESSION};
use tapdev::fake::{FakeNode, FakeTap};
use tapdev::{Mapper, Node, Tap};
use tapdisk::Session;

/// Storage behind a network.
struct Elsewhere {
    fence: Fence,
    /// True if writes fail.
    fails: bool,
}

/// Makes storage whose server may execute requests for that many milliseconds.
fn behind(settle_ms: u32) -> Elsewhere {
    Elsewhere {
        fence: Fence::Session { settle_ms },
        fails: false,
    }
}

impl Driver for Elsewhere {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        Ok(crate::common::shape(true))
    }
    fn fence(&self) -> Fence {
        self.fence
    }
    async fn read(&self, _: u64, data: Data) -> Result<(), Errno> {
        data.fill(0, data.len(), 0);
        Ok(())
    }
    async fn write(&self, _: u64, _: Bytes, _: Attributes) -> Result<(), Errno> {
        match self.fails {
            true => Err(Errno::IO),
            false => Ok(()),
        }
    }
    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }
}

/// A process that serves it, or will as soon as it may.
fn serving(fake: &FakeTap, settle_ms: u32) -> Process {
    Process::start_with(fake, move |session| {
        let its = session.clone();
        session.runtime().tasks.spawn(async move {
            let disk = Disk::new(behind(settle_ms));
            let shape = disk.activate().await.unwrap();
            let open = Open::new("null:1M".parse().unwrap());
            its.serve_disk(open, disk, shape).await.unwrap();
        });
    })
}

#[test]
fn image_of_another_kind_of_storage_is_refused_before_the_guest_knows() {
    let (fake, image) = (FakeTap::new(4).unwrap(), Image::new(2 * SIZE));
    let mut process = serving(&fake, 60_000);
    fake.wait_for_params();
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let unpause = Request::Unpause(image.open(Engine::Auto));
    let refused = process.ask(unpause, Some(&image)).unwrap_err();
    assert_eq!(refused.code, Code::State, "{refused}");
    assert_eq!(fake.info().sectors, SECTORS, "the guest was told of it");
    assert_eq!(process.status().state, State::Paused);
    process.exit();
}

/// An older kernel does not know that I/O may be over later.
#[test]
fn under_an_older_kernel_the_process_waits_itself() {
    const SETTLES: Duration = Duration::from_millis(400);
    let fake = FakeTap::before_claims(4).unwrap();
    let process = serving(&fake, 400);
    let tag = fake.send(Kind::Write, 0, &[1; 512], false).unwrap();
    assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    process.kill();
    let begun = Instant::now();
    let process = serving(&fake, 400);
    let tag = fake.send(Kind::Write, 0, &[2; 512], false).unwrap();
    assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    assert!(begun.elapsed() >= SETTLES, "{:?}", begun.elapsed());
    process.exit();
}

/// A node that records claims; it executes all but the first itself.
#[derive(Debug)]
struct Watched {
    node: FakeNode,
    /// Fences, and how long they settle.
    claims: Rc<RefCell<Vec<(u32, u32)>>>,
    /// True if it accepts only one claim, as older modules do.
    refuses: bool,
    /// A write fails as soon as something is claimed.
    breaks: Option<Io>,
}

/// A write that fails.
fn broken(io: &Io) {
    let file = OwnedFd::from(std::fs::File::open("/dev/zero").unwrap());
    let data = io.buffer(512).unwrap().into();
    drop(io.submit(Op::Write {
        file: Rc::new(file.into()),
        offset: 0,
        data,
        durable: false,
    }));
}

impl Node for Watched {
    fn info(&self) -> io::Result<Info> {
        self.node.info()
    }
    fn map(&self, info: &Info) -> io::Result<(Region, Region)> {
        self.node.map(info)
    }
    fn set_params(&self, records: &[u8]) -> io::Result<()> {
        self.node.set_params(records)
    }
    fn claim(&self, claims: &Claims) -> io::Result<()> {
        let mut known = self.claims.borrow_mut();
        known.push((claims.fence, claims.settle_ms));
        self.breaks.iter().for_each(broken);
        match (known.len(), self.refuses) {
            (1, _) => self.node.claim(claims),
            (_, true) => Err(io::Error::from(Errno::INVAL)),
            (_, false) => Ok(()),
        }
    }
    fn start(&self) -> io::Result<()> {
        self.node.start()
    }
    fn exchange(&self, commits: &[Completion], tags: &mut [u16]) -> io::Result<usize> {
        self.node.exchange(commits, tags)
    }
    fn mapper(&self) -> io::Result<Arc<dyn Mapper>> {
        self.node.mapper()
    }
    fn fd(&self) -> &Rc<OwnedFd> {
        self.node.fd()
    }
}

/// Returns the fences that a process claims which serves one write and ends in order.
fn claims_of(storage: Elsewhere, refuses: bool, pauses: bool) -> Vec<(u32, u32)> {
    let fake = FakeTap::new(4).unwrap();
    fake.send(Kind::Write, 0, &[1; 512], false).unwrap();
    let claims: Rc<RefCell<Vec<(u32, u32)>>> = Rc::default();
    let node = Watched {
        node: fake.open().unwrap(),
        claims: claims.clone(),
        refuses,
        breaks: None,
    };
    let session = Session::new(&Runtime::new());
    session.attach(Tap::open(node).unwrap()).unwrap();
    let its = session.clone();
    session.runtime().tasks.spawn(async move {
        let disk = Disk::new(storage);
        let shape = disk.activate().await.unwrap();
        let open = Open::new("null:1M".parse().unwrap());
        its.serve_disk(open, disk, shape).await.unwrap();
        while its.stats().write.requests == 0 {
            let moment = Duration::from_millis(1);
            its.runtime().io.sleep(moment).await.unwrap();
        }
        if pauses {
            its.handle(Request::Pause, Vec::new()).await.unwrap();
        }
        its.leave().await.unwrap();
    });
    session.run().unwrap();
    let claims = claims.borrow().clone();
    claims
}

/// Returns the fences that a process claims which cannot open an image on storage that may be anywhere, and ends.
fn claims_of_an_image_that_cannot_be_opened(breaks: bool) -> Vec<(u32, u32)> {
    let fake = FakeTap::new(4).unwrap();
    let claims: Rc<RefCell<Vec<(u32, u32)>>> = Rc::default();
    let runtime = Runtime::new();
    let node = Watched {
        node: fake.open().unwrap(),
        claims: claims.clone(),
        refuses: false,
        breaks: breaks.then(|| runtime.io.clone()),
    };
    let session = Session::new(&runtime);
    session.attach(Tap::open(node).unwrap()).unwrap();
    let its = session.clone();
    runtime.tasks.spawn(async move {
        // The file is empty, and its file system is unknown.
        let path = "/proc/self/comm";
        let image = std::fs::File::options().read(true).write(true).open(path);
        let open = Open::new(format!("sync:{path}").parse().unwrap());
        let refused = its
            .handle(Request::Open(open), vec![image.unwrap().into()])
            .await;
        assert!(refused.is_err(), "{refused:?}");
        while breaks && its.runtime().io.failed() == 0 {
            let moment = Duration::from_millis(1);
            its.runtime().io.sleep(moment).await.unwrap();
        }
        its.leave().await.unwrap();
    });
    session.run().unwrap();
    assert_eq!(fake.info().sectors, 0, "the guest was told of it");
    let claims = claims.borrow().clone();
    claims
}

/// I/O of an open may also end late.
#[test]
fn storage_is_claimed_before_it_is_looked_at() {
    let session = (FENCE_SESSION, 60_000);
    let over = (FENCE_LOCAL, 0);
    assert_eq!(
        claims_of_an_image_that_cannot_be_opened(false),
        [session, over]
    );
    assert_eq!(claims_of_an_image_that_cannot_be_opened(true), [session]);
}

/// The next process still waits for it.
#[test]
fn what_was_reached_counts_of_a_process_that_dies_before_it_serves() {
    let fake = FakeTap::new(4).unwrap();
    let session = Session::new(&Runtime::new());
    session
        .attach(Tap::open(fake.open().unwrap()).unwrap())
        .unwrap();
    let its = session.clone();
    session.runtime().tasks.spawn(async move {
        let open = Open::new("null:1M".parse().unwrap());
        let far = behind(700).fence;
        its.reach(&open, far).await.unwrap();
        its.end();
    });
    session.run().unwrap();
    drop(session);
    assert!(!fake.looks_quiet(0), "nothing of it is to be seen yet");
    assert!(!fake.looks_quiet(699), "it may be executed");
    assert!(fake.looks_quiet(700));
}

#[test]
fn who_ends_in_order_leaves_nothing_to_wait_for() {
    let minute = || behind(60_000);
    let session = (FENCE_SESSION, 60_000);
    let over = (FENCE_LOCAL, 0);
    assert_eq!(claims_of(minute(), false, false), [session, over]);
    assert_eq!(claims_of(minute(), false, true), [session, over]);
    assert_eq!(claims_of(minute(), true, false), [session, over]);
    let here = Elsewhere {
        fence: Fence::Local,
        ..minute()
    };
    assert_eq!(claims_of(here, false, false), [over]);
    // The storage may still execute I/O that this process has given up.
    let broken = Elsewhere {
        fails: true,
        ..minute()
    };
    assert_eq!(claims_of(broken, false, false), [session]);
}
