// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tapdisk in a thread, and its image.

// Tests of other packages use some of this.
#![allow(dead_code)]

pub(crate) mod guest;
pub(crate) mod images;
pub(crate) mod watched;

use control::tapdisk::{Engine, FdGrant, FdRequest, Open, Reply, Request, Status};
use control::{Channel, Code, Failure};
use diskio::Runtime;
use drivers::{DiskInfo, DriverLimits};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tapdev::fake::FakeTap;
use tapdev::Tap;
use tapdisk::Session;

/// Nothing that is waited for takes so long, even where the machine itself stands still for a while.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);

/// Bytes of an image.
pub(crate) const SIZE: u64 = 1 << 20;
/// Sectors of an image.
pub(crate) const SECTORS: u64 = SIZE / 512;

/// Returns the properties of a test's disk: nothing special, with a write cache or without.
pub(crate) fn shape(write_cache: bool) -> DiskInfo {
    DiskInfo {
        size: SIZE,
        logical_block: 512,
        physical_block: 512,
        discard: None,
        write_cache,
        fua: false,
        limits: DriverLimits::default(),
    }
}

/// An image on the file system of the build, which can do direct I/O.
pub(crate) struct Image(pub(crate) tempfile::NamedTempFile);

impl Image {
    pub(crate) fn new(size: u64) -> Self {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let file = tempfile::NamedTempFile::new_in(folder).unwrap();
        file.as_file().set_len(size).unwrap();
        Self(file)
    }

    pub(crate) fn descriptor(&self) -> OwnedFd {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let file = options.open(self.0.path());
        file.expect("the file system of the build can do direct I/O")
            .into()
    }

    pub(crate) fn open(&self, engine: Engine) -> Open {
        let target = format!("aio:{}", self.0.path().display());
        Open {
            engine,
            ..Open::new(target.parse().unwrap())
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.0.path()).unwrap()
    }
}

/// Returns the open questions of a tapdisk with a higher number than `after`.
pub(crate) fn needs(channel: &mut Channel, after: u64) -> Vec<FdRequest> {
    match channel.ask(Request::Needs { after }, &[]) {
        Ok(Reply::Needs { needs }) => needs,
        other => panic!("{other:?}"),
    }
}

/// Answers a need, as a supervisor does.
pub(crate) fn provide(
    channel: &mut Channel,
    number: u64,
    provided: FdGrant,
    fd: Option<impl AsFd>,
) {
    let question = Request::Provide {
        number,
        provided,
        backing: None,
    };
    let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
    assert_eq!(channel.ask::<_, Reply>(&question, &fds), Ok(Reply::Done));
}

/// Provides a descriptor for a question, or refuses it if there is none.
pub(crate) fn give_or_refuse(
    channel: &mut Channel,
    number: u64,
    given: Option<impl AsFd>,
    provided: FdGrant,
) {
    match given {
        Some(_) => provide(channel, number, provided, given),
        None => refuse(channel, number),
    }
}

/// Refuses a need.
pub(crate) fn refuse(channel: &mut Channel, number: u64) {
    let why = Failure::new(Code::Denied, "it is not for a test");
    provide(channel, number, FdGrant::Refused(why), None::<OwnedFd>);
}

/// A tapdisk in a thread.
pub(crate) struct Process {
    control: Channel,
    /// A second connection, for its questions.
    pub(crate) needs: Channel,
    kill: UnixStream,
    thread: JoinHandle<()>,
    fake: FakeTap,
}

impl Process {
    /// A process that has the node.
    pub(crate) fn start(fake: &FakeTap) -> Self {
        Self::start_with(fake, |_| ())
    }

    /// A process that has the node, and begins with something of its own.
    pub(crate) fn start_with(
        fake: &FakeTap,
        begin: impl FnOnce(&Rc<Session>) + Send + 'static,
    ) -> Self {
        let node = fake.clone();
        Self::idle(fake, move |session| {
            let tap = Tap::open(node.open().unwrap()).unwrap();
            session.attach(tap).unwrap();
            begin(session);
        })
    }

