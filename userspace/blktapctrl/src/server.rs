// SPDX-License-Identifier: MIT OR Apache-2.0
//! The socket on which tap-ctl asks.

use crate::lifecycle::Lifecycle;
use crate::log::{tell, LogContext};
use crate::registry::Registry;
use crate::rpc_handlers;
use control::socket;
use control::supervisor::{Reply, Request};
use control::wire::{encode, Decoder, Envelope, Outcome};
use control::{Code, Failure};
use serde::Serialize;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// Connections at once; who comes later waits.
const CONNECTIONS: usize = 256;

/// Answers everybody who connects, for ever.
pub async fn serve(lifecycle: Rc<Lifecycle>, listener: UnixListener) {
    let places = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let lifecycle = lifecycle.clone();
                tokio::task::spawn_local(async move {
                    if let Err(failure) = converse(&lifecycle, stream).await {
                        tell!(
                            debug,
                            LogContext::default().failed(&failure),
                            "a connection ended: {failure}"
                        );
                    }
                    drop(place);
                });
            }
            // Such as too many open files: others close theirs.
            Err(error) => {
                tell!(
                    error,
                    LogContext::default().because(&error),
                    "cannot take a connection: {error}"
                );
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(lifecycle: &Rc<Lifecycle>, stream: UnixStream) -> Result<(), Failure> {
    // The permissions of the socket keep everybody else out; this stands should they be changed.
    let peer = stream.peer_cred().map_err(broken)?.uid();
    if peer != 0 && peer != rustix::process::getuid().as_raw() {
        return Err(Failure::new(
            Code::Denied,
            format!("user {peer} may not ask"),
        ));
    }
    let mut decoder = Decoder::default();
    loop {
        match decoder.message::<Request>() {
            Ok(Some((question, _))) => match question.body {
                Request::Subscribe { after, series } => {
                    send(&stream, question.id, Outcome::Ok(Reply::Done)).await?;
                    return follow(&lifecycle.registry, &stream, (after, series)).await;
                }
                request => {
                    let answer = rpc_handlers::answer(lifecycle, request).await;
                    send(&stream, question.id, Outcome::from(answer)).await?;
                }
            },
            Ok(None) => {
                let (bytes, fds) = stream
                    .async_io(Interest::READABLE, || socket::receive(&stream))
                    .await
                    .map_err(broken)?;
                if bytes.is_empty() {
                    return Ok(());
                }
                decoder.push(&bytes, fds)?;
            }
            Err(refused) => {
                let answer = Outcome::<Reply>::Error(refused.failure.clone());
                // Without a number it is not known any more where a message begins.
                send(&stream, refused.id.unwrap_or(0), answer).await?;
                if refused.id.is_none() {
                    return Err(refused.failure);
                }
            }
        }
    }
}

/// Sends events until the peer is gone.
async fn follow(
    registry: &Registry,
    stream: &UnixStream,
    mut known: (u64, Option<u32>),
) -> Result<(), Failure> {
    let mut news = registry.events.subscribe();
    loop {
        news.borrow_and_update();
        let (after, series) = known;
        for event in registry.events.since(after, series) {
            known = (event.number, None);
            send(stream, 0, event).await?;
        }
        let left = stream.async_io(Interest::READABLE, || socket::receive(stream));
        tokio::select! {
            changed = news.changed() => if changed.is_err() { return Ok(()) },
            // A subscriber has nothing more to say: it is leaving.
            _ = left => return Ok(()),
        }
    }
}

async fn send<T: Serialize>(stream: &UnixStream, id: u64, body: T) -> Result<(), Failure> {
    let line = encode(&Envelope::new(id, 0, body))?;
    let mut rest = line.as_slice();
    while !rest.is_empty() {
        stream.writable().await.map_err(broken)?;
        match stream.try_write(rest) {
            Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(broken(error)),
        }
    }
    Ok(())
}

fn broken(error: io::Error) -> Failure {
    Failure::system("a connection is broken", &error)
}
