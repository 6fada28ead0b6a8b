// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes of the NBD protocol: checked messages of a client, and answers.
//!
//! Its numbers are in `drivers::nbd::proto`.

use diskio::Errno;
use drivers::nbd::proto::{
    self, chunk, command, info, number, option, option_reply, CommandFlags, Handshake,
    Transmission, REQUEST,
};

/// The first bytes of a server that speaks the fixed newstyle, and all flags of [`Handshake`].
pub(super) const GREETING: &[u8; 18] = b"NBDMAGICIHAVEOPT\x00\x03";
/// Bytes of the head of an option.
pub(super) const OPTION_HEAD: usize = 16;
/// Data of an option at most: a name of 4096 bytes and some more.
const MAX_OPTION: u32 = 8192;
/// Bytes that a request may read or write.
pub(super) const MAX_DATA: u32 = 2 << 20;

/// Flags of a client: `FIXED_NEWSTYLE` must be among them, `NO_ZEROES` may. Says whether the zeroes
/// are left out.
pub(super) fn client_flags(bytes: [u8; 4]) -> Option<bool> {
    let flags = Handshake::from_bits(u32::from_be_bytes(bytes))?;
    let fixed = flags.contains(Handshake::FIXED_NEWSTYLE);
    fixed.then_some(flags.contains(Handshake::NO_ZEROES))
}

/// Option of a client during the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Serve the export whose name is all of the data; there is no way to refuse.
    ExportName,
    /// The end.
    Abort,
    /// List the exports.
    List,
    /// Describe the export.
    Info,
    /// Serve the export.
    Go,
    /// Answer reads with chunks, and know of extents.
    StructuredReply,
    /// List the metadata contexts.
    ListMetaContext,
    /// Choose metadata contexts.
    SetMetaContext,
    /// Something else.
    Unknown(u32),
}

impl Choice {
    fn number(self) -> u32 {
        match self {
            Self::ExportName => option::EXPORT_NAME,
            Self::Abort => option::ABORT,
            Self::List => option::LIST,
            Self::Info => option::INFO,
            Self::Go => option::GO,
            Self::StructuredReply => option::STRUCTURED_REPLY,
            Self::ListMetaContext => option::LIST_META_CONTEXT,
            Self::SetMetaContext => option::SET_META_CONTEXT,
            Self::Unknown(number) => number,
        }
    }
}

/// An option and the length of its data; `None` if a client makes no sense.
pub(super) fn option(head: [u8; OPTION_HEAD]) -> Option<(Choice, usize)> {
    let number =
        |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let magic = u64::from(number(0)) << 32 | u64::from(number(4));
    let len = number(12);
    if magic != proto::OPTION_MAGIC || len > MAX_OPTION {
        return None;
    }
    let choice = match number(8) {
        option::EXPORT_NAME => Choice::ExportName,
        option::ABORT => Choice::Abort,
        option::LIST => Choice::List,
        option::INFO => Choice::Info,
        option::GO => Choice::Go,
        option::STRUCTURED_REPLY => Choice::StructuredReply,
        option::LIST_META_CONTEXT => Choice::ListMetaContext,
        option::SET_META_CONTEXT => Choice::SetMetaContext,
        number => Choice::Unknown(number),
    };
    // CAST: bounded above.
    Some((choice, len as usize))
}

/// Returns the name in the data of `Info` or `Go`, whose other content is not needed.
pub(super) fn export_name(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, wanted) = rest.split_first_chunk::<2>()?;
    (wanted.len() == usize::from(u16::from_be_bytes(*count)) * 2).then_some(name)
}

/// Data of `ListMetaContext` or `SetMetaContext`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Contexts<'a> {
    /// The name of the export.
    pub(super) export: &'a [u8],
    /// Names of metadata contexts, or prefixes of them.
    pub(super) queries: Vec<&'a [u8]>,
}

/// Parses the data of an option about contexts; `None` if it is invalid.
pub(super) fn contexts(data: &[u8]) -> Option<Contexts<'_>> {
    let (export, rest) = text(data)?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let mut queries = Vec::new();
    for _ in 0..u32::from_be_bytes(*count) {
        let query;
        (query, rest) = text(rest)?;
        queries.push(query);
    }
    rest.is_empty().then_some(Contexts { export, queries })
}

/// A text and what follows it.
fn text(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_be_bytes(*len) as usize)
}

/// Returns a metadata context with its number.
pub(super) fn context(number: u32, name: &[u8]) -> Vec<u8> {
    [&number.to_be_bytes(), name].concat()
}

/// Kinds of answers to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OptionReply {
    Ack,
    Server,
    Info,
    MetaContext,
    Unsupported,
    Policy,
    Invalid,
    UnknownExport,
}

