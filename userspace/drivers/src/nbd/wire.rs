// SPDX-License-Identifier: MIT OR Apache-2.0
//! A socket, and what encrypts it if anything does.

use diskio::{receive_data, send_parts, Data, Errno, Io, MessagePart};
use rustix::net::{
    recv, send, sendmsg, shutdown, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown,
};
use rustls::ClientConnection;
use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

/// Bytes that are taken from the socket at once.
const BUFFER: usize = 64 << 10;

/// Bytes that are encrypted at once.
const RECORD: usize = 16 << 10;

/// Both directions of a connection. One task sends at a time, and one receives.
#[derive(Debug)]
pub(super) struct Wire {
    io: Io,
    /// Non-blocking socket.
    socket: Rc<OwnedFd>,
    tls: RefCell<Option<Tls>>,
}

impl Wire {
    /// Without encryption.
    pub(super) fn new(io: &Io, socket: OwnedFd) -> Rc<Self> {
        Rc::new(Self {
            io: io.clone(),
            socket: Rc::new(socket),
            tls: RefCell::default(),
        })
    }

    /// Does the handshake of TLS, and encrypts all later messages.
    pub(super) async fn encrypt(&self, connection: ClientConnection) -> Result<(), Errno> {
        self.tls.replace(Some(Tls::new(connection)));
        loop {
            self.send_left().await?;
            if !self.with_tls(|tls, _| Ok(tls.connection.is_handshaking()))? {
                return Ok(());
            }
            self.when_readable(|wire| wire.with_tls(Tls::take)).await?;
        }
    }

    /// Returns the fault of the encryption, if that has ended the connection.
    pub(super) fn fault(&self) -> Option<rustls::Error> {
        self.tls.borrow().as_ref().and_then(|tls| tls.fault.clone())
    }

    /// Returns true if the handshake of TLS is over.
    pub(super) fn is_encrypted(&self) -> bool {
        let tls = self.tls.borrow();
        tls.as_ref()
            .is_some_and(|tls| !tls.connection.is_handshaking())
    }

    /// The next bytes into `buffer`, one at least.
    pub(super) async fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match self.receive_now(buffer) {
                Err(Errno::AGAIN) => self.io.readable(&self.socket).await?,
                Err(Errno::INTR) => {}
                Ok(0) => return Err(Errno::CONNRESET),
                done => return done,
            }
        }
    }

    fn receive_now(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match &mut *self.tls.borrow_mut() {
            Some(tls) => tls.receive(&self.socket, buffer),
            None => recv(&self.socket, buffer, RecvFlags::empty()).map(|(_, count)| count),
        }
    }

    /// Receives the next bytes directly into the buffer that `to` returns then, at least one byte. Returns `None` if
    /// `to` has no buffer, or if the bytes must be decrypted first.
    pub(super) async fn receive_to(
        &self,
        to: impl Fn() -> Option<Data>,
    ) -> Result<Option<usize>, Errno> {
        let take = |wire: &Self| match to().filter(|_| wire.tls.borrow().is_none()) {
            Some(data) => match receive_data(wire.socket.as_fd(), &data)? {
                0 => Err(Errno::CONNRESET),
                count => Ok(Some(count)),
            },
            None => Ok(None),
        };
        self.when_readable(take).await
    }

    /// Sends bytes.
    pub(super) async fn send_all(&self, bytes: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes.len() {
            let parts = || [MessagePart::Plain(bytes)].into_iter();
            let send = |wire: &Self| wire.send_parts(parts(), done);
            done += self.when_writable(send).await?;
        }
        self.send_left().await
    }

    /// Sends some of `parts` now, without the first `skip` bytes: one byte at least. With encryption
    /// [`send_left`](Self::send_left) has to follow.
    pub(super) fn send_parts<'a>(
        &self,
        parts: impl Iterator<Item = MessagePart<'a>>,
        skip: usize,
    ) -> Result<usize, Errno> {
        match &mut *self.tls.borrow_mut() {
            Some(tls) => tls.put_parts(&self.socket, parts, skip),
            None => send_parts(self.socket.as_fd(), parts, skip),
        }
    }

    /// Sends the encrypted bytes that are queued.
    pub(super) async fn send_left(&self) -> Result<(), Errno> {
        self.when_writable(Self::send_encrypted).await
    }

    fn send_encrypted(&self) -> Result<(), Errno> {
        match &mut *self.tls.borrow_mut() {
            Some(tls) => tls.send(&self.socket),
            None => Ok(()),
        }
    }

    /// The result of `work`, unless that takes longer.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, Errno>>,
    ) -> Result<T, Errno> {
        self.io.within(limit, work).await
    }

    /// Sends the end of the stream if that is possible at once; without it the other end could not tell this from a
    /// connection that an attacker has cut.
    pub(super) fn say_end(&self) {
        if let Some(tls) = &mut *self.tls.borrow_mut() {
            tls.connection.send_close_notify();
            // A server that does not receive it sees the end of the connection.
            let _ = tls.send(&self.socket);
        }
    }

    /// Closes the connection for the server, too.
    pub(super) fn shutdown(&self) {
        // The connection may be gone already.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    fn with_tls<T>(
        &self,
        work: impl FnOnce(&mut Tls, &OwnedFd) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut tls = self.tls.borrow_mut();
        work(tls.as_mut().ok_or(Errno::NOTCONN)?, &self.socket)
    }

    async fn when_readable<T>(&self, work: impl Fn(&Self) -> Result<T, Errno>) -> Result<T, Errno> {
        loop {
            match work(self) {
                Err(Errno::AGAIN) => self.io.readable(&self.socket).await?,
                Err(Errno::INTR) => {}
                done => return done,
            }
        }
    }

    /// The result of a call, as soon as the socket takes something.
    pub(super) async fn when_writable<T>(
        &self,
        work: impl Fn(&Self) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        loop {
            match work(self) {
                Err(Errno::AGAIN) => self.io.writable(&self.socket).await?,
                Err(Errno::INTR) => {}
                done => return done,
            }
        }
    }
}

