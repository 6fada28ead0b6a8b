// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disk over NBD, for programs of dom0: the emulator of an HVM guest before it has drivers of
//! its own, boot loaders, backups.
//!
//! Each connection has one request at a time; a client that needs more opens more connections. While the disk is paused
//! requests wait. Requests that overlap the guest's, or another client's, take effect in the order of their arrival.
//! Only the disk's part of a request counts as work on the disk: a client that does not read its answer delays no other
//! client, and loses its connection after a while.

mod context;
mod wire;

use crate::internal_request::{self, InternalWork};
use crate::Session;
use context::Context;
use diskio::{Errno, Io, SeenErrors};
use rustix::net::{recv, send, RecvFlags, SendFlags};
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};
use wire::{Choice, Chunk, ClientRequest, Export, NbdCommand, OptionReply};

/// Options of one client at most, before it is served.
const MAX_OPTIONS: u32 = 64;
/// Maximum number of connections, each of which may need memory for one request.
const MAX_CLIENTS: usize = 16;
/// Extents in one answer at most.
const MAX_EXTENTS: usize = 1024;
/// Time that a client may pause in the middle of a message.
const PATIENCE: Duration = Duration::from_secs(60);

/// Serves clients that connect to a listening socket as long as the process lives.
///
/// # Errors
/// If the socket cannot be used.
pub fn listen(session: &Rc<Session>, listener: OwnedFd, export: String) -> io::Result<()> {
    let export: Rc<str> = export.into();
    // A copy for each client, and this one.
    let seats = Rc::new(());
    let full = FullNote::default();
    crate::listen::accept_all(session, listener, move |session, socket| {
        if Rc::strong_count(&seats) > MAX_CLIENTS {
            // The protocol has no word for that, so the client sees the end of its connection.
            full.tell();
            return;
        }
        let seat = seats.clone();
        let client = Client {
            session: session.clone(),
            socket: Rc::new(socket),
            export: export.clone(),
            lost: session.lost().newcomer(),
            has_chunks: Cell::new(false),
            contexts: RefCell::default(),
        };
        session.runtime().tasks.spawn(async move {
            // The kernel does not know of a client's requests, so passthrough must be suspended.
            match client.session.direct().forbid().await {
                // A client that disconnects or violates the protocol harms only itself.
                Ok(_ban) => drop(client.serve().await),
                Err(failure) => diskio::say!("tapdisk: an NBD client is not served: {failure}"),
            }
            drop(seat);
        });
    })
}

/// Messages about clients that are turned away, which may come at any rate.
#[derive(Default)]
struct FullNote(Cell<Option<Instant>>);

impl FullNote {
    fn tell(&self) {
        let last = self.0.get();
        if last.is_some_and(|last| last.elapsed() < PATIENCE) {
            return;
        }
        self.0.set(Some(Instant::now()));
        diskio::say!(
            "tapdisk: an NBD client is turned away, because {MAX_CLIENTS} are connected: let one of them end first"
        );
    }
}

/// A connection. An error ends it.
struct Client {
    session: Rc<Session>,
    socket: Rc<OwnedFd>,
    export: Rc<str>,
    /// WritebackErrors writes that it knows of.
    lost: SeenErrors,
    /// Reads are answered with chunks.
    has_chunks: Cell<bool>,
    /// Metadata contexts that it has chosen; the index of each is its number.
    contexts: RefCell<Vec<Context>>,
}

impl Client {
    async fn serve(&self) -> Result<(), Errno> {
        self.write(wire::GREETING).await?;
        let no_zeroes = wire::client_flags(self.array().await?).ok_or(Errno::PROTO)?;
        for _ in 0..MAX_OPTIONS {
            let (choice, len) = wire::option(self.array().await?).ok_or(Errno::PROTO)?;
            let mut data = vec![0; len];
            self.read(&mut data).await?;
            if self.choose(choice, &data, no_zeroes).await? {
                while self.execute().await? {}
                return Ok(());
            }
        }
        Err(Errno::PROTO)
    }

    /// Answers an option; true if the client is served from now on.
    async fn choose(&self, choice: Choice, data: &[u8], no_zeroes: bool) -> Result<bool, Errno> {
        match choice {
            Choice::ExportName => {
                if !self.is_ours(data) {
                    return Err(Errno::NOENT);
                }
                let mut bytes = self.look().await.brief();
                bytes.resize(bytes.len() + if no_zeroes { 0 } else { 124 }, 0);
                self.write(&bytes).await?;
                Ok(true)
            }
            Choice::Abort => {
                self.answer(choice, OptionReply::Ack, &[]).await?;
                Err(Errno::SHUTDOWN)
            }
            Choice::List => {
                // CAST: the name is short.
                let mut name = (self.export.len() as u32).to_be_bytes().to_vec();
                name.extend(self.export.as_bytes());
                self.answer(choice, OptionReply::Server, &name).await?;
                self.answer(choice, OptionReply::Ack, &[]).await
            }
            Choice::Info | Choice::Go => match wire::export_name(data) {
                None => self.answer(choice, OptionReply::Invalid, &[]).await,
                Some(name) if !self.is_ours(name) => {
                    self.answer(choice, OptionReply::UnknownExport, &[]).await
                }
                Some(_) => {
                    let export = self.look().await;
                    self.answer(choice, OptionReply::Info, &export.info())
                        .await?;
                    self.answer(choice, OptionReply::Info, &export.blocks())
                        .await?;
                    self.answer(choice, OptionReply::Ack, &[]).await?;
                    Ok(choice == Choice::Go)
                }
            },
            Choice::StructuredReply if data.is_empty() => {
                self.has_chunks.set(true);
                self.answer(choice, OptionReply::Ack, &[]).await
            }
            Choice::StructuredReply => self.answer(choice, OptionReply::Invalid, &[]).await,
            Choice::ListMetaContext | Choice::SetMetaContext => {
                self.choose_context(choice, data).await
            }
            Choice::Unknown(_) => self.answer(choice, OptionReply::Unsupported, &[]).await,
        }
    }

