// SPDX-License-Identifier: MIT OR Apache-2.0
//! `nbd`: an export of an NBD server.
//!
//! A lost connection is replaced by another one, without a loss of data: unanswered requests are sent again, and before
//! them those that were answered and not flushed ([`log`]), because the server may have lost their effect. A change
//! whose end is unknown may still be executed late, so the replacement waits for that first.

mod connection;
mod handshake;
mod log;
mod options;
mod outgoing;
pub mod proto;
mod stream;
mod tls;
mod wire;

use crate::{Attributes, Content, DiskInfo, Driver, DriverLimits, Extent, Fence};
use connection::{AnswerError, ConnectionLoss, NbdConnection, NbdRequest, ServerExtent};
use control::{Code, Failure};
use diskio::{of_earlier, Barrier, Bytes, Data, Errno, Gate, Runtime};
use handshake::{ExportFacts, HandshakeTalk, RefusedExport};
use log::RequestLog;
pub use options::{Options, RetryTimes, PAUSES, UNFLUSHED};
use proto::{command, CommandFlags, Transmission};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;
use stream::Incoming;
pub use tls::Credentials;
use wire::Wire;

/// Time limit of a handshake.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of a request at most, whatever the server takes.
const TRANSFER: u32 = 4 << 20;
/// Bytes that are zeroed or discarded at once: servers may take long for it.
const ZEROES: u32 = 256 << 20;
/// Bytes of one query of extents: even if each sector is an extent of its own, the answer is smaller than the limit for
/// answers.
const STATUS: u32 = 32 << 20;
/// Bytes of a logical block at most.
const MAX_BLOCK: u32 = 4096;

/// Makes connections to the server: non-blocking sockets on which no byte was sent or received.
pub trait Connect: 'static {
    /// Makes a connection. It may take any time, and is called again after a failure.
    fn connect(&self) -> impl std::future::Future<Output = Result<OwnedFd, Failure>>;

    /// Returns the trusted authorities and the own certificate for an [encrypted](Options::tls) connection. It is
    /// called for each connection.
    fn credentials(&self) -> impl std::future::Future<Output = Result<Credentials, Failure>> {
        async { Err(Failure::unsupported("there are no certificates here")) }
    }
}

/// An export.
#[derive(Debug)]
pub struct Nbd<C> {
    runtime: Runtime,
    connector: C,
    options: Options,
    connection: RefCell<Option<Rc<NbdConnection>>>,
    /// Serialises replacements of the connection.
    renewing: Gate,
    /// Export as the guest knows it.
    about: OnceCell<ExportFacts>,
    log: RefCell<RequestLog>,
    /// All flushes of the server.
    flushes: Barrier,
    /// Time before the next attempt to replace the connection: it grows with each attempt without an answer.
    pause: Cell<Duration>,
    connected: Cell<u64>,
    replayed: Cell<u64>,
}

impl<C> Drop for Nbd<C> {
    fn drop(&mut self) {
        // The server of a disk that was not closed in order may accept one client only.
        if let Some(connection) = self.connection.get_mut().take() {
            connection.end(Errno::CANCELED);
        }
    }
}

/// A connection whose server does not have the changes of the last one yet. If the replay fails or is cancelled, the
/// server may execute parts of it late: its loss counts from then on.
struct FreshConnection<'a, C> {
    nbd: &'a Nbd<C>,
    connection: Rc<NbdConnection>,
    is_taken: bool,
}

impl<'a, C> FreshConnection<'a, C> {
    fn new(nbd: &'a Nbd<C>, connection: Rc<NbdConnection>) -> Self {
        Self {
            nbd,
            connection,
            is_taken: false,
        }
    }

    fn taken(mut self) -> Rc<NbdConnection> {
        self.is_taken = true;
        self.connection.clone()
    }
}

impl<C> Drop for FreshConnection<'_, C> {
    fn drop(&mut self) {
        if !self.is_taken {
            self.connection.end(Errno::CANCELED);
            let mut current = self.nbd.connection.borrow_mut();
            // Unless the disk was closed during that.
            if current.is_some() {
                current.replace(self.connection.clone());
            }
        }
    }
}

