// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls of a driver, their order, and when the guest gets the answers.

use control::stats::Stats;
use control::tapdisk::{Call, IoErrorReport as Told, OnError, Rules, Trouble};
use control::Failure;
use diskio::{Bytes, Data, Errno, Runtime};
use drivers::{Attributes, Disk, DiskInfo, Driver, DriverLimits, Fence};
use ring::response::ResponseStatus;
use ring::tap::shadow::{Op, PostedRequest};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use tapdev::fake::FakeTap;
use tapdev::{Params, Tap};
use tapdisk::{ServeConfig, Server};

const SHAPE: DiskInfo = DiskInfo {
    size: 1 << 20,
    logical_block: 512,
    physical_block: 512,
    discard: Some(512),
    write_cache: true,
    fua: false,
    limits: DriverLimits {
        transfer: u64::MAX,
        zeroes: u64::MAX,
        align: 1,
    },
};

/// Records its calls. No call ends before a test allows it.
#[derive(Clone, Default)]
struct RecordingDriver(Rc<OrderState>);

#[derive(Default)]
struct OrderState {
    calls: RefCell<Vec<&'static str>>,
    /// Attributes of the writes that it got.
    seen: RefCell<Vec<Attributes>>,
    /// True if it executes durable writes itself.
    heeds_fua: Cell<bool>,
    /// Calls that may end.
    allowed: Cell<usize>,
    flush_fails: Cell<Option<Errno>>,
    write_fails: Cell<Option<Errno>>,
    waiting: RefCell<Vec<Waker>>,
}

impl RecordingDriver {
    async fn call(&self, what: &'static str) -> Result<(), Errno> {
        let number = {
            let mut calls = self.0.calls.borrow_mut();
            calls.push(what);
            calls.len()
        };
        poll_fn(|cx| match self.0.allowed.get() >= number {
            true => Poll::Ready(()),
            false => {
                self.0.waiting.borrow_mut().push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await;
        let fails = match what {
            "flush" => self.0.flush_fails.get(),
            "write" => self.0.write_fails.get(),
            _ => None,
        };
        fails.map_or(Ok(()), Err)
    }

    fn allow(&self, calls: usize) {
        self.0.allowed.set(calls);
        for waker in self.0.waiting.take() {
            waker.wake();
        }
    }

    fn calls(&self) -> Vec<&'static str> {
        self.0.calls.borrow().clone()
    }
}

impl Driver for RecordingDriver {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        Ok(DiskInfo {
            fua: self.0.heeds_fua.get(),
            ..SHAPE
        })
    }
    fn fence(&self) -> Fence {
        Fence::Local
    }

    async fn read(&self, _: u64, _: Data) -> Result<(), Errno> {
        self.call("read").await
    }
    async fn write(&self, _: u64, _: Bytes, how: Attributes) -> Result<(), Errno> {
        self.0.seen.borrow_mut().push(how);
        self.call("write").await
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.call("flush").await
    }
    async fn discard(&self, _: u64, _: u64, _: Attributes) -> Result<(), Errno> {
        self.call("discard").await
    }
}

struct Lab {
    runtime: Runtime,
    fake: FakeTap,
    tap: Rc<Tap>,
    terms: ServeConfig,
    server: Rc<Server>,
    driver: RecordingDriver,
}

/// Returns an error policy, for a full storage and for other errors.
fn rules(on_no_space: OnError, on_error: OnError) -> Rc<Cell<Rules>> {
    Rc::new(Cell::new(Rules {
        on_no_space,
        on_error,
        ..Rules::default()
    }))
}

impl Lab {
    fn new() -> Self {
        Self::with(ServeConfig::default())
    }

    /// The storage is full, and the disk waits for room.
    fn full() -> Self {
        let lab = Self::with(ServeConfig {
            rules: rules(OnError::Stop, OnError::Report),
            ..ServeConfig::default()
        });
        lab.driver.0.write_fails.set(Some(Errno::NOSPC));
        lab
    }

    fn with(terms: ServeConfig) -> Self {
        Self::on(FakeTap::new(8).unwrap(), RecordingDriver::default(), terms)
    }

    /// A process that serves this node with this driver.
    fn on(fake: FakeTap, driver: RecordingDriver, terms: ServeConfig) -> Self {
        let runtime = Runtime::new();
        let tap = Rc::new(Tap::open(fake.open().unwrap()).unwrap());
        tap.describe(&Params {
            sectors: SHAPE.size / 512,
            logical_block: 512,
            physical_block: 512,
            read_only: false,
            write_cache: true,
            discard: None,
            may_shrink: false,
        })
        .unwrap();
        tap.start(tapdev::Fence::Local).unwrap();
        let server = Self::server(&runtime, &tap, &driver, &terms);
        Self {
            runtime,
            fake,
            tap,
            terms,
            server,
            driver,
        }
    }

