// SPDX-License-Identifier: MIT OR Apache-2.0
//! The exchange with the kernel: results go out, tags of requests come in.
//!
//! With commands of `io_uring`, one command waits for tags at the kernel, and results go along with the next one or in
//! a command of their own; all of it shares the system call with the I/O of the disk. Without commands, there is an
//! ioctl for each turn, and a watch on the node while it is idle.
//!
//! A command that waits cannot be taken back. So a link lives as long as the node is held, also while
//! nothing is served: the tags that this one command may still bring are returned to the kernel.

use crate::io_errors::wait;
use diskio::{op_result, Errno, Io, Op, OpResult, Pending, ResultMailbox, Runtime};
use std::cell::{Cell, RefCell};
use std::future::{poll_fn, Future};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use tapdev::abi::Completion;
use tapdev::{Command, Tap};

/// Turns of the loop from a result of the driver to the moment at which the kernel gets it.
const TURNS: u32 = 3;

/// Tags fetched by one ioctl at most.
const BATCH: usize = 256;

/// A command that is not over.
#[derive(Debug)]
struct SentCommand {
    command: Command,
    /// The command waits for requests, and does not only commit.
    fetches: bool,
}

#[derive(Debug)]
pub(crate) struct KernelLink {
    runtime: Runtime,
    tap: Rc<Tap>,
    /// The exchange is by commands; decided when it starts.
    with_commands: Cell<bool>,
    /// True if requests may be fetched.
    fetching: Cell<bool>,
    /// True if new requests are only to be noticed and not fetched.
    watching: Cell<bool>,
    /// True if a request was noticed, or a client wants to use the disk.
    wanted: Cell<bool>,
    /// Tasks that wait for that.
    wishing: RefCell<Vec<Waker>>,
    /// Results to be committed.
    done: RefCell<Vec<Completion>>,
    /// Tags that came, and are not looked at yet.
    fetched: RefCell<Vec<u16>>,
    /// There may be something to fetch by ioctl.
    ready: Cell<bool>,
    /// The watch that waits for requests.
    waiting: RefCell<Option<Pending>>,
    /// Commands that are not over, by the tokens of their results. There are only a few.
    commands: RefCell<Vec<Option<SentCommand>>>,
    ended: ResultMailbox,
    /// Results that are being looked at; kept for its memory.
    results: RefCell<Vec<(u64, i32)>>,
    spare: RefCell<Vec<Command>>,
    error: RefCell<Option<io::Error>>,
}

impl KernelLink {
    pub(crate) fn new(runtime: &Runtime, tap: &Rc<Tap>) -> Rc<Self> {
        Rc::new(Self {
            runtime: runtime.clone(),
            tap: tap.clone(),
            with_commands: Cell::new(false),
            fetching: Cell::new(false),
            watching: Cell::new(false),
            wanted: Cell::new(false),
            wishing: RefCell::default(),
            done: RefCell::default(),
            fetched: RefCell::default(),
            ready: Cell::new(true),
            waiting: RefCell::default(),
            commands: RefCell::default(),
            ended: ResultMailbox::default(),
            results: RefCell::default(),
            spare: RefCell::default(),
            error: RefCell::default(),
        })
    }

    /// A result, to be committed by the next [`pump`](Self::pump).
    pub(crate) fn commit(&self, completion: Completion) {
        self.done.borrow_mut().push(completion);
    }

    /// Begins to fetch requests.
    pub(crate) fn start(&self) {
        let has_ring = self.io().engine() == diskio::Engine::Uring;
        self.with_commands.set(has_ring && self.tap.has_commands());
        self.fetching.set(true);
        self.watching.set(false);
        self.ready.set(true);
        self.io().heed_quick(false);
    }

    /// Notices new requests without fetching them.
    pub(crate) fn watch(&self) {
        self.wanted.set(false);
        self.watching.set(true);
    }

    /// Stops noticing requests. When this returns, only a command may still hold the node.
    pub(crate) async fn unwatch(&self) {
        self.watching.set(false);
        if self.with_commands.get() {
            return;
        }
        if let Some(waiting) = self.waiting.borrow().as_ref() {
            waiting.cancel();
        }
        poll_fn(|cx| match self.waiting.borrow().is_none() {
            true => Poll::Ready(()),
            false => {
                wait(&mut self.wishing.borrow_mut(), cx.waker());
                Poll::Pending
            }
        })
        .await;
    }

    /// DirtyBitmap that a client wants to use the disk.
    pub(crate) fn want(&self) {
        self.wanted.set(true);
        for waker in self.wishing.take() {
            waker.wake();
        }
    }

