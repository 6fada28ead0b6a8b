// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lives of processes that serve one disk after the other: pauses, suspends, hand-offs and deaths.

use super::guest::Guest;
use super::images::{DiskImages, StoredImage};
use super::server::connect;
use super::storage::{memory, reopen};
use super::subject::SECRET;
use control::tapdisk::{FdGrant, Reply, Request, RequestedFile, State, Status};
use control::{Code, Failure};
use diskio::Runtime;
use drivers::nbd::RetryTimes;
use ring::tap::shadow::Op;
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;
use tapdev::fake::FakeTap;
use tapdev::Tap;
use tapdisk::Session;

/// Requests under way at most.
const DEPTH: usize = 8;
/// Events in a life at most.
const STEPS: u64 = 120;
/// Turns after which nothing is on its way any more within a process.
const SETTLED: u32 = 64;
/// Turns that nothing takes.
const FOREVER: u32 = 2_000_000;
/// Bytes after which the driver of an export flushes by itself: two or three requests.
const UNFLUSHED: usize = 12 << 10;
/// The server of a test executes nothing late, and is back at once.
const AT_ONCE: RetryTimes = RetryTimes {
    closed: Duration::ZERO,
    given_up: Duration::ZERO,
    pauses: [Duration::ZERO; 2],
};

/// The disk, from process to process.
#[derive(Clone)]
pub(super) struct Life(Rc<Inner>);

struct Inner {
    fake: FakeTap,
    images: Rc<DiskImages>,
    guest: Rc<RefCell<Guest>>,
    /// How the life ended.
    end: RefCell<Option<End>>,
}

/// How a life ends.
#[derive(Debug)]
pub(super) enum End {
    /// The process is killed.
    Death,
    /// The process has released the disk.
    HandOff,
    /// All of the schedule is over.
    All,
    /// A promise was broken.
    Broken(String),
}

/// Others run.
pub(super) async fn turns(count: u32) {
    for _ in 0..count {
        let mut is_over = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut is_over, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }
}

impl Life {
    pub(super) fn new(fake: &FakeTap, images: &Rc<DiskImages>, guest: &Rc<RefCell<Guest>>) -> Self {
        Self(Rc::new(Inner {
            fake: fake.clone(),
            images: images.clone(),
            guest: guest.clone(),
            end: RefCell::default(),
        }))
    }

    pub(super) fn images(&self) -> &Rc<DiskImages> {
        &self.0.images
    }

    fn served(&self) -> StoredImage {
        self.0.images.served()
    }

    /// One process, from its start to its end. Says how all ended, if that was the last one.
    pub(super) fn live(&self, is_last: bool) -> Option<Result<(), String>> {
        let runtime = Runtime::new();
        let session = Session::new(&runtime);
        let tap = Tap::open(self.0.fake.open().expect("a node")).expect("a node");
        session.attach(tap).expect("a node");
        session.set_exports(AT_ONCE, UNFLUSHED);
        self.0.images.attend(&runtime.io);
        let (life, its) = (self.clone(), session.clone());
        runtime
            .tasks
            .spawn(async move { life.supervise(&its).await });
        let (life, its) = (self.clone(), session.clone());
        runtime.tasks.spawn(async move {
            let end = match life.script(&its, is_last).await {
                Ok(end) => end,
                Err(what) => End::Broken(what),
            };
            life.0.end.replace(Some(end));
            its.end();
        });
        session.run().expect("the kernel talks to the process");
        let end = self.0.end.take().expect("an end");
        self.0.guest.borrow_mut().note(format!("{end:?}"));
        if matches!(end, End::Death) {
            self.0.images.die();
        }
        // The death of a process takes everything along.
        runtime.tasks.clear();
        drop(session);
        // The kernel ends what it has begun for the process.
        for _ in 0..4 {
            runtime.io.enter(false).expect("plain calls");
        }
        drop(runtime);
        self.0.fake.fence();
        // Memory may be short at any time.
        if self.0.guest.borrow_mut().chance.one_in(2) {
            self.0.images.evict();
        }
        match end {
            End::Death | End::HandOff => None,
            End::All => Some(Ok(())),
            End::Broken(what) => Some(Err(what)),
        }
    }

