// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies the data of the backing images into the image, until it needs them no more, and then drops them.
//!
//! Nothing is lost whenever it ends: copied data is the image's own, and the next stream finds the rest. A range is
//! claimed for a copy as for a write of the guest, so neither overtakes the other.

use super::{failed, piece, DiskPiece, WalkEnd, Worker, PIECE};
use crate::mirror_target::first;
use crate::session::not_running;
use crate::{Server, Session};
pub(crate) use control::stats::{Stream, Streaming};
use control::tapdisk::Call;
use control::Failure;
use diskio::{Bytes, Data, Errno, SeenErrors};
use drivers::{Attributes, Content, Disk};
use std::rc::Rc;

/// Starts a stream of `rate` bytes in a second, or changes its rate; 0 ends it. Returns the progress, so that a client
/// that asks repeatedly learns of the end. A stream that has failed begins again if `anew` is set.
pub(crate) async fn ask(session: &Rc<Session>, rate: u64, anew: bool) -> Result<Stream, Failure> {
    let job = &session.jobs().stream;
    job.rate.set(rate);
    if job.is_of(session) {
        let now = job.progress().clone().unwrap_or_default();
        match now.state {
            Streaming::Running | Streaming::Done => return Ok(now),
            Streaming::Failed { .. } if !anew => return Ok(now),
            Streaming::Failed { .. } | Streaming::Ended => {}
        }
    }
    if rate == 0 {
        return Ok(Stream {
            state: Streaming::Ended,
            ..Stream::default()
        });
    }
    begin(session).await
}

async fn begin(session: &Rc<Session>) -> Result<Stream, Failure> {
    // This does not wait for a disk that has stopped, because the session must be able to receive the request that
    // resumes it.
    let server = session.server().filter(|server| server.is_fetching());
    let server = server.ok_or_else(not_running)?;
    let _hold = server.hold();
    if !server.disk().goes_on().await? {
        return Ok(Stream {
            state: Streaming::Done,
            ..Stream::default()
        });
    }
    // Another task may have begun it in between.
    let job = &session.jobs().stream;
    let runs = |progress: &Stream| progress.state == Streaming::Running;
    let is_there = job.is_of(session) && job.progress().as_ref().is_some_and(runs);
    if !is_there {
        let worker = Worker::begin(session, |jobs| &jobs.stream, Stream::default());
        let tasks = session.runtime().clone().tasks;
        tasks.spawn(async move {
            let state = match run(&worker).await {
                Ok(WalkEnd::Through) => Streaming::Done,
                Ok(WalkEnd::Stopped | WalkEnd::Closed) => Streaming::Ended,
                Err(failure) => Streaming::Failed {
                    why: failure.message,
                },
            };
            worker.update(|progress| progress.state = state);
        });
    }
    Ok(job.progress().clone().unwrap_or_default())
}

async fn run(worker: &Worker<Stream>) -> Result<WalkEnd, Failure> {
    // Earlier writes that could not be made durable are no errors of this job.
    let seen = worker.session.lost().newcomer();
    let serve = worker.session.serves();
    // CAST: it is small.
    let buffer = Data::zeroed(PIECE as usize).map_err(|error| failed("no memory", error))?;
    loop {
        let mut copied = 0;
        let mut was_paused = false;
        let step = async |server: &Rc<Server>, at, left| {
            // Another process may have changed the image during the pause, so passed ranges are checked again.
            was_paused |= worker.session.serves() != serve;
            if was_paused {
                return Ok(DiskPiece { len: left, work: 0 });
            }
            let piece = copy(server, &buffer, at, left).await?;
            copied += piece.work;
            worker.update(|progress| {
                progress.offset = at + piece.len;
                progress.copied += piece.work;
            });
            Ok(piece)
        };
        let end = worker.walk(step).await?;
        if was_paused {
            return Ok(WalkEnd::Closed);
        }
        if end != WalkEnd::Through {
            return Ok(end);
        }
        // Nothing of an image becomes another one's again; should a format do so, it is found here.
        if copied == 0 {
            return stand_alone(worker, serve, &seen).await;
        }
    }
}

