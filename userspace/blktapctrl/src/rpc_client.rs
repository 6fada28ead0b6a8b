// SPDX-License-Identifier: MIT OR Apache-2.0
//! The conversation with a tapdisk.

use control::socket;
use control::tapdisk::{Reply, Request};
use control::wire::{encode, Decoder, Envelope, Outcome};
use control::{Code, Failure};
use rustix::net::sockopt::set_socket_passcred;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::{UnixSocket, UnixStream};

/// An answer comes when something happens.
pub(crate) const EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// A connection to a tapdisk.
#[derive(Debug)]
pub struct RpcClient {
    stream: UnixStream,
    decoder: Decoder,
    last: u64,
    /// A request was sent in part, or the other end is gone: no further request is possible.
    torn: bool,
    /// The process that answers, as the kernel says.
    sender: Option<u32>,
}

impl RpcClient {
    /// Connects to the socket of a tapdisk.
    ///
    /// # Errors
    /// No process listens there.
    pub async fn connect(path: &Path) -> io::Result<RpcClient> {
        let socket = UnixSocket::new_stream()?;
        set_socket_passcred(&socket, true)?;
        Ok(RpcClient {
            stream: socket.connect(path).await?,
            decoder: Decoder::default(),
            last: 0,
            torn: false,
            sender: None,
        })
    }

    /// The process that has answered, as the kernel says; nothing before the first answer.
    #[must_use]
    pub fn sender(&self) -> Option<u32> {
        self.sender
    }

    /// Whether further requests are possible.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        !self.torn
    }

    /// Asks, and waits for the answer for at most `limit`. The answer to an earlier question that
    /// took too long is passed over.
    ///
    /// # Errors
    /// The failure that tapdisk reports, or [`Code::Timeout`], or [`Code::Gone`] if it has died.
    pub async fn ask(
        &mut self,
        question: &Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Reply, Failure> {
        self.last = self.last.wrapping_add(1);
        let line = encode(&Envelope::new(self.last, fds.len(), question))?;
        let asked = async {
            self.torn = true;
            self.send(&line, fds).await.map_err(gone)?;
            self.torn = false;
            self.answer().await
        };
        match tokio::time::timeout(limit, asked).await {
            Ok(result) => result,
            Err(_) => Err(Failure::new(
                Code::Timeout,
                format!(
                    "tapdisk did not answer within {} s: see whether its storage does, or kill it",
                    limit.as_secs()
                ),
            )),
        }
    }

    async fn send(&self, line: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let (mut rest, mut fds) = (line, fds);
        while !rest.is_empty() {
            let sent = self
                .stream
                .async_io(Interest::WRITABLE, || {
                    socket::send_first(&self.stream, rest, fds)
                })
                .await?;
            // The descriptors went with the first byte.
            (rest, fds) = (rest.get(sent..).unwrap_or_default(), &[]);
        }
        Ok(())
    }

    async fn answer(&mut self) -> Result<Reply, Failure> {
        loop {
            match self.decoder.message::<Outcome<Reply>>() {
                Ok(Some((answer, _))) if answer.id == self.last => return answer.body.into(),
                Ok(Some(_)) => continue,
                Ok(None) => {}
                Err(refused) if refused.id.is_some_and(|id| id != self.last) => continue,
                Err(refused) => return Err(refused.failure),
            }
            // A tapdisk has no descriptor to send: one that comes all the same may be of a file system that
            // hangs when it is closed.
            let (bytes, sender) = self
                .stream
                .async_io(Interest::READABLE, || socket::receive_bytes(&self.stream))
                .await
                .map_err(|error| {
                    self.torn = true;
                    gone(error)
                })?;
            if bytes.is_empty() {
                self.torn = true;
                return Err(gone(io::ErrorKind::UnexpectedEof.into()));
            }
            if *self.sender.get_or_insert(sender) != sender {
                self.torn = true;
                return Err(Failure::invalid(
                    "several processes answer on one connection",
                ));
            }
            self.decoder.push(&bytes, [])?;
        }
    }
}

fn gone(error: io::Error) -> Failure {
    Failure::new(
        Code::Gone,
        format!("tapdisk closed the connection before it answered: {error}"),
    )
}

/// An answer that does not belong to the question.
pub fn unexpected(reply: &Reply) -> Failure {
    Failure::new(
        Code::Invalid,
        format!("tapdisk sent a wrong kind of answer: {reply:?}"),
    )
}
