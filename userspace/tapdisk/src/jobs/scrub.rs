// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads all of the disk that holds data, to find what cannot be read before the guest does.
//!
//! A scrub reports errors to the supervisor and not to the guest, which continues.

use super::{failed, piece, DiskPiece, WalkEnd, Worker, PIECE};
use crate::internal_request::{InternalRequest, InternalWork};
use crate::mirror_target::first;
use crate::{Server, Session};
pub(crate) use control::stats::Scrub;
use control::tapdisk::Call;
use control::Failure;
use diskio::{Data, Errno, SeenErrors};
use drivers::Content;
use std::rc::Rc;

/// Begins a scrub of `rate` bytes in a second. A running scrub changes to this rate, or ends if the rate is 0.
pub(crate) fn start(session: &Rc<Session>, rate: u64) {
    let scrub = &session.jobs().scrub;
    scrub.rate.set(rate);
    let runs = scrub.progress().as_ref().is_some_and(|now| now.running);
    if rate == 0 || runs && scrub.image.get() == session.image() {
        return;
    }
    let progress = Scrub {
        running: true,
        ..Scrub::default()
    };
    let worker = Worker::begin(session, |jobs| &jobs.scrub, progress);
    session.runtime().clone().tasks.spawn(async move {
        match run(&worker).await {
            Ok(WalkEnd::Through | WalkEnd::Stopped) => {}
            Ok(WalkEnd::Closed) => {
                diskio::say!(
                    "tapdisk: the scrub is not finished: its image is not served any more"
                );
            }
            Err(failure) => diskio::say!("tapdisk: the scrub is not finished: {failure}"),
        }
        worker.update(|progress| progress.running = false);
    });
}

async fn run(worker: &Worker<Scrub>) -> Result<WalkEnd, Failure> {
    // CAST: it is small.
    let buffer = Data::zeroed(PIECE as usize).map_err(|error| failed("no memory", error))?;
    let step = async |server: &Rc<Server>, at, left| {
        let piece = look(worker, server, &buffer, at, left).await;
        worker.update(|progress| {
            progress.offset = at + piece.len;
            progress.read += piece.work;
        });
        Ok(piece)
    };
    worker.walk(step).await
}

/// Reads the next piece if it holds data.
async fn look(
    worker: &Worker<Scrub>,
    server: &Rc<Server>,
    buffer: &Data,
    at: u64,
    left: u64,
) -> DiskPiece {
    let len = piece(at, left);
    let failed = |len, error: Errno| {
        server.tell(Call::Read, at, len, error, false);
        worker.update(|progress| progress.errors += 1);
    };
    let extent = match first(server.disk().extents(at, left).await) {
        Ok(extent) => extent,
        Err(error) => {
            // The content is unknown. The piece counts with its full length for the rate limit, because on a disk that
            // is gone all pieces fail at once.
            failed(len, error);
            return DiskPiece { len, work: len };
        }
    };
    if extent.content == Content::Hole {
        let len = extent.len;
        return DiskPiece { len, work: 0 };
    }
    let len = len.min(extent.len);
    let request = InternalRequest {
        // CAST: at most a piece.
        work: InternalWork::Read(buffer.part(0, len as usize)),
        offset: at,
        len,
        fua: false,
    };
    if let Err(why) = request.execute(server, &SeenErrors::default()).await {
        failed(len, why.error);
    }
    DiskPiece { len, work: len }
}
