// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads a trace, whatever is in the file.

use crate::layout::{decode, RecordPlace, TraceHeader, TraceRecord, What, RECORD, STORED};
use control::{Code, Failure};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A trace that is read. It may grow in the meantime: then it is as it was at some moment, or some of it is gone.
#[derive(Debug)]
pub struct Trace {
    file: File,
    header: TraceHeader,
    /// Numbers of the segments that there are, ascending.
    segments: Vec<u64>,
}

fn unread(error: &io::Error) -> Failure {
    Failure::system("cannot read the trace", error)
}

impl Trace {
    /// Looks at a file.
    ///
    /// # Errors
    /// It is no trace, or it cannot be read.
    pub fn open(file: File) -> Result<Trace, Failure> {
        let size = file.metadata().map_err(|error| unread(&error))?.len();
        let mut bytes = [0; STORED];
        let len = bytes.len().min(usize::try_from(size).unwrap_or(usize::MAX));
        let head = &mut bytes[..len];
        file.read_exact_at(head, 0)
            .map_err(|error| unread(&error))?;
        let header = TraceHeader::decode(head)?;
        if size < header.size() {
            return Err(Failure::new(
                Code::Image,
                format!(
                    "the trace has {size} bytes, and its header says {}: part of it is missing",
                    header.size()
                ),
            ));
        }
        let mut trace = Trace {
            file,
            header,
            segments: Vec::new(),
        };
        trace.look()?;
        Ok(trace)
    }

    /// Returns the fields that all records share.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// Numbers of the segments that there are, the oldest first.
    pub fn segments(&self) -> &[u64] {
        &self.segments
    }

    pub(crate) fn last(&self) -> Option<u64> {
        self.segments.last().copied()
    }

    pub(crate) fn into_file(self) -> (File, TraceHeader) {
        (self.file, self.header)
    }

    fn look(&mut self) -> Result<(), Failure> {
        let count = u64::from(self.header.segments);
        for place in 0..count {
            let mut bytes = [0; RECORD];
            let read = self
                .file
                .read_exact_at(&mut bytes, self.header.place(place));
            read.map_err(|error| unread(&error))?;
            // The number that it says is the only one that can be right.
            let number = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
            let first = decode(self.place(number), &bytes, 0);
            let begins = first.is_some_and(|(record, _)| record.what == What::Segment);
            if begins && number % count == place {
                self.segments.push(number);
            }
        }
        self.segments.sort_unstable();
        // All but these were to be overwritten by them.
        let newest = self.last().unwrap_or(0);
        self.segments
            .retain(|number| newest - number < count && newest < u64::MAX - count);
        Ok(())
    }

    fn place(&self, segment: u64) -> RecordPlace {
        RecordPlace {
            mark: self.header.mark,
            segment,
        }
    }

    /// Reads a segment; nothing if it is overwritten by now.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn segment(&self, number: u64) -> Result<Option<TraceSegment>, Failure> {
        let mut bytes = vec![0; self.header.segment as usize];
        let read = self
            .file
            .read_exact_at(&mut bytes, self.header.place(number));
        read.map_err(|error| unread(&error))?;
        let (mut at, mut records) = (0, Vec::new());
        while let Some((record, next)) = decode(self.place(number), &bytes, at) {
            // One that begins a segment is at its beginning, and nowhere else.
            if (record.what == What::Segment) != (at == 0) {
                break;
            }
            records.push(record);
            at = next;
        }
        Ok((at > 0).then_some(TraceSegment {
            number,
            bytes,
            records,
            end: at,
        }))
    }
}

/// A segment of a trace.
#[derive(Clone, Debug)]
pub struct TraceSegment {
    number: u64,
    bytes: Vec<u8>,
    records: Vec<TraceRecord>,
    end: usize,
}

impl TraceSegment {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Bytes of whole records.
    pub(crate) fn end(&self) -> usize {
        self.end
    }

    /// The number that the next request gets.
    pub(crate) fn next(&self) -> u64 {
        let number = |record: &TraceRecord| match record.what {
            What::Request(_) => record.number.saturating_add(1),
            What::Segment => record.number,
            What::Opened { .. } | What::Done { .. } => 0,
        };
        self.records.iter().map(number).max().unwrap_or(1)
    }

    /// Its records, in their order.
    pub fn records(&self) -> &[TraceRecord] {
        &self.records
    }

    /// The data of one of them.
    pub fn data(&self, record: &TraceRecord) -> &[u8] {
        self.bytes.get(record.data.clone()).unwrap_or_default()
    }
}
