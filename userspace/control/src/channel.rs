// SPDX-License-Identifier: MIT OR Apache-2.0
//! A connection whose calls block.

use crate::socket;
use crate::wire::{encode, Decoder, Envelope, Outcome, Received, RefusedMessage};
use crate::{Code, Failure};
use serde::de::DeserializeOwned;
use serde::Serialize;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    socket: UnixStream,
    decoder: Decoder,
    last_id: u64,
}

impl Channel {
    /// Speaks over `socket`.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            decoder: Decoder::default(),
            last_id: 0,
        }
    }

    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> Result<Self, Failure> {
        UnixStream::connect(path).map(Self::new).map_err(|error| {
            Failure::system(format!("cannot connect to {}", path.display()), &error)
        })
    }

    /// Limits how long each call may wait for the peer; `None` for ever.
    pub fn set_timeout(&self, limit: Option<Duration>) -> Result<(), Failure> {
        self.socket
            .set_read_timeout(limit)
            .and_then(|()| self.socket.set_write_timeout(limit))
            .map_err(|error| Failure::system("cannot set a time limit of a socket", &error))
    }

    /// Asks and waits for the answer. Events that arrive meanwhile are dropped: a program that
    /// subscribes uses [`receive`](Self::receive).
    pub fn ask<Q: Serialize, A: DeserializeOwned>(
        &mut self,
        question: Q,
        fds: &[BorrowedFd<'_>],
    ) -> Result<A, Failure> {
        self.last_id += 1;
        self.send(&Envelope::new(self.last_id, fds.len(), question), fds)?;
        loop {
            let read = self.read::<serde_json::Value>()?;
            let Some((answer, _)) = read.map_err(|refused| refused.failure)? else {
                return Err(Failure::new(
                    Code::Gone,
                    "the peer closed the connection without an answer",
                ));
            };
            if answer.id != self.last_id {
                continue;
            }
            let outcome: Outcome<A> = serde_json::from_value(answer.body).map_err(|error| {
                Failure::invalid(format!("an answer is not understood: {error}"))
            })?;
            return outcome.into();
        }
    }

    /// The next message and its descriptors; `None` when the peer has closed the connection. A
    /// question that is not understood is answered with the failure, and the next one is waited
    /// for.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<Received<T>>, Failure> {
        loop {
            match self.read()? {
                Ok(message) => return Ok(message),
                Err(refused) => match refused.id {
                    Some(id) => self.answer::<()>(id, Err(refused.failure))?,
                    None => return Err(refused.failure),
                },
            }
        }
    }

    /// The next message, or why it is refused; `None` at the end.
    fn read<T: DeserializeOwned>(
        &mut self,
    ) -> Result<Result<Option<Received<T>>, RefusedMessage>, Failure> {
        loop {
            match self.decoder.message() {
                Ok(Some(message)) => return Ok(Ok(Some(message))),
                Ok(None) => {}
                Err(refused) => return Ok(Err(refused)),
            }
            let (bytes, fds) = socket::receive(&self.socket)
                .map_err(|error| Failure::system("cannot read from a control socket", &error))?;
            if bytes.is_empty() {
                return match self.decoder.is_torn() {
                    true => Err(Failure::new(
                        Code::Gone,
                        "the peer closed the connection within a message",
                    )),
                    false => Ok(Ok(None)),
                };
            }
            self.decoder.push(&bytes, fds)?;
        }
    }

    /// Answers the question `id`.
    pub fn answer<T: Serialize>(
        &mut self,
        id: u64,
        result: Result<T, Failure>,
    ) -> Result<(), Failure> {
        self.send(&Envelope::new(id, 0, Outcome::from(result)), &[])
    }

    /// Sends a message with its descriptors.
    pub fn send<T: Serialize>(
        &mut self,
        message: &Envelope<T>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Failure> {
        let line = encode(message)?;
        let sent = socket::send_first(&self.socket, &line, fds)
            .and_then(|count| (&self.socket).write_all(&line[count..]));
        sent.map_err(|error| Failure::system("cannot write to a control socket", &error))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