    /// Without a name the only export is meant.
    fn is_ours(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.as_bytes()
    }

    async fn look(&self) -> Export {
        let server = self.session.running().await;
        Export {
            size: server.size(),
            block: server.block(),
            read_only: server.is_read_only(),
        }
    }

    async fn answer(&self, choice: Choice, reply: OptionReply, data: &[u8]) -> Result<bool, Errno> {
        let bytes = wire::option_reply(choice, reply, data);
        self.write(&bytes).await.map(|()| false)
    }

    /// Executes the next request; false if it was the last one.
    async fn execute(&self) -> Result<bool, Errno> {
        // Between two requests it may take all the time it likes.
        self.io().readable(&self.socket).await?;
        let request = wire::request(self.array().await?).ok_or(Errno::PROTO)?;
        let mut data = Vec::new();
        if request.command == NbdCommand::Write {
            data.resize(request.len as usize, 0);
            self.read(&mut data).await?;
        }
        if request.command == NbdCommand::Disconnect {
            return Ok(false);
        }
        if request.command == NbdCommand::BlockStatus && !self.contexts.borrow().is_empty() {
            self.tell_extents(&request).await?;
            return Ok(true);
        }
        let result = self.perform(&request, &mut data).await;
        self.session.count_nbd();
        let is_read = request.command == NbdCommand::Read;
        let head = match result {
            Ok(()) if is_read && self.has_chunks.get() => {
                let (offset, len) = (request.offset, request.len);
                wire::chunk(request.cookie, &Chunk::Data { offset, len }, true)
            }
            Err(error) if self.has_chunks.get() => {
                wire::chunk(request.cookie, &Chunk::Error(error, ""), true)
            }
            result => wire::reply(request.cookie, result),
        };
        self.write(&head).await?;
        if is_read && result.is_ok() {
            self.write(&data).await?;
        }
        Ok(true)
    }

    /// Executes the disk's part of a request; `data` is the data of a write, or receives that of a read.
    async fn perform(&self, request: &ClientRequest, data: &mut Vec<u8>) -> Result<(), Errno> {
        if request.len == 0 && request.command != NbdCommand::Flush {
            return Err(Errno::INVAL);
        }
        let work = match request.command {
            NbdCommand::Read if request.len > wire::MAX_DATA => return Err(Errno::INVAL),
            NbdCommand::Read => InternalWork::Read(self.io().buffer(request.len as usize)?),
            NbdCommand::Write => {
                let buffer = self.io().buffer(data.len())?;
                buffer.write(0, data);
                InternalWork::Write(buffer.into())
            }
            NbdCommand::Flush => InternalWork::Flush,
            NbdCommand::Trim => InternalWork::Discard,
            NbdCommand::WriteZeroes => InternalWork::WriteZeroes,
            NbdCommand::Disconnect | NbdCommand::BlockStatus | NbdCommand::Unknown => {
                return Err(Errno::INVAL)
            }
        };
        let inside = internal_request::InternalRequest {
            work,
            offset: request.offset,
            len: request.len.into(),
            fua: request.fua,
        };
        match (
            inside.perform(&self.session, &self.lost).await,
            &inside.work,
        ) {
            // A hint, which may be ignored.
            (Err(Errno::OPNOTSUPP), InternalWork::Discard) => {}
            (Ok(()), InternalWork::Read(buffer)) => *data = buffer.to_vec(),
            (result, _) => result?,
        }
        Ok(())
    }

    async fn array<const N: usize>(&self) -> Result<[u8; N], Errno> {
        let mut bytes = [0; N];
        self.read(&mut bytes).await?;
        Ok(bytes)
    }

    async fn read(&self, mut bytes: &mut [u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            match recv(&self.socket, &mut *bytes, RecvFlags::empty()) {
                Ok((_, 0)) => return Err(Errno::CONNRESET),
                Ok((_, count)) => bytes = &mut bytes[count..],
                Err(Errno::AGAIN) => {
                    let ready = self.io().readable(&self.socket);
                    self.io().within(PATIENCE, ready).await?;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn write(&self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::AGAIN) => {
                    let ready = self.io().writable(&self.socket);
                    self.io().within(PATIENCE, ready).await?;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn io(&self) -> &Io {
        &self.session.runtime().io
    }
}
