// SPDX-License-Identifier: MIT OR Apache-2.0
//! An NBD server that does what the protocol allows, and dies in the ways that servers do.

use crate::secure::{How, Secure, Stream};
use drivers::nbd::proto::{
    self, chunk, command, info, option, option_reply, CommandFlags, Handshake, Transmission,
};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// Delay of a request that a dead server executes late.
pub(crate) const LATE: Duration = Duration::from_millis(60);

/// Properties of a server.
#[derive(Clone, Debug)]
pub(crate) struct ServerKind {
    pub(crate) size: usize,
    pub(crate) flags: Transmission,
    /// Answers of reads are chunks of at most this number of bytes each; nothing for simple answers.
    pub(crate) chunks: Option<usize>,
    pub(crate) blocks: Option<[u32; 3]>,
    /// Instead of the answer to GO.
    pub(crate) refuses: Option<u32>,
    /// The only option that names an export is EXPORT_NAME; true if the server leaves out the zeroes behind its answer.
    pub(crate) old: Option<bool>,
    /// The server demands encryption.
    pub(crate) tls: Option<Secure>,
}

impl ServerKind {
    pub(crate) fn new(size: usize) -> Self {
        use Transmission as T;
        Self {
            size,
            flags: T::HAS_FLAGS | T::SEND_FLUSH | T::SEND_FUA | T::SEND_TRIM | T::SEND_WRITE_ZEROES,
            chunks: Some(5000),
            blocks: None,
            refuses: None,
            old: None,
            tls: None,
        }
    }
}

/// Way in which a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServerEnd {
    /// The request in hand is not executed.
    Before,
    /// The server executes the request, and the client gets no answer.
    After,
    /// The server executes the request when the connection is long gone.
    Late,
    /// The server does not answer, and executes the request some time after the client has given it up.
    Stalled,
    /// Its machine loses power: what was not flushed is gone.
    Power,
    /// The server says something that makes no sense, see [`NbdServer::wrong`].
    Wrong,
    /// The server writes [`ExportState::wrong`] to the connection below the encryption.
    Raw,
    /// And then it closes the connection.
    Cut,
    /// No end: it takes the begin of the request, and no more while a test [stops its ears](ExportState::ears).
    Deaf,
    /// The server takes the begin of the request, and closes the connection.
    Half,
}

/// State of the server, and the events that the test has ordered.
pub(crate) struct ExportState {
    /// Content of the disk after a loss of power.
    pub(crate) durable: Vec<u8>,
    /// Content of the disk for reads.
    pub(crate) content: Vec<u8>,
    /// Requests until an end.
    pub(crate) ends: Option<(u32, ServerEnd)>,
    /// Bytes that it sends instead of an answer.
    pub(crate) wrong: Vec<u8>,
    /// Bytes that were lost with the power.
    pub(crate) lost: usize,
    /// Times that it ended.
    pub(crate) deaths: u32,
    /// Times that a client has given it up.
    pub(crate) given_up: u32,
    pub(crate) kind: ServerKind,
    /// The server accepts no client.
    pub(crate) is_away: bool,
    /// A test that holds this stops the server's ears.
    pub(crate) ears: Arc<Mutex<()>>,
    /// A test that has this holds back what is [executed late](ServerEnd::Late).
    pub(crate) held_back: Arc<Mutex<()>>,
    /// Requests that were executed late.
    pub(crate) late: u32,
    /// Times that it took the begin of a request and no more.
    pub(crate) deaf: u32,
    /// Data that it received of writes that did not come to their end.
    pub(crate) halves: Vec<Vec<u8>>,
    /// Options that came without encryption, but for the one that asks for it.
    pub(crate) plain: u32,
    /// The next request with this command is not executed, and answered with this error.
    pub(crate) fails: Option<(u16, u32)>,
}

/// A server at a socket.
pub(crate) struct NbdServer {
    state: Arc<Mutex<ExportState>>,
    path: PathBuf,
}