impl<C: Connect> Nbd<C> {
    /// An export that is reached by `connector`.
    pub fn new(runtime: &Runtime, connector: C, options: Options) -> Self {
        // A flush frees all memory of the log.
        runtime.io.keep_buffers(options.unflushed);
        Self {
            runtime: runtime.clone(),
            connector,
            options,
            connection: RefCell::default(),
            renewing: Gate::default(),
            about: OnceCell::new(),
            log: RefCell::default(),
            flushes: Barrier::default(),
            pause: Cell::new(Duration::ZERO),
            connected: Cell::new(0),
            replayed: Cell::new(0),
        }
    }

    /// A connection after its handshake.
    async fn connect(&self) -> Result<Rc<NbdConnection>, Failure> {
        let io = &self.runtime.io;
        // Before there is a server that would have to wait for it.
        let tls = match &self.options.tls {
            Some(host) => {
                let credentials = self.connector.credentials().await?;
                Some(tls::client(&credentials, host, &self.options.name)?)
            }
            None => None,
        };
        let wire = Wire::new(io, self.connector.connect().await?);
        let mut incoming = Incoming::new(&wire);
        let agreed = async {
            let mut talk = HandshakeTalk {
                wire: &wire,
                incoming: &mut incoming,
                name: &self.options.name,
            };
            // A refusal is no error of the connection.
            match talk.agree(&self.options.export, tls).await {
                Ok(about) => Ok(Ok(about)),
                Err(RefusedExport::Failure(failure)) => Ok(Err(failure)),
                Err(RefusedExport::Io(error)) => Err(error),
            }
        };
        let agreed = io.within(PATIENCE, agreed).await;
        let about = agreed.map_err(|error| self.unsaid(&wire, error))??;
        self.check(&about)?;
        let connection = NbdConnection::new(wire, about);
        self.runtime.tasks.spawn(connection.clone().send());
        let receiving = connection.clone().receive(incoming);
        self.runtime.tasks.spawn(receiving);
        self.connected.set(self.connected.get() + 1);
        Ok(connection)
    }

    /// Returns the failure for a connection that ended during the handshake.
    fn unsaid(&self, wire: &Wire, error: Errno) -> Failure {
        let Options { name, tls, .. } = &self.options;
        let host = tls.as_deref().unwrap_or_default();
        if let Some(fault) = wire.fault() {
            return tls::refused(name, host, &fault);
        }
        let what = match (tls, wire.is_encrypted()) {
            (None, _) => format!("the NBD server of {name} sends no size of its export"),
            (Some(_), false) => {
                format!(
                    "the NBD server of {name} has not proved who it is: see its log, it may be too old for TLS 1.3"
                )
            }
            // Its reason may be lost with the connection.
            (Some(_), true) => format!(
                "the NBD server of {name} sends no size of its export: it may want a certificate of its client \
                 (tls-cert= and tls-key=), or another one"
            ),
        };
        Failure::system(what, &std::io::Error::from(error))
    }

    /// Checks that the export suits the disk, and that it still has the properties that the guest knows.
    fn check(&self, about: &ExportFacts) -> Result<(), Failure> {
        let image = |why: String| Err(Failure::new(Code::Image, why));
        let name = &self.options.name;
        if self.options.writable && about.flags.contains(Transmission::READ_ONLY) {
            return image(format!(
                "{name} is read-only on its server: use the mode r, or have the server allow writing"
            ));
        }
        if !about.smallest.is_power_of_two() || about.smallest > MAX_BLOCK {
            return image(format!(
                "{name} transfers at least {} bytes at a time, but blocks of a guest's disk have 512 to {MAX_BLOCK}: configure smaller blocks on the server",
                about.smallest
            ));
        }
        if about.largest < MAX_BLOCK {
            return image(format!(
                "{name} transfers {} bytes at most, which is less than a page",
                about.largest
            ));
        }
        let block = u64::from(block(about));
        if about.size == 0 || about.size % block != 0 {
            return image(format!(
                "{name} has {} bytes, which are no whole blocks of {block}: see to the server's image",
                about.size
            ));
        }
        match self.about.get().filter(|known| !is_same(known, about)) {
            None => Ok(()),
            Some(known) => image(format!(
                "{name} is another one since its server is back ({} bytes, and it had {}, or it can do less): if it is \
                 the right one, kill the tapdisk that waits for it (its pid: `tap-ctl list`), and the next one takes it as it is",
                about.size, known.size
            )),
        }
    }

