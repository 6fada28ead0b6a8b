// SPDX-License-Identifier: MIT OR Apache-2.0
//! The short way of reads and writes: which take it, and what happens if the storage does not do all of one.

use control::stats::Stats;
use control::Failure;
use diskio::{Bytes, Data, Errno, File, Runtime};
use drivers::{Attributes, Disk, DiskInfo, Driver, Fence, QueuedIo};
use ring::response::ResponseStatus;
use ring::tap::shadow::{Op, PostedRequest};
use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tapdev::fake::FakeTap;
use tapdev::{Params, Tap};
use tapdisk::{ServeConfig, Server};

use crate::common::{shape, SECTORS, SIZE};

/// A file that counts the calls of either way.
#[derive(Clone)]
struct CountedFile(Rc<Counted>);

struct Counted {
    file: File,
    quick: Cell<usize>,
    slow: Cell<usize>,
    /// The storage does no more than this of an operation on the short way.
    most: Cell<usize>,
}

impl Driver for CountedFile {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        Ok(shape(true))
    }
    fn fence(&self) -> Fence {
        Fence::Local
    }
    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.0.slow.set(self.0.slow.get() + 1);
        self.0.file.read(offset, data).await
    }
    async fn write(&self, offset: u64, data: Bytes, _: Attributes) -> Result<(), Errno> {
        self.0.slow.set(self.0.slow.get() + 1);
        self.0.file.write(offset, data).await
    }
    fn begin_read(&self, offset: u64, data: &Data) -> Option<QueuedIo> {
        self.0.quick.set(self.0.quick.get() + 1);
        let part = data.part(0, data.len().min(self.0.most.get()));
        self.0.file.begin_read(offset, &part).map(QueuedIo::from)
    }
    fn begin_write(&self, offset: u64, data: &Bytes) -> Option<QueuedIo> {
        self.0.quick.set(self.0.quick.get() + 1);
        let part = data.part(0, data.len().min(self.0.most.get()));
        self.0.file.begin_write(offset, &part).map(QueuedIo::from)
    }
    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }
}

struct Lab {
    runtime: Runtime,
    fake: FakeTap,
    terms: ServeConfig,
    server: Rc<Server>,
    file: CountedFile,
}

impl Lab {
    /// A process that serves a file of zeroes, which it may write or not.
    fn new(writable: bool) -> Self {
        let memory = tempfile::NamedTempFile::new().unwrap();
        memory.as_file().set_len(SIZE).unwrap();
        let mut options = std::fs::File::options();
        let opened: OwnedFd = options
            .read(true)
            .write(writable)
            .open(memory.path())
            .unwrap()
            .into();
        let runtime = Runtime::new();
        let file = CountedFile(Rc::new(Counted {
            file: File::new(&runtime.io, opened).unwrap(),
            quick: Cell::new(0),
            slow: Cell::new(0),
            most: Cell::new(usize::MAX),
        }));
        let fake = FakeTap::new(8).unwrap();
        let tap = Rc::new(Tap::open(fake.open().unwrap()).unwrap());
        tap.describe(&Params {
            sectors: SECTORS,
            logical_block: 512,
            physical_block: 512,
            read_only: false,
            write_cache: true,
            discard: None,
            may_shrink: false,
        })
        .unwrap();
        tap.start(tapdev::Fence::Local).unwrap();
        let terms = ServeConfig::default();
        let disk = Disk::new(file.clone());
        let its = disk.clone();
        let active = runtime.block_on(async move { its.activate().await });
        let stats: Rc<RefCell<Stats>> = Rc::default();
        let active = active.unwrap().unwrap();
        let server = Server::new(&runtime, &tap, disk, &active, terms.clone(), &stats);
        Self {
            runtime,
            fake,
            terms,
            server,
            file,
        }
    }

    fn settle(&self) {
        for _ in 0..4 {
            while self.server.turn().unwrap() | self.runtime.tasks.run() {}
            self.runtime.io.enter(false).unwrap();
        }
    }