    /// Gives the process what it asks for.
    async fn supervise(&self, session: &Rc<Session>) {
        let mut known = 0;
        loop {
            let asked = session.handle(Request::Needs { after: known }, Vec::new());
            let Ok(Reply::Needs { needs }) = asked.await else {
                return;
            };
            for need in needs {
                known = known.max(need.number);
                let (provided, fd) = match need.what {
                    RequestedFile::State { size } => {
                        (FdGrant::Shared, Some(self.served().kept(size)))
                    }
                    RequestedFile::Parent { .. } => {
                        let base = reopen(&self.0.images.base, false);
                        (FdGrant::Locked, Some(base))
                    }
                    RequestedFile::Server { .. } => {
                        let exported = self.0.images.exported().expect("an export");
                        let connection = connect(session.runtime(), &exported.storage);
                        (FdGrant::Shared, Some(connection))
                    }
                    RequestedFile::Key { .. } => {
                        (FdGrant::Shared, Some(reopen(memory(SECRET), false)))
                    }
                    _ => {
                        let why = Failure::new(Code::Denied, "it is not for a test");
                        (FdGrant::Refused(why), None)
                    }
                };
                let question = Request::Provide {
                    number: need.number,
                    provided,
                    backing: None,
                };
                let given = session.handle(question, fd.into_iter().collect()).await;
                assert_eq!(given, Ok(Reply::Done));
            }
        }
    }

