// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tapimg replay`: what a guest has asked for, listed, or done again to a copy of its disk.

mod window;

use crate::chain::refuse_damage;
use crate::cli::Replay;
use crate::image_spec::ImageSpec;
use crate::open::{failed, ImageOpener, Use};
use crate::progress::bytes;
use crate::Error;
use control::{json_line, Code, Failure};
use diskio::{Bytes, Errno};
use drivers::{Attributes, Content, Disk};
use formats::Options;
use serde::Serialize;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use trace::{Operation, TraceEntry, TraceRecord, What, BLOCK};
pub(crate) use window::Point;
use window::{ReplayOutcome, Window};

/// Result of a replay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ReplayResult {
    /// The image, as the command line names it.
    image: String,
    /// Number of the first request.
    from: u64,
    /// Number of the last request.
    to: u64,
    /// Replayed writes.
    writes: u64,
    /// Replayed discards.
    discards: u64,
    /// Replayed writes of zeroes.
    zeroes: u64,
    /// Replayed flushes.
    flushes: u64,
    /// Bytes that the replay changed.
    written: u64,
    /// Requests that failed and were left out.
    failed: u64,
    /// Replayed requests of which the trace does not show whether they were carried out.
    unknown: u64,
}

impl ReplayResult {
    pub(crate) fn text(&self) -> String {
        let Self {
            image, from, to, ..
        } = self;
        let mut text = format!(
            "{image} got requests {from} to {to}: {} writes of {}, {} discards, {} of zeroes, {} flushes\n",
            self.writes,
            bytes(self.written),
            self.discards,
            self.zeroes,
            self.flushes
        );
        if self.failed > 0 {
            text += &format!("{} that had failed were left out\n", self.failed);
        }
        if self.unknown > 0 {
            text += &format!(
                "{} with unknown results were replayed: a process died, or the trace ended before\n",
                self.unknown
            );
        }
        text
    }
}

/// Does a window of a trace again.
pub(crate) async fn replay(
    opener: &ImageOpener,
    args: &Replay,
    image: &ImageSpec,
) -> Result<ReplayResult, Failure> {
    let window = Window::open(&args.trace, args.from, args.until)?;
    refuse_marked(image)?;
    refuse_damage(opener, image).await?;
    let file = opener.file(&image.path, Use::Write).await?;
    let options = Options::new(image.path.display().to_string());
    let (disk, shape) = opener.disk_of(image, file, options).await?;
    // The program changes nothing unless all of the trace can be replayed.
    window.check(shape.size)?;
    let (from, to) = window.holds.unwrap_or_default();
    let mut done = ReplayResult {
        image: image.to_string(),
        from,
        to,
        ..ReplayResult::default()
    };
    let replayed = all(&window, image, &disk, &mut done).await;
    let last = disk.inactivate().await;
    replayed?;
    last.map_err(|error| failed("make durable", image, 0, error))?;
    Ok(done)
}

/// Refuses an image without write permission, as a snapshot leaves it, because it is a backing image.
fn refuse_marked(image: &ImageSpec) -> Result<(), Failure> {
    let data = fs::metadata(&image.path)
        .map_err(|error| Failure::system(format!("cannot look at {image}"), &error))?;
    match data.permissions().readonly() {
        true => Err(Failure::new(
            Code::Denied,
            format!("{image} has no write permission: replay onto a copy with it (chmod u+w)"),
        )),
        false => Ok(()),
    }
}

async fn all(
    window: &Window,
    image: &ImageSpec,
    disk: &Disk,
    done: &mut ReplayResult,
) -> Result<(), Failure> {
    for number in window.trace.segments() {
        let segment = window.segment(*number)?;
        for record in segment.records() {
            let What::Request(entry) = record.what else {
                continue;
            };
            if !window.holds(record) {
                continue;
            }
            match window.outcome(record.number) {
                ReplayOutcome::Failed(_) => {
                    done.failed += 1;
                    continue;
                }
                ReplayOutcome::Unknown => done.unknown += 1,
                ReplayOutcome::Done => {}
            }
            let data = segment.data(record);
            let applied = apply(disk, &entry, data, done).await;
            let what = format!("do request {} again on", record.number);
            applied.map_err(|error| failed(&what, image, entry.sector * BLOCK, error))?;
        }
    }
    Ok(())
}

/// Does one request, of which it is known that the disk has such a place.
async fn apply(
    disk: &Disk,
    entry: &TraceEntry,
    data: &[u8],
    done: &mut ReplayResult,
) -> Result<(), Errno> {
    let how = Attributes::default();
    let (offset, len) = (
        entry.sector.saturating_mul(BLOCK),
        entry.sectors.saturating_mul(BLOCK),
    );
    match entry.operation {
        Operation::Read => {}
        // No guest asks for that, but who says that a guest has written the trace?
        _ if len == 0 && entry.operation != Operation::Flush => {}
        Operation::Write => {
            done.writes += 1;
            done.written += len;
            disk.write(offset, Bytes::copied(data)?, how).await?;
        }
        Operation::Flush => {
            done.flushes += 1;
            disk.flush().await?;
        }
        Operation::Discard => {
            done.discards += 1;
            discard(disk, offset, len).await?;
        }
        Operation::Zeroes => {
            done.zeroes += 1;
            disk.write_zeroes(offset, len, how).await?;
        }
    }
    Ok(())
}

