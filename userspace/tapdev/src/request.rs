// SPDX-License-Identifier: MIT OR Apache-2.0
//! A request of the guest, checked.

use diskio::{Data, Errno};
use ring::tap::abi::{self, Completion};

/// Operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read into the data.
    Read,
    /// Write from the data.
    Write,
    /// Make durable what was answered.
    Flush,
    /// Forget a range.
    Discard {
        /// The content must not be recoverable.
        secure: bool,
    },
    /// Make a range read as zeroes.
    WriteZeroes,
}

/// The operations that [`Kind`] has, one bit for each.
pub(crate) const OPERATIONS: u64 = 1 << abi::OP_READ
    | 1 << abi::OP_WRITE
    | 1 << abi::OP_FLUSH
    | 1 << abi::OP_DISCARD
    | 1 << abi::OP_SECURE_DISCARD
    | 1 << abi::OP_WRITE_ZEROES;

/// The names of operations, of which there is one bit for each.
pub(crate) fn names(operations: u64) -> String {
    let name = |op: u8| match op {
        abi::OP_READ => "reads".to_string(),
        abi::OP_WRITE => "writes".to_string(),
        abi::OP_FLUSH => "flushes".to_string(),
        abi::OP_DISCARD => "discards".to_string(),
        abi::OP_SECURE_DISCARD => "secure discards".to_string(),
        abi::OP_WRITE_ZEROES => "writes of zeroes".to_string(),
        op => format!("operation {op}"),
    };
    let set = (0..64).filter(|op| operations >> op & 1 == 1);
    set.map(name).collect::<Vec<_>>().join(", ")
}

/// A request. It must be committed once ([`done`](Self::done)), and its data not be used then.
#[derive(Clone, Debug)]
pub struct Request {
    /// Operation of the request.
    pub kind: Kind,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// Bytes; 0 for a flush.
    pub len: u64,
    /// Where the bytes are, for reads and writes.
    pub data: Option<Data>,
    /// All writes that were answered before must be durable first.
    pub preflush: bool,
    /// The write must be durable when it is committed.
    pub fua: bool,
    /// An earlier process may have executed it already, in whole or in part.
    pub replay: bool,
    /// Its place in the order of arrival on this disk, the same when it is delivered again.
    pub sequence: u64,
    /// How often it was delivered, this time included; 0 if the kernel module does not count.
    pub deliveries: u32,
    /// When it arrived in the kernel: nanoseconds of `CLOCK_MONOTONIC`.
    pub arrived_ns: u64,
    pub(crate) tag: u16,
    pub(crate) generation: u32,
}

impl Request {
    /// Returns the tag, which no other request of the disk has until this one is committed.
    pub fn tag(&self) -> u16 {
        self.tag
    }

    /// Returns the completion with a result.
    pub fn done(&self, result: Result<(), Errno>) -> Completion {
        completion(self.tag, self.generation, result)
    }

    /// Returns the completion for a request that was not executed and is to be delivered again.
    pub fn returned(&self) -> Completion {
        Completion {
            tag: self.tag,
            flags: abi::COMPLETION_RETURNED,
            generation: self.generation,
            ..Completion::default()
        }
    }
}

/// A request that makes no sense, which can only be a mistake of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Description of its fault.
    pub what: &'static str,
    /// Completion to commit: an error.
    pub completion: Completion,
}

fn completion(tag: u16, generation: u32, result: Result<(), Errno>) -> Completion {
    Completion {
        tag,
        flags: 0,
        generation,
        result: result.map_or_else(|error| -error.raw_os_error(), |()| 0),
        reserved: 0,
    }
}

/// Checks what the kernel says of `tag`; `data` finds the pieces of a number of segments.
pub(crate) fn check(
    tag: u16,
    desc: &abi::Desc,
    data: impl FnOnce(u16) -> Option<Data>,
) -> Result<Request, Malformed> {
    let malformed = |what| Malformed {
        what,
        completion: completion(tag, desc.generation, Err(Errno::INVAL)),
    };
    let kind = match desc.op {
        abi::OP_READ => Kind::Read,
        abi::OP_WRITE => Kind::Write,
        abi::OP_FLUSH => Kind::Flush,
        abi::OP_DISCARD => Kind::Discard { secure: false },
        abi::OP_SECURE_DISCARD => Kind::Discard { secure: true },
        abi::OP_WRITE_ZEROES => Kind::WriteZeroes,
        _ => return Err(malformed("it asks for something unknown")),
    };
    if desc.tag != tag {
        return Err(malformed("its descriptor is that of another one"));
    }
    let end = desc.sector.checked_add(desc.sectors);
    if end.is_none_or(|end| end > ring::tap::params::MAX_SECTORS) {
        return Err(malformed("its range is not on any disk"));
    }
    let len = desc.sectors << 9;
    let data = match kind {
        Kind::Read | Kind::Write => {
            let data =
                data(desc.segments).ok_or_else(|| malformed("its data is not in the arena"))?;
            if data.len() as u64 != len {
                return Err(malformed("its data is not as long as its range"));
            }
            Some(data)
        }
        _ => None,
    };
    Ok(Request {
        kind,
        offset: desc.sector << 9,
        len,
        data,
        preflush: desc.flags & abi::DESC_PREFLUSH != 0,
        fua: desc.flags & abi::DESC_FUA != 0,
        replay: desc.flags & abi::DESC_REPLAY != 0,
        sequence: desc.sequence,
        deliveries: desc.deliveries,
        arrived_ns: desc.arrived_ns,
        tag,
        generation: desc.generation,
    })
}
