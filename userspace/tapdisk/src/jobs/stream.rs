// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies into the image what it shows of those below it, until it needs them no more, and then forgets them.
//!
//! Nothing is lost whenever it ends: what is copied is the image's own, and the next stream finds the rest. A range
//! that is copied is claimed as a write of the guest is, so neither overtakes the other.

use super::{failed, piece, End, Piece, Worker, PIECE};
use crate::twin::first;
use crate::{Seen, Server, Session};
pub(crate) use control::stats::{Stream, Streaming};
use control::tapdisk::Call;
use control::{Code, Failure};
use diskio::{Bytes, Data, Errno};
use drivers::{Attributes, Content, Disk};
use std::rc::Rc;

/// Has the image stream with `rate` bytes in a second; 0 ends that. Says how far it is, so that who asks again and
/// again learns of the end. One that has failed begins once more if it is to begin `anew`.
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
    // One that has stopped is not waited for: who lets it go on has to be heard.
    let server = session.server().filter(|server| server.is_fetching());
    let stopped = || Failure::new(Code::State, "the disk does not run");
    let server = server.ok_or_else(stopped)?;
    let _hold = server.hold();
    if !server.disk().goes_on().await? {
        return Ok(Stream {
            state: Streaming::Done,
            ..Stream::default()
        });
    }
    // Somebody may have begun it meanwhile.
    let job = &session.jobs().stream;
    let runs = |progress: &Stream| progress.state == Streaming::Running;
    let is_there = job.is_of(session) && job.progress().as_ref().is_some_and(runs);
    if !is_there {
        let worker = Worker::begin(session, |jobs| &jobs.stream, Stream::default());
        let tasks = session.runtime().clone().tasks;
        tasks.spawn(async move {
            let state = match run(&worker).await {
                Ok(End::Through) => Streaming::Done,
                Ok(End::Stopped | End::Closed) => Streaming::Ended,
                Err(failure) => Streaming::Failed {
                    why: failure.message,
                },
            };
            worker.update(|progress| progress.state = state);
        });
    }
    Ok(job.progress().clone().unwrap_or_default())
}

async fn run(worker: &Worker<Stream>) -> Result<End, Failure> {
    // What could not be made durable before is not its own.
    let seen = worker.session.lost().newcomer();
    let serve = worker.session.serves();
    // CAST: it is small.
    let buffer = Data::zeroed(PIECE as usize).map_err(|error| failed("no memory", error))?;
    loop {
        let mut copied = 0;
        let mut was_paused = false;
        let step = async |server: &Rc<Server>, at, left| {
            // Whoever had the image meanwhile may have changed it: what was passed over is looked at again.
            was_paused |= worker.session.serves() != serve;
            if was_paused {
                return Ok(Piece { len: left, work: 0 });
            }
            let piece = copy(server, &seen, &buffer, at, left).await?;
            copied += piece.work;
            worker.update(|progress| {
                progress.offset = at + piece.len;
                progress.copied += piece.work;
            });
            Ok(piece)
        };
        let end = worker.walk(step).await?;
        if was_paused {
            return Ok(End::Closed);
        }
        if end != End::Through {
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
    seen: &Seen,
    buffer: &Data,
    at: u64,
    left: u64,
) -> Result<Piece, Failure> {
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
        return Ok(Piece {
            len: part.len,
            work: 0,
        });
    }
    let len = piece(at, part.len);
    // Whole clusters: of one that the guest has written a part of meanwhile, the kernel may write the rest by itself.
    let unit = disk.unit();
    let from = at - at % unit;
    let claimed = (at + len).next_multiple_of(unit) - from;
    let _claim = server.claim(from, claimed, true).await;
    let (mut done, mut copied) = (0, 0);
    while done < len {
        let from = at + done;
        // What the guest has written meanwhile the kernel may write by itself from now on.
        let part = missing(disk, from, len - done).await;
        let part = part.map_err(|error| told(Call::Read, from, len - done, error))?;
        if part.is_missing {
            // CAST: at most a piece.
            let data = buffer.part(0, part.len as usize);
            let read = disk.read(from, data.clone()).await;
            read.map_err(|error| told(Call::Read, from, part.len, error))?;
            let written = disk.write(from, Bytes::from(data), Attributes::default());
            let written = server.changing(seen, false, written).await;
            written.map_err(|why| told(Call::Write, from, part.len, why.error))?;
            copied += part.len;
        }
        done += part.len;
    }
    Ok(Piece { len, work: copied })
}

/// A part of the disk that is alike.
struct Part {
    len: u64,
    /// The image shows it, and has it not itself. Zeroes it shows without another one, too.
    is_missing: bool,
}

/// What is at the beginning of a range.
async fn missing(disk: &Disk, at: u64, len: u64) -> Result<Part, Errno> {
    let own = first(disk.layer(at, len).await)?;
    let here = |len| Part {
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
    Ok(Part {
        len: data.min(end),
        is_missing: true,
    })
}

/// Has the image forget those below it, while nobody asks for anything.
async fn stand_alone(worker: &Worker<Stream>, serve: u64, seen: &Seen) -> Result<End, Failure> {
    let Some(server) = worker.session.running_from(worker.image).await else {
        return Ok(End::Closed);
    };
    let _hold = server.hold();
    let _all = server.claim(0, u64::MAX, true).await;
    if worker.is_to_end() {
        return Ok(End::Stopped);
    }
    if worker.session.serves() != serve {
        return Ok(End::Closed);
    }
    let flushed = server.flush(seen).await;
    flushed.map_err(|why| failed("what was copied cannot be made durable", why.error))?;
    server.disk().stand_alone().await.map(|()| End::Through)
}