    /// Returns the connection, or a new one if the last one is lost. The caller waits as long as necessary, as with a
    /// disk whose cable was pulled.
    async fn connection(&self) -> Result<Rc<NbdConnection>, Errno> {
        loop {
            let current = self.connection.borrow().clone();
            let Some(current) = current else {
                return Err(Errno::NOTCONN);
            };
            let Some(loss) = current.loss() else {
                return Ok(current);
            };
            let _alone = self.renewing.alone().await;
            let is_newest = |now: &Rc<NbdConnection>| Rc::ptr_eq(now, &current);
            if !self.connection.borrow().as_ref().is_some_and(is_newest) {
                continue;
            }
            let next = self.renew(loss).await?;
            self.connection.replace(Some(next));
        }
    }

    /// Replaces a lost connection, and replays the last one's changes on it.
    async fn renew(&self, loss: ConnectionLoss) -> Result<Rc<NbdConnection>, Errno> {
        let mut loss = loss;
        let mut told = None;
        loop {
            self.settle(loss).await?;
            self.rest().await?;
            match self.connect().await {
                Ok(connection) => {
                    let fresh = FreshConnection::new(self, connection);
                    let connection = &fresh.connection;
                    match self.replay(connection).await {
                        Ok(()) => {
                            diskio::say!("{} is connected again", self.options.name);
                            return Ok(fresh.taken());
                        }
                        Err(AnswerError::Lost) => loss = connection.loss().unwrap_or(loss),
                        Err(AnswerError::Failed(error)) => {
                            connection.disconnect().await;
                            self.tell(&mut told, format!("does not take what it had: {error}"));
                            loss.unsure = false;
                        }
                    }
                }
                Err(failure) => {
                    self.tell(&mut told, failure.message);
                    loss.unsure = false;
                }
            }
        }
    }

    /// Waits before the next attempt, longer each time until the server has answered a request.
    async fn rest(&self) -> Result<(), Errno> {
        let [first, longest] = self.options.settle.pauses;
        let pause = self.pause.get();
        self.pause.set((pause * 2).clamp(first, longest));
        match pause {
            Duration::ZERO => Ok(()),
            pause => self.runtime.io.sleep(pause).await,
        }
    }

    /// Reports a fault, and repeats it only after it has changed.
    fn tell(&self, told: &mut Option<String>, what: String) {
        if told.as_ref() != Some(&what) {
            diskio::say!(
                "{} is not connected, and its requests wait: {what}",
                self.options.name
            );
            *told = Some(what);
        }
    }

    /// Waits until the server can no longer execute requests of a lost connection.
    async fn settle(&self, loss: ConnectionLoss) -> Result<(), Errno> {
        let settle = self.options.settle;
        match loss {
            ConnectionLoss { unsure: false, .. } => Ok(()),
            ConnectionLoss {
                by_server: true, ..
            } => self.runtime.io.sleep(settle.closed).await,
            ConnectionLoss { .. } => self.runtime.io.sleep(settle.given_up).await,
        }
    }

    /// Repeats the requests of the log on a new connection. The requests run one after the other, because they may
    /// overlap.
    async fn replay(&self, connection: &Rc<NbdConnection>) -> Result<(), AnswerError> {
        let (all, mark) = {
            let log = self.log.borrow();
            (log.all(), log.mark())
        };
        if all.is_empty() {
            return Ok(());
        }
        for request in &all {
            match connection.call(request, None).await {
                // A hint, which may be ignored.
                Err(AnswerError::Failed(_)) if request.command == command::TRIM => {}
                result => drop(result?),
            }
            self.replayed.set(self.replayed.get() + 1);
        }
        let flush = NbdRequest::plain(command::FLUSH, 0, 0);
        connection.call(&flush, None).await?;
        self.log.borrow_mut().forget(mark);
        Ok(())
    }

