// SPDX-License-Identifier: MIT OR Apache-2.0
//! One connection: requests go out as they come, and each answer goes to the caller that waits for it.

use super::handshake::ExportFacts;
use super::outgoing::{Message, Outgoing};
use super::proto::{self, chunk, command, CommandFlags};
use super::stream::{Incoming, ReadCover};
use super::wire::Wire;
use diskio::{Bytes, Data, Errno};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

/// Bytes of a chunk that holds no data of a read, at most.
const MOST_CHUNK: usize = (1 << 20) + 64;
/// Extents that an answer tells of at most: QEMU's server sends 128 Ki of them.
const MOST_TOLD: usize = 256 << 10;

/// Time for a server to learn that nothing more comes. A program that ends a process waits longer for that.
const GOODBYE: Duration = Duration::from_secs(2);

/// A request, which may have to be sent more than once.
#[derive(Clone, Debug)]
pub(super) struct NbdRequest {
    pub(super) command: u16,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    /// Bytes of the export, those of the data if there are any.
    pub(super) len: u32,
    /// Data of a write, which no other task changes.
    pub(super) payload: Option<Bytes>,
}

impl NbdRequest {
    /// Makes a request without data.
    pub(super) fn plain(command: u16, offset: u64, len: u32) -> Self {
        Self {
            command,
            flags: CommandFlags::empty(),
            offset,
            len,
            payload: None,
        }
    }

    /// Returns true if it changes the export.
    pub(super) fn changes(&self) -> bool {
        matches!(
            self.command,
            command::WRITE | command::TRIM | command::WRITE_ZEROES
        )
    }

    fn head(&self, cookie: u64) -> [u8; proto::REQUEST] {
        let mut head = [0; proto::REQUEST];
        head[..4].copy_from_slice(&proto::REQUEST_MAGIC.to_be_bytes());
        head[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        head[6..8].copy_from_slice(&self.command.to_be_bytes());
        head[8..16].copy_from_slice(&cookie.to_be_bytes());
        head[16..24].copy_from_slice(&self.offset.to_be_bytes());
        head[24..].copy_from_slice(&self.len.to_be_bytes());
        head
    }
}

/// An extent as a server tells of it: bytes, and whether they are zeroes.
pub(super) type ServerExtent = (u32, bool);

/// Reason why there is no good answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AnswerError {
    /// The server says that it failed.
    Failed(Errno),
    /// The connection is gone, and the fate of the request is unknown.
    Lost,
}

/// State of a request that waits for an answer.
#[derive(Debug)]
struct Waiting {
    command: u16,
    offset: u64,
    /// Buffer for the data of a read; `None` once the caller has stopped waiting.
    data: Option<Data>,
    len: u32,
    changes: bool,
    cover: ReadCover,
    told: Vec<ServerExtent>,
    error: Option<Errno>,
    answer: Option<Result<Vec<ServerExtent>, AnswerError>>,
    waker: Option<Waker>,
    /// True if the caller has stopped waiting.
    is_withdrawn: bool,
}

/// End of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectionLoss {
    /// True if the server has closed it or is gone, so that it takes no more requests from it.
    pub(super) by_server: bool,
    /// True if a change was under way, and it is unknown whether and when the server executes it.
    pub(super) unsure: bool,
}

/// A connection that is agreed about.
#[derive(Debug)]
pub(super) struct NbdConnection {
    wire: Rc<Wire>,
    about: ExportFacts,
    outgoing: Outgoing,
    last: Cell<u64>,
    waiting: RefCell<HashMap<u64, Waiting>>,
    loss: Cell<Option<ConnectionLoss>>,
}

impl NbdConnection {
    /// After the handshake; [`send`](Self::send) and [`receive`](Self::receive) must run.
    pub(super) fn new(wire: Rc<Wire>, about: ExportFacts) -> Rc<Self> {
        Rc::new(Self {
            wire,
            about,
            outgoing: Outgoing::default(),
            last: Cell::new(0),
            waiting: RefCell::default(),
            loss: Cell::new(None),
        })
    }

    pub(super) fn about(&self) -> &ExportFacts {
        &self.about
    }

    /// Returns how it ended, if it has.
    pub(super) fn loss(&self) -> Option<ConnectionLoss> {
        self.loss.get()
    }

    /// Executes a request. A read brings where its data goes.
    pub(super) async fn call(
        &self,
        request: &NbdRequest,
        data: Option<Data>,
    ) -> Result<Vec<ServerExtent>, AnswerError> {
        if self.loss.get().is_some() {
            return Err(AnswerError::Lost);
        }
        let cookie = self.last.get().wrapping_add(1);
        self.last.set(cookie);
        let waiting = Waiting {
            command: request.command,
            offset: request.offset,
            data,
            len: request.len,
            changes: request.changes(),
            cover: ReadCover::default(),
            told: Vec::new(),
            error: None,
            answer: None,
            waker: None,
            is_withdrawn: false,
        };
        self.waiting.borrow_mut().insert(cookie, waiting);
        let _asked = PendingReply {
            connection: self,
            cookie,
        };
        self.outgoing.push(Message {
            cookie,
            head: request.head(cookie),
            payload: request.payload.clone(),
        });
        poll_fn(|cx| self.poll(cookie, cx.waker())).await
    }