    pub(super) fn guest(&self) -> std::cell::RefMut<'_, Guest> {
        self.0.guest.borrow_mut()
    }

    /// Has the image opened, as a supervisor does that tries once more.
    async fn open(
        &self,
        session: &Rc<Session>,
        how: impl Fn(control::tapdisk::Open) -> Request,
    ) -> Result<(), String> {
        let image = self.served();
        image.storage.fail(false);
        let mut opened = Ok(Reply::Done);
        for fails in [true, false] {
            let question = how(image.subject.open());
            image.storage.open(fails);
            opened = session.handle(question, image.descriptors()).await;
            image.storage.open(false);
            if let Ok(Reply::Disk(_)) = opened {
                let fails = !self.guest().chance.one_in(4);
                image.storage.fail(fails);
                self.guest().begins_again();
                return Ok(());
            }
            self.guest().note(format!("it does not open: {opened:?}"));
        }
        Err(format!("the image cannot be opened: {opened:?}"))
    }

    /// Takes answers, and has the power lost after a flush that succeeded.
    pub(super) fn collect(&self) -> Result<(), String> {
        let has_flushed = self.guest().collect();
        if has_flushed && self.guest().chance.one_in(2) {
            return self.check();
        }
        Ok(())
    }

    pub(super) fn check(&self) -> Result<(), String> {
        self.0.guest.borrow().check(&self.0.images)
    }

    /// Waits until no more than so many requests are under way.
    async fn until(&self, most: usize) -> Result<(), String> {
        for _ in 0..FOREVER {
            self.collect()?;
            if self.0.guest.borrow().under_way() <= most {
                return Ok(());
            }
            turns(1).await;
        }
        Err("a request is not answered".into())
    }

    async fn status(&self, session: &Rc<Session>) -> Result<Box<Status>, String> {
        match session.handle(Request::Status, Vec::new()).await {
            Ok(Reply::Status(status)) => Ok(status),
            other => Err(format!("no status: {other:?}")),
        }
    }

    /// A pause, or the like, that began then has ended. One that succeeds promises as much as a flush, unless the guest
    /// is owed an error that was met before. Returns true if it is.
    async fn paused(
        &self,
        session: &Rc<Session>,
        begun: u64,
        what: &str,
        done: &Result<Reply, Failure>,
    ) -> Result<bool, String> {
        let owes = self.status(session).await?.owes;
        // A flush that was answered meanwhile may have reported something.
        self.collect()?;
        self.guest().note(format!("{what}: {done:?}, owes {owes}"));
        if done.is_ok() && !owes {
            self.guest().settle(begun);
            self.check()
                .map_err(|broken| format!("after the {what}, {broken}"))?;
        }
        Ok(owes)
    }

    /// Pauses the disk for a moment, or until another process has it.
    async fn pause(&self, session: &Rc<Session>) -> Result<Option<End>, String> {
        let begun = self.guest().now();
        let done = session.handle(Request::Pause, Vec::new()).await;
        let owes = self.paused(session, begun, "pause", &done).await?;
        let end = self.switch(session, owes).await?;
        if end.is_none() {
            self.open(session, Request::Unpause).await?;
        }
        Ok(end)
    }

    async fn suspend(&self, session: &Rc<Session>) -> Result<(), String> {
        let begun = self.guest().now();
        let done = session.handle(Request::Inactivate, Vec::new()).await;
        self.paused(session, begun, "suspend", &done).await?;
        self.end_copy(session);
        let state = self.status(session).await?.state;
        if state != State::Inactive {
            return Err(format!("the disk is not inactive: {state:?}"));
        }
        // Other programs may have changed the time of the file.
        let stamp = None;
        let activate = |open| Request::Activate { open, stamp };
        self.open(session, activate).await
    }

    async fn hand_off(&self, session: &Rc<Session>) -> Result<End, String> {
        let begun = self.guest().now();
        let done = session.handle(Request::Close, Vec::new()).await;
        self.paused(session, begun, "hand-off", &done).await?;
        self.end_copy(session);
        Ok(End::HandOff)
    }

    /// A flush with nothing beside it reports what is owed, so the next one fails only if the storage fails again.
    async fn owes_once(&self) -> Result<(), String> {
        self.until(0).await?;
        self.guest().send(Op::Flush);
        self.until(0).await?;
        let storage = self.served().storage;
        let (errors, failed) = (storage.errors(), self.guest().failed);
        self.guest().send(Op::Flush);
        self.until(0).await?;
        let fails_anew = storage.errors() > errors;
        match self.guest().failed > failed && !fails_anew {
            true => Err("a flush fails for what another one has reported".into()),
            false => Ok(()),
        }
    }

    /// One event, after which the process may have let go of the disk.
    async fn step(&self, session: &Rc<Session>) -> Result<Option<End>, String> {
        let kinds = match self.served().subject.moves {
            true => 108,
            false => 100,
        };
        let kind = self.guest().chance.below(kinds);
        match kind {
            0..50 => self.guest().send(Op::Write),
            50..55 => self.guest().send(Op::WriteZeroes),
            55..59 => self.guest().send(Op::Discard),
            59..76 => self.guest().send(Op::Flush),
            76..92 => {
                let count = 1 + self.guest().chance.below(8);
                for _ in 0..count {
                    turns(1).await;
                    self.collect()?;
                }
            }
            92..95 => self.owes_once().await?,
            95..97 => return self.pause(session).await,
            97..99 => self.suspend(session).await?,
            99 => {
                let fails = !self.guest().chance.one_in(3);
                self.served().storage.fail(fails);
            }
            100..104 => self.mirror(session).await,
            // A copy then reads only what the storage has.
            104..106 => self.images().evict(),
            _ => {
                self.until_same(session).await?;
                return self.pause(session).await;
            }
        }
        Ok(None)
    }

    /// Events while this process has the disk.
    async fn script(&self, session: &Rc<Session>, is_last: bool) -> Result<End, String> {
        self.open(session, Request::Open).await?;
        let steps = match is_last {
            true => 20,
            false => self.guest().chance.below(STEPS),
        };
        for _ in 0..steps {
            self.collect()?;
            if let Some(end) = self.step(session).await? {
                return Ok(end);
            }
            if self.0.guest.borrow().under_way() >= DEPTH {
                self.until(DEPTH / 2).await?;
            }
        }
        if is_last {
            self.served().storage.fail(false);
            self.owes_once().await?;
            self.check()?;
            return Ok(End::All);
        }
        if self.guest().chance.one_in(3) {
            return self.hand_off(session).await;
        }
        // An error that the storage has reported, and the process has not learned of yet, is lost with it.
        // An owed one is reported by a flush that is under way; so the process lives until there was none for a while.
        let storage = self.served().storage;
        storage.fail(false);
        loop {
            let errors = storage.errors();
            turns(SETTLED).await;
            if storage.errors() == errors {
                break;
            }
        }
        // From here on the storage reports nothing to it.
        self.0.images.die();
        Ok(End::Death)
    }
}