    fn send(&self, op: Op, sector: u64, bytes: &[u8]) -> u16 {
        self.fake.send(op, sector, bytes, false).unwrap()
    }

    /// Has a request answered, and returns its status and data.
    fn done(&self, op: Op, sector: u64, bytes: &[u8]) -> (ResponseStatus, Vec<u8>) {
        let tag = self.send(op, sector, bytes);
        self.settle();
        self.fake.answer(tag, bytes.len()).unwrap()
    }

    /// Calls on the short way, and on the long one.
    fn calls(&self) -> (usize, usize) {
        (self.file.0.quick.get(), self.file.0.slow.get())
    }
}

#[test]
fn plain_reads_and_writes_are_one_operation() {
    let lab = Lab::new(true);
    assert_eq!(lab.done(Op::Write, 8, &[7; 4096]).0, ResponseStatus::Okay);
    let read = lab.done(Op::Read, 8, &[0; 4096]);
    assert_eq!(read, (ResponseStatus::Okay, vec![7; 4096]));
    assert_eq!(lab.calls(), (2, 0));
    assert_eq!((lab.server.in_flight(), lab.fake.info().committed), (0, 2));
}

#[test]
fn an_operation_that_is_not_done_whole_is_done_by_the_driver() {
    let lab = Lab::new(true);
    lab.file.0.most.set(512);
    assert_eq!(lab.done(Op::Write, 8, &[7; 4096]).0, ResponseStatus::Okay);
    let read = lab.done(Op::Read, 8, &[0; 4096]);
    assert_eq!(read, (ResponseStatus::Okay, vec![7; 4096]));
    assert_eq!(lab.calls(), (2, 2));
}

#[test]
fn an_error_is_the_answer_and_is_reported() {
    let lab = Lab::new(false);
    assert_eq!(lab.done(Op::Write, 8, &[7; 512]).0, ResponseStatus::Error);
    assert_eq!(lab.calls(), (1, 0));
    let troubles = lab.terms.troubles.clone();
    let told = lab
        .runtime
        .block_on(async move { troubles.after(None).await });
    assert_eq!(told.unwrap().count, 1);
}

#[test]
fn what_asks_for_more_takes_the_long_way() {
    let lab = Lab::new(true);
    for (preflush, fua) in [(true, false), (false, true)] {
        let request = PostedRequest {
            op: Op::Write,
            preflush,
            fua,
            sector: 0,
            sectors: 1,
            segments: 0,
        };
        let tag = lab.fake.post(request, &[1; 512]).unwrap();
        lab.settle();
        assert_eq!(lab.fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    }
    assert_eq!(lab.calls(), (0, 2));
    // Beyond the end of the disk nothing is begun.
    assert_eq!(
        lab.done(Op::Read, SECTORS, &[0; 512]).0,
        ResponseStatus::Error
    );
    assert_eq!(lab.calls(), (0, 2));
}

#[test]
fn a_client_waits_for_the_guest_and_the_guest_for_a_client() {
    let lab = Lab::new(true);
    let first = lab.send(Op::Write, 0, &[1; 4096]);
    // The operation is queued, and not carried out yet.
    assert!(lab.server.turn().unwrap());
    let (has, keep) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(None)));
    let (server, held, claim) = (lab.server.clone(), has.clone(), keep.clone());
    lab.runtime.tasks.spawn(async move {
        claim.set(Some(server.claim(0, 4096, false).await));
        held.set(true);
    });
    while lab.runtime.tasks.run() {}
    assert!(!has.get(), "the guest's write is under way");
    lab.settle();
    assert!(has.get());
    assert_eq!(lab.fake.answer(first, 0).unwrap().0, ResponseStatus::Okay);
    let second = lab.send(Op::Write, 0, &[2; 4096]);
    lab.settle();
    assert_eq!(lab.calls(), (1, 0), "the client reads");
    drop(keep.take());
    lab.settle();
    assert_eq!(lab.fake.answer(second, 0).unwrap().0, ResponseStatus::Okay);
    assert_eq!(lab.calls(), (1, 1));
}