impl NbdServer {
    pub(crate) fn new(folder: &Path, kind: ServerKind) -> Self {
        let path = folder.join("nbd.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let state = Arc::new(Mutex::new(ExportState {
            durable: vec![0; kind.size],
            content: vec![0; kind.size],
            ends: None,
            wrong: Vec::new(),
            lost: 0,
            deaths: 0,
            given_up: 0,
            kind,
            is_away: false,
            ears: Arc::default(),
            held_back: Arc::default(),
            late: 0,
            deaf: 0,
            halves: Vec::new(),
            plain: 0,
            fails: None,
        }));
        let its = state.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (its, client) = (its.clone(), client.unwrap());
                if its.lock().unwrap().is_away {
                    continue;
                }
                // However it ends: the client sees it.
                thread::spawn(move || {
                    drop(
                        Client {
                            stream: Stream::Plain(client),
                            state: its,
                        }
                        .serve(),
                    )
                });
            }
        });
        Self { state, path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the shared state, for a task that cannot borrow the server.
    pub(crate) fn watched(&self) -> Arc<Mutex<ExportState>> {
        self.state.clone()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, ExportState> {
        self.state.lock().unwrap()
    }

    /// Ends the connection so with the request after `requests` others.
    pub(crate) fn ends(&self, requests: u32, end: ServerEnd) {
        self.state().ends = Some((requests, end));
    }
}

struct Client {
    stream: Stream,
    state: Arc<Mutex<ExportState>>,
}

impl Client {
    fn serve(mut self) -> io::Result<()> {
        if !self.shake_hands()? {
            return Ok(());
        }
        while self.request()? {}
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn kind(&self) -> ServerKind {
        self.state.lock().unwrap().kind.clone()
    }

    fn shake_hands(&mut self) -> io::Result<bool> {
        let kind = self.kind();
        self.stream.write_all(proto::MAGIC)?;
        let flags = match kind.old {
            Some(false) => Handshake::FIXED_NEWSTYLE,
            _ => Handshake::all(),
        };
        let bytes = (flags.bits() as u16).to_be_bytes();
        self.stream.write_all(&bytes)?;
        assert_eq!(self.u32()?, flags.bits());
        loop {
            assert_eq!(self.array()?, proto::OPTION_MAGIC.to_be_bytes());
            let asked = self.u32()?;
            let mut data = vec![0; self.u32()? as usize];
            self.stream.read_exact(&mut data)?;
            if matches!(self.stream, Stream::Plain(_)) && asked != option::STARTTLS {
                self.state.lock().unwrap().plain += 1;
                if kind.tls.is_some() {
                    self.reply(asked, option_reply::TLS_REQUIRED, &[])?;
                    continue;
                }
            }
            match asked {
                option::STARTTLS if kind.tls.is_some() => {
                    if !self.encrypt(&kind.tls.clone().unwrap())? {
                        return Ok(false);
                    }
                }
                option::STRUCTURED_REPLY if kind.chunks.is_some() => {
                    self.reply(asked, option_reply::ACK, &[])?;
                }
                option::SET_META_CONTEXT if kind.chunks.is_some() => {
                    let context = [&7_u32.to_be_bytes(), proto::ALLOCATION].concat();
                    self.reply(asked, option_reply::META_CONTEXT, &context)?;
                    self.reply(asked, option_reply::ACK, &[])?;
                }
                option::EXPORT_NAME if kind.old.is_some() => {
                    assert_eq!(data, b"");
                    let mut answer = (kind.size as u64).to_be_bytes().to_vec();
                    answer.extend(kind.flags.bits().to_be_bytes());
                    answer.resize(if kind.old == Some(true) { 10 } else { 134 }, 0);
                    self.stream.write_all(&answer)?;
                    return Ok(true);
                }
                option::GO if kind.old.is_none() => {
                    if let Some(kind) = kind.refuses {
                        self.reply(asked, kind, b"says the\nserver")?;
                        continue;
                    }
                    let mut brief = info::EXPORT.to_be_bytes().to_vec();
                    brief.extend((kind.size as u64).to_be_bytes());
                    brief.extend(kind.flags.bits().to_be_bytes());
                    self.reply(asked, option_reply::INFO, &brief)?;
                    if let Some(blocks) = kind.blocks {
                        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
                        blocks.iter().for_each(|b| sizes.extend(b.to_be_bytes()));
                        self.reply(asked, option_reply::INFO, &sizes)?;
                    }
                    self.reply(asked, option_reply::ACK, &[])?;
                    return Ok(true);
                }
                _ => self.reply(asked, option_reply::UNSUPPORTED, &[])?,
            }
        }
    }

    /// False if the client sees no more of it.
    fn encrypt(&mut self, secure: &Secure) -> io::Result<bool> {
        let (asked, ack) = (option::STARTTLS, option_reply::ACK);
        match secure.how {
            How::Refuses(kind) => {
                self.reply(asked, kind, b"")?;
                return Ok(true);
            }
            How::Early => {
                let early = option_reply::UNSUPPORTED;
                let mut bytes = reply(asked, ack, &[]);
                bytes.extend(reply(option::STRUCTURED_REPLY, early, &[]));
                self.stream.write_all(&bytes)?;
            }
            _ => self.reply(asked, ack, &[])?,
        }
        self.stream.encrypt(secure)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(&reply(option, kind, data))
    }

    /// One request; false if it was the last one.
    fn request(&mut self) -> io::Result<bool> {
        assert_eq!(self.u32()?, proto::REQUEST_MAGIC);
        let flags = CommandFlags::from_bits_retain(u16::from_be_bytes(self.array()?));
        let asked = u16::from_be_bytes(self.array()?);
        let cookie: [u8; 8] = self.array()?;
        let offset = u64::from_be_bytes(self.array()?) as usize;
        let len = self.u32()? as usize;
        if asked == command::DISCONNECT {
            return Ok(false);
        }
        let end = self.next_end();
        match end {
            Some(ServerEnd::Half) => return Ok(false),
            Some(ServerEnd::Deaf) => self.hear_nothing(),
            _ => {}
        }
        let payload = match asked {
            command::WRITE => self.payload(len)?,
            _ => Vec::new(),
        };
        let request = ServerRequest {
            command: asked,
            is_durable: flags.contains(CommandFlags::FUA),
            offset,
            len,
            payload,
        };
        if let Some(end) = end.filter(|end| *end != ServerEnd::Deaf) {
            self.end(end, request, cookie)?;
            return Ok(false);
        }
        let failing = self
            .state
            .lock()
            .unwrap()
            .fails
            .take_if(|(command, _)| *command == asked);
        if let Some((_, error)) = failing {
            self.refuse(error, cookie)?;
            return Ok(true);
        }
        let read = self.state.lock().unwrap().execute(&request);
        self.answer(&request, cookie, &read)?;
        Ok(true)
    }

    /// How it ends with the request in hand.
    fn next_end(&self) -> Option<ServerEnd> {
        let mut state = self.state.lock().unwrap();
        match &mut state.ends {
            Some((0, end)) => {
                let end = *end;
                state.ends = None;
                state.deaths += 1;
                Some(end)
            }
            Some((left, _)) => {
                *left -= 1;
                None
            }
            None => None,
        }
    }

    fn hear_nothing(&self) {
        let ears = {
            let mut state = self.state.lock().unwrap();
            state.deaf += 1;
            state.ears.clone()
        };
        drop(ears.lock().unwrap());
    }

    /// Reads the data of a write.
    fn payload(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut payload = Vec::new();
        let stream = Read::by_ref(&mut self.stream);
        let done = stream.take(len as u64).read_to_end(&mut payload);
        if payload.len() == len {
            return Ok(payload);
        }
        self.state.lock().unwrap().halves.push(payload);
        done.and(Err(io::ErrorKind::UnexpectedEof.into()))
    }

    fn end(&mut self, end: ServerEnd, request: ServerRequest, cookie: [u8; 8]) -> io::Result<()> {
        match end {
            ServerEnd::Before | ServerEnd::Deaf | ServerEnd::Half => {}
            ServerEnd::After => drop(self.state.lock().unwrap().execute(&request)),
            ServerEnd::Late => {
                let state = self.state.clone();
                thread::spawn(move || {
                    thread::sleep(LATE);
                    let held_back = state.lock().unwrap().held_back.clone();
                    drop(held_back.lock().unwrap());
                    let mut state = state.lock().unwrap();
                    state.execute(&request);
                    state.late += 1;
                });
            }
            ServerEnd::Stalled => {
                let _end = self.stream.read(&mut [0; 1]);
                thread::sleep(LATE);
                let mut state = self.state.lock().unwrap();
                state.execute(&request);
                state.given_up += 1;
            }
            ServerEnd::Power => {
                let mut state = self.state.lock().unwrap();
                let pairs = state.content.iter().zip(&state.durable);
                state.lost += pairs.filter(|(a, b)| a != b).count();
                state.content = state.durable.clone();
            }
            ServerEnd::Wrong => {
                let wrong = self.state.lock().unwrap().wrong.clone();
                // The client may be gone when it has seen the first bytes.
                let _ = self.stream.write_all(&patched(&wrong, cookie));
                // The client must end the connection.
                let _ = self.stream.read(&mut [0; 1]);
            }
            ServerEnd::Raw | ServerEnd::Cut => {
                let wrong = self.state.lock().unwrap().wrong.clone();
                let socket = self.stream.raw();
                let _ = socket.write_all(&wrong);
                if end == ServerEnd::Raw {
                    // The client must end the connection.
                    let _ = socket.read_to_end(&mut Vec::new());
                }
            }
        }
        Ok(())
    }

    fn refuse(&mut self, error: u32, cookie: [u8; 8]) -> io::Result<()> {
        let error = error.to_be_bytes();
        let bytes = match self.kind().chunks {
            Some(_) => piece(
                chunk::DONE,
                chunk::FAILED,
                cookie,
                &[&error[..], &[0; 2]].concat(),
            ),
            None => [&proto::REPLY_MAGIC.to_be_bytes()[..], &error, &cookie].concat(),
        };
        self.stream.write_all(&bytes)
    }

    fn answer(&mut self, request: &ServerRequest, cookie: [u8; 8], read: &[u8]) -> io::Result<()> {
        let Some(most) = self.kind().chunks else {
            let mut bytes = proto::REPLY_MAGIC.to_be_bytes().to_vec();
            bytes.extend([0; 4]);
            bytes.extend(cookie);
            bytes.extend(read);
            return self.stream.write_all(&bytes);
        };
        let mut chunks: Vec<(u16, Vec<u8>)> = Vec::new();
        match request.command {
            command::READ => {
                for (at, piece) in read.chunks(most).enumerate() {
                    let offset = ((request.offset + at * most) as u64).to_be_bytes();
                    chunks.push(match piece.iter().all(|byte| *byte == 0) {
                        true => {
                            let len = (piece.len() as u32).to_be_bytes();
                            (chunk::HOLE, [&offset[..], &len].concat())
                        }
                        false => (chunk::DATA, [&offset[..], piece].concat()),
                    });
                }
                // In any order.
                chunks.reverse();
            }
            command::BLOCK_STATUS => {
                let state = self.state.lock().unwrap();
                let range = &state.content[request.offset..][..request.len];
                let mut content = 7_u32.to_be_bytes().to_vec();
                for block in range.chunks(512) {
                    let state = match block.iter().all(|byte| *byte == 0) {
                        true => proto::STATE_ZERO | proto::STATE_HOLE,
                        false => 0,
                    };
                    content.extend((block.len() as u32).to_be_bytes());
                    content.extend(state.to_be_bytes());
                }
                chunks.push((chunk::BLOCK_STATUS, content));
            }
            _ => chunks.push((chunk::NONE, Vec::new())),
        }
        let last = chunks.len() - 1;
        for (index, (kind, content)) in chunks.iter().enumerate() {
            let flags = if index == last { chunk::DONE } else { 0 };
            self.stream
                .write_all(&piece(flags, *kind, cookie, content))?;
        }
        Ok(())
    }
}

/// An answer to an option.
fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = proto::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Puts the cookie of a request into bytes that are sent instead of its answer, in place of 8 bytes of 0xcc.
fn patched(wrong: &[u8], cookie: [u8; 8]) -> Vec<u8> {
    let mut bytes = wrong.to_vec();
    if let Some(at) = bytes.windows(8).position(|part| part == [0xcc; 8]) {
        bytes[at..at + 8].copy_from_slice(&cookie);
    }
    bytes
}

/// A chunk.
pub(crate) fn piece(flags: u16, kind: u16, cookie: [u8; 8], content: &[u8]) -> Vec<u8> {
    let mut bytes = proto::CHUNK_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie);
    bytes.extend((content.len() as u32).to_be_bytes());
    bytes.extend(content);
    bytes
}

struct ServerRequest {
    command: u16,
    is_durable: bool,
    offset: usize,
    len: usize,
    payload: Vec<u8>,
}

impl ExportState {
    fn execute(&mut self, request: &ServerRequest) -> Vec<u8> {
        let range = request.offset..request.offset + request.len;
        match request.command {
            command::READ => return self.content[range].to_vec(),
            command::WRITE => self.content[range.clone()].copy_from_slice(&request.payload),
            command::WRITE_ZEROES | command::TRIM => self.content[range.clone()].fill(0),
            command::FLUSH => self.durable = self.content.clone(),
            _ => {}
        }
        if request.is_durable {
            self.durable[range.clone()].copy_from_slice(&self.content[range]);
        }
        Vec::new()
    }
}