/// The encryption. All messages go through its queue, so they arrive in the order in which they were encrypted.
struct Tls {
    connection: ClientConnection,
    /// Received bytes that are not decrypted yet.
    buffer: Vec<u8>,
    from: usize,
    to: usize,
    fault: Option<rustls::Error>,
}

impl Tls {
    fn new(connection: ClientConnection) -> Self {
        Self {
            connection,
            buffer: vec![0; BUFFER],
            from: 0,
            to: 0,
            fault: None,
        }
    }

    /// Returns decrypted bytes, after receiving more if necessary; none if the other end has ended the stream.
    fn receive(&mut self, socket: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.take(socket)?,
                Ok(count) => return Ok(count),
                Err(_) => return Err(Errno::CONNRESET),
            }
        }
    }

    /// Receives and decrypts some bytes. The caller must have read all decrypted bytes before.
    fn take(&mut self, socket: &OwnedFd) -> Result<(), Errno> {
        if self.from == self.to {
            match recv(socket, &mut *self.buffer, RecvFlags::empty())? {
                (_, 0) => return Err(Errno::CONNRESET),
                (_, count) => (self.from, self.to) = (0, count),
            }
        }
        let mut new = self.buffer.get(self.from..self.to).unwrap_or_default();
        match self.connection.read_tls(&mut new) {
            Ok(0) => return Err(Errno::CONNRESET),
            Ok(count) => self.from += count,
            Err(_) => return Err(Errno::PROTO),
        }
        let done = self.connection.process_new_packets();
        // Sends TLS's own answer or alert. No task waits for the rest if the socket is full.
        let _ = self.send(socket);
        done.map(drop).map_err(|fault| {
            self.fault.get_or_insert(fault);
            Errno::PROTO
        })
    }

    /// Encrypts some of the bytes behind the first `skip`.
    fn put_parts<'a>(
        &mut self,
        socket: &OwnedFd,
        parts: impl Iterator<Item = MessagePart<'a>>,
        skip: usize,
    ) -> Result<usize, Errno> {
        let mut skip = skip;
        let mut bytes = [0; RECORD];
        for part in parts {
            if skip < part.len() {
                let count = (part.len() - skip).min(RECORD);
                part.read(skip, &mut bytes[..count]);
                return self.put(socket, &bytes[..count]);
            }
            skip -= part.len();
        }
        Ok(0)
    }

    /// Encrypts some bytes, one at least.
    fn put(&mut self, socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
        loop {
            match self.connection.writer().write(bytes) {
                // There is too much that is not sent.
                Ok(0) => self.send(socket)?,
                Ok(count) => return Ok(count),
                Err(_) => return Err(Errno::PROTO),
            }
        }
    }

    /// Sends encrypted bytes.
    fn send(&mut self, socket: &OwnedFd) -> Result<(), Errno> {
        while self.connection.wants_write() {
            self.connection
                .write_tls(&mut Outgoing(socket))
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        }
        Ok(())
    }
}

/// Nothing of the keys.
impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

/// The socket as the encryption writes to it: many records with one system call.
struct Outgoing<'s>(&'s OwnedFd);

impl Write for Outgoing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.0, bytes, SendFlags::NOSIGNAL)?)
    }

    fn write_vectored(&mut self, all: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut nothing = SendAncillaryBuffer::default();
        Ok(sendmsg(self.0, all, &mut nothing, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
