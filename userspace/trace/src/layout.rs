// SPDX-License-Identifier: MIT OR Apache-2.0
//! Layout of the file.

use control::{Code, Failure};
use std::fmt;
use std::ops::Range;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header of the file.
pub(crate) const HEADER: u64 = 4096;
/// Bytes of a record without its data, and of what data is a multiple of.
pub(crate) const RECORD: usize = 64;
/// Bytes of a sector.
pub const BLOCK: u64 = 512;
/// Bytes of the segments of a file that is made: all data of the largest request has room in one.
const SEGMENT: u32 = 4 << 20;
/// Bytes of a file at least.
pub const MIN_SIZE: u64 = 16 << 20;
/// Bytes of a file at most.
pub const MAX_SIZE: u64 = 64 << 30;

const MAGIC: [u8; 8] = *b"xttrace\n";
const VERSION: u32 = 1;
const SMALLEST: u32 = 4096;
const LARGEST: u32 = 16 << 20;
const MOST: u32 = 1 << 16;
/// Flag: records of writes carry data.
const DATA: u32 = 1;

/// Fields that all records of a file share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceHeader {
    /// Records of writes carry their data.
    pub data: bool,
    /// Bytes of a segment.
    pub segment: u32,
    /// Number of segments.
    pub segments: u32,
    /// Random: each record of this file has it.
    pub mark: u64,
    /// When the trace began, in milliseconds since 1970.
    pub started_ms: u64,
    /// That moment in nanoseconds of `CLOCK_MONOTONIC`.
    pub started_ns: u64,
    /// Sectors of the disk by then.
    pub sectors: u64,
    /// Minor number of the disk.
    pub minor: u32,
}

/// A header as it is stored.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StoredHeader {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    segment: U32,
    segments: U32,
    mark: U64,
    started_ms: U64,
    started_ns: U64,
    sectors: U64,
    minor: U32,
    checksum: U32,
}

/// Bytes of a header that mean something.
pub(crate) const STORED: usize = size_of::<StoredHeader>();

impl TraceHeader {
    /// How a file of so many bytes is divided: the bytes of a segment, and their number.
    ///
    /// # Errors
    /// It is too small or too large.
    pub fn divide(size: u64) -> Result<(u32, u32), Failure> {
        if !(MIN_SIZE..=MAX_SIZE).contains(&size) {
            return Err(Failure::invalid(format!(
                "a trace of {size} bytes: give --size from {}M to {}G",
                MIN_SIZE >> 20,
                MAX_SIZE >> 30
            )));
        }
        // CAST: it is not larger than that.
        Ok((SEGMENT, (size / u64::from(SEGMENT)) as u32))
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        HEADER + u64::from(self.segments) * u64::from(self.segment)
    }

    /// Where a segment begins.
    pub(crate) fn place(&self, segment: u64) -> u64 {
        HEADER + (segment % u64::from(self.segments)) * u64::from(self.segment)
    }

    pub(crate) fn encode(&self) -> [u8; STORED] {
        let mut stored = StoredHeader {
            magic: MAGIC,
            version: VERSION.into(),
            flags: if self.data { DATA } else { 0 }.into(),
            segment: self.segment.into(),
            segments: self.segments.into(),
            mark: self.mark.into(),
            started_ms: self.started_ms.into(),
            started_ns: self.started_ns.into(),
            sectors: self.sectors.into(),
            minor: self.minor.into(),
            checksum: 0.into(),
        };
        stored.checksum = crc32fast::hash(&stored.as_bytes()[..STORED - 4]).into();
        let mut bytes = [0; STORED];
        bytes.copy_from_slice(stored.as_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<TraceHeader, Failure> {
        let no_trace = |why: &str| Failure::new(Code::Image, why);
        let stored = StoredHeader::read_from_bytes(bytes)
            .map_err(|_| no_trace("it has no header of a trace: it is too short"))?;
        if stored.magic != MAGIC {
            return Err(no_trace(
                "it is no file that `tap-ctl trace MINOR --output FILE` has written",
            ));
        }
        let version = stored.version.get();
        if version != VERSION {
            return Err(Failure::new(
                Code::Unsupported,
                format!("it is a trace of version {version}, and this program knows version {VERSION}: use a newer one"),
            ));
        }
        let (segment, segments) = (stored.segment.get(), stored.segments.get());
        let is_whole = stored.checksum.get() == crc32fast::hash(&bytes[..STORED - 4]);
        let makes_sense = (SMALLEST..=LARGEST).contains(&segment)
            && segment as usize % RECORD == 0
            && (2..=MOST).contains(&segments);
        if !is_whole || !makes_sense {
            return Err(no_trace("the header of the trace is damaged"));
        }
        Ok(TraceHeader {
            data: stored.flags.get() & DATA != 0,
            segment,
            segments,
            mark: stored.mark.get(),
            started_ms: stored.started_ms.get(),
            started_ns: stored.started_ns.get(),
            sectors: stored.sectors.get(),
            minor: stored.minor.get(),
        })
    }
}

/// Operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// To read.
    Read,
    /// To write.
    Write,
    /// To make durable what was answered before.
    Flush,
    /// To forget.
    Discard,
    /// To write zeroes, without data.
    Zeroes,
}

impl Operation {
    const ALL: [(Self, u8, &'static str); 5] = [
        (Self::Read, 1, "read"),
        (Self::Write, 2, "write"),
        (Self::Flush, 3, "flush"),
        (Self::Discard, 4, "discard"),
        (Self::Zeroes, 5, "zeroes"),
    ];

    fn code(self) -> u8 {
        let mut all = Self::ALL.iter();
        all.find(|(known, ..)| *known == self)
            .map_or(0, |(_, code, _)| *code)
    }

    fn of(code: u8) -> Option<Self> {
        let mut all = Self::ALL.iter();
        all.find(|(_, known, _)| *known == code)
            .map(|(operation, ..)| *operation)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = Self::ALL.iter();
        let name = all.find(|(known, ..)| known == self);
        f.write_str(name.map_or("", |(_, _, name)| name))
    }
}

/// Flags of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// The write must be durable when it is answered.
    pub fua: bool,
    /// All writes that were answered before must be durable first.
    pub preflush: bool,
    /// An earlier process may have executed it already.
    pub replay: bool,
    /// The request is one of an NBD client, not of the guest.
    pub client: bool,
}

impl Flags {
    /// Each with its name.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let all = [
            (self.fua, "fua"),
            (self.preflush, "preflush"),
            (self.replay, "replay"),
            (self.client, "nbd"),
        ];
        all.into_iter()
            .filter_map(|(is_set, name)| is_set.then_some(name))
    }

    fn bits(self) -> u16 {
        let all = [self.fua, self.preflush, self.replay, self.client];
        let bits = all.iter().enumerate();
        bits.fold(0, |bits, (at, is_set)| bits | u16::from(*is_set) << at)
    }

    fn of(bits: u16) -> Self {
        let is_set = |at: u16| bits & 1 << at != 0;
        Self {
            fua: is_set(0),
            preflush: is_set(1),
            replay: is_set(2),
            client: is_set(3),
        }
    }
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceEntry {
    /// Operation of the request.
    pub operation: Operation,
    /// The first sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u64,
    /// Flags of the request.
    pub flags: Flags,
}

