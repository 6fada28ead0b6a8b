// SPDX-License-Identifier: MIT OR Apache-2.0
//! The numbers of the NBD protocol, for both of its ends.
//!
//! The description is `doc/proto.md` of the nbd project; numbers are big endian.

use bitflags::bitflags;
use diskio::Errno;

bitflags! {
    /// Flags of the handshake; a client's are 32 bits of these.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Handshake: u32 {
        /// Options are answered in a way that a client can skip.
        const FIXED_NEWSTYLE = 1 << 0;
        /// No zeroes follow the answer to `ExportName`.
        const NO_ZEROES = 1 << 1;
    }

    /// Abilities of an export.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Transmission: u16 {
        /// The other flags are valid.
        const HAS_FLAGS = 1 << 0;
        /// The export is read-only.
        const READ_ONLY = 1 << 1;
        /// The export supports flushes, and needs them.
        const SEND_FLUSH = 1 << 2;
        /// The server supports [`CommandFlags::FUA`].
        const SEND_FUA = 1 << 3;
        /// The server can discard.
        const SEND_TRIM = 1 << 5;
        /// The server can write zeroes without data.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// A flush on one connection covers the writes of all.
        const CAN_MULTI_CONN = 1 << 8;
    }

    /// Flags of a command.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// The change must be durable before the answer.
        const FUA = 1 << 0;
        /// One extent is enough as an answer.
        const REQ_ONE = 1 << 3;
    }
}

/// The first bytes of a server that speaks a newstyle; 16 bits of [`Handshake`] follow.
pub const MAGIC: &[u8; 16] = b"NBDMAGICIHAVEOPT";
/// Magic number of an option.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Magic number of an answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic number of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic number of a simple answer.
pub const REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic number of a chunk of an answer.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// Bytes of a request without its data.
pub const REQUEST: usize = 28;
/// Metadata context for holes.
pub const ALLOCATION: &[u8] = b"base:allocation";
/// Prefix of the metadata contexts for ranges that have changed, in QEMU's convention: the name of a dirty bitmap
/// follows.
pub const DIRTY: &[u8] = b"qemu:dirty-bitmap:";

/// Options that a client may send during the handshake.
pub mod option {
    /// Serve the export whose name is all of the data; there is no way to refuse.
    pub const EXPORT_NAME: u32 = 1;
    /// The end.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Encrypt all that follows.
    pub const STARTTLS: u32 = 5;
    /// Describe the export.
    pub const INFO: u32 = 6;
    /// Serve the export.
    pub const GO: u32 = 7;
    /// Answer reads with chunks; metadata contexts need this.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List the metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of answers to an option; those that refuse it have [`ERROR`](option_reply::ERROR) set.
pub mod option_reply {
    /// The server has done it.
    pub const ACK: u32 = 1;
    /// The name of an export.
    pub const SERVER: u32 = 2;
    /// Something about the export, see [`info`](super::info).
    pub const INFO: u32 = 3;
    /// The number of a metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Bit of answers that refuse the option.
    pub const ERROR: u32 = 1 << 31;
    /// The server does not know the option.
    pub const UNSUPPORTED: u32 = ERROR | 1;
    /// The administrator of the server does not allow it.
    pub const POLICY: u32 = ERROR | 2;
    /// The option is invalid.
    pub const INVALID: u32 = ERROR | 3;
    /// Only with TLS.
    pub const TLS_REQUIRED: u32 = ERROR | 5;
    /// There is no such export.
    pub const UNKNOWN_EXPORT: u32 = ERROR | 6;
}

/// Kinds of information about an export.
pub mod info {
    /// Size and flags of the export.
    pub const EXPORT: u16 = 0;
    /// The smallest, the best and the largest transfer.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands of a client.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// The end.
    pub const DISCONNECT: u16 = 2;
    /// Make earlier writes durable.
    pub const FLUSH: u16 = 3;
    /// Forget.
    pub const TRIM: u16 = 4;
    /// Write zeroes without data.
    pub const WRITE_ZEROES: u16 = 6;
    /// Tell of extents.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Kinds of chunks of an answer.
pub mod chunk {
    /// Flag of the last chunk of an answer.
    pub const DONE: u16 = 1;
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Data of a read, from an offset on.
    pub const DATA: u16 = 1;
    /// Zeroes of a read, from an offset on.
    pub const HOLE: u16 = 2;
    /// Extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Set where something failed.
    pub const ERROR: u16 = 1 << 15;
    /// The request failed.
    pub const FAILED: u16 = ERROR | 1;
}

/// An extent of [`ALLOCATION`] has no space of its own.
pub const STATE_HOLE: u32 = 1;
/// An extent of [`ALLOCATION`] reads as zeroes.
pub const STATE_ZERO: u32 = 2;
/// An extent of [`DIRTY`] may have changed.
pub const STATE_DIRTY: u32 = 1;

/// The errors that the protocol has.
const ERRORS: [(Errno, u32); 8] = [
    (Errno::IO, 5),
    (Errno::PERM, 1),
    (Errno::NOMEM, 12),
    (Errno::INVAL, 22),
    (Errno::NOSPC, 28),
    (Errno::OVERFLOW, 75),
    (Errno::OPNOTSUPP, 95),
    (Errno::SHUTDOWN, 108),
];

/// An error as the protocol has it.
pub fn number(error: Errno) -> u32 {
    let error = match error {
        Errno::ROFS => Errno::PERM,
        error => error,
    };
    let known = ERRORS.iter().find(|(known, _)| *known == error);
    known.map_or(5, |(_, number)| *number)
}

/// An error of the protocol.
pub fn error(number: u32) -> Errno {
    let known = ERRORS.iter().find(|(_, known)| *known == number);
    known.map_or(Errno::IO, |(error, _)| *error)
}