    fn server(
        runtime: &Runtime,
        tap: &Rc<Tap>,
        driver: &RecordingDriver,
        terms: &ServeConfig,
    ) -> Rc<Server> {
        let disk = Disk::new(driver.clone());
        let its = disk.clone();
        let shape = runtime.block_on(async move { its.activate().await });
        let stats: Rc<RefCell<Stats>> = Rc::default();
        let shape = shape.unwrap().unwrap();
        Server::new(runtime, tap, disk, &shape, terms.clone(), &stats)
    }

    /// The process dies, and another one takes its place.
    fn die(self) -> Self {
        let Self {
            runtime,
            fake,
            tap,
            terms,
            server,
            driver,
        } = self;
        runtime.tasks.clear();
        drop((runtime, tap, server));
        fake.fence();
        Self::on(fake, driver, terms)
    }

    /// Resumes the disk after a pause.
    fn go_on(&mut self) {
        self.server = Self::server(&self.runtime, &self.tap, &self.driver, &self.terms);
    }

    /// Returns the reports to the supervisor.
    fn told(&self) -> Told {
        let troubles = self.terms.troubles.clone();
        let told = async move { troubles.after(None).await };
        self.runtime.block_on(told).unwrap()
    }

    /// Everything that can happen without the driver's end happens.
    fn settle(&self) {
        while self.server.turn().unwrap() | self.runtime.tasks.run() {}
        self.runtime.io.enter(false).unwrap();
        while self.server.turn().unwrap() | self.runtime.tasks.run() {}
    }

    fn write(&self, preflush: bool, fua: bool) -> u16 {
        let request = PostedRequest {
            op: Op::Write,
            preflush,
            fua,
            sector: 0,
            sectors: 1,
            segments: 0,
        };
        self.fake.post(request, &[1; 512]).unwrap()
    }

    fn flush(&self) -> u16 {
        let request = PostedRequest {
            op: Op::Flush,
            preflush: false,
            fua: false,
            sector: 0,
            sectors: 0,
            segments: 0,
        };
        self.fake.post(request, &[]).unwrap()
    }

