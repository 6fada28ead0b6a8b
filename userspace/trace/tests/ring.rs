// SPDX-License-Identifier: MIT OR Apache-2.0
//! Records are read back: over the end of the ring, over deaths at any byte, and with any bytes in the file.

use control::Code;
use proptest::prelude::*;
use std::fs::{self, File};
use std::path::Path;
use tempfile::NamedTempFile;
use trace::{Flags, Operation, Trace, TraceEntry, TraceHeader, What, Writer};

/// When the trace began.
const BEGIN: u64 = 1_000;
/// Bytes of the header of the file.
const HEAD: usize = 4096;

fn header(segment: u32, segments: u32) -> TraceHeader {
    TraceHeader {
        data: true,
        segment,
        segments,
        mark: 0x1234_5678_9abc_def0,
        started_ms: 5,
        started_ns: BEGIN,
        sectors: 2048,
        minor: 7,
    }
}

fn create(header: &TraceHeader) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a file");
    file.as_file().set_len(header.size()).expect("a size");
    Writer::create(file.as_file(), header).expect("a trace");
    file
}

fn writer(path: &Path) -> Writer {
    let file = File::options().read(true).write(true).open(path);
    Writer::resume(file.expect("open")).expect("a trace")
}

/// A record without its place.
type PlainRecord = (u64, u64, What, Vec<u8>);

/// All records but those that begin a segment.
fn read(path: &Path) -> Vec<PlainRecord> {
    let trace = Trace::open(File::open(path).expect("open")).expect("a trace");
    let mut all = Vec::new();
    for number in trace.segments() {
        let segment = trace.segment(*number).expect("read").expect("a segment");
        let records = segment.records().iter();
        let others = records.filter(|record| record.what != What::Segment);
        all.extend(others.map(|record| {
            let data = segment.data(record).to_vec();
            (record.number, record.time_ns, record.what, data)
        }));
    }
    all
}

fn entry(operation: Operation, sector: u64, bytes: usize) -> TraceEntry {
    TraceEntry {
        operation,
        sector,
        sectors: bytes as u64 / 512,
        flags: Flags {
            fua: sector % 2 == 0,
            preflush: sector % 3 == 0,
            replay: sector % 5 == 0,
            client: sector % 7 == 0,
        },
    }
}

/// Writes a request, and says what must be read.
fn begin(writer: &mut Writer, sector: u64, bytes: usize, byte: u8, at: u64) -> PlainRecord {
    let entry = entry(Operation::Write, sector, bytes);
    let number = writer.begin(entry, BEGIN + at, bytes, |to| to.fill(byte));
    (
        number.expect("write"),
        at,
        What::Request(entry),
        vec![byte; bytes],
    )
}

#[derive(Clone, Debug)]
enum RingStep {
    Request(u64, usize, u8),
    Done(u32),
    Settle,
    Opened,
    /// The process dies: what waited is lost.
    Dies,
}

fn step() -> impl Strategy<Value = RingStep> {
    let bytes = prop_oneof![Just(0_usize), Just(512), Just(1024), Just(2048)];
    prop_oneof![
        6 => (0..2048_u64, bytes, any::<u8>()).prop_map(|(at, len, byte)| RingStep::Request(at, len, byte)),
        4 => (0..40_u32).prop_map(RingStep::Done),
        1 => Just(RingStep::Settle),
        1 => Just(RingStep::Opened),
        1 => Just(RingStep::Dies),
    ]
}

