// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes a trace.

use crate::layout::{encode, RecordPlace, TraceEntry, TraceHeader, What, HEADER, RECORD};
use crate::reader::Trace;
use control::Failure;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Most bytes that wait to be stored.
const WAITING: usize = 64 << 10;
/// Bytes of memory that are kept for what comes next: a usual request has room.
const KEPT: usize = 256 << 10;

/// A trace that grows.
///
/// Records go into the file by plain writes, which leave them in the kernel's page cache: there they outlive this
/// process. A [request](Self::begin) is in the file when that returns. A [result](Self::end) waits for the next
/// request, or for [`settle`](Self::settle), so that a request costs one call of the system.
#[derive(Debug)]
pub struct Writer {
    file: File,
    header: TraceHeader,
    segment: u64,
    /// Bytes of the segment that are in the file.
    at: usize,
    /// Records that follow on them.
    waiting: Vec<u8>,
    /// Number of the next request.
    next: u64,
}

impl Writer {
    /// Makes an empty file a trace without records.
    ///
    /// # Errors
    /// The file cannot be changed.
    pub fn create(file: &File, header: &TraceHeader) -> io::Result<()> {
        let mut bytes = [0; HEADER as usize];
        let encoded = header.encode();
        bytes[..encoded.len()].copy_from_slice(&encoded);
        file.write_all_at(&bytes, 0)
    }

    /// Continues where the process before has ended.
    ///
    /// # Errors
    /// It is no trace, or it cannot be read.
    pub fn resume(file: File) -> Result<Writer, Failure> {
        let trace = Trace::open(file)?;
        let last = match trace.last() {
            Some(number) => trace.segment(number)?,
            None => None,
        };
        let (file, header) = trace.into_file();
        let mut writer = Writer {
            file,
            header,
            segment: 0,
            at: 0,
            waiting: Vec::new(),
            next: 1,
        };
        match last {
            Some(last) => {
                writer.segment = last.number();
                writer.at = last.end();
                writer.next = last.next();
            }
            None => writer.enter(0),
        }
        Ok(writer)
    }

    /// Returns the fields that all records share.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// A process begins to serve the disk.
    ///
    /// # Errors
    /// The file cannot be changed: the trace is at its end.
    pub fn opened(&mut self, sectors: u64, now_ns: u64) -> io::Result<()> {
        self.add(self.next, now_ns, &What::Opened { sectors }, 0, |_| ())?;
        self.settle()
    }

    /// The disk is about to execute a request, with so many bytes of data, which `fill` gives. Returns its number.
    ///
    /// # Errors
    /// The file cannot be changed: the trace is at its end.
    pub fn begin(
        &mut self,
        entry: TraceEntry,
        now_ns: u64,
        data: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> io::Result<u64> {
        let number = self.next;
        // Data for which no segment has room is left out.
        let has_room = data % RECORD == 0 && data <= self.header.segment as usize - 2 * RECORD;
        let data = if self.header.data && has_room {
            data
        } else {
            0
        };
        self.add(number, now_ns, &What::Request(entry), data, fill)?;
        // The number of an earlier process's trace may be any value.
        self.next = number.wrapping_add(1);
        self.settle()?;
        Ok(number)
    }

    /// A request is over.
    ///
    /// # Errors
    /// The file cannot be changed: the trace is at its end.
    pub fn end(&mut self, number: u64, errno: u32, now_ns: u64) -> io::Result<()> {
        self.add(number, now_ns, &What::Done { errno }, 0, |_| ())?;
        match self.waiting.len() >= WAITING {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// The file cannot be changed: the trace is at its end.
    pub fn settle(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let place = self.header.place(self.segment) + self.at as u64;
        self.file.write_all_at(&self.waiting, place)?;
        self.at += self.waiting.len();
        self.waiting.clear();
        self.waiting.shrink_to(KEPT);
        Ok(())
    }

    fn add(
        &mut self,
        number: u64,
        now_ns: u64,
        what: &What,
        data: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        let used = self.at + self.waiting.len();
        if used + RECORD + data > self.header.segment as usize {
            self.settle()?;
            self.enter(self.segment + 1);
        }
        let from = self.waiting.len();
        self.waiting.resize(from + RECORD + data, 0);
        let bytes = &mut self.waiting[from..];
        if data > 0 {
            fill(&mut bytes[RECORD..]);
        }
        let place = RecordPlace {
            mark: self.header.mark,
            segment: self.segment,
        };
        let time_ns = now_ns.saturating_sub(self.header.started_ns);
        encode(place, number, time_ns, what, bytes);
        Ok(())
    }

    /// The next record is in this segment. Its old content is lost when that is stored.
    fn enter(&mut self, segment: u64) {
        self.segment = segment;
        self.at = 0;
        self.waiting.resize(RECORD, 0);
        let place = RecordPlace {
            mark: self.header.mark,
            segment,
        };
        encode(place, self.next, 0, &What::Segment, &mut self.waiting);
    }
}