/// Copies the next piece, or passes over what need not be copied.
async fn copy(
    server: &Rc<Server>,
    buffer: &Data,
    at: u64,
    left: u64,
) -> Result<DiskPiece, Failure> {
    let told = |call: Call, at, len: u64, error: Errno| {
        let len = len.min(PIECE);
        server.tell(call, at, len, error, false);
        failed(
            format!("cannot {call} {len} bytes at {at} of the disk"),
            error,
        )
    };
    let disk = server.disk();
    let part = missing(disk, at, left).await;
    let part = part.map_err(|error| told(Call::Read, at, left, error))?;
    if !part.is_missing {
        return Ok(DiskPiece {
            len: part.len,
            work: 0,
        });
    }
    let len = piece(at, part.len);
    // Whole clusters are claimed: if the guest has changed a part of one in between, the kernel may write the rest in
    // passthrough.
    let unit = disk.unit();
    let from = at - at % unit;
    let claimed = (at + len).next_multiple_of(unit) - from;
    let _claim = server.claim(from, claimed, true).await;
    let (mut done, mut copied) = (0, 0);
    while done < len {
        let from = at + done;
        // From now on the kernel may write clusters in passthrough that the guest has allocated in between.
        let part = missing(disk, from, len - done).await;
        let part = part.map_err(|error| told(Call::Read, from, len - done, error))?;
        if part.is_missing {
            // CAST: at most a piece.
            let data = buffer.part(0, part.len as usize);
            let read = disk.read(from, data.clone()).await;
            read.map_err(|error| told(Call::Read, from, part.len, error))?;
            let written = disk.write(from, Bytes::from(data), Attributes::default());
            let written = server.changing(false, written).await;
            written.map_err(|why| told(Call::Write, from, part.len, why.error))?;
            copied += part.len;
        }
        done += part.len;
    }
    Ok(DiskPiece { len, work: copied })
}

/// A part of the disk that is alike.
struct StreamPart {
    len: u64,
    /// The image shows it, and has it not itself. Zeroes it shows without another one, too.
    is_missing: bool,
}

/// Returns whether the beginning of a range is missing in the image.
async fn missing(disk: &Disk, at: u64, len: u64) -> Result<StreamPart, Errno> {
    let own = first(disk.layer(at, len).await)?;
    let here = |len| StreamPart {
        len,
        is_missing: false,
    };
    if own.content != Content::Below {
        return Ok(here(own.len));
    }
    // The images below may each have something of it.
    let (mut data, end) = (0, own.len.min(PIECE));
    while data < end {
        let there = first(disk.extents(at + data, own.len - data).await)?;
        match there.content {
            Content::Hole if data == 0 => return Ok(here(there.len)),
            Content::Hole => break,
            Content::Data | Content::Below => data += there.len,
        }
    }
    Ok(StreamPart {
        len: data.min(end),
        is_missing: true,
    })
}

/// Drops the backing images while no request is under way.
async fn stand_alone(
    worker: &Worker<Stream>,
    serve: u64,
    seen: &SeenErrors,
) -> Result<WalkEnd, Failure> {
    let Some(server) = worker.session.running_from(worker.image).await else {
        return Ok(WalkEnd::Closed);
    };
    let _hold = server.hold();
    let _all = server.claim(0, u64::MAX, true).await;
    if worker.is_to_end() {
        return Ok(WalkEnd::Stopped);
    }
    if worker.session.serves() != serve {
        return Ok(WalkEnd::Closed);
    }
    let flushed = server.flush(seen).await;
    flushed.map_err(|why| failed("cannot make the copied data durable", why.error))?;
    server.disk().stand_alone().await.map(|()| WalkEnd::Through)
}