proptest! {
    /// A reader finds the end of the stored records, and no fewer than those of all segments but the one that is lost
    /// next.
    #[test]
    fn the_newest_is_read(steps in prop::collection::vec(step(), 0..120), segments in 2..5_u32) {
        let file = create(&header(4096, segments));
        let path = file.path();
        let mut now = writer(path);
        // Those in the file, and those that wait.
        let (mut all, mut waiting): (Vec<PlainRecord>, Vec<PlainRecord>) = Default::default();
        let mut last = 0;
        for (at, step) in (0..).zip(steps) {
            match step {
                RingStep::Request(sector, bytes, byte) => {
                    let said = begin(&mut now, sector, bytes, byte, at);
                    last += 1;
                    prop_assert_eq!(said.0, last);
                    waiting.push(said);
                    all.append(&mut waiting);
                }
                RingStep::Done(errno) => {
                    now.end(last, errno, BEGIN + at).expect("write");
                    waiting.push((last, at, What::Done { errno }, Vec::new()));
                }
                RingStep::Settle => {
                    now.settle().expect("write");
                    all.append(&mut waiting);
                }
                RingStep::Opened => {
                    now.opened(9, BEGIN + at).expect("write");
                    waiting.push((last + 1, at, What::Opened { sectors: 9 }, Vec::new()));
                    all.append(&mut waiting);
                }
                RingStep::Dies => {
                    now = writer(path);
                    // Some records were stored when a segment was full.
                    let seen = read(path);
                    waiting.retain(|said| seen.contains(said));
                    all.append(&mut waiting);
                }
            }
        }
        now.settle().expect("write");
        all.append(&mut waiting);
        let seen = read(path);
        prop_assert!(seen.len() <= all.len());
        prop_assert_eq!(&seen[..], &all[all.len() - seen.len()..]);
        let bytes: usize = seen.iter().map(|said| 64 + said.3.len()).sum();
        // A segment may end before one that has no room.
        let least = (segments as usize - 1) * (4096 - 64 - 2048 - 64);
        prop_assert!(seen.len() == all.len() || bytes >= least, "{} of {}", bytes, least);
    }

    /// A process dies in the middle of a write: of that some bytes are in the file.
    #[test]
    fn a_torn_record_is_none(before in 0..30_usize, bytes in prop_oneof![Just(0_usize), Just(512), Just(2048)], torn in 0..2200_usize) {
        let file = create(&header(4096, 3));
        let path = file.path();
        let mut now = writer(path);
        let mut all: Vec<PlainRecord> = Vec::new();
        for at in 0..before as u64 {
            all.push(begin(&mut now, at, 512, at as u8, at));
        }
        let old = fs::read(path).expect("read");
        let last = begin(&mut now, 9, bytes, 0xaa, 99);
        let new = fs::read(path).expect("read");
        // The write is one, from where the first byte differs.
        let from = (0..old.len()).find(|at| old[*at] != new[*at]).expect("a difference");
        let mut mixed = old.clone();
        let until = (from + torn).min(new.len());
        mixed[from..until].copy_from_slice(&new[from..until]);
        fs::write(path, &mixed).expect("write");
        let seen = read(path);
        match seen.last() == Some(&last) {
            true => all.push(last),
            false => prop_assert!(torn < 64 + 64 + bytes),
        }
        prop_assert_eq!(&seen[..], &all[all.len() - seen.len()..]);
        // The next process continues there.
        let mut next = writer(path);
        let number = all.len() as u64 + 1;
        let more = begin(&mut next, 3, 512, 0xbb, 100);
        prop_assert_eq!(more.0, number);
        all.push(more);
        let seen = read(path);
        prop_assert_eq!(&seen[..], &all[all.len() - seen.len()..]);
        prop_assert!(!seen.is_empty());
    }

    /// A file with any content is read or refused.
    #[test]
    fn bytes_of_anybody_do_no_harm(changes in prop::collection::vec((0..HEAD + 3 * 4096, any::<u8>()), 1..40), cut in prop_oneof![3 => Just(usize::MAX), 1 => 0..HEAD + 3 * 4096]) {
        let file = create(&header(4096, 3));
        let path = file.path();
        let mut now = writer(path);
        for at in 0..40 {
            begin(&mut now, at, 512, at as u8, at);
        }
        let mut bytes = fs::read(path).expect("read");
        for (at, byte) in changes {
            // The first bytes of records are looked at most.
            let at = if at % 2 == 0 { at } else { HEAD + (at % 21) * 576 + 64 + at % 64 };
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        bytes.truncate(cut);
        fs::write(path, &bytes).expect("write");
        if let Ok(trace) = Trace::open(File::open(path).expect("open")) {
            for number in trace.segments() {
                trace.segment(*number).expect("read");
            }
            let mut next = writer(path);
            next.begin(entry(Operation::Flush, 0, 0), 0, 0, |_| ()).expect("write");
        }
    }
}

/// Cost of a request, for people: `cargo test --release -p trace --test ring -- --ignored --nocapture`.
#[test]
#[ignore = "it measures"]
fn cost_of_a_request() {
    for bytes in [0, 4096, 65536] {
        let file = create(&header(4 << 20, 16));
        let mut writer = writer(file.path());
        let data = vec![7; bytes];
        let count = 20_000;
        let begun = std::time::Instant::now();
        for sector in 0..count {
            let entry = entry(Operation::Write, sector, bytes);
            let number = writer.begin(entry, 0, bytes, |to| to.copy_from_slice(&data));
            writer.end(number.expect("write"), 0, 0).expect("write");
        }
        let each = begun.elapsed().as_nanos() / u128::from(count);
        println!("a request with {bytes} bytes of data: {each} ns");
    }
}

/// Data of a guest counts as no record, wherever it comes to lie.
#[test]
fn a_guest_forges_nothing() {
    let other = create(&TraceHeader {
        mark: 1,
        ..header(4096, 2)
    });
    let mut theirs = writer(other.path());
    begin(&mut theirs, 1, 512, 1, 1);
    let forged = fs::read(other.path()).expect("read")[HEAD..HEAD + 2048].to_vec();
    let file = create(&header(4096, 2));
    let mut ours = writer(file.path());
    for at in 0..20 {
        let entry = entry(Operation::Write, at, 2048);
        let fill = |to: &mut [u8]| to.copy_from_slice(&forged);
        ours.begin(entry, BEGIN, 2048, fill).expect("write");
    }
    let numbers: Vec<u64> = read(file.path()).iter().map(|said| said.0).collect();
    assert_eq!(numbers, [19, 20]);
}

#[test]
fn what_is_no_trace_is_refused() {
    let file = create(&header(4096, 2));
    let whole = fs::read(file.path()).expect("read");
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        fs::write(file.path(), &bytes).expect("write");
        let opened = Trace::open(File::open(file.path()).expect("open"));
        opened.expect_err("no trace")
    };
    assert_eq!(refused(&|bytes| bytes.clear()).code, Code::Image);
    assert_eq!(refused(&|bytes| bytes[0] = b'y').code, Code::Image);
    assert_eq!(refused(&|bytes| bytes[8] = 2).code, Code::Unsupported);
    let cut = refused(&|bytes| bytes.truncate(5000));
    assert!(cut.message.contains("part of it is missing"), "{cut}");
    let damaged = refused(&|bytes| bytes[20] = 1);
    assert!(damaged.message.contains("damaged"), "{damaged}");
    for size in [0, 1 << 20, 1 << 40] {
        let refused = TraceHeader::divide(size).expect_err("a size");
        assert!(refused.message.contains("--size"), "{refused}");
    }
    assert_eq!(TraceHeader::divide(64 << 20), Ok((4 << 20, 16)));
}

/// Without data, and with data for which no segment has room, the record has the operation all the same.
#[test]
fn headers_are_always_there() {
    for data in [false, true] {
        let file = create(&TraceHeader {
            data,
            ..header(4096, 2)
        });
        let mut writer = writer(file.path());
        begin(&mut writer, 1, 512, 1, 1);
        begin(&mut writer, 2, 4096, 1, 2);
        let lens: Vec<usize> = read(file.path()).iter().map(|said| said.3.len()).collect();
        assert_eq!(lens, [if data { 512 } else { 0 }, 0]);
    }
}
