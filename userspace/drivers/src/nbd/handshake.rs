// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handshake: the negotiation before a server serves.

use super::proto::{self, info, option, option_reply, Handshake, Transmission};
use super::stream::Incoming;
use super::wire::Wire;
use control::{Code, Failure};
use diskio::Errno;
use rustls::ClientConnection;

/// Bytes of an answer to an option at most.
const MOST_REPLY: usize = 64 << 10;
/// Answers to one option at most.
const MOST_REPLIES: u32 = 256;
/// Largest transfer in bytes of a server that reports none.
const TRANSFER: u32 = 32 << 20;
/// Zeroes behind the answer to EXPORT_NAME.
const ZEROES: usize = 124;
/// Characters of a server's own message that are shown.
const SHOWN: usize = 200;

/// An export, as its server describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExportFacts {
    /// Bytes.
    pub(super) size: u64,
    pub(super) flags: Transmission,
    /// Bytes of the smallest transfer.
    pub(super) smallest: u32,
    /// Bytes that are best transferred at once.
    pub(super) best: u32,
    /// Bytes of the largest transfer.
    pub(super) largest: u32,
    /// Number of its metadata context for holes, if it has one.
    pub(super) context: Option<u32>,
    /// Answers of reads are chunks.
    pub(super) has_chunks: bool,
}

/// Reason why the export cannot be used.
#[derive(Debug)]
pub(super) enum RefusedExport {
    /// The connection.
    Io(Errno),
    /// The server does not give it.
    Failure(Failure),
}

impl From<Errno> for RefusedExport {
    fn from(error: Errno) -> Self {
        Self::Io(error)
    }
}

/// An answer to an option.
struct OptionAnswer {
    kind: u32,
    data: Vec<u8>,
}

/// State of a handshake.
pub(super) struct HandshakeTalk<'a> {
    pub(super) wire: &'a Wire,
    pub(super) incoming: &'a mut Incoming,
    /// Name of the export in messages.
    pub(super) name: &'a str,
}