    /// Returns ready if a request or a client waits for a disk that [is watched](Self::watch).
    pub(crate) fn poll_wanted(&self, waker: &Waker) -> Poll<()> {
        match self.watching.get() && self.wanted.get() {
            true => Poll::Ready(()),
            false => {
                wait(&mut self.wishing.borrow_mut(), waker);
                Poll::Pending
            }
        }
    }

    /// Fetches no more requests. The session still serves those that it has fetched.
    pub(crate) fn stop(&self) {
        self.fetching.set(false);
        // Nothing else may happen any more than that the last results are taken.
        self.io().heed_quick(true);
        if let Some(waiting) = self
            .waiting
            .borrow()
            .as_ref()
            .filter(|_| !self.with_commands.get())
        {
            waiting.cancel();
        }
    }

    /// A command waits at the kernel, which holds the node by that.
    pub(crate) fn is_parked(&self) -> bool {
        self.with_commands.get() && self.has_sent(true)
    }

    /// Returns true if commands are under way, which may bring more requests although the session fetches none.
    pub(crate) fn has_commands(&self) -> bool {
        self.with_commands.get()
    }

    pub(crate) fn is_fetching(&self) -> bool {
        self.fetching.get()
    }

    /// Everything is committed, and nothing came that was not looked at.
    pub(crate) fn is_calm(&self) -> bool {
        self.done.borrow().is_empty() && self.fetched.borrow().is_empty() && !self.has_sent(false)
    }

    /// Everything is committed, and nothing comes.
    pub(crate) fn is_quiet(&self) -> bool {
        !self.fetching.get()
            && self.done.borrow().is_empty()
            && self.fetched.borrow().is_empty()
            && (self.with_commands.get() || self.waiting.borrow().is_none())
            && !self.has_sent(false)
    }

