// SPDX-License-Identifier: MIT OR Apache-2.0
//! Connections of the supervisor.

use crate::Session;
use control::tapdisk::{Reply, Request};
use control::wire::{encode, Decoder, Envelope, Outcome};
use control::{socket, Failure};
use diskio::{Errno, Io};
use rustix::io::{fcntl_setfd, FdFlags};
use rustix::net::{accept_with, recv, RecvFlags, SocketFlags};
use std::future::{pending, poll_fn, Future};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

/// Takes connections on a listening socket as long as the process lives.
///
/// # Errors
/// If the socket cannot be used.
pub fn listen(session: &Rc<Session>, listener: OwnedFd) -> io::Result<()> {
    accept_all(session, listener, connected)
}

/// Calls `each` with every connection on a listening socket.
pub(crate) fn accept_all(
    session: &Rc<Session>,
    listener: OwnedFd,
    each: impl Fn(&Rc<Session>, OwnedFd) + 'static,
) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&listener, true)?;
    fcntl_setfd(&listener, FdFlags::CLOEXEC)?;
    let listener = Rc::new(listener);
    let session = session.clone();
    session.runtime().clone().tasks.spawn(async move {
        loop {
            match accept(&session.runtime().io, &listener).await {
                Ok(socket) => each(&session, socket),
                Err(error) => {
                    // Without descriptors, for example: the next one may fare better.
                    diskio::say!("tapdisk: cannot take a connection: {error}");
                    if session.runtime().io.sleep(PAUSE).await.is_err() {
                        return;
                    }
                }
            }
        }
    });
    Ok(())
}

/// Time after which a connection is tried to be taken again.
const PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

async fn accept(io: &Io, listener: &Rc<OwnedFd>) -> Result<OwnedFd, Errno> {
    loop {
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Err(Errno::AGAIN) => io.readable(listener).await?,
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            result => return result,
        }
    }
}

/// Answers on a connection until its end, in a task of its own.
pub fn connected(session: &Rc<Session>, socket: OwnedFd) {
    let session = session.clone();
    session.runtime().clone().tasks.spawn(async move {
        until_end(&session, socket).await;
    });
}

/// Answers on a connection, whose descriptor does not block, until its end.
pub async fn until_end(session: &Rc<Session>, socket: OwnedFd) {
    if let Err(failure) = converse(session, &Rc::new(socket)).await {
        diskio::say!("tapdisk: a connection is closed: {failure}");
    }
}

async fn converse(session: &Rc<Session>, socket: &Rc<OwnedFd>) -> Result<(), Failure> {
    let io = &session.runtime().io;
    let mut decoder = Decoder::default();
    loop {
        match decoder.message::<Request>() {
            Ok(Some((question, fds))) => {
                let is_last = question.body == Request::Exit;
                let only_waits = matches!(
                    question.body,
                    Request::Troubles { .. }
                        | Request::Needs { .. }
                        | Request::Wanted
                        | Request::Untraced
                        | Request::Busy { .. }
                );
                let answer = session.handle(question.body, fds);
                let answer = match only_waits {
                    true => match unless_gone(io, socket, answer).await {
                        Some(answer) => answer,
                        None => return Ok(()),
                    },
                    // Such a request is finished even if the supervisor does not wait for the answer any more.
                    false => answer.await,
                };
                let sent = send(io, socket, question.id, answer).await;
                if is_last {
                    session.end();
                }
                sent?;
            }
            Ok(None) => {
                let (bytes, fds) = receive(io, socket).await?;
                if bytes.is_empty() {
                    return Ok(());
                }
                decoder.push(&bytes, fds)?;
            }
            Err(refused) => match refused.id {
                Some(id) => send(io, socket, id, Err(refused.failure)).await?,
                None => return Err(refused.failure),
            },
        }
    }
}

/// Returns the answer to a question that may wait for ever, or `None` if the asker has disconnected.
async fn unless_gone<T>(
    io: &Io,
    socket: &Rc<OwnedFd>,
    answer: impl Future<Output = T>,
) -> Option<T> {
    let (mut answer, mut end) = (pin!(answer), pin!(gone(io, socket)));
    poll_fn(|cx| match answer.as_mut().poll(cx) {
        Poll::Ready(answer) => Poll::Ready(Some(answer)),
        Poll::Pending => end.as_mut().poll(cx).map(|()| None),
    })
    .await
}

/// Waits until the other end is closed.
async fn gone(io: &Io, socket: &Rc<OwnedFd>) {
    loop {
        if io.readable(socket).await.is_err() {
            return;
        }
        match recv(socket, &mut [0], RecvFlags::PEEK) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok((_, 0)) | Err(_) => return,
            // The peer has sent the next question early, so it will still read the answer.
            Ok(_) => return pending().await,
        }
    }
}

async fn receive(io: &Io, socket: &Rc<OwnedFd>) -> Result<(Vec<u8>, Vec<OwnedFd>), Failure> {
    loop {
        match socket::receive(socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let ready = io.readable(socket).await;
                ready.map_err(|error| lost(&error.into()))?;
            }
            result => return result.map_err(|error| lost(&error)),
        }
    }
}

async fn send(
    io: &Io,
    socket: &Rc<OwnedFd>,
    id: u64,
    answer: Result<Reply, Failure>,
) -> Result<(), Failure> {
    let line = encode(&Envelope::new(id, 0, Outcome::from(answer)))?;
    let mut rest = line.as_slice();
    while !rest.is_empty() {
        match socket::send_first(socket, rest, &[]) {
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let ready = io.writable(socket).await;
                ready.map_err(|error| lost(&error.into()))?;
            }
            Err(error) => return Err(lost(&error)),
        }
    }
    Ok(())
}

fn lost(error: &io::Error) -> Failure {
    Failure::system("the control connection is lost", error)
}