    /// Lets the driver's calls end one after the other; returns the calls and the number of answers after each.
    fn steps(&self, calls: usize) -> Vec<(Vec<&'static str>, u64)> {
        let steps = (0..=calls).map(|allowed| {
            self.driver.allow(allowed);
            self.settle();
            (self.driver.calls(), self.fake.info().committed)
        });
        steps.collect()
    }
}

#[test]
fn durable_write_is_flushed_before_its_answer() {
    let lab = Lab::new();
    let tag = lab.write(false, true);
    assert_eq!(
        lab.steps(2),
        [
            (vec!["write"], 0),
            (vec!["write", "flush"], 0),
            (vec!["write", "flush"], 1)
        ]
    );
    assert_eq!(lab.fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
}

#[test]
fn flush_before_a_write_comes_before_it() {
    let lab = Lab::new();
    lab.write(true, true);
    assert_eq!(
        lab.steps(3),
        [
            (vec!["flush"], 0),
            (vec!["flush", "write"], 0),
            (vec!["flush", "write", "flush"], 0),
            (vec!["flush", "write", "flush"], 1)
        ]
    );
}

#[test]
fn write_whose_flush_fails_is_an_error() {
    for (preflush, fua, calls) in [(true, false, 1), (false, true, 2)] {
        let lab = Lab::new();
        lab.driver.0.flush_fails.set(Some(Errno::IO));
        let tag = lab.write(preflush, fua);
        lab.steps(3);
        assert_eq!(
            lab.driver.calls().len(),
            calls,
            "nothing comes after the error"
        );
        assert_eq!(lab.fake.answer(tag, 0).unwrap().0, ResponseStatus::Error);
    }
}

/// A second attempt would succeed, and the guest would take lost data for durable.
#[test]
fn flush_that_failed_is_never_tried_again() {
    let flush = PostedRequest {
        op: Op::Flush,
        preflush: false,
        fua: false,
        sector: 0,
        sectors: 0,
        segments: 0,
    };
    let write = PostedRequest {
        op: Op::Write,
        sectors: 1,
        ..flush
    };
    for error in [Errno::IO, Errno::NOSPC] {
        for (request, calls) in [
            (flush, 1),
            (
                PostedRequest {
                    preflush: true,
                    ..write
                },
                1,
            ),
            (PostedRequest { fua: true, ..write }, 2),
        ] {
            let lab = Lab::with(ServeConfig {
                rules: rules(OnError::Stop, OnError::Stop),
                ..ServeConfig::default()
            });
            lab.driver.0.flush_fails.set(Some(error));
            lab.driver.allow(9);
            let bytes = vec![1; request.sectors as usize * 512];
            let tag = lab.fake.post(request, &bytes).unwrap();
            lab.settle();
            assert_eq!(lab.fake.answer(tag, 0).unwrap().0, ResponseStatus::Error);
            assert_eq!(lab.driver.calls().len(), calls, "{request:?}");
            let told = lab.told();
            assert_eq!((told.count, told.is_stopped), (1, false), "{request:?}");
        }
    }
}

#[test]
fn durable_write_without_room_is_tried_again() {
    let mut lab = Lab::full();
    lab.driver.allow(9);
    let tag = lab.write(true, true);
    lab.settle();
    assert_eq!(
        (lab.fake.info().committed, lab.told().is_stopped),
        (0, true)
    );
    lab.driver.0.write_fails.set(None);
    lab.go_on();
    lab.settle();
    assert_eq!(lab.fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
}

#[test]
fn driver_that_writes_durably_is_not_flushed() {
    let driver = RecordingDriver::default();
    driver.0.heeds_fua.set(true);
    let lab = Lab::on(FakeTap::new(8).unwrap(), driver, ServeConfig::default());
    lab.write(true, true);
    assert_eq!(
        lab.steps(2),
        [
            (vec!["flush"], 0),
            (vec!["flush", "write"], 0),
            (vec!["flush", "write"], 1)
        ]
    );
}

#[test]
fn driver_is_told_what_was_delivered_before() {
    let lab = Lab::new();
    lab.write(false, true);
    lab.fake.send(Op::Write, 8, &[2; 512], false).unwrap();
    lab.settle();
    let first = lab.driver.0.seen.take();
    let [one, two] = first[..] else {
        panic!("{first:?}");
    };
    assert!(one.fua && !two.fua && !one.replay && !two.replay);
    assert!(one.sequence.is_some() && one.sequence < two.sequence);
    let lab = lab.die();
    lab.fake.send(Op::Write, 16, &[3; 512], false).unwrap();
    lab.settle();
    let again = lab.driver.0.seen.take();
    let [one_again, two_again, three] = again[..] else {
        panic!("{again:?}");
    };
    let replayed = |attributes| Attributes {
        replay: true,
        ..attributes
    };
    assert_eq!([one_again, two_again], [one, two].map(replayed));
    assert!(!three.replay && three.sequence > two.sequence);
}

#[test]
fn request_is_answered_when_the_driver_is_done_and_others_go_on() {
    let lab = Lab::new();
    let slow = lab.fake.send(Op::Read, 0, &[0; 512], false).unwrap();
    lab.settle();
    lab.fake.send(Op::Flush, 0, &[], false).unwrap();
    lab.fake.send(Op::Read, 8, &[0; 512], false).unwrap();
    lab.settle();
    assert_eq!(lab.driver.calls(), ["read", "flush", "read"]);
    assert_eq!((lab.server.in_flight(), lab.fake.info().committed), (3, 0));
    lab.driver.allow(3);
    lab.settle();
    assert_eq!((lab.server.in_flight(), lab.fake.info().committed), (0, 3));
    assert_eq!(lab.fake.answer(slow, 0).unwrap().0, ResponseStatus::Okay);
}

#[test]
fn what_was_fetched_is_finished_before_the_end() {
    let lab = Lab::new();
    lab.write(false, false);
    lab.settle();
    let ended = Rc::new(Cell::new(false));
    let (server, end) = (lab.server.clone(), ended.clone());
    lab.runtime.tasks.spawn(async move {
        server.quiesce().await;
        end.set(true);
    });
    lab.settle();
    let later = lab.fake.send(Op::Read, 100, &[0; 512], false).unwrap();
    lab.settle();
    assert!(!ended.get());
    lab.driver.allow(1);
    lab.settle();
    assert!(ended.get());
    assert_eq!((lab.fake.info().committed, lab.fake.info().waiting), (1, 1));
    assert_eq!(lab.driver.calls(), ["write"]);
    let _ = later;
}

/// As an NBD client's request between two of the guest, all three at the same place.
#[test]
fn who_is_not_the_guest_keeps_to_the_order_of_arrival() {
    let lab = Lab::new();
    lab.write(false, false);
    lab.settle();
    let (held, release) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(None)));
    let (server, has, keep) = (lab.server.clone(), held.clone(), release.clone());
    lab.runtime.tasks.spawn(async move {
        keep.set(Some(server.claim(0, 4096, false).await));
        has.set(true);
    });
    lab.settle();
    assert!(!held.get(), "the guest's write is not over");
    lab.driver.allow(1);
    lab.settle();
    assert!(held.get());
    lab.write(false, false);
    lab.fake.send(Op::Read, 0, &[0; 512], false).unwrap();
    lab.settle();
    assert_eq!(lab.driver.calls(), ["write"], "it is being read");
    drop(release.take());
    lab.settle();
    assert_eq!(lab.driver.calls(), ["write", "write"]);
}

#[test]
fn guest_waits_while_there_is_no_room() {
    let mut lab = Lab::full();
    let first = lab.write(false, false);
    // The request overlaps the first one, so it comes after it in any case.
    let second = lab.fake.send(Op::Read, 0, &[0; 512], false).unwrap();
    let other = lab.fake.send(Op::Read, 8, &[0; 512], false).unwrap();
    lab.driver.allow(9);
    lab.settle();
    assert_eq!(lab.fake.answer(other, 0).unwrap().0, ResponseStatus::Okay);
    // Later requests wait, too.
    let third = lab.fake.send(Op::Read, 100, &[0; 512], false).unwrap();
    lab.settle();
    let info = lab.fake.info();
    assert_eq!((info.committed, info.waiting, info.delivered), (1, 3, 0));
    let told = lab.told();
    let trouble = Trouble {
        what: Call::Write,
        offset: 0,
        len: 512,
        errno: Errno::NOSPC.raw_os_error(),
    };
    assert_eq!(
        (told.count, told.last, told.is_stopped),
        (1, Some(trouble), true)
    );
    // Unpaused too early it stops again.
    lab.go_on();
    lab.settle();
    assert_eq!((lab.fake.info().committed, lab.told().count), (2, 2));
    lab.driver.0.write_fails.set(None);
    lab.go_on();
    lab.settle();
    assert_eq!(lab.fake.info().committed, 4);
    for tag in [first, second, third] {
        assert_eq!(lab.fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    }
}

#[test]
fn failure_is_told_and_what_is_not_possible_is_none() {
    for (error, policy, count, waits) in [
        (Errno::NOSPC, OnError::Report, 1, false),
        (Errno::IO, OnError::Report, 1, false),
        (Errno::IO, OnError::Stop, 1, true),
        (Errno::OPNOTSUPP, OnError::Stop, 0, false),
    ] {
        let lab = Lab::with(ServeConfig {
            rules: rules(OnError::Report, policy),
            ..ServeConfig::default()
        });
        lab.driver.0.write_fails.set(Some(error));
        lab.write(false, false);
        lab.driver.allow(1);
        lab.settle();
        let told = lab.told();
        assert_eq!((told.count, told.is_stopped), (count, waits), "{error}");
        assert_eq!(lab.fake.info().committed, u64::from(!waits), "{error}");
    }
}

#[test]
fn what_a_reservation_refuses_waits_and_is_never_told_the_guest() {
    for (what, flushes) in [
        ("a write", false),
        ("a durable one", false),
        ("a flush", true),
    ] {
        for is_reserved in [true, false] {
            let mut lab = Lab::with(ServeConfig {
                rules: rules(OnError::Report, OnError::Report),
                reserved: is_reserved,
                ..ServeConfig::default()
            });
            let fails = match flushes {
                true => &lab.driver.0.flush_fails,
                false => &lab.driver.0.write_fails,
            };
            fails.set(Some(Errno::BADE));
            let tag = match flushes {
                true => lab.flush(),
                false => lab.write(false, what == "a durable one"),
            };
            lab.driver.allow(10);
            lab.settle();
            let told = lab.told();
            let stops = (told.count, told.is_stopped);
            assert_eq!(stops, (1, is_reserved), "{what}");
            if !is_reserved {
                assert_eq!(
                    lab.fake.answer(tag, 0).unwrap().0,
                    ResponseStatus::Error,
                    "{what}"
                );
                continue;
            }
            assert_eq!(lab.fake.info().committed, 0, "{what}");
            // The lease is back: the request succeeds, and no flush fails because of the refused one.
            fails.set(None);
            lab.go_on();
            lab.settle();
            assert_eq!(
                lab.fake.answer(tag, 0).unwrap().0,
                ResponseStatus::Okay,
                "{what}"
            );
            let flush = lab.flush();
            lab.settle();
            assert_eq!(
                lab.fake.answer(flush, 0).unwrap().0,
                ResponseStatus::Okay,
                "{what}"
            );
        }
    }
}

/// Another host that takes the reservation ends requests under way, with any error.
#[test]
fn what_fails_on_a_disk_that_is_reserved_waits() {
    let mut lab = Lab::with(ServeConfig {
        rules: rules(OnError::Report, OnError::Report),
        reserved: true,
        ..ServeConfig::default()
    });
    lab.driver.0.write_fails.set(Some(Errno::IO));
    let tag = lab.write(false, false);
    lab.driver.allow(10);
    lab.settle();
    assert!(lab.told().is_stopped);
    assert_eq!(lab.fake.info().committed, 0);
    lab.driver.0.write_fails.set(None);
    lab.go_on();
    lab.settle();
    assert_eq!(lab.fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
}