impl HandshakeTalk<'_> {
    /// Negotiates an export; all later messages are answers to requests. With `tls` the connection is encrypted before
    /// the server learns anything about the export.
    pub(super) async fn agree(
        &mut self,
        export: &str,
        tls: Option<ClientConnection>,
    ) -> Result<ExportFacts, RefusedExport> {
        let is_brief = self.greet().await?;
        if let Some(tls) = tls {
            self.encrypt(tls).await?;
        }
        self.ask(option::STRUCTURED_REPLY, &[]).await?;
        let has_chunks = self.reply(option::STRUCTURED_REPLY).await?.kind == option_reply::ACK;
        let context = match has_chunks {
            true => self.context(export).await?,
            false => None,
        };
        let about = match self.go(export).await? {
            Some(about) => about,
            None => self.by_name(export, is_brief).await?,
        };
        Ok(ExportFacts {
            context,
            has_chunks,
            ..about
        })
    }

    /// Reads the greeting, and returns whether the server leaves out unneeded zeroes.
    async fn greet(&mut self) -> Result<bool, RefusedExport> {
        let magic: [u8; 16] = self.incoming.array().await?;
        let old = || {
            RefusedExport::Failure(Failure::unsupported(
                "no NBD server of the newstyle protocol listens there: check the address",
            ))
        };
        if magic != *proto::MAGIC {
            return Err(old());
        }
        let flags = u16::from_be_bytes(self.incoming.array().await?);
        let flags = Handshake::from_bits_truncate(flags.into());
        if !flags.contains(Handshake::FIXED_NEWSTYLE) {
            return Err(old());
        }
        let ours = flags & (Handshake::FIXED_NEWSTYLE | Handshake::NO_ZEROES);
        self.send(&ours.bits().to_be_bytes()).await?;
        Ok(ours.contains(Handshake::NO_ZEROES))
    }

    /// Encrypts the connection, or fails: nothing about the export goes out in plain text.
    async fn encrypt(&mut self, tls: ClientConnection) -> Result<(), RefusedExport> {
        self.ask(option::STARTTLS, &[]).await?;
        let reply = self.reply(option::STARTTLS).await?;
        if reply.kind != option_reply::ACK {
            let what = format!(
                "the server of {} does not encrypt, so nothing was sent to it",
                self.name
            );
            let failure = match reply.kind {
                option_reply::UNSUPPORTED | option_reply::POLICY => Failure::unsupported(format!(
                    "tls-ca= needs TLS, and {what}: give it certificates (qemu-nbd --tls-creds, nbdkit --tls), or omit \
                     tls-ca= if others on the network may read and change the disk{}",
                    shown(&reply.data)
                )),
                _ => Failure::new(Code::Image, format!("{what}{}", shown(&reply.data))),
            };
            return Err(RefusedExport::Failure(failure));
        }
        // The server waits for this client now. An early message comes from a third party in between, and must not be
        // taken for encrypted data.
        if !self.incoming.is_empty() {
            return Err(RefusedExport::Failure(Failure::new(
                Code::Denied,
                format!(
                    "a third party has answered for the server of {} before the encryption began: check the network \
                     between this host and it",
                    self.name
                ),
            )));
        }
        Ok(self.wire.encrypt(tls).await?)
    }

    /// Asks the server for the number of its metadata context for holes, if it has one.
    async fn context(&mut self, export: &str) -> Result<Option<u32>, RefusedExport> {
        let mut data = text(export);
        data.extend(1_u32.to_be_bytes());
        data.extend(counted(proto::ALLOCATION));
        self.ask(option::SET_META_CONTEXT, &data).await?;
        let mut found = None;
        for _ in 0..MOST_REPLIES {
            let reply = self.reply(option::SET_META_CONTEXT).await?;
            match (reply.kind, reply.data.split_first_chunk::<4>()) {
                (option_reply::META_CONTEXT, Some((number, name))) if name == proto::ALLOCATION => {
                    found = Some(u32::from_be_bytes(*number));
                }
                (option_reply::META_CONTEXT, _) => {}
                (option_reply::ACK, _) => return Ok(found),
                // The server has no such context, and can be used without it.
                (kind, _) if kind & option_reply::ERROR != 0 => return Ok(None),
                _ => return Err(Errno::PROTO.into()),
            }
        }
        Err(Errno::PROTO.into())
    }

    /// Returns the export; `None` if the server does not know this form of the question.
    async fn go(&mut self, export: &str) -> Result<Option<ExportFacts>, RefusedExport> {
        let mut data = text(export);
        data.extend(1_u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.ask(option::GO, &data).await?;
        let (mut brief, mut sizes) = (None, None);
        for _ in 0..MOST_REPLIES {
            let reply = self.reply(option::GO).await?;
            match reply.kind {
                option_reply::INFO => match known(&reply.data) {
                    Some(Info::Export { size, flags }) => brief = Some((size, flags)),
                    Some(Info::Blocks(blocks)) => sizes = Some(blocks),
                    None => {}
                },
                option_reply::ACK => {
                    let (size, flags) = brief.ok_or(Errno::PROTO)?;
                    let [smallest, best, largest] = sizes.unwrap_or([1, 4096, TRANSFER]);
                    return Ok(Some(ExportFacts {
                        size,
                        flags,
                        smallest,
                        best,
                        largest,
                        context: None,
                        has_chunks: false,
                    }));
                }
                option_reply::UNSUPPORTED => return Ok(None),
                kind => return Err(RefusedExport::Failure(refused(export, kind, &reply.data))),
            }
        }
        Err(Errno::PROTO.into())
    }

    /// Asks for the export in the way of servers that do not know GO, such as that of XAPI. A server that has no export
    /// of that name ends the connection.
    async fn by_name(
        &mut self,
        export: &str,
        is_brief: bool,
    ) -> Result<ExportFacts, RefusedExport> {
        self.ask(option::EXPORT_NAME, export.as_bytes()).await?;
        let size = u64::from_be_bytes(self.incoming.array().await?);
        let flags = u16::from_be_bytes(self.incoming.array().await?);
        if !is_brief {
            self.incoming.array::<ZEROES>().await?;
        }
        Ok(ExportFacts {
            size,
            flags: Transmission::from_bits_truncate(flags),
            smallest: 1,
            best: 4096,
            largest: TRANSFER,
            context: None,
            has_chunks: false,
        })
    }

    async fn ask(&mut self, option: u32, data: &[u8]) -> Result<(), RefusedExport> {
        let mut bytes = proto::OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(counted(data));
        self.send(&bytes).await
    }

    async fn reply(&mut self, option: u32) -> Result<OptionAnswer, RefusedExport> {
        let magic = u64::from_be_bytes(self.incoming.array().await?);
        let of = u32::from_be_bytes(self.incoming.array().await?);
        let kind = u32::from_be_bytes(self.incoming.array().await?);
        let len = u32::from_be_bytes(self.incoming.array().await?);
        if (magic, of) != (proto::OPTION_REPLY_MAGIC, option) {
            return Err(Errno::PROTO.into());
        }
        let data = self.incoming.vec(len, MOST_REPLY).await?;
        Ok(OptionAnswer { kind, data })
    }

    async fn send(&self, bytes: &[u8]) -> Result<(), RefusedExport> {
        Ok(self.wire.send_all(bytes).await?)
    }
}