    /// Sends requests until the connection ends.
    pub(super) async fn send(self: Rc<Self>) {
        if let Err(error) = self.outgoing.send_all(&self.wire).await {
            self.end(error);
        }
    }

    fn poll(&self, cookie: u64, waker: &Waker) -> Poll<Result<Vec<ServerExtent>, AnswerError>> {
        let mut all = self.waiting.borrow_mut();
        let Some(waiting) = all.get_mut(&cookie) else {
            return Poll::Ready(Err(AnswerError::Lost));
        };
        match waiting.answer.take() {
            Some(answer) => {
                all.remove(&cookie);
                Poll::Ready(answer)
            }
            None => {
                waiting.waker = Some(waker.clone());
                Poll::Pending
            }
        }
    }

    /// Takes answers until the connection ends.
    pub(super) async fn receive(self: Rc<Self>, mut incoming: Incoming) {
        loop {
            if let Err(error) = self.receive_one(&mut incoming).await {
                return self.end(error);
            }
        }
    }

    async fn receive_one(&self, incoming: &mut Incoming) -> Result<(), Errno> {
        match u32::from_be_bytes(incoming.array().await?) {
            proto::REPLY_MAGIC => {
                let error = u32::from_be_bytes(incoming.array().await?);
                let cookie = u64::from_be_bytes(incoming.array().await?);
                self.simple(incoming, cookie, error).await
            }
            proto::CHUNK_MAGIC if self.about.has_chunks => {
                let flags = u16::from_be_bytes(incoming.array().await?);
                let kind = u16::from_be_bytes(incoming.array().await?);
                let cookie = u64::from_be_bytes(incoming.array().await?);
                let len = u32::from_be_bytes(incoming.array().await?);
                self.chunk(incoming, cookie, kind, len).await?;
                match flags & chunk::DONE {
                    0 => Ok(()),
                    _ => self.finish(cookie),
                }
            }
            _ => Err(Errno::PROTO),
        }
    }

    async fn simple(&self, incoming: &mut Incoming, cookie: u64, error: u32) -> Result<(), Errno> {
        let (asked, len) = self.with(cookie, |waiting| Ok((waiting.command, waiting.len)))?;
        if error != 0 {
            self.with(cookie, |waiting| {
                waiting.error = Some(proto::error(error));
                Ok(())
            })?;
        } else if asked == command::READ {
            if self.about.has_chunks {
                return Err(Errno::PROTO);
            }
            self.data(incoming, cookie, 0, len as usize).await?;
        }
        self.finish(cookie)
    }

    async fn chunk(
        &self,
        incoming: &mut Incoming,
        cookie: u64,
        kind: u16,
        len: u32,
    ) -> Result<(), Errno> {
        let (asked, from) = self.with(cookie, |waiting| Ok((waiting.command, waiting.offset)))?;
        let place = |offset: [u8; 8]| {
            let at = u64::from_be_bytes(offset).checked_sub(from);
            at.and_then(|at| usize::try_from(at).ok())
                .ok_or(Errno::PROTO)
        };
        match (kind, asked) {
            (chunk::NONE, _) if len == 0 => Ok(()),
            (chunk::DATA, command::READ) if len > 8 => {
                let at = place(incoming.array().await?)?;
                self.data(incoming, cookie, at, len as usize - 8).await
            }
            (chunk::HOLE, command::READ) if len == 12 => {
                let at = place(incoming.array().await?)?;
                let len = u32::from_be_bytes(incoming.array().await?) as usize;
                self.with(cookie, |waiting| {
                    waiting.claim(at, len)?;
                    if let Some(data) = &waiting.data {
                        data.fill(at, len, 0);
                    }
                    Ok(())
                })
            }
            (chunk::BLOCK_STATUS, command::BLOCK_STATUS) => {
                let bytes = incoming.vec(len, MOST_CHUNK).await?;
                let told = told(&bytes, self.about.context).ok_or(Errno::PROTO)?;
                self.with(cookie, |waiting| {
                    waiting.told.extend(told);
                    match waiting.told.len() <= MOST_TOLD {
                        true => Ok(()),
                        false => Err(Errno::PROTO),
                    }
                })
            }
            (kind, _) if kind & chunk::ERROR != 0 => {
                let bytes = incoming.vec(len, MOST_CHUNK).await?;
                let (number, _) = bytes.split_first_chunk::<4>().ok_or(Errno::PROTO)?;
                let error = proto::error(u32::from_be_bytes(*number));
                self.with(cookie, |waiting| {
                    waiting.error.get_or_insert(error);
                    Ok(())
                })
            }
            _ => Err(Errno::PROTO),
        }
    }