/// Forgets a range. It may read as anything then; here it reads as zeroes, whatever the image is, so that each replay
/// gives the same.
async fn discard(disk: &Disk, offset: u64, len: u64) -> Result<(), Errno> {
    let how = Attributes::default();
    match disk.discard(offset, len, how).await {
        Ok(()) | Err(Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    let (mut at, end) = (offset, offset.saturating_add(len));
    while at < end {
        for extent in disk.extents(at, end - at).await? {
            if extent.content == Content::Data {
                disk.write_zeroes(at, extent.len, how).await?;
            }
            at = at.saturating_add(extent.len);
        }
    }
    Ok(())
}

/// Requests of a trace.
#[derive(Serialize)]
struct TraceListing<'a> {
    /// File of the trace.
    trace: &'a Path,
    /// Number of the disk.
    minor: u32,
    /// Sectors of the disk.
    sectors: u64,
    /// Begin of the trace, in milliseconds since 1970.
    started_ms: u64,
    /// The trace has the data of writes.
    data: bool,
    /// Number of the first request that the file has; nothing if it has none.
    first: Option<u64>,
    /// Number of the last request; nothing if there is none.
    last: Option<u64>,
    /// Requests, in the order of their arrival.
    requests: [ListedRequest; 0],
}

/// A request of a trace.
#[derive(Serialize)]
struct ListedRequest {
    /// Number of the request.
    number: u64,
    /// Nanoseconds from the begin of the trace to the request.
    time_ns: u64,
    /// `read`, `write`, `flush`, `discard` or `write-zeroes`.
    operation: String,
    /// First sector of 512 bytes.
    sector: u64,
    /// Number of sectors.
    sectors: u64,
    /// Flags of the request: `fua`, `preflush`, `replay`, or `nbd` for one of an NBD client.
    flags: Vec<&'static str>,
    /// `ok`, `error-` with the number of the error, or `unknown`: the request may or may not have been carried out.
    result: String,
    /// Bytes of data that the trace has for the request.
    data: usize,
}

/// Writes what is in a window, as it is found: it may be long.
pub(crate) fn list(args: &Replay, json: bool, out: &mut dyn Write) -> Result<(), Error> {
    let window = Window::open(&args.trace, args.from, args.until)?;
    let header = window.trace.header();
    if json {
        let (first, last) = window.has.unzip();
        let begin = TraceListing {
            trace: &args.trace,
            minor: header.minor,
            sectors: header.sectors,
            started_ms: header.started_ms,
            data: header.data,
            first,
            last,
            requests: [],
        };
        // The requests follow in the same object.
        let begin = json_line(&begin).map_err(io::Error::other)?;
        write!(out, "{}", begin.trim_end_matches("]}"))?;
    }
    let mut is_first = true;
    for number in window.trace.segments() {
        for record in window.segment(*number)?.records() {
            let What::Request(entry) = record.what else {
                continue;
            };
            if !window.holds(record) {
                continue;
            }
            let outcome = window.outcome(record.number);
            if json {
                let comma = if is_first { "" } else { "," };
                let row = ListedRequest::of(record, &entry, outcome);
                let row = serde_json::to_string(&row).map_err(io::Error::other)?;
                write!(out, "{comma}{row}")?;
            } else {
                out.write_all(line(record, &entry, outcome).as_bytes())?;
            }
            is_first = false;
        }
    }
    if json {
        writeln!(out, "]}}")?;
    }
    Ok(out.flush()?)
}

impl ListedRequest {
    fn of(record: &TraceRecord, entry: &TraceEntry, outcome: ReplayOutcome) -> ListedRequest {
        ListedRequest {
            number: record.number,
            time_ns: record.time_ns,
            operation: entry.operation.to_string(),
            sector: entry.sector,
            sectors: entry.sectors,
            flags: entry.flags.names().collect(),
            result: outcome.to_string(),
            data: record.data.len(),
        }
    }
}

fn line(record: &TraceRecord, entry: &TraceEntry, outcome: ReplayOutcome) -> String {
    let flags: Vec<_> = entry.flags.names().collect();
    let flags = match flags.is_empty() {
        true => "-".to_owned(),
        false => flags.join(","),
    };
    format!(
        "number={} time={}.{:09} op={} sector={} sectors={} flags={flags} result={outcome} data={}\n",
        record.number,
        record.time_ns / 1_000_000_000,
        record.time_ns % 1_000_000_000,
        entry.operation,
        entry.sector,
        entry.sectors,
        record.data.len()
    )
}