/// Something about an export.
enum Info {
    Export { size: u64, flags: Transmission },
    Blocks([u32; 3]),
}

/// Parses an information about the export.
fn known(data: &[u8]) -> Option<Info> {
    let (kind, rest) = data.split_first_chunk::<2>()?;
    match u16::from_be_bytes(*kind) {
        info::EXPORT => {
            let (size, rest) = rest.split_first_chunk::<8>()?;
            let (flags, _) = rest.split_first_chunk::<2>()?;
            Some(Info::Export {
                size: u64::from_be_bytes(*size),
                flags: Transmission::from_bits_truncate(u16::from_be_bytes(*flags)),
            })
        }
        info::BLOCK_SIZE => {
            let (smallest, rest) = rest.split_first_chunk::<4>()?;
            let (best, rest) = rest.split_first_chunk::<4>()?;
            let (largest, _) = rest.split_first_chunk::<4>()?;
            Some(Info::Blocks(
                [smallest, best, largest].map(|bytes| u32::from_be_bytes(*bytes)),
            ))
        }
        _ => None,
    }
}

/// Returns the failure for a server that does not serve an export.
fn refused(export: &str, kind: u32, said: &[u8]) -> Failure {
    let (code, why) = match kind {
        option_reply::UNKNOWN_EXPORT => (
            Code::NotFound,
            "it has none of that name: nbdinfo --list shows those that it has",
        ),
        option_reply::TLS_REQUIRED => (
            Code::Unsupported,
            "it serves with TLS only: say who has signed its certificate, with tls-ca=FILE, before nbd:",
        ),
        option_reply::POLICY => (Code::Denied, "it does not allow it"),
        _ => (Code::Image, "it refuses"),
    };
    let said = shown(said);
    Failure::new(
        code,
        format!("the server does not serve the export {export:?}: {why}{said}"),
    )
}

/// Returns the printable part of a server's own message.
fn shown(said: &[u8]) -> String {
    let said: String = String::from_utf8_lossy(said)
        .chars()
        .filter(|c| !c.is_control())
        .take(SHOWN)
        .collect();
    match said.is_empty() {
        true => said,
        false => format!(" ({said})"),
    }
}

/// A name in the data of an option.
fn text(name: &str) -> Vec<u8> {
    counted(name.as_bytes())
}

/// Bytes with their number before them.
fn counted(bytes: &[u8]) -> Vec<u8> {
    // CAST: a name is short, see `control::Export`.
    let mut all = (bytes.len() as u32).to_be_bytes().to_vec();
    all.extend(bytes);
    all
}