/// An answer to an option.
pub(super) fn option_reply(choice: Choice, reply: OptionReply, data: &[u8]) -> Vec<u8> {
    let kind: u32 = match reply {
        OptionReply::Ack => option_reply::ACK,
        OptionReply::Server => option_reply::SERVER,
        OptionReply::Info => option_reply::INFO,
        OptionReply::MetaContext => option_reply::META_CONTEXT,
        OptionReply::Unsupported => option_reply::UNSUPPORTED,
        OptionReply::Policy => option_reply::POLICY,
        OptionReply::Invalid => option_reply::INVALID,
        OptionReply::UnknownExport => option_reply::UNKNOWN_EXPORT,
    };
    let mut bytes = proto::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(choice.number().to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    // CAST: what we send is short.
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// An export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) size: u64,
    pub(super) block: u32,
    pub(super) read_only: bool,
}

impl Export {
    fn flags(&self) -> Transmission {
        use Transmission as T;
        let access = match self.read_only {
            true => T::READ_ONLY,
            false => T::SEND_FUA | T::SEND_TRIM | T::SEND_WRITE_ZEROES,
        };
        T::HAS_FLAGS | T::SEND_FLUSH | T::CAN_MULTI_CONN | access
    }

    /// Size and flags, as the answer to `ExportName` begins and as `INFO_EXPORT` says.
    pub(super) fn brief(&self) -> Vec<u8> {
        let mut bytes = self.size.to_be_bytes().to_vec();
        bytes.extend(self.flags().bits().to_be_bytes());
        bytes
    }

    /// `INFO_EXPORT`.
    pub(super) fn info(&self) -> Vec<u8> {
        [&info::EXPORT.to_be_bytes(), self.brief().as_slice()].concat()
    }

    /// `INFO_BLOCK_SIZE`: smallest, best and largest transfer.
    pub(super) fn blocks(&self) -> Vec<u8> {
        let mut bytes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [self.block, self.block.max(4096), MAX_DATA] {
            bytes.extend(size.to_be_bytes());
        }
        bytes
    }
}

/// Command of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NbdCommand {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    BlockStatus,
    Unknown,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClientRequest {
    pub(super) command: NbdCommand,
    /// True if the change must be durable before the answer.
    pub(super) fua: bool,
    /// True if one extent is enough as an answer.
    pub(super) one: bool,
    pub(super) cookie: [u8; 8],
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// A request; `None` if a client makes no sense.
pub(super) fn request(bytes: [u8; REQUEST]) -> Option<ClientRequest> {
    let (magic, rest) = bytes.split_first_chunk::<4>()?;
    let (flags, rest) = rest.split_first_chunk::<2>()?;
    let (kind, rest) = rest.split_first_chunk::<2>()?;
    let (cookie, rest) = rest.split_first_chunk::<8>()?;
    let (offset, rest) = rest.split_first_chunk::<8>()?;
    let (len, _) = rest.split_first_chunk::<4>()?;
    if u32::from_be_bytes(*magic) != proto::REQUEST_MAGIC {
        return None;
    }
    let command = match u16::from_be_bytes(*kind) {
        command::READ => NbdCommand::Read,
        command::WRITE => NbdCommand::Write,
        command::DISCONNECT => NbdCommand::Disconnect,
        command::FLUSH => NbdCommand::Flush,
        command::TRIM => NbdCommand::Trim,
        command::WRITE_ZEROES => NbdCommand::WriteZeroes,
        command::BLOCK_STATUS => NbdCommand::BlockStatus,
        _ => NbdCommand::Unknown,
    };
    let flags = CommandFlags::from_bits_retain(u16::from_be_bytes(*flags));
    let len = u32::from_be_bytes(*len);
    if command == NbdCommand::Write && len > MAX_DATA {
        return None;
    }
    Some(ClientRequest {
        command,
        fua: flags.contains(CommandFlags::FUA),
        one: flags.contains(CommandFlags::REQ_ONE),
        cookie: *cookie,
        offset: u64::from_be_bytes(*offset),
        len,
    })
}

/// The head of a simple answer; data of a read follows it.
pub(super) fn reply(cookie: [u8; 8], result: Result<(), Errno>) -> Vec<u8> {
    let code = result.map_or_else(number, |()| 0);
    let mut bytes = proto::REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(code.to_be_bytes());
    bytes.extend(cookie);
    bytes
}

/// Content of a chunk.
pub(super) enum Chunk<'a> {
    /// Data of a read, which follows, from an offset on.
    Data { offset: u64, len: u32 },
    /// Extents of a metadata context, with its number: lengths and states.
    BlockStatus {
        number: u32,
        parts: &'a [(u64, u32)],
    },
    /// Error, with a reason if there is one.
    Error(Errno, &'a str),
}

/// A chunk of an answer, or all of it.
pub(super) fn chunk(cookie: [u8; 8], content: &Chunk<'_>, is_last: bool) -> Vec<u8> {
    let (kind, follows, content) = match content {
        Chunk::Data { offset, len } => (chunk::DATA, *len, offset.to_be_bytes().to_vec()),
        Chunk::BlockStatus { number, parts } => {
            let mut content = number.to_be_bytes().to_vec();
            for (len, state) in *parts {
                // CAST: no part is longer than the request, whose length has as many bits.
                content.extend((*len as u32).to_be_bytes());
                content.extend(state.to_be_bytes());
            }
            (chunk::BLOCK_STATUS, 0, content)
        }
        Chunk::Error(error, why) => {
            let mut content = number(*error).to_be_bytes().to_vec();
            // CAST: what we say is short.
            content.extend((why.len() as u16).to_be_bytes());
            content.extend(why.as_bytes());
            (chunk::FAILED, 0, content)
        }
    };
    let mut bytes = proto::CHUNK_MAGIC.to_be_bytes().to_vec();
    bytes.extend(if is_last { chunk::DONE } else { 0 }.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie);
    // CAST: what we send is short.
    bytes.extend((content.len() as u32 + follows).to_be_bytes());
    bytes.extend(content);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn head_of_an_option() {
        let mut head = *b"IHAVEOPT\0\0\0\x07\0\0\0\x10";
        assert_eq!(option(head), Some((Choice::Go, 16)));
        head[13] = 1;
        assert_eq!(option(head), None, "64 KiB of data");
        head = *b"IHAVEOPX\0\0\0\x07\0\0\0\x10";
        assert_eq!(option(head), None);
    }

    #[test]
    fn flags_are_those_of_the_protocol() {
        let client = |flags: u32| client_flags(flags.to_be_bytes());
        assert_eq!([client(1), client(3)], [Some(false), Some(true)]);
        assert_eq!([client(0), client(2), client(5)], [None; 3]);
        let greeting = [GREETING[16], GREETING[17]];
        assert_eq!(
            u32::from(u16::from_be_bytes(greeting)),
            Handshake::all().bits()
        );
        let export = |read_only| Export {
            size: 512,
            block: 512,
            read_only,
        };
        assert_eq!(export(false).brief()[8..], [1, 0x6d]);
        assert_eq!(export(true).brief()[8..], [1, 0x07]);
    }

    #[test]
    fn name_in_an_option() {
        assert_eq!(export_name(b"\0\0\0\x02ab\0\x01\0\x03"), Some(&b"ab"[..]));
        assert_eq!(export_name(b"\0\0\0\0\0\0"), Some(&b""[..]));
        for wrong in [
            &b""[..],
            b"\0\0\0\x09ab\0\0",
            b"\0\0\0\x02ab\0\x02\0\x03",
            b"\xff\xff\xff\xff",
        ] {
            assert_eq!(export_name(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_is_asked_of_extents() {
        let ask = |queries: &[&[u8]]| {
            let mut data = b"\0\0\0\x01d".to_vec();
            data.extend((queries.len() as u32).to_be_bytes());
            for query in queries {
                data.extend((query.len() as u32).to_be_bytes());
                data.extend(*query);
            }
            data
        };
        let of = |queries: &[&'static [u8]]| {
            let (export, queries) = (&b"d"[..], queries.to_vec());
            Some(Contexts { export, queries })
        };
        let queries: [&[u8]; 3] = [b"qemu:x", b"", b"base:allocation"];
        let asked = ask(&queries);
        assert_eq!(contexts(&asked), of(&queries));
        assert_eq!(contexts(&ask(&[])), of(&[]));
        for end in 0..asked.len() {
            assert_eq!(contexts(&asked[..end]), None);
        }
        assert_eq!(contexts(&[&asked[..], b"x"].concat()), None);
        let many = b"\0\0\0\x01d\xff\xff\xff\xff";
        assert_eq!(contexts(many), None);
    }

    #[test]
    fn write_that_is_too_long_is_refused() {
        let mut bytes = [0; REQUEST];
        bytes[..4].copy_from_slice(&proto::REQUEST_MAGIC.to_be_bytes());
        bytes[7] = 1;
        bytes[24..].copy_from_slice(&MAX_DATA.to_be_bytes());
        assert_eq!(
            request(bytes).map(|request| request.command),
            Some(NbdCommand::Write)
        );
        bytes[27] = 1;
        assert_eq!(request(bytes), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(head: [u8; OPTION_HEAD], bytes: [u8; REQUEST], data in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = (option(head), request(bytes), contexts(&data));
            if let Some(name) = export_name(&data) {
                prop_assert!(name.len() + 6 <= data.len());
            }
        }
    }
}