    /// Hands requests back that commands have brought, by plain calls, after the ring of the commands was closed.
    pub(crate) async fn commands_ended(&self) {
        self.with_commands.set(false);
        let mut turns = 0;
        poll_fn(|cx| {
            // Each turn takes results, and hands back the requests that have arrived.
            turns += 1;
            if turns > TURNS && self.is_calm() {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// Hands over results and appends the tags that came to `tags`.
    pub(crate) fn pump(self: &Rc<Self>, tags: &mut Vec<u16>) -> io::Result<()> {
        if let Some(error) = self.error.borrow_mut().take() {
            return Err(error);
        }
        // Also those of a ring that was closed.
        self.take_results();
        if self.with_commands.get() {
            self.pump_commands()?;
        } else {
            self.pump_calls(tags)?;
        }
        let watches = self.watching.get() && !self.wanted.get();
        if watches && self.waiting.borrow().is_none() {
            self.look_out();
        }
        tags.append(&mut self.fetched.borrow_mut());
        Ok(())
    }

    fn pump_calls(self: &Rc<Self>, tags: &mut Vec<u16>) -> io::Result<()> {
        let mut done = self.done.take();
        let fetching = self.fetching.get();
        let mut fetched = [0; BATCH];
        while !done.is_empty() || (fetching && self.ready.get()) {
            let room = if fetching { BATCH } else { 0 };
            let batch = done.len().min(tapdev::abi::MAX_TAGS as usize);
            let count = self.tap.exchange(&done[..batch], &mut fetched[..room])?;
            done.drain(..batch);
            tags.extend_from_slice(&fetched[..count]);
            self.ready.set(fetching && count == room);
        }
        if fetching && self.waiting.borrow().is_none() {
            self.look_out();
        }
        Ok(())
    }

    /// Waits for something to fetch.
    fn look_out(self: &Rc<Self>) {
        let watch = self.io().submit(Op::Ready {
            fd: self.tap.fd().clone(),
            write: false,
        });
        *self.waiting.borrow_mut() = Some(watch);
        let link = self.clone();
        self.runtime.tasks.spawn(async move {
            match link.arrival().await {
                Ok(_) => {
                    link.ready.set(true);
                    if link.watching.get() {
                        link.want();
                    }
                }
                Err(error) => link.failed(error),
            }
        });
    }

    fn pump_commands(&self) -> io::Result<()> {
        let mut done = self.done.take();
        loop {
            let fetches = self.fetching.get() && !self.has_sent(true);
            if done.is_empty() && !fetches {
                // For its memory. Nothing was added meanwhile.
                self.done.replace(done);
                return Ok(());
            }
            let spare = self.spare.borrow_mut().pop();
            let command = spare.map_or_else(Command::new, Ok)?;
            let count = done.len().min(Command::COMMITS);
            let op = command.prepare(self.tap.fd(), &done[..count], fetches);
            done.drain(..count);
            let token = self.sent(SentCommand { command, fetches });
            self.io().submit(op).deliver_to(&self.ended, token);
        }
    }

    /// Reports whether a command is under way that waits for requests, or else one that only commits.
    fn has_sent(&self, fetches: bool) -> bool {
        let commands = self.commands.borrow();
        commands
            .iter()
            .flatten()
            .any(|sent| sent.fetches == fetches)
    }

    /// Keeps a command that is handed over until its result comes, and returns the token of that.
    fn sent(&self, sent: SentCommand) -> u64 {
        let mut commands = self.commands.borrow_mut();
        let free = commands.iter().position(Option::is_none);
        let place = free.unwrap_or(commands.len());
        match commands.get_mut(place) {
            Some(free) => *free = Some(sent),
            None => commands.push(Some(sent)),
        }
        place as u64
    }

    /// Takes the results of commands.
    fn take_results(&self) {
        if self.ended.is_empty() {
            return;
        }
        let mut results = self.results.take();
        self.ended.take(&mut results);
        for (token, result) in results.drain(..) {
            // CAST: it was made of a place.
            let sent = self.commands.borrow_mut()[token as usize].take();
            if let Some(sent) = sent {
                self.ended(sent, op_result(result));
            }
        }
        self.results.replace(results);
    }

    /// A command is over.
    fn ended(&self, sent: SentCommand, result: OpResult) {
        let SentCommand { command, fetches } = sent;
        match result {
            Ok(count) if fetches && self.fetching.get() => {
                command.tags(count, &mut self.fetched.borrow_mut());
            }
            Ok(count) if fetches => {
                let mut tags = Vec::new();
                command.tags(count, &mut tags);
                self.came_late(&tags);
            }
            Ok(_) => {}
            Err(error) => self.failed(error),
        }
        self.spare.borrow_mut().push(command);
    }

    /// Tags that a command brought although no requests are fetched any more.
    fn came_late(&self, tags: &[u16]) {
        if self.watching.get() {
            self.want();
        }
        for tag in tags {
            self.commit(match self.tap.request(*tag) {
                Ok(request) => request.returned(),
                Err(malformed) => malformed.completion,
            });
        }
    }

    /// The result of the watch for requests.
    async fn arrival(&self) -> Result<u32, Errno> {
        let result = poll_fn(|cx| match self.waiting.borrow_mut().as_mut() {
            Some(waiting) => Pin::new(waiting).poll(cx),
            None => Poll::Ready(Err(Errno::CANCELED)),
        })
        .await;
        *self.waiting.borrow_mut() = None;
        for waker in self.wishing.take() {
            waker.wake();
        }
        result
    }

    fn failed(&self, error: Errno) {
        // The other errors end the process: the kernel does not take what we say.
        if !matches!(error, Errno::CANCELED | Errno::INTR | Errno::AGAIN) {
            *self.error.borrow_mut() = Some(error.into());
        }
    }

    fn io(&self) -> &Io {
        &self.runtime.io
    }
}

#[cfg(test)]
mod tests {
    use super::KernelLink;
    use diskio::Runtime;
    use ring::tap::shadow::Op;
    use std::rc::Rc;
    use tapdev::fake::FakeTap;
    use tapdev::{Params, Tap};

    /// A command that could not be cancelled brings a request although the disk is paused.
    #[test]
    fn request_that_comes_too_late_goes_back() {
        let fake = FakeTap::new(2).unwrap();
        let tap = Rc::new(Tap::open(fake.open().unwrap()).unwrap());
        tap.describe(&Params {
            sectors: 8,
            logical_block: 512,
            physical_block: 512,
            read_only: false,
            write_cache: false,
            discard: None,
            may_shrink: false,
        })
        .unwrap();
        tap.start(tapdev::Fence::Local).unwrap();
        let tag = fake.send(Op::Read, 0, &[0; 512], false).unwrap();
        let mut tags = [0];
        assert_eq!(tap.exchange(&[], &mut tags).unwrap(), 1);

        let runtime = Runtime::new();
        let link = KernelLink::new(&runtime, &tap);
        link.came_late(&tags);
        assert!(!link.is_quiet(), "the kernel does not know yet");
        let mut none = Vec::new();
        link.pump(&mut none).unwrap();
        assert!(none.is_empty() && link.is_quiet());
        let info = fake.info();
        assert_eq!((info.waiting, info.delivered, info.refused), (1, 0, 0));

        link.start();
        let mut again = Vec::new();
        link.pump(&mut again).unwrap();
        assert_eq!(again, [tag]);
        link.stop();
        runtime.finish().unwrap();
        assert!(link.is_quiet());
    }
}