    /// Receives data of a read, from byte `at` of the read on.
    async fn data(
        &self,
        incoming: &mut Incoming,
        cookie: u64,
        at: usize,
        len: usize,
    ) -> Result<(), Errno> {
        self.with(cookie, |waiting| waiting.claim(at, len))?;
        let mut done = 0;
        while done < len {
            let (at, rest) = (at + done, len - done);
            done += incoming
                .pass(rest, || self.target(cookie, at, rest))
                .await?;
        }
        Ok(())
    }

    /// Returns the buffer for data of a read; `None` once the caller has stopped waiting, because it may have freed the
    /// memory.
    fn target(&self, cookie: u64, at: usize, len: usize) -> Option<Data> {
        let all = self.waiting.borrow();
        let data = all.get(&cookie).and_then(|waiting| waiting.data.as_ref());
        data.map(|data| data.part(at, len))
    }

    /// All of an answer has come.
    fn finish(&self, cookie: u64) -> Result<(), Errno> {
        self.with(cookie, |waiting| {
            let is_whole =
                waiting.command != command::READ || waiting.cover.is_whole(waiting.len as usize);
            waiting.answer = Some(match waiting.error {
                Some(error) => Err(AnswerError::Failed(error)),
                // Missing data would show the old content of the memory.
                None if !is_whole => return Err(Errno::PROTO),
                None => Ok(std::mem::take(&mut waiting.told)),
            });
            if let Some(waker) = waiting.waker.take() {
                waker.wake();
            }
            Ok(())
        })?;
        self.forget_withdrawn();
        Ok(())
    }

    /// Works on the state of a request that was sent and has no answer yet.
    fn with<T>(
        &self,
        cookie: u64,
        work: impl FnOnce(&mut Waiting) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut all = self.waiting.borrow_mut();
        let waiting = all.get_mut(&cookie).filter(|w| w.answer.is_none());
        work(waiting.ok_or(Errno::PROTO)?)
    }

    /// Nothing more comes of it.
    pub(super) fn end(&self, error: Errno) {
        if self.loss.get().is_some() {
            return;
        }
        self.wire.shutdown();
        self.outgoing.close();
        let mut all = self.waiting.borrow_mut();
        let mut open = all.values().filter(|waiting| waiting.answer.is_none());
        self.loss.set(Some(ConnectionLoss {
            by_server: matches!(error, Errno::CONNRESET | Errno::PIPE),
            unsure: open.any(|waiting| waiting.changes),
        }));
        for waiting in all.values_mut().filter(|waiting| waiting.answer.is_none()) {
            waiting.answer = Some(Err(AnswerError::Lost));
            if let Some(waker) = waiting.waker.take() {
                waker.wake();
            }
        }
        drop(all);
        self.forget_withdrawn();
    }

    /// Drops answers whose callers have stopped waiting.
    fn forget_withdrawn(&self) {
        let mut all = self.waiting.borrow_mut();
        all.retain(|_, waiting| !waiting.is_withdrawn || waiting.answer.is_none());
    }

    /// Tells the server that nothing more comes.
    pub(super) async fn disconnect(&self) {
        if self.loss.get().is_none() {
            // A server that does not hear it sees the end of the connection.
            self.outgoing.push(Message {
                cookie: 0,
                head: NbdRequest::plain(command::DISCONNECT, 0, 0).head(0),
                payload: None,
            });
            // The queue may hold messages whose callers have stopped waiting, and the server may not read.
            let sent = async {
                self.outgoing.is_sent().await;
                Ok(())
            };
            if self.wire.within(GOODBYE, sent).await.is_ok() {
                self.wire.say_end();
            }
        }
        self.end(Errno::CONNRESET);
    }
}

impl Waiting {
    /// Bytes of a read that were not there before.
    fn claim(&mut self, at: usize, len: usize) -> Result<(), Errno> {
        let end = at.checked_add(len).ok_or(Errno::PROTO)?;
        let is_inside = end <= self.len as usize;
        let new = is_inside.then(|| self.cover.add(at, len)).flatten();
        new.ok_or(Errno::PROTO)
    }
}

/// A request whose caller waits for it. Dropping it ends the wait.
struct PendingReply<'a> {
    connection: &'a NbdConnection,
    cookie: u64,
}

impl Drop for PendingReply<'_> {
    fn drop(&mut self) {
        let mut all = self.connection.waiting.borrow_mut();
        if self.connection.outgoing.withdraw(self.cookie) {
            all.remove(&self.cookie);
        } else if let Some(waiting) = all.get_mut(&self.cookie) {
            // Its answer comes all the same.
            waiting.is_withdrawn = true;
            waiting.data = None;
        }
    }
}

/// Returns the extents in a chunk.
fn told(bytes: &[u8], context: Option<u32>) -> Option<Vec<ServerExtent>> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    if Some(u32::from_be_bytes(*number)) != context {
        return None;
    }
    let mut all = Vec::new();
    let mut rest = rest;
    while let Some((len, behind)) = rest.split_first_chunk::<4>() {
        let (state, behind) = behind.split_first_chunk::<4>()?;
        let is_zero = u32::from_be_bytes(*state) & proto::STATE_ZERO != 0;
        all.push((u32::from_be_bytes(*len), is_zero));
        rest = behind;
    }
    rest.is_empty().then_some(all)
}