    /// Executes a request, and repeats it on each new connection.
    async fn perform(
        &self,
        request: &NbdRequest,
        data: Option<Data>,
    ) -> Result<Vec<ServerExtent>, Errno> {
        loop {
            let connection = self.connection().await?;
            match connection.call(request, data.clone()).await {
                Ok(told) => {
                    self.pause.set(Duration::ZERO);
                    return Ok(told);
                }
                Err(AnswerError::Lost) => {}
                // The server is shutting down, so another connection takes the place of this one.
                Err(AnswerError::Failed(Errno::SHUTDOWN)) => connection.end(Errno::SHUTDOWN),
                Err(AnswerError::Failed(error)) => {
                    self.pause.set(Duration::ZERO);
                    return Err(error);
                }
            }
        }
    }

    /// Executes a request that changes something, in parts that the server takes.
    async fn change(&self, mut request: NbdRequest, how: Attributes) -> Result<(), Errno> {
        let is_durable = how.fua && self.can(Transmission::SEND_FUA);
        if is_durable {
            request.flags |= CommandFlags::FUA;
        }
        // A log that cannot be flushed must not grow.
        let unflushed = self.log.borrow().bytes();
        if unflushed > self.options.unflushed {
            let flushed = self.flushes.settle(async || self.flush_log().await).await;
            flushed.map_err(of_earlier)?;
        }
        let lost = self.flushes.lost();
        let done = self.perform(&request, None).await;
        done.map_err(|error| match is_durable {
            // The server may implement FUA as a flush.
            true => of_earlier(error),
            false => error,
        })?;
        // A flush that failed meanwhile may have lost the data, before the server made it durable for this request.
        if is_durable && self.flushes.lost() != lost {
            return Err(Errno::IO);
        }
        if self.can(Transmission::SEND_FLUSH) {
            self.log.borrow_mut().note(&request, is_durable);
        }
        Ok(())
    }

    /// Makes the changes durable that an earlier process has made: the log of this one does not have them, so a server
    /// that dies later may lose them, and no flush would fail. If they may be lost already, the next flush fails.
    async fn make_durable(&self, connection: &NbdConnection) {
        if !self.options.writable || !self.can(Transmission::SEND_FLUSH) {
            return;
        }
        let flush = NbdRequest::plain(command::FLUSH, 0, 0);
        match connection.call(&flush, None).await {
            Ok(_) => {}
            Err(AnswerError::Failed(error)) => self.flushes.lose(error),
            // The server that comes next may not have them any more.
            Err(AnswerError::Lost) => self.flushes.lose(Errno::IO),
        }
    }

    /// Flushes the answered requests on the server, and drops them from the log.
    async fn flush_log(&self) -> Result<(), Errno> {
        let mark = self.log.borrow().mark();
        let flush = NbdRequest::plain(command::FLUSH, 0, 0);
        self.perform(&flush, None).await?;
        self.log.borrow_mut().forget(mark);
        Ok(())
    }

    fn can(&self, what: Transmission) -> bool {
        self.about.get().is_some_and(|it| it.flags.contains(what))
    }
}

/// Bytes of a logical block.
fn block(about: &ExportFacts) -> u32 {
    about.smallest.max(512)
}

/// Returns true if an export still has the properties that the guest knows.
fn is_same(known: &ExportFacts, now: &ExportFacts) -> bool {
    let needed = known.flags - Transmission::CAN_MULTI_CONN - Transmission::READ_ONLY;
    let is_transferred = now.smallest <= block(known) && now.largest >= limit(known);
    // The guest knows whether it has to flush.
    let has_cache = |about: &ExportFacts| about.flags.contains(Transmission::SEND_FLUSH);
    let is_cached = has_cache(known) == has_cache(now);
    known.size == now.size && now.flags.contains(needed) && is_transferred && is_cached
}

/// Bytes of a request at most.
fn limit(about: &ExportFacts) -> u32 {
    about.largest.min(TRANSFER) / MAX_BLOCK * MAX_BLOCK
}

/// A length as the protocol has it; requests are cut before, see [`DriverLimits`].
fn length(len: u64) -> Result<u32, Errno> {
    u32::try_from(len).map_err(|_| Errno::INVAL)
}

