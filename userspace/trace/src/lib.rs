// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file that records the requests of a disk's guest: a ring, which keeps the newest.
//!
//! [`Writer`] extends it, one process after the other; [`Trace`] reads it, also while it grows. A guest may have chosen
//! its content (the data), and so may an untrusted process: a reader takes nothing for granted.
//!
//! # The file
//!
//! A header of 4096 bytes, then `segments` segments of `segment` bytes each. All numbers are little-endian and unsigned.
//! Bytes that are not named are zero and not looked at. Checksums are CRC-32 (IEEE).
//!
//! | header, byte | size | what |
//! |---|---|---|
//! | 0 | 8 | `xttrace\n` |
//! | 8 | 4 | version, 1; a reader refuses others |
//! | 12 | 4 | bit 0: records of writes carry their data |
//! | 16 | 4 | `segment`: bytes of a segment, a multiple of 64 from 4096 to 16777216 |
//! | 20 | 4 | `segments`: number of segments, from 2 to 65536 |
//! | 24 | 8 | the mark: a random number that each record of this file has, so that no guest can write a disk block that looks like one |
//! | 32 | 8 | when the trace began, in milliseconds since 1970 |
//! | 40 | 8 | that moment in nanoseconds of `CLOCK_MONOTONIC` |
//! | 48 | 8 | size of the disk by then, in sectors of 512 bytes |
//! | 56 | 4 | minor number of the disk |
//! | 60 | 4 | checksum of bytes 0 to 59 |
//!
//! Segments are numbered from 0 on in their order of time; number `n` is at the place `n % segments`, over number `n -
//! segments`. In a segment records follow each other from its first byte on. The first one is of the kind *segment*. A
//! segment ends with the first record that is not whole, or is not of this segment: the bytes behind that are older, or
//! are left of a process that died. The next process continues there.
//!
//! | record, byte | size | what |
//! |---|---|---|
//! | 0 | 8 | the mark |
//! | 8 | 8 | number of the segment |
//! | 16 | 8 | number of the request, see below |
//! | 24 | 8 | nanoseconds since the trace began |
//! | 32 | 8 | *request*: the first sector of 512 bytes |
//! | 40 | 8 | *request*: number of sectors; *opened*: those of the disk |
//! | 48 | 1 | kind: 1 *segment*, 2 *opened*, 3 *request*, 4 *done* |
//! | 49 | 1 | *request*: 1 read, 2 write, 3 flush, 4 discard, 5 write zeroes |
//! | 50 | 2 | *request*: bit 0 must be durable when it is answered (FUA); bit 1 a flush comes first; bit 2 an earlier process may have executed it; bit 3 not of the guest, but of an NBD client |
//! | 52 | 4 | *done*: 0, or the number of the error as Linux has it |
//! | 56 | 4 | bytes of data that follow the record, a multiple of 64 |
//! | 60 | 4 | checksum of bytes 0 to 59, and of the data |
//!
//! *Segment* begins one, and has the number that the next request gets. *Opened*: a process begins to serve the disk.
//! *Request*: the disk is about to carry out a request; requests are numbered from 1 on, without a gap, and where two
//! overlap they take effect in this order. *Done*: the result of the request of this number. A request without one may
//! or may not have been executed: its process died, or the trace ended before.
#![forbid(unsafe_code)]

mod layout;
mod reader;
mod writer;

pub use layout::{
    Flags, Operation, TraceEntry, TraceHeader, TraceRecord, What, BLOCK, MAX_SIZE, MIN_SIZE,
};
pub use reader::{Trace, TraceSegment};
pub use writer::Writer;