    /// A process that has no node but the one that it begins with.
    pub(crate) fn idle(fake: &FakeTap, begin: impl FnOnce(&Rc<Session>) + Send + 'static) -> Self {
        let (kill, killed) = UnixStream::pair().unwrap();
        let (ask, answer) = UnixStream::pair().unwrap();
        let (needs, other) = UnixStream::pair().unwrap();
        answer.set_nonblocking(true).unwrap();
        other.set_nonblocking(true).unwrap();
        let thread = thread::spawn(move || {
            let runtime = Runtime::new();
            let session = Session::new(&runtime);
            begin(&session);
            tapdisk::listen::connected(&session, answer.into());
            tapdisk::listen::connected(&session, other.into());
            let (end, killed) = (session.clone(), Rc::new(OwnedFd::from(killed)));
            runtime.tasks.spawn(async move {
                end.runtime().io.readable(&killed).await.unwrap();
                end.end();
            });
            session.run().unwrap();
            // The death of a process takes everything along.
            runtime.tasks.clear();
        });
        let control = Channel::new(ask);
        // Nothing takes so long: a question that is not answered is a failure, not a test that hangs.
        control.set_timeout(Some(LIMIT)).unwrap();
        let needs = Channel::new(needs);
        needs.set_timeout(Some(LIMIT)).unwrap();
        Self {
            control,
            needs,
            kill,
            thread,
            fake: fake.clone(),
        }
    }

    pub(crate) fn ask(
        &mut self,
        question: Request,
        image: Option<&Image>,
    ) -> Result<Reply, Failure> {
        let image = image.map(Image::descriptor);
        let fds: Vec<_> = image.iter().map(AsFd::as_fd).collect();
        self.control.ask(question, &fds)
    }

    pub(crate) fn ask_with(
        &mut self,
        question: Request,
        fd: BorrowedFd<'_>,
    ) -> Result<Reply, Failure> {
        self.control.ask(question, &[fd])
    }

    /// Asks while `give` answers on the other connection: the reply waits for those answers.
    pub(crate) fn ask_and_give(
        &mut self,
        question: Request,
        fd: BorrowedFd<'_>,
        give: impl FnOnce(&mut Channel) + Send,
    ) -> Result<Reply, Failure> {
        self.ask_giving(question, &[fd], give)
    }

    /// Asks with any number of descriptors, while `give` answers on the other connection.
    pub(crate) fn ask_giving(
        &mut self,
        question: Request,
        fds: &[BorrowedFd<'_>],
        give: impl FnOnce(&mut Channel) + Send,
    ) -> Result<Reply, Failure> {
        let (idle, _other) = UnixStream::pair().unwrap();
        let mut channel = std::mem::replace(&mut self.needs, Channel::new(idle));
        let (reply, channel) = thread::scope(|scope| {
            let giver = scope.spawn(move || {
                give(&mut channel);
                channel
            });
            let reply = self.control.ask(question, fds);
            (reply, giver.join().unwrap())
        });
        self.needs = channel;
        reply
    }

    /// Serves an image.
    pub(crate) fn serving(fake: &FakeTap, image: &Image, engine: Engine) -> Self {
        let mut process = Self::start(fake);
        let reply = process.ask(Request::Open(image.open(engine)), Some(image));
        assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
        process
    }

    pub(crate) fn status(&mut self) -> Status {
        match self.ask(Request::Status, None) {
            Ok(Reply::Status(status)) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// Dies without a word: nothing is finished or committed. All of its I/O is over when this returns, so it is
    /// fenced.
    pub(crate) fn kill(self) {
        let fake = self.fake.clone();
        self.die();
        fake.fence();
    }

    /// Kills it; the caller knows whether its I/O is over.
    pub(crate) fn die(self) {
        drop(self.kill);
        self.thread.join().unwrap();
    }

    pub(crate) fn exit(self) {
        let fake = self.fake.clone();
        self.leave();
        fake.fence();
    }

    /// Ends it in order; the caller knows whether its I/O is over.
    pub(crate) fn leave(mut self) {
        assert_eq!(self.ask(Request::Exit, None), Ok(Reply::Done));
        self.thread.join().unwrap();
    }
}