impl<C: Connect> Driver for Nbd<C> {
    async fn activate(&self) -> Result<DiskInfo, Failure> {
        let connection = self.connect().await?;
        let about = *connection.about();
        self.about.get_or_init(|| about);
        self.connection.replace(Some(connection.clone()));
        self.make_durable(&connection).await;
        let block = block(&about);
        let best = match about.best.is_power_of_two() {
            true => about.best.clamp(block, MAX_BLOCK),
            false => block,
        };
        let can = |what| about.flags.contains(what);
        Ok(DiskInfo {
            size: about.size,
            logical_block: block,
            physical_block: best,
            discard: can(Transmission::SEND_TRIM).then_some(best),
            write_cache: can(Transmission::SEND_FLUSH),
            fua: can(Transmission::SEND_FUA),
            limits: DriverLimits {
                transfer: limit(&about).into(),
                zeroes: ZEROES.into(),
                align: best,
            },
        })
    }

    fn fence(&self) -> Fence {
        Fence::NETWORK
    }

    async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let len = length(data.len() as u64)?;
        let request = NbdRequest::plain(command::READ, offset, len);
        self.perform(&request, Some(data)).await.map(drop)
    }

    async fn write(&self, offset: u64, data: Bytes, how: Attributes) -> Result<(), Errno> {
        // The data is copied once, because the guest may change its own, and the log needs the data that was sent.
        let payload = self.runtime.io.buffer(data.len())?;
        data.copy_to(&payload, 0);
        let request = NbdRequest {
            payload: Some(payload.into()),
            ..NbdRequest::plain(command::WRITE, offset, length(data.len() as u64)?)
        };
        self.change(request, how).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        if !self.can(Transmission::SEND_FLUSH) {
            return Ok(());
        }
        self.flushes.flush(async || self.flush_log().await).await
    }

    fn owes(&self) -> bool {
        self.flushes.owes()
    }

    async fn discard(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        if !self.can(Transmission::SEND_TRIM) {
            return Err(Errno::OPNOTSUPP);
        }
        let request = NbdRequest::plain(command::TRIM, offset, length(len)?);
        self.change(request, how).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, how: Attributes) -> Result<(), Errno> {
        if self.can(Transmission::SEND_WRITE_ZEROES) {
            let request = NbdRequest::plain(command::WRITE_ZEROES, offset, length(len)?);
            return self.change(request, how).await;
        }
        let end = offset.checked_add(len).ok_or(Errno::INVAL)?;
        let most = self.about.get().map_or(MAX_BLOCK, limit);
        let mut at = offset;
        while at < end {
            let count = (end - at).min(most.into());
            // CAST: at most `most`.
            let zeroes = self.runtime.io.buffer(count as usize)?;
            zeroes.fill(0, zeroes.len(), 0);
            let request = NbdRequest {
                payload: Some(zeroes.into()),
                ..NbdRequest::plain(command::WRITE, at, length(count)?)
            };
            self.change(request, how).await?;
            at += count;
        }
        Ok(())
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let data = || Extent {
            len,
            content: Content::Data,
        };
        if self.connection().await?.about().context.is_none() {
            return Ok(vec![data()]);
        }
        let asked = len.min(STATUS.into());
        let request = NbdRequest::plain(command::BLOCK_STATUS, offset, length(asked)?);
        // Another server may be there by now, which knows nothing of that.
        let told = self.perform(&request, None).await.unwrap_or_default();
        let mut left = len;
        let extents = told.into_iter().map_while(|(bytes, is_zero)| {
            let len = left.min(bytes.into());
            left -= len;
            let content = match is_zero {
                true => Content::Hole,
                false => Content::Data,
            };
            (len > 0).then_some(Extent { len, content })
        });
        let extents: Vec<Extent> = extents.collect();
        Ok(match extents.is_empty() {
            true => vec![data()],
            false => extents,
        })
    }

    async fn inactivate(&self) -> Result<(), Errno> {
        let flushed = match self.options.writable {
            true => self.flush().await,
            false => Ok(()),
        };
        // The connection is closed even if the flush failed, because the server may accept one client only.
        flushed.and(self.close().await)
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        let log = self.log.borrow();
        [
            ("nbd_connections", self.connected.get()),
            ("nbd_executed_again", self.replayed.get()),
            // CAST: it is in memory.
            ("nbd_unflushed_bytes", log.bytes() as u64),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    async fn close(&self) -> Result<(), Errno> {
        let connection = self.connection.borrow_mut().take();
        if let Some(connection) = connection {
            connection.disconnect().await;
        }
        Ok(())
    }
}