/// Content of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A segment begins.
    Segment,
    /// A process begins to serve the disk.
    Opened {
        /// Sectors of the disk.
        sectors: u64,
    },
    /// The disk is about to do this.
    Request(TraceEntry),
    /// The request is done.
    Done {
        /// 0, or the number of the error.
        errno: u32,
    },
}

/// A record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRecord {
    /// Number of the request; in other records the number of the next request.
    pub number: u64,
    /// Nanoseconds since the trace began.
    pub time_ns: u64,
    /// Content of the record.
    pub what: What,
    /// Where its data is in the bytes of the segment. Empty if it carries none.
    pub data: Range<usize>,
}

/// A record as it is stored.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Stored {
    mark: U64,
    segment: U64,
    number: U64,
    time_ns: U64,
    sector: U64,
    sectors: U64,
    kind: u8,
    operation: u8,
    flags: U16,
    errno: U32,
    data: U32,
    checksum: U32,
}

const _: () = assert!(size_of::<Stored>() == RECORD && STORED == RECORD);

/// Where a record is: part of it says so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordPlace {
    /// Of the file.
    pub(crate) mark: u64,
    pub(crate) segment: u64,
}

fn checksum(head: &[u8], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head[..RECORD - 4]);
    hasher.update(data);
    hasher.finalize()
}

/// Makes the first bytes a record whose data is what follows.
///
/// # Panics
/// If there is no room for one, or data is longer than a segment.
pub(crate) fn encode(place: RecordPlace, number: u64, time_ns: u64, what: &What, bytes: &mut [u8]) {
    let (head, data) = bytes.split_at_mut(RECORD);
    let mut stored = Stored {
        mark: place.mark.into(),
        segment: place.segment.into(),
        number: number.into(),
        time_ns: time_ns.into(),
        sector: 0.into(),
        sectors: 0.into(),
        kind: 0,
        operation: 0,
        flags: 0.into(),
        errno: 0.into(),
        data: u32::try_from(data.len())
            .expect("data has room in a segment")
            .into(),
        checksum: 0.into(),
    };
    match *what {
        What::Segment => stored.kind = 1,
        What::Opened { sectors } => {
            stored.kind = 2;
            stored.sectors = sectors.into();
        }
        What::Request(entry) => {
            stored.kind = 3;
            stored.operation = entry.operation.code();
            stored.flags = entry.flags.bits().into();
            stored.sector = entry.sector.into();
            stored.sectors = entry.sectors.into();
        }
        What::Done { errno } => {
            stored.kind = 4;
            stored.errno = errno.into();
        }
    }
    stored.checksum = checksum(stored.as_bytes(), data).into();
    head.copy_from_slice(stored.as_bytes());
}

/// The record at a place of a segment, and where the next one is; nothing if there is none that is whole and makes
/// sense.
pub(crate) fn decode(place: RecordPlace, bytes: &[u8], at: usize) -> Option<(TraceRecord, usize)> {
    let begin = at.checked_add(RECORD)?;
    let head = bytes.get(at..begin)?;
    let stored = Stored::read_from_bytes(head).ok()?;
    if stored.mark.get() != place.mark || stored.segment.get() != place.segment {
        return None;
    }
    let len = stored.data.get() as usize;
    let end = begin.checked_add(len)?;
    let data = bytes.get(begin..end)?;
    if len % RECORD != 0 || stored.checksum.get() != checksum(head, data) {
        return None;
    }
    let what = match stored.kind {
        1 => What::Segment,
        2 => What::Opened {
            sectors: stored.sectors.get(),
        },
        3 => What::Request(TraceEntry {
            operation: Operation::of(stored.operation)?,
            sector: stored.sector.get(),
            sectors: stored.sectors.get(),
            flags: Flags::of(stored.flags.get()),
        }),
        4 => What::Done {
            errno: stored.errno.get(),
        },
        _ => return None,
    };
    let record = TraceRecord {
        number: stored.number.get(),
        time_ns: stored.time_ns.get(),
        what,
        data: begin..end,
    };
    Some((record, end))
}
